"""SimMIM (Xie et al. 2022) on a ViT: replace masked patches by a mask token and predict their pixels (Appendix B.5).

Unlike MAE's, the encoder processes all tokens, masked ones included, and the decoder is a single 1x1 convolution.
Parameter names are the official ones: `encoder.*`, `decoder.0.*`.
"""
import math

import torch
from timm.layers import trunc_normal_
from torch import nn

from common.errors import UserError
from common.vit import VARIANTS, build_model, init_relative_vit, patch_grid


class SimMIM(nn.Module):
    """SimMIM: encoder, mask token and decoder; forward returns the loss.

    Models vit_*_simmim are the official encoder: one relative position bias table shared by all blocks, LayerScale, and
    no absolute positions. A plain ViT (vit_tiny) has absolute positions, no bias table and no LayerScale.
    """

    def __init__(self, model="vit_tiny_simmim", *, img_size=224, patch_size=16, in_chans=3, num_heads=12,
                 drop_path=0.1):
        super().__init__()
        relative = model.endswith(tuple(VARIANTS))
        shared = {"shared_table": True} if relative else {}
        self.encoder = build_model(model, img_size=img_size, patch_size=patch_size, in_chans=in_chans, num_classes=0,
                                   num_heads=num_heads, global_pool="token", drop_path=drop_path, **shared)
        dim = self.encoder.embed_dim
        self.encoder.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.decoder = nn.Sequential(nn.Conv2d(dim, patch_size**2 * in_chans, kernel_size=1),
                                     nn.PixelShuffle(patch_size))
        # The encoder as others load it: common/pretrained.py copies the shared table into every block
        self.config = {**self.encoder.config, **({"shared_table": False} if relative else {})}
        self.grid, self.patch_size, self.in_chans = patch_grid(img_size, patch_size), patch_size, in_chans
        if relative:
            init_relative_vit(self.encoder, cut=0.02)  # SimMIM truncates at one standard deviation
        trunc_normal_(self.encoder.mask_token, std=0.02, a=-0.02, b=0.02)

    def forward(self, images, mask):
        """Compute the loss: images (B, C, H, W), normalised; mask (B, h, w) bool over patches, True: masked."""
        return masked_l1(images, self.decoder(self.forward_encoder(images, mask)), mask, self.patch_size)

    def forward_encoder(self, images, mask):
        """Encode images with masked patches to features of all patches: (B, D, h, w)."""
        encoder, B = self.encoder, len(images)
        x = encoder.patch_embed(images)  # (B, L, D)
        x = torch.where(mask.flatten(1).unsqueeze(-1), encoder.mask_token.to(x.dtype), x)  # before positions are added
        x = torch.cat([encoder.cls_token.expand(B, -1, -1), x], dim=1)
        if encoder.pos_embed is not None:
            x = x + encoder.pos_embed
        table = getattr(encoder, "rel_pos_bias", None)
        shared = {} if table is None else {"shared_rel_pos_bias": table()}
        for block in encoder.blocks:
            x = block(x, **shared)
        return encoder.norm(x)[:, 1:].transpose(1, 2).reshape(B, -1, *self.grid)


def masked_l1(images, reconstruction, mask, patch_size):
    """Return the mean absolute error over masked pixels, in float32. images (B, C, H, W), mask (B, h, w) of patches."""
    pixels = mask.repeat_interleave(patch_size, 1).repeat_interleave(patch_size, 2).unsqueeze(1).float()
    difference = (images.float() - reconstruction.float()).abs() * pixels
    return difference.sum() / (pixels.sum() + 1e-5) / images.shape[1]


def unit_grid(grid, unit):
    """Return (rows, columns) of mask units of unit x unit patches. Raises UserError if they do not tile the patches."""
    if grid[0] % unit or grid[1] % unit:
        raise UserError(f"mask units of {unit} x {unit} patches do not tile {grid[0]} x {grid[1]} patches: "
                        f"choose another --mask-unit or --img-size")
    return grid[0] // unit, grid[1] // unit


def random_mask(grid, unit=2, ratio=0.6) -> torch.Tensor:
    """Sample the mask of one image over its patches: (h, w) bool, True: masked.

    Masks ceil(ratio * units) units of unit x unit patches: 30 of 49 at 224 px. The official unit is 32 px, two patches
    of 16 px; with smaller patches the default unit is smaller too.
    """
    rows, columns = unit_grid(grid, unit)
    mask = torch.zeros(rows * columns, dtype=torch.bool)
    mask[torch.randperm(rows * columns)[:math.ceil(rows * columns * ratio)]] = True
    return mask.view(rows, columns).repeat_interleave(unit, 0).repeat_interleave(unit, 1)
