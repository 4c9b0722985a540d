"""The masked autoencoder (He et al. 2022) with the paper's light decoder (Appendix A.2).

The methods of `MAE` follow the order of the forward pass. Three steps are faster than in the public code, with the
same loss and gradients (tests/test_mae.py):
 1. Visible patches are selected before the patch embedding, so masked patches are never embedded.
 2. The decoder processes its tokens in shuffled order. Attention is permutation-equivariant and each token carries its
    own position embedding, so nothing has to be un-shuffled.
 3. Only masked patches are predicted, because only they enter the loss.

Shapes: B images, C channels, L patches, K visible patches, M = L - K masked patches, D width, p patch size.
For MAE-Tiny at 224 px: L = 196, K = 49, D = 192, p = 16.
"""
import math
from functools import partial

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import nn

from common.augment import pretrain_transform
from common.errors import UserError
from common.ranges import Float, Int
from common.vit import check_heads, model_size, pair, patch_grid

DECODERS = {  # encoder -> its default decoder: width, depth, heads
    "vit_tiny": (96, 1, 3),  # the authors' code; Appendix A.2 compares depths of the decoder
    "vit_small": (192, 1, 6),
    "vit_base": (512, 8, 16),  # the official MAE
    "vit_demo": (48, 1, 3),
}


def sincos_positions(dim: int, grid: tuple[int, int]) -> torch.Tensor:
    """Compute MAE's fixed 2D sin-cos position embedding: grid (rows, columns) -> (rows * columns, dim).

    The first half of the channels encodes the column, the second half the row. Each half holds dim/4 sines, then dim/4
    cosines, of frequencies 10000^(-k / (dim/4)), k = 0, 1, ... MoCo-v3 swaps the halves (sec3_benchmark/moco.py).
    """
    if dim % 4:
        raise UserError(f"a sin-cos table needs a width divisible by 4, not {dim}")
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [position.reshape(-1, 1) * omega for position in (column, row)]  # each (L, dim/4)
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1).float()


def take(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Select tokens of each sample by index: x (B, L, C), ids (B, K) -> (B, K, C).

    One index_select over all samples' tokens is far faster than torch.gather with expanded indices.
    """
    B, L, C = x.shape
    rows = ids + L * torch.arange(B, device=ids.device).unsqueeze(1)
    return x.reshape(B * L, C).index_select(0, rows.flatten()).view(B, -1, C)


def patchify(images: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Split images into the patches of a grid (rows, columns): (B, C, H, W) -> (B, L, p*p*C).

    Patches are in row-major order. The values of a patch are ordered by row, column, channel.
    """
    (B, C, H, W), (h, w) = images.shape, grid
    return images.reshape(B, C, h, H // h, w, W // w).permute(0, 2, 4, 3, 5, 1).reshape(B, h * w, -1)


def normalise_patches(patches: torch.Tensor) -> torch.Tensor:
    """Standardise each patch over its N values: (..., N) -> (..., N), float32.

    Computes (t - mean) / sqrt(var + 1e-6) with the unbiased variance, as the official MAE does. Layer norm divides by
    the biased variance, but with weight sqrt((N - 1) / N) and eps 1e-6 (N - 1) / N it gives the same in one kernel.
    """
    N = patches.shape[-1]
    ratio = (N - 1) / N
    scale = patches.new_full((N,), math.sqrt(ratio), dtype=torch.float32)
    return F.layer_norm(patches.float(), (N,), weight=scale, eps=1e-6 * ratio)


class MAE(nn.Module):
    """A masked autoencoder, whose forward returns the reconstruction loss.

    Parameter names are those of the official MAE. The encoder is the ViT of `common/vit.py` without pooling and head.
    The attribute `config` holds the settings that rebuild the model. decoder_block: the encoder block, counted from 1,
    whose output the decoder reads; None: the last one. Only D2-MAE sets it (sec5_distill/decoupled.py).
    """

    def __init__(self, model="vit_tiny", *, img_size=224, patch_size=16, in_chans=3, num_heads=12, decoder_dim=None,
                 decoder_depth=None, decoder_heads=None, mask_ratio=0.75, norm_pix=True, decoder_block=None):
        super().__init__()
        dim, depth = model_size(model).values()
        default_dim, default_depth, default_heads = DECODERS[model]
        decoder_dim, decoder_depth = decoder_dim or default_dim, decoder_depth or default_depth
        decoder_heads = decoder_heads or default_heads
        check_heads(dim, num_heads)
        check_heads(decoder_dim, decoder_heads, "--decoder-heads")
        self.config = dict(model=model, img_size=list(pair(img_size)), patch_size=patch_size, in_chans=in_chans,
                           num_heads=num_heads, decoder_dim=decoder_dim, decoder_depth=decoder_depth,
                           decoder_heads=decoder_heads, mask_ratio=mask_ratio, norm_pix=norm_pix)
        if decoder_block:  # a plain MAE's config does not have this entry
            self.config["decoder_block"] = decoder_block
        self.grid = patch_grid(img_size, patch_size)
        self.patch_size, self.in_chans, self.norm_pix = patch_size, in_chans, norm_pix
        self.decoder_block = decoder_block
        self.num_patches = self.grid[0] * self.grid[1]
        self.num_visible = int(self.num_patches * (1 - mask_ratio))  # 49 of 196 at 0.75
        if not 0 < self.num_visible < self.num_patches:
            raise UserError(f"--mask-ratio {mask_ratio} leaves {self.num_visible} of {self.num_patches} patches to see")

        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(in_chans, dim, patch_size, patch_size)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = self._fixed_positions(dim)
        self.blocks = nn.ModuleList(self._block(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

        self.decoder_embed = nn.Linear(dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.decoder_pos_embed = self._fixed_positions(decoder_dim)
        self.decoder_blocks = nn.ModuleList(self._block(decoder_dim, decoder_heads) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, patch_size**2 * in_chans)
        self.init_weights()

    @staticmethod
    def _block(dim, heads):
        return Block(dim, heads, mlp_ratio=4, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6))

    def _fixed_positions(self, dim):
        table = torch.cat([torch.zeros(1, dim), sincos_positions(dim, self.grid)])  # zeros for the class token
        return nn.Parameter(table.unsqueeze(0), requires_grad=False)  # (1, 1 + L, dim)

    def init_weights(self):
        """Initialise the weights as the official MAE does.

        Linear weights (qkv as one matrix) and the patch convolution (flattened to a matrix) are Xavier-uniform. The
        convolution's bias keeps PyTorch's default; all other biases are 0. Class and mask token: normal, std 0.02.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, images, noise, states=None):
        """Compute the reconstruction loss of a batch, a scalar.

        images: (B, C, H, W), normalised. noise: (B, L), uniform; the patches with the K smallest values stay visible.
        states: an optional list, for distillation (Section 5). The inputs of each encoder block that runs and of the
        final norm are appended to it, depth + 1 tensors (B, 1 + K, D).
        """
        patches = self.patchify(images)
        ids_shuffle = noise.argsort(dim=1)  # (B, L): the first K patches stay visible, the other M are masked
        ids_visible, ids_masked = ids_shuffle[:, :self.num_visible], ids_shuffle[:, self.num_visible:]
        latent = self.forward_encoder(take(patches, ids_visible), ids_visible, states, self.decoder_block)
        pred = self.forward_decoder(latent, ids_shuffle, skip=self.num_visible)
        return self.loss(pred, take(patches, ids_masked))

    def patchify(self, images):
        """Split images into this model's patches: (B, C, H, W) -> (B, L, p*p*C). Raises UserError for another shape."""
        shape = (self.in_chans, *(n * self.patch_size for n in self.grid))
        if images.shape[1:] != shape:
            raise UserError(f"this model reads images of shape {shape}, not {tuple(images.shape[1:])}")
        return patchify(images, self.grid)

    def embed(self, patches, ids):
        """Embed patches and add their positions: patches (B, K, p*p*C), patch indices (B, K) -> (B, K, D)."""
        weight = self.patch_embed.proj.weight.permute(0, 2, 3, 1).flatten(1)  # (D, p*p*C), ordered as in patchify
        return F.linear(patches, weight, self.patch_embed.proj.bias) + self.pos_embed[0, 1:][ids]

    def forward_encoder(self, visible, ids_visible, states=None, last=None):
        """Encode visible patches: (B, K, p*p*C), patch indices (B, K) -> (B, 1 + K, D), class token first.

        states: as for `forward`. last: the number of blocks to run, all if None; then comes the final norm.
        """
        tokens = self.embed(visible, ids_visible)
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(tokens), -1, -1)
        x = torch.cat([cls_token, tokens], dim=1)
        for block in self.blocks[:last]:
            if states is not None:
                states.append(x)
            x = block(x)
        if states is not None:
            states.append(x)
        return self.norm(x)

    def forward_decoder(self, latent, ids_shuffle, skip=0):
        """Predict patches from the latent (B, 1 + K, D): (B, L - skip, p*p*C), in the order of ids_shuffle (B, L).

        The first `skip` patches in this order are not predicted; skip = K predicts the masked patches alone.
        """
        x = self.decoder_embed(latent)
        B, L = ids_shuffle.shape
        mask_tokens = self.mask_token.to(x.dtype).expand(B, L - self.num_visible, -1)
        x = torch.cat([x, mask_tokens], dim=1)
        positions = torch.cat([self.decoder_pos_embed[:, :1].expand(B, -1, -1),
                               self.decoder_pos_embed[0, 1:][ids_shuffle]], dim=1)
        x = x + positions
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x[:, 1 + skip:]))

    def loss(self, pred, target):
        """Compute the mean squared error over masked patches in float32: pred, target (B, M, p*p*C) -> scalar."""
        if self.norm_pix:
            target = normalise_patches(target)
        return F.mse_loss(pred.float(), target)


def add_arguments(parser):
    """Add to a parser the arguments of MAE's model and recipe, which MAE and D-MAE pre-training share."""
    group = parser.add_argument_group("masked autoencoder")
    group.add_argument("--mask-ratio", type=Float(0, 1), default=0.75, help="share of patches removed")
    group.add_argument("--decoder-dim", type=Int(1), help="width; default by the encoder, 96 for Tiny")
    group.add_argument("--decoder-depth", type=Int(1), help="blocks; default likewise, 1 for Tiny")
    group.add_argument("--decoder-heads", type=Int(1), help="default likewise, 3 for Tiny")
    group.add_argument("--raw-pixels", action="store_true", help="predict raw pixels, not normalised patches")
    group = parser.add_argument_group("recipe (Appendix A.2)")
    group.add_argument("--epochs", type=Int(1), default=400)
    group.add_argument("--batch-size", type=Int(1), default=4096, help="global, over all ranks and accumulation steps")
    group.add_argument("--base-lr", type=Float(0), default=1.5e-4,
                       help="per 256 images: the peak is base * batch / 256")
    group.add_argument("--warmup-epochs", type=Int(0), default=40, help="linear from 0")
    group.add_argument("--weight-decay", type=Float(0), default=0.05, help="not on vectors and biases")
    group.add_argument("--beta2", type=Float(0, 0.9999), default=0.95, help="of AdamW")
    group.add_argument("--crop-min", type=Float(0.001, 1), default=0.08,
                       help="smallest area of a crop; official MAE: 0.2")
    group.add_argument("--clip-grad", type=Float(0), default=0.0, help="largest gradient norm; 0: off")
    group.add_argument("--seed", type=Int(0), default=0)


def build_mae(args, architecture=MAE, **settings) -> MAE:
    """Build the MAE that the parsed arguments describe; `architecture`: a subclass, with `settings` of its own."""
    return architecture(args.model, img_size=args.img_size, patch_size=args.patch_size, in_chans=args.in_chans,
                        num_heads=args.num_heads, decoder_dim=args.decoder_dim, decoder_depth=args.decoder_depth,
                        decoder_heads=args.decoder_heads, mask_ratio=args.mask_ratio, norm_pix=not args.raw_pixels,
                        **settings)


class MAEViews:
    """The views of a training image: a random crop, and the uniform noise (L,) that selects its visible patches."""

    def __init__(self, args, num_patches):
        self.crop, self.num_patches = pretrain_transform(args.img_size, scale=(args.crop_min, 1.0)), num_patches

    def __call__(self, image):
        return {"image": self.crop(image), "noise": torch.rand(self.num_patches)}
