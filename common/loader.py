"""The deterministic loader. Which sample comes when is f(seed, epoch); its crop, augmentation and mask noise are
f(seed, epoch, index). So the step is the loader's whole state: a run resumes exactly in the middle of an epoch, and the
number of workers, of ranks and of accumulation steps never changes which pixels are seen.
"""
import os
import random
import signal
from contextlib import suppress

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from common.data import DataError, UnreadableImage

# What only the host reads: numbers of images; of sec3_benchmark erasing.py and coco.py. Other uint8 tensors are images.
STAY_ON_HOST = ("index", "erase_box", "erase_seed", "count", "size", "original")


def seed_everything(use, *key):
    """Seeds Python's, NumPy's and torch's generators (CPU and GPU) alike from non-negative numbers, and from what the
    randomness is used for, so that equal numbers mean different streams in different places.
    """
    state = np.random.SeedSequence([*key, *use.encode()]).generate_state(2)
    random.seed(int(state[0]))
    np.random.seed(state[0])
    # not torch.manual_seed: without a GPU in use it stores a stack trace at every call, half the loader's time
    torch.default_generator.manual_seed(int(state[0]) << 32 | int(state[1]))
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(int(state[0]) << 32 | int(state[1]))


def epoch_order(length, seed, epoch):
    """The permutation of an epoch: a function of (seed, epoch) alone."""
    return np.random.default_rng((seed, epoch)).permutation(length)


class Views(Dataset):
    """Sample (epoch, index) -> what `transform` makes of the image: a dict of tensors, plus label and index."""

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
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
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
    """Reads `batches`, lists of keys, in their order; images stay uint8. A transform may bring its own `collate`."""
    return DataLoader(views, batch_sampler=batches, num_workers=default_workers(workers, device),
                      pin_memory=device.type == "cuda", collate_fn=getattr(views.transform, "collate", None),
                      worker_init_fn=outlive_signals)


def to_device(batch, device, mean, std):
    """Moves a batch and turns its uint8 images (B, C, H, W) into normalised floats, there where that is cheap."""
    for name, value in batch.items():
        if name not in STAY_ON_HOST:
            value = value.to(device, non_blocking=True)
            if value.dtype == torch.uint8:  # in place: on a CPU new memory costs more than the arithmetic
                value = value.float().sub_(mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1))
            batch[name] = value
    return batch
