"""What a ViT computes on the way, by name: forward hooks read it while the model runs.

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
    """Refuse, by a UserError, what is no plain ViT: elsewhere the names above do not mean what they say."""
    if not isinstance(model, ENCODERS) or getattr(model, "attn_pool", None) is not None or \
            isinstance(model.patch_embed, HybridEmbed) or \
            any(type(block) not in BLOCKS or type(block.attn) not in ATTENTIONS for block in model.blocks):
        raise UserError(f"{name} is no plain ViT of pre-norm blocks (it is a {type(model).__name__}), so its layers "
                        f"cannot be told apart: choose timm's VisionTransformer or Beit, or an MAE")


def geometry(model):
    """Return the number of prefix tokens, the grid of patches (rows, columns), a patch's (height, width) in pixels."""
    if isinstance(model, MAE):
        return 1, model.grid, (model.patch_size, model.patch_size)
    return model.num_prefix_tokens, tuple(model.patch_embed.grid_size), tuple(model.patch_embed.patch_size)


def final_norm(model, authors=False):
    """Return the norm that follows the last block: `norm`, or `fc_norm` in a classifier that pools first.

    authors: what their CKA script used for an MAE. They load it into such a classifier, whose fc_norm is untrained.
    """
    if authors and isinstance(model, MAE):
        return nn.LayerNorm(model.norm.normalized_shape, eps=1e-6).to(model.norm.weight.device)
    return vit.final_norm(model)


def run_encoder(model, images):
    """Let images (B, C, H, W) go through all blocks; what comes out is for the hooks.

    An MAE's own forward embeds the visible patches alone, and by a matrix. This is the usual order on all of them.
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
    """Where an activation is met: at a module's output, or its input, and what is made of the tensor there."""

    module: nn.Module
    at_input: bool = False
    of: Callable = lambda tensor: tensor


def points(model, norm=None):
    """Return {name: Point} of all activations, in the order in which they are computed."""
    if isinstance(model, MAE):
        patch_embed = Point(model.patch_embed["proj"], of=lambda maps: maps.flatten(2).transpose(1, 2))
    else:
        patch_embed = Point(model.patch_embed, of=lambda patches: patches.flatten(1, -2))  # maybe (B, rows, columns, D)
    found = {"patch_embed": patch_embed, "embedded": Point(model.blocks[0], at_input=True)}
    for i, block in enumerate(model.blocks):
        found[f"blocks.{i}.norm1"] = Point(block.norm1)
        found[f"blocks.{i}.logits"] = Point(block.norm1, of=partial(all_logits, model, block.attn))
        found[f"blocks.{i}.attn"] = Point(block.norm2, at_input=True)
        found[f"blocks.{i}"] = Point(block)
    return {**found, "norm": Point(model.blocks[-1], of=norm or final_norm(model))}


def all_logits(model, attention, tokens):
    """Return the attention's logits of its input (B, N, D), a table of positions that all blocks share in them.

    Computed anew, as the fused kernel shows them to nobody: so it stays on, and only who asks for logits pays.
    """
    logits = attention_logits(attention, tokens)
    return logits if getattr(model, "rel_pos_bias", None) is None else logits + model.rel_pos_bias()


class Activations:
    """Read activations by name, batch by batch; the hooks are there inside a `with` alone:

        with Activations(model, ["blocks.0.norm1", "norm"], reduce) as read:
            values = read(images)  # {name: reduce(activation)}, in the order in which they are computed

    `reduce` is called as soon as an activation is there and only its result is kept, so that no more than one block's
    tensors are alive at a time. By default the activations themselves are kept, those asked for. `norm` replaces the
    model's final norm. The model should be in evaluation mode. A UserError for names that it has not.
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
        """Register what keeps one activation and returns None, by which the model goes on with its own."""
        def keep(tensor):
            self.found[name] = self.reduce(point.of(tensor))
        if point.at_input:
            return point.module.register_forward_pre_hook(lambda module, inputs: keep(inputs[0]))
        return point.module.register_forward_hook(lambda module, inputs, output: keep(output))

    def __call__(self, images):
        """Run the model on images (B, C, H, W); return {name: reduced activation}."""
        self.found = {}  # the model may have been called by others too
        run_encoder(self.model, images)
        found, self.found = self.found, {}
        return {name: found[name] for name in self.points}  # a KeyError outside of `with`, where nothing is read

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
