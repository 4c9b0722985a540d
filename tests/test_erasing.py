"""sec3_benchmark/erasing.py against timm's random erasing, and against its own definition pixel by pixel."""
import math
import random

import numpy as np
import pytest
import torch
from timm.data.random_erasing import RandomErasing

from sec3_benchmark import erasing
from tests.helpers import ks_uniform


def seed_all(seed):
    """Seed all generators as the loader does before each sample."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def test_erasing_box_rate_area_and_aspect():
    random.seed(0)
    boxes = torch.stack([erasing.erasing_box((200, 200), 0.25) for _ in range(6000)])
    assert boxes.dtype == torch.int64 and boxes.shape == (6000, 4)
    drawn = boxes[boxes[:, 2] > 0].numpy()
    assert (boxes[boxes[:, 2] == 0] == 0).all()
    assert abs(len(drawn) / 6000 - 0.25) < 0.022  # 4 sigma
    top, left, height, width = drawn.T
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 200).all() and (left + width <= 200).all()
    assert (height < 200).all() and (width < 200).all()
    share, aspect = height * width / 40000, height / width
    assert share.min() > 0.02 * 0.95 and share.max() < 1 / 3 * 1.01
    assert aspect.min() > 0.3 * 0.95 and aspect.max() < 1 / 0.3 * 1.05
    # Boxes of up to 200 px always fit while share / min aspect < 1; longer ones are drawn again. Compare where none is.
    small = share[share < 0.29]
    assert ks_uniform(small, 0.02, 0.29) < 1.95 / math.sqrt(len(small)) + 0.01
    assert ks_uniform(np.log(aspect[share < 0.29]), math.log(0.3), -math.log(0.3)) < 1.95 / math.sqrt(len(small)) + 0.01


@pytest.mark.parametrize("size", [(64, 64), (30, 90)])
def test_erasing_box_is_timms_on_the_same_seed(size):
    timms = RandomErasing(0.5, mode="pixel", device="cpu")
    torch.manual_seed(0)
    erased = 0
    for seed in range(200):
        random.seed(seed)
        where = timms(torch.zeros(1, *size))[0] != 0
        random.seed(seed)
        top, left, height, width = erasing.erasing_box(size, 0.5).tolist()
        expected = torch.zeros(size, dtype=torch.bool)
        expected[top:top + height, left:left + width] = True
        assert torch.equal(where, expected), seed
        erased += expected.any().item()
    assert erased > 60


def test_erasing_probability_0_and_1():
    assert all((erasing.erasing_box(32, 0.0) == 0).all() for _ in range(100))
    assert all((erasing.erasing_box(32, 1.0)[2:] > 0).all() for _ in range(100))


def erasing_batch():
    images = torch.randn(5, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    boxes = torch.tensor([[3, 4, 20, 30], [0, 0, 0, 0], [0, 0, 31, 47], [29, 44, 3, 4], [5, 6, 1, 2]])
    return images, boxes, torch.tensor([11, 12, 13, 2**40 + 14, 15])


def test_erase_fills_the_box_with_the_seeds_noise_and_nothing_else():
    images, boxes, seeds = erasing_batch()
    before = images.clone()
    assert erasing.erase(images, boxes, seeds) is images
    for image, old, (top, left, h, w), seed in zip(images, before, boxes.tolist(), seeds.tolist()):
        torch.manual_seed(seed)
        expected = old.clone()
        expected[:, top:top + h, left:left + w] = torch.randn(3 * h * w).view(3, h, w)
        assert torch.equal(image, expected)
    noise = images[2, :, :31, :47]
    assert abs(noise.mean()) < 0.06 and abs(noise.std() - 1) < 0.05  # N(0, 1) per pixel and channel
    assert abs(torch.corrcoef(noise.flatten(1))[0, 1]) < 0.1


def test_erase_does_not_depend_on_the_batch():
    images, boxes, seeds = erasing_batch()
    together = erasing.erase(images.clone(), boxes, seeds)
    order = [4, 2, 0, 3]
    assert torch.equal(erasing.erase(images[order], boxes[order], seeds[order]), together[order])
    for i in range(5):
        assert torch.equal(erasing.erase(images[i:i + 1].clone(), boxes[i:i + 1], [int(seeds[i])])[0], together[i])
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    erasing.erase(images, boxes, seeds)
    assert torch.equal(torch.rand(1), expected)  # the global generator is left alone


def test_erase_in_half_precision_rounds_the_same_noise():
    images, boxes, seeds = erasing_batch()
    full = erasing.erase(images.clone(), boxes, seeds)
    assert torch.equal(erasing.erase(images.bfloat16(), boxes, seeds), full.bfloat16())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_erase_on_the_gpu_is_the_same():
    images, boxes, seeds = erasing_batch()
    on_gpu = erasing.erase(images.cuda(), boxes, seeds).cpu()
    assert torch.equal(on_gpu, erasing.erase(images, boxes, seeds))


def test_erase_errors():
    images, boxes, seeds = erasing_batch()
    with pytest.raises(ValueError, match="uint8"):
        erasing.erase(images.byte(), boxes, seeds)
    with pytest.raises(ValueError, match="5 images.*4 and 5"):
        erasing.erase(images, boxes[:4], seeds)
    with pytest.raises(RuntimeError):  # a box that sticks out, such as one drawn for another size
        erasing.erase(images, boxes + torch.tensor([20, 0, 0, 0]), seeds)
