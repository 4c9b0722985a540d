"""The masked autoencoder (He et al. 2022), straight from its description and with no shortcut.

It embeds every patch before it masks, predicts every patch, and drops what the mask does not ask for at the very
end. That makes it the second opinion for the tests of common/mae.py, and the baseline of the throughput benchmark.
It must therefore share no code with common/mae.py. Names of modules and parameters are the public ones.
Shapes: B images, C channels, a grid of gh x gw = L patches of p x p pixels, K of them kept, widths D and Dd.
"""
from functools import partial

import numpy as np
import torch
from timm.models.vision_transformer import Block
from torch import nn

LayerNorm = partial(nn.LayerNorm, eps=1e-6)


def axis_table(dim, positions):
    """positions (L,) -> (L, dim), float64: dim/2 sines, then dim/2 cosines, of position * 10000^(-k / (dim/2))."""
    frequencies = 10000.0 ** (-np.arange(dim // 2) / (dim // 2))
    angles = positions[:, None] * frequencies[None, :]  # (L, dim/2)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def sincos_table(dim, grid):
    """(1, 1+L, dim), float32: the first half of the channels is the column, the second the row; class token 0."""
    if dim % 4:
        raise ValueError(f"sines and cosines of two axes need a width divisible by 4, not {dim}")
    rows, columns = (index.reshape(-1) for index in np.indices(grid))  # row-major, as the patches are
    patches = np.concatenate([axis_table(dim // 2, columns), axis_table(dim // 2, rows)], axis=1)
    table = np.concatenate([np.zeros((1, dim)), patches], axis=0)
    return torch.from_numpy(table).float().unsqueeze(0)


def gather_tokens(x, ids):
    """x (B, N, D), ids (B, M) -> (B, M, D): token ids[b, m] of sample b."""
    return torch.gather(x, dim=1, index=ids.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def make_blocks(dim, depth, heads, mlp_ratio):
    return nn.ModuleList(Block(dim, heads, mlp_ratio, qkv_bias=True, norm_layer=LayerNorm) for _ in range(depth))


class PatchEmbed(nn.Module):
    def __init__(self, patch_size, in_chans, dim):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images):
        """(B, C, gh*p, gw*p) -> (B, L, D)."""
        return self.proj(images).flatten(2).transpose(1, 2)


class StraightforwardMAE(nn.Module):
    """The defaults are MAE-Tiny: ViT-Tiny with 12 heads at 224 px, and a decoder of one block, 96 wide."""

    def __init__(self, *, img_size=224, patch_size=16, in_chans=3, embed_dim=192, depth=12, num_heads=12,
                 decoder_embed_dim=96, decoder_depth=1, decoder_num_heads=3, mlp_ratio=4, norm_pix_loss=True):
        super().__init__()
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        if any(side % patch_size for side in self.img_size):
            raise ValueError(f"patches of {patch_size} pixels do not tile an image of {self.img_size}")
        self.patch_size, self.norm_pix_loss = patch_size, norm_pix_loss
        self.grid = tuple(side // patch_size for side in self.img_size)

        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(sincos_table(embed_dim, self.grid), requires_grad=False)
        self.blocks = make_blocks(embed_dim, depth, num_heads, mlp_ratio)
        self.norm = LayerNorm(embed_dim)

        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(sincos_table(decoder_embed_dim, self.grid), requires_grad=False)
        self.decoder_blocks = make_blocks(decoder_embed_dim, decoder_depth, decoder_num_heads, mlp_ratio)
        self.decoder_norm = LayerNorm(decoder_embed_dim)
        self.decoder_pred = nn.Linear(decoder_embed_dim, patch_size**2 * in_chans)
        self.initialise()

    @torch.no_grad()
    def initialise(self):
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))  # as a Linear; its bias keeps Conv2d's default
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def patchify(self, images):
        """(B, C, gh*p, gw*p) -> (B, L, p*p*C): patches row-major, within a patch (row, column, channel)."""
        (B, C, _, _), (gh, gw), p = images.shape, self.grid, self.patch_size
        x = images.reshape(B, C, gh, p, gw, p).permute(0, 2, 4, 3, 5, 1)  # (B, gh, gw, p, p, C)
        return x.reshape(B, gh * gw, p * p * C)

    def random_masking(self, x, noise, mask_ratio):
        """x (B, L, D), noise (B, L): the least noise stays. Returns (B, K, D), mask (B, L) 1 = removed, ids_restore."""
        B, L, _ = x.shape
        keep = int(L * (1 - mask_ratio))  # truncated after the float error, as published: 39 of 196 at 0.8, 19 at 0.9
        ids_shuffle = torch.argsort(noise, dim=1)
        ids_restore = torch.argsort(ids_shuffle, dim=1)
        mask = torch.ones(B, L, device=x.device)
        mask[:, :keep] = 0
        return gather_tokens(x, ids_shuffle[:, :keep]), torch.gather(mask, 1, ids_restore), ids_restore

    def encode(self, images, noise, mask_ratio):
        """Returns the latent (B, 1+K, D), mask (B, L) and ids_restore (B, L)."""
        x = self.patch_embed(images) + self.pos_embed[:, 1:]
        x, mask, ids_restore = self.random_masking(x, noise, mask_ratio)
        cls_token = self.cls_token + self.pos_embed[:, :1]
        x = torch.cat([cls_token.expand(len(x), -1, -1), x], dim=1)  # (B, 1+K, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x), mask, ids_restore

    def decode(self, latent, ids_restore):
        """latent (B, 1+K, D) -> the prediction for every patch (B, L, p*p*C)."""
        x = self.decoder_embed(latent)
        B, L = ids_restore.shape
        mask_tokens = self.mask_token.expand(B, L + 1 - x.shape[1], -1)
        patches = gather_tokens(torch.cat([x[:, 1:], mask_tokens], dim=1), ids_restore)
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed  # (B, 1+L, Dd)
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]

    def reconstruction_loss(self, images, pred, mask):
        """Squared error, averaged within each patch, then over the removed patches of the whole batch."""
        target = self.patchify(images)
        if self.norm_pix_loss:
            mean, var = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True, unbiased=True)
            target = (target - mean) / (var + 1e-6).sqrt()
        loss = (pred - target).square().mean(dim=-1)  # (B, L)
        return (loss * mask).sum() / mask.sum()

    def forward(self, images, noise, mask_ratio=0.75):
        """images (B, C, H, W), noise (B, L) -> loss, pred (B, L, p*p*C), mask (B, L) with 1 = removed."""
        if tuple(images.shape[2:]) != self.img_size:
            raise ValueError(f"images are {tuple(images.shape[2:])}, the model was built for {self.img_size}")
        latent, mask, ids_restore = self.encode(images, noise, mask_ratio)
        pred = self.decode(latent, ids_restore)
        return self.reconstruction_loss(images, pred, mask), pred, mask
