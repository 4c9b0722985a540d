"""Random erasing (timm's mode "pixel"), part of the original fine-tuning recipe, "ori." (Appendix A.1)."""
import math
import random

import torch

from common.vit import pair


def erasing_box(size, probability, area=(0.02, 1 / 3), min_aspect=0.3):
    """Sample the box to erase in an image of `size` (H, W): int64 (4,), top, left, height, width; zeros for none.

    The box has a share U(area) of the image and an aspect ratio h/w log-uniform in (min_aspect, 1 / min_aspect). If 10
    samples do not fit, nothing is erased. Rule and random numbers (Python's generator) are those of timm's
    RandomErasing.
    """
    height, width = pair(size)
    if random.random() >= probability:
        return torch.zeros(4, dtype=torch.int64)
    for _ in range(10):
        pixels = random.uniform(*area) * height * width
        aspect = math.exp(random.uniform(math.log(min_aspect), -math.log(min_aspect)))
        h, w = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if h < height and w < width:
            return torch.tensor([random.randint(0, height - h), random.randint(0, width - w), h, w])
    return torch.zeros(4, dtype=torch.int64)


@torch.no_grad()
def erase(images, boxes, seeds):
    """Fill each image's box with N(0, 1) noise, in place, and return the images.

    images: (B, C, H, W), normalised floats on any device. boxes (B, 4), from `erasing_box`, and seeds (B,): on the CPU.
    An image's noise depends on its own seed and box only. It is sampled on the CPU, so that every device gets the same
    numbers, and copied to the device at once. torch's CPU generator uses the low 32 bits of a seed.
    """
    if not images.is_floating_point():
        raise ValueError(f"the noise of random erasing goes on normalised images, and these are {images.dtype}")
    if not len(images) == len(boxes) == len(seeds):
        raise ValueError(f"{len(images)} images need as many boxes and seeds, not {len(boxes)} and {len(seeds)}")
    channels, generator = images.shape[1], torch.Generator()
    places, noise = [], []
    for index, ((top, left, h, w), seed) in enumerate(zip(torch.as_tensor(boxes).tolist(), seeds)):
        if h and w:
            places.append((index, slice(None), slice(top, top + h), slice(left, left + w)))
            noise.append(torch.randn(channels * h * w, generator=generator.manual_seed(int(seed)), dtype=torch.float32))
    if places:
        moved = torch.cat(noise)
        moved = moved.pin_memory() if images.is_cuda else moved  # the copy then does not wait for the device
        moved = moved.to(images.device, images.dtype, non_blocking=True)
        for place, values in zip(places, moved.split([len(values) for values in noise])):
            images[place] = values.view_as(images[place])
    return images
