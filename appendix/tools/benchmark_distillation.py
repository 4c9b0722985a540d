"""Benchmark of the D-MAE training step, against the MAE step and a straightforward D-MAE in the same run.

    python appendix/tools/benchmark_distillation.py                        # some 5 minutes on 2 CPU cores; run it alone
    python appendix/tools/benchmark_distillation.py --device cuda --batch-size 512

Student ViT-Tiny/16, teacher ViT-Base (random weights, as fast as trained ones), 224 px. The straightforward version
(tests/straightforward_dmae.py) has explicit attention in every block of both networks, runs the teacher to its last
block and casts its weights in every step. `all` distils all twelve blocks. benchmarking.py beside this file explains
how time and memory are measured. Writes benchmark_distillation.json and .md.
"""
import statistics
from pathlib import Path

import torch

from appendix.tools import benchmarking
from appendix.tools.benchmarking import DTYPES, from_tests, in_turns, median_ratio, peak_of_step, training_step
from common import distributed, entry, options, report
from common.distributed import print0
from common.mae import MAE
from common.optim import adamw, parameter_groups
from common.ranges import Int
from common.runs import identity
from common.vit import set_fused_attention
from sec5_distill.distillation import DMAE, visible_ids
from sec5_distill.teachers import Teacher

VERSIONS = ("D-MAE", "MAE", "straightforward", "all")


def build_parser():
    parser = options.make_parser(__doc__)
    parser.add_argument("--precisions", nargs="+", choices=tuple(DTYPES), default=["fp32", "bf16"])
    parser.add_argument("--batch-size", type=Int(1), default=32)
    parser.add_argument("--img-size", type=Int(1), default=224)
    parser.add_argument("--patch-size", type=Int(1), default=16)
    parser.add_argument("--turns", type=Int(1), default=5, help="measured turns of each version, after one to warm up")
    benchmarking.add_execution(parser)
    return parser


def build(version, args, device, dtype):
    """Build a version; return its model and its loss as a function of images and noise."""
    view = dict(img_size=args.img_size, patch_size=args.patch_size)
    if version == "straightforward":
        from_tests("straightforward_mae")  # straightforward_dmae imports it
        base = dict(embed_dim=768, num_heads=12, decoder_embed_dim=512, decoder_num_heads=16)
        model = from_tests("straightforward_dmae").StraightforwardDMAE(view, {**view, **base}).to(device)
        return model, model
    student = MAE(**view)
    if version == "MAE":
        model = set_fused_attention(student.to(device), device, dtype)
        return model, model
    blocks = range(1, 13) if version == "all" else (12,)
    teacher = Teacher(MAE("vit_base", **view), blocks).prepare(device, dtype)
    model = set_fused_attention(DMAE(student, teacher, blocks).to(device), device, dtype)
    return model, lambda images, noise: model(images, noise, *teacher(images, visible_ids(student, noise)))[0]


def make_step(version, precision, args, device):
    """Return a function that does one whole training step on fixed data: teacher, forward, backward, AdamW."""
    torch.manual_seed(0)
    dtype = DTYPES[precision]
    model, loss = build(version, args, device, dtype)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, betas=(0.9, 0.95), weight_decay=0.05) \
        if version == "straightforward" else adamw(parameter_groups(model, 0.05), (0.9, 0.95))
    return training_step(loss, optimizer, args, device, dtype)


def measure(precision, args, device):
    """Return {version: {"seconds", "ratio": time relative to D-MAE, "peak_gib"}}; times are medians over the turns."""
    times = in_turns({version: make_step(version, precision, args, device) for version in VERSIONS}, args.turns)
    return {version: {"seconds": statistics.median(own),
                      "ratio": median_ratio(own, times["D-MAE"]),
                      "peak_gib": peak_of_step(__file__, make_step, version, precision, args, device)}
            for version, own in times.items()}


def main(args):
    """Run the benchmark and write its table; return {precision: {version: {...}}}."""
    device = distributed.start_process_group(args.device)
    if args.memory_of:
        make_step(*args.memory_of, args, device)()
        print(benchmarking.resident("VmHWM"))
        return {}
    results = {}
    for precision in args.precisions:
        results[precision] = measure(precision, args, device)
        print0(results[precision])
    rows = [[precision, version, f"{1000 * row['seconds']:.0f}", f"{row['ratio']:.2f}", f"{row['peak_gib']:.2f}"]
            for precision, versions in results.items() for version, row in versions.items()]
    text = (f"D-MAE training step, teacher ViT-Base, {device.type}, {torch.get_num_threads()} threads, batch "
            f"{args.batch_size}, {args.img_size} px, median of {args.turns} turns\n\n")
    text += report.markdown(["precision", "version", "ms a step", "time / D-MAE's", "peak GiB"], rows)
    report.write_text(Path(args.output) / "benchmark_distillation", "benchmark_distillation",
                      {"settings": identity(vars(args)), "steps": results}, text)
    return results


if __name__ == "__main__":
    entry.run_script(main, build_parser())
