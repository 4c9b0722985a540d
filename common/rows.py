"""A row of a table: the command lines that one would type, run in order.

    Row("mae", "MAE", 78.0, ["sec3_benchmark/pretrain_mae.py", "sec3_benchmark/finetune.py --init {previous}"])

`{previous}` is the weights that the line before left. Behind a row's words come those of the table's own command line,
as far as the script knows them, then `--set`; later words win.
"""
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from common import options, scripts

PREVIOUS = "{previous}"


@dataclass
class Row:
    key: str  # what --rows takes
    name: str  # what the table prints
    published: float | dict | None  # None: in no source read; a dict in a table of several columns
    lines: list = ()  # scripts with their arguments, in order; none: nothing to run
    note: str = ""  # where the published number comes from, what else was published
    presets: tuple = options.PRESET_NAMES  # presets in which the row makes sense
    extra: dict = field(default_factory=dict)  # further columns
    column: str = ""  # of a table where rows of one key fill several


def words_of(line, args, seed, previous=PREVIOUS):
    """Return the script of a row's line and all the words behind it: the row's, the table's, --set's."""
    script, *words = [previous if word == PREVIOUS else word for word in shlex.split(line)]
    by_set = settings_set(script, args)
    known = scripts.own_settings(script) - by_set.keys()
    table = {name: value for name, value in {**args.given, "seed": seed}.items() if name in known}
    last = [word for name, values in by_set.items() for word in (f"--{name.replace('_', '-')}", *values)]
    return script, [*words, *options.to_argv(table), *last]


def settings_set(script, args):
    """Return {name: words} of what --set says of a script; of two values the last counts."""
    found = {}
    for text in args.set:
        (stage, _, key), value = text.partition("=")[0].partition("."), text.partition("=")[2]
        if stage == Path(script).stem:
            is_list = value[0] == "["
            found[key.replace("-", "_")] = value.strip("[]").replace(",", " ").split() if is_list else [value]
    return {name: [] if words == ["true"] else words for name, words in found.items()}


def overruled(row, args):
    """Return the settings of a row of its own that the command line changes, in words."""
    changed = []
    for line in row.lines:
        script, words = words_of(line, args, args.seeds[0])
        final = vars(scripts.settings_of(script, words))
        own = options.given(scripts.parser_of(script), shlex.split(line)[1:])
        changed += options.to_argv({name: final[name] or "off" for name, value in own.items() if final[name] != value})
    return " ".join(changed)


def remedy(row, source, args, seed):
    """Return where to give a folder of weights that the hub did not: for a teacher to the table, else to its script."""
    for line in row.lines:
        script, words = words_of(line, args, seed)
        if getattr(scripts.settings_of(script, words), "teacher", None) == source:
            return f"here as --set {Path(script).stem}.teacher=FOLDER"
    return f"in place of its name: `python {script} {shlex.join(words)}`"
