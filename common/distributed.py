"""One process or a torchrun group: rank, world size, device, and the few collectives that the project needs.

In a single process the collectives return their input, so scripts read the same on a laptop and on a cluster.
"""
import os
import sys
from contextlib import contextmanager
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist

from common.errors import UserError


def start_process_group(device="auto") -> torch.device:
    """Choose this rank's device, join the torchrun group if there is one, and return the device.

    device: auto, cpu, cuda or cuda:N. Safe to call again. CPU tensors are exchanged by gloo and GPU tensors by nccl, so
    control messages never wait for the GPU. Raises UserError if the device cannot be used.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")  # the user hid the GPU on purpose
        if device == "cpu" and os.path.exists("/dev/nvidia0") and not hidden:
            raise UserError("there is an NVIDIA GPU, but PyTorch cannot use it: is its driver too old for this PyTorch "
                            "(`python -c 'import torch; torch.zeros(1).cuda()'` says)? --device cpu goes on without")
    try:
        device = torch.device(device)
    except RuntimeError:
        raise UserError(f"--device {device}: choose auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError("--device cuda: PyTorch sees no GPU here; use --device cpu or check the driver")
        if device.index is not None and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError(f"--device {device} under torchrun would put all ranks on one GPU: leave it out and choose "
                            f"GPUs by CUDA_VISIBLE_DEVICES")
        index = device.index if device.index is not None else int(os.environ.get("LOCAL_RANK", 0))
        if index >= torch.cuda.device_count():
            raise UserError(f"rank {index} of this node has no GPU: {torch.cuda.device_count()} visible; "
                             f"start torchrun with --nproc-per-node={torch.cuda.device_count()}")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # true float32, whatever the environment sets
        torch.set_float32_matmul_precision("highest")
    if "RANK" in os.environ and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=60))
    return device


def stop_process_group():
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def abort(text=""):
    """Print the text, if any, to stderr and end this process with exit code 1.

    One of several ranks exits at once, without destroying the group; torchrun then ends the others. Destroying it could
    deadlock: nccl would wait for ranks that are waiting for this one.
    """
    if world_size() == 1:
        raise SystemExit(printable(text) or 1)
    if text:
        print(f"rank {rank()}: {printable(text)}", file=sys.stderr, flush=True)
    os._exit(1)


def rank() -> int:
    """Return this process's rank; before the group is joined, the one that torchrun assigned."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Return the number of processes in the group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Return whether this is rank 0."""
    return rank() == 0


def printable(text) -> str:
    """Write what a terminal would obey, or cannot show, as escapes: a file name may hold any character."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in str(text))


def print0(*args, **kwargs):
    """Print on rank 0 only."""
    if is_main():
        print(*map(printable, args), **kwargs, flush=True)


@cache
def remark(text):
    """Print a text on rank 0, once in this process however often it is said: a data set is listed many times."""
    print0(text.encode(errors="backslashreplace").decode())  # names of files need not be UTF-8


def barrier():
    """Wait until every rank has arrived. Goes through gloo, because an nccl barrier would use the GPU."""
    all_max(0)


def gather(value) -> list:
    """Collect a picklable object from every rank: a list in order of rank, on every rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value):
    """Return rank 0's value, a picklable object, on every rank."""
    return gather(value)[0]


def all_max(*flags) -> list[int]:
    """Take the maximum over ranks of each integer, on the CPU: how ranks agree to stop or to save."""
    if not dist.is_initialized():
        return list(flags)
    tensor = torch.tensor(flags, dtype=torch.int64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()


def all_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over ranks, in place, on its own device. Returns it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


@contextmanager
def once_per_node():
    """Let the first rank of each node do the body's work (a download, generated data) while the others wait.

    Yields True on the rank that does the work, else False.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        try:
            yield True
        finally:
            barrier()
    else:
        barrier()
        yield False
