"""Table 4: top-1 after transfer to downstream classification sets, AP on COCO, from different initial weights.

    python sec3_benchmark/table4_transfer.py                                            # demo: two fractal sets
    python sec3_benchmark/table4_transfer.py --preset small --data-path DIR --dataset-path ROOT --datasets NAME
    torchrun --nproc-per-node=8 sec3_benchmark/table4_transfer.py --data-path IMAGENET --dataset-path ROOT
    python sec3_benchmark/table4_transfer.py --dataset-path ROOT --models mae=FILE supervised=FILE   # given weights

The paper's claim: on small sets the self-supervised ViT-Tiny trail the supervised one, MAE most of all, and the gap
shrinks with the size of the set. Its plot, gap against size, is drawn from the table's numbers. ROOT is explained in
sec3_benchmark/downstream.py, which also holds each set's settings; `--set transfer.lr=0.03` changes one for all sets.
The COCO columns are long runs of their own, made where `--datasets` names coco (in the demo: generated scenes).
"""
import json
import math
import statistics
from dataclasses import replace
from itertools import cycle
from pathlib import Path

from common import distributed, options, report, tables
from common.distributed import is_main
from common.errors import UserError
from common.tables import PREVIOUS, Row
from sec3_benchmark import downstream
from sec3_benchmark.downstream import COCO_AP, PUBLISHED, SETS

FINETUNE, TRANSFER = "sec3_benchmark.finetune", ("sec3_benchmark.transfer", {"init": PREVIOUS})
MAE, MOCO = "sec3_benchmark.pretrain_mae", "sec3_benchmark.pretrain_mocov3"
DEMO = ("random", "supervised", "mocov3", "mae")
ROWS = [  # TRANSFER starts from what the stage before it left, here: none, a classifier, an encoder
    Row("random", "random", PUBLISHED["random"], (TRANSFER,)),
    Row("supervised", "supervised (DeiT-Tiny)", PUBLISHED["supervised"], ((FINETUNE, {}), TRANSFER)),
    Row("mocov3", "MoCo-v3", PUBLISHED["mocov3"], ((MOCO, {}), TRANSFER)),
    Row("mae", "MAE", PUBLISHED["mae"], ((MAE, {}), TRANSFER)),
    Row("dino", "DINO", PUBLISHED["dino"], (("appendix.pretrain_dino", {}), TRANSFER)),
    # SimMIM's relative positions come along; detect.py is for plain ViTs
    Row("simmim", "SimMIM", PUBLISHED["simmim"], (("appendix.pretrain_simmim", {}), TRANSFER), without=("coco",)),
]
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
    parser.add_argument("--models", nargs="+", action="extend", default=[], metavar="NAME=CHECKPOINT",
                        help="transfer these weights, of one of the rows or of a new one, and pre-train nothing for "
                             "them; other rows run only if --rows names them")
    options.add_execution(parser)
    return parser


def with_models(rows, models):
    """The rows, those in `models` {name: file} starting from these weights, and a row for each other name."""
    known, keys = {row.key: row for row in rows}, {row.name: row.key for row in rows}
    given = {}
    for name, file in models.items():
        if name not in known and name in keys:
            raise UserError(f"--models {name}={file}: {name} is the title of a row; write {keys[name]}={file}")
        row = known.get(name, Row(name, name, {}, (TRANSFER,)))
        module, settings = row.stages[-1]
        given[name] = replace(row, note=f"weights given: {Path(file).name}",
                              stages=((module, {**settings, "init": file}),))
    return list({**known, **given}.values())


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
    plt = report.pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 3.4), layout="constrained")
    panel(axes[0], "published", gaps(rows, published), official, colours)
    panel(axes[1], f"measured, {table['preset']}", gaps(rows, measured), ours, colours)
    figure.savefig(path)
    plt.close(figure)


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
    distributed.start("cpu" if args.dry_run else args.device)
    models = options.named(args.models, "--models")
    rows, names = with_models(ROWS, models), downstream.chosen_sets(args)
    if models:
        args.rows = [*(args.rows or []), *models]
    results = tables.run_rows(rows, args, DEMO, "table4", downstream.endings(names))
    if args.dry_run:
        return []
    nothing = {name: [] for name in names}
    rows = [downstream.summary(row, results.get(row.key, nothing)) for row in rows]
    sizes = {name: size for row in rows for name, size in row["train_images"].items()}
    about = "Each cell: published / measured, top-1 (COCO: AP) in % at the last epoch. Training images: " + ", ".join(
        f"{downstream.title(name)} {size:,}" for name, size in sizes.items()) + "."
    given = [f"{row['name']}: {row['note']}." for row in rows if row["note"]]
    folder = Path(args.output) / "table4"
    report.write_table(folder, "table4", args, downstream.columns(names), rows,
                       notes=[about, *given, NOTES[args.preset]])
    if is_main():
        draw(folder / "table4.json", folder / "table4.png")
    return rows


if __name__ == "__main__":
    options.start(main, build_parser(), parse=tables.parse)
