"""One process or a torchrun group of them: rank, world size, device, and the collectives that the project needs.

In a single process the collectives return their input, so that scripts read the same on a laptop and on a cluster.
"""
import multiprocessing
import os
import sys
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist

from common.errors import UserError


def start_process_group(device="auto") -> torch.device:
    """Choose this rank's device, join the torchrun group if there is one, and return the device.

    device: auto, cpu, cuda or cuda:N. May be called again. The ranks exchange CPU tensors by gloo and GPU tensors by
    nccl, so that control messages never wait for the GPU. Raises UserError if the device cannot be used.
    """
    device = choose_device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # full float32, whatever the environment says
        torch.set_float32_matmul_precision("highest")
        # PyTorch 2.11 and later would take cuDNN's attention on Hopper and Blackwell GPUs, with open reports of wrong
        # gradients. Without it, attention is computed by the same kernels on all GPUs and in all versions
        torch.backends.cuda.enable_cudnn_sdp(False)
    if "RANK" in os.environ and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=60))
    return device


def choose_device(name) -> torch.device:
    """Return this rank's device for --device auto, cpu, cuda or cuda:N. Raises UserError if it cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")  # the user hid the GPU on purpose
        if name == "cpu" and os.path.exists("/dev/nvidia0") and not hidden:
            raise UserError("there is an NVIDIA GPU, but PyTorch cannot use it: is its driver too old for this PyTorch "
                            "(`python -c 'import torch; torch.zeros(1).cuda()'` says)? --device cpu goes on without")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: choose auto, cpu, cuda or cuda:N") from None
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU here; use --device cpu or check the driver")
    if device.index is not None and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(f"--device {device} under torchrun would put all ranks on one GPU: leave it out and choose "
                        f"GPUs by CUDA_VISIBLE_DEVICES")
    index = device.index if device.index is not None else int(os.environ.get("LOCAL_RANK", 0))
    if index >= torch.cuda.device_count():
        raise UserError(f"rank {index} of this node has no GPU: {torch.cuda.device_count()} visible; "
                        f"start torchrun with --nproc-per-node={torch.cuda.device_count()}")
    return torch.device("cuda", index)


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
    leave(1)


def leave(code):
    """End this rank at once with an exit code, with its workers, and without waiting for the other ranks."""
    for worker in multiprocessing.active_children():
        worker.kill()
    with suppress(OSError):  # whoever read the output may have left
        sys.stdout.flush()
    os._exit(code)


def rank() -> int:
    """Return this process's rank; before the group is joined, the one that torchrun assigned."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Return the number of processes in the group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Return whether this process is rank 0."""
    return rank() == 0


def printable(text) -> str:
    """Escape control characters and whatever cannot be printed, because names of files may hold any character."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in str(text))


def print0(*args, **kwargs):
    """Print on rank 0 only."""
    if is_main():
        print(*map(printable, args), **kwargs, flush=True)


@cache
def remark(text):
    """Print a text on rank 0, and only the first time in this process: data sets are listed many times."""
    print0(text)


def barrier():
    """Wait until every rank has arrived. Uses gloo, because a barrier of nccl would use the GPU."""
    all_max(0)


def gather(value) -> list:
    """Return the picklable objects that the ranks pass, as a list in order of rank, on every rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value):
    """Return the value that rank 0 passes, a picklable object, on every rank."""
    return gather(value)[0]


def all_max(*flags) -> list[int]:
    """Return the maximum of each integer or flag over the ranks, exchanged on the CPU: to agree to stop or to save."""
    if not dist.is_initialized():
        return list(flags)
    tensor = torch.tensor(flags, dtype=torch.int64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()


def all_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over ranks, in place and on its own device. Return it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


@contextmanager
def once_per_node():
    """Let the first rank of each node do the work of this block (a download, generated data); the others wait for it.

    Yields True on the rank that is to do the work, and False on the others, once the work is done.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        try:
            yield True
        finally:
            barrier()
    else:
        barrier()
        yield False
