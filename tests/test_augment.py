"""common/augment.py and sec3_benchmark/randaugment.py, compared with the definition of resizing, with Pillow's
operations, with timm's own transforms, and with the numbers of timm 0.4.12.
"""
import math
import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, auto_augment, create_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision import transforms

from common import augment
from sec3_benchmark import randaugment
from tests.helpers import chw, ks_uniform, near, tensor

BICUBIC = Image.Resampling.BICUBIC


def seed_all(seed):
    """Seed all generators, as the loader does before each sample."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def seeded(seed, transform, image):
    seed_all(seed)
    return transform(image)


def pixels(height, width, channels=3, seed=0):
    """Make a smooth picture with some noise, uint8 (H, W, C), in which interpolation modes and shifts differ."""
    rng = np.random.RandomState(seed)
    waves = np.sin(np.arange(height)[:, None, None] / 9 + np.arange(width)[None, :, None] / 13 + np.arange(channels))
    return np.clip(127 + 90 * waves + 12 * rng.randn(height, width, channels), 0, 255).astype(np.uint8)


def picture(height, width, seed=0):
    return Image.fromarray(pixels(height, width, seed=seed))


# Crop

def crop_boxes(crop, shape, count):
    """Draw `count` crop boxes (top, left, height, width): an array (count, 4)."""
    seed_all(0)
    return np.array([crop.box(*shape) for _ in range(count)])


def test_crop_area_is_uniform_and_aspect_log_uniform():
    # A crop of at most half a square image fits at any aspect ratio: no draw is rejected, the distributions are exact.
    crop = augment.RandomResizedCrop(8, scale=(0.08, 0.5))
    top, left, height, width = crop_boxes(crop, (1000, 1000), 3000).T
    limit = 1.95 / math.sqrt(3000)
    assert ks_uniform(height * width / 1e6, 0.08, 0.5) < limit
    assert ks_uniform(np.log(width / height), math.log(3 / 4), math.log(4 / 3)) < limit
    assert ks_uniform(top / (1000 - height), 0, 1) < limit and ks_uniform(left / (1000 - width), 0, 1) < limit


@pytest.mark.parametrize("shape", [(200, 300), (64, 64), (30, 300), (300, 30), (9, 7)])
def test_crop_is_timms_number_by_number(shape):
    image, crop = Image.new("L", shape[::-1]), augment.RandomResizedCrop(8, (0.2, 1))
    for seed in range(300):
        seed_all(seed)
        expected = RandomResizedCropAndInterpolation.get_params(image, (0.2, 1), (3 / 4, 4 / 3))
        seed_all(seed)
        assert crop.box(*shape) == expected


def test_crop_bounds_and_distribution_where_draws_are_rejected():
    """Compared with torchvision, which draws from the same distribution with another generator."""
    image, crop = Image.new("L", (300, 200)), augment.RandomResizedCrop(8)
    ours = crop_boxes(crop, (200, 300), 3000)
    theirs = np.array([transforms.RandomResizedCrop.get_params(image, (0.08, 1), (3 / 4, 4 / 3)) for _ in range(3000)])
    for boxes in (ours, theirs):
        top, left, height, width = boxes.T
        assert (top >= 0).all() and (left >= 0).all() and (top + height <= 200).all() and (left + width <= 300).all()
        assert (height * width).min() > 0.08 * 60000 * 0.98  # sides are rounded to pixels
        assert (width / height).min() > 3 / 4 - 0.02 and (width / height).max() < 4 / 3 + 0.02
    for measure in (lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 3] / b[:, 2], lambda b: b[:, 0], lambda b: b[:, 1]):
        a, b = np.sort(measure(ours)), np.sort(measure(theirs))
        grid = np.union1d(a, b)
        distance = np.abs(np.searchsorted(a, grid, "right") - np.searchsorted(b, grid, "right")).max() / 3000
        assert distance < 1.95 * math.sqrt(2 / 3000)


@pytest.mark.parametrize("shape, box", [((10, 300), (143, 0, 156, 10)), ((300, 10), (0, 143, 10, 156))])
def test_crop_of_an_extreme_aspect_is_central(shape, box):
    # Even a crop of 8 % of the area is longer than the short side: 10 draws fail, and 10 * 4/3 = 13 of 300 px remain.
    image = picture(*shape)
    expected = image.crop(box).resize((24, 16), BICUBIC)
    for seed in range(3):
        assert near(seeded(seed, augment.RandomResizedCrop((16, 24)), tensor(image)), expected)
    assert RandomResizedCropAndInterpolation.get_params(image, (0.08, 1), (3 / 4, 4 / 3)) == \
        (box[1], box[0], box[3] - box[1], box[2] - box[0])


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_crop_is_the_part_that_timm_draws_resized(mode):
    crop, image = augment.RandomResizedCrop((32, 48), (0.2, 1), interpolation=mode), picture(70, 90)
    for seed in range(10):
        seed_all(seed)
        top, left, height, width = RandomResizedCropAndInterpolation.get_params(image, (0.2, 1), (3 / 4, 4 / 3))
        expected = image.crop((left, top, left + width, top + height)).resize((48, 32), Image.Resampling[mode.upper()])
        assert near(seeded(seed, crop, tensor(image)), expected)


def kernel(mode, x):
    """Return the bilinear or bicubic (a = -0.5) weight at distance x, in float64."""
    x = np.abs(x)
    if mode == "bilinear":
        return np.clip(1 - x, 0, None)
    return np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))


def definition(mode, length, new):
    """Return the matrix (new, length) of an antialiased resize along an axis, whose kernel is an output pixel wide."""
    scale = length / new
    centres = (np.arange(new) + 0.5) * scale
    width = max(scale, 1)
    weights = kernel(mode, (np.arange(length)[None] + 0.5 - centres[:, None]) / width)
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_the_resize_is_as_near_to_its_definition_as_pillows(mode):
    """The definition is computed in float64. Torch and Pillow round between their two passes as well."""
    ours, pillows = [], []
    for seed, (shape, new) in enumerate([((90, 120), (32, 32)), ((40, 30), (64, 64)), ((375, 500), (224, 224)),
                                         ((61, 47), (48, 56))]):
        array = pixels(*shape, seed=seed)
        exact = np.einsum("ih,hwc,jw->ijc", definition(mode, shape[0], new[0]), array.astype(float),
                          definition(mode, shape[1], new[1]), optimize=True).clip(0, 255)
        resized = augment.resize(tensor(array), new, mode).permute(1, 2, 0).numpy()
        ours.append(np.abs(resized - exact).ravel())
        theirs = Image.fromarray(array).resize(new[::-1], Image.Resampling[mode.upper()])
        pillows.append(np.abs(np.asarray(theirs) - exact).ravel())
    ours, pillows = np.concatenate(ours), np.concatenate(pillows)
    assert ours.mean() < 1.1 * pillows.mean() < 0.4 and ours.max() <= max(pillows.max(), 2)


def test_crop_of_a_tiny_image_is_never_empty():
    for seed in range(50):
        assert seeded(seed, augment.pretrain_transform(4, scale=(0.01, 0.1)), tensor(picture(2, 2))).shape == (3, 4, 4)


def test_flip():
    image = tensor(picture(30, 40))
    plain, mirrored, half = (augment.pretrain_transform(16, flip=p) for p in (0.0, 1.0, 0.5))
    flipped = 0
    for seed in range(200):
        straight, reverse = seeded(seed, plain, image), seeded(seed, mirrored, image)
        assert torch.equal(straight.flip(-1), reverse)
        out = seeded(seed, half, image)
        assert torch.equal(out, straight) or torch.equal(out, reverse)
        flipped += torch.equal(out, reverse)
    assert 70 < flipped < 130  # 4 sigma


# RandAugment

def both_signs(*values):
    return [{(value,), (-value,)} for value in values]


NO_ARGUMENT = [{()}] * 4
FACTORS = [{(0.1,), (1.9,)}, {(0.19,), (1.81,)}, {(0.55,), (1.45,)}, {(0.973,), (1.027,)}]
LEVELS = {  # timm 0.4.12's formulas in numbers: every argument that can be drawn at magnitude 10, 9, 5 and 0.3
    "AutoContrast": NO_ARGUMENT,
    "Equalize": NO_ARGUMENT,
    "Invert": NO_ARGUMENT,
    "Rotate": both_signs(30.0, 27.0, 15.0, 0.9),  # degrees
    "PosterizeIncreasing": [{(0,)}, {(1,)}, {(2,)}, {(4,)}],  # bits kept
    "SolarizeIncreasing": [{(0,)}, {(26,)}, {(128,)}, {(249,)}],  # threshold
    "SolarizeAdd": [{(110,)}, {(99,)}, {(55,)}, {(3,)}],
    "ColorIncreasing": FACTORS,
    "ContrastIncreasing": FACTORS,
    "BrightnessIncreasing": FACTORS,
    "SharpnessIncreasing": FACTORS,
    "ShearX": both_signs(0.3, 0.27, 0.15, 0.009),
    "ShearY": both_signs(0.3, 0.27, 0.15, 0.009),
    "TranslateXRel": both_signs(0.45, 0.405, 0.225, 0.0135),  # of the width
    "TranslateYRel": both_signs(0.45, 0.405, 0.225, 0.0135),
}


def test_randaugment_has_the_15_operations_and_levels_of_the_paper():
    ops = randaugment.rand_augment(randaugment.RANDAUGMENT, 224).ops
    assert [op.name for op in ops] == list(LEVELS) and len(ops) == 15
    random.seed(0)
    for op in ops:
        for magnitude, expected in zip((10, 9, 5, 0.3), LEVELS[op.name]):
            drawn = [op.level_fn(magnitude, op.hparams) if op.level_fn else () for _ in range(20)]
            assert {tuple(round(value, 9) for value in args) for args in drawn} == expected, (op.name, magnitude)


def test_randaugment_draws_two_of_fifteen_with_replacement_half_of_them_executed_at_clipped_normal_magnitudes():
    transform = randaugment.rand_augment("rand-m10-mstd0.5-inc1", 32)
    calls = []
    for index, op in enumerate(transform.ops):  # record instead of executing
        op.level_fn = lambda magnitude, hparams, index=index: (calls[-1].append((index, magnitude)) or (0,))
        op.aug_fn = lambda image, *args, **kwargs: image
    seed_all(0)
    for _ in range(6000):
        calls.append([])
        transform(None)
    executed = np.bincount([len(call) for call in calls], minlength=3) / 6000
    assert len(executed) == 3 and np.abs(executed - (0.25, 0.5, 0.25)).max() < 0.03
    names, magnitudes = map(np.array, zip(*(one for call in calls for one in call)))
    assert np.abs(np.bincount(names, minlength=15) / len(names) - 1 / 15).max() < 0.015
    repeated = np.mean([call[0][0] == call[1][0] for call in calls if len(call) == 2])
    assert 0.03 < repeated < 0.11  # 1/15 with replacement, never without
    assert magnitudes.max() == 10 and abs((magnitudes == 10).mean() - 0.5) < 0.03
    below = 10 - magnitudes[magnitudes < 10]
    assert abs(below.mean() - 0.5 * math.sqrt(2 / math.pi)) < 0.03  # half of N(10, 0.5)


def run_op(name, image, config="rand-m10-inc1", seed=0):
    """Execute one operation, with probability 1, at magnitude 10."""
    op = {op.name: op for op in randaugment.rand_augment(config, image.size[::-1]).ops}[name]
    op.prob = 1.0
    return seeded(seed, op, image)


@pytest.mark.parametrize("name", LEVELS)
def test_every_operation_runs_at_magnitude_10(name):
    image = picture(24, 36)
    for seed in range(4):  # both signs
        out = run_op(name, image, seed=seed)
        assert out.mode == "RGB" and out.size == (36, 24)
        assert out.tobytes() != image.tobytes()


def test_posterize_to_zero_bits_is_black_and_timms_table_untouched():
    image = picture(24, 36)
    assert run_op("PosterizeIncreasing", image).tobytes() == bytes(24 * 36 * 3)
    assert {function.__module__ for function in auto_augment.NAME_TO_OP.values()} == {"timm.data.auto_augment"}
    try:  # Pillow raises for 0 bits, which is why we replace it; a version that does not raise must agree
        assert auto_augment.posterize(image, 0).tobytes() == bytes(24 * 36 * 3)
    except ValueError:
        pass
    for bits in range(1, 9):
        masked = np.asarray(image) // 2 ** (8 - bits) * 2 ** (8 - bits)
        assert np.array_equal(np.asarray(randaugment.posterize(image, bits)), masked)


def test_operations_by_hand():
    image = picture(20, 40)
    values = np.asarray(image).astype(int)
    assert np.array_equal(run_op("Invert", image), 255 - values)
    assert np.array_equal(run_op("SolarizeIncreasing", image), 255 - values)  # threshold 0
    assert np.array_equal(run_op("SolarizeIncreasing", image, "rand-m9-inc1"),
                          np.where(values < 26, values, 255 - values))
    assert np.array_equal(run_op("SolarizeAdd", image), np.where(values < 128, np.minimum(values + 110, 255), values))
    results = {run_op("TranslateXRel", image, seed=seed).tobytes() for seed in range(8)}
    shift = 18  # 0.45 * 40
    fill = np.broadcast_to(np.array(randaugment.FILL), (20, shift, 3))
    by_hand = [np.concatenate([values[:, shift:], fill], 1), np.concatenate([fill, values[:, :-shift]], 1)]
    assert results == {array.astype(np.uint8).tobytes() for array in by_hand}
    bright = {run_op("BrightnessIncreasing", image, seed=seed).tobytes() for seed in range(8)}
    assert len(bright) == 2
    for result in bright:
        result = np.frombuffer(result, np.uint8).reshape(values.shape).astype(int)
        factor = 0.1 if result.mean() < values.mean() else 1.9
        assert np.abs(result - np.clip(values * factor, 0, 255)).max() <= 1


def test_fill_and_interpolation_of_geometric_operations():
    assert randaugment.FILL == tuple(round(255 * mean) for mean in IMAGENET_DEFAULT_MEAN)
    image = picture(32, 32)
    results = {run_op("Rotate", image, seed=seed).tobytes() for seed in range(30)}
    assert results == {image.rotate(degrees, resample=BICUBIC, fillcolor=(124, 116, 104)).tobytes()
                       for degrees in (30, -30)}


def test_randaugment_equals_timms_own_on_the_same_seed():
    timms = create_transform(64, is_training=True, auto_augment="rand-m10-mstd0.5-inc1", interpolation="bicubic",
                             separate=True)[1]
    ours = randaugment.rand_augment("rand-m10-mstd0.5-inc1", 64)
    image, refused, changed = picture(40, 50), 0, 0
    for seed in range(150):
        out = seeded(seed, ours, image)
        changed += out.tobytes() != image.tobytes()
        try:
            assert out.tobytes() == seeded(seed, timms, image).tobytes(), seed
        except ValueError:  # timm fails when it posterizes to 0 bits; ours does not
            refused += 1
    assert changed > 100 and refused < 15


def test_train_transform_is_crop_then_flip_then_randaugment():
    image = tensor(picture(60, 80))
    ours, plain = randaugment.train_transform(32), randaugment.train_transform(32, randaugment=None)
    crop, flip, operations = augment.RandomResizedCrop(32), augment.RandomFlip(), randaugment.rand_augment(
        "rand-m10-mstd0.5-inc1", 32)
    for seed in range(30):
        flipped = seeded(seed, lambda image: flip(crop(image)), image)
        assert torch.equal(seeded(seed, plain, image), flipped)
        seed_all(seed)
        flip(crop(image))  # to bring the generators into the state in which the operations use them
        expected = operations(Image.fromarray(flipped.permute(1, 2, 0).numpy()))
        assert torch.equal(seeded(seed, ours, image), chw(expected))


@pytest.mark.parametrize("channels", [1, 5])
def test_randaugment_refuses_other_images(channels):
    image = torch.zeros(channels, 20, 20, dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"this one has {channels}: pass --randaugment none"):
        randaugment.train_transform(16)(image)
    assert randaugment.train_transform(16, randaugment=None)(image).shape == (channels, 16, 16)


@pytest.mark.parametrize("config", ["none", "rand-m9-mstd-inc1", "rand-m9.5", "rand-w0", "augmix-m3", "rand-m9-inc"])
def test_randaugment_descriptions_are_read_whole_or_refused(config):
    with pytest.raises(ValueError, match="--randaugment none"):
        randaugment.train_transform(16, randaugment=config)


# Evaluation

def test_eval_by_hand_at_224():
    image = picture(400, 300)
    resized = image.resize((256, 341), BICUBIC)  # 256 * 400 / 300 = 341.3
    expected = resized.crop((16, 58, 16 + 224, 58 + 224))  # (341 - 224) / 2 = 58.5, rounded to even
    assert near(augment.eval_transform(224)(tensor(image)), expected)


def test_eval_by_hand_at_32():
    image = picture(32, 32)
    expected = image.resize((36, 36), BICUBIC).crop((2, 2, 34, 34))  # floor(32 / 0.875) = 36
    assert near(augment.eval_transform(32)(tensor(image)), expected)


def test_eval_by_hand_at_a_size_that_is_not_square():
    transform = augment.eval_transform((96, 160))  # floor: 109 x 182
    wide, tall = picture(150, 500), picture(200, 300)
    assert near(transform(tensor(wide)), wide.resize((363, 109), BICUBIC).crop((102, 6, 102 + 160, 6 + 96)))
    assert near(transform(tensor(tall)), tall.resize((182, 121), BICUBIC).crop((11, 12, 11 + 160, 12 + 96)))


def test_eval_equals_timms_at_square_sizes():
    rng = np.random.RandomState(0)
    for size in (7, 32, 64, 96):
        timms = create_transform(size, interpolation="bicubic", crop_pct=0.875, normalize=False)
        for height, width in [(size, size), (3, 5), *rng.randint(20, 200, (6, 2))]:
            image = picture(height, width)
            expected = Image.fromarray(timms(image).permute(1, 2, 0).contiguous().numpy())
            assert near(augment.eval_transform(size)(tensor(image)), expected), (size, height, width)


@pytest.mark.parametrize("size", [1, 5, (1, 9), (33, 17)])
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 3), (31, 64)])
def test_eval_covers_the_crop_whatever_the_shape(size, shape):
    out = augment.eval_transform(size)(torch.full((3, *shape), 255, dtype=torch.uint8))
    assert out.shape == ((3, size, size) if isinstance(size, int) else (3, *size))
    assert (out == 255).all()  # no padding


def test_eval_cuts_the_middle_of_a_fitting_image():
    image = tensor(picture(48, 48))
    assert torch.equal(augment.eval_transform(42)(image), image[:, 3:45, 3:45])  # 42 / 0.875 is 48: not resized


# Channels

@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize("transform", [augment.pretrain_transform((24, 32)), augment.eval_transform((24, 32)),
                                       randaugment.train_transform((24, 32), randaugment=None)])
def test_every_channel_goes_the_same_way(transform, channels):
    image = tensor(pixels(50, 70, channels))
    out = seeded(3, transform, image)
    assert out.shape == (channels, 24, 32) and out.dtype == torch.uint8 and out.is_contiguous()
    for channel in range(channels):  # the same crop and flip for one and for all
        alone = seeded(3, transform, image[channel:channel + 1])
        assert alone.shape == (1, 24, 32) and (out[channel].int() - alone[0].int()).abs().max() <= 1


@pytest.mark.parametrize("layout", ["rows of pixels", "planes"])
def test_how_an_image_lies_in_memory_changes_nothing(layout):
    image = tensor(picture(50, 70))
    other = image.contiguous() if layout == "planes" else image.clone(memory_format=torch.preserve_format)
    for transform in (augment.pretrain_transform(24), augment.eval_transform(24), randaugment.train_transform(24)):
        assert torch.equal(seeded(1, transform, image), seeded(1, transform, other))


def test_settings_out_of_range_are_errors():
    for settings in ({"scale": (0.5, 0.1)}, {"scale": (0, 1)}, {"scale": (0.1, 2)}, {"interpolation": "no such"}):
        with pytest.raises(ValueError):
            augment.RandomResizedCrop(16, **settings)(tensor(picture(20, 20)))


def test_defaults_are_the_published_recipes():
    pretrain, train = augment.pretrain_transform(224), randaugment.train_transform(224)
    for transform, interpolation in ((pretrain, "random"), (train, "bicubic")):
        crop, flip = [step for step in transform.transforms if hasattr(step, "scale") or hasattr(step, "p")]
        assert (crop.size, crop.scale, crop.ratio) == ((224, 224), (0.08, 1), (0.75, 4 / 3))
        assert crop.interpolation == interpolation and flip.p == 0.5
    assert randaugment.RANDAUGMENT == "rand-m10-mstd0.5-inc1"


# Randomness

@pytest.mark.parametrize("transform", [augment.pretrain_transform(24), randaugment.train_transform(24),
                                       augment.eval_transform(24)])
def test_the_seed_decides_everything_and_survives_pickling(transform):
    image, copy = tensor(picture(40, 50)), pickle.loads(pickle.dumps(transform))
    first = [seeded(seed, transform, image) for seed in range(40)]
    for seed in reversed(range(40)):  # another history, another object
        assert torch.equal(seeded(seed, copy, image), first[seed])
    if hasattr(transform.transforms[-3], "scale") or len(transform.transforms) > 3:  # not the evaluation
        assert len({out.numpy().tobytes() for out in first}) > 35
