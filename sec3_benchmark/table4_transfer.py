"""Table 4: top-1 after transfer to downstream classification sets, AP on COCO, from different initial weights.

    python sec3_benchmark/table4_transfer.py                                            # demo: two fractal sets
    python sec3_benchmark/table4_transfer.py --preset small --data-path DIR --dataset-path ROOT --datasets NAME
    torchrun --nproc-per-node=8 sec3_benchmark/table4_transfer.py --data-path IMAGENET --dataset-path ROOT
    python sec3_benchmark/table4_transfer.py --dataset-path ROOT --models mae=FILE supervised=FILE   # given weights

The paper's claim: on small sets the self-supervised ViT-Tiny trail the supervised one, MAE most of all, and the gap
shrinks with the size of the set. Its plot, the gap on each set, is drawn from the table's numbers. ROOT is explained in
sec3_benchmark/downstream_sets.py, each set's settings are in downstream.py; `--set transfer.lr=0.03` changes all.
The COCO columns are long runs of their own, made where `--datasets` names coco (in the demo: generated scenes).
"""
import math
import statistics
from itertools import cycle

from common import entry, options, report, tables
from common.rows import Row
from sec3_benchmark import downstream
from sec3_benchmark.downstream import COCO_AP, PUBLISHED
from sec3_benchmark.downstream_sets import SETS

DEMO = ("random", "supervised", "mocov3", "mae")
ROWS = [Row("random", "random", PUBLISHED["random"], ["sec3_benchmark/transfer.py"]), *downstream.ROWS]
NOTES = {
    **tables.NOTES,
    "paper": "Settings per data set: CIFAR-100's are published, those of the other sets are ours and not tuned, as no "
             "source gives them; nor does one say how the random row was trained (here: like the others).",
}


def build_parser():
    parser = options.make_parser(__doc__)
    options.add_data(parser)
    downstream.add_datasets(parser)
    tables.add_rows(parser, ROWS, DEMO)
    downstream.add_models(parser)
    report.add_pictures(parser, ".json")
    options.add_execution(parser)
    return parser


def published(row):
    return {name: [value] for name, value in row["published"].items() if name in SETS}


def measured(row):
    return {name: values for name, values in row["measured"].items() if name not in COCO_AP}


def gaps(rows, accuracy):
    """Compute {row's name: {data set: [top-1 - the supervised row's top-1, for each seed]}}, without random weights.

    accuracy: `published` or `measured`.
    """
    supervised = next(accuracy(row) for row in rows if row["key"] == "supervised")
    found = {row["name"]: {name: [ours - theirs for ours, theirs in zip(values, supervised[name])]
                           for name, values in accuracy(row).items() if values and supervised.get(name)}
             for row in rows if row["key"] not in ("supervised", "random")}
    return {name: gap for name, gap in found.items() if gap}


def draw(rows):
    """Draw the gap to the supervised row for each data set; the random row is far below the others."""
    colours = dict(zip([row["name"] for row in rows], cycle(report.COLOURS)))
    official = {name: about["images"][0] for name, about in SETS.items()}
    ours = {name: size for row in rows for name, size in row["train_images"].items()}
    figure, axes = report.subplots(1, 2, figsize=(7.2, 3.4))
    panel(axes[0], "published", gaps(rows, published), official, colours)
    panel(axes[1], "measured here", gaps(rows, measured), ours, colours)
    return figure


def panel(axis, heading, gap, sizes, colours):
    """Draw one panel, the smallest data set first; bars are standard deviations over seeds.

    gap: result of `gaps`. sizes: {data set: number of training images}. colours: {row's name: colour}.
    """
    axis.set(title=heading, xlabel="data set and its training images", ylabel="top-1 minus supervised (points)")
    axis.axhline(0, color="black", linewidth=0.8)
    if not gap:
        axis.text(0.5, 0.6, "needs the supervised row\nand another", ha="center", transform=axis.transAxes)
        return
    shown = sorted({name for values in gap.values() for name in values}, key=sizes.get)
    for row, values in gap.items():
        names = [name for name in shown if name in values]
        spread = [statistics.stdev(values[name]) if len(values[name]) > 1 else math.nan for name in names]
        axis.errorbar([shown.index(name) for name in names], [statistics.mean(values[name]) for name in names], spread,
                      marker="o", markersize=4, capsize=2, label=row, color=colours[row])
    axis.set_xticks(range(len(shown)), [f"{downstream.title(name)}\n{sizes[name]:,}" for name in shown], rotation=90,
                    fontsize=8)
    axis.set_xlim(-0.5, len(shown) - 0.5)
    axis.legend()


def measure(args):
    """Run the chosen rows on the chosen sets; write table4.json and .md; return the rows, none after a dry run."""
    tables.start_ranks(args)
    names = downstream.chosen_sets(args)
    rows, args = downstream.with_models(ROWS, args)
    rows = [downstream.random_like(row, args) if row.key == "random" else row for row in rows]
    results, without = tables.run_rows(downstream.cells(rows, names, args.rows), args, DEMO, "table4")
    if args.dry_run:
        return []
    rows = downstream.summaries(rows, results, names)
    sizes = {name: size for row in rows for name, size in row["train_images"].items()}
    about = "Each cell: published / measured, top-1 (COCO: AP) in % at the last epoch. Training images: " + ", ".join(
        f"{downstream.title(name)} {size:,}" for name, size in sizes.items()) + "."
    report.write_table("table4", args, downstream.columns(names), rows, notes=[
        about, *downstream.remarks(rows), *without.values(), NOTES[args.preset]])
    return rows


def main(args):
    """Measure, write and draw; return the rows."""
    rows = report.read_numbers(args.from_numbers, "table4", "rows") if args.from_numbers else measure(args)
    report.draw_numbers(args, "table4", draw, rows)
    return rows


if __name__ == "__main__":
    entry.run_script(main, build_parser(), parse=tables.parse)
