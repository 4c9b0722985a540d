"""A table: its command line and its rows (common/rows.py), run in order. A finished run is found, not repeated.

`--dry-run` prints the rows' command lines and runs nothing.
"""
import argparse
import shlex
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from common import distributed, entry, jobs, options, scripts
from common.data import load_images, load_sets
from common.distributed import print0
from common.errors import UserError
from common.pretrained import HubError
from common.ranges import Int
from common.rows import PREVIOUS, overruled, remedy, words_of

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
    """Return a table's parser: data, rows, execution; `demo` names the rows of the demo preset."""
    parser = options.make_parser(description)
    options.add_data(parser)
    add_rows(parser, rows, demo)
    options.add_execution(parser)
    return parser


def add_rows(parser, rows=(), demo=()):
    """Add --rows and --seeds, and what figures take too: --jobs, --set, --dry-run, --launch."""
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
    """Return a table's settings. `given` holds those on the command line, which every script of a row takes that knows
    them; `own` are the table's alone, although a script has a setting of that name.
    """
    for action in parser._actions:
        if action.dest == "save_to":
            action.help = argparse.SUPPRESS
    given = options.given(parser, argv)
    if given.get("save_to"):
        parser.error("--save-to names one file and a table makes many: each run's weights.pt lies in its own folder")
    args = options.parse(parser, presets, argv=argv)
    for text in args.set:
        if not all(text.partition("=")[0].partition(".")) or not text.partition("=")[2]:
            parser.error(f"--set {text}: write SCRIPT.KEY=VALUE, for example finetune.epochs=100")
    jobs_wanted = args.jobs or (1 if argv is not None else None)  # another program's processes are its own affair
    given = {name: value for name, value in given.items() if name not in own} | {"preset": args.preset}
    return options.replaced(args, given=given, jobs=jobs_wanted)


# From a row's lines to runs

def run_row(row, seed, args, done, started_from=()):
    """Return the results of one row with one seed, in order. `done` keeps lines that rows share from running twice;
    in a dry run the weights of those in `started_from` have a file.
    """
    results, previous = [], PREVIOUS
    for line in row.lines:
        script, words = words_of(line, args, seed, previous)
        key = (script, *words)
        if key not in done:
            done[key] = {**print_line(script, words, key in started_from, args), "row": row.name} if args.dry_run \
                else scripts.run(script, words)
        elif args.dry_run:
            print0(f"# {Path(script).name}: as above, in row {done[key]['row']}")
        results.append(done[key])
        previous = done[key]["checkpoint"]
    return results


def weights_place(script, words, args):
    """Return the file of a line's weights that a dry run names: the same in every table."""
    digest = sha256(" ".join((script, *words)).encode()).hexdigest()[:10]
    return str(Path(args.output) / "weights" / f"{Path(script).stem}-{digest}.pt")


def print_line(script, words, saved, args):
    """Print a command, which saves its weights if other lines start from them, of this table or of any."""
    weights = weights_place(script, words, args)
    saved = saved or getattr(scripts.module_of(script), "READS", None) == "images"
    save = ["--save-to", weights] if saved else []
    print0(f"{args.launch} {script} {shlex.join([*words, *save])}".rstrip())
    return {"checkpoint": weights}


def starting_points(rows, args):
    """Return the lines, (script, *words), from whose weights another line of their row starts."""
    found = set()
    for row in rows:
        for seed in args.seeds:
            previous = PREVIOUS
            for line in row.lines[:-1]:
                script, words = words_of(line, args, seed, previous)
                found.add((script, *words))
                previous = weights_place(script, words, args)
    return found


# All rows

def chosen(rows, args, demo):
    """Return the rows to run; those asked for by name that cannot be run are an error."""
    wanted = getattr(args, "rows", ["all"]) or (demo if args.preset == "demo" else ["all"])  # a figure runs all its own
    runnable = [row for row in rows if row.lines and args.preset in row.presets]
    if "all" in wanted:
        return runnable
    for row in rows:
        if row.key in wanted and row not in runnable:
            why = "has nothing to run" if not row.lines else f"needs --preset {' or '.join(row.presets)}"
            raise UserError(f"--rows {row.key}: {row.name} {why}")
    return [row for row in runnable if row.key in wanted]


def run_rows(rows, args, demo, script):
    """Run the chosen rows for all seeds. Return for every row {key: [result of each line, for each seed]}, or for rows
    with columns {key: {column: the same}}; and {key: why} of rows whose weights timm's hub did not give. Wrong
    settings, missing data and missing weights are reported before the first training.
    """
    device = distributed.start_process_group("cpu" if args.dry_run else args.device)
    to_run = chosen(rows, args, demo)
    check_rows(rows, to_run, args)
    at_once = args.jobs or (jobs.CORES if device.type == "cpu" else 1)
    if at_once > 1 and distributed.world_size() == 1 and not args.dry_run:
        train_at_once(to_run, args, script, at_once)
    results, unavailable, done = {}, {}, {}
    started_from = starting_points(to_run, args) if args.dry_run else ()
    for number, row in enumerate(to_run, 1):
        for seed in args.seeds:
            print0(f"\n# row {number} of {len(to_run)}: {row.name}, seed {seed}")
            try:
                results.setdefault(row.key, {}).setdefault(row.column, []).append(
                    run_row(row, seed, args, done, started_from))
            except HubError as error:  # the other rows can go on
                unavailable[row.key] = f"needs weights: {error}, {remedy(row, error.source, args, seed)}"
                print0(unavailable[row.key])
                break
    if args.dry_run:
        print0("\n# then this command without --dry-run: it finds these runs by their content")
    return {key: columns.get("", columns) for key, columns in results.items()}, unavailable


def train_at_once(rows, args, script, at_once):
    """Train the rows in processes of their own, so that the table then finds them finished."""
    own = options.replaced(args, given={"workers": 0, **args.given})  # a core each is all they have
    tasks = [(group[0].key, train_rows, (group, seed, own, script))
             for seed in args.seeds for group in jobs.groups(rows)]
    if len(tasks) > 1:
        jobs.run_at_once(tasks, at_once)


def train_rows(rows, seed, args, script):
    """What one of these processes does. What fails is met again, and said, by the table itself."""
    with entry.errors_in_one_line(script):
        entry.exit_on_stop_signals()
        done = {}
        for row in rows:
            with suppress(HubError):
                run_row(row, seed, args, done)


def check_rows(rows, to_run, args):
    """Raise an error for what would otherwise be found after hours: settings, data, weights that are not there."""
    stages = {Path(line.split()[0]).stem for row in rows for line in row.lines}
    unknown = sorted({text.partition(".")[0] for text in args.set} - stages)
    if unknown and stages:  # else no row can run, and the table says why
        raise UserError(f"--set names no script of this table: {', '.join(unknown)}; its scripts are "
                        f"{', '.join(sorted(stages))}")
    last = {Path(row.lines[-1].split()[0]).stem for row in to_run}
    one_seed = len(args.seeds) > 1 and any(text.partition("=")[0] in {f"{name}.seed" for name in last}
                                           for text in args.set)
    if one_seed or len(args.seeds) > len(set(args.seeds)):
        raise UserError(f"--seeds {' '.join(map(str, args.seeds))}: two are equal, or --set has the last script's")
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
                anywhere = source in (PREVIOUS, "own") or source.startswith("timm:")  # own: it is trained too
                if not (args.dry_run or anywhere or Path(source).exists()):
                    raise UserError(f"{row.name}: no weights at {source}")
        if words := overruled(row, args):
            print0(f"{row.name}: {words} by the command line, so that name and published number mean another run")
    if reads & {"images", "labels"} and args.data != "fractals" and not (args.dry_run and args.data_path):
        (load_sets if "labels" in reads else load_images)(options.resolve(args))


def require_weights(unavailable):
    """Raise an error: a figure has no place for a row whose weights the hub did not give."""
    if unavailable:
        raise UserError("; ".join(unavailable.values()))
