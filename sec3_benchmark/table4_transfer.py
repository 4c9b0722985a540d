"""Table 4: top-1 after transfer to downstream classification sets, AP on COCO, from different initial weights.

    python sec3_benchmark/table4_transfer.py                                            # demo: two fractal sets
    python sec3_benchmark/table4_transfer.py --preset small --data-path DIR --dataset-path ROOT --datasets NAME
    torchrun --nproc-per-node=8 sec3_benchmark/table4_transfer.py --data-path IMAGENET --dataset-path ROOT
    python sec3_benchmark/table4_transfer.py --dataset-path ROOT --models mae=FILE supervised=FILE   # given weights

The paper's claim: on small sets the self-supervised ViT-Tiny trail the supervised one, MAE most of all, and the gap
shrinks with the size of the set. Its plot, gap against size, is drawn from the table's numbers. ROOT is explained in
sec3_benchmark/downstream_sets.py, each set's settings are in downstream.py; `--set transfer.lr=0.03` changes all.
The COCO columns are long runs of their own, made where `--datasets` names coco (in the demo: generated scenes).
"""
import json
import math
import statistics
from itertools import cycle
from pathlib import Path

from common import distributed, entry, options, report, tables
from common.distributed import is_main
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
    options.add_execution(parser)
    return parser


def published(row):
    return {name: [value] for name, value in row["published"].items() if name in SETS}


def measured(row):
    return {name: values for name, values in row["measured"].items() if name not in COCO_AP}


def gaps(rows, accuracy):
    """{row name: {data set: [top-1 - the supervised row's, for each seed]}}; `accuracy` is one of the two above."""
    supervised = next(accuracy(row) for row in rows if row["key"] == "supervised")
    found = {row["name"]: {name: [ours - theirs for ours, theirs in zip(values, supervised[name])]
                           for name, values in accuracy(row).items() if values and supervised.get(name)}
             for row in rows if row["key"] not in ("supervised", "random")}
    return {name: gap for name, gap in found.items() if gap}


def draw(table, path):
    """Gap to the supervised row against training images, from table4.json; the random row is far below the others."""
    table = json.loads(Path(table).read_text())
    rows = table["rows"]
    colours = dict(zip([row["name"] for row in rows], cycle(report.COLOURS)))
    official = {name: about["images"][0] for name, about in SETS.items()}
    ours = {name: size for row in rows for name, size in row["train_images"].items()}
    figure, axes = report.subplots(1, 2, figsize=(7.2, 3.4))
    panel(axes[0], "published", gaps(rows, published), official, colours)
    panel(axes[1], f"measured, {table['preset']}", gaps(rows, measured), ours, colours)
    report.save_figure(figure, path)


def panel(axis, heading, gap, sizes, colours):
    """One half of the figure; the bars are standard deviations over seeds."""
    axis.set(title=heading, xlabel="training images", ylabel="top-1 - supervised (points)")
    axis.axhline(0, color="black", linewidth=0.8)
    if not gap:
        axis.text(0.5, 0.6, "needs the supervised row\nand another", ha="center", transform=axis.transAxes)
        return
    for row, values in gap.items():
        names = sorted(values, key=sizes.get)
        spread = [statistics.stdev(values[name]) if len(values[name]) > 1 else math.nan for name in names]
        axis.errorbar([sizes[name] for name in names], [statistics.mean(values[name]) for name in names], spread,
                      marker="o", markersize=4, capsize=2, label=row, color=colours[row])
    shown = {name: sizes[name] for values in gap.values() for name in values}
    axis.set_xscale("log")
    axis.set_xticks(list(shown.values()), [f"{downstream.title(name)} {size:,}" for name, size in shown.items()],
                    rotation=90, fontsize=7)
    axis.minorticks_off()
    axis.legend()


def main(args):
    """Runs the chosen rows on the chosen sets; writes table4.json, .md and, from the json, .png; returns the rows."""
    distributed.start_process_group("cpu" if args.dry_run else args.device)
    names = downstream.chosen_sets(args)
    rows, args = downstream.with_models(ROWS, args)
    rows = [downstream.random_like(row, args) if row.key == "random" else row for row in rows]
    results, _ = tables.run_rows(downstream.cells(rows, names, args.rows), args, DEMO, "table4")
    if args.dry_run:
        return []
    nothing = {name: [] for name in names}
    rows = [downstream.summary(row, results.get(row.key, nothing)) for row in rows]
    sizes = {name: size for row in rows for name, size in row["train_images"].items()}
    about = "Each cell: published / measured, top-1 (COCO: AP) in % at the last epoch. Training images: " + ", ".join(
        f"{downstream.title(name)} {size:,}" for name, size in sizes.items()) + "."
    given = [f"{row['name']}: {row['note']}." for row in rows if row["note"]]
    table = report.write_table("table4", args, downstream.columns(names), rows,
                               notes=[about, *given, NOTES[args.preset]])
    if is_main():
        with report.only_a_picture(picture := table.with_suffix(".png")):
            draw(table, picture)
    return rows


if __name__ == "__main__":
    entry.run_script(main, build_parser(), parse=tables.parse)
