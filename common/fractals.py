"""A generated data set of fractals, with which every script runs without a download.

After FractalDB (Kataoka et al., "Pre-training without natural images", ACCV 2020): a class is an iterated function
system (IFS) of 2 to 8 random affine maps of the plane; an image of the class is the system's attractor, drawn by the
chaos game with slightly perturbed parameters. It departs from FractalDB, so that an image takes about a millisecond and
the task is neither too hard nor too easy for a small network:

- every map is a contraction; FractalDB only requires that the points stay finite;
- an attractor keeps its aspect ratio, and attractors that fill almost the whole square are rejected too;
- each image perturbs all six parameters of each map, not one, and also rotation, scale and position;
- images have colours and a background, both independent of the class.

An image depends only on (seed, class, index) and its size, not on its batch or a global random generator.
"""
import functools
import math
from contextlib import suppress
from pathlib import Path

import numpy as np

from common.checkpoint import write_atomically
from common.distributed import once_per_node
from common.errors import UserError
from common.vit import pair
from common.watch import progress

VERSION = 2  # part of the cache file's name: increase it with any change that affects pixels
MAPS = (2, 8)  # fewest and most maps of a system; arrays hold 8, of which unused ones are 0 and have probability 0
CONTRACTION = 0.8  # largest singular value allowed in a class's maps
FILLING = (0.2, 0.7)  # allowed share of the bounding square's pixels that the attractor visits; FractalDB: > about 0.2
FILLING_SIZE = 128  # resolution at which that share is measured, pixels a side
JITTER = 0.1  # an image scales each parameter by 1 +- this; maps still contract: (1 + sqrt(2) JITTER) CONTRACTION < 1
ROTATION, SHIFT = 15, 0.05  # largest rotation in degrees and largest shift as a share of the canvas, both +-
SCALE = (0.75, 1.05)  # range of (longer side of the attractor) / (shorter side of the canvas)
GROUND, RAMP, NOISE = 0.5, 0.7, 0.15  # colour range of the background, of the attractor, of the pixel noise
LIGHT_ON_DARK = 0.8  # share of images with a light attractor; 0.5 made the task far harder to learn, 1.0 far easier
CHAINS = 512  # points per image that play the chaos game in parallel
BURN_IN = 6  # steps before points are drawn; chains start on the attractor, so these only spread them over it
POINTS_PER_PIXEL = 4  # points drawn / pixels of the canvas: some 10 to 20 on each pixel of the attractor
CHUNK = 16 * 64 * 64  # pixels rendered at once: the arrays fit into the processor's cache
# Uniform random numbers of an image, in the order of sampling: name -> count
UNIFORMS = {"jitter": 48, "pose": 5, "tones": 8, "mix": 1, "levels": 3, "ramp": 9, "background": 48, "noise": 1}

DOWNSTREAM = 1_000_000  # first class of the downstream splits
# split -> its first class, and whether the indices of its images are even (0) or odd (1): no two splits share an image
SPLITS = {"train": (0, 0), "val": (0, 1), "downstream-train": (DOWNSTREAM, 0), "downstream-val": (DOWNSTREAM, 1)}


@functools.cache
def class_system(seed, cls):
    """Sample the IFS of a class: (8, 6), where row (a, b, c, d, e, f) maps (x, y) to (ax + by + e, cx + dy + f).

    Unused rows are 0. Systems are drawn until the filling rate of one lies within FILLING.
    """
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(cls,)))
    while True:
        maps = np.zeros((MAPS[1], 6), np.float32)
        for i in range(rng.integers(MAPS[0], MAPS[1] + 1)):
            while not 0 < np.linalg.norm(maps[i, :4].reshape(2, 2), 2) <= CONTRACTION:
                maps[i] = rng.uniform(-1, 1, 6)
        if FILLING[0] <= filling_rate(maps, rng) <= FILLING[1]:
            maps.setflags(write=False)  # the cache returns the same array to every caller
            return maps


def filling_rate(maps, rng):
    """Estimate which share of its bounding square, FILLING_SIZE x FILLING_SIZE pixels, an attractor covers."""
    steps = BURN_IN + POINTS_PER_PIXEL * FILLING_SIZE**2 // CHAINS
    x, y = chaos_game(byte_tables(maps[None])[0], rng.integers(0, 256, (1, steps, CHAINS), np.uint8))
    side = max(np.ptp(x), np.ptp(y)) * 1.001 + 1e-6  # margin: the largest value stays inside
    row, col = (((v - v.min()) / side * FILLING_SIZE).astype(int) for v in (y, x))
    return len(np.unique(row * FILLING_SIZE + col)) / FILLING_SIZE**2


def byte_tables(maps):
    """Tabulate the map that each value of a random byte selects: maps (B, 8, 6) -> (6, B, 256), (B, 256).

    Returns the parameters and the index of the selected map. As in FractalDB, a map's probability is proportional to
    the determinant |ad - bc| of its linear part, here rounded to a multiple of 1/256.
    """
    a, b, c, d, _, _ = np.moveaxis(maps, 2, 0)
    cumulative = np.cumsum(np.abs(a * d - b * c), axis=1)
    levels = (np.arange(256, dtype=np.float32) + 0.5) / 256
    number = (cumulative[:, :-1, None] < levels * cumulative[:, -1:, None]).sum(axis=1)  # (B, 256), 0..7
    return np.moveaxis(np.take_along_axis(maps, number[..., None], axis=1), 2, 0), number


def chaos_game(tables, choices):
    """Generate points of the attractors: tables (6, B, 256), choices (B, T, C) bytes -> x, y (B, T - BURN_IN, C).

    C chains take T steps; a byte chooses the map of a step. A chain starts at the fixed point of its first map, which
    lies on the attractor.
    """
    batch, steps, chains = choices.shape
    tables = np.ascontiguousarray(tables).reshape(6, -1)
    offset = 256 * np.arange(batch)[:, None]
    a, b, c, d, e, f = tables[:, choices[:, 0] + offset]  # (B, C) each
    det = (1 - a) * (1 - d) - b * c
    x, y = ((1 - d) * e + b * f) / det, ((1 - a) * f + c * e) / det
    xs, ys = np.empty((2, batch, steps - BURN_IN, chains), np.float32)
    for step in range(steps):
        choice = choices[:, step] + offset
        a, b, c, d, e, f = (np.take(t, choice) for t in tables)
        x, y = a * x + b * y + e, c * x + d * y + f
        if step >= BURN_IN:
            xs[:, step - BURN_IN], ys[:, step - BURN_IN] = x, y
    return xs, ys


def sample_instances(seed, classes, indices, steps, noise_bytes):
    """Sample all random numbers of B images: uniforms {name: (B, n)}, bytes (B, steps, CHAINS), (B, noise_bytes).

    Uniforms come first in each image's random stream, so its shape, pose and colours are the same at every image size.
    """
    counts = [8 * sum(UNIFORMS.values()), steps * CHAINS, noise_bytes + -noise_bytes % 8]  # bytes, full 64-bit words
    raw = np.empty((len(classes), sum(counts) // 8), np.uint64)
    for row, cls, index in zip(raw, classes, indices, strict=True):
        row[:] = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(cls, index))).random_raw(len(row))
    first, choices, noise = np.split(raw.view(np.uint8), np.cumsum(counts)[:-1], axis=1)
    uniforms = ((first.view(np.uint64) >> np.uint64(40)) * 2.0**-24).astype(np.float32)  # 24 bits: exact in float32
    uniforms = dict(zip(UNIFORMS, np.split(uniforms, np.cumsum(list(UNIFORMS.values()))[:-1], axis=1), strict=True))
    return uniforms, choices.reshape(len(raw), steps, CHAINS), noise[:, :noise_bytes]


def points_to_pixels(x, y, pose, height, width):
    """Find the pixel of each point: x, y (B, n), pose (B, 5) uniforms -> pixel indices (B, n), row by row.

    The pose rotates, mirrors, scales and shifts the points. Points outside the canvas get the index height * width.
    """
    turn, flip, scale, down, right = pose.T[..., None]  # (B, 1) each
    angle = np.deg2rad(np.float32(ROTATION)) * (2 * turn - 1)
    x = np.where(flip < 0.5, -x, x)
    x, y = np.cos(angle) * x - np.sin(angle) * y, np.sin(angle) * x + np.cos(angle) * y
    top, left = y.min(axis=1, keepdims=True), x.min(axis=1, keepdims=True)
    high, wide = y.max(axis=1, keepdims=True) - top, x.max(axis=1, keepdims=True) - left  # the bounding box
    zoom = min(height, width) * (SCALE[0] + (SCALE[1] - SCALE[0]) * scale) / np.maximum(high, wide)
    row = np.floor((y - top - high / 2) * zoom + height * (0.5 + SHIFT * (2 * down - 1))).astype(np.int32)
    col = np.floor((x - left - wide / 2) * zoom + width * (0.5 + SHIFT * (2 * right - 1))).astype(np.int32)
    inside = (row >= 0) & (row < height) & (col >= 0) & (col < width)
    return np.where(inside, row * width + col, height * width)


def accumulate_points(pixel, tone, pixels):
    """Count the points on each pixel and average their tones: pixel, tone (B, n) -> counts, means (B, pixels)."""
    shape = len(pixel), pixels + 1  # one extra bin for points outside the canvas
    bins = (pixel + shape[1] * np.arange(shape[0])[:, None]).ravel()
    count = np.bincount(bins, minlength=shape[0] * shape[1]).reshape(shape)[:, :-1]
    total = np.bincount(bins, tone.ravel(), shape[0] * shape[1]).reshape(shape)[:, :-1]
    return count, (total / np.maximum(count, 1)).astype(np.float32)


def interpolate_axis(grid, length, axis):
    """Interpolate an array linearly along one axis, to `length` values."""
    at = np.linspace(0, grid.shape[axis] - 1, length, dtype=np.float32)
    left = np.minimum(at.astype(int), grid.shape[axis] - 2)
    part = (at - left).astype(np.float32).reshape(-1, *[1] * (grid.ndim - 1 - axis))
    return np.take(grid, left, axis) * (1 - part) + np.take(grid, left + 1, axis) * part


def colour_images(count, tone, noise, u, height, width):
    """Colour the pixels of B images: counts and mean tones of their points (B, H * W) -> (B, H, W, 3) uint8.

    noise: (B, H * W * 3) bytes; u: the uniforms of `sample_instances`.
    """
    batch = len(count)
    dark, contrast, swap = u["levels"].T[:, :, None]  # (B, 1) each
    dark, light = 0.05 + 0.3 * dark, 0.4 + 0.3 * dark + 0.25 * contrast  # grey levels, at least 0.35 apart
    behind, front = np.where(swap < LIGHT_ON_DARK, dark, light), np.where(swap < LIGHT_ON_DARK, light, dark)
    image = (behind + GROUND * (u["background"] - 0.5)).reshape(batch, 4, 4, 3)
    image = interpolate_axis(interpolate_axis(image, height, 1), width, 2)
    visited = np.maximum((count > 0).sum(axis=1, keepdims=True), 1)
    cover = 1 - np.exp(-2 * count * visited / np.maximum(count.sum(axis=1, keepdims=True), 1))  # opacity
    t = u["mix"] * tone + (1 - u["mix"]) * cover  # position on a three-colour ramp: by map, by density, or a mix
    t, cover = (v.astype(np.float32).reshape(batch, height, width, 1) for v in (t, cover))
    ramp = (front + RAMP * (u["ramp"] - 0.5)).reshape(batch, 3, 1, 1, 3)
    colour = (1 - t) ** 2 * ramp[:, 0] + 2 * t * (1 - t) * ramp[:, 1] + t**2 * ramp[:, 2]
    image += cover * (colour - image)
    image += NOISE * u["noise"][:, :, None, None] * (noise.reshape(image.shape) / np.float32(255) - np.float32(0.5))
    return (image.clip(0, 1) * 255).astype(np.uint8)


def draw_fractals(seed: int, classes, indices, height: int, width: int) -> np.ndarray:
    """Draw images: classes, indices (B,) -> (B, H, W, 3) uint8.

    No sum runs over several images, so an image's bytes do not depend on its batch.
    """
    steps = BURN_IN + math.ceil(POINTS_PER_PIXEL * height * width / CHAINS)
    u, choices, noise = sample_instances(seed, classes, indices, steps, height * width * 3)
    maps = np.stack([class_system(seed, cls) for cls in classes])
    tables, number = byte_tables(maps * (1 + JITTER * (2 * u["jitter"].reshape(maps.shape) - 1)))
    x, y = (v.reshape(len(maps), -1) for v in chaos_game(tables, choices))
    pixel = points_to_pixels(x, y, u["pose"], height, width)
    tones = np.take_along_axis(u["tones"], number, axis=1)  # each map has a tone
    last = choices[:, BURN_IN:].reshape(pixel.shape)  # byte that chose each point's map: a point has its map's tone
    tone = np.take(tones, last + 256 * np.arange(len(maps))[:, None])
    return colour_images(*accumulate_points(pixel, tone, height * width), noise, u, height, width)


def fractal_set(root, split: str, num_classes: int, per_class: int, size, seed: int = 0):
    """Return images, a read-only memory map (N, H, W, 3) uint8, and labels (N,) int64, N = num_classes * per_class.

    The first call draws them, in one process per node, into a file under `root`; later calls read it. Classes
    alternate, so any leading part of the set is balanced. Raises UserError for a size below 8 pixels.
    """
    if split not in SPLITS or not 1 <= num_classes <= DOWNSTREAM or per_class < 1:
        raise ValueError(f"split {split!r} (of {', '.join(SPLITS)}), num_classes {num_classes}, per_class {per_class}")
    height, width = pair(size)
    if min(height, width) < 8:
        raise UserError(f"size {size}: a fractal needs at least 8 pixels a side")
    first, parity = SPLITS[split]
    labels = np.tile(np.arange(num_classes, dtype=np.int64), per_class)
    indices = 2 * np.repeat(np.arange(per_class), num_classes) + parity
    shape = len(labels), height, width, 3
    path = Path(root, f"fractals-v{VERSION}-seed{seed}-{split}-{num_classes}x{per_class}-{height}x{width}.npy")
    with once_per_node() as mine:  # the first rank of a node draws the images, the others wait
        if mine and not is_intact(path, shape):
            write_set(path, shape, seed, first + labels, indices)
    return np.lib.format.open_memmap(path, mode="r"), labels


def is_intact(path, shape):
    """Return whether the file exists and has the right dtype, shape and size; print a message if it is damaged."""
    if not path.exists():
        return False
    with suppress(ValueError):  # not an .npy header, or the file is too short
        images = np.lib.format.open_memmap(path, mode="r")
        if (images.dtype, images.shape, images.nbytes + images.offset) == (np.uint8, shape, path.stat().st_size):
            return True
    print(f"drawing {path} again: it is damaged")
    return False


def write_set(path, shape, seed, classes, indices):
    """Draw images into an .npy file, which appears when it is complete."""
    _, height, width, _ = shape
    step = max(1, CHUNK // (height * width))

    def write(file):
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for i in progress(range(0, len(classes), step), path.name, unit="chunk"):
            file.write(draw_fractals(seed, classes[i : i + step], indices[i : i + step], height, width).tobytes())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, write)
