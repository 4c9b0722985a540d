"""Command lines: arguments that scripts share, and what decides a setting.

Later words win: default < preset < recipe < command line; a table puts a row's words before the user's. A script's
defaults are the paper's values; its `PRESETS` lists only what the smaller presets change. What weights can say of their
network and images has no default: `resolve` takes what was given, else what the weights say, else the preset's.
"""
import argparse
import copy
import difflib
import re
from pathlib import Path

from common import data
from common.distributed import print0
from common.errors import UserError
from common.ranges import Float, Int
from common.tensorboard import summary_writer
from common.vit import SIZES, pair

ROOT = Path(__file__).resolve().parents[1]
PRESET_NAMES = ("demo", "laptop", "small", "paper")
PAPER = dict(model="vit_tiny", img_size=[224], patch_size=16, in_chans=3, num_heads=12, global_pool="avg")
NETWORKS = {  # and images: what each preset has instead
    "demo": dict(model="vit_demo", img_size=[36], patch_size=6),
    "laptop": dict(model="vit_demo", img_size=[48], patch_size=8),
    "small": dict(img_size=[64], patch_size=8),
}
SHAPE = ("model", "img_size", "patch_size", "in_chans", "num_heads")  # of a ViT, whatever is made of it


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):  # whose own addition would be "(default: None)", or say it twice
        said = action.help or ""
        return said if action.default is None or "default" in said else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    def error(self, message):  # without the usage, which fills a screen
        unknown = re.findall(r"--[\w-]+", message) if message.startswith("unrecognized") else []
        near = {name for word in unknown for name in difflib.get_close_matches(word, self._option_string_actions, n=1)}
        remedy = (f"perhaps {', '.join(sorted(near))}? " if near else "") + "--help lists the arguments"
        if "--set" in self._option_string_actions:
            remedy += "; those of a stage are given by --set SCRIPT.KEY=VALUE"
        self.exit(2, f"{self.prog}: error: {message} ({remedy})\n")


def make_parser(description):
    """A parser whose help starts with the script's docstring and shows each default."""
    return Parser(description=description, formatter_class=HelpFormatter, allow_abbrev=False)


def add_data(parser):
    group = parser.add_argument_group("data")
    group.add_argument("--data", choices=data.NAMES, default="imagenet", help="data set, see common/data.py")
    group.add_argument("--data-path", metavar="DIR", help="where the data set lies")
    add_images(group)


def add_images(group, img_size=None):
    group.add_argument("--preset", choices=PRESET_NAMES, help="demo without a path to data, paper with one")
    group.add_argument("--download", action="store_true", help="let torchvision fetch the data set")
    default = "%(default)s" if img_size else "as the weights say, else 224"
    group.add_argument("--img-size", type=Int(1), nargs="+", default=img_size and [img_size], metavar="PX",
                       help=f"side, or height and width; default: {default}")
    group.add_argument("--in-chans", type=Int(1),
                       help="channels, other than 1 and 3 read from .npy files; default: as the weights say, else 3")
    group.add_argument("--mean", type=Float(0, 1), nargs="+",
                       help="per channel, in 0..1; default: as the weights say, else ImageNet's")
    group.add_argument("--std", type=Float(1e-6, 1), nargs="+", help="likewise")


def add_model(parser, models=SIZES):
    group = parser.add_argument_group("model", "default: as the weights say, else vit_tiny, 12 heads, patch size 16")
    group.add_argument("--model", choices=tuple(models), help="the encoder")
    group.add_argument("--patch-size", type=Int(1), help="pixels")
    group.add_argument("--num-heads", type=Int(1), help="12 in the paper; DeiT-Tiny's own has 3")


def add_execution(parser, pretraining=True):
    """How a run is executed and watched. None of these enters a run's identity; every table passes them on to its
    stages. pretraining: the script is, or its rows have, a pre-training.
    """
    group = parser.add_argument_group("execution")
    group.add_argument("--output", default=str(ROOT / "outputs"), metavar="DIR", help="where runs and results are kept")
    group.add_argument("--save-to", metavar="FILE", help="also copy the final weights to this file")
    group.add_argument("--fresh", action="store_true", help="start again, leaving no trace of the run before")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    group.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
                       help="auto: bf16 where the device has it, else fp16 on GPUs and fp32 on CPUs")
    group.add_argument("--micro-batch", type=Int(1), default=512, help="most images at once on a device")
    group.add_argument("--workers", type=Int(-1, 256), default=-1, help="loading processes per rank; -1: by the cores")
    group.add_argument("--keep-decoded", type=Float(0, 1), default=0.25, metavar="SHARE",
                       help="decode a set once and keep it, if that takes at most this share of free memory; 0: never")
    group.add_argument("--compile", action="store_true", help="torch.compile the model")
    group.add_argument("--deterministic", action="store_true", help="bit-exact GPU kernels (a CPU is exact anyway)")
    group.add_argument("--allow-inexact", action="store_true", help="resume with other threads, ranks or precision")
    group.add_argument("--save-minutes", type=Float(0), default=10, help="longest time between two checkpoints")
    group.add_argument("--log-every", type=Int(1), default=10, help="steps between two rows of log.jsonl")
    if pretraining:
        group.add_argument("--probe-every", type=Int(0), default=0, metavar="N",
                           help="epochs between two measures of what the features are worth; 0: never")
    group.add_argument("--tensorboard", action="store_true", help="write what log.jsonl has for TensorBoard too")
    group.add_argument("--on-bad-image", choices=("stop", "skip"), default="stop",
                       help="skip: replace, count, list it, in training; above 1 %% stop all the same")
    return parser


def defaults(parser):
    """Every argument's name and default, those of required ones too (None)."""
    return {action.dest: action.default for action in parser._actions if action.dest != "help"}


EXECUTION = tuple(defaults(add_execution(argparse.ArgumentParser())))  # names of these settings


def given(parser, argv=None):
    """Return what stands on the command line alone, as a dict without defaults."""
    bare = copy.deepcopy(parser)
    for action in bare._actions:
        action.default = argparse.SUPPRESS
    bare._defaults.clear()
    return vars(bare.parse_args(argv))


def parse(parser, presets=None, recipes=None, argv=None):
    """Return the settings of a command line (None: the one typed), by the order of precedence."""
    parser = copy.deepcopy(parser)  # whose defaults stay the paper's
    args = parser.parse_args(argv)
    data_given = getattr(args, "data_path", None) or getattr(args, "dataset_path", None)
    preset = getattr(args, "preset", None) or ("paper" if data_given else "demo")
    parser.set_defaults(**(presets or {}).get(preset, {}))
    args = parser.parse_args(argv)
    recipe = getattr(args, "recipe", getattr(args, "dataset", None))  # transfer.py's go by data set
    parser.set_defaults(**(recipes or {}).get(recipe, {}), preset=preset)
    args = parser.parse_args(argv)
    if empty := [name for name, value in vars(args).items() if value == ""]:  # not taken for "none"
        raise UserError(f"--{empty[0].replace('_', '-')} is empty: is a shell variable in it not set?")
    check_warmup(args)
    if getattr(args, "tensorboard", False):
        summary_writer()  # not after hours
    return args


def replaced(args, **changes):
    """Return new settings with some changed."""
    return argparse.Namespace(**{**vars(args), **changes})


def resolve(args, weights=None, names=SHAPE):
    """Return new settings in which nothing about the network and its images is open any more: given on the command
    line, else as the Weights say (of `names`; their mean and deviation always), else as the preset has it.
    """
    by_preset = {**PAPER, **NETWORKS.get(args.preset, {})}
    unset = [name for name in by_preset if name in args and getattr(args, name) is None]
    config = (weights.config if weights else None) or {}
    by_weights = {name: config[name] for name in unset if name in names and config.get(name) is not None
                  and not same_value(name, config[name], by_preset[name])}
    if by_weights:
        print0("as the weights say:", *to_argv(by_weights))
    resolved = replaced(args, **{name: by_preset[name] for name in unset} | by_weights)
    return data.with_statistics(resolved, weights) if "mean" in args else resolved


def same_value(name, ours, theirs):
    """Whether two values of a setting mean the same: 64 pixels are 64 x 64."""
    return pair(ours) == pair(theirs) if name in ("img_size", "position_size") else ours == theirs


def check_warmup(args):
    """Raise a UserError if the warm-up is all of the training."""
    settings = vars(args)
    for unit in ("epochs", "iterations"):
        total, warmup = settings.get(unit), settings.get(f"warmup_{unit}")
        if total and warmup and warmup >= total:
            raise UserError(f"--warmup-{unit} {warmup} leaves nothing of --{unit} {total}: lower it too")


def parse_pairs(texts, flag):
    """["NAME=VALUE", ...] -> {NAME: VALUE}."""
    pairs = [text.partition("=")[::2] for text in texts]
    wrong = [text for text, (name, value) in zip(texts, pairs) if not (name and value)]
    if wrong or len({name for name, _ in pairs}) < len(pairs):
        raise UserError(f"{flag} {' '.join(wrong or texts)}: write NAME=VALUE, each name once")
    return dict(pairs)


def to_argv(settings):
    """Settings as words of a command line, where every flag is its setting's name; None and False are left out."""
    line = []
    for key, value in settings.items():
        flag = "--" + key.replace("_", "-")
        if value is True:
            line.append(flag)
        elif isinstance(value, (list, tuple)):
            line += [flag, *map(str, value)]
        elif value is not None and value is not False:
            line += [flag, str(value)]
    return line
