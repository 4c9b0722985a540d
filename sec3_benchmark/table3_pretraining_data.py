"""Table 3: does pre-training need much, and balanced, data? MAE and MoCo-v3 on parts of ImageNet-1k, and on IN21K.

    python sec3_benchmark/table3_pretraining_data.py                                      # demo: 10 % and all
    python sec3_benchmark/table3_pretraining_data.py --preset small --data-path DIR --seeds 0 1
    torchrun --nproc-per-node=8 sec3_benchmark/table3_pretraining_data.py --data-path IMAGENET --in21k IN21K \\
        --lists 1%=1percent.txt 10%=10percent.txt lt=ImageNet_LT_train.txt

Every row is fine-tuned on all of the labelled data. The paper's claim: MAE hardly minds fewer images or a long-tailed
choice of classes, MoCo-v3 does, and neither gains from IN21K. No source gives the table's numbers, nor how long was
trained on the parts: here as many iterations as on all of the data, so a hundred times the epochs on 1 %
(--equal epochs: as many epochs). Without an official list a part is drawn (sec3_benchmark/subsets.py).
"""
import json
from dataclasses import replace
from pathlib import Path

from common import distributed, options, report, tables
from common.data import image_tree, load_sets
from common.errors import UserError
from common.optim import steps_per_epoch
from common.tables import PREVIOUS, Row
from sec3_benchmark import subsets
from sec3_benchmark.accuracy_table import duration, named, summary
from sec3_benchmark.downstream import MOCO_FINETUNING

FINETUNE = "sec3_benchmark.finetune"
METHODS = {  # name, stage, what its fine-tuning changes
    "mae": ("MAE", "sec3_benchmark.pretrain_mae", {}),
    "mocov3": ("MoCo-v3", "sec3_benchmark.pretrain_mocov3", MOCO_FINETUNING),
}
DATA = {"1": "1%", "10": "10%", "lt": "lt", "full": None, "in21k": None}  # and the --subset of each
NAMES = {"1": "1 %", "10": "10 %", "lt": "long-tailed", "full": "all", "in21k": "IN21K"}
DEMO = tuple(f"{method}-{data}" for method in METHODS for data in ("10", "full"))
ROWS = [Row(f"{method}-{data}", f"{name}, {NAMES[data]}", None,
            ((module, {"subset": subset}), (FINETUNE, {"init": PREVIOUS, **finetuning})),
            presets=("laptop", "small", "paper") if data == "1" else options.PRESET_NAMES,  # of the demo too few
            extra={"method": name, "part": data})
        for method, (name, module, finetuning) in METHODS.items() for data, subset in DATA.items()]


def build_parser():
    parser = tables.make_parser(__doc__, ROWS, DEMO)
    group = parser.add_argument_group("pre-training data")
    group.add_argument("--lists", nargs="+", action="extend", default=[], metavar="PART=FILE",
                       help="official lists for 1%%, 10%% and lt; default: drawn")
    group.add_argument("--in21k", metavar="DIR", help="ImageNet-21k or any large folder of images, for its rows")
    group.add_argument("--equal", choices=("iterations", "epochs"), default="iterations",
                       help="what a part of the data shares with the pre-training on all of it")
    return parser


def official_lists(args):
    """--lists as {part: file}."""
    lists, parts = options.named(args.lists, "--lists"), [part for part in DATA.values() if part]
    if wrong := [part for part in lists if part not in parts]:
        raise UserError(f"--lists {wrong[0]}={lists[wrong[0]]}: the parts with a list are {', '.join(parts)}")
    return lists


def runnable(row, args, lists):
    """The row with its official list; without stages where its data are not given."""
    if row.extra["part"] == "in21k" and not args.in21k:
        return without(row, args, "needs --in21k DIR")
    if row.stages and row.stages[0][1]["subset"] in lists:
        (module, settings), finetuning = row.stages
        return replace(row, stages=((module, {"subset": lists[settings["subset"]]}), finetuning))
    return row


def without(row, args, problem):
    """The row, not to be run, for a reason that the table prints; an error where it was asked for by its key."""
    if row.key in (args.rows or (DEMO if args.preset == "demo" else ())):
        raise UserError(f"--rows {row.key} {problem}")
    return replace(row, stages=(), extra={**row.extra, "problem": problem})


def equal_iterations(epochs, warmup_epochs, batch_size, full, part):
    """Epochs on the ImageSet `part` that are as many steps as `epochs` on `full`, to the nearest epoch, and the warm-up
    that keeps its share of them.
    """
    ratio = steps_per_epoch(full, batch_size) / steps_per_epoch(part, batch_size)
    longer = max(1, round(epochs * ratio))
    return {"epochs": longer, "warmup_epochs": min(round(warmup_epochs * ratio), longer - 1)}


def plan(row, args, full):
    """The row with the settings that its data decide, and what the table says of these data."""
    module, settings = row.stages[0]
    subset = settings["subset"]
    forced, part = {}, full
    if row.extra["part"] == "in21k":
        forced, part = {"data": "folder", "data_path": args.in21k}, image_tree(args.in21k, full.in_chans)
    elif subset:
        try:
            part = subsets.part_of(full, subset)
        except UserError as error:
            if subset not in DATA.values():  # a list that was given
                raise
            return without(row, args, f"cannot be drawn: {error}")
        if subset not in DATA.values():
            check_share(row, subset, len(part) / len(full))
    resolved = tables.stage_settings(module, tables.explicit_settings(module, args, 0), settings)
    if len(part) < resolved.batch_size:
        return without(row, args, f"has {len(part)} images, fewer than one batch of {resolved.batch_size}: --set "
                                  f"{module.split('.')[-1]}.batch_size=N changes it, for all rows of its method")
    if args.equal == "iterations" and part is not full:
        forced |= equal_iterations(resolved.epochs, resolved.warmup_epochs, resolved.batch_size, full, part)
    epochs = forced.get("epochs", resolved.epochs)
    about = {**subsets.describe(part), "epochs": epochs,
             "iterations": epochs * steps_per_epoch(part, resolved.batch_size),
             "chosen": "all" if not subset else f"drawn, seed {subsets.SEED}" if subset in DATA.values() else
                       f"list {Path(subset).name}"}
    return replace(row, forced={module: forced}, extra={**row.extra, "data": about})


def check_share(row, subset, share):
    """A list of 1 % must hold about 1 %: suncet's file names give the part without labels."""
    wanted = {"1": 0.01, "10": 0.1}.get(row.extra["part"])
    if wanted and not 0.8 * wanted < share < 1.25 * wanted:
        raise UserError(f"{row.name}: {subset} holds {100 * share:.2g} % of the images. suncet names its lists by the "
                        f"part without labels: 99percent.txt holds 1 %, 90percent.txt 10 %")


def planned(args):
    """All rows, those to be run with their settings and data; a mistake in any of them is found here."""
    lists = official_lists(args)
    rows = [runnable(row, args, lists) for row in ROWS]
    chosen = tables.chosen(rows, args, DEMO)
    module, settings = chosen[0].stages[0]
    base = tables.stage_settings(module, tables.explicit_settings(module, args, 0), settings)
    [full] = load_sets(base, splits=("train",))
    return [plan(row, args, full) if row in chosen else row for row in rows]


COLUMNS = {
    "pre-training, data": lambda row: row["name"],
    "chosen": lambda row: row["data"]["chosen"],
    "images": lambda row: f"{row['data']['images']:,}",
    "a class (min, median, max)": lambda row: ", ".join(f"{n:g}" for n in row["data"].get("images_per_class", ())),
    "epochs": lambda row: f"{row['data']['epochs']:,}",
    "iterations": lambda row: f"{row['data']['iterations']:,}",
    "measured": lambda row: report.spread(row["measured"]),
    "seeds": lambda row: row["seeds"],
    "time": lambda row: duration(row["pretrain_hours"]),
}


def draw(table, path):
    """Top-1 by pre-training data, a line per method and a point per seed, from table3.json."""
    rows = [row for row in json.loads(Path(table).read_text())["rows"] if row["measured"]]
    parts = [part for part in DATA if any(row["part"] == part for row in rows)]
    figure, axes = report.subplots(figsize=(4, 3))
    for number, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        mine = {parts.index(row["part"]): row["measured"] for row in rows if row["method"] == method}
        axes.plot(list(mine), [sum(values) / len(values) for values in mine.values()], ("-", "--")[number],
                  marker="_" if max(map(len, mine.values())) > 1 else None, markersize=14,  # a mean
                  linewidth=1, color=report.COLOURS[number], label=method)
        for place, values in mine.items():
            axes.scatter([place] * len(values), values, s=14, marker="os"[number], color=report.COLOURS[number])
    axes.set(xticks=range(len(parts)), xticklabels=[NAMES[part] for part in parts], xlabel="pre-training data",
             ylabel="top-1 after fine-tuning on all (%)", xlim=(-0.4, len(parts) - 0.6))
    axes.legend()
    figure.savefig(path)


def main(args):
    """Runs the chosen rows; writes table3.json, table3.md and table3.png; returns the rows."""
    distributed.start("cpu" if args.dry_run else args.device)
    planned_rows = planned(args)
    results = tables.run_rows(planned_rows, args, DEMO, script="table3")
    if args.dry_run:
        return []
    rows = [summary(named(row, args), results.get(row.key, [])) for row in planned_rows]
    for row in rows:
        row["status"] = row.get("problem", row["status"])
    equal = f"Pre-trained for equal {args.equal}, fine-tuned on all of the data. No source gives the paper's numbers."
    table = report.write_table("table3", args, COLUMNS, rows, notes=[equal, tables.NOTES[args.preset]])
    if distributed.is_main():
        draw(table, table.with_suffix(".png"))
    return rows


if __name__ == "__main__":
    options.start(main, build_parser(), parse=tables.parse)
