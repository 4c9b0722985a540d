"""Transforms and views of the recipes: one image in, one uint8 tensor out.

In:   a PIL image, RGB or L, already upright; or, for other numbers of channels, a uint8 tensor (C, H, W).
Out:  a contiguous uint8 tensor (C, H, W). Bytes travel to the device and are normalised there.

What one recipe alone has is in its section: sec3_benchmark/randaugment.py, moco.py, appendix/dino.py.

A PIL image stays one until the last step, so its pixels are those of the authors' pipeline (timm 0.4.12 on PIL).
Every draw comes from the global generators of Python, NumPy and torch, which the loader seeds for each sample;
a transform keeps no state of its own. All of them can be pickled.
"""
import math
import random
from fractions import Fraction
from functools import partial

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, RandomHorizontalFlip
from torchvision.transforms import RandomResizedCrop as TorchvisionCrop
from torchvision.transforms.v2 import functional as F

from common.vit import pair

CROP_PCT = 0.875  # of each side, in every evaluation of the paper


def pretrain_transform(size, scale=(0.08, 1.0), interpolation="random", flip=0.5):
    """Crop and flip, of MAE and D-MAE (A.2); with "bicubic" of transfer (A.4). MAE's own scale is (0.2, 1), bicubic."""
    return Compose([RandomResizedCrop(size, scale, interpolation=interpolation), RandomHorizontalFlip(flip), to_uint8])


def eval_transform(size):
    """Bicubic resize until the image just covers floor(size / CROP_PCT), then the central `size`: 256, then 224."""
    size, resized = pair(size), tuple(math.floor(side / CROP_PCT) for side in pair(size))
    return Compose([partial(resize_to_cover, size=resized), CenterCrop(size), to_uint8])


class RandomResizedCrop:
    """A random part of the image, resized to `size` (H, W): area U(scale) of the image, aspect w/h log-uniform in
    `ratio`, at most 10 tries, then the central crop. Interpolation "random" draws bilinear or bicubic for each image.

    torchvision's draw is timm 0.4.12's rule, from torch's generator rather than Python's. It adds one condition: a
    crop that rounds to zero pixels is drawn again, where timm fails. The crop is resized as timm does it, by PIL.
    """

    def __init__(self, size, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), interpolation="bicubic"):
        if not (0 < scale[0] <= scale[1] <= 1 and 0 < ratio[0] <= ratio[1]):
            raise ValueError(f"scale and ratio are (min, max), the scale within (0, 1], not {scale} and {ratio}")
        self.size, self.scale, self.ratio, self.interpolation = pair(size), tuple(scale), tuple(ratio), interpolation

    def __call__(self, image):
        box = TorchvisionCrop.get_params(image, self.scale, self.ratio)  # top, left, height, width
        interpolation = random.choice(("bilinear", "bicubic")) if self.interpolation == "random" else self.interpolation
        return F.resized_crop(image, *box, list(self.size), InterpolationMode(interpolation), antialias=True)


def resize_to_cover(image, size):
    """The smallest bicubic resize that keeps the aspect and covers `size` (H, W): the tighter side fits exactly, the
    other is rounded down. Enlarges small images too. For a square `size` this is torchvision's Resize(side), timm's
    too; for another, timm 0.4.12 would squash the image to exactly `size` instead."""
    before = F.get_size(image)
    zoom = max(map(Fraction, size, before))  # a fraction, so that nothing is rounded but the product
    return F.resize(image, [int(side * zoom) for side in before], InterpolationMode.BICUBIC, antialias=True)


def to_uint8(image):
    """A PIL image (RGB or L), a uint8 array (H, W) or (H, W, C), or a uint8 tensor (C, H, W): tensor (C, H, W)."""
    if isinstance(image, Image.Image) and image.mode not in ("RGB", "L"):
        raise ValueError(f"a PIL image is RGB or L here, not {image.mode!r}: convert it, or pass a uint8 tensor")
    if not isinstance(image, torch.Tensor):
        pixels = np.atleast_3d(image).transpose(2, 0, 1)
        image = torch.from_numpy(np.array(pixels, order="C"))  # a copy: PIL's memory is read-only
    if image.dtype != torch.uint8 or image.ndim != 3:
        raise ValueError(f"an image is uint8 of shape (C, H, W), not {image.dtype} of shape {tuple(image.shape)}")
    return image.contiguous()
