"""Image transforms that the recipes share: they map a uint8 tensor (C, H, W) to a contiguous uint8 tensor.

Images reach the device as bytes and are normalised there. Transforms of a single recipe are in its section:
sec3_benchmark/randaugment.py, sec3_benchmark/moco.py, appendix/dino.py.

Departure from the authors' code: they resize with Pillow (timm 0.4.12); here torch resizes the bytes, bicubic or
bilinear with antialiasing. Both round after each of two passes, in opposite order, and both differ from the exact
result by 0.3 grey levels of 255 on average.

Random numbers come from the global generators of Python, NumPy and torch, which the loader seeds for each sample.
Transforms have no state of their own and can be pickled.
"""
import math
import random
from fractions import Fraction
from functools import partial

import torch.nn.functional as F
from torchvision.transforms import CenterCrop, Compose

from common.images import contiguous
from common.vit import pair

CROP_PCT = 0.875  # side of the centre crop / side of the resized image, in every evaluation of the paper


def pretrain_transform(size, scale=(0.08, 1.0), interpolation="random", flip=0.5):
    """Build a random resized crop with a flip: for MAE and D-MAE (A.2), and with "bicubic" for transfer (A.4).

    The official MAE uses scale (0.2, 1) and bicubic interpolation.
    """
    return Compose([RandomResizedCrop(size, scale, interpolation=interpolation), RandomFlip(flip), contiguous])


def eval_transform(size):
    """Build the transform of evaluations: a bicubic resize to cover floor(size / CROP_PCT), then the central `size`.

    For size 224: the shorter side becomes 256, then a central crop of 224 x 224.
    """
    size, resized = pair(size), tuple(math.floor(side / CROP_PCT) for side in pair(size))
    return Compose([partial(resize_to_cover, size=resized), CenterCrop(size), contiguous])


class RandomResizedCrop:
    """Crop a random box and resize it to `size` (H, W).

    The box's share of the image's area is uniform in `scale`, and its aspect ratio w/h is log-uniform in `ratio`. After
    10 boxes that do not fit, the box is the central one. Interpolation "random" chooses bilinear or bicubic for each
    image. The same random numbers give timm's boxes, except that a side that rounds to 0, where timm fails, becomes 1.
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
        """Draw the box (top, left, height, width) in an image of this many rows and columns."""
        low, high = map(math.log, self.ratio)
        for _ in range(10):
            area = random.uniform(*self.scale) * rows * columns
            aspect = math.exp(random.uniform(low, high))
            width, height = max(1, round(math.sqrt(area * aspect))), max(1, round(math.sqrt(area / aspect)))
            if width <= columns and height <= rows:
                return random.randint(0, rows - height), random.randint(0, columns - width), height, width
        width = min(columns, round(rows * self.ratio[1]))  # the image, cut to an allowed aspect ratio
        height = min(rows, round(columns / self.ratio[0]))
        return (rows - height) // 2, (columns - width) // 2, max(1, height), max(1, width)


class RandomFlip:
    """Mirror the image horizontally with probability p."""

    def __init__(self, p=0.5):
        self.p = p

    def __call__(self, image):
        return image.flip(-1) if random.random() < self.p else image


def resize(image, size, interpolation="bicubic"):
    """Resize a uint8 tensor (C, H, W) to `size` (H, W) with antialiasing."""
    batch = image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)  # channels-last strides: faster
    return F.interpolate(batch, size, mode=interpolation, antialias=True)[0]


def resize_to_cover(image, size):
    """Resize an image, keeping its aspect ratio, to the smallest that covers `size` (H, W); small ones are enlarged.

    One side fits exactly, and the other is rounded down. For a square `size` this is Resize(side) of torchvision and
    timm; for others, timm 0.4.12 would change the aspect ratio and resize to exactly `size`.
    """
    before = image.shape[1:]
    zoom = max(map(Fraction, size, before))  # an exact fraction, so that only the product is rounded
    return resize(image, [int(side * zoom) for side in before])
