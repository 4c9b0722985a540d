"""Real processes for the tests: commands, several ranks as torchrun would start them, what they said."""
import os
import socket
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
WAIT = 120  # seconds for a process to get anywhere, on a busy machine


def start(words, output, **environment):
    """The running process, in a group of its own; what it says goes to output/said.txt."""
    Path(output).mkdir(parents=True, exist_ok=True)
    with open(Path(output) / "said.txt", "ab") as said:
        return subprocess.Popen(words, stdout=said, stderr=subprocess.STDOUT, cwd=output, start_new_session=True,
                                env={**ENVIRONMENT, **environment})


def said(output):
    return (Path(output) / "said.txt").read_text()


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def start_ranks(words, output, world=2):
    """The processes that torchrun would start."""
    group = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    return [start(words, output, RANK=str(rank), LOCAL_RANK=str(rank), **group) for rank in range(world)]


def assert_nearly_the_same(ours, theirs):
    """Equal up to the order of float32 sums; training moved the weights by some 1e-3. Biases of keys leave the loss as
    it is, so that their gradient is nothing but rounding, and AdamW makes steps of it: they may differ more.
    """
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        tolerance = 1e-4 if name.endswith("qkv.bias") else 1e-6
        torch.testing.assert_close(ours[name], value, rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}")
