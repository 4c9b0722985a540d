"""The deterministic data loader.

The order of samples is a function of (seed, epoch). A sample's crop, augmentation and mask noise are a function of
(seed, epoch, index). So the step is the loader's whole state: a run resumes exactly, even in mid-epoch, and the number
of workers, ranks and accumulation steps never changes which pixels are seen.
"""
import hashlib
import itertools
import random
from contextlib import suppress
from functools import partial

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from common.errors import DataError
from common.images import UnreadableImage
from common.signals import ignore_stop_signals
from common.workers import default_workers, limit_workers

# Names of a batch's entries that stay on the CPU begin like this. All other uint8 tensors are taken for images
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
        """Return an image and its index, or a replacement of both if the image cannot be read.

        The replacement is another image and its index, drawn by a generator seeded with the same key, or a black image
        and -1. Raises DataError if 100 draws give no readable image.
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
    for step in range(start_step, total_steps):
        epoch, place = divmod(step, steps_per_epoch)
        if place == 0 or step == start_step:
            order = epoch_order(length, seed, epoch)
        batch = order[place * batch_size:(place + 1) * batch_size]
        for indices in batch.reshape(world, accumulation, -1)[rank].tolist():
            yield [(epoch, index) for index in indices]


def data_loader(views, batches, workers, device):
    """Make a DataLoader that reads `batches`, which are lists of sample keys, in their order. Images stay uint8.

    Samples are joined to a batch by the transform's own function `collate`, if it has one.
    """
    workers, ahead = default_workers(workers, device), None
    if workers:
        first, batches = peek(batches)
        workers, ahead = limit_workers(views, first, workers)
    collate = partial(join_samples, collate=getattr(views.transform, "collate", default_collate))
    return DataLoader(views, batch_sampler=batches, num_workers=workers, pin_memory=device.type == "cuda",
                      collate_fn=collate, worker_init_fn=ignore_stop_signals, prefetch_factor=ahead)


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
    """Return the first batch of keys ([] if there is none), and an iterable of all batches, the first included."""
    if isinstance(batches, list):
        return batches[0] if batches else [], batches
    first = next(batches, [])
    return first, itertools.chain([first] if first else [], batches)


def join_samples(samples, collate):
    """Join samples to a batch by the function `collate`, and in a worker move the batch to shared memory.

    PyTorch would move it in a thread of the worker's queue, where an error (no shared memory left) loses the batch. An
    error raised here reaches the main process.
    """
    batch = collate(samples)
    return {name: value.share_memory_() for name, value in batch.items()} if get_worker_info() else batch


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
    mean, std = mean.to(device), std.to(device)
    if device.type != "cuda":
        yield from (to_device(batch, device, mean, std) for batch in batches)
        return
    stream, copying = torch.cuda.Stream(device), None
    for batch in batches:
        with torch.cuda.stream(stream):
            following = to_device(batch, device, mean, std), stream.record_event()
        if copying:
            yield wait_for_copy(*copying, torch.cuda.current_stream(device))
        copying = following
    if copying:
        yield wait_for_copy(*copying, torch.cuda.current_stream(device))


def wait_for_copy(batch, copied, stream):
    """Make `stream` wait for the copy of a batch by another stream (event `copied`). Returns the batch.

    record_stream keeps its memory from being reused before `stream` is done with it.
    """
    stream.wait_event(copied)
    for value in batch.values():
        if value.is_cuda:
            value.record_stream(stream)
    return batch
