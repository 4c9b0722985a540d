"""The backbones: ViT-Tiny, -Small and -Base with 12 heads (Section 3, Appendix A), also with relative positions (B.5).

    vit_tiny           the paper's ViT-Tiny: timm's VisionTransformer; the mean of the patch tokens -> fc_norm -> head
    vit_tiny_rpe       the paper's 79.0 % model: a relative position bias in every block besides absolute positions
    vit_tiny_simmim    relative position bias alone; in SimMIM pre-training all blocks share one table of biases
                       (`shared_table`)

Parameter names, shapes and forward are timm's, so weights load in both directions. Two things differ from timm's
models of these names. Every width has 12 heads: DeiT-Tiny has 3, with parameters of the same shapes, but it is another
function. And weights are initialised as in timm 0.4.12, the version that the authors pinned.

The `_rpe` and `_simmim` models are timm's Beit, which has the names, relative index and forward of BEiT and SimMIM: q
and v have a bias, k has none, and LayerScale (gamma_1, gamma_2) starts at 0.1.
"""
from functools import partial

import torch
from timm.layers import trunc_normal_
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from common.errors import UserError

SIZES = {  # name -> width and depth; the number of heads is an argument, 12 by default
    "vit_tiny": {"embed_dim": 192, "depth": 12},
    "vit_small": {"embed_dim": 384, "depth": 12},
    "vit_base": {"embed_dim": 768, "depth": 12},
    "vit_demo": {"embed_dim": 96, "depth": 12},  # for the demo, not in the paper: half the width of ViT-Tiny
}
VARIANTS = {"_rpe": True, "_simmim": False}  # suffix of a model with relative positions -> also has absolute ones
MODELS = (*SIZES, *(size + variant for size in SIZES for variant in VARIANTS))


def pair(size) -> tuple[int, int]:
    """Convert an int, [int] or (H, W) to the tuple (H, W). Raises UserError for any other length."""
    if isinstance(size, int):
        return size, size
    size = tuple(int(s) for s in size)
    if len(size) not in (1, 2):
        raise UserError(f"an image size is one number or two (height, width), not {size}")
    return size * 2 if len(size) == 1 else size


def patch_grid(img_size, patch_size: int) -> tuple[int, int]:
    """Return the (rows, columns) of patches of an image. Raises UserError if the patches do not tile it."""
    height, width = pair(img_size)
    if height % patch_size or width % patch_size:
        raise UserError(f"patches of {patch_size} px do not tile an image of {height} x {width} px: "
                        f"choose --img-size as multiples of {patch_size}, or another --patch-size")
    return height // patch_size, width // patch_size


def model_size(model: str) -> dict[str, int]:
    """Return {"embed_dim", "depth"} of a plain model's name. Raises UserError for an unknown name."""
    if model not in SIZES:
        raise UserError(f"unknown model {model!r}: one of {', '.join(SIZES)}")
    return SIZES[model]


def check_heads(dim, num_heads, flag="--num-heads"):
    """Raise UserError unless the number of heads divides the width; `flag` is the argument to change."""
    if dim % num_heads:
        raise UserError(f"a width of {dim} cannot be shared by {num_heads} heads: choose a divisor as {flag}")


def build_model(model="vit_tiny", **settings) -> nn.Module:
    """Build and initialise a model of any name in MODELS; settings as for `build_vit` or `build_relative_vit`."""
    return build_relative_vit(model, **settings) if model.endswith(tuple(VARIANTS)) else build_vit(model, **settings)


def build_vit(model="vit_tiny", *, img_size=224, patch_size=16, in_chans=3, num_classes=1000, num_heads=12,
              global_pool="avg", drop_path=0.0, class_token=True, reg_tokens=0, no_embed_class=False,
              init_values=None, architecture=VisionTransformer):
    """Build and initialise a ViT classifier; its attribute `config` holds the settings that rebuild it.

    The defaults are the paper's ViT-Tiny, 5,717,416 parameters. global_pool: "avg" for mean of the patch tokens ->
    fc_norm -> head, "token" for norm -> class token -> head. architecture: a subclass of VisionTransformer.

    Four settings only serve to load other people's weights: class_token=False; reg_tokens, the number of register
    tokens (DINOv2); no_embed_class, where only patches have positions (DeiT III); init_values, the initial LayerScale
    (DeiT III, DINOv2), None for no LayerScale.
    """
    if global_pool == "token" and not class_token:
        raise UserError("this ViT has no class token to pool: choose --global-pool avg")
    config = dict(img_size=list(pair(img_size)), patch_size=patch_size, in_chans=in_chans, num_classes=num_classes,
                  num_heads=num_heads, global_pool=global_pool, class_token=class_token, reg_tokens=reg_tokens,
                  no_embed_class=no_embed_class, init_values=init_values)
    patch_grid(img_size, patch_size)
    check_heads(model_size(model)["embed_dim"], num_heads)
    vit = architecture(**config, drop_path_rate=drop_path, weight_init="skip", **SIZES[model])
    vit.config = {"model": model, **config}
    return init_vit(vit)


def init_vit(vit):
    """Initialise a classifier as timm 0.4.12, the authors' version, does. Returns it.

    Linear weights (head included), position embedding and tokens: truncated normal, std 0.02. Biases: 0. The patch
    convolution keeps PyTorch's default. (Newer timm initialises the class token with std 1e-6.)
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
    """Build and initialise a classifier with relative position bias; arguments as for `build_vit`.

    shared_table: one table of biases for all blocks instead of one for each. The defaults are the paper's model with
    relative positions, 5,825,128 parameters.
    """
    size, _, variant = model.rpartition("_")
    config = dict(img_size=list(pair(img_size)), patch_size=patch_size, in_chans=in_chans, num_classes=num_classes,
                  num_heads=num_heads, global_pool=global_pool)
    patch_grid(img_size, patch_size)
    check_heads(model_size(size)["embed_dim"], num_heads)
    vit = Beit(**config, drop_path_rate=drop_path, init_values=0.1, norm_layer=partial(nn.LayerNorm, eps=1e-6),
               use_abs_pos_emb=VARIANTS["_" + variant], use_rel_pos_bias=not shared_table,
               use_shared_rel_pos_bias=shared_table, **model_size(size))
    vit.config = {"model": model, **config, "shared_table": shared_table}
    return init_relative_vit(vit)


def init_relative_vit(vit, cut=2.0):
    """Initialise a model with relative positions as BEiT and SimMIM do. Returns it.

    Linear and convolution weights, tokens and positions: normal of std 0.02, truncated at +-`cut`. Biases and tables
    of relative positions: 0. Then the last layers of attention and MLP in block i = 1, 2, ... are divided by sqrt(2 i),
    and the head is multiplied by 0.001. Two points differ from timm: the patch convolution is initialised too, and
    SimMIM truncates at one standard deviation (cut=0.02).
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


def set_fused_attention(model, device, dtype=None):
    """Choose how all blocks compute attention: by fused SDPA, or explicitly for bf16 on a CPU. Returns the model.

    dtype: the autocast type, None for float32. On a CPU at head dimension 16, the bf16 backward of SDPA alone took
    twice as long as a whole MAE step with explicit attention. In float32, SDPA saves a tenth of the step.
    """
    fused = torch.device(device).type != "cpu" or dtype is None
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    return model


def final_norm(vit) -> nn.Module:
    """Return the norm that follows the last block: `fc_norm` in a classifier with average pooling, else `norm`."""
    return vit.fc_norm if isinstance(vit.norm, nn.Identity) else vit.norm


def eval_mode(model, device):
    """Move a model to the device in float32 and set it to evaluation mode. Returns the model."""
    return set_fused_attention(model.to(device=device, dtype=torch.float32), device).eval()
