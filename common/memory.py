"""Sets that fit into memory are decoded once: their pixels stay as bytes, and no epoch reads a file again.

The loading processes share the pixels of the process that they come from.
"""
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common.distributed import is_main, print0
from common.images import UnreadableImage

PROBE = 200  # images that are decoded to estimate what all of them take


class Pixels:
    """Decoded images of any sizes in one block of bytes; an index gives a uint8 tensor (C, H, W), or None where an
    image could not be read. A list of tensors would be copied into every loading process, as FileNames explains.
    """

    def __init__(self, images):
        shapes, block = [], bytearray()
        for image in images:
            array = np.zeros((0, 0, 0), np.uint8) if image is None else image.permute(1, 2, 0).numpy()
            shapes.append(array.shape)  # (H, W, C), the order in which resizing is fastest
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
    """Decode the files of an ImageSet once and keep them, if that takes at most `share` of the free memory, which the
    ranks of a node divide among themselves. What cannot be read is left to `images.read`, which says so.
    """
    if not share or not images.from_files or images.kept is not None or not len(images):
        return
    probed = [image.numel() for image in map(reader(images), range(0, len(images), -(-len(images) // PROBE)))
              if image is not None]
    room = share * free_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if not probed or np.mean(probed) * len(images) > room:
        return
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        progress = tqdm(total=len(images), desc=f"decoding {images.name}", unit="image", leave=False,
                        disable=None if is_main() else True)
        images.kept = Pixels(in_order(pool, reader(images), len(images), progress))
    print0(f"{images.name}: {len(images):,} decoded images kept in memory ({len(images.kept.block) / 2**20:,.0f} MiB)")


def reader(images):
    """index -> its tensor, or None."""
    def read(index):
        try:
            return images.decode(index)
        except UnreadableImage:
            return None
    return read


def in_order(pool, function, count, progress, at_once=1000):
    """`function` of 0, 1, ... in this order, worked on by a pool that is never more than `at_once` ahead."""
    for first in range(0, count, at_once):
        yield from pool.map(function, range(first, min(count, first + at_once)))
        progress.update(min(count, first + at_once) - first)


def free_memory():
    """Bytes that this process may still take: of the machine, or of its container or job where that is less."""
    free = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():  # counts the files that the system would give up, too
        lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
        free = [int(lines["MemAvailable"].split()[0]) * 1024]
    for limit, used in cgroup_files():
        if limit.exists() and (text := limit.read_text().strip()).isdigit():
            free.append(int(text) - int(used.read_text()))
    return max(0, min(free))


def cgroup_files():
    """The files that hold limit and use of every control group above this process, of version 2 and of version 1."""
    own = Path("/proc/self/cgroup")
    for line in own.read_text().splitlines() if own.exists() else ():
        _, controllers, path = line.split(":", 2)
        version1 = "memory" in controllers.split(",")
        top = Path("/sys/fs/cgroup/memory" if version1 else "/sys/fs/cgroup")
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version1 else ("memory.max", "memory.current")
        if version1 or not controllers:
            below = top / path.lstrip("/")
            yield from ((folder / names[0], folder / names[1]) for folder in (below, *below.parents)
                        if folder.is_relative_to(top))
