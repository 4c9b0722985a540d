"""The teacher of a distillation: an MAE or a plain ViT that sees the same visible patches as the student.

Images are converted from the student's mean and std to the teacher's. If the teacher's patches have another size,
images are resized so that both have the same grid of patches; its positions are resized to that grid, bicubic, as timm
does. Registers, which the student does not have, take part in the teacher's blocks, but their rows and columns of the
logits are dropped, as the analysis drops the class token (sec4_analysis/attention.py). The remaining logits need no
correction: their softmax is the full softmax with each row rescaled to sum to 1. A teacher without a class token is
matched on the patches alone.

The teacher runs only up to the last block that is read, without gradient, in the autocast dtype.
"""
import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, resample_abs_pos_embed
from timm.models import VisionTransformer
from timm.models.beit import Beit
from timm.models.vision_transformer import Attention, Block
from torch import nn

from common.distributed import print0
from common.errors import FormatError, UserError
from common.mae import MAE, patchify, take
from common.rebuilding import load_model
from common.shapes import DECODER, STEM, TABLE, fill, shape_config, source_grid
from common.vit import check_heads, final_norm, set_fused_attention
from sec5_distill.distillation import block_logits, check_range

CLASSIFIER = ("head", "attn_pool.")  # parameters behind the final norm


def load_teacher(weights, num_heads=None, grid=(0, 0)):
    """Build the encoder of Weights. Its attribute `statistics` is the mean and std of its training images, or None.

    num_heads: for a file that does not contain it; None: 12 is assumed. grid: the student's (rows, columns), for a file
    without image size whose patches form no square. Raises UserError, with the reason, for what cannot be a teacher.
    """
    has_settings = weights.model is not None or weights.config
    encoder = load_model(weights, num_heads=num_heads) if has_settings else foreign_vit(weights, num_heads, grid)
    check_teacher(encoder, weights.source)
    encoder.statistics = weights.statistics
    return encoder


def check_teacher(encoder, source="it"):
    """Raise UserError, with the reason, unless the model is an MAE or a plain ViT."""
    if not isinstance(encoder, MAE) and (reason := unlike_a_plain_vit(encoder)):
        raise UserError(f"{source} is no teacher: {reason}. Give an MAE or a plain ViT")


def unlike_a_plain_vit(encoder):
    """Return why the model is no plain ViT, in words; None if it is one."""
    kind = type(encoder).__name__
    if isinstance(encoder, Beit):
        return f"a {kind} adds relative positions to q k^T, which a student without them cannot match"
    if type(encoder) is not VisionTransformer:
        return f"a {kind} is no plain ViT"
    parts = [part for block in encoder.blocks for part in (block, getattr(block, "attn", block))]
    other_kinds = sorted(part.__name__ for part in {type(part) for part in parts} - {Block, Attention})
    if other_kinds:
        return f"its blocks ({', '.join(other_kinds)}) are not a plain ViT's"
    if type(encoder.patch_embed) is not PatchEmbed or not isinstance(encoder.patch_embed.norm, nn.Identity):
        return f"a {type(encoder.patch_embed).__name__}, not a convolution alone, embeds its patches"
    return None


def foreign_vit(weights, num_heads, grid):
    """Build the encoder of a file without settings, inferring width, depth and the rest from its tensors."""
    state = {name: value for name, value in weights.state.items() if not name.startswith((*DECODER, *CLASSIFIER))}
    config = shape_config(state, grid)
    if "pos_embed" not in state or f"blocks.0.attn.{TABLE}" in state:
        raise FormatError(f"{weights.source} is no teacher: it has no absolute positions alone. Give a plain ViT")
    if num_heads is None:
        print0(f"{weights.source}: num_heads is not in the file; assuming 12 (--teacher-heads)")
    width, patch = len(state[STEM]), config["patch_size"]
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    _, (rows, columns) = source_grid(weights, grid)
    check_heads(width, num_heads or 12, "--teacher-heads")
    vit = VisionTransformer(
        img_size=(rows * patch, columns * patch), patch_size=patch, in_chans=config["in_chans"], num_classes=0,
        embed_dim=width, depth=depth, num_heads=num_heads or 12, class_token=config["class_token"],
        reg_tokens=config["reg_tokens"], no_embed_class=config["no_embed_class"], global_pool="avg",
        fc_norm="fc_norm.weight" in state, pre_norm="norm_pre.weight" in state,
        qkv_bias="blocks.0.attn.qkv.bias" in state, qk_norm="blocks.0.attn.q_norm.weight" in state,
        init_values=1.0 if "blocks.0.ls1.gamma" in state else None,
        mlp_ratio=len(state.get("blocks.0.mlp.fc1.weight", ())) / width, weight_init="skip")
    return fill(vit, state, weights.source)


def check_teacher_blocks(depth, blocks, layers):
    """Raise UserError if a teacher of this depth lacks one of these blocks or hidden layers."""
    check_range("--teacher-blocks", blocks, 1, depth, "teacher")
    check_range("--teacher-hidden-layers", layers, 0, depth, "teacher")


def at_relative_depth(numbers, depth, teacher_depth, flag):
    """Return the teacher's blocks or hidden layers at the relative depth of the student's: 12 of 24 for 6 of 12.

    numbers: the student's. Raises UserError, which names the argument `flag`, where that is no whole number.
    """
    if unmatched := [number for number in numbers if number * teacher_depth % depth]:
        raise UserError(f"no block or layer of the teacher's {teacher_depth} is as far up as the student's "
                        f"{' '.join(map(str, unmatched))} of {depth}: say which by {flag}")
    return [number * teacher_depth // depth for number in numbers]


def grid_of(encoder) -> tuple[int, int]:
    """Return the grid (rows, columns) of patches of an MAE or timm ViT."""
    return tuple(encoder.grid if isinstance(encoder, MAE) else encoder.patch_embed.grid_size)


def check_channels(student, encoder):
    """Raise UserError unless teacher and student read the same number of channels."""
    ours, theirs = (model.patch_embed.proj.in_channels for model in (student, encoder))
    if ours != theirs:
        raise UserError(f"the teacher reads {theirs} channels and the student {ours}: choose --in-chans {theirs}, or "
                        f"another --teacher")


def conversion(ours, theirs):
    """Return (scale, shift), each (C, 1, 1), from images of one mean and std to the other; None if nothing to do."""
    if not ours or not theirs:
        return None
    if all(abs(a - b) <= 1e-3 for name in ours for a, b in zip(ours[name], theirs[name])):
        return None
    mean, std, their_mean, their_std = (torch.tensor(statistics[name]).view(-1, 1, 1)
                                        for statistics in (ours, theirs) for name in ("mean", "std"))
    return std / their_std, (mean - their_mean) / their_std


class Teacher(nn.Module):
    """A frozen encoder, MAE or plain timm ViT, that returns attention logits of `blocks` and hidden states of `layers`.

    grid: the student's (rows, columns) of patches; statistics: {"mean", "std"} of the student's images; both default to
    the encoder's own. The teacher is not a submodule of the student, so it is in no checkpoint and no optimizer, and
    stays in eval mode.
    """

    def __init__(self, encoder, blocks=(), layers=(), grid=None, statistics=None):
        super().__init__()
        check_teacher(encoder)
        check_teacher_blocks(len(encoder.blocks), blocks, layers)
        self.logit_blocks, self.hidden_layers = tuple(blocks), tuple(layers)
        # logits need only a block's input, so the last block that is read for them does not run
        self.num_full_blocks = max((*(number - 1 for number in blocks), *layers), default=0)
        self.proj, self.norm_pre = encoder.patch_embed.proj, getattr(encoder, "norm_pre", nn.Identity())
        self.blocks, self.norm = encoder.blocks[:self.num_full_blocks + 1], final_norm(encoder)
        self.num_heads, self.dim = encoder.blocks[0].attn.num_heads, encoder.blocks[0].norm1.normalized_shape[-1]
        self._take_tokens(encoder, tuple(grid or grid_of(encoder)))
        theirs = getattr(encoder, "statistics", None)
        for name, values in zip(("scale", "shift"), conversion(statistics, theirs) or (None, None)):
            self.register_buffer(name, values)
        if self.scale is not None:
            print0(f"the teacher sees images of mean {theirs['mean']} and std {theirs['std']}")
        self.eval().requires_grad_(False)

    def _take_tokens(self, encoder, grid):
        """Keep class token and registers as one prefix (1, P, D), with their positions; resize the patches' (L, D)."""
        tokens = [getattr(encoder, name, None) for name in ("cls_token", "reg_token")]
        tokens = [token for token in tokens if token is not None]
        prefix = torch.cat(tokens, dim=1) if tokens else self.proj.weight.new_empty(1, 0, self.dim)
        with_position = 0 if getattr(encoder, "no_embed_class", False) else prefix.shape[1]
        positions = encoder.pos_embed
        if positions is None:
            positions, with_position = prefix.new_zeros(1, grid[0] * grid[1], self.dim), 0
        elif grid != (old := grid_of(encoder)):
            print0(f"the teacher's positions are resized from {old[0]}x{old[1]} to {grid[0]}x{grid[1]}")
            positions = resample_abs_pos_embed(positions, list(grid), list(old), with_position)
        if with_position:
            prefix = prefix + positions[:, :with_position]
        self.grid, self.num_class = grid, int(getattr(encoder, "cls_token", None) is not None)
        self.prefix, self.pos_embed = nn.Parameter(prefix), nn.Parameter(positions[0, with_position:])

    def prepare(self, device, dtype):
        """Move the teacher to the device and cast its matrices to the autocast dtype (None: float32). Return it.

        Autocast would otherwise cast them in every step. Norms stay in float32.
        """
        self.to(device)
        set_fused_attention(self, device, dtype)
        for module in self.modules():
            if dtype is not None and isinstance(module, (nn.Linear, nn.Conv2d)):
                module.to(dtype)
        return self

    @torch.no_grad()
    def forward(self, images, ids_visible):
        """Compute logits and hidden states of the visible patches from the student's images and patch indices.

        images: (B, C, H, W); ids_visible: (B, K). Returns a list of logits (B, hT, N, N) in the order of `blocks`, and
        a list of hidden states (B, N, DT) in the order of `layers`. N = 1 + K, class token first, or K without one.
        """
        x = self.embed(take(patchify(self.view(images), self.grid), ids_visible), ids_visible)
        logits, hidden = {}, {}
        for i in range(self.num_full_blocks + 1):
            if i + 1 in self.logit_blocks:
                logits[i + 1] = block_logits(self.blocks[i], self.without_registers(x))
            if i in self.hidden_layers:
                norm = self.blocks[i].norm1 if i < len(self.blocks) else self.norm
                hidden[i] = norm(self.without_registers(x))
            if i < self.num_full_blocks:
                x = self.blocks[i](x)
        return [logits[number] for number in self.logit_blocks], [hidden[number] for number in self.hidden_layers]

    def view(self, images):
        """Convert the student's images to the size, mean and std of the teacher's."""
        size = [n * patch for n, patch in zip(self.grid, self.proj.kernel_size)]
        if size != list(images.shape[2:]):
            images = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)
        return images if self.scale is None else images * self.scale + self.shift

    def embed(self, patches, ids):
        """Embed patches as MAE.embed does, behind the prefix: (B, K, p*p*C), patch indices (B, K) -> (B, P + K, D)."""
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)
        tokens = F.linear(patches, weight, self.proj.bias) + self.pos_embed[ids]
        return self.norm_pre(torch.cat([self.prefix.expand(len(tokens), -1, -1), tokens], dim=1))

    def without_registers(self, x):
        """Drop the registers, which the student does not have: (B, P + K, D) -> (B, N, D)."""
        P = self.prefix.shape[1]
        return x if P == self.num_class else torch.cat([x[:, :self.num_class], x[:, P:]], dim=1)
