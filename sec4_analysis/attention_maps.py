"""Where do single heads attend in one image? Maps of chosen layers and heads, for each model.

    python sec4_analysis/attention_maps.py                                                # demo: the preset's own runs
    python sec4_analysis/attention_maps.py --data-path IMAGENET --models MAE-Tiny=mae.pt --image 7 --layers 1 12
    python sec4_analysis/attention_maps.py --models MAE-Tiny=mae.pt --picture cat.jpg --query 7 7

A map shows the attention weights of the query patch --query over all patches; without --query, their mean over all
query patches, that is, how much attention each patch receives. The class token is removed before the softmax, as in
Figure 5. Each map has its own colour scale; its largest weight stands above it. Writes attention_maps.npz, .json, .md
and draws attention_maps.png from the .npz.
"""
from pathlib import Path

import numpy as np
import torch

from common import entry, options, report
from common.distributed import is_main
from common.errors import UserError
from common.images import ImageSet
from common.ranges import Int
from sec4_analysis import attention, study
from sec4_analysis.activations import Activations, geometry
from sec4_analysis.fig5_attention import ROWS


def build_parser():
    parser = study.make_parser(__doc__, norm=False)
    group = parser.add_argument_group("maps")
    group.add_argument("--image", type=Int(0), default=0, metavar="I", help="which of the drawn images, from 0")
    group.add_argument("--picture", metavar="FILE", help="this image instead, for --models; needs no data set")
    group.add_argument("--layers", type=Int(1), nargs="+", default=[1, 6, 12], help="blocks, from 1")
    group.add_argument("--heads", type=Int(1), nargs="+", default=[1, 2], help="from 1")
    group.add_argument("--query", type=Int(0), nargs=2, metavar=("ROW", "COLUMN"), help="a patch, from 0; default: all")
    return parser


def parse_maps(parser, argv=None):
    """Parse the command line. With --picture there is no preset and no data set."""
    args = study.parse(parser, argv)
    if args.picture and args.image:
        parser.error("--image chooses among the drawn images, and --picture is one: leave it out")
    if args.image >= args.num_images and args.order == "drawn":
        raise UserError(f"--image {args.image}: {args.num_images} images are drawn; raise --num-images")
    if not args.picture:
        return args
    return options.replaced(args, preset=None, data=Path(args.picture).name, num_images=1, order="drawn")


def one_picture(args, models):
    """Return an ImageSet of the one image of --picture; None where study.images returns None."""
    if not models or not is_main():
        return None
    if not Path(args.picture).is_file():
        raise UserError(f"--picture {args.picture}: no such file")
    channels = next(iter(models.values())).patch_embed.proj.in_channels
    return ImageSet("picture", [args.picture], np.zeros(1, int), ["picture"], channels)


def pick(batches, number):
    """Return the image with this number, counted from 0 over all batches: (1, C, H, W)."""
    seen = 0
    for batch in batches:
        if number < seen + len(batch):
            return batch[number - seen:][:1]
        seen += len(batch)
    raise UserError(f"--image {number}: {seen} images are drawn; raise --num-images")


def check_places(model, layers, heads, query):
    """Raise UserError for layers or heads (from 1) or a query patch (row, column; from 0) the model does not have."""
    _, (rows, columns), _ = geometry(model)
    if query and not (query[0] < rows and query[1] < columns):
        raise UserError(f"--query {query[0]} {query[1]}: the grid has {rows} rows and {columns} columns")
    if max(layers) > len(model.blocks):
        raise UserError(f"--layers {layers}: the model has {len(model.blocks)} blocks, counted from 1")
    if max(heads) > model.blocks[0].attn.num_heads:
        raise UserError(f"--heads {heads}: the model has {model.blocks[0].attn.num_heads}, counted from 1")


@torch.inference_mode()
def head_maps(model, image, layers, heads, query=None):
    """Compute the maps of an image (1, C, H, W): {"block B head H": weights of the patches (rows, columns)}."""
    prefix, (rows, columns), _ = geometry(model)
    with Activations(model, [f"blocks.{layer - 1}.logits" for layer in layers],
                     lambda logits: attention.attention_weights(logits, prefix)[0]) as read:
        found = read(image)
    maps = {}
    for name, weights in found.items():  # each (heads, L, L)
        block = int(name.split(".")[1]) + 1
        of_heads = weights[:, query[0] * columns + query[1]] if query else weights.mean(dim=1)  # (heads, L)
        for head in heads:
            maps[f"block {block} head {head}"] = of_heads[head - 1].view(rows, columns).cpu().numpy()
    return maps


def in_unit_range(image):
    """Rescale the one image of a batch to 0..1: (1, C, H, W) -> (H, W, C)."""
    image = image[0].permute(1, 2, 0).cpu().numpy()
    return (image - image.min()) / np.ptp(image).clip(1e-6)


def query_label(arrays):
    """Describe in words which query patches the maps belong to."""
    return "query patch {}, {}".format(*arrays["query"]) if "query" in arrays else "mean over queries"


def describe(arrays):
    """Format the largest weight of each map as Markdown."""
    return f"weights of attention maps, {query_label(arrays)}\n\n" + report.markdown(
        ["map", "largest weight"],
        [[key, f"{values.max():.4f}"] for key, values in arrays.items() if "/block " in key])


def visible(image):
    """Convert an image (H, W, C) for matplotlib: RGB as it is, else grey (H, W), the mean over channels."""
    return image if image.shape[-1] == 3 else image.mean(axis=-1)


def draw_maps(arrays):
    """Draw a row per model: the image, then its maps, each scaled to its maximum. A cyan square is the query patch."""
    models = {}
    for key, array in arrays.items():
        if key != "query":
            name, what = key.rsplit("/", 1)
            models.setdefault(name, []).append((what, array))
    columns = max(len(panels) for panels in models.values())
    figure, axes = report.subplots(len(models), columns, figsize=(1.5 * columns, 1.75 * len(models)), squeeze=False)
    for row, (name, panels) in zip(axes, models.items()):
        for panel, (what, array) in zip(row, panels):
            if what == "image":
                panel.imshow(visible(array), cmap="gray", vmin=0, vmax=1)
                panel.set_title(f"{name}\n{query_label(arrays)}", fontsize=8)
            else:
                panel.imshow(array, cmap="magma", vmin=0, vmax=array.max())
                panel.set_title(f"{what}\nmax {array.max():.3f}", fontsize=8)
            if "query" in arrays:
                mark_patch(panel, arrays["query"], np.array(array.shape[:2]) / panels[-1][1].shape)
        for panel in row:
            panel.axis("off")
    from matplotlib import cm, colors
    scale = cm.ScalarMappable(colors.Normalize(0, 1), "magma")
    bar = figure.colorbar(scale, ax=axes, ticks=[0, 1], aspect=40, pad=0.01)
    bar.set_ticklabels(["0", "max"])
    return figure


def mark_patch(panel, query, size):
    """Draw a square around the query patch (row, column). size: a patch's (height, width) in the panel's pixels."""
    row, column = query * size - 0.5  # the first pixel's centre is at 0
    from matplotlib.patches import Rectangle
    panel.add_patch(Rectangle((column, row), size[1], size[0], fill=False, edgecolor="cyan", linewidth=1.2))


def main(args):
    """Measure, write and draw; return {"MODEL/image", "MODEL/block B head H", "query"}, {} if nothing was measured."""
    if args.picture and not args.models:
        raise UserError("--picture needs --models: the preset's own runs are trained on a data set")
    if args.from_numbers:
        arrays = report.read_numbers(args.from_numbers, "attention_maps")
    else:
        models = study.load_all(args, study.checkpoints(args, ROWS, "attention_maps"))
        images = one_picture(args, models) if args.picture else study.images(args, models)
        if images is None:
            return {}
        arrays = {}
        for name, model, batches in study.each_model(args, models, images):
            check_places(model, args.layers, args.heads, args.query)
            image = pick(batches, args.image)
            arrays[f"{name}/image"] = in_unit_range(image)
            for place, weights in head_maps(model, image, args.layers, args.heads, args.query).items():
                arrays[f"{name}/{place}"] = weights
        if args.query:
            arrays["query"] = np.array(args.query)
        about = study.about(args, models, images, image=args.image, query=args.query)
        study.save(args, "attention_maps", arrays, about, describe(arrays))
    report.draw_numbers(args, "attention_maps", draw_maps, arrays)
    return arrays


if __name__ == "__main__":
    entry.run_script(main, build_parser(), parse=parse_maps)
