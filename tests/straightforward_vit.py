"""The encoder of a ViT written out block by block, as sec4_analysis/activations.py must see it, and models to try.

For timm's VisionTransformer and Beit in evaluation mode, and for MAE.
"""
import torch
from timm.models import beit
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from common.mae import MAE
from common.vit import eval_mode
from sec4_analysis.attention import attention_logits


def tiny(cls=VisionTransformer, **settings):
    """Three blocks, three heads, 4 x 5 patches; every parameter moved, so that no bias, gain or table is trivial."""
    torch.manual_seed(0)
    model = cls(img_size=(32, 40), patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=4, **settings)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return eval_mode(model, "cpu")


def tiny_mae():
    """An MAE of images as large, moved as much."""
    torch.manual_seed(0)
    model = MAE("vit_demo", img_size=(32, 40), patch_size=8)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return eval_mode(model, "cpu")


def embed(model, images):
    """Images (B, C, H, W) -> the patches' tokens without positions (B, L, D), the tokens of block 0 (B, P + L, D)."""
    if isinstance(model, VisionTransformer):
        patches = model.patch_embed(images)  # (B, L, D), or (B, rows, columns, D)
        return patches.flatten(1, -2), model.norm_pre(model._pos_embed(patches))
    if isinstance(model, MAE):
        patches = model.patch_embed["proj"](images).flatten(2).transpose(1, 2)
    else:
        patches = model.patch_embed(images)
    tokens = torch.cat([model.cls_token.expand(len(patches), -1, -1), patches], dim=1)
    return patches, tokens if model.pos_embed is None else tokens + model.pos_embed


def add_attention(block, x, normed, shared_bias):
    """The residual stream after the first half of a block."""
    if isinstance(block, beit.Block):
        update = block.attn(normed, shared_rel_pos_bias=shared_bias)
        return x + (update if block.gamma_1 is None else block.gamma_1 * update)
    return x + block.ls1(block.attn(normed))


def add_mlp(block, x):
    """The residual stream after the second half of a block."""
    update = block.mlp(block.norm2(x))
    if isinstance(block, beit.Block):
        return x + (update if block.gamma_2 is None else block.gamma_2 * update)
    return x + block.ls2(update)


def everything(model, images):
    """{name: activation} of all there are, in the order in which they are computed."""
    patches, x = embed(model, images)
    found = {"patch_embed": patches, "embedded": x}
    shared_bias = model.rel_pos_bias() if getattr(model, "rel_pos_bias", None) is not None else None
    for i, block in enumerate(model.blocks):
        normed = block.norm1(x)
        logits = attention_logits(block.attn, normed)
        halfway = add_attention(block, x, normed, shared_bias)
        x = add_mlp(block, halfway)
        found |= {f"blocks.{i}.norm1": normed,
                  f"blocks.{i}.logits": logits if shared_bias is None else logits + shared_bias,
                  f"blocks.{i}.attn": halfway, f"blocks.{i}": x}
    norm = model.fc_norm if isinstance(model.norm, nn.Identity) else model.norm
    return {**found, "norm": norm(x)}
