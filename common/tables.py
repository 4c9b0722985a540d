"""A table is rows, a row is stages: other scripts run in order, each finding its finished run if there is one.

A row's settings name only what makes it that row; preset, device and the rest come from the table's command line.
`--dry-run` prints the same stages as shell commands, ready for a cluster's job scripts.
"""
import argparse
import importlib
import json
import shlex
import signal
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from common import distributed, jobs, options
from common.data import load_images, load_sets
from common.distributed import print0
from common.errors import UserError
from common.weights import HubError

PRESETS = {"demo": {"data": "fractals"}, "laptop": {"data": "folder"}, "small": {"data": "folder"}}  # as in every stage
NOTES = {
    "demo": "The demo's numbers come from generated images and minutes of training. They show that the chain works and "
            "say nothing about the paper's claims.",
    **dict.fromkeys(("laptop", "small"),
                    "Same chain on other images: compare the rows with each other, not with the published column."),
    "paper": "Published numbers: ImageNet-1k; 300 epochs of fine-tuning unless the row says otherwise.",
}
OWN_DATA = {"transfer", "detect"}  # stages that do not read --data-path
NO_LABELS = "pretrain_"  # how the names of those begin that need none
PREVIOUS = "<weights of the stage before>"  # as a setting: replaced by that stage's checkpoint


@dataclass
class Row:
    key: str  # what --rows takes
    name: str  # what the table prints
    published: float | dict | None  # None: in no source read; a dict in a table of several columns
    stages: tuple = ()  # (module, settings) in order; none: not built yet
    note: str = ""  # where the published number comes from, what else was published
    presets: tuple = options.PRESET_NAMES  # presets in which the row makes sense
    extra: dict = field(default_factory=dict)  # further columns
    column: str = ""  # of a table where rows of one key fill several
    forced: dict = field(default_factory=dict)  # {module: settings} that the table works out; they always win


def make_parser(description, rows, demo):
    """A table's parser: data, rows, execution; `demo` names the rows of the demo preset."""
    parser = options.make_parser(description)
    options.add_data(parser)
    add_rows(parser, rows, demo)
    options.add_execution(parser)
    return parser


def add_rows(parser, rows=(), demo=()):
    """--rows, --seeds, --jobs, --set, --dry-run; without rows the last three alone."""
    group = parser.add_argument_group("table")
    if rows:
        group.add_argument("--rows", nargs="+", metavar="ROW", choices=["all", *(row.key for row in rows)],
                           help=f"of {', '.join(row.key for row in rows)}; all: every row built; "
                                f"default: {' '.join(demo)} in the demo preset, all otherwise")
        group.add_argument("--seeds", type=int, nargs="+", default=[0], help="each row is run once per seed")
    group.add_argument("--jobs", type=int, metavar="N", help="rows trained at once, each in a process of its own; "
                       "default: on a CPU as many as cores, else 1")
    group.add_argument("--set", nargs="+", action="extend", default=[], metavar="STAGE.KEY=VALUE",
                       help="any other setting of a stage, e.g. finetune.epochs=100")
    group.add_argument("--dry-run", action="store_true", help="print each stage's command and run nothing")


def parse(parser, argv=None, presets=PRESETS, own=()):
    """A table's arguments. `args.given` holds what the user gave: every stage that has such a setting takes it, in
    place of the row's. `own` is the table's alone, although a stage has a setting of that name.
    """
    given = options.explicit_arguments(parser, argv)
    if given.get("save_to"):
        parser.error("--save-to names one file and a table makes many: each run's weights.pt lies in its own folder")
    args = options.resolve(parser, presets, explicit=given)
    args.given = {name: value for name, value in given.items() if name not in own} | {"preset": args.preset}
    args.rows = getattr(args, "rows", ["all"])  # a figure has no --rows: all of its own are run
    args.per_stage, args.needs_weights = {}, {}
    if argv is not None and args.jobs is None:  # part of another program, whose processes are its own affair
        args.jobs = 1
    for text in args.set:
        stage, dot, rest = text.partition(".")
        key, equals, value = rest.partition("=")
        if not dot or not equals:
            parser.error(f"--set {text}: write STAGE.KEY=VALUE, for example finetune.epochs=100")
        with suppress(json.JSONDecodeError):  # a plain word
            value = json.loads(value)
        args.per_stage.setdefault(stage, {})[key.replace("-", "_")] = value
    return args


def chosen(rows, args, demo):
    """The rows to run; those asked for by name that cannot be run are an error."""
    wanted = args.rows or (demo if args.preset == "demo" else ["all"])
    runnable = [row for row in rows if row.stages and args.preset in row.presets]
    if "all" in wanted:
        return runnable
    for row in rows:
        if row.key in wanted and row not in runnable:
            why = "is not built yet" if not row.stages else f"needs --preset {' or '.join(row.presets)}"
            raise UserError(f"--rows {row.key}: {row.name} {why}")
    return [row for row in runnable if row.key in wanted]


def run_rows(rows, args, demo, script):
    """Runs the chosen rows for all seeds; returns for every row {key: [result of each stage, for each seed]}, or for
    rows with columns, {key: {column: the same}}. Wrong settings, missing data and missing weights are reported before
    the first stage starts.
    """
    device = distributed.start("cpu" if args.dry_run else args.device)
    stages = {module.split(".")[-1] for row in rows for module, _ in row.stages}
    unknown = sorted(set(args.per_stage) - stages)
    if unknown and stages:  # else no row can run, and the table says why
        raise UserError(f"--set names no stage of this table: {', '.join(unknown)}; "
                         f"its stages are {', '.join(sorted(stages))}")
    results, done, to_run = {}, {}, chosen(rows, args, demo)
    for row in to_run:
        check_row(row, args)
        if words := overruled(row, args):
            print0(f"{row.name}: {words} by the command line, so that name and published number mean another run")
    scripts = {module.split(".")[-1] for row in to_run for module, _ in row.stages} - OWN_DATA
    if scripts and args.data != "fractals" and not (args.dry_run and args.data_path):
        load = load_images if all(script.startswith(NO_LABELS) for script in scripts) else load_sets
        load(args)
    at_once = args.jobs or (jobs.CORES if device.type == "cpu" else 1)
    if at_once > 1 and distributed.world_size() == 1 and not args.dry_run:
        run_ahead(to_run, args, script, at_once)
    for number, row in enumerate(to_run, 1):
        for seed in args.seeds:
            print0(f"\n# row {number} of {len(to_run)}: {row.name}, seed {seed}")
            try:
                found = run_row(row, seed, args, script, done)
                results.setdefault(row.key, {}).setdefault(row.column, []).append(found)
            except HubError as error:  # the other rows can go on
                args.needs_weights[row.key] = f"needs weights: {error}, {remedy(row, error.source, args, seed)}"
                print0(args.needs_weights[row.key])
                break
    if args.dry_run:
        print0("\n# then this command without --dry-run: it finds these runs by their content")
    return {key: columns.get("", columns) for key, columns in results.items()}


def run_ahead(rows, args, script, at_once):
    """Trains the rows in processes of their own, so that the table then finds them finished."""
    own = argparse.Namespace(**{**vars(args), "given": {"workers": 0, **args.given}})  # a core each is all they have
    tasks = [(group[0].key, train_rows, (group, seed, own, script))
             for seed in args.seeds for group in jobs.groups(rows)]
    if len(tasks) > 1:
        jobs.run_at_once(tasks, at_once)


def train_rows(rows, seed, args, script):
    """What one of these processes does. What fails is met again, and said, by the table itself."""
    with options.mishaps_in_one_line(script):
        options.stop_by(signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
        done = {}
        for row in rows:
            with suppress(HubError):
                run_row(row, seed, args, script, done)


def stage_settings(name, explicit=None, row=None):
    """The settings that a stage would run with."""
    module = importlib.import_module(name)
    parser = module.build_parser()
    parser.prog = name
    try:
        return options.resolve(parser, module.PRESETS, getattr(module, "RECIPES", None), explicit=explicit, row=row)
    except UserError as error:
        raise UserError(f"stage {name}: {error}") from None


def stage(name, explicit=None, row=None):
    """Runs another script's `main` with keyword settings, in this process, and returns its result. `name` is a module
    such as "sec3_benchmark.pretrain_mae": sections know each other's scripts by name only.
    """
    args, module = stage_settings(name, explicit, row), importlib.import_module(name)
    torch.compiler.reset()
    print0(f"\n== {name}")
    options.announce(module.build_parser(), args)
    return module.main(args)


def command_line(name, settings):
    """The shell command of a stage: settings as a dict of names and values."""
    return shlex.join(["python", f"{name.replace('.', '/')}.py", *options.words(settings)])


def check_row(row, args):
    """An error for settings that a stage does not have or cannot use, and for weights or a teacher not there."""
    alike = "seed" in args.per_stage.get(row.stages[-1][0].split(".")[-1], ()) and len(args.seeds) > 1
    if alike or len(args.seeds) > len(set(args.seeds)):
        raise UserError(f"--seeds {' '.join(map(str, args.seeds))}: two are equal, or --set has the last stage's")
    for module, settings in row.stages:
        explicit = explicit_settings(module, args, args.seeds[0], row.forced)
        known = vars(stage_settings(module, explicit, settings))
        for source in filter(None, (known.get("init"), known.get("teacher"))):  # "own": a teacher that is trained too
            if not (args.dry_run or source in (PREVIOUS, "own") or source.startswith("timm:") or Path(source).exists()):
                raise UserError(f"{row.name}: no weights at {source}")


def remedy(row, source, args, seed):
    """Where to give a folder of weights that the hub did not: for a teacher to the table, else to the row's script."""
    for module, settings in row.stages:
        given = {**settings, **explicit_settings(module, args, seed, row.forced)}
        if getattr(stage_settings(module, given), "teacher", None) == source:
            return f"here as --set {module.split('.')[-1]}.teacher=FOLDER"
    return f"in place of its name: `{command_line(module, given)}`"


def overruled(row, args):
    """The settings of a row of its own that the command line changes, in words."""
    words = []
    for module, settings in row.stages:
        explicit = explicit_settings(module, args, args.seeds[0])
        changed = {name: explicit[name] for name, value in settings.items()
                   if explicit.get(name, value) != value and name not in row.forced.get(module, {})}
        words += options.words({name: "off" if value is None or value is False else value
                                for name, value in changed.items()})
    return " ".join(words)


def require_weights(args):
    """A figure has no place for a row whose weights the hub did not give."""
    if args.needs_weights:
        raise UserError("; ".join(args.needs_weights.values()))


def explicit_settings(module, args, seed, forced=None):
    """What was given on the table's command line for a stage, as far as it knows it, --set, and what a row forces."""
    known = vars(stage_settings(module))
    own = ("img_size",) if module.endswith(".detect") else ()  # there the canvas: by --set detect.img_size alone
    given = {name: value for name, value in args.given.items() if name in known and name not in own}
    return {**given, "seed": seed, **args.per_stage.get(module.split(".")[-1], {}), **(forced or {}).get(module, {})}


def run_row(row, seed, args, script, done):
    """One row with one seed: its stages' results in order. `done` keeps stages that rows share from running twice."""
    finished = []
    for number, (module, settings) in enumerate(row.stages):
        explicit = explicit_settings(module, args, seed, row.forced)
        previous = finished[-1]["checkpoint"] if finished else None
        settings = {name: previous if value == PREVIOUS else value for name, value in settings.items()}
        key = json.dumps([module, settings, explicit], sort_keys=True, default=str)
        if key not in done:
            done[key] = dry_run(row, number, module, settings, explicit, args, script) if args.dry_run else \
                stage(module, explicit=explicit, row=settings)
        elif args.dry_run:
            print0(f"# {module.split('.')[-1]}.py: as above")
        finished.append(done[key])
    return finished


def dry_run(row, number, module, settings, explicit, args, script):
    """Prints a stage's command; its weights go where the next command looks for them."""
    weights = Path(args.output) / script / "weights" / f"{row.key}-seed{explicit['seed']}-{number}.pt"
    last = number == len(row.stages) - 1 and not module.split(".")[-1].startswith(NO_LABELS)  # of a later row too
    print0(command_line(module, {**settings, **explicit, **({} if last else {"save_to": str(weights)})}))
    return {"checkpoint": str(weights)}
