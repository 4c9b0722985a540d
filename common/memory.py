"""Keeping a decoded data set in memory, if it fits, so that later epochs read no files.

The loader's worker processes share this memory.
"""
import math
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch

from common.distributed import print0
from common.images import UnreadableImage
from common.jobs import CORES
from common.watch import progress

PROBE = 200  # images decoded to estimate the memory that all of them need


class DecodedImages:
    """Decoded images of any sizes, by index: uint8 tensors (C, H, W), or None for an image that could not be read.

    They lie in one block of bytes, because a list of tensors would be copied into every worker (see Packed in
    common/files.py).
    """

    def __init__(self, images):
        shapes, block = [], bytearray()
        for image in images:
            array = np.zeros((0, 0, 0), np.uint8) if image is None else image.permute(1, 2, 0).numpy()
            shapes.append(array.shape)  # (H, W, C): the memory order in which resizing is fastest
            block += array.tobytes()
        self.shapes = np.array(shapes)
        self.starts = np.cumsum([0, *self.shapes.prod(axis=1)])
        self.block = torch.frombuffer(block, dtype=torch.uint8) if block else torch.zeros(0, dtype=torch.uint8)

    def __getitem__(self, index):
        height, width, channels = self.shapes[index].tolist()
        if not height:
            return None
        pixels = self.block[self.starts[index]:self.starts[index + 1]]
        return pixels.view(height, width, channels).permute(2, 0, 1)


def keep_decoded(images, share):
    """Decode the files of an ImageSet and keep them in `images.kept`, if they fit into a share (0..1) of free memory.

    The ranks of a node divide that share among themselves. Unreadable images are kept as None; `images.read` then tries
    the file and raises.
    """
    if not share or not images.from_files or images.kept is not None or not len(images):
        return
    decode = partial(decode_or_none, images)
    probed = map(decode, range(0, len(images), math.ceil(len(images) / PROBE)))
    sizes = [image.numel() for image in probed if image is not None]
    available = share * free_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if not sizes or np.mean(sizes) * len(images) > available:
        return
    with ThreadPoolExecutor(decoding_threads()) as pool:
        decoded = ordered_map(pool, decode, len(images))
        images.kept = DecodedImages(progress(decoded, f"decoding {images.name}", len(images)))
    print0(f"{images.name}: {len(images):,} decoded images kept in memory ({len(images.kept.block) / 2**20:,.0f} MiB)")


def decoding_threads():
    """Return how many threads decode: those of torch, and under torchrun, which gives torch one, a share of the cores.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return torch.get_num_threads() if ranks == 1 else max(1, CORES // ranks)


def decode_or_none(images, index):
    """Decode an image, or return None if it is unreadable."""
    try:
        return images.decode(index)
    except UnreadableImage:
        return None


def ordered_map(pool, function, count, chunk=1000):
    """Yield function(0) to function(count - 1) in order. The pool computes `chunk` at a time, to bound the memory."""
    for first in range(0, count, chunk):
        yield from pool.map(function, range(first, min(count, first + chunk)))


def free_memory():
    """Return how many bytes this process may still allocate: the least that its machine or a control group allows."""
    free = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():  # MemAvailable includes file caches that the system can drop
        lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
        free = [int(lines["MemAvailable"].split()[0]) * 1024]
    for limit, used in cgroup_files():
        if limit.exists() and (text := limit.read_text().strip()).isdigit():
            free.append(int(text) - int(used.read_text()))
    return max(0, min(free))


def cgroup_files():
    """Yield the paths of the files (limit, usage) of every memory control group of this process (cgroup v1 and v2)."""
    own = Path("/proc/self/cgroup")
    if not own.exists():
        return
    for line in own.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        version1 = "memory" in controllers.split(",")
        top = Path("/sys/fs/cgroup/memory" if version1 else "/sys/fs/cgroup")
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version1 else ("memory.max", "memory.current")
        if version1 or not controllers:
            below = top / path.lstrip("/")
            for folder in (below, *below.parents):
                if folder.is_relative_to(top):
                    yield folder / names[0], folder / names[1]
