"""Activations of a ViT under fixed names, read by forward hooks while the model runs.

For B images, P prefix tokens (class token, registers), L patches, and blocks counted from 0:

    patch_embed      patch tokens before positions are added                        (B, L, D)
    embedded         the input of block 0: prefix tokens in front, positions added  (B, P + L, D)
    blocks.i.norm1   the input of the attention of block i                          (B, P + L, D)
    blocks.i.logits  the attention logits of block i, before the softmax            (B, heads, P + L, P + L)
    blocks.i.attn    the residual stream between attention and MLP of block i       (B, P + L, D)
    blocks.i         the residual stream after block i                              (B, P + L, D)
    norm             the last block's output after the final norm                   (B, P + L, D)

The model is timm's VisionTransformer, timm's Beit (relative positions), or an MAE, whose encoder here sees all patches.
"""
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

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


# Models

def check_plain(model, name="the model"):
    """Raise UserError unless the model is a plain ViT: in other models the names above would mean something else."""
    if not isinstance(model, ENCODERS) or getattr(model, "attn_pool", None) is not None or \
            isinstance(model.patch_embed, HybridEmbed) or \
            any(type(block) not in BLOCKS or type(block.attn) not in ATTENTIONS for block in model.blocks):
        raise UserError(f"{name} is no plain ViT of pre-norm blocks (it is a {type(model).__name__}), so its layers "
                        f"cannot be told apart: choose timm's VisionTransformer or Beit, or an MAE")


def geometry(model):
    """Return the number of prefix tokens, the grid (rows, columns) and a patch's (height, width) in pixels."""
    if isinstance(model, MAE):
        return 1, model.grid, (model.patch_size, model.patch_size)
    return model.num_prefix_tokens, tuple(model.patch_embed.grid_size), tuple(model.patch_embed.patch_size)


def final_norm(model, authors=False):
    """Return the norm that follows the last block: `norm`, or `fc_norm` in a classifier that averages tokens first.

    authors: for an MAE, return an untrained norm instead. The authors' CKA script loads an MAE into such a classifier,
    whose fc_norm is not in the checkpoint.
    """
    if authors and isinstance(model, MAE):
        return nn.LayerNorm(model.norm.normalized_shape, eps=1e-6).to(model.norm.weight.device)
    return vit.final_norm(model)


def run_encoder(model, images):
    """Run images (B, C, H, W) through all blocks, so that the hooks are called.

    MAE.forward embeds only visible patches, and not through the module `proj`. Here all patches are embedded by it.
    """
    if not isinstance(model, MAE):
        return model.forward_features(images)
    patches = model.patch_embed["proj"](images).flatten(2).transpose(1, 2)  # (B, L, D)
    x = torch.cat([model.cls_token.expand(len(patches), -1, -1), patches], dim=1) + model.pos_embed
    for block in model.blocks:
        x = block(x)
    return x


# Names and hooks

@dataclass
class Point:
    """An activation: the output or input of a module, transformed by the function `of`."""

    module: nn.Module
    at_input: bool = False
    of: Callable = lambda tensor: tensor


def points(model, norm=None):
    """Return all activations {name: Point} of a model, in the order in which they are computed."""
    if isinstance(model, MAE):
        patch_embed = Point(model.patch_embed["proj"], of=lambda maps: maps.flatten(2).transpose(1, 2))
    else:
        patch_embed = Point(model.patch_embed, of=lambda patches: patches.flatten(1, -2))  # or (B, rows, columns, D)
    found = {"patch_embed": patch_embed, "embedded": Point(model.blocks[0], at_input=True)}
    for i, block in enumerate(model.blocks):
        found[f"blocks.{i}.norm1"] = Point(block.norm1)
        found[f"blocks.{i}.logits"] = Point(block.norm1, of=partial(all_logits, model, block.attn))
        found[f"blocks.{i}.attn"] = Point(block.norm2, at_input=True)
        found[f"blocks.{i}"] = Point(block)
    return {**found, "norm": Point(model.blocks[-1], of=norm or final_norm(model))}


def all_logits(model, attention, tokens):
    """Compute the attention logits of an attention's input (B, N, D), with a bias that all blocks share, if any.

    The fused attention kernel does not return its logits. So they are computed in addition to the unchanged forward,
    and only in those blocks whose logits are asked for.
    """
    logits = attention_logits(attention, tokens)
    return logits if getattr(model, "rel_pos_bias", None) is None else logits + model.rel_pos_bias()


class Activations:
    """A reader of activations by name, whose hooks exist only inside a `with`:

        with Activations(model, ["blocks.0.norm1", "norm"], reduce) as read:
            values = read(images)  # {name: reduce(activation)}, in the order in which they are computed

    `reduce` is called as soon as an activation is computed, and only its result is kept, so that the tensors of one
    block at most are in memory. By default the activations themselves are kept. `norm` replaces the model's final norm.
    The model should be in evaluation mode. Raises UserError for unknown names.
    """

    def __init__(self, model, wanted, reduce=lambda activation: activation, norm=None):
        known = points(model, norm)
        if absent := sorted(set(wanted) - set(known)):
            raise UserError(f"the model has no {', '.join(absent)}: its {len(model.blocks)} blocks count from 0")
        self.model, self.reduce, self.found = model, reduce, {}
        self.points = {name: point for name, point in known.items() if name in wanted}

    def __enter__(self):
        self.hooks = [self.hook(name, point) for name, point in self.points.items()]
        return self

    def hook(self, name, point):
        """Register a hook that keeps one activation. It returns None, so the model's own tensor is unchanged."""
        def keep(tensor):
            self.found[name] = self.reduce(point.of(tensor))
        if point.at_input:
            return point.module.register_forward_pre_hook(lambda module, inputs: keep(inputs[0]))
        return point.module.register_forward_hook(lambda module, inputs, output: keep(output))

    def __call__(self, images):
        """Run the model on images (B, C, H, W); return {name: reduced activation}."""
        self.found = {}  # drop what the hooks kept if the model was called directly
        run_encoder(self.model, images)
        found, self.found = self.found, {}
        return {name: found[name] for name in self.points}  # KeyError outside of `with`: there are no hooks

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()


@torch.inference_mode()
def mean_over_images(model, batches, wanted, measure):
    """Average a measure of the activations `wanted` over images, each image weighing the same.

    measure(activation) -> values of each image (B, ...). Returns (activations, ...) in float64, on the CPU.
    """
    total, count = 0.0, 0
    with Activations(model, wanted, lambda activation: measure(activation).double().sum(dim=0)) as read:
        for images in batches:
            total = total + torch.stack(list(read(images).values()))
            count += len(images)
    return (total / count).cpu()
