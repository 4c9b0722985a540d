"""Transforms and views of the recipes: a uint8 tensor (C, H, W) in, a contiguous one out.

Bytes travel to the device and are normalised there. What one recipe alone has is in its section:
sec3_benchmark/randaugment.py, moco.py, appendix/dino.py.

Departure: the authors resize by Pillow (timm 0.4.12), here torch does it, bicubic or bilinear with antialiasing, on
bytes too. Both round between their two passes, whose order differs; both are equally near to the exact result, 0.3 grey
levels of 255 on average.

Every draw comes from the global generators of Python, NumPy and torch, which the loader seeds for each sample;
a transform keeps no state of its own. All of them can be pickled.
"""
import math
import random
from fractions import Fraction
from functools import partial

import torch.nn.functional as F
from torchvision.transforms import Compose

from common.images import contiguous
from common.vit import pair

CROP_PCT = 0.875  # of each side, in every evaluation of the paper


def pretrain_transform(size, scale=(0.08, 1.0), interpolation="random", flip=0.5):
    """Crop and flip, of MAE and D-MAE (A.2); with "bicubic" of transfer (A.4). MAE's own scale is (0.2, 1), bicubic."""
    return Compose([RandomResizedCrop(size, scale, interpolation=interpolation), RandomFlip(flip), contiguous])


def eval_transform(size):
    """Bicubic resize until the image just covers floor(size / CROP_PCT), then the central `size`: 256, then 224."""
    size, resized = pair(size), tuple(math.floor(side / CROP_PCT) for side in pair(size))
    return Compose([partial(resize_to_cover, size=resized), partial(central_crop, size=size), contiguous])


class RandomResizedCrop:
    """A random part of the image, resized to `size` (H, W): area U(scale) of the image, aspect w/h log-uniform in
    `ratio`, at most 10 tries, then the central crop. Interpolation "random" draws bilinear or bicubic for each image.

    The draw is timm's, number by number. A crop that rounds to zero pixels, where timm fails, has one.
    """

    def __init__(self, size, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), interpolation="bicubic"):
        if not (0 < scale[0] <= scale[1] <= 1 and 0 < ratio[0] <= ratio[1]):
            raise ValueError(f"scale and ratio are (min, max), the scale within (0, 1], not {scale} and {ratio}")
        self.size, self.scale, self.ratio, self.interpolation = pair(size), tuple(scale), tuple(ratio), interpolation

    def __call__(self, image):
        top, left, height, width = self.box(*image.shape[1:])
        interpolation = random.choice(("bilinear", "bicubic")) if self.interpolation == "random" else self.interpolation
        return resize(image[:, top:top + height, left:left + width], self.size, interpolation)

    def box(self, rows, columns):
        """Top, left, height and width of the part of an image of so many rows and columns."""
        low, high = map(math.log, self.ratio)
        for _ in range(10):
            area = random.uniform(*self.scale) * rows * columns
            aspect = math.exp(random.uniform(low, high))
            width, height = max(1, round(math.sqrt(area * aspect))), max(1, round(math.sqrt(area / aspect)))
            if width <= columns and height <= rows:
                return random.randint(0, rows - height), random.randint(0, columns - width), height, width
        width = min(columns, round(rows * self.ratio[1]))  # the whole image, or as much as has an allowed aspect
        height = min(rows, round(columns / self.ratio[0]))
        return (rows - height) // 2, (columns - width) // 2, max(1, height), max(1, width)


class RandomFlip:
    """Left and right exchanged, with probability p."""

    def __init__(self, p=0.5):
        self.p = p

    def __call__(self, image):
        return image.flip(-1) if random.random() < self.p else image


def resize(image, size, interpolation="bicubic"):
    """A uint8 tensor (C, H, W) at another size (H, W), antialiased."""
    batch = image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)  # so torch sees how decoded pixels lie, and is faster
    return F.interpolate(batch, size, mode=interpolation, antialias=True)[0]


def resize_to_cover(image, size):
    """The smallest bicubic resize that keeps the aspect and covers `size` (H, W): the tighter side fits exactly, the
    other is rounded down. Enlarges small images too. For a square `size` this is torchvision's Resize(side), timm's
    too; for another, timm 0.4.12 would squash the image to exactly `size` instead."""
    before = image.shape[1:]
    zoom = max(map(Fraction, size, before))  # a fraction, so that nothing is rounded but the product
    return resize(image, [int(side * zoom) for side in before])


def central_crop(image, size):
    """The middle `size` (H, W) of an image that is no smaller; of an odd rest, the half is rounded to even."""
    top, left = (round((whole - part) / 2) for whole, part in zip(image.shape[1:], size))
    return image[:, top:top + size[0], left:left + size[1]]
