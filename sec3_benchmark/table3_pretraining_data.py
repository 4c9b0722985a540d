"""Table 3: does pre-training need much, and balanced, data? MAE and MoCo-v3 on parts of ImageNet-1k, and on IN21K.

    python sec3_benchmark/table3_pretraining_data.py                                      # demo: 10 % and all
    python sec3_benchmark/table3_pretraining_data.py --preset small --data-path DIR --seeds 0 1
    torchrun --nproc-per-node=8 sec3_benchmark/table3_pretraining_data.py --data-path IMAGENET --in21k IN21K \\
        --lists 1%=1percent.txt 10%=10percent.txt lt=ImageNet_LT_train.txt

Every row is fine-tuned on all of the labelled data. The paper's claim: fewer images or long-tailed classes hardly hurt
MAE, but they hurt MoCo-v3, and neither gains from IN21K. No source gives the table's numbers, or how long the
pre-training on a part was. Here it has as many iterations as on all of the data, so a hundred times the epochs on 1 %
(--equal epochs: as many epochs). Without an official list a part is drawn (sec3_benchmark/subsets.py).
"""
import shlex
from dataclasses import replace
from pathlib import Path

from common import entry, options, report, scripts, tables
from common.data import load_sets
from common.errors import UserError
from common.optim import steps_per_epoch
from common.rows import Row, words_of
from sec3_benchmark import subsets
from sec3_benchmark.accuracy_table import duration, summary, with_changes
from sec3_benchmark.downstream import MOCO_FINETUNING

METHODS = {  # name, script, what its fine-tuning changes
    "mae": ("MAE", "sec3_benchmark/pretrain_mae.py", ""),
    "mocov3": ("MoCo-v3", "sec3_benchmark/pretrain_mocov3.py", f" {MOCO_FINETUNING}"),
}
DATA = {"1": "1%", "10": "10%", "lt": "lt", "full": None, "in21k": None}  # pre-training data -> its --subset
PARTS = [subset for subset in DATA.values() if subset]  # those that are drawn, or listed in a file of --lists
NAMES = {"1": "1 %", "10": "10 %", "lt": "long-tailed", "full": "all", "in21k": "IN21K"}
DEMO = tuple(f"{method}-{data}" for method in METHODS for data in ("10", "full"))
ROWS = [Row(f"{method}-{data}", f"{name}, {NAMES[data]}", None,
            [script + (f" --subset {subset}" if subset else ""),
             f"sec3_benchmark/finetune.py --init {{previous}}{tuning}"],
            presets=("laptop", "small", "paper") if data == "1" else options.PRESET_NAMES,  # too few in the demo
            extra={"method": name, "part": data})
        for method, (name, script, tuning) in METHODS.items() for data, subset in DATA.items()]


def build_parser():
    parser = tables.make_parser(__doc__, ROWS, DEMO)
    group = parser.add_argument_group("pre-training data")
    group.add_argument("--lists", nargs="+", action="extend", default=[], metavar="PART=FILE",
                       help="official lists for 1%%, 10%% and lt; default: drawn")
    group.add_argument("--in21k", metavar="DIR", help="ImageNet-21k or any large folder of images, for its rows")
    group.add_argument("--equal", choices=("iterations", "epochs"), default="iterations",
                       help="what a part of the data shares with the pre-training on all of it")
    report.add_pictures(parser, ".json")
    return parser


def official_lists(args):
    """Parse --lists to {part: file}. Raises UserError for a part that has no list."""
    lists = options.parse_pairs(args.lists, "--lists")
    if wrong := [part for part in lists if part not in PARTS]:
        raise UserError(f"--lists {wrong[0]}={lists[wrong[0]]}: the parts with a list are {', '.join(PARTS)}")
    return lists


def with_data(row, args, lists):
    """Return the row with its pre-training data on the command line, or without lines if they are not given."""
    pretraining, tuning = row.lines
    part = row.extra["part"]
    if part == "full":
        return row
    if part == "in21k" and not args.in21k:
        return unavailable(row, args, "needs --in21k DIR")
    if part == "in21k":
        pretraining = f"{pretraining} --pretrain-path {shlex.quote(args.in21k)}"
    elif DATA[part] in lists:
        pretraining = pretraining.replace(DATA[part], shlex.quote(lists[DATA[part]]))
    return replace(row, lines=[f"{pretraining} --equal {args.equal}", tuning])


def unavailable(row, args, problem):
    """Return the row without lines, as it cannot be run, and with the reason. Raises UserError if --rows names it."""
    if row.key in (args.rows or (DEMO if args.preset == "demo" else ())):
        raise UserError(f"--rows {row.key} {problem}")
    return replace(row, lines=[], extra={**row.extra, "problem": problem})


def described(row, args, full):
    """Return the row with a description of its data, or without lines if a part cannot be drawn or has no full batch.

    full: all images of --data. Raises UserError for a bad list.
    """
    script, words = words_of(row.lines[0], args, 0)
    asked = options.resolve(scripts.settings_of(script, words))
    drawn = asked.subset in PARTS
    try:
        _, part = subsets.pretraining_images(options.replaced(asked, equal=None))
    except UserError as error:
        if not drawn:  # a list or a folder that was given
            raise
        return unavailable(row, args, f"cannot be drawn: {error}")
    if len(part) < asked.batch_size:
        return unavailable(row, args, f"has {len(part)} images, fewer than one batch of {asked.batch_size}: --set "
                                      f"{Path(script).stem}.batch_size=N changes it, for all rows of its method")
    if not asked.subset:
        how = "all"
    elif drawn:
        how = f"drawn, seed {subsets.SEED}"
    else:
        how = f"list {Path(asked.subset).name}"
        check_share(row, asked.subset, len(part) / len(full))
    epochs = asked.epochs
    if asked.equal == "iterations":
        epochs = subsets.equal_iterations(asked, full, part)["epochs"]
    about = {**subsets.describe(part), "epochs": epochs,
             "iterations": epochs * steps_per_epoch(part, asked.batch_size), "chosen": how}
    return replace(row, extra={**row.extra, "data": about})


def check_share(row, subset, share):
    """Raise UserError if a list of 1 % or 10 % does not hold about that share, as suncet's file names mislead."""
    wanted = {"1": 0.01, "10": 0.1}.get(row.extra["part"])
    if wanted and not 0.8 * wanted < share < 1.25 * wanted:
        raise UserError(f"{row.name}: {subset} holds {100 * share:.2g} % of the images. suncet names its lists by the "
                        f"part without labels: 99percent.txt holds 1 %, 90percent.txt 10 %")


def planned(args):
    """Return all rows as they will be run, the chosen ones with a description of their data.

    A mistake in any row raises UserError here, before the first is run.
    """
    lists = official_lists(args)
    rows = [with_data(row, args, lists) for row in ROWS]
    chosen = tables.chosen(rows, args, DEMO)
    [full] = load_sets(options.resolve(args), splits=("train",))
    return [described(row, args, full) if row in chosen else row for row in rows]


COLUMNS = {
    "pre-training, data": lambda row: row["name"],
    "chosen": lambda row: row["data"]["chosen"],
    "images": lambda row: f"{row['data']['images']:,}",
    "a class (min, median, max)": lambda row: ", ".join(f"{n:g}" for n in row["data"].get("images_per_class", ())),
    "epochs": lambda row: f"{row['data']['epochs']:,}",
    "iterations": lambda row: f"{row['data']['iterations']:,}",
    "measured": lambda row: report.mean_std(row["measured"]),
    "seeds": lambda row: row["seeds"],
    "time": lambda row: duration(row["pretrain_hours"]),
}


def draw(rows):
    """Draw top-1 by pre-training data, a line per method and a point per seed."""
    rows = [row for row in rows if row["measured"]]
    parts = [part for part in DATA if any(row["part"] == part for row in rows)]
    figure, axes = report.subplots(figsize=(4, 3))
    for number, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        mine = {parts.index(row["part"]): row["measured"] for row in rows if row["method"] == method}
        axes.plot(list(mine), [sum(values) / len(values) for values in mine.values()], ("-", "--")[number],
                  marker="_" if max(map(len, mine.values())) > 1 else None, markersize=14,  # at the mean
                  linewidth=1, color=report.COLOURS[number], label=method)
        for place, values in mine.items():
            axes.scatter([place] * len(values), values, s=14, marker="os"[number], color=report.COLOURS[number])
    axes.set(xticks=range(len(parts)), xticklabels=[NAMES[part] for part in parts], xlabel="pre-training data",
             ylabel="top-1 after fine-tuning on all labels (%)", xlim=(-0.4, len(parts) - 0.6))
    axes.legend()
    return figure


def measure(args):
    """Run the chosen rows; write table3.json and table3.md; return the rows, none after a dry run."""
    tables.start_ranks(args)
    planned_rows = planned(args)
    results, _ = tables.run_rows(planned_rows, args, DEMO, script="table3")
    if args.dry_run:
        return []
    rows = [summary(with_changes(row, args), results.get(row.key, []), row.extra.get("problem"))
            for row in planned_rows]
    equal = f"Pre-trained for equal {args.equal}, fine-tuned on all of the data. No source gives the paper's numbers."
    report.write_table("table3", args, COLUMNS, rows, notes=[equal, tables.NOTES[args.preset]])
    return rows


def main(args):
    """Measure, write and draw; return the rows."""
    rows = report.read_numbers(args.from_numbers, "table3", "rows") if args.from_numbers else measure(args)
    report.draw_numbers(args, "table3", draw, rows)
    return rows


if __name__ == "__main__":
    entry.run_script(main, build_parser(), parse=tables.parse)
