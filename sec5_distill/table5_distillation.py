"""Table 5: transfer of the distilled D-MAE-Tiny beside the other pre-trainings, top-1 on each downstream set.

    python sec5_distill/table5_distillation.py                                               # demo: two fractal sets
    python sec5_distill/table5_distillation.py --preset small --data-path DIR --dataset-path ROOT --datasets NAME
    python sec5_distill/table5_distillation.py --dataset-path ROOT --models supervised=FILE mae=FILE dmae=FILE ...
    torchrun --nproc-per-node=8 sec5_distill/table5_distillation.py --data-path IMAGENET --dataset-path ROOT

The paper's claim: D-MAE-Tiny catches up with the supervised DeiT-Tiny on small sets, where MAE-Tiny trails far behind,
and is the best of all on ImageNet and COCO. Stages and settings are those of Tables 4 and 1, so their runs are reused.
What ROOT holds: sec3_benchmark/downstream_sets.py; the settings of each set: sec3_benchmark/downstream.py.
"""
import argparse
from dataclasses import replace

from common import entry, options, report, tables
from sec3_benchmark import downstream
from sec3_benchmark.downstream import MOCO_FINETUNING

FINETUNING = {"mocov3": MOCO_FINETUNING}  # as in Table 1
DEMO = ("supervised", "mae", "dmae")
ROWS = [*downstream.ROWS, downstream.row("dmae", "D-MAE", "sec5_distill/pretrain_dmae.py"),
        downstream.row("d2mae", "D2-MAE", "sec5_distill/pretrain_dmae.py --decoupled")]
NOTES = {
    **tables.NOTES,
    "paper": "CIFAR-100's settings are published, those of the other sets are ours and not tuned, as no source gives "
             "them. D-MAE's mask AP is 37.4 on the slides and 37.3 on a later code page. "
             "D2-MAE is the authors' follow-up (arXiv 2404.12210).",
}


def build_parser():
    parser = options.make_parser(__doc__)
    options.add_data(parser)
    downstream.add_datasets(parser)
    tables.add_rows(parser, ROWS, DEMO)
    downstream.add_models(parser)
    parser.add_argument("--imagenet", action=argparse.BooleanOptionalAction,
                        help="fill the last column, Table 1's fine-tuning on --data, too; default: with --data-path")
    options.add_execution(parser)
    return parser


def last_columns(args):
    """Return {key: heading} of the last columns, fine-tuned as in Table 1: ImageNet and, if run on another, --data."""
    own = args.imagenet and args.data != "imagenet"
    return {"imagenet": "IN1K (Table 1)", **({"own": f"{args.data} (as Table 1)"} if own else {})}


def table1_row(row):
    """Return the row of Table 1: fine-tuned instead of transferred; the supervised row is just not transferred."""
    *before, transfer = row.lines
    if any("finetune.py" in line for line in before):
        return replace(row, lines=before)
    tuning = f"{transfer.replace('transfer.py', 'finetune.py')} {FINETUNING.get(row.key, '')}".rstrip()
    return replace(row, lines=[*before, tuning])


def cells(args, names, rows):
    """Return the rows for tables.run_rows: for each row one per data set and, under the same key, one for the last
    column. In one run they share their pre-trainings, in a dry run too. A supervised model given by --models has no
    last column: it is trained already.
    """
    if not args.imagenet:
        return downstream.cells(rows, names, args.rows)
    last = list(last_columns(args))[-1]
    tuned = [table1_row(row) for row in rows if row.key != "supervised" or len(row.lines) > 1]
    return [*downstream.cells(rows, names, ()),  # a row without a cell here has one in the last column
            *(replace(row, name=f"{row.name} {last}", column=last) for row in tuned)]


def columns(args, names):
    """Return the columns, each cell published / measured: one per data set, two for COCO, then the last columns."""
    last = {heading: downstream.column(key) for key, heading in last_columns(args).items()}
    return {**downstream.columns(names), **last}


def main(args):
    """Run the chosen rows on the chosen sets, write table5.json and .md. Return the rows, [] after a dry run."""
    tables.start_ranks(args)
    if args.imagenet is None:
        args = options.replaced(args, imagenet=args.preset != "demo" and bool(args.data_path))
    rows, args = downstream.with_models(ROWS, args)
    names = downstream.chosen_sets(args)
    results, without = tables.run_rows(cells(args, names, rows), args, DEMO, "table5")
    if args.dry_run:
        return []
    rows = downstream.summaries(rows, results, names)
    report.write_table("table5", args, columns(args, names), rows, notes=[
        "Each cell: published / measured, top-1 (COCO: AP) in % after the last epoch.",
        *downstream.remarks(rows), *without.values(), NOTES[args.preset]])
    return rows


if __name__ == "__main__":
    entry.run_script(main, build_parser(), parse=tables.parse)
