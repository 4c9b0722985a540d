"""The loader's worker processes: how many there are, what limits them, and what their obscure errors mean."""
import os
import re
import resource
import shutil
import tempfile
from contextlib import contextmanager

import torch

from common.distributed import remark
from common.errors import UserError

SHARED_MEMORY = "/dev/shm"  # where workers leave their batches
STARVED = "for want of memory: pass a smaller --workers, or --keep-decoded 0"
TROUBLES = {  # {pattern in the message of PyTorch or the system: what it means}; the first pattern that matches counts
    r"killed by signal: Bus error|shared memory\(shm\)|</torch_.*No space left":
        f"shared memory ran full: free some of {SHARED_MEMORY}, give the container more (docker run --shm-size=16g), "
        f"or pass --workers 0",
    r"ancdata|Too many open files":
        "too many files are open: raise the limit (ulimit -n 4096), or pass a smaller --workers",
    r"killed by signal: Killed|DataLoader worker.*exited unexpectedly":
        f"a worker was killed, most likely {STARVED}",
    r"Caught MemoryError in DataLoader|DataLoader worker.*can't allocate memory": f"a worker failed {STARVED}",
    r"\[Errno 12\]": f"a worker could not be started {STARVED}",
    r"killed by signal: ": "a worker crashed: --workers 0 shows where",
}



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
        if share < 4:
            remark(f"{cores} cores for {os.environ.get('LOCAL_WORLD_SIZE', 1)} ranks of this node: loading images will "
                   f"be slow (on SLURM, --cpus-per-task gives more)")
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


@contextmanager
def explain_troubles():
    """Turn an error of the loader's workers into one that says what to do.

    To be put around a whole program: a worker's death is reported by a signal, which may interrupt it anywhere.
    """
    try:
        yield
    except (RuntimeError, OSError, MemoryError) as error:
        for sign, meaning in TROUBLES.items():
            if re.search(sign, str(error), re.DOTALL):
                raise UserError(f"{meaning} ({str(error).strip().splitlines()[-1]})") from error
        raise
