"""What the benchmarks share: clock, peak memory, and the straightforward versions that ours is compared with.

Those compared take turns, A B A B, so that a machine whose speed drifts slows all of them; ratios are medians over the
turns. Peak memory is that of a process of its own (CPU) or of the allocator (GPU).
"""
import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import torch

from common import options

DTYPES = {"fp32": None, "bf16": torch.bfloat16}


def add_execution(parser):
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", default=str(options.ROOT / "outputs"), metavar="DIR")
    parser.add_argument("--memory-of", nargs="+", help="used by the script itself, for a process of its own")


def from_tests(name):
    """A module of the test suite, which is no package: loaded from its file."""
    spec = importlib.util.spec_from_file_location(name, options.ROOT / "tests" / f"{name}.py")
    sys.modules[name] = importlib.util.module_from_spec(spec)  # where one reference finds another
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def synchronize(device):
    """Waits for the work that was given to a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(function):
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def in_turns(functions, turns):
    """{name: seconds in each turn} of {name: function}, after a turn to warm up."""
    for function in functions.values():
        function()
    times = [{name: seconds(function) for name, function in functions.items()} for _ in range(turns)]
    return {name: [turn[name] for turn in times] for name in functions}


def training_step(loss, optimizer, args, device, dtype):
    """A function that does one whole step on fixed data: `loss(images, noise)`, its gradients, the update."""
    images = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=device)
    noise = torch.rand(args.batch_size, (args.img_size // args.patch_size) ** 2, device=device)

    def step():
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            value = loss(images, noise)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)
    return step


def peak_memory(script, version, words, device, function):
    """GiB at the peak of `function()`, which `script --memory-of VERSION...` runs too and ends by printing its peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() / 2**30
    command = [sys.executable, script, "--memory-of", *version, "--device", "cpu", *options.to_argv(words)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def peak_of_step(script, make_step, version, precision, args, device):
    """GiB at the peak of one training step."""
    words = {"batch_size": args.batch_size, "img_size": args.img_size, "patch_size": args.patch_size}
    return peak_memory(script, (version, precision), words, device,
                       lambda: make_step(version, precision, args, device)())


def resident(name):
    """VmHWM (at the peak) or VmRSS (now) of this process in GiB; getrusage would count its parent's too."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 2**20
