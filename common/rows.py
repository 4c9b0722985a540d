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

    @property
    def stages(self):
        """Return the names of its scripts, as --set takes them."""
        return [Path(line.split()[0]).stem for line in self.lines]


def words_of(line, args, seed, previous=PREVIOUS):
    """Return the script of a row's line and all the words behind it: the row's, the table's, --set's."""
    script, *words = [previous if word == PREVIOUS else word for word in shlex.split(line)]
    by_set = settings_set(script, args)
    known = scripts.own_settings(script) - by_set.keys()
    table = {name: value for name, value in {**args.given, "seed": seed}.items() if name in known}
    last = [word for name, values in by_set.items() for word in (f"--{name.replace('_', '-')}", *values)]
    return script, [*words, *options.to_argv(table), *last]


def split_setting(text):
    """Split a SCRIPT.KEY=VALUE of --set into the three; what is not there is empty."""
    name, _, value = text.partition("=")
    stage, _, key = name.partition(".")
    return stage, key, value


def settings_set(script, args):
    """Return {name: words} of what --set says of a script; of two values the last counts."""
    found = {}
    for stage, key, value in map(split_setting, args.set):
        if stage == Path(script).stem:
            words = value.strip("[]").replace(",", " ").split() if value[0] == "[" else [value]
            found[key.replace("-", "_")] = [] if words == ["true"] else words
    return found


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
