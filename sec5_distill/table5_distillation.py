"""Table 5: transfer of the distilled D-MAE-Tiny beside the other pre-trainings, top-1 on each downstream set.

    python sec5_distill/table5_distillation.py                                               # demo: two fractal sets
    python sec5_distill/table5_distillation.py --preset small --data-path DIR --dataset-path ROOT --datasets NAME
    torchrun --nproc-per-node=8 sec5_distill/table5_distillation.py --data-path IMAGENET --dataset-path ROOT

The paper's claim: D-MAE-Tiny catches up with the supervised DeiT-Tiny on small sets, where MAE-Tiny trails far behind,
and is the best of all on ImageNet and COCO. Stages and settings are those of Tables 4 and 1, so that their runs are
reused. ROOT and each set's settings: sec3_benchmark/downstream.py.
"""
import argparse
from dataclasses import replace
from pathlib import Path

from common import distributed, options, report, tables
from common.tables import PREVIOUS, Row
from sec3_benchmark import downstream
from sec3_benchmark.downstream import PUBLISHED

FINETUNE, TRANSFER = "sec3_benchmark.finetune", ("sec3_benchmark.transfer", {"init": PREVIOUS})
FINETUNING = {"mocov3": {"layer_decay": 0.75}, "simmim": {"model": "init"}}  # as in Table 1
DEMO = ("supervised", "mae", "dmae")
ROWS = [
    Row("supervised", "supervised (DeiT-Tiny)", {**PUBLISHED["supervised"], "imagenet": 75.8},
        ((FINETUNE, {}), TRANSFER)),
    Row("mocov3", "MoCo-v3", {**PUBLISHED["mocov3"], "imagenet": 76.8},
        (("sec3_benchmark.pretrain_mocov3", {}), TRANSFER)),
    Row("mae", "MAE", {**PUBLISHED["mae"], "imagenet": 78.0}, (("sec3_benchmark.pretrain_mae", {}), TRANSFER)),
    Row("dino", "DINO", PUBLISHED["dino"], (("appendix.pretrain_dino", {}), TRANSFER)),
    # SimMIM's relative positions come along (model "init"); detect.py is for plain ViTs
    Row("simmim", "SimMIM", PUBLISHED["simmim"],
        (("appendix.pretrain_simmim", {}), (TRANSFER[0], {"init": PREVIOUS, "model": "init"})), without=("coco",)),
    Row("dmae", "D-MAE", PUBLISHED["dmae"], (("sec5_distill.pretrain_dmae", {}), TRANSFER)),
]
NOTES = {
    **tables.NOTES,
    "paper": "CIFAR-100's settings are published, those of the other sets are ours and not tuned, as no source gives "
             "them. D-MAE's mask AP is 37.4 on the slides and 37.3 on a later code page.",
}


def build_parser():
    parser = options.make_parser(__doc__)
    options.add_data(parser)
    downstream.add_datasets(parser)
    tables.add_rows(parser, ROWS, DEMO)
    parser.add_argument("--imagenet", action=argparse.BooleanOptionalAction,
                        help="fill the last column, Table 1's fine-tuning on --data, too; default: but in the demo")
    options.add_execution(parser)
    return parser


def imagenet_row(row):
    """The row of Table 1: fine-tuned where Table 5 transfers; the supervised one is that already."""
    *before, _ = row.stages
    return replace(row, stages=tuple(before) if before[-1][0] == FINETUNE else
                   (*before, (FINETUNE, {"init": PREVIOUS, **FINETUNING.get(row.key, {})})))


def run_imagenet(args):
    """{row key: top-1 for each seed} of the last column; nothing where it is not wanted."""
    if not (args.preset != "demo" if args.imagenet is None else args.imagenet):
        return {}
    rows = [row for row in tables.chosen(ROWS, args, DEMO) if row.key not in args.needs_weights]
    results = {row.key: [tables.run_row(imagenet_row(row), seed, args, "table5", {})[-1] for seed in args.seeds]
               for row in rows}
    return {} if args.dry_run else {key: [result["top1"] for result in seeds] for key, seeds in results.items()}


def columns(names):
    """One for each data set, two for COCO, then ImageNet; each cell: published / measured."""
    def imagenet(row):
        return downstream.beside(row["published"]["imagenet"], row["measured"].get("imagenet"))
    return {**downstream.columns(names), "IN1K (Table 1)": imagenet}


def main(args):
    """Runs the chosen rows on the chosen sets, writes table5.json and .md; returns the rows."""
    distributed.start(args.device)
    names = downstream.chosen_sets(args)
    cells = tables.run_rows(ROWS, args, DEMO, "table5", downstream.stage_settings(names))
    imagenet = run_imagenet(args)
    if args.dry_run:
        return []
    nothing = {name: [] for name in names}
    rows = [downstream.summary(row, cells.get(row.key, nothing)) for row in ROWS]
    for row in rows:
        row["measured"]["imagenet"] = imagenet.get(row["key"], [])
    report.write_table(Path(args.output) / "table5", "table5", args, columns(names), rows, notes=[
        "Each cell: published / measured, top-1 (COCO: AP) in % after the last epoch.", *args.needs_weights.values(),
        NOTES[args.preset]])
    return rows


if __name__ == "__main__":
    options.start(main, build_parser(), parse=tables.parse)
