"""Appendix A.6: how CKA depends on batch size, on number and order of the images, and on spatial frequencies.

    python appendix/a6_cka_settings.py                                                      # demo: its own runs
    python appendix/a6_cka_settings.py --data-path IMAGENET --models DeiT-Tiny=deit.pt MAE-Tiny=mae.pt
    python appendix/a6_cka_settings.py --from-numbers outputs/a6/a6.npz

Measures Figure 1's similarities again, with one setting changed at a time. The paper claims that low frequencies
dominate: CKA of low-passed features equals CKA of the full features. The sources that we read give neither its numbers
nor its cut-off; ours is half of the highest frequency (--cut-off). Writes a6.npz, .json, .md and a6.png.
"""
from functools import partial

import numpy as np
import torch

from common import entry, options, report
from common.distributed import print0
from common.errors import UserError
from common.ranges import Float
from sec4_analysis import similarity, study

ROWS = (study.SUPERVISED, study.MAE_ROW, study.MOCOV3)
VARIANTS = {  # name -> what differs from Figure 1's setting
    "as in Figure 1": {},
    "mini-batches of 32": {"batch_size": 32},
    "mini-batches of 512": {"batch_size": 512},
    "a quarter of the images": {"num_images": 0.25},  # of --num-images
    "other images": {"image_seed": 1},  # added to the seed
    "authors' order": {"order": "authors"},
    "low-passed": {"band": "low"},
    "high-passed": {"band": "high"},
}


def build_parser():
    parser = study.make_parser(__doc__)
    parser.add_argument("--cut-off", type=Float(0, 1), default=0.5,
                        help="boundary between low and high, as a share of the highest frequency")
    return parser


def band_pass(tokens, grid, band, cut_off):
    """Return the "low" or "high" spatial frequencies of patch tokens (B, L, C) on `grid` (rows, columns).

    Low: both axes below the cut-off, where 1 is the highest frequency, an alternating pattern. High: all others, so
    the two parts add up to the tokens.
    """
    B, L, C = tokens.shape
    frequencies = [torch.fft.fftfreq(n, device=tokens.device).abs() * 2 for n in grid]
    low = (frequencies[0].unsqueeze(1) < cut_off) & (frequencies[1] < cut_off)  # (rows, columns)
    spectrum = torch.fft.fft2(tokens.float().transpose(1, 2).reshape(B, C, *grid)) * (low if band == "low" else ~low)
    return torch.fft.ifft2(spectrum).real.reshape(B, C, L).transpose(1, 2)


def variant(args, change):
    """Return args with the change of one variant; Figure 1 has no argument for the band."""
    change = {name: value for name, value in change.items() if name != "band"}
    if "num_images" in change:
        change["num_images"] = int(change["num_images"] * args.num_images)
    if "image_seed" in change:
        change["image_seed"] += args.seed if args.image_seed is None else args.image_seed
    return options.replaced(args, **change)


def compare_variants(args, models, images):
    """Measure every variant.

    Returns {"model: variant": CKA (layers, layers of the first model)} and {variant: remarks for the table}.
    """
    arrays, about = {}, {}
    for name, change in VARIANTS.items():
        band = partial(band_pass, band=change["band"], cut_off=args.cut_off) if "band" in change else None
        changed = variant(args, change)
        print0(f"\n# {name}")
        try:
            found = similarity.similarities(changed, models, images, band)
        except UserError as error:
            if not change:
                raise
            about[name] = f"left out: {error}"  # for example, too few images for the authors' order
            print0(about[name])
            continue
        arrays |= {f"{model}: {name}": array for model, array in found.items()}
        about[name] = similarity.about(changed, models, images)
    return arrays, about


def by_model(arrays):
    """Group the arrays as {model: {variant: array}}, without the first model, which is the reference."""
    split = {}
    for key, array in arrays.items():
        model, name = key.rsplit(": ", 1)
        split.setdefault(model, {})[name] = array
    return dict(list(split.items())[1:])


def describe(arrays):
    """Return a Markdown table with the mean of the diagonal and the largest change of a pair for each variant."""
    rows = []
    for model, variants in by_model(arrays).items():
        usual = next(iter(variants.values()))
        rows += [[model, name, f"{np.diagonal(array).mean():.3f}", f"{np.abs(array - usual).max():.3f}"]
                 for name, array in variants.items()]
    return "CKA of equal layers with the first model\n\n" + report.markdown(
        ["model", "setting", "mean of the diagonal", "largest change of a pair"], rows)


def draw_diagonals(arrays):
    """Draw one panel per model: the diagonal of its CKA matrix for every variant."""
    models = by_model(arrays)
    figure, axes = report.subplots(1, len(models), figsize=(3.2 * len(models) + 2, 2.8), sharey=True, squeeze=False)
    styles = ("-", "--", ":", "-.")
    for panel, (model, variants) in zip(axes[0], models.items()):
        for number, (name, array) in enumerate(variants.items()):
            colour, width = (report.COLOURS[number - 1], 1.2) if number else ("0.75", 4)
            panel.plot(np.diagonal(array), linestyle=styles[number % 4], color=colour, linewidth=width, label=name)
        panel.set(title=model, xlabel="layer", ylim=(0, 1), xticks=range(0, 13, 3))
    axes[0, 0].set_ylabel(f"CKA with {next(iter(arrays)).rsplit(': ', 1)[0]}")
    axes[0, -1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def main(args):
    """Measure, write and draw every variant; return {"model: variant": CKA}, {} after a dry run and on ranks > 0."""
    if args.from_numbers:
        arrays = report.read_numbers(args.from_numbers, "a6")
    else:
        if args.order == "authors" or args.models and len(args.models) < 2:
            raise UserError("A.6 compares at least two models and changes the order itself: more --models, no --order")
        models = study.load_all(args, study.checkpoints(args, ROWS, "a6"))
        images = study.images(args, models)
        if images is None:
            return {}
        arrays, variants = compare_variants(args, models, images)
        about = {"preset": args.preset, "data": args.data, "cut_off": args.cut_off, "variants": variants}
        study.save(args, "a6", arrays, about, describe(arrays))
    report.draw_numbers(args, "a6", draw_diagonals, arrays)
    return arrays


if __name__ == "__main__":
    entry.run_script(main, build_parser(), parse=study.parse)
