"""Scripts of any section, run in this process with the arguments of a command line.

Such a script has `build_parser()`, `PRESETS` and `main(args) -> dict`. It may have `RECIPES`, `READS` ("labels" or
"images": what it reads of --data) and `NOT_OF_TABLES` (the settings that a table must not pass on to it).
"""
import importlib

import torch

from common import entry, options
from common.distributed import print0
from common.errors import UserError


def module_of(script):
    """Import a script by its path, such as "sec3_benchmark/finetune.py", and return the module."""
    return importlib.import_module(script.removesuffix(".py").replace("/", "."))


def parser_of(script):
    """Return a script's parser. Its error messages begin with the script's path."""
    parser = module_of(script).build_parser()
    parser.prog = script
    return parser


def own_settings(script):
    """Return the names of the settings that a table passes on to a script."""
    return options.defaults(parser_of(script)).keys() - set(getattr(module_of(script), "NOT_OF_TABLES", ()))


def settings_of(script, words=()):
    """Return the settings of a script started with these arguments. Raises a UserError that names the script."""
    module = module_of(script)
    try:
        return options.parse(parser_of(script), module.PRESETS, getattr(module, "RECIPES", None), list(words))
    except UserError as error:
        raise UserError(f"{script}: {error}") from None


def run(script, words=()):
    """Run a script's `main` in this process with these arguments, and return its result.

    Sections start each other's scripts by this function and so need not import them.
    """
    args, module = settings_of(script, words), module_of(script)
    torch.compiler.reset()
    print0(f"\n== {script}")
    entry.announce(module.build_parser(), args)
    return module.main(args)
