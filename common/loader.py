"""The deterministic loader. Which sample comes when is f(seed, epoch); its crop, augmentation and mask noise are
f(seed, epoch, index). So the step is the loader's whole state: a run resumes exactly in the middle of an epoch, and the
number of workers, of ranks and of accumulation steps never changes which pixels are seen.
"""
import hashlib
import itertools
import os
import random
import resource
import shutil
import signal
import tempfile
from contextlib import suppress

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from common.errors import UserError
from common.images import DataError, UnreadableImage
from common.machine import SHARED_MEMORY

HOST = ("index", "bad", "host_")  # how the keys of a batch begin that stay on the CPU. Other uint8 tensors are images


def seed_everything(use, *key):
    """Seeds Python's, NumPy's and torch's generators (CPU and GPU) alike from non-negative numbers, and from what the
    randomness is used for, so that equal numbers mean different streams in different places.
    """
    digest = hashlib.blake2b(" ".join(map(str, (use, *key))).encode(), digest_size=16).digest()
    seeds = np.frombuffer(digest, np.uint32).tolist()
    random.seed(seeds[0])
    np.random.seed(seeds[1])
    # not torch.manual_seed: without a GPU in use it stores a stack trace at every call, half the loader's time
    torch.default_generator.manual_seed(seeds[2])
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seeds[2] << 32 | seeds[3])


def epoch_order(length, seed, epoch):
    """The permutation of an epoch: a function of (seed, epoch) alone."""
    return np.random.default_rng((seed, epoch)).permutation(length)


class Views(Dataset):
    """Sample (epoch, index) -> what `transform` makes of the image: a dict of tensors, plus label, index and "bad", the
    index of an unreadable image, else -1. on_bad_image "skip" puts another image in its place, "blank" a black one.
    """

    def __init__(self, images, transform, seed, on_bad_image=None):
        self.images, self.transform, self.seed, self.on_bad_image = images, transform, seed, on_bad_image

    def __getitem__(self, key):
        epoch, index = key
        image, used = self.read(epoch, index)
        seed_everything("sample", self.seed, epoch, index)
        views = self.transform(image)
        views = views if isinstance(views, dict) else {"image": views}
        label = -1 if self.images.labels is None else int(self.images.labels[used])
        return {**views, "label": label, "index": index, "bad": index if used != index else -1}

    def read(self, epoch, index):
        """The image and its index; in its place, if it is unreadable and to be skipped, one drawn from the same key."""
        try:
            return self.images.read(index), index
        except UnreadableImage as error:
            if self.on_bad_image == "blank":
                return torch.zeros(self.images.in_chans, 1, 1, dtype=torch.uint8), -1
            if self.on_bad_image != "skip":
                hint = ", or pass it over by --on-bad-image skip" if self.on_bad_image else ""  # not in an evaluation
                raise UnreadableImage(f"{error}{hint}") from None
        substitutes = np.random.default_rng((self.seed, epoch, index)).permutation(len(self.images))
        for used in substitutes[:100]:
            with suppress(UnreadableImage):
                return self.images.read(int(used)), int(used)
        raise DataError(f"no readable image was found in place of {self.images.where(index)} in 100 draws")


def step_batches(length, *, batch_size, accumulation, seed, start_step, total_steps, rank=0, world=1):
    """Yields the keys of each micro-batch of this rank from `start_step` on, over all epochs, so that workers never
    restart. A step takes the next `batch_size` of the epoch's order; rank r has the r-th part, cut into `accumulation`
    pieces.
    """
    steps_per_epoch = length // batch_size  # the remainder is dropped, as in the authors' loader
    micro_batch, epoch = batch_size // world // accumulation, None
    for step in range(start_step, total_steps):
        if step // steps_per_epoch != epoch:
            epoch = step // steps_per_epoch
            order = epoch_order(length, seed, epoch)
        first = step % steps_per_epoch * batch_size + rank * batch_size // world
        for begin in range(first, first + accumulation * micro_batch, micro_batch):
            yield [(epoch, int(index)) for index in order[begin:begin + micro_batch]]


def outlive_signals(worker):
    """A stop signal to the whole job is the main process's business: it finishes its step with these workers, which
    ignore the signal, or for SIGTERM (which is also how Python ends what is left of them) stay half a minute more.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))


def default_workers(workers, device):
    """Loading processes of this rank: its share of the cores, at most 32. On a CPU the model wants the cores: its
    threads wait for each other busily, so a loading process that takes a core from one of them stops them all.
    """
    if workers >= 0:
        return workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    share = cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(32, max(1, share - 1)) if device.type == "cuda" else min(2, max(0, share - 2))


def data_loader(views, batches, workers, device):
    """Read `batches`, lists of keys, in their order; images stay uint8. A transform may bring its own `collate`."""
    workers, ahead = default_workers(workers, device), None
    if workers:
        first, batches = peek(batches)
        workers, ahead = affordable(views, first, workers)
    return DataLoader(views, batch_sampler=batches, num_workers=workers, pin_memory=device.type == "cuda",
                      collate_fn=Collate(getattr(views.transform, "collate", default_collate)),
                      worker_init_fn=outlive_signals, prefetch_factor=ahead)


def eval_loader(images, transform, batch_size, workers, device, rank=0, world=1, epoch=0, on_bad_image=None):
    """Load every `world`-th image, from number `rank` on, once and in order.

    The last batch is not padded, so the ranks together see each image exactly once. With on_bad_image "skip" a black
    image stands for an unreadable one, whose number is in the batch's "bad"; else it is an error.
    """
    keys = [(epoch, index) for index in range(rank, len(images), world)]
    batches = [keys[first:first + batch_size] for first in range(0, len(keys), batch_size)]
    instead = "blank" if on_bad_image == "skip" else on_bad_image
    return data_loader(Views(images, transform, 0, instead), batches, workers, device)


def peek(batches):
    """The first batch, and all of them."""
    if isinstance(batches, list):
        return (batches or [[]])[0], batches
    first = next(batches, [])
    return first, itertools.chain([first] if first else [], batches)


class Collate:
    """Samples -> batch, by the given function; in a loading process the batch is moved to shared memory here, where a
    failure reaches the main process. In the queue's own thread, where PyTorch moves it, the batch would just be lost.
    """

    def __init__(self, function):
        self.function = function

    def __call__(self, samples):
        batch = self.function(samples)
        return {name: value.share_memory_() for name, value in batch.items()} if get_worker_info() else batch


def affordable(views, first, workers):
    """(loading processes, batches that each prepares ahead): 2 each, or less where that would fill more than this
    rank's half of the free shared memory. UserError if not even one batch fits, or another limit is in the way.
    """
    if not first:
        return workers, None
    tensors = [value for value in views[first[0]].values() if isinstance(value, torch.Tensor)]
    batch = len(first) * sum(value.nbytes for value in tensors)
    free = shutil.disk_usage(SHARED_MEMORY).free if os.path.isdir(SHARED_MEMORY) else 1 << 40
    room = int(free / 2 / int(os.environ.get("LOCAL_WORLD_SIZE", 1)) / max(1, batch))
    if not room:
        raise UserError(f"{SHARED_MEMORY} has {free / 2**20:,.1f} MiB free, and loading processes need twice the "
                        f"{batch / 2**20:,.1f} MiB of a batch of {len(first)} images for each rank: give the container "
                        f"more (docker run --shm-size=16g), pass a smaller --micro-batch, or --workers 0")
    workers, ahead = min(workers, room), 1 if room < 2 * workers else 2
    if len(tempfile.gettempdir()) > 75:  # 107 characters are a socket's limit
        raise UserError(f"TMPDIR {tempfile.gettempdir()} is too long for the sockets of loading processes: set it to a "
                        f"folder whose path has at most 75 characters, or pass --workers 0")
    open_files(100 + workers * (5 + ahead * (len(tensors) + 4)))
    return workers, ahead


def open_files(needed):
    """Raise this process's limit of open files, of which every tensor on its way is one. UserError if it stays less."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < needed:
        limit = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        if limit < needed:
            raise UserError(f"{limit} files may be open at once and the loading processes need {needed}: raise the "
                            f"limit (ulimit -n {needed}), or pass a smaller --workers")


def to_device(batch, device, mean, std):
    """Moves a batch and turns its uint8 images (B, C, H, W) into normalised floats, there where that is cheap."""
    for name, value in batch.items():
        if not name.startswith(HOST):
            value = value.to(device, non_blocking=True)
            if value.dtype == torch.uint8:  # in place: on a CPU new memory costs more than the arithmetic
                value = value.float().sub_(mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1))
            batch[name] = value
    return batch


def on_device(batches, device, mean, std):
    """Yield the batches moved and normalised; on a GPU each is copied, on a stream of its own, while the one before is
    worked on.
    """
    if device.type != "cuda":
        yield from (to_device(batch, device, mean, std) for batch in batches)
        return
    stream, waiting = torch.cuda.Stream(device), None
    for batch in itertools.chain(batches, [None]):
        if batch is not None:
            with torch.cuda.stream(stream):
                batch = to_device(batch, device, mean, std)
            batch = batch, stream.record_event()
        if waiting is not None:
            yield arrived(*waiting, torch.cuda.current_stream(device))
        waiting = batch


def arrived(batch, copied, stream):
    """A batch that another stream has copied, ready for `stream`: it waits for the copy, and holds the memory."""
    stream.wait_event(copied)
    for value in batch.values():
        if value.is_cuda:
            value.record_stream(stream)
    return batch
