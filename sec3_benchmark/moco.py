"""MoCo-v3 (Chen et al. 2021) for the paper's ViTs: views, batch norm over the global batch, model, loss (A.3).

Two encoders of the same architecture process two views of each image. The query of one view (base encoder, projector,
predictor) is trained to match the key of the other view (momentum encoder, projector), against the keys of all other
images in the global batch.
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
    """Build the strong colour jitter of contrastive methods, applied with probability 0.8."""
    return RandomApply([ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)], p=0.8)


class GaussianBlur:
    """With probability p, blur a PIL image by a Gaussian of standard deviation U(0.1, sigma) pixels."""

    def __init__(self, p, sigma=2.0):
        self.p, self.sigma = p, sigma

    def __call__(self, image):
        if random.random() >= self.p:
            return image
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, self.sigma)))


def view_transform(size, scale=(0.08, 1.0), *, blur, solarize, sigma=2.0):
    """Build the transform of one view: uint8 tensor (C, H, W) -> contiguous uint8 tensor (C, *size).

    blur, solarize: probabilities. The order is that of the paper's code; in the official MoCo-v3's, greyscale comes
    before blur.
    """
    return Compose([RandomResizedCrop(size, scale, interpolation="bilinear"), to_pillow, colour_jitter(),
                    GaussianBlur(blur, sigma), RandomGrayscale(p=0.2), RandomSolarize(threshold=128, p=solarize),
                    from_pillow, RandomFlip()])


# Batch norm over the global batch

class AllSum(torch.autograd.Function):
    """Sum over ranks, with gradient: every rank's loss depends on every rank's summand, so gradients are summed too."""

    @staticmethod
    def forward(ctx, x):
        return all_sum(x.clone())

    @staticmethod
    def backward(ctx, grad):
        return all_sum(grad.clone())


class GlobalBatchNorm(nn.BatchNorm1d):
    """BatchNorm1d with the statistics of the global batch: (B, C) -> (B, C). Every rank must have the same B.

    Gradients flow through the sums over ranks, on any backend. PyTorch's SyncBatchNorm rejects CPU tensors, and on GPUs
    synchronises the device three times per layer.
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
    """Build an MLP of these widths: each layer is Linear without bias, batch norm and ReLU.

    The last batch norm is not affine and has no ReLU after it.
    """
    layers = []
    for i, (dim_in, dim_out) in enumerate(zip(dims, dims[1:])):
        last = i == len(dims) - 2
        layers += [nn.Linear(dim_in, dim_out, bias=False), GlobalBatchNorm(dim_out, affine=not last)]
        layers += [] if last else [nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


# The model

class MoCo(nn.Module):
    """Base encoder, momentum encoder and predictor.

    Parameter names are those of the official MoCo-v3; the `head` of each ViT is its projector. `config` describes the
    encoder without projector, the part that fine-tuning loads. stop_grad_conv1 freezes the patch embedding.
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
        """Project and predict class tokens of the base encoder: (N, D) -> (N, out_dim)."""
        return self.predictor(self.base_encoder.head(tokens))

    @torch.no_grad()
    def keys(self, tokens):
        """Project class tokens of the momentum encoder, without gradient: (N, D) -> (N, out_dim)."""
        return self.momentum_encoder.head(tokens)

    @torch.no_grad()
    def update_momentum_encoder(self, m):
        """Update all parameters: momentum = m * momentum + (1 - m) * base. Batch-norm buffers are not averaged."""
        torch._foreach_lerp_(list(self.momentum_encoder.parameters()), list(self.base_encoder.parameters()), 1 - m)


def init_encoder(vit):
    """Initialise a ViT as MoCo-v3 does.

    Linear weights (q, k and v as separate matrices) and patch convolution (flattened to a matrix) are Xavier-uniform,
    all biases 0, the class token normal with std 1e-6, the position embedding fixed sin-cos.
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
    vit.pos_embed.data[0, 1:] = moco_positions(vit.embed_dim, vit.patch_embed.grid_size)
    vit.pos_embed.requires_grad_(False)


def moco_positions(dim, grid):
    """Compute MoCo-v3's sin-cos table (rows * columns, dim): MAE's, but the row in the first half of the channels."""
    return sincos_positions(dim, grid).roll(dim // 2, dims=1)


def class_tokens(encoder, images):
    """Encode images (B, C, H, W) to class tokens after the final norm (B, D), the projector's input."""
    return encoder.forward_head(encoder.forward_features(images), pre_logits=True)


# The loss

def contrastive_loss(q: torch.Tensor, k: torch.Tensor, temperature: float) -> torch.Tensor:
    """Compute InfoNCE in float32: queries and keys (N, C) of this rank -> scalar.

    Each query's positive is the key of the same row; its negatives are all other keys of all ranks. The cross-entropy
    is multiplied by 2 * temperature, as in the official code.
    """
    q, k = F.normalize(q.float(), dim=1), F.normalize(k.float(), dim=1)
    logits = q @ gather_rows(k).T / temperature  # (N, N * ranks)
    own = torch.arange(len(q), device=q.device) + len(q) * rank()
    return F.cross_entropy(logits, own) * (2 * temperature)


def symmetric_loss(q1, q2, k1, k2, temperature):
    """Sum the contrastive losses of each view's queries against the other view's keys, all (N, C) -> scalar."""
    return contrastive_loss(q1, k2, temperature) + contrastive_loss(q2, k1, temperature)


@torch.no_grad()
def gather_rows(x):
    """Concatenate the rows of all ranks, in order of rank and without gradient: (N, C) -> (N * ranks, C)."""
    if world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def half_cosine(step, total_steps, start, end=1.0):
    """Interpolate from `start` at step 0 to `end` at `total_steps` along half a cosine."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * step / total_steps))
