"""A row of a table: a list of commands, as one would type them, that are run in order.

    Row("mae", "MAE", 78.0, ["sec3_benchmark/pretrain_mae.py", "sec3_benchmark/finetune.py --init {previous}"])

`{previous}` stands for the weights that the line before wrote. After the arguments in a line come those given to the
table, if the script has them, and then those of --set. The last of several equal flags counts.
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
    published: float | dict | None  # None: not found in any source; a dict in a table of several columns
    lines: list = ()  # scripts with their arguments, in order; empty for a row that is only quoted
    note: str = ""  # where the published number comes from, what else was published
    presets: tuple = options.PRESET_NAMES  # presets in which the row makes sense
    extra: dict = field(default_factory=dict)  # values of further columns
    column: str = ""  # which column it fills, in tables where several rows share a key


def words_of(line, args, seed, previous=PREVIOUS):
    """Return the script of a line, and all its arguments: those in the line, then the table's, then those of --set."""
    script, *words = [previous if word == PREVIOUS else word for word in shlex.split(line)]
    known = scripts.own_settings(script)
    of_table = {name: value for name, value in {**args.given, "seed": seed}.items() if name in known}
    return script, (*words, *options.to_argv({**of_table, **settings_set(script, args)}))


def split_setting(text):
    """Split a text SCRIPT.KEY=VALUE of --set into (script, key, value); a missing part is ""."""
    name, _, value = text.partition("=")
    stage, _, key = name.partition(".")
    return stage, key, value


def settings_set(script, args):
    """Return {name: [values]} of what --set gives to a script. [a,b] is a list; `true` is an argument without a value.
    """
    found = {}
    for stage, key, value in map(split_setting, args.set):
        if stage == Path(script).stem:
            words = value.strip("[]").replace(",", " ").split() if value[0] == "[" else [value]
            found[key.replace("-", "_")] = [] if words == ["true"] else words
    return found


def overruled(row, args):
    """Return, as arguments in one string, the settings written in a row that the command line overrides."""
    changed = []
    for line in row.lines:
        script, words = words_of(line, args, args.seeds[0])
        final = vars(scripts.settings_of(script, words))
        own = options.given(scripts.parser_of(script), shlex.split(line)[1:])
        changed += options.to_argv({name: final[name] or "off" for name, value in own.items() if final[name] != value})
    return " ".join(changed)


def remedy(row, source, args, seed):
    """Return how to give a local folder in place of `source`, a model that timm's hub did not deliver.

    That is by --set for a teacher, but for initial weights to the script itself, without the table.
    """
    for line in row.lines:
        script, words = words_of(line, args, seed)
        if getattr(scripts.settings_of(script, words), "teacher", None) == source:
            return f"here as --set {Path(script).stem}.teacher=FOLDER"
    return f"in place of its name: `python {script} {shlex.join(words)}`"
