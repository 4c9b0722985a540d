"""Benchmark of CKA between 13 x 13 layers, against a straightforward loop over pairs of layers in the same run.

    python appendix/tools/benchmark_cka.py                # a minute on one CPU core; run it alone
    python appendix/tools/benchmark_cka.py --device cuda

Features are random, of ViT-Tiny's size (196 patches, 192 channels), for 1,024 images in batches of 128; drawing them
is not timed. The loop follows the definition: for each pair of layers, the Gram matrix of the second and three HSIC. It
needs all layers of a batch at once, ours one layer at a time. The two versions take turns; benchmarking.py beside this
file explains how memory is measured. Writes benchmark_cka.json and .md.
"""
import time
from pathlib import Path

import torch

from appendix.tools import benchmarking
from appendix.tools.benchmarking import resident, synchronize
from common import distributed, entry, options, report
from common.errors import UserError
from common.ranges import Int
from common.runs import identity
from sec4_analysis import cka


def build_parser():
    parser = options.make_parser(__doc__)
    parser.add_argument("--num-images", type=Int(1), default=1024)
    parser.add_argument("--batch-size", type=Int(1), default=128)
    parser.add_argument("--layers", type=Int(1), default=13, help="layers of each of the two models")
    parser.add_argument("--width", type=Int(1), default=196 * 192, help="numbers per image and layer")
    benchmarking.add_execution(parser)
    return parser


def features(args, device, batch, model, layer):
    """Return random features of one layer on one batch, the same in each call: (n, width)."""
    generator = torch.Generator(device).manual_seed(10_000 * batch + 100 * model + layer)
    return torch.randn(args.batch_size, args.width, generator=generator, device=device)


class Clock:
    """A stopwatch that adds up the seconds spent inside `with`, including the work of the device."""

    def __init__(self, device):
        self.device, self.seconds = device, 0.0

    def __enter__(self):
        synchronize(self.device)
        self.began = time.perf_counter()

    def __exit__(self, *_):
        synchronize(self.device)
        self.seconds += time.perf_counter() - self.began


def ours(args, device, batch, clock):
    """Compute CKA of all pairs of layers on one batch from centred Gram matrices, one layer in memory at a time."""
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
    """Compute the unbiased estimator of HSIC as defined, from Gram matrices (n, n) whose diagonal is zero."""
    n = len(K)
    return (torch.trace(K @ L) + K.sum() * L.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (K @ L).sum()) / (n * (n - 3))


def loop(args, device, batch, clock):
    """Compute the same as `ours` in a loop over pairs of layers, with new Gram matrices and HSIC for each pair."""
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


def measure(args, device):
    """Time both versions on all batches and compare their results; return {version: {"seconds", "peak_gib"}}."""
    clocks = {version: Clock(device) for version in VERSIONS}
    for compute in VERSIONS.values():
        compute(args, device, 0, Clock(device))  # warm up
    for batch in range(args.num_images // args.batch_size):
        mine, theirs = (compute(args, device, batch, clocks[version]) for version, compute in VERSIONS.items())
        assert (mine - theirs).abs().max() < 1e-3, "the two disagree"
    return {version: {"seconds": clock.seconds, "peak_gib": peak_memory(version, args, device)}
            for version, clock in clocks.items()}


def peak_memory(version, args, device):
    words = {"layers": args.layers, "batch_size": args.batch_size, "width": args.width}
    return benchmarking.peak_memory(__file__, (version,), words, device,
                                    lambda: VERSIONS[version](args, device, 0, Clock(device)))


def main(args):
    """Run the benchmark and write its table; return {version: {"seconds", "peak_gib"}}."""
    device = distributed.start_process_group(args.device)
    if args.num_images < args.batch_size:
        raise UserError(f"--num-images {args.num_images} is less than one --batch-size {args.batch_size}: lower it too")
    if args.memory_of:
        before = resident("VmRSS")
        VERSIONS[args.memory_of[0]](args, device, 0, Clock(device))
        print(resident("VmHWM") - before)
        return {}
    results = measure(args, device)
    rows = [[version, f"{row['seconds']:.2f}", f"{row['peak_gib']:.2f}"] for version, row in results.items()]
    text = (f"CKA of {args.layers} x {args.layers} layers on {args.num_images // args.batch_size * args.batch_size} "
            f"images in batches of {args.batch_size}, {device.type}, {torch.get_num_threads()} threads: ratio "
            f"{results['loop']['seconds'] / results['ours']['seconds']:.1f}\n\n")
    report.write_text(Path(args.output) / "benchmark_cka", "benchmark_cka",
                      {"settings": identity(vars(args)), "versions": results},
                      text + report.markdown(["", "seconds", "peak GiB"], rows))
    return results


if __name__ == "__main__":
    entry.run_script(main, build_parser())
