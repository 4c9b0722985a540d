"""The detector's backbone (Appendix A.5): a plain ViT with window attention, and a feature pyramid on top of it.

After ViTDet (Li et al. 2022), whose detectron2 configuration the authors released. The blocks are timm's and carry
their names, so any ViT's weights fit; only their attention is replaced. Most blocks attend within windows, four attend
to the whole image, and all of them learn decomposed relative positions that start at zero. There is no class token, and
no norm after the last block.
"""
import math

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from common.errors import UserError
from common.vit import patch_grid

LEVELS = ("p2", "p3", "p4", "p5")  # strides of a quarter, a half, one and two patches; max-pooling p5 adds p6


def partition(maps, window):
    """maps (B, H, W, D) -> windows (B * n, h, w, D), filled up with zeros at the right and at the bottom."""
    B, H, W, D = maps.shape
    h, w = window
    maps = F.pad(maps, (0, 0, 0, -W % w, 0, -H % h))
    maps = maps.view(B, math.ceil(H / h), h, math.ceil(W / w), w, D)
    return maps.transpose(2, 3).reshape(-1, h, w, D)


def unpartition(windows, grid):
    """The inverse: windows (B * n, h, w, D) -> maps (B, H, W, D) of the grid (H, W)."""
    (H, W), (_, h, w, D) = grid, windows.shape
    rows, columns = math.ceil(H / h), math.ceil(W / w)
    maps = windows.view(-1, rows, columns, h, w, D).transpose(2, 3)
    return maps.reshape(-1, rows * h, columns * w, D)[:, :H, :W]


class GridAttention(nn.Module):
    """A timm Attention for tokens on a grid, within windows (None: over the whole grid), with relative positions:

        softmax(q.k / sqrt(head dim) + q.Rh[yq - yk] + q.Rw[xq - xk]) v,      q unscaled in the last two terms.

    These two are linear in q, so they become further channels: q.Rh and q.Rw for every row and column, against k's
    one-hot row and column. Thus the fused kernel does all of it and no (N, N) bias is stored. The zeros that fill up
    the last windows take part as keys, as in detectron2. Where one window covers the grid there is nothing to fill up.
    """

    def __init__(self, attention, grid, window=None):
        super().__init__()
        self.qkv, self.proj = attention.qkv, attention.proj
        self.num_heads, self.head_dim, self.scale = attention.num_heads, attention.head_dim, attention.scale
        self.fused_attn = attention.fused_attn
        self.grid = tuple(grid)
        covered = window is None or window >= max(grid)
        self.window = self.grid if covered else (window, window)
        for name, side in zip(("h", "w"), self.window):
            self.register_parameter(f"rel_pos_{name}", nn.Parameter(torch.zeros(2 * side - 1, self.head_dim)))
            offsets = torch.arange(side)[:, None] - torch.arange(side) + side - 1  # query - key, from 0
            self.register_buffer(f"offsets_{name}", offsets, persistent=False)
        rows, columns = self.window
        places = torch.cat([torch.eye(rows).repeat_interleave(columns, 0), torch.eye(columns).repeat(rows, 1)], 1)
        self.register_buffer("places", places, persistent=False)  # (N, rows + columns), one-hot each

    def forward(self, tokens, attn_mask=None, is_causal=False):
        """tokens (B, H * W, D) -> the same shape; the last two arguments are timm's and unused."""
        B, _, D = tokens.shape
        windows = partition(tokens.view(B, *self.grid, D), self.window)  # (B', h, w, D)
        qkv = self.qkv(windows.flatten(1, 2)).unflatten(2, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B', heads, N, head dim) each
        q, k = self.with_positions(q, k)
        if self.fused_attn:
            out = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        else:
            out = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        out = self.proj(out.transpose(1, 2).flatten(2))  # (B', N, D)
        return unpartition(out.view(-1, *self.window, D), self.grid).reshape(B, -1, D)

    def with_positions(self, q, k):
        """q, k (B', heads, N, head dim) -> with rows + columns more channels; their product is the biased logits."""
        on_grid = q.unflatten(2, self.window)  # (B', heads, h, w, head dim)
        by_row = torch.einsum("bnyxc,ykc->bnyxk", on_grid, self.rel_pos_h[self.offsets_h])
        by_column = torch.einsum("bnyxc,xkc->bnyxk", on_grid, self.rel_pos_w[self.offsets_w])
        q = torch.cat([q * self.scale, by_row.flatten(2, 3), by_column.flatten(2, 3)], dim=-1)
        k = torch.cat([k, self.places.to(k.dtype).expand(*k.shape[:2], -1, -1)], dim=-1)
        filling = (0, -q.shape[-1] % 8)  # zeros up to a multiple of 8, which fused kernels want in half precision
        return F.pad(q, filling), F.pad(k, filling)


class ViTBackbone(nn.Module):
    """The patch embedding, positions and blocks of a timm VisionTransformer, which it takes over, on another grid.

    `global_blocks` attend to the whole image, the others within windows; `returned` are the blocks whose outputs are
    handed out. The table of positions keeps the size that the ViT has and is resized at each forward (bicubic).
    """

    def __init__(self, vit, img_size, window=14, global_blocks=(2, 5, 8, 11), returned=(-1,), checkpointing=False):
        super().__init__()
        if not all(0 <= block < len(vit.blocks) for block in global_blocks):
            raise UserError(f"--global-blocks {list(global_blocks)}: the model has blocks 0 to {len(vit.blocks) - 1}")
        if window < 1:
            raise UserError(f"--window {window}: at least one patch a side")
        self.grid = patch_grid(img_size, vit.patch_embed.patch_size[0])
        self.position_grid, prefix = vit.patch_embed.grid_size, vit.num_prefix_tokens
        self.patch_embed, self.blocks = vit.patch_embed, vit.blocks
        self.pos_embed = nn.Parameter(vit.pos_embed.detach()[:, prefix:].clone())  # (1, L, D), no class token
        self.returned = [range(len(vit.blocks))[i] for i in returned]
        self.checkpointing = checkpointing
        for i, block in enumerate(self.blocks):
            block.attn = GridAttention(block.attn, self.grid, None if i in global_blocks else window)

    def positions(self):
        """(1, D, H, W) on the image's grid."""
        table = self.pos_embed.transpose(1, 2).unflatten(2, self.position_grid)
        if self.position_grid == self.grid:
            return table
        return F.interpolate(table, size=self.grid, mode="bicubic", align_corners=False)

    def forward(self, images):
        """images (B, 3, H, W) -> the maps (B, D, H / patch, W / patch) of the returned blocks."""
        tokens = (self.patch_embed.proj(images) + self.positions()).flatten(2).transpose(1, 2)
        maps = []
        for i, block in enumerate(self.blocks):
            if self.checkpointing and self.training:
                tokens = checkpoint(block, tokens, use_reentrant=False)
            else:
                tokens = block(tokens)
            if i in self.returned:
                maps.append(tokens.transpose(1, 2).unflatten(2, self.grid))
        return maps


class SimplePyramid(nn.Module):
    """ViTDet's: the last map (B, D, h, w) at four times, twice, once and half its size, with `channels` each."""

    def __init__(self, dim, channels=256):
        super().__init__()
        half, quarter = dim // 2, dim // 4
        up = [nn.Sequential(nn.ConvTranspose2d(dim, half, 2, 2), LayerNorm2d(half), nn.GELU(),
                            nn.ConvTranspose2d(half, quarter, 2, 2)),
              nn.ConvTranspose2d(dim, half, 2, 2), nn.Identity(), nn.MaxPool2d(2)]
        self.levels = nn.ModuleDict({
            level: nn.Sequential(resize, nn.Conv2d(width, channels, 1, bias=False), LayerNorm2d(channels),
                                 nn.Conv2d(channels, channels, 3, padding=1, bias=False), LayerNorm2d(channels))
            for level, resize, width in zip(LEVELS, up, (quarter, half, dim, dim))})

    def forward(self, maps):
        """Returns {"p2": (B, channels, 4h, 4w), ..., "p6"}."""
        pyramid = {name: level(maps[-1]) for name, level in self.levels.items()}
        return {**pyramid, "p6": F.max_pool2d(pyramid["p5"], 1, 2)}


class TopDownPyramid(nn.Module):
    """The pyramid of Li et al. 2021: maps of four depths, resized to four scales, into an FPN with batch norm.

    Between GPUs the statistics are shared (SyncBatchNorm, see Detection.prepare in detect.py).
    """

    def __init__(self, dim, channels=256):
        super().__init__()
        self.resize = nn.ModuleList([
            nn.Sequential(nn.ConvTranspose2d(dim, dim, 2, 2), nn.BatchNorm2d(dim), nn.GELU(),
                          nn.ConvTranspose2d(dim, dim, 2, 2)),
            nn.ConvTranspose2d(dim, dim, 2, 2), nn.Identity(), nn.MaxPool2d(2)])
        self.fpn = FeaturePyramidNetwork([dim] * 4, channels, LastLevelMaxPool(), norm_layer=nn.BatchNorm2d)

    def forward(self, maps):
        """Returns {"p2": (B, channels, 4h, 4w), ..., "p6"}."""
        resized = {name: resize(maps[i]) for i, (name, resize) in enumerate(zip(LEVELS, self.resize))}
        pyramid = self.fpn(resized)
        return {**{name: pyramid[name] for name in LEVELS}, "p6": pyramid["pool"]}
