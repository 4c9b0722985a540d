"""The deterministic data loader.

The order of samples is a function of (seed, epoch). A sample's crop, augmentation and mask noise are a function of
(seed, epoch, index). So the step is the loader's whole state: a run resumes exactly, even in mid-epoch, and the number
of workers, ranks and accumulation steps never changes which pixels are seen.
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

# Entries of a batch whose name begins like this stay on the CPU. All other uint8 tensors are taken for images
HOST = ("index", "bad", "host_")


def seed_everything(use, *key):
    """Seed the generators of Python, NumPy and torch (CPU and GPU) from a key of non-negative numbers.

    use: names what the random numbers are for, so that equal keys give different streams in different places.
    """
    digest = hashlib.blake2b(" ".join(map(str, (use, *key))).encode(), digest_size=16).digest()
    seeds = np.frombuffer(digest, np.uint32).tolist()
    random.seed(seeds[0])
    np.random.seed(seeds[1])
    # Not torch.manual_seed: without a GPU in use it stores a stack trace at each call, half the time of loading
    torch.default_generator.manual_seed(seeds[2])
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seeds[2] << 32 | seeds[3])


def epoch_order(length, seed, epoch):
    """Return the order of an epoch's samples: a permutation that depends on (seed, epoch) alone."""
    return np.random.default_rng((seed, epoch)).permutation(length)


class Views(Dataset):
    """A data set of augmented views: its keys are (epoch, index), its samples what `transform` makes of that image.

    A sample is a dict of tensors; a transform that returns a single tensor gives "image". The data set adds "label" (-1
    if there is none), "index", and "bad": the index of an image that could not be read, else -1. on_bad_image "skip"
    replaces an unreadable image by another one, and "blank" by a black one; otherwise UnreadableImage is raised.
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
        """Return an image and its index, or what replaces it if it cannot be read: another image, drawn by a generator
        seeded with the same key, and that image's index; or a black image and -1.
        """
        try:
            return self.images.read(index), index
        except UnreadableImage as error:
            if self.on_bad_image == "blank":
                return torch.zeros(self.images.in_chans, 1, 1, dtype=torch.uint8), -1
            if self.on_bad_image != "skip":
                hint = ", or pass it over by --on-bad-image skip" if self.on_bad_image else ""  # None in evaluations
                raise UnreadableImage(f"{error}{hint}") from None
        substitutes = np.random.default_rng((self.seed, epoch, index)).permutation(len(self.images))
        for used in substitutes[:100]:
            with suppress(UnreadableImage):
                return self.images.read(int(used)), int(used)
        raise DataError(f"no readable image was found in place of {self.images.where(index)} in 100 draws")


def step_batches(length, *, batch_size, accumulation, seed, start_step, total_steps, rank=0, world=1):
    """Yield the sample keys of each micro-batch of this rank, from step `start_step` up to `total_steps`.

    A step takes the next `batch_size` samples in the epoch's order. Rank r gets the r-th part of them, cut into
    `accumulation` micro-batches. The keys run through all epochs, so that workers never restart.
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
    """Keep a worker alive when a stop signal reaches the whole job: the main process needs it to finish the step.

    SIGTERM is delayed by 30 seconds rather than ignored, because Python ends remaining workers by it.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))


def default_workers(workers, device):
    """Return the number of worker processes of this rank: `workers`, or if that is negative, its share of the cores.

    At most 32, and at most 2 where the model runs on the CPU and needs the cores itself: its threads spin while they
    wait for each other, so a worker that takes the core of one thread stalls all of them.
    """
    if workers >= 0:
        return workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    share = cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(32, max(1, share - 1)) if device.type == "cuda" else min(2, max(0, share - 2))


def data_loader(views, batches, workers, device):
    """Make a DataLoader that reads `batches`, which are lists of sample keys, in their order. Images stay uint8.

    A transform with an attribute `collate` has its samples joined to a batch by it.
    """
    workers, ahead = default_workers(workers, device), None
    if workers:
        first, batches = peek(batches)
        workers, ahead = affordable(views, first, workers)
    return DataLoader(views, batch_sampler=batches, num_workers=workers, pin_memory=device.type == "cuda",
                      collate_fn=Collate(getattr(views.transform, "collate", default_collate)),
                      worker_init_fn=outlive_signals, prefetch_factor=ahead)


def eval_loader(images, transform, batch_size, workers, device, rank=0, world=1, epoch=0, on_bad_image=None):
    """Make a loader of every `world`-th image, from number `rank` on, each once and in order.

    The last batch is not padded, so that the ranks together see each image exactly once. With on_bad_image "skip", a
    black image takes the place of an unreadable one, whose index is in the batch's "bad"; otherwise it is an error.
    """
    keys = [(epoch, index) for index in range(rank, len(images), world)]
    batches = [keys[first:first + batch_size] for first in range(0, len(keys), batch_size)]
    instead = "blank" if on_bad_image == "skip" else on_bad_image
    return data_loader(Views(images, transform, 0, instead), batches, workers, device)


def peek(batches):
    """Return the first batch, and all batches with it still among them."""
    if isinstance(batches, list):
        return (batches or [[]])[0], batches
    first = next(batches, [])
    return first, itertools.chain([first] if first else [], batches)


class Collate:
    """Join samples to a batch by the given function, and in a worker move the batch to shared memory.

    PyTorch would move it in a thread of the worker's queue, where an error (no shared memory left) loses the batch. An
    error raised here reaches the main process.
    """

    def __init__(self, function):
        self.function = function

    def __call__(self, samples):
        batch = self.function(samples)
        return {name: value.share_memory_() for name, value in batch.items()} if get_worker_info() else batch


def affordable(views, first, workers):
    """Return (number of workers, batches that each prepares ahead), as many as the shared memory has room for.

    Each worker prepares 2 batches ahead, or fewer where all would fill more than this rank's part of half of the free
    shared memory. `first` is the keys of a batch. Raises UserError if not even one batch fits, if the path of the
    temporary folder is too long, or if too few files may be open.
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
    if len(tempfile.gettempdir()) > 75:  # the path of a socket has at most 107
        raise UserError(f"TMPDIR {tempfile.gettempdir()} is too long for the sockets of loading processes: set it to a "
                        f"folder whose path has at most 75 characters, or pass --workers 0")
    open_files(100 + workers * (5 + ahead * (len(tensors) + 4)))
    return workers, ahead


def open_files(needed):
    """Raise this process's limit of open files to `needed`: each tensor sent by a worker is one open file.

    Raises UserError if the system does not allow as many.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < needed:
        limit = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        if limit < needed:
            raise UserError(f"{limit} files may be open at once and the loading processes need {needed}: raise the "
                            f"limit (ulimit -n {needed}), or pass a smaller --workers")


def to_device(batch, device, mean, std):
    """Move a batch to the device, and make normalised floats of its uint8 images (B, C, H, W) there. Returns the batch.

    mean, std (C,): of pixel values in 0..255. Names that begin with one of HOST stay on the CPU.
    """
    for name, value in batch.items():
        if not name.startswith(HOST):
            value = value.to(device, non_blocking=True)
            if value.dtype == torch.uint8:  # in place: on a CPU, new memory costs more than the arithmetic
                value = value.float().sub_(mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1))
            batch[name] = value
    return batch


def on_device(batches, device, mean, std):
    """Yield the batches on the device and normalised, as `to_device` does it.

    On a GPU a batch is copied by a second stream while the batch before it is in use.
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
    """Make `stream` wait for the copy of a batch by another stream (event `copied`). Returns the batch.

    record_stream keeps its memory from being reused before `stream` is done with it.
    """
    stream.wait_event(copied)
    for value in batch.values():
        if value.is_cuda:
            value.record_stream(stream)
    return batch
