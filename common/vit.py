"""The backbones: ViT-Tiny, -Small and -Base with 12 heads (Section 3, Appendix A), with relative positions too (B.5).

    vit_tiny           the paper's, timm's VisionTransformer: average pooling of the patch tokens before `fc_norm`
    vit_tiny_rpe       its 79.0 model: a table of relative positions in every block, beside the absolute positions
    vit_tiny_simmim    the tables alone; in SimMIM's pre-training one table for all blocks (`shared_table`)

The names, shapes and forward are timm's, so weights travel both ways. What differs is written here: twelve heads at
every width (DeiT-Tiny has three; the shapes are equal, the functions are not), and the initial values that the authors'
pinned timm 0.4.12 gave. The last two are timm's Beit, whose names, relative index and forward are those of BEiT and
SimMIM: q and v have a bias and k none, and LayerScale (gamma_1, gamma_2) starts at 0.1.
"""
from functools import partial

import torch
from timm.layers import trunc_normal_
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from common.errors import UserError

SIZES = {  # name -> width and depth; the number of heads is an argument, 12 unless said otherwise
    "vit_tiny": {"embed_dim": 192, "depth": 12},
    "vit_small": {"embed_dim": 384, "depth": 12},
    "vit_base": {"embed_dim": 768, "depth": 12},
    "vit_demo": {"embed_dim": 96, "depth": 12},  # ours, for the demo: the paper's depth and heads, half its width
}
VARIANTS = {"_rpe": True, "_simmim": False}  # ending of a model's name -> whether it has absolute positions too
MODELS = (*SIZES, *(size + variant for size in SIZES for variant in VARIANTS))


def pair(size):
    """An int, [int] or (H, W) as the tuple (H, W)."""
    if isinstance(size, int):
        return size, size
    size = tuple(int(s) for s in size)
    if len(size) not in (1, 2):
        raise UserError(f"an image size is one number or two (height, width), not {size}")
    return size * 2 if len(size) == 1 else size


def patch_grid(img_size, patch_size):
    """Rows and columns of patches of an (H, W) image; an error if the patches do not tile it."""
    height, width = pair(img_size)
    if height % patch_size or width % patch_size:
        raise UserError(f"patches of {patch_size} px do not tile an image of {height} x {width} px: "
                        f"choose --img-size as multiples of {patch_size}, or another --patch-size")
    return height // patch_size, width // patch_size


def size_of(model):
    """Width and depth of a model's name."""
    if model not in SIZES:
        raise UserError(f"unknown model {model!r}: one of {', '.join(SIZES)}")
    return SIZES[model]


def check_heads(dim, num_heads):
    """Every head takes an equal share of the width."""
    if dim % num_heads:
        raise UserError(f"a width of {dim} cannot be shared by {num_heads} heads: choose a divisor as --num-heads")


def build_model(model="vit_tiny", **settings):
    """Any model by name, from `build_vit` or `build_relative_vit`."""
    return build_relative_vit(model, **settings) if model.endswith(tuple(VARIANTS)) else build_vit(model, **settings)


def build_vit(model="vit_tiny", *, img_size=224, patch_size=16, in_chans=3, num_classes=1000, num_heads=12,
              global_pool="avg", drop_path=0.0, class_token=True, reg_tokens=0, architecture=VisionTransformer):
    """A classifier: `global_pool` "avg" is mean of the patch tokens -> fc_norm -> head, "token" is norm -> class token
    -> head. The default is the paper's ViT-Tiny of 5,717,416 parameters. The module carries its settings as `config`.
    """
    config = dict(img_size=list(pair(img_size)), patch_size=patch_size, in_chans=in_chans, num_classes=num_classes,
                  num_heads=num_heads, global_pool=global_pool, class_token=class_token, reg_tokens=reg_tokens)
    patch_grid(img_size, patch_size)
    check_heads(size_of(model)["embed_dim"], num_heads)
    vit = architecture(**config, drop_path_rate=drop_path, weight_init="skip", **SIZES[model])
    vit.config = {"model": model, **config}
    return init_vit(vit)


def init_vit(vit):
    """Initial values of a classifier in timm 0.4.12, which the paper's results rest on: truncated normal of std 0.02
    for Linear weights (the head too), positions and class token; biases 0. The patch convolution keeps PyTorch's
    default. Today's timm draws the class token with std 1e-6 instead.
    """
    for module in vit.modules():
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name in ("pos_embed", "cls_token", "reg_token"):
        if getattr(vit, name, None) is not None:
            trunc_normal_(getattr(vit, name), std=0.02)
    return vit


def build_relative_vit(model="vit_tiny_rpe", *, img_size=224, patch_size=16, in_chans=3, num_classes=1000,
                       num_heads=12, global_pool="avg", drop_path=0.0, shared_table=False):
    """As `build_vit`. The default is the paper's, of 5,825,128 parameters."""
    size, _, variant = model.rpartition("_")
    config = dict(img_size=list(pair(img_size)), patch_size=patch_size, in_chans=in_chans, num_classes=num_classes,
                  num_heads=num_heads, global_pool=global_pool)
    patch_grid(img_size, patch_size)
    check_heads(size_of(size)["embed_dim"], num_heads)
    vit = Beit(**config, drop_path_rate=drop_path, init_values=0.1, norm_layer=partial(nn.LayerNorm, eps=1e-6),
               use_abs_pos_emb=VARIANTS["_" + variant], use_rel_pos_bias=not shared_table,
               use_shared_rel_pos_bias=shared_table, **size_of(size))
    vit.no_embed_class = False  # said as a VisionTransformer says it: the class token has a position
    vit.config = {"model": model, **config, "shared_table": shared_table}
    return init_relative_vit(vit)


def init_relative_vit(vit, cut=2.0):
    """Truncated normal of std 0.02, cut at +-`cut`, for Linear and convolution weights, tokens and positions; biases
    and tables 0; the outputs of block i = 1, 2, ... divided by sqrt(2 i), the head times 0.001. timm does the same but
    for the patch convolution and SimMIM's cut at one std.
    """
    for module in vit.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            trunc_normal_(module.weight, std=0.02, a=-cut, b=cut)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for token in (vit.cls_token, vit.pos_embed):
        if token is not None:
            trunc_normal_(token, std=0.02, a=-cut, b=cut)
    with torch.no_grad():
        vit.fix_init_weight()
        if isinstance(vit.head, nn.Linear):
            vit.head.weight *= vit.head_init_scale
    return vit


def choose_attention(model, device, dtype=None):
    """The fused kernel, but for bf16 on a CPU matmul, softmax, matmul: at head dimension 16 the fused kernel's bf16
    backward took twice the time of the whole MAE step there, while in float32 it gains a tenth.
    """
    fused = torch.device(device).type != "cpu" or dtype is None
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    return model


def final_norm(vit):
    """The norm behind the last block: `norm`, or `fc_norm` in a classifier that averages its patch tokens first."""
    return vit.fc_norm if isinstance(vit.norm, nn.Identity) else vit.norm


def eval_mode(model, device):
    """A model ready to be measured: on the device, in float32, dropout and drop path off."""
    return choose_attention(model.to(device=device, dtype=torch.float32), device).eval()
