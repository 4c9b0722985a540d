"""Benchmark of the MAE-Tiny/16 training step at 224 px and of the loader, against straightforward versions.

    python appendix/tools/benchmark_throughput.py                        # 6 minutes on 2 CPU cores; run it alone
    python appendix/tools/benchmark_throughput.py --device cuda --batch-size 1024 --compile
    python appendix/tools/benchmark_throughput.py --parts loader --data-path DIR --workers 0

The straightforward step (tests/straightforward_mae.py) embeds, un-shuffles, predicts and compares every patch, with
timm's own choice of attention and PyTorch's default AdamW. Versions take turns in the same run. FLOPs are those of the
matrix products of our step, compared with the rate that one large matrix product reaches on this machine.
benchmarking.py beside this file explains how time and memory are measured. Writes benchmark.json and benchmark.md.
"""
import statistics
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from appendix.tools import benchmark_loader, benchmarking
from appendix.tools.benchmarking import DTYPES, from_tests, in_turns, peak_of_step, training_step
from common import distributed, entry, options, report
from common.distributed import print0
from common.mae import MAE
from common.optim import adamw, parameter_groups
from common.ranges import Int
from common.runs import identity
from common.vit import set_fused_attention

VERSIONS = ("ours", "straightforward")


def build_parser():
    parser = options.make_parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=("step", "loader"), default=["step", "loader"])
    parser.add_argument("--precisions", nargs="+", choices=tuple(DTYPES), default=["fp32", "bf16"])
    parser.add_argument("--batch-size", type=Int(1), default=64)
    parser.add_argument("--img-size", type=Int(1), default=224)
    parser.add_argument("--patch-size", type=Int(1), default=16)
    parser.add_argument("--pairs", type=Int(1), default=5, help="measured turns of each version, after one to warm up")
    parser.add_argument("--compile", action="store_true", help="also measure both compiled")
    parser.add_argument("--data-path", help="class folders of images for the loader; default: 1,000 generated JPEGs")
    parser.add_argument("--workers", type=Int(-1, 256), default=2, help="processes that load; 0: the speed of one core")
    parser.add_argument("--num-images", type=Int(1), default=1000, help="images read in each turn of the loader")
    parser.add_argument("--views", nargs="+", choices=benchmark_loader.VIEWS, help="views to load; default: all")
    benchmarking.add_execution(parser)
    return parser


def make_step(version, precision, args, device, compiled=False):
    """Return a function that does one whole training step of a version on fixed data: forward, backward, AdamW."""
    torch.manual_seed(0)
    dtype = DTYPES[precision]
    if version == "ours":
        model = MAE(img_size=args.img_size, patch_size=args.patch_size).to(device)
        set_fused_attention(model, device, dtype)
        optimizer = adamw(parameter_groups(model, 0.05), (0.9, 0.95))
    else:
        reference = from_tests("straightforward_mae").StraightforwardMAE
        model = reference(img_size=args.img_size, patch_size=args.patch_size).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.05)
    forward = torch.compile(model) if compiled else model
    loss = forward if version == "ours" else lambda *batch: forward(*batch)[0]
    return training_step(loss, optimizer, args, device, dtype)


def matmul_rate(precision, device):
    """Measure FLOP/s of one large square matrix product in this precision, the upper bound for a training step."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=DTYPES[precision] or torch.float32) for _ in range(2))

    def product():
        a @ b
        benchmarking.synchronize(device)
    product()
    return 2 * n**3 / min(benchmarking.seconds(product) for _ in range(5))


def step_flops(args, device):
    """Count the FLOPs of the matrix products in one of our training steps, attention included."""
    step = make_step("ours", "fp32", args, device)
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def measure_steps(args, device):
    """Measure the training step of both versions; return one row per precision, with and without compilation."""
    flops, rows = step_flops(args, device), []
    for precision in args.precisions:
        ceiling = matmul_rate(precision, device)
        for compiled in (False, True) if args.compile else (False,):
            times = in_turns({version: make_step(version, precision, args, device, compiled) for version in VERSIONS},
                             args.pairs)
            ours, other = (statistics.median(times[version]) for version in VERSIONS)
            peaks = [peak_of_step(__file__, make_step, version, precision, args, device) for version in VERSIONS]
            rows.append({"precision": precision, "compiled": compiled, "ours_images_per_second": args.batch_size / ours,
                         "straightforward_images_per_second": args.batch_size / other,
                         "ratio": benchmarking.median_ratio(times["straightforward"], times["ours"]),
                         "flops_per_second": flops / ours, "matmul_flops_per_second": ceiling,
                         "ours_peak_gib": peaks[0], "straightforward_peak_gib": peaks[1]})
            print0(rows[-1])
    return rows


def write(args, device, steps, loader):
    """Write benchmark.json and benchmark.md."""
    header = ["precision", "compiled", "ours img/s", "straightforward img/s", "ratio", "FLOP/s of matmul rate",
              "peak GiB ours / straightforward"]
    body = [[r["precision"], r["compiled"], f"{r['ours_images_per_second']:.1f}",
             f"{r['straightforward_images_per_second']:.1f}", f"{r['ratio']:.2f}",
             f"{r['flops_per_second'] / 1e9:.0f} of {r['matmul_flops_per_second'] / 1e9:.0f} G "
             f"({r['flops_per_second'] / r['matmul_flops_per_second']:.0%})",
             f"{r['ours_peak_gib']:.2f} / {r['straightforward_peak_gib']:.2f}"] for r in steps]
    where = f"{device.type}, {torch.get_num_threads()} threads, batch {args.batch_size}, {args.img_size} px"
    texts = []
    if steps:
        texts += [f"MAE-Tiny/{args.patch_size} training step, {where}, median of {args.pairs} pairs",
                  report.markdown(header, body)]
    if loader:
        texts += [f"Loader, {args.workers} workers, {args.img_size} px, {loader[0]['images']} images, median "
                  f"of {args.pairs} turns; small: copies by shrink_folder.py; both against ImageFolder on the "
                  f"originals", report.markdown(
                      ["view", "from", "ours img/s", "ImageFolder img/s", "ratio"],
                      [[r["view"], r["source"], f"{r['ours_images_per_second']:.0f}",
                        f"{r['imagefolder_images_per_second']:.0f}", f"{r['ratio']:.2f}"] for r in loader])]
    report.write_text(Path(args.output) / "benchmark_throughput", "benchmark",
                      {"settings": identity(vars(args)), "steps": steps, "loader": loader}, "\n\n".join(texts))


def main(args):
    """Run the benchmarks that --parts names and write their tables."""
    device = distributed.start_process_group(args.device)
    if args.memory_of:
        make_step(*args.memory_of, args, device)()
        print(benchmarking.resident("VmHWM"))
        return
    steps = measure_steps(args, device) if "step" in args.parts else []
    loader = benchmark_loader.measure(args, device) if "loader" in args.parts else None
    write(args, device, steps, loader)


if __name__ == "__main__":
    entry.run_script(main, build_parser())
