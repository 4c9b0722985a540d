"""Named intermediates of a ViT, without hooks: the encoder runs block by block and hands out what was asked for.

For B images, P prefix tokens (class token, registers), L patches, and blocks counted from 0:

    patch_embed      the patches' tokens before positions are added             (B, L, D)
    embedded         what enters block 0: prefix tokens in front, positions in  (B, P + L, D)
    blocks.i.norm1   what the attention of block i reads                        (B, P + L, D)
    blocks.i.logits  its attention logits, before the softmax                   (B, heads, P + L, P + L)
    blocks.i.attn    the residual stream between attention and MLP              (B, P + L, D)
    blocks.i         the residual stream after block i                          (B, P + L, D)
    norm             the last block's output through the final norm             (B, P + L, D)

Any plain timm VisionTransformer will do, and the encoder of an MAE, which then sees every patch.
"""
import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from common.errors import UserError
from common.mae import MAE
from common.vit import attention_logits


def check_plain(model, name="the model"):
    """Only where the forward pass is known can its pieces be handed out."""
    plain = isinstance(model, (VisionTransformer, MAE)) and all(type(b).forward is Block.forward for b in model.blocks)
    if not plain or getattr(model, "attn_pool", None) is not None:
        raise UserError(f"{name} is no plain ViT of pre-norm blocks (it is a {type(model).__name__}): its layers "
                        f"cannot be told apart here. Choose a timm VisionTransformer or an MAE")


def geometry(model):
    """Number of prefix tokens, grid of patches (rows, columns), size of a patch (height, width) in pixels."""
    if isinstance(model, MAE):
        return 1, model.grid, (model.patch_size, model.patch_size)
    return model.num_prefix_tokens, tuple(model.patch_embed.grid_size), tuple(model.patch_embed.patch_size)


def final_norm(model, authors=False):
    """The norm that follows the last block: `norm`, or `fc_norm` in a classifier that pools first.

    authors: what their CKA script used for an MAE. They load it into such a classifier, whose fc_norm is untrained.
    """
    if isinstance(model, MAE):
        return nn.LayerNorm(model.norm.normalized_shape, eps=1e-6).to(model.norm.weight.device) if authors \
            else model.norm
    return model.fc_norm if isinstance(model.norm, nn.Identity) else model.norm


def names(model):
    """Everything that can be asked for, in the order in which it is computed."""
    parts = (".norm1", ".logits", ".attn", "")
    blocks = [f"blocks.{i}{part}" for i in range(len(model.blocks)) for part in parts]
    return ["patch_embed", "embedded", *blocks, "norm"]


def embed(model, images):
    """Images (B, C, H, W) -> the patches' tokens without positions (B, L, D), the tokens of block 0 (B, P + L, D)."""
    if isinstance(model, MAE):
        patches = model.patch_embed["proj"](images).flatten(2).transpose(1, 2)
        return patches, torch.cat([model.cls_token.expand(len(patches), -1, -1), patches], dim=1) + model.pos_embed
    patches = model.patch_embed(images)  # (B, L, D), or (B, rows, columns, D)
    return patches.flatten(1, -2), model.norm_pre(model.patch_drop(model._pos_embed(patches)))


def logits(attention, tokens):
    """As the attention itself has them, a relative bias included: such a module brings its own `logits(tokens)`."""
    if hasattr(attention, "logits"):
        return attention.logits(tokens)
    if type(attention) is not Attention:
        raise UserError(f"the attention logits of a {type(attention).__name__} are not known here")
    return attention_logits(attention, tokens)


def intermediates(model, images, wanted, norm=None):
    """Yields (name, tensor) for every wanted name, as soon as it is computed, so that the caller can use it and let it
    go: at no time is more than one block's worth alive. `norm` replaces the model's final norm.
    """
    if absent := sorted(set(wanted) - set(names(model))):
        raise UserError(f"the model has no {', '.join(absent)}: its {len(model.blocks)} blocks count from 0")
    patches, x = embed(model, images)
    if "patch_embed" in wanted:
        yield "patch_embed", patches
    del patches
    if "embedded" in wanted:
        yield "embedded", x
    for i, block in enumerate(model.blocks):
        normed = block.norm1(x)
        if f"blocks.{i}.norm1" in wanted:
            yield f"blocks.{i}.norm1", normed
        if f"blocks.{i}.logits" in wanted:
            yield f"blocks.{i}.logits", logits(block.attn, normed)
        x = x + block.drop_path1(block.ls1(block.attn(normed)))
        if f"blocks.{i}.attn" in wanted:
            yield f"blocks.{i}.attn", x
        x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        if f"blocks.{i}" in wanted:
            yield f"blocks.{i}", x
    if "norm" in wanted:
        yield "norm", (norm or final_norm(model))(x)
