"""Tables and figures that train models: their command line, and how their rows (common/rows.py) are run.

Rows are run in order. A run that is finished already is reused. `--dry-run` prints the commands and runs nothing.
"""
import argparse
import shlex
from contextlib import suppress
from functools import cache
from hashlib import sha256
from pathlib import Path

from common import distributed, entry, jobs, options, scripts
from common.data import load_images, load_sets
from common.distributed import print0
from common.errors import UserError
from common.pretrained import HubError
from common.ranges import Int
from common.rows import PREVIOUS, overruled, remedy, split_setting, words_of
from common.signals import exit_on_stop_signals

PRESETS = {"demo": {"data": "fractals"}, "laptop": {"data": "folder"}, "small": {"data": "folder"}}  # as every script's
NOTES = {
    "demo": "The demo's numbers come from generated images and minutes of training. They show that the chain works and "
            "say nothing about the paper's claims.",
    **dict.fromkeys(("laptop", "small"),
                    "Same chain on other images: compare the rows with each other, not with the published column."),
    "paper": "Published numbers: ImageNet-1k; 300 epochs of fine-tuning unless the row says otherwise.",
}


# Command line

def make_parser(description, rows, demo):
    """Return the parser of a table with these rows. `demo`: keys of the rows that the demo preset runs."""
    parser = options.make_parser(description)
    options.add_data(parser)
    add_rows(parser, rows, demo)
    options.add_execution(parser)
    return parser


def add_rows(parser, rows=(), demo=()):
    """Add --rows and --seeds if there are rows to choose from, and --jobs, --set, --dry-run and --launch."""
    group = parser.add_argument_group("table")
    if rows:
        group.add_argument("--rows", nargs="+", metavar="ROW", choices=["all", *(row.key for row in rows)],
                           help=f"of {', '.join(row.key for row in rows)}; all: every row of the preset; "
                                f"default: {' '.join(demo)} in the demo preset, all otherwise")
        group.add_argument("--seeds", type=Int(0), nargs="+", default=[0], help="each row is run once per seed")
    group.add_argument("--jobs", type=Int(1, 256), metavar="N", help="rows trained at once, each in its own process; "
                       "default: on a CPU as many as cores, else 1")
    group.add_argument("--set", nargs="+", action="extend", default=[], metavar="SCRIPT.KEY=VALUE",
                       help="any other setting of a row's script, e.g. finetune.epochs=100")
    group.add_argument("--dry-run", action="store_true", help="print each command and run nothing")
    group.add_argument("--launch", default="python", metavar="WORDS", help="what --dry-run starts scripts with, e.g. "
                                                                           "'torchrun --nproc-per-node=8'")


def parse(parser, argv=None, presets=PRESETS, own=()):
    """Return a table's settings. Among them, `given` holds those of the command line, for every script that has them.

    own: names of settings that are not passed on to scripts, where they mean something else.
    """
    for action in parser._actions:
        if action.dest == "save_to":
            action.help = argparse.SUPPRESS
    given = options.given(parser, argv)
    if given.get("save_to"):
        parser.error("--save-to names one file and a table makes many: each run's weights.pt lies in its own folder")
    args = options.parse(parser, presets, argv=argv)
    for text in args.set:
        if not all(split_setting(text)):
            parser.error(f"--set {text}: write SCRIPT.KEY=VALUE, for example finetune.epochs=100")
    jobs_wanted = args.jobs or (1 if argv is not None else None)  # called from Python: no new processes
    given = {name: value for name, value in given.items() if name not in own} | {"preset": args.preset}
    return options.replaced(args, given=given, jobs=jobs_wanted)


# Runs

def start_ranks(args):
    """Join the ranks and return this rank's device: for a dry run the CPU, as a cluster's login node has no GPU."""
    return distributed.start_process_group("cpu" if args.dry_run else args.device)


def run_row(row, seed, args, run):
    """Call `run(script, words)` for each line of a row, in order, and return the results.

    `{previous}` in a line becomes the "checkpoint" in the result of the line before.
    """
    results, previous = [], PREVIOUS
    for line in row.lines:
        results.append(run(*words_of(line, args, seed, previous)))
        previous = results[-1]["checkpoint"]
    return results


def chosen(rows, args, demo):
    """Return the rows to run. Raises a UserError for a row in --rows that cannot be run."""
    wanted = getattr(args, "rows", ["all"]) or (demo if args.preset == "demo" else ["all"])  # figures have no --rows
    runnable = [row for row in rows if row.lines and args.preset in row.presets]
    if "all" in wanted:
        return runnable
    for row in rows:
        if row.key in wanted and row not in runnable:
            why = "has nothing to run" if not row.lines else f"needs --preset {' or '.join(row.presets)}"
            raise UserError(f"--rows {row.key}: {row.name} {why}")
    return [row for row in runnable if row.key in wanted]


def run_rows(rows, args, demo, script):
    """Run the chosen rows, each with every seed. Wrong settings, missing data and weights are reported before training.

    Return two dicts. The first is {row.key: results}, where results[i][j] is the result of line j with the i-th seed;
    for rows with a column {row.key: {column: results}}. The second is {row.key: reason} of the rows whose weights could
    not be loaded from timm's hub.
    """
    device = start_ranks(args)
    to_run = chosen(rows, args, demo)
    check_rows(rows, to_run, args)
    if args.dry_run:
        return print_commands(to_run, args), {}
    at_once = args.jobs or (jobs.CORES if device.type == "cpu" else 1)
    if at_once > 1 and distributed.world_size() == 1:
        train_at_once(to_run, args, script, at_once)
    results, unavailable, run = {}, {}, cache(scripts.run)  # rows have lines in common
    for number, row in enumerate(to_run, 1):
        for seed in args.seeds:
            print0(f"\n# row {number} of {len(to_run)}: {row.name}, seed {seed}")
            try:
                results.setdefault(row.key, {}).setdefault(row.column, []).append(run_row(row, seed, args, run))
            except HubError as error:  # which costs this row only
                unavailable[row.key] = f"needs weights: {error}, {remedy(row, error.source, args, seed)}"
                print0(unavailable[row.key])
                break
    return {key: columns.get("", columns) for key, columns in results.items()}, unavailable


def train_at_once(rows, args, script, at_once):
    """Train the rows in parallel processes. The table then finds the runs finished."""
    own = options.replaced(args, given={"workers": 0, **args.given})  # no core is left for workers
    tasks = [(group[0].key, train_rows, (group, seed, own, script))
             for seed in args.seeds for group in jobs.groups(rows)]
    if len(tasks) > 1:
        jobs.run_at_once(tasks, at_once)
        print0("\n# All rows once more, in order: what is finished is reused, what failed is repeated")


def train_rows(rows, seed, args, script):
    """Train rows in one of the parallel processes. The table repeats what failed, and reports the error."""
    with entry.errors_in_one_line(script):
        exit_on_stop_signals()
        run = cache(scripts.run)
        for row in rows:
            with suppress(HubError):
                run_row(row, seed, args, run)


def print_commands(rows, args):
    """Print the commands of the rows, each once. Return {row.key: results} as run_rows does, without training results.

    A command saves its weights if another one here starts from them. A pre-training always does, for other tables.
    """
    def command(script, words):
        digest = sha256(" ".join((script, *words)).encode()).hexdigest()[:10]  # so every table names the same file
        weights = Path(args.output) / "weights" / f"{Path(script).stem}-{digest}.pt"
        return {"script": script, "words": words, "checkpoint": str(weights)}

    plan = [(row, seed, run_row(row, seed, args, command)) for row in rows for seed in args.seeds]
    started_from = {line["checkpoint"] for _, _, lines in plan for line in lines[:-1]}
    results, printed = {}, {}
    for row, seed, lines in plan:
        print0(f"\n# row {rows.index(row) + 1} of {len(rows)}: {row.name}, seed {seed}")
        results.setdefault(row.key, []).append(lines)
        for line in lines:
            script, weights = line["script"], line["checkpoint"]
            if weights in printed:
                print0(f"# {Path(script).name}: as above, in row {printed[weights]}")
                continue
            printed[weights] = row.name
            saved = weights in started_from or getattr(scripts.module_of(script), "READS", None) == "images"
            words = [*line["words"], *(["--save-to", weights] if saved else [])]
            print0(f"{args.launch} {script} {shlex.join(words)}".rstrip())
    print0("\n# then this command without --dry-run: it finds these runs by their content")
    return results


# Checks

def check_set(rows, to_run, args):
    """Raise a UserError if --set names a script that no row has, or if two of the --seeds would give the same run."""
    settings = [split_setting(text) for text in args.set]
    stages = {Path(line.split()[0]).stem for row in rows for line in row.lines}
    unknown = sorted({stage for stage, _, _ in settings} - stages)
    if unknown and stages:  # without stages no row can run, and the table says why
        raise UserError(f"--set names no script of this table: {', '.join(unknown)}; its scripts are "
                        f"{', '.join(sorted(stages))}")
    last = {Path(row.lines[-1].split()[0]).stem for row in to_run}
    fixed = any(stage in last and key == "seed" for stage, key, _ in settings)
    different = 1 if fixed else len(set(args.seeds))
    if len(args.seeds) > different:
        raise UserError(f"--seeds {' '.join(map(str, args.seeds))}: two are equal, or --set has the last script's")


def check_rows(rows, to_run, args):
    """Raise a UserError now, not after hours of training, for wrong settings, missing data and missing weights."""
    check_set(rows, to_run, args)
    reads = set()
    for row in to_run:
        for line in row.lines:
            script, words = words_of(line, args, args.seeds[0])
            settings = vars(scripts.settings_of(script, words))
            if PREVIOUS in line and settings["init"] != PREVIOUS:
                raise UserError(f"{row.name} starts from the weights that its line before leaves: --set "
                                f"{Path(script).stem}.init has no place there; --rows leaves the row out, and "
                                f"{script} starts from any weights")
            reads.add(getattr(scripts.module_of(script), "READS", None))
            for source in filter(None, (settings.get("init"), settings.get("teacher"))):
                anywhere = source in (PREVIOUS, "own") or source.startswith("timm:")  # own: one that is trained too
                if not (args.dry_run or anywhere or Path(source).exists()):
                    raise UserError(f"{row.name}: no weights at {source}")
        if words := overruled(row, args):
            print0(f"{row.name}: {words} by the command line, so that name and published number mean another run")
    if reads & {"images", "labels"} and args.data != "fractals" and not (args.dry_run and args.data_path):
        load = load_sets if "labels" in reads else load_images
        load(options.resolve(args))


def require_weights(unavailable):
    """Raise a UserError if a row is unavailable, for figures, which cannot be drawn without it."""
    if unavailable:
        raise UserError("; ".join(unavailable.values()))
