"""ViTs with relative positions: the paper's 79.0 model, and SimMIM's encoder (Section 3.1, Appendix B.5).

    vit_tiny_rpe       a table of relative positions in every block, beside the absolute positions of the plain ViT
    vit_tiny_simmim    the tables alone; in SimMIM's pre-training one table for all blocks (`shared_table`)

Both are timm's Beit, whose names, relative index and forward are those of BEiT and SimMIM: q and v have a bias and k
none, and LayerScale (gamma_1, gamma_2) starts at 0.1. Every width of common/vit.py has both variants.
"""
from functools import partial

import torch
from timm.layers import trunc_normal_
from timm.models.beit import Beit
from torch import nn

from common.vit import SIZES, build_vit, check_heads, pair, patch_grid, size_of

VARIANTS = {"_rpe": True, "_simmim": False}  # ending of a model's name -> whether it has absolute positions too
MODELS = (*SIZES, *(size + variant for size in SIZES for variant in VARIANTS))


def build_model(model="vit_tiny", **settings):
    """Any model by name, from `build_vit` or `build_relative_vit`."""
    return build_relative_vit(model, **settings) if model.endswith(tuple(VARIANTS)) else build_vit(model, **settings)


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
