"""How fast is the similarity of 13 x 13 layers? Against a loop over pairs of layers, in the same run.

    python sec4_analysis/benchmark_cka.py                # a minute on one CPU core; run it alone
    python sec4_analysis/benchmark_cka.py --device cuda

Features of ViT-Tiny's size (196 patches, 192 wide) of 1,024 images in mini-batches of 128, drawn at random before the
clock starts. The loop is the definition as it reads: per pair of layers the matrix of the second and three HSIC. It
needs all layers of a batch at once, ours one layer at a time. Both take turns; peak memory is that of a process of its
own (CPU) or of the allocator (GPU). Writes benchmark_cka.json and .md.
"""
import subprocess
import sys
import time
from pathlib import Path

import torch

from common import distributed, options, report
from sec4_analysis import cka

PRESETS = {}


def build_parser():
    parser = options.make_parser(__doc__)
    parser.add_argument("--num-images", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=13, help="of each of the two models")
    parser.add_argument("--width", type=int, default=196 * 192, help="numbers per image and layer")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", default=str(options.ROOT / "outputs"), metavar="DIR")
    parser.add_argument("--memory-of", help="used by the script itself")
    return parser


def features(args, device, batch, model, layer):
    """The features of one layer on one batch: (n, width)."""
    generator = torch.Generator(device).manual_seed(10_000 * batch + 100 * model + layer)
    return torch.randn(args.batch_size, args.width, generator=generator, device=device)


class Clock:
    """Adds up the seconds spent inside `with`, the device's work included."""

    def __init__(self, device):
        self.device, self.seconds = device, 0.0

    def __enter__(self):
        self.wait()
        self.began = time.perf_counter()

    def wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def __exit__(self, *_):
        self.wait()
        self.seconds += time.perf_counter() - self.began


def ours(args, device, batch, clock):
    """Centred matrices of one batch, layer by layer, and all pairs: sums for minibatch_cka."""
    stacks = []
    for model in range(2):
        grams = []
        for layer in range(args.layers):
            values = features(args, device, batch, model, layer)
            with clock:
                grams.append(cka.centred_gram(values))
        stacks.append(torch.stack(grams))
    with clock:
        return cka.minibatch_cka([stacks])


def hsic(K, L):
    """The unbiased estimator as it is written, of matrices whose diagonal is zero."""
    n = len(K)
    return (torch.trace(K @ L) + K.sum() * L.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (K @ L).sum()) / (n * (n - 3))


def loop(args, device, batch, clock):
    """The same over pairs of layers: matrix and HSIC of the second layer anew for each first one."""
    first, second = ([features(args, device, batch, model, layer) for layer in range(args.layers)]
                     for model in range(2))
    values = torch.zeros(args.layers, args.layers, device=device)
    with clock:
        for i, x in enumerate(first):
            K = (x @ x.T).fill_diagonal_(0)
            for j, y in enumerate(second):
                L = (y @ y.T).fill_diagonal_(0)
                values[i, j] = hsic(K, L) / (hsic(K, K) * hsic(L, L)).sqrt()
        return values


VERSIONS = {"ours": ours, "loop": loop}


def peak_memory(version, args, device):
    """GiB at the peak of one batch, beside what Python and torch themselves take."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        VERSIONS[version](args, device, 0, Clock(device))
        return torch.cuda.max_memory_allocated() / 2**30
    command = [sys.executable, __file__, "--memory-of", version, "--device", "cpu", "--layers", str(args.layers),
               "--batch-size", str(args.batch_size), "--width", str(args.width)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def resident(name):
    """VmHWM (peak) or VmRSS (now) of this process in GiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 2**20


def main(args):
    """Measures and writes; returns {"ours_seconds", "loop_seconds", "ratio", "ours_gib", "loop_gib"}."""
    device = distributed.start(args.device)
    if args.memory_of:
        before = resident("VmRSS")
        VERSIONS[args.memory_of](args, device, 0, Clock(device))
        print(resident("VmHWM") - before)
        return {}
    clocks, batches = [Clock(device), Clock(device)], args.num_images // args.batch_size
    for version in VERSIONS.values():
        version(args, device, 0, Clock(device))  # warm up
    for batch in range(batches):
        mine, theirs = (version(args, device, batch, clock) for version, clock in zip(VERSIONS.values(), clocks))
        assert (mine - theirs).abs().max() < 1e-3, "the two disagree"
    result = {"ours_seconds": clocks[0].seconds, "loop_seconds": clocks[1].seconds,
              "ratio": clocks[1].seconds / clocks[0].seconds,
              **{f"{version}_gib": peak_memory(version, args, device) for version in VERSIONS}}
    text = (f"CKA of {args.layers} x {args.layers} layers on {batches * args.batch_size} images in batches of "
            f"{args.batch_size}, {device.type}, {torch.get_num_threads()} threads\n\n")
    text += report.markdown(["", "seconds", "peak GiB"], [
        [version, f"{result[f'{version}_seconds']:.2f}", f"{result[f'{version}_gib']:.2f}"]
        for version in VERSIONS]) + f"\n\nratio {result['ratio']:.1f}"
    report.write_text(Path(args.output) / "benchmark_cka", "benchmark_cka", {"settings": vars(args), **result}, text)
    return result


if __name__ == "__main__":
    options.start(main, build_parser(), PRESETS)
