"""Named intermediates of a ViT, without hooks: the encoder runs block by block and hands out what was asked for.

For B images, P prefix tokens (class token, registers), L patches, and blocks counted from 0:

    patch_embed      the patches' tokens before positions are added             (B, L, D)
    embedded         what enters block 0: prefix tokens in front, positions in  (B, P + L, D)
    blocks.i.norm1   what the attention of block i reads                        (B, P + L, D)
    blocks.i.logits  its attention logits, before the softmax                   (B, heads, P + L, P + L)
    blocks.i.attn    the residual stream between attention and MLP              (B, P + L, D)
    blocks.i         the residual stream after block i                          (B, P + L, D)
    norm             the last block's output through the final norm             (B, P + L, D)

For timm's VisionTransformer, its Beit (relative positions), and the encoder of an MAE, which then sees every patch.
"""
import torch
from timm.layers import HybridEmbed
from timm.models import beit, vision_transformer
from torch import nn

from common import vit
from common.errors import UserError
from common.mae import MAE
from sec4_analysis.attention import attention_logits

ENCODERS = (vision_transformer.VisionTransformer, beit.Beit, MAE)
BLOCKS = (vision_transformer.Block, beit.Block)
ATTENTIONS = (vision_transformer.Attention, beit.Attention)


def check_plain(model, name="the model"):
    """Only where the forward pass is known can its pieces be handed out."""
    if not isinstance(model, ENCODERS) or getattr(model, "attn_pool", None) is not None or \
            isinstance(model.patch_embed, HybridEmbed) or \
            any(type(block) not in BLOCKS or type(block.attn) not in ATTENTIONS for block in model.blocks):
        raise UserError(f"{name} is no plain ViT of pre-norm blocks (it is a {type(model).__name__}), so its layers "
                        f"cannot be told apart: choose timm's VisionTransformer or Beit, or an MAE")


def geometry(model):
    """Number of prefix tokens, grid of patches (rows, columns), size of a patch (height, width) in pixels."""
    if isinstance(model, MAE):
        return 1, model.grid, (model.patch_size, model.patch_size)
    return model.num_prefix_tokens, tuple(model.patch_embed.grid_size), tuple(model.patch_embed.patch_size)


def final_norm(model, authors=False):
    """The norm that follows the last block: `norm`, or `fc_norm` in a classifier that pools first.

    authors: what their CKA script used for an MAE. They load it into such a classifier, whose fc_norm is untrained.
    """
    if authors and isinstance(model, MAE):
        return nn.LayerNorm(model.norm.normalized_shape, eps=1e-6).to(model.norm.weight.device)
    return vit.final_norm(model)


def names(model):
    """Everything that can be asked for, in the order in which it is computed."""
    parts = (".norm1", ".logits", ".attn", "")
    return ["patch_embed", "embedded", *(f"blocks.{i}{part}" for i in range(len(model.blocks)) for part in parts),
            "norm"]


def embed(model, images):
    """Images (B, C, H, W) -> the patches' tokens without positions (B, L, D), the tokens of block 0 (B, P + L, D)."""
    if isinstance(model, vision_transformer.VisionTransformer):
        patches = model.patch_embed(images)  # (B, L, D), or (B, rows, columns, D)
        return patches.flatten(1, -2), model.norm_pre(model.patch_drop(model._pos_embed(patches)))
    if isinstance(model, MAE):
        patches = model.patch_embed["proj"](images).flatten(2).transpose(1, 2)
    else:
        patches = model.patch_embed(images)
    tokens = torch.cat([model.cls_token.expand(len(patches), -1, -1), patches], dim=1)
    return patches, tokens if model.pos_embed is None else tokens + model.pos_embed


def add_attention(block, x, normed, shared_bias):
    """The residual stream after the first half of a block; drop path is off in evaluation and left out."""
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


def intermediates(model, images, wanted, norm=None):
    """Yields (name, tensor) for every wanted name, as soon as it is computed, so that the caller can use it and let it
    go: never is more than one block's worth alive. `norm` replaces the model's final norm.
    """
    if absent := sorted(set(wanted) - set(names(model))):
        raise UserError(f"the model has no {', '.join(absent)}: its {len(model.blocks)} blocks count from 0")
    patches, x = embed(model, images)
    if "patch_embed" in wanted:
        yield "patch_embed", patches
    del patches
    if "embedded" in wanted:
        yield "embedded", x
    shared_bias = model.rel_pos_bias() if getattr(model, "rel_pos_bias", None) is not None else None
    for i, block in enumerate(model.blocks):
        normed = block.norm1(x)
        if f"blocks.{i}.norm1" in wanted:
            yield f"blocks.{i}.norm1", normed
        if f"blocks.{i}.logits" in wanted:
            logits = attention_logits(block.attn, normed)
            yield f"blocks.{i}.logits", logits if shared_bias is None else logits + shared_bias
            del logits
        x = add_attention(block, x, normed, shared_bias)
        if f"blocks.{i}.attn" in wanted:
            yield f"blocks.{i}.attn", x
        x = add_mlp(block, x)
        if f"blocks.{i}" in wanted:
            yield f"blocks.{i}", x
    if "norm" in wanted:
        yield "norm", (norm or final_norm(model))(x)
