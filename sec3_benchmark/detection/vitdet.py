"""The detector's backbone (Appendix A.5): a plain ViT with window attention, and a feature pyramid on top of it.

After ViTDet (Li et al. 2022), whose detectron2 configuration the authors released. The blocks are timm's, with timm's
parameter names, so any ViT's weights can be loaded; only the attention is replaced. Most blocks attend within windows,
four attend globally, and all learn decomposed relative positions, initialised to 0. There is no class token and no norm
after the last block.
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

LEVELS = ("p2", "p3", "p4", "p5")  # strides 1/4, 1/2, 1 and 2 patches; p6, 4 patches, is p5 subsampled


def window_partition(maps, window):
    """Split maps into windows: (B, H, W, D) -> (B * n, h, w, D), zero-padded at right and bottom; window: (h, w)."""
    B, H, W, D = maps.shape
    h, w = window
    maps = F.pad(maps, (0, 0, 0, -W % w, 0, -H % h))
    maps = maps.view(B, math.ceil(H / h), h, math.ceil(W / w), w, D)
    return maps.transpose(2, 3).reshape(-1, h, w, D)


def window_unpartition(windows, grid):
    """Invert `window_partition`: windows (B * n, h, w, D), grid (H, W) -> maps (B, H, W, D)."""
    (H, W), (_, h, w, D) = grid, windows.shape
    rows, columns = math.ceil(H / h), math.ceil(W / w)
    maps = windows.view(-1, rows, columns, h, w, D).transpose(2, 3)
    return maps.reshape(-1, rows * h, columns * w, D)[:, :H, :W]


class GridAttention(nn.Module):
    """A timm Attention's projections with window attention (window None: global) and decomposed relative positions:

        softmax(q.k / sqrt(head dim) + q.Rh[yq - yk] + q.Rw[xq - xk]) v,      q unscaled in the last two terms.

    The last two terms are computed as extra channels of q and k: q holds q.Rh and q.Rw for every row and column of the
    window, k its one-hot row and column. So fused attention computes everything and no (N, N) bias is stored. As in
    detectron2 the zero padding of the last windows takes part as keys. A window that covers the grid has no padding.
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
        positions = torch.cat([torch.eye(rows).repeat_interleave(columns, 0), torch.eye(columns).repeat(rows, 1)], 1)
        self.register_buffer("one_hot_positions", positions, persistent=False)  # (N, rows + columns)

    def forward(self, tokens, attn_mask=None, is_causal=False):
        """Attend: tokens (B, H * W, D) -> the same shape. The other arguments only match timm's and are unused."""
        B, _, D = tokens.shape
        windows = window_partition(tokens.view(B, *self.grid, D), self.window)  # (B', h, w, D)
        qkv = self.qkv(windows.flatten(1, 2)).unflatten(2, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B', heads, N, head dim) each
        q, k = self.add_position_channels(q, k)
        if self.fused_attn:
            out = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        else:
            out = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        out = self.proj(out.transpose(1, 2).flatten(2))  # (B', N, D)
        return window_unpartition(out.view(-1, *self.window, D), self.grid).reshape(B, -1, D)

    def add_position_channels(self, q, k):
        """Append position channels to q and k (B', heads, N, head dim), so that their product is the biased logits."""
        on_grid = q.unflatten(2, self.window)  # (B', heads, h, w, head dim)
        by_row = torch.einsum("bnyxc,ykc->bnyxk", on_grid, self.rel_pos_h[self.offsets_h])
        by_column = torch.einsum("bnyxc,xkc->bnyxk", on_grid, self.rel_pos_w[self.offsets_w])
        q = torch.cat([q * self.scale, by_row.flatten(2, 3), by_column.flatten(2, 3)], dim=-1)
        k = torch.cat([k, self.one_hot_positions.to(k.dtype).expand(*k.shape[:2], -1, -1)], dim=-1)
        padding = (0, -q.shape[-1] % 8)  # zeros up to a multiple of 8, which fused kernels prefer in half precision
        return F.pad(q, padding), F.pad(k, padding)


class ViTBackbone(nn.Module):
    """The patch embedding, positions and blocks of a timm VisionTransformer for another image size.

    It takes over the ViT's modules and replaces their attention. Blocks in `global_blocks` (from 0) attend globally,
    the others within windows; the outputs of the blocks in `returned` are the result. The position embedding keeps the
    ViT's grid and is resized (bicubic) in each forward. checkpointing: recompute activations in the backward pass.
    Raises UserError for blocks that the ViT lacks.
    """

    def __init__(self, vit, img_size, window=14, global_blocks=(2, 5, 8, 11), returned=(-1,), checkpointing=False):
        super().__init__()
        if not all(0 <= block < len(vit.blocks) for block in global_blocks):
            raise UserError(f"--global-blocks {list(global_blocks)}: the model has blocks 0 to {len(vit.blocks) - 1}")
        self.grid = patch_grid(img_size, vit.patch_embed.patch_size[0])
        self.position_grid = vit.patch_embed.grid_size
        self.patch_embed, self.blocks = vit.patch_embed, vit.blocks
        self.pos_embed = nn.Parameter(vit.pos_embed.detach()[:, -math.prod(self.position_grid):].clone())  # (1, L, D)
        self.returned = [range(len(vit.blocks))[i] for i in returned]
        self.checkpointing = checkpointing
        for i, block in enumerate(self.blocks):
            block.attn = GridAttention(block.attn, self.grid, None if i in global_blocks else window)

    def positions(self):
        """Resize the position embedding to the image's grid: (1, D, H, W)."""
        table = self.pos_embed.transpose(1, 2).unflatten(2, self.position_grid)
        if self.position_grid == self.grid:
            return table
        return F.interpolate(table, size=self.grid, mode="bicubic", align_corners=False)

    def forward(self, images):
        """Encode images (B, 3, H, W): a list of maps (B, D, H / patch, W / patch), one for each block in `returned`."""
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
    """ViTDet's simple feature pyramid: the last map (B, D, h, w) at 4, 2, 1 and 1/2 times its size, and p6."""

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
        """Build {"p2": (B, channels, 4h, 4w), ..., "p6"} from the backbone's list of maps (B, D, h, w)."""
        pyramid = {name: level(maps[-1]) for name, level in self.levels.items()}
        return {**pyramid, "p6": F.max_pool2d(pyramid["p5"], 1, 2)}


class TopDownPyramid(nn.Module):
    """The pyramid of Li et al. 2021: maps of four blocks, resized to four scales, then an FPN with batch norm.

    On several GPUs the batch norm is synchronised (Detection.prepare in detect.py).
    """

    def __init__(self, dim, channels=256):
        super().__init__()
        self.resize = nn.ModuleList([
            nn.Sequential(nn.ConvTranspose2d(dim, dim, 2, 2), nn.BatchNorm2d(dim), nn.GELU(),
                          nn.ConvTranspose2d(dim, dim, 2, 2)),
            nn.ConvTranspose2d(dim, dim, 2, 2), nn.Identity(), nn.MaxPool2d(2)])
        self.fpn = FeaturePyramidNetwork([dim] * 4, channels, LastLevelMaxPool(), norm_layer=nn.BatchNorm2d)

    def forward(self, maps):
        """Build {"p2": (B, channels, 4h, 4w), ..., "p6"} from the backbone's list of maps (B, D, h, w)."""
        resized = {name: resize(maps[i]) for i, (name, resize) in enumerate(zip(LEVELS, self.resize))}
        pyramid = self.fpn(resized)
        return {**{name: pyramid[name] for name in LEVELS}, "p6": pyramid["pool"]}
