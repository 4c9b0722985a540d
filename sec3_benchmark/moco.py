"""MoCo-v3 (Chen et al. 2021) for the paper's ViTs: views, model, loss, and batch norm over the global batch (A.3).

Two encoders of one architecture see two views of each image. The query of one view, from the trained encoder and its
predictor, should match the key of the other view, from an encoder that follows the trained one slowly, better than the
keys of all other images of the global batch.
"""
import copy
import math
import random

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import ImageFilter
from torch import nn
from torchvision.transforms import ColorJitter, Compose, RandomApply, RandomGrayscale, RandomSolarize

from common.augment import RandomFlip, RandomResizedCrop
from common.distributed import all_sum, rank, world_size
from common.images import from_pillow, to_pillow
from common.mae import sincos_positions
from common.vit import build_vit

# Views

def colour_jitter():
    """The strong jitter of contrastive methods, in four images of five."""
    return RandomApply([ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)], p=0.8)


class GaussianBlur:
    """With probability p, Pillow's blur of a standard deviation U(0.1, sigma) in pixels."""

    def __init__(self, p, sigma=2.0):
        self.p, self.sigma = p, sigma

    def __call__(self, image):
        if random.random() >= self.p:
            return image
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, self.sigma)))


def view_transform(size, scale=(0.08, 1.0), *, blur, solarize, sigma=2.0):
    """One view, in the order of the paper's code; the official MoCo-v3 turns grey before it blurs and flips last."""
    return Compose([RandomResizedCrop(size, scale, interpolation="bilinear"), to_pillow, colour_jitter(),
                    GaussianBlur(blur, sigma), RandomGrayscale(p=0.2), RandomSolarize(threshold=128, p=solarize),
                    from_pillow, RandomFlip()])


# Batch norm over the global batch

class AllSum(torch.autograd.Function):
    """Sum over ranks. Every rank's loss depends on every rank's part, so the gradient is a sum over ranks too."""

    @staticmethod
    def forward(ctx, x):
        return all_sum(x.clone())

    @staticmethod
    def backward(ctx, grad):
        return all_sum(grad.clone())


class GlobalBatchNorm(nn.BatchNorm1d):
    """BatchNorm1d whose statistics are those of all ranks' rows together, equally many on each: (B, C) -> (B, C).

    It differentiates through the sums over ranks, on any backend. PyTorch's SyncBatchNorm refuses CPU tensors, and on
    GPUs waits for the device three times a layer.
    """

    def forward(self, x):
        if world_size() == 1 or not self.training:
            return super().forward(x)
        rows, values = len(x) * world_size(), x.float()
        mean = AllSum.apply(values.sum(dim=0)) / rows
        var = AllSum.apply((values - mean).square().sum(dim=0)) / rows
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * rows / (rows - 1), self.momentum)
        y = (values - mean) * torch.rsqrt(var + self.eps)
        return (y * self.weight + self.bias if self.affine else y).to(x.dtype)


def mlp(*dims):
    """Linear layers without bias, each followed by batch norm; ReLU in between, and no scale or shift at the end."""
    layers = []
    for i, (dim_in, dim_out) in enumerate(zip(dims, dims[1:])):
        last = i == len(dims) - 2
        layers += [nn.Linear(dim_in, dim_out, bias=False), GlobalBatchNorm(dim_out, affine=not last)]
        layers += [] if last else [nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


# The model

class MoCo(nn.Module):
    """Parameter names are the official MoCo-v3's: `base_encoder`, `momentum_encoder` (ViTs whose `head` is the
    projector) and `predictor`. `config` describes the encoder without its projector, which is what others read.
    """

    def __init__(self, model="vit_tiny", *, img_size=224, patch_size=16, in_chans=3, num_heads=12, mlp_dim=4096,
                 out_dim=256, stop_grad_conv1=False):
        super().__init__()
        encoder = build_vit(model, img_size=img_size, patch_size=patch_size, in_chans=in_chans, num_classes=0,
                            num_heads=num_heads, global_pool="token")
        init_encoder(encoder)
        encoder.patch_embed.requires_grad_(not stop_grad_conv1)
        encoder.head = mlp(encoder.embed_dim, mlp_dim, mlp_dim, out_dim)
        self.config = encoder.config
        self.base_encoder = encoder
        self.momentum_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.predictor = mlp(out_dim, mlp_dim, out_dim)

    def queries(self, tokens):
        """Class tokens (N, D) of the base encoder -> (N, out_dim)."""
        return self.predictor(self.base_encoder.head(tokens))

    @torch.no_grad()
    def keys(self, tokens):
        """Class tokens (N, D) of the momentum encoder -> (N, out_dim), without gradient."""
        return self.momentum_encoder.head(tokens)

    @torch.no_grad()
    def update_momentum_encoder(self, m):
        """Every parameter becomes m * itself + (1 - m) * the base encoder's. Buffers of batch norm are its own."""
        torch._foreach_lerp_(list(self.momentum_encoder.parameters()), list(self.base_encoder.parameters()), 1 - m)


def init_encoder(vit):
    """MoCo-v3's initial values: Xavier-uniform Linear weights, of q, k and v each by itself, and patch convolution
    (seen as a matrix), all biases 0, class token of std 1e-6, fixed sin-cos positions.
    """
    for name, module in vit.named_modules():
        if isinstance(module, nn.Linear):
            for weight in module.weight.data.chunk(3 if name.endswith("qkv") else 1):
                nn.init.xavier_uniform_(weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(vit.patch_embed.proj.weight.data.flatten(1))
    nn.init.zeros_(vit.patch_embed.proj.bias)
    nn.init.normal_(vit.cls_token, std=1e-6)
    vit.pos_embed.data[0, 0] = 0
    vit.pos_embed.data[0, 1:] = positions(vit.embed_dim, vit.patch_embed.grid_size)
    vit.pos_embed.requires_grad_(False)


def positions(dim, grid):
    """MAE's fixed table (rows * columns, dim), but the first half of the channels encodes the row, not the column."""
    return sincos_positions(dim, grid).roll(dim // 2, dims=1)


def class_tokens(encoder, images):
    """Images (B, C, H, W) -> class tokens after the last norm (B, D): what the projector reads."""
    return encoder.forward_head(encoder.forward_features(images), pre_logits=True)


# The loss

def contrastive_loss(q, k, temperature):
    """Queries and keys (N, C) of this rank -> scalar: which of all ranks' keys is the query's own? Times 2T, as in the
    official code. In float32.
    """
    q, k = F.normalize(q.float(), dim=1), F.normalize(k.float(), dim=1)
    logits = q @ gather(k).T / temperature  # (N, N * ranks)
    own = torch.arange(len(q), device=q.device) + len(q) * rank()
    return F.cross_entropy(logits, own) * (2 * temperature)


def symmetric_loss(q1, q2, k1, k2, temperature):
    """Each view's queries against the other view's keys."""
    return contrastive_loss(q1, k2, temperature) + contrastive_loss(q2, k1, temperature)


@torch.no_grad()
def gather(x):
    """Rows (N, C) of every rank in order of rank: (N * ranks, C), without gradient."""
    if world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def half_cosine(step, total_steps, start, end=1.0):
    """From `start` to `end` over all steps."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * step / total_steps))
