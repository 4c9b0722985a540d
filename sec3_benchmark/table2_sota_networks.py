"""Table 2: the enhanced ViT-Tiny beside other light networks: parameters, throughput, top-1 on ImageNet, ReaL, V2.

    python sec3_benchmark/table2_sota_networks.py                     # demo: seven rows, small batches, seconds
    python sec3_benchmark/table2_sota_networks.py --preset paper      # all, batch 1024, mixed precision: wants a GPU
    python sec3_benchmark/table2_sota_networks.py --preset paper --imagenet DIR --real-labels real.json \\
        --imagenet-v2 DIR --checkpoints mae-300=outputs/finetune/RUN/weights.pt

The paper takes throughput from timm. Here every network is measured under one protocol, which the table states.
Accuracies of other networks are the published ones. Nothing is downloaded: throughput does not depend on the weights.
The paper's claim: MAE-Tiny-FT, 78.5 with 5.7 M parameters and no change of architecture, is on par with networks
designed to be light. Writes table2.json, table2.md and table2.png.
"""
import gc
import statistics
import time
from pathlib import Path

import torch

from common import distributed, entry, options, report
from common.distributed import print0
from common.errors import UserError
from common.ranges import Int
from common.rebuilding import load_model
from common.training import choose_precision
from common.vit import eval_mode
from common.watch import out_of_memory
from sec3_benchmark import imagenet_variants
from sec3_benchmark.label_points import label_points
from sec3_benchmark.light_networks import DISTILLED, NETWORKS, THREE_HEADS, build_network

PRESETS = {
    "demo": dict(batch_size=8, warmup=1, repeats=3),
    "laptop": dict(batch_size=16, warmup=2, repeats=5),
    "small": dict(batch_size=64, warmup=3, repeats=10),
}
DEMO = ("mobilenetv2_100", "efficientnet_b0", "levit_128s", "deit_tiny_patch16_224", "scratch", "mae-300", "mae-1000")
NOTES = [
    f"{DISTILLED} distillation in supervised training, {THREE_HEADS} the original ViT-Tiny with 3 heads; the other ViT-"
    "Tinys have 12. Published: timm's result tables of v0.6.12 (throughput: RTX 3090, batch 1024, automatic mixed "
    "precision, torch 1.12); the text, slides and code page for ViT-Tiny and MAE-Tiny-FT.",
    "Published, not rebuilt here: SEED pre-training does not help EfficientNet-B0 under fine-tuning, 77.7 -> 77.2 "
    "(Section 3.1).",
]


def build_parser():
    parser = options.make_parser(__doc__)
    parser.add_argument("--preset", choices=options.PRESET_NAMES, help="default: demo")
    parser.add_argument("--rows", nargs="+", metavar="ROW", choices=["all", *(n.key for n in NETWORKS)],
                        help=f"of {', '.join(n.key for n in NETWORKS)}; default: some in the demo preset, else all")
    group = parser.add_argument_group("throughput")
    group.add_argument("--batch-size", type=Int(1), default=1024, help="images")
    group.add_argument("--warmup", type=Int(0), default=10, help="batches before the measured ones")
    group.add_argument("--repeats", type=Int(1), default=40, help="measured batches; the median counts")
    group.add_argument("--channels-last", action="store_true", help="NHWC memory, which convolutions may prefer")
    group.add_argument("--compile", action="store_true", help="torch.compile every network")
    group.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
                       help="auto: mixed bf16 where the device has it, else fp16 on GPUs and fp32 on CPUs")
    group = parser.add_argument_group("accuracy of our rows")
    group.add_argument("--checkpoints", nargs="+", default=[], metavar="ROW=FILE", help="classifiers to evaluate")
    group.add_argument("--imagenet", metavar="DIR", help="ImageNet-1k, holding val/<class>/")
    group.add_argument("--real-labels", metavar="FILE", help="real.json; needs --imagenet")
    group.add_argument("--imagenet-v2", metavar="DIR", help="imagenetv2-matched-frequency, folders 0 to 999")
    group.add_argument("--workers", type=Int(-1, 256), default=-1, help="processes that load; -1: by the cores")
    report.add_pictures(parser, ".json")
    group = parser.add_argument_group("execution")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    group.add_argument("--output", default=str(options.ROOT / "outputs"), metavar="DIR")
    return parser


@torch.inference_mode()
def batch_seconds(model, images, dtype, warmup, repeats, clock=time.perf_counter):
    """Time `repeats` forward passes after `warmup` untimed ones: a list of seconds. Waits for the device each time."""
    seconds = []
    for _ in range(warmup + repeats):
        began = clock()
        with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
            model(images)
        if images.is_cuda:
            torch.cuda.synchronize()
        seconds.append(clock() - began)
    return seconds[warmup:]


def throughput(model, px, args, device):
    """Measure a network in eval mode on random images: {"images_per_second" (median batch), "slowest", "fastest"}."""
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    model = model.eval().to(device, memory_format=layout)
    images = torch.randn(args.batch_size, 3, px, px).to(device, memory_format=layout)
    model = torch.compile(model) if args.compile else model
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):  # float32 means float32
        seconds = batch_seconds(model, images, choose_precision(args.precision, device), args.warmup, args.repeats)
    torch.compiler.reset()
    return {"images_per_second": args.batch_size / statistics.median(seconds),
            "slowest": args.batch_size / max(seconds), "fastest": args.batch_size / min(seconds)}


def measure(network, chosen, args, device):
    """Measure one network: {"status", "params"} and, if chosen, its throughput; only "status" if it cannot be built."""
    model, problem = build_network(network)
    if problem:
        return {"status": problem}
    result = {"status": "measured" if chosen else "not chosen", "params": sum(p.numel() for p in model.parameters())}
    try:
        return result | (throughput(model, network.px, args, device) if chosen else {})
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return {**result, "status": f"out of memory at batch {args.batch_size}"}
    finally:
        del model
        gc.collect()
        torch.cuda.empty_cache()


def measure_all(wanted, args, device):
    """Measure each model of the rows once: {row's key: result of `measure`}. Rank 0 measures, other ranks wait."""
    chosen = {network.model for network in NETWORKS if "all" in wanted or network.key in wanted}
    models, results = {network.model: network for network in NETWORKS}, {}
    for model, network in models.items() if distributed.is_main() else ():
        results[model] = measure(network, model in chosen, args, device)
        if model in chosen:
            print0(f"{model}: " + ", ".join(f"{k} {v:,.0f}" for k, v in results[model].items() if k != "status"))
    results = distributed.broadcast_object(results)
    return {network.key: results[network.model] for network in NETWORKS}


def checkpoints(args):
    """Parse --checkpoints to {row's key: file}. Raises UserError, also if it does not go with the other arguments."""
    ours, given = [n.key for n in NETWORKS if n.ours], options.parse_pairs(args.checkpoints, "--checkpoints")
    for key, file in given.items():
        if key not in ours:
            raise UserError(f"--checkpoints {key}={file}: name a row of {', '.join(ours)}; of the others only "
                            f"published accuracies are shown")
    if (args.imagenet or args.imagenet_v2 or args.real_labels) and not given:
        raise UserError("--imagenet, --real-labels and --imagenet-v2 are for --checkpoints ROW=FILE: give at least one")
    if given and not (args.imagenet or args.imagenet_v2):
        raise UserError("--checkpoints are evaluated on --imagenet or --imagenet-v2: give at least one of the two")
    if args.real_labels and not args.imagenet:
        raise UserError("--real-labels belong to the validation images of ImageNet-1k: give --imagenet too")
    return given


def evaluate_all(given, args, device):
    """Evaluate the given checkpoints {row's key: file}: {row's key: {"top1", "real", "v2"}}. Raises UserError."""
    if not given:
        return {}
    val = imagenet_variants.imagenet_val(args.imagenet) if args.imagenet else None
    real = imagenet_variants.read_real(args.real_labels) if args.real_labels else None
    v2 = imagenet_variants.imagenet_v2(args.imagenet_v2) if args.imagenet_v2 else None
    results = {}
    for key, file in given.items():
        model = load_model(file)
        expected = next(network.ours for network in NETWORKS if network.key == key)
        found = f"{model.config['model']} with {model.config['num_heads']} heads"
        if found != f"{expected} with 12 heads":
            raise UserError(f"--checkpoints {key}={file}: the file holds {found}, the row is {expected} with 12 heads")
        if not model.config.get("num_classes"):
            raise UserError(f"--checkpoints {key}={file}: it holds no classifier; give fine-tuned weights")
        model = eval_mode(model, device)
        results[key] = imagenet_variants.evaluate(model, device, val, real, v2, args.workers)
        print0(f"{key}, {file}: {results[key]}")
    return results


def protocol(args, device):
    """Describe in words how throughput is measured."""
    dtype = choose_precision(args.precision, device)
    precision = f"mixed precision {str(dtype).removeprefix('torch.')}" if dtype else "float32"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return (f"Throughput measured here: {where}, batch {args.batch_size}, {precision}, "
            f"{'channels last' if args.channels_last else 'channels first'}, "
            f"{'compiled' if args.compile else 'not compiled'}; random images already on the device, no gradients, "
            f"median of {args.repeats} batches after {args.warmup} to warm up.")


def number(value, digits=1):
    return "" if value is None else f"{value:,.{digits}f}"


COLUMNS = {
    "network": lambda row: row["name"] + row["marks"],
    "px": lambda row: row["px"],
    "M parameters": lambda row: number(row["measured"]["params"] / 1e6, 2) if "params" in row["measured"] else "",
    "published M": lambda row: number(row["published"]["params"], 2),
    "images/s": lambda row: number(row["measured"].get("images_per_second"), 0) or row["measured"]["status"],
    "published NHWC, NCHW": lambda row: ", ".join(number(row["published"][name], 0) for name in ("nhwc", "nchw")
                                                  if row["published"][name]),
    **{f"{name} {which}": lambda row, key=key, which=which: number(row[which].get(key))
       for name, key in (("top-1", "top1"), ("ReaL", "real"), ("V2", "v2")) for which in ("published", "measured")},
}


def draw(rows):
    """Draw published top-1 against measured throughput."""
    rows = [row for row in rows if "images_per_second" in row["measured"] and row["published"]["top1"] is not None]
    figure, axes = report.subplots(figsize=(8, 6))
    from matplotlib.ticker import LogLocator
    groups = {"other networks": ("o", lambda row: not row["ours"] and DISTILLED not in row["marks"]),
              f"{DISTILLED} trained with distillation": ("s", lambda row: DISTILLED in row["marks"]),
              "ViT-Tiny, 12 heads": ("D", lambda row: row["ours"])}
    points = []
    for colour, (label, (marker, belongs)) in zip(report.COLOURS, groups.items()):
        mine = [(row["measured"]["images_per_second"], row["published"]["top1"], row["name"] + row["marks"], colour)
                for row in rows if belongs(row)]
        axes.scatter([point[0] for point in mine], [point[1] for point in mine], marker=marker, s=22, label=label)
        points += mine
    axes.set(xscale="log", xlabel="images a second, measured here", ylabel="top-1 on ImageNet-1k (%), published")
    axes.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:,.0f}", minor_formatter="")
    axes.margins(0.12)
    figure.legend(loc="outside upper center", ncols=len(groups))
    label_points(axes, points)
    return figure


def measure_rows(args):
    """Measure and evaluate; write table2.json and table2.md; return the rows."""
    device = distributed.start_process_group(args.device)
    given = checkpoints(args)
    wanted = args.rows or (DEMO if args.preset == "demo" else ["all"])
    accuracy = evaluate_all(given, args, device)  # first, so that a wrong argument is found at once
    measured = measure_all(wanted, args, device)
    published = ("params", "top1", "real", "v2", "nhwc", "nchw")
    rows = [{"key": n.key, "name": n.name, "marks": n.marks, "ours": bool(n.ours), "px": n.px, "note": n.note,
             "published": {name: getattr(n, name) for name in published},
             "measured": {**measured[n.key], **accuracy.get(n.key, {})}}
            for n in NETWORKS]
    how = protocol(args, device)
    about = "\n".join(f"- {n.name}: {n.note}" for n in NETWORKS if n.note)
    text = "\n\n".join([f"table2, preset {args.preset}", how,
                        report.markdown(list(COLUMNS), [[cell(row) for cell in COLUMNS.values()] for row in rows]),
                        *NOTES, f"About the published numbers of ours:\n{about}"])
    content = {"item": "table2", "preset": args.preset, "rows": rows, "protocol": how, "notes": NOTES}
    report.write_text(Path(args.output) / "table2", "table2", content, text)
    return rows


def main(args):
    """Measure, write and draw; return the rows."""
    rows = report.read_numbers(args.from_numbers, "table2", "rows") if args.from_numbers else measure_rows(args)
    report.draw_numbers(args, "table2", draw, rows)
    return rows


if __name__ == "__main__":
    entry.run_script(main, build_parser(), PRESETS)
