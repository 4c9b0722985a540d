"""One process or a torchrun group: rank, world size, devices, and the few collectives the project needs.

With one process every function here is a plain no-op, so that scripts read the same on a laptop and on a cluster.
"""
import os
import sys
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from common.errors import UserError


def start(device="auto"):
    """Joins the torchrun group if there is one and returns this rank's device. Called once, safe to call again.

    CPU tensors travel by gloo and GPU tensors by nccl, so control messages never wait for the GPU.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")  # on purpose
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
        torch.backends.cudnn.allow_tf32 = False  # float32 means float32, also where the environment says otherwise
        torch.set_float32_matmul_precision("highest")
    if "RANK" in os.environ and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=60))
    return device


def stop():
    if dist.is_initialized():
        dist.destroy_process_group()


def abandon(text):
    """Ends this process with exit code 1. One of several ranks leaves at once and torchrun ends the others: to take the
    group down in order, nccl would wait for them, and they wait for this rank.
    """
    if world_size() == 1:
        raise SystemExit(text)
    print(f"rank {rank()}: {text}", file=sys.stderr, flush=True)
    os._exit(1)


def rank():
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))  # before the group, torchrun's


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main():
    return rank() == 0


def print0(*args, **kwargs):
    """Prints on rank 0 alone."""
    if is_main():
        print(*args, **kwargs, flush=True)


def barrier():
    """Returns when every rank has arrived (through gloo, as a barrier on nccl would use the GPU)."""
    all_max(0)


def gather(value):
    """Every rank's value (any picklable object), in a list."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value):
    """Rank 0's value, on every rank (any picklable object)."""
    return gather(value)[0]


def all_max(*flags):
    """Element-wise maximum over ranks of a few small numbers (CPU): how ranks agree to stop or to save."""
    if not dist.is_initialized():
        return list(flags)
    tensor = torch.tensor(flags, dtype=torch.int64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()


def all_sum(tensor):
    """Sum over ranks, in place, on the tensor's own device."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


@contextmanager
def once_per_node():
    """The body's work (a download, generated data) is done by the first rank of each node while its others wait."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        try:
            yield True
        finally:
            barrier()
    else:
        barrier()
        yield False
