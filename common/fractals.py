"""The embedded data set: formula-driven images, so that every script runs with no download.

After FractalDB (Kataoka et al., "Pre-training without natural images", ACCV 2020): a class is an iterated function
system (IFS), 2 to 8 affine maps of the plane drawn at random; an image of the class is its attractor, drawn by the
chaos game with the maps' parameters varied a little. Where we depart from it, so that an image takes a millisecond and
a small network neither fails nor finishes:

- every map contracts; FractalDB only asks that the points stay finite;
- an attractor keeps its aspect ratio, and one that fills almost the whole square is refused too;
- an instance varies all parameters at once, not one of the six, and also rotation, scale and position;
- images have colours and a background, both drawn without looking at the class.

An image depends on (seed, cls, index) and its size alone, not on its batch nor on a global generator.
"""
import functools
import math
from contextlib import suppress
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.checkpoint import write_atomically
from common.distributed import once_per_node
from common.errors import UserError
from common.vit import pair

VERSION = 2  # raise it with any change to a pixel: it is part of the cache's name
MAPS = (2, 8)  # maps in a system; arrays have room for 8, the unused maps are zero and have probability zero
CONTRACTION = 0.8  # largest singular value of a class's map
FILLING = (0.2, 0.7)  # share of its bounding square's pixels that a class visits; FractalDB: above about 0.2
FILLING_SIZE = 128  # pixels a side where that share is measured
JITTER = 0.1  # an instance scales each parameter by 1 +- this; (1 + sqrt(2) JITTER) CONTRACTION < 1: it contracts too
ROTATION, SHIFT = 15, 0.05  # +- degrees; +- share of the canvas
SCALE = (0.75, 1.05)  # longer side of the attractor / shorter side of the canvas
GROUND, RAMP, NOISE = 0.5, 0.7, 0.15  # range of colours over the background, over the attractor, from pixel to pixel
LIGHT_ON_DARK = 0.8  # share of the images; the rest is dark on light. One half is far harder to learn, all far easier
CHAINS = 512  # points that play the chaos game in parallel, in each image
BURN_IN = 6  # steps before a point is drawn: they start on the attractor, so this only spreads them over it
POINTS_PER_PIXEL = 4  # points drawn / pixels of the canvas: some 10 to 20 on each pixel of the attractor
CHUNK = 16 * 64 * 64  # pixels drawn at once: the working set stays in the processor's cache
# The uniform numbers that decide an instance, in the order they are drawn: name -> how many.
DRAWS = {"jitter": 48, "pose": 5, "tones": 8, "mix": 1, "levels": 3, "ramp": 9, "background": 48, "noise": 1}

DOWNSTREAM = 1_000_000  # first class of the downstream splits
# split -> its first class, the parity of its instances' indices
SPLITS = {"train": (0, 0), "val": (0, 1), "downstream-train": (DOWNSTREAM, 0), "downstream-val": (DOWNSTREAM, 1)}


@functools.cache
def class_system(seed, cls):
    """The IFS of a class, (8, 6): a row a b c d e f is the map (x, y) -> (ax + by + e, cx + dy + f); 0 if unused."""
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(cls,)))
    while True:
        maps = np.zeros((MAPS[1], 6), np.float32)
        for i in range(rng.integers(MAPS[0], MAPS[1] + 1)):
            while not 0 < np.linalg.norm(maps[i, :4].reshape(2, 2), 2) <= CONTRACTION:
                maps[i] = rng.uniform(-1, 1, 6)
        if FILLING[0] <= filling_rate(maps, rng) <= FILLING[1]:
            maps.setflags(write=False)  # everyone is handed the same array
            return maps


def filling_rate(maps, rng):
    """Share of the pixels of the attractor's bounding square, FILLING_SIZE a side, that the chaos game visits."""
    steps = BURN_IN + POINTS_PER_PIXEL * FILLING_SIZE**2 // CHAINS
    x, y = chaos_game(byte_tables(maps[None])[0], rng.integers(0, 256, (1, steps, CHAINS), np.uint8))
    side = max(np.ptp(x), np.ptp(y)) * 1.001 + 1e-6  # the margin keeps the largest value inside
    row, col = (((v - v.min()) / side * FILLING_SIZE).astype(int) for v in (y, x))
    return len(np.unique(row * FILLING_SIZE + col)) / FILLING_SIZE**2


def byte_tables(maps):
    """maps (B, 8, 6) -> parameters (6, B, 256) and map number (B, 256) for each value of a random byte.

    A map owns a share of the 256 values proportional to |det A|, as in FractalDB, to the nearest 1/256.
    """
    a, b, c, d, _, _ = np.moveaxis(maps, 2, 0)
    cumulative = np.cumsum(np.abs(a * d - b * c), axis=1)
    levels = (np.arange(256, dtype=np.float32) + 0.5) / 256
    number = (cumulative[:, :-1, None] < levels * cumulative[:, -1:, None]).sum(axis=1)  # (B, 256), 0..7
    return np.moveaxis(np.take_along_axis(maps, number[..., None], axis=1), 2, 0), number


def chaos_game(tables, choices):
    """tables (6, B, 256), choices (B, T, C) bytes -> x, y (B, T - BURN_IN, C), points of the attractor.

    Each chain starts at the fixed point of its first map, so it is on the attractor from the start.
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


def draw_instances(seed, classes, indices, steps, noise_bytes):
    """All that is random in B images: uniforms {name: (B, n)}, bytes (B, steps, CHAINS) and (B, noise_bytes).
    The uniforms come first in the stream: shape, pose and colours are the same at every size."""
    counts = [8 * sum(DRAWS.values()), steps * CHAINS, noise_bytes + -noise_bytes % 8]  # bytes, whole 64-bit words
    raw = np.empty((len(classes), sum(counts) // 8), np.uint64)
    for row, cls, index in zip(raw, classes, indices, strict=True):
        row[:] = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(cls, index))).random_raw(len(row))
    first, choices, noise = np.split(raw.view(np.uint8), np.cumsum(counts)[:-1], axis=1)
    uniforms = ((first.view(np.uint64) >> np.uint64(40)) * 2.0**-24).astype(np.float32)  # 24 bits: exact in float32
    uniforms = dict(zip(DRAWS, np.split(uniforms, np.cumsum(list(DRAWS.values()))[:-1], axis=1), strict=True))
    return uniforms, choices.reshape(len(raw), steps, CHAINS), noise[:, :noise_bytes]


def place(x, y, pose, height, width):
    """Points (B, n) of the plane, pose (B, 5) uniforms -> the pixel each falls on, (B, n); height * width if none."""
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


def splat(pixel, tone, pixels):
    """pixel, tone (B, n) -> number of points on each pixel and their mean tone, (B, pixels) both."""
    shape = len(pixel), pixels + 1  # one more bin, for the points outside
    bins = (pixel + shape[1] * np.arange(shape[0])[:, None]).ravel()
    count = np.bincount(bins, minlength=shape[0] * shape[1]).reshape(shape)[:, :-1]
    total = np.bincount(bins, tone.ravel(), shape[0] * shape[1]).reshape(shape)[:, :-1]
    return count, (total / np.maximum(count, 1)).astype(np.float32)


def stretch(grid, length, axis):
    """A grid with a few nodes along the axis, interpolated linearly to `length` values."""
    at = np.linspace(0, grid.shape[axis] - 1, length, dtype=np.float32)
    left = np.minimum(at.astype(int), grid.shape[axis] - 2)
    part = (at - left).astype(np.float32).reshape(-1, *[1] * (grid.ndim - 1 - axis))
    return np.take(grid, left, axis) * (1 - part) + np.take(grid, left + 1, axis) * part


def paint(count, tone, noise, u, height, width):
    """count, tone (B, H * W), noise (B, H * W * 3) bytes, uniforms u -> images (B, H, W, 3) uint8."""
    batch = len(count)
    dark, contrast, swap = u["levels"].T[:, :, None]  # (B, 1) each
    dark, light = 0.05 + 0.3 * dark, 0.4 + 0.3 * dark + 0.25 * contrast  # grey levels, at least 0.35 apart
    behind, front = np.where(swap < LIGHT_ON_DARK, dark, light), np.where(swap < LIGHT_ON_DARK, light, dark)
    image = (behind + GROUND * (u["background"] - 0.5)).reshape(batch, 4, 4, 3)
    image = stretch(stretch(image, height, 1), width, 2)
    visited = np.maximum((count > 0).sum(axis=1, keepdims=True), 1)
    cover = 1 - np.exp(-2 * count * visited / np.maximum(count.sum(axis=1, keepdims=True), 1))  # opacity
    t = u["mix"] * tone + (1 - u["mix"]) * cover  # place on a ramp of three colours: by map, by density, or between
    t, cover = (v.astype(np.float32).reshape(batch, height, width, 1) for v in (t, cover))
    ramp = (front + RAMP * (u["ramp"] - 0.5)).reshape(batch, 3, 1, 1, 3)
    colour = (1 - t) ** 2 * ramp[:, 0] + 2 * t * (1 - t) * ramp[:, 1] + t**2 * ramp[:, 2]
    image += cover * (colour - image)
    image += NOISE * u["noise"][:, :, None, None] * (noise.reshape(image.shape) / np.float32(255) - np.float32(0.5))
    return (image.clip(0, 1) * 255).astype(np.uint8)


def draw(seed, classes, indices, height, width):
    """classes, indices (B,) -> images (B, H, W, 3) uint8. No sum crosses images, so the batch changes no byte."""
    steps = BURN_IN + math.ceil(POINTS_PER_PIXEL * height * width / CHAINS)
    u, choices, noise = draw_instances(seed, classes, indices, steps, height * width * 3)
    maps = np.stack([class_system(seed, cls) for cls in classes])
    tables, number = byte_tables(maps * (1 + JITTER * (2 * u["jitter"].reshape(maps.shape) - 1)))
    x, y = (v.reshape(len(maps), -1) for v in chaos_game(tables, choices))
    pixel = place(x, y, u["pose"], height, width)
    tones = np.take_along_axis(u["tones"], number, axis=1)  # each map has a tone,
    last = choices[:, BURN_IN:].reshape(pixel.shape)  # and a point takes that of the map that made it
    tone = np.take(tones, last + 256 * np.arange(len(maps))[:, None])
    return paint(*splat(pixel, tone, height * width), noise, u, height, width)


def fractal_set(root, split, num_classes, per_class, size, seed=0):
    """Images, a read-only memory map (N, H, W, 3) uint8, and labels (N,) int64, N = num_classes * per_class.

    Drawn at the first call, by one process of a node, and kept under `root`. The classes take turns, so the first
    images are a balanced set too.
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
    with once_per_node() as mine:  # the first rank of a node draws, the others then read its file
        if mine and not is_whole(path, shape):
            write_set(path, shape, seed, first + labels, indices)
    return np.lib.format.open_memmap(path, mode="r"), labels


def is_whole(path, shape):
    """Whether the file is there and as `write_set` leaves it; says so if it is damaged."""
    if not path.exists():
        return False
    with suppress(ValueError):  # the header is none, or the file too short
        images = np.lib.format.open_memmap(path, mode="r")
        if (images.dtype, images.shape, images.nbytes + images.offset) == (np.uint8, shape, path.stat().st_size):
            return True
    print(f"drawing {path} again: it is damaged")
    return False


def write_set(path, shape, seed, classes, indices):
    """Draws the images into a .npy file, whole or absent."""
    _, height, width, _ = shape
    step = max(1, CHUNK // (height * width))

    def write(file):
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for i in tqdm(range(0, len(classes), step), desc=path.name, disable=None):  # None: only on a terminal
            file.write(draw(seed, classes[i : i + step], indices[i : i + step], height, width).tobytes())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, write)
