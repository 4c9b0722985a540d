"""Where do single heads look in one image? Maps of chosen layers and heads, for each model.

    python sec4_analysis/attention_maps.py                                                # demo: the preset's own runs
    python sec4_analysis/attention_maps.py --data-path IMAGENET --models MAE-Tiny=mae.pt --image 7 --layers 1 12
    python sec4_analysis/attention_maps.py --models MAE-Tiny=mae.pt --picture cat.jpg --query 7 7

The weights with which one query patch looks at all patches (without --query: the mean over query patches, that is how
much each patch is looked at), class token cut off before the softmax as in Figure 5. Each map has its own scale, whose
largest weight stands above it. Writes attention_maps.npz, .json, .md and draws attention_maps.png from the first.
"""
from functools import partial
from pathlib import Path

import numpy as np

from common import options, report
from common.errors import UserError
from common.images import ImageSet
from sec4_analysis import attention, study
from sec4_analysis.features import geometry, intermediates
from sec4_analysis.fig5_attention import ROWS
from sec4_analysis.images import validation_images


def build_parser():
    parser = study.make_parser(__doc__, norm=False)
    group = parser.add_argument_group("maps")
    group.add_argument("--image", type=int, default=0, metavar="I", help="which of the drawn images, from 0")
    group.add_argument("--picture", metavar="FILE", help="this image instead, for --models; needs no data set")
    group.add_argument("--layers", type=int, nargs="+", default=[1, 6, 12], help="blocks, from 1")
    group.add_argument("--heads", type=int, nargs="+", default=[1, 2], help="from 1")
    group.add_argument("--query", type=int, nargs=2, metavar=("ROW", "COLUMN"), help="a patch, from 0; default: all")
    return parser


def parse(parser, argv=None):
    """The arguments. With a picture they have no preset and no data set."""
    args = study.parse(parser, argv)
    if args.picture and args.image:
        parser.error("--image chooses among the drawn images, and --picture is one: leave it out")
    if args.image >= args.num_images and args.order == "drawn":
        raise UserError(f"--image {args.image}: {args.num_images} images are drawn; raise --num-images")
    if args.picture:
        args.preset, args.data = None, Path(args.picture).name
    return args


def picture(args):
    """The one image of --picture as a set of its own."""
    if not Path(args.picture).is_file():
        raise UserError(f"--picture {args.picture}: no such file")
    args.num_images, args.order = 1, "drawn"
    return ImageSet("picture", [args.picture], np.zeros(1, int), ["picture"], args.in_chans)


def attention_maps(model, images, args):
    """The image (H, W, C), scaled to 0..1, and {(layer, head): weights over the patches (rows, columns)}."""
    prefix, (rows, columns), _ = geometry(model)
    if args.query and not (0 <= args.query[0] < rows and 0 <= args.query[1] < columns):
        raise UserError(f"--query {args.query[0]} {args.query[1]}: the grid has {rows} rows and {columns} columns")
    if not all(1 <= layer <= len(model.blocks) for layer in args.layers):
        raise UserError(f"--layers {args.layers}: the model has {len(model.blocks)} blocks, counted from 1")
    seen = 0
    for batch in images:
        if args.image < seen + len(batch):
            break
        seen += len(batch)
    else:
        raise UserError(f"--image {args.image}: {seen} images are drawn; raise --num-images")
    image, maps = batch[args.image - seen:][:1], {}
    for name, logits in intermediates(model, image, [f"blocks.{layer - 1}.logits" for layer in args.layers]):
        weights = attention.attention_weights(logits, prefix)[0]  # (heads, L, L)
        if not all(1 <= head <= len(weights) for head in args.heads):
            raise UserError(f"--heads {args.heads}: the model has {len(weights)}, counted from 1")
        looked = weights[:, args.query[0] * columns + args.query[1]] if args.query else weights.mean(dim=1)
        for head in args.heads:
            maps[int(name.split(".")[1]) + 1, head] = looked[head - 1].view(rows, columns).cpu().numpy()
    image = image[0].permute(1, 2, 0).cpu().numpy()
    return (image - image.min()) / np.ptp(image).clip(1e-6), maps


def numbers(args):
    """{"MODEL/image", "MODEL/block B head H", "query": array} and what to know about them; None: see study.analyse."""
    done = study.analyse(args, study.sources(args, ROWS, "attention_maps"), partial(attention_maps, args=args),
                         picture if args.picture else validation_images, image=args.image, query=args.query)
    if done is None:
        return None
    arrays, (models, about) = {}, done
    for name, (image, maps) in models.items():
        arrays[f"{name}/image"] = image
        arrays.update({f"{name}/block {layer} head {head}": values for (layer, head), values in maps.items()})
    return {**arrays, **({"query": np.array(args.query)} if args.query else {})}, about


def asked(arrays):
    """Whose attention the maps show."""
    return "query patch {}, {}".format(*arrays["query"]) if "query" in arrays else "mean over queries"


def describe(arrays):
    """The largest weight of each map, as Markdown."""
    return f"weights of attention maps, {asked(arrays)}\n\n" + report.markdown(
        ["map", "largest weight"],
        [[key, f"{values.max():.4f}"] for key, values in arrays.items() if "/block " in key])


def visible(image):
    """An image (H, W, C) as matplotlib shows it: colours, or grey values (H, W), the mean of other channels."""
    return image if image.shape[-1] == 3 else image.mean(axis=-1)


def draw(arrays, path):
    """A row a model: the image, then a map for each layer and head, scaled to its largest weight; cyan: the query."""
    models = {}
    for key, array in arrays.items():
        if key != "query":
            name, what = key.rsplit("/", 1)
            models.setdefault(name, []).append((what, array))
    columns = max(len(panels) for panels in models.values())
    figure, axes = report.subplots(len(models), columns, figsize=(1.5 * columns, 1.75 * len(models)), squeeze=False)
    for row, (name, panels) in zip(axes, models.items()):
        for panel, (what, array) in zip(row, panels):
            picture = what == "image"
            panel.imshow(visible(array) if picture else array, cmap="gray" if picture else "magma", vmin=0,
                         vmax=1 if picture else array.max())
            if "query" in arrays and not picture:
                panel.plot(*arrays["query"][::-1], "s", color="cyan", fillstyle="none", markersize=5)
            panel.set_title(f"{name}\n{asked(arrays)}" if picture else f"{what}\nmax {array.max():.3f}", fontsize=8)
        for panel in row:
            panel.axis("off")
    figure.savefig(path)


def main(args):
    """Measures, writes and draws; returns {"MODEL/image" or "MODEL/block B head H": array}."""
    if args.picture and not args.models:
        raise UserError("--picture needs --models: the preset's own runs are trained on a data set")
    return study.figure(args, "attention_maps", lambda: numbers(args), describe, draw)


if __name__ == "__main__":
    options.start(main, build_parser(), parse=parse)
