"""How fast is the MAE-Tiny/16 step at 224 px, and the loader? Against straightforward versions, in the same run.

    python appendix/benchmark_throughput.py                        # 2 minutes on 2 CPU cores; run it alone
    python appendix/benchmark_throughput.py --device cuda --batch-size 1024 --compile
    python appendix/benchmark_throughput.py --parts loader --data-path DIR

The straightforward step is tests/straightforward_mae.py: every patch is embedded, un-shuffled, predicted and compared,
with timm's own choice of attention and PyTorch's default AdamW. FLOPs are those of our step's matrix products, compared
with the rate that one large product reaches here. Clock and memory: appendix/benchmarking.py. Writes benchmark.json and
benchmark.md.
"""
import statistics
import tempfile
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from torchvision import datasets, transforms

from appendix import benchmarking
from appendix.benchmarking import DTYPES, from_tests, in_turns, peak_of_step, seconds, synchronize, training_step
from common import distributed, options, report
from common.augment import pretrain_transform
from common.data import labelled_folder
from common.distributed import print0
from common.fractals import draw
from common.loader import Views, data_loader, step_batches, to_device
from common.mae import MAE
from common.optim import adamw, parameter_groups
from common.runs import identity
from common.vit import choose_attention


def build_parser():
    parser = options.make_parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=("step", "loader"), default=["step", "loader"])
    parser.add_argument("--precisions", nargs="+", choices=tuple(DTYPES), default=["fp32", "bf16"])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--patch-size", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=5, help="measured turns of each version, after one to warm up")
    parser.add_argument("--compile", action="store_true", help="also measure both compiled")
    parser.add_argument("--data-path", help="class folders of images for the loader; default: 1,000 generated JPEGs")
    parser.add_argument("--workers", type=int, default=2)
    benchmarking.add_execution(parser)
    return parser


def make_step(version, precision, args, device, compiled=False):
    """A function that does one whole training step of a version on fixed data: forward, backward, AdamW."""
    torch.manual_seed(0)
    dtype = DTYPES[precision]
    if version == "ours":
        model = MAE(img_size=args.img_size, patch_size=args.patch_size).to(device)
        choose_attention(model, device, dtype)
        optimizer = adamw(parameter_groups(model, 0.05), (0.9, 0.95))
    else:
        reference = from_tests("straightforward_mae").StraightforwardMAE
        model = reference(img_size=args.img_size, patch_size=args.patch_size).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.05)
    forward = torch.compile(model) if compiled else model
    loss = forward if version == "ours" else lambda *batch: forward(*batch)[0]
    return training_step(loss, optimizer, args, device, dtype)


def matmul_rate(precision, device):
    """FLOP/s of one large square matrix product in this precision: the ceiling that the step is compared with."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=DTYPES[precision] or torch.float32) for _ in range(2))

    def product():
        a @ b
        synchronize(device)
    product()
    return 2 * n**3 / min(seconds(product) for _ in range(5))


def step_flops(args, device):
    """FLOPs of the matrix products of one step of ours, attention included."""
    step = make_step("ours", "fp32", args, device)
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def against(ours, other, pairs):
    """Median seconds of both, and the median over the turns of other / ours."""
    times = in_turns({"ours": ours, "other": other}, pairs)
    return (*map(statistics.median, times.values()),
            statistics.median(b / a for a, b in zip(times["ours"], times["other"])))


def measure_steps(args, device):
    """Rows of the step comparison."""
    flops, rows = step_flops(args, device), []
    for precision in args.precisions:
        ceiling = matmul_rate(precision, device)
        for compiled in (False, True) if args.compile else (False,):
            ours, other, ratio = against(make_step("ours", precision, args, device, compiled),
                                         make_step("straightforward", precision, args, device, compiled), args.pairs)
            rows.append({"precision": precision, "compiled": compiled, "ours_images_per_second": args.batch_size / ours,
                         "straightforward_images_per_second": args.batch_size / other, "ratio": ratio,
                         "flops_per_second": flops / ours, "matmul_flops_per_second": ceiling,
                         "ours_peak_gib": peak_of_step(__file__, make_step, "ours", precision, args, device),
                         "straightforward_peak_gib": peak_of_step(__file__, make_step, "straightforward", precision,
                                                                   args, device)})
            print0(rows[-1])
    return rows


def generated_folder(folder, count=1000, size=256):
    """A class folder of JPEGs of fractals, for a loader that must decode."""
    from PIL import Image
    for first in range(0, count, 50):
        target = Path(folder) / f"class{first // 50:02d}"
        target.mkdir(parents=True)
        for index, image in enumerate(draw(0, [first // 50] * 50, list(range(50)), size, size)):
            Image.fromarray(image).save(target / f"{index}.jpg", quality=90)
    return folder


def measure_loader(args, device):
    """Images a second from files to a normalised batch, ours and torchvision's ImageFolder with the same transforms."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.data_path or generated_folder(scratch)
        images = labelled_folder(folder, 3, "folder")
        count = min(len(images), 4000) // args.batch_size * args.batch_size
        mean, std = (torch.tensor(s, device=device) for s in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        bicubic = transforms.InterpolationMode.BICUBIC
        reference = datasets.ImageFolder(folder, transforms.Compose([
            transforms.RandomResizedCrop(args.img_size, scale=(0.08, 1), interpolation=bicubic),
            transforms.RandomHorizontalFlip(), transforms.ToTensor(),
            transforms.Normalize(mean.tolist(), std.tolist())]))
        views = Views(images, pretrain_transform(args.img_size, interpolation="bicubic"), seed=0)

        def ours():
            keys = step_batches(count, batch_size=args.batch_size, accumulation=1, seed=0, start_step=0,
                                total_steps=count // args.batch_size)
            for batch in data_loader(views, keys, args.workers, device):
                to_device(batch, device, mean * 255, std * 255)

        def torchvisions():
            loader = torch.utils.data.DataLoader(torch.utils.data.Subset(reference, range(count)), args.batch_size,
                                                 shuffle=True, num_workers=args.workers)
            for batch, _ in loader:
                batch.to(device)

        mine, other, ratio = against(ours, torchvisions, args.pairs)
    return {"images": count, "workers": args.workers, "ours_images_per_second": count / mine,
            "torchvision_images_per_second": count / other, "ratio": ratio}


def write(args, device, steps, loader):
    """benchmark.json and benchmark.md."""
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
        texts.append(f"Loader, {loader['workers']} workers, {loader['images']} JPEGs, {args.pairs} pairs: ours "
                     f"{loader['ours_images_per_second']:.0f} images/s, torchvision's ImageFolder "
                     f"{loader['torchvision_images_per_second']:.0f}, ratio {loader['ratio']:.2f}")
    report.write_text(Path(args.output) / "benchmark_throughput", "benchmark",
                      {"settings": identity(vars(args)), "steps": steps, "loader": loader}, "\n\n".join(texts))


def main(args):
    """Measures and writes what --parts asks for."""
    device = distributed.start(args.device)
    if args.memory_of:
        make_step(*args.memory_of, args, device)()
        print(benchmarking.resident("VmHWM"))
        return
    steps = measure_steps(args, device) if "step" in args.parts else []
    loader = measure_loader(args, device) if "loader" in args.parts else None
    write(args, device, steps, loader)


if __name__ == "__main__":
    options.start(main, build_parser())
