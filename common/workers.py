"""The loader's worker processes: how many there are, what limits them, and what they do at a stop signal."""
import os
import resource
import shutil
import signal
import tempfile

import torch

from common.errors import UserError
from common.machine import SHARED_MEMORY


def default_workers(workers, device):
    """Return the number of worker processes of this rank: `workers`, or if that is negative, its share of the cores.

    At most 32, and at most 2 where the model runs on the CPU and needs the cores itself: its threads spin while they
    wait for each other, so a worker that takes the core of one thread stalls all of them.
    """
    if workers >= 0:
        return workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    share = cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device.type == "cuda":
        return min(32, max(1, share - 1))
    return min(2, max(0, share - 2))


def limit_workers(views, first, workers):
    """Return (number of workers, batches that each prepares ahead), as many as the shared memory has room for.

    first: the sample keys of the first batch of `views`. Each worker prepares 2 batches ahead, and fewer of both are
    used where that would fill more than this rank's part of half of the free shared memory. Raises UserError if not
    even one batch fits, if the path of the temporary folder is too long, or if too few files may be open.
    """
    if not first:
        return workers, None
    tensors = [value for value in views[first[0]].values() if isinstance(value, torch.Tensor)]
    batch = len(first) * sum(value.nbytes for value in tensors)
    free = shutil.disk_usage(SHARED_MEMORY).free if os.path.isdir(SHARED_MEMORY) else 1 << 40
    room = int(free / 2 / int(os.environ.get("LOCAL_WORLD_SIZE", 1)) / max(1, batch))
    if not room:
        raise UserError(f"{SHARED_MEMORY} has {free / 2**20:,.1f} MiB free, and workers need twice the "
                        f"{batch / 2**20:,.1f} MiB of a batch of {len(first)} images for each rank: give the container "
                        f"more (docker run --shm-size=16g), pass a smaller --micro-batch, or --workers 0")
    workers = min(workers, room)
    ahead = 2 if room >= 2 * workers else 1
    if len(tempfile.gettempdir()) > 75:  # the path of a socket has at most 107
        raise UserError(f"TMPDIR {tempfile.gettempdir()} is too long for the sockets of workers: set it to a "
                        f"folder whose path has at most 75 characters, or pass --workers 0")
    allow_open_files(100 + workers * (5 + ahead * (len(tensors) + 4)))
    return workers, ahead


def allow_open_files(needed):
    """Raise this process's limit of open files to `needed`: each tensor sent by a worker is one open file.

    Raises UserError if the system does not allow as many.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < needed:
        limit = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        if limit < needed:
            raise UserError(f"{limit} files may be open at once and the workers need {needed}: raise the "
                            f"limit (ulimit -n {needed}), or pass a smaller --workers")


def ignore_stop_signals(worker):
    """Keep a worker alive when a stop signal reaches the whole job: the main process needs it to finish the step.

    SIGTERM is delayed by 30 seconds rather than ignored, because Python uses it to end workers that are left.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))
