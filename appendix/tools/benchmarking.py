"""Measuring time and peak memory for the benchmarks, and loading the straightforward versions that they compare with.

The versions take turns, A B A B, so that a machine whose speed drifts slows all of them alike; ratios are medians over
the turns. Peak memory is measured in a separate process on a CPU, and by the allocator on a GPU.
"""
import importlib.util
import statistics
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
    parser.add_argument("--memory-of", nargs="+", help="internal: print the peak memory of this version")


def from_tests(name):
    """Load a module of the test suite from its file, as tests/ is not a package."""
    spec = importlib.util.spec_from_file_location(name, options.ROOT / "tests" / f"{name}.py")
    sys.modules[name] = importlib.util.module_from_spec(spec)  # so that one straightforward version can import another
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def synchronize(device):
    """Wait until a GPU has finished the work given to it."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(function):
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def in_turns(functions, turns):
    """Time functions {name: function} in turns, after one turn to warm up; return {name: [seconds of each turn]}."""
    for function in functions.values():
        function()
    times = [{name: seconds(function) for name, function in functions.items()} for _ in range(turns)]
    return {name: [turn[name] for turn in times] for name in functions}


def median_ratio(times, others):
    """Return the median over the turns of times / others, two lists of `in_turns`."""
    return statistics.median(a / b for a, b in zip(times, others))


def training_step(loss, optimizer, args, device, dtype):
    """Return a function that does one whole training step on fixed random images.

    loss: a function of images (B, 3, H, W) and noise (B, L). dtype: of autocast, or None for none.
    """
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
    """Return the peak memory of `function()` in GiB.

    On a CPU, a new process runs `script --memory-of VERSION...`, which must do the same work and print its peak last.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() / 2**30
    command = [sys.executable, script, "--memory-of", *version, "--device", "cpu", *options.to_argv(words)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def peak_of_step(script, make_step, version, precision, args, device):
    """Return the peak memory of one training step in GiB."""
    words = {"batch_size": args.batch_size, "img_size": args.img_size, "patch_size": args.patch_size}
    return peak_memory(script, (version, precision), words, device,
                       lambda: make_step(version, precision, args, device)())


def resident(name):
    """Return VmHWM (peak) or VmRSS (now) of this process in GiB; getrusage would count the parent's peak too."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 2**20
