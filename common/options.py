"""Command lines: the arguments that scripts share, and the order in which settings override each other.

Precedence, the strongest last: script's default, preset, recipe, command line. The defaults are the paper's values; a
script's `PRESETS` lists only what the smaller presets change. The network and the image size default to None: `resolve`
takes them from the file of weights, if there is one that records them, else from the preset.
"""
import argparse
import copy
import difflib
import re
from pathlib import Path

from common import data
from common.distributed import print0
from common.errors import DataError, UserError
from common.ranges import Float, Int
from common.tensorboard import summary_writer
from common.vit import SIZES, pair

ROOT = Path(__file__).resolve().parents[1]
PRESET_NAMES = ("demo", "laptop", "small", "paper")
PAPER = dict(model="vit_tiny", img_size=[224], patch_size=16, in_chans=3, num_heads=12, global_pool="avg")
NETWORKS = {  # the network and image size of each smaller preset, where they differ from PAPER
    "demo": dict(model="vit_demo", img_size=[36], patch_size=6),
    "laptop": dict(model="vit_demo", img_size=[48], patch_size=8),
    "small": dict(img_size=[64], patch_size=8),
}
SHAPE = ("model", "img_size", "patch_size", "in_chans", "num_heads")  # the settings that define an encoder


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help that keeps the docstring's lines and shows each default once."""

    def _get_help_string(self, action):  # argparse would also add "(default: None)", or repeat a default from the help
        said = action.help or ""
        return said if action.default is None or "default" in said else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser that reports a mistake in one line and suggests the argument that was meant."""

    def format_help(self):
        for action in self._actions:
            if action.help is None and action.default is not None:
                action.help = "default: %(default)s"  # argparse shows a default only behind a text
        return super().format_help()

    def error(self, message):  # argparse would print the usage first, which fills a screen here
        unknown = re.findall(r"--[\w-]+", message) if message.startswith("unrecognized") else []
        near = {name for word in unknown for name in difflib.get_close_matches(word, self._option_string_actions, n=1)}
        remedy = (f"perhaps {', '.join(sorted(near))}? " if near else "") + "--help lists the arguments"
        if "--set" in self._option_string_actions:
            remedy += "; those of a stage are given by --set SCRIPT.KEY=VALUE"
        self.exit(2, f"{self.prog}: error: {message} ({remedy})\n")


def make_parser(description):
    """Return a parser whose help begins with `description`, the script's docstring."""
    return Parser(description=description, formatter_class=HelpFormatter, allow_abbrev=False)


def add_data(parser):
    """Add --data, --data-path and the arguments of add_images."""
    group = parser.add_argument_group("data")
    group.add_argument("--data", choices=data.NAMES, default="imagenet", help="data set, see common/data.py")
    group.add_argument("--data-path", metavar="DIR", help="where the data set lies")
    add_images(group)


def add_images(group, img_size=None):
    """Add --preset and how images are read. `img_size`: a default, where the size does not depend on the weights."""
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
    """Add the arguments that choose the encoder, one of the names in `models`."""
    group = parser.add_argument_group("model", "default: as the weights say, else vit_tiny, 12 heads, patch size 16")
    group.add_argument("--model", choices=tuple(models), help="the encoder")
    group.add_argument("--patch-size", type=Int(1), help="pixels")
    group.add_argument("--num-heads", type=Int(1), help="12 in the paper; DeiT-Tiny's own has 3")


def add_execution(parser, pretraining=True):
    """Add the arguments that say how a run is executed and watched, and return the parser.

    None of them enters a run's identity. pretraining: whether the script pre-trains, itself or in a row.
    """
    group = parser.add_argument_group("execution")
    group.add_argument("--output", default=str(ROOT / "outputs"), metavar="DIR", help="where runs and results are kept")
    group.add_argument("--save-to", metavar="FILE", help="also copy the final weights to this file")
    group.add_argument("--fresh", action="store_true", help="start again, leaving no trace of the run before")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    group.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
                       help="auto: bf16 where the device has it, else fp16 on GPUs and fp32 on CPUs")
    group.add_argument("--micro-batch", type=Int(1), default=512, help="most images at once on a device")
    group.add_argument("--workers", type=Int(-1, 256), default=-1, help="processes that load, per rank; -1: by cores")
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
    """Return {name: default} of all arguments; None for required ones."""
    return {action.dest: action.default for action in parser._actions if action.dest != "help"}


EXECUTION = tuple(defaults(add_execution(argparse.ArgumentParser())))  # the names of these settings


def given(parser, argv=None):
    """Return {name: value} of the arguments that stand on the command line, without defaults."""
    bare = copy.deepcopy(parser)
    for action in bare._actions:
        action.default = argparse.SUPPRESS
    bare._defaults.clear()
    return vars(bare.parse_args(argv))


def parse(parser, presets=None, recipes=None, argv=None):
    """Return the settings of a command line by the order of precedence above.

    presets, recipes: {name: {setting: value}}. argv: words; None for this process's. Each pass of the parser finds what
    the defaults of the next depend on: the preset, then the recipe, which a preset may choose.
    """
    parser = copy.deepcopy(parser)  # the caller's parser keeps the paper's defaults
    args = parser.parse_args(argv)
    data_given = getattr(args, "data_path", None) or getattr(args, "dataset_path", None)
    preset = getattr(args, "preset", None) or ("paper" if data_given else "demo")
    parser.set_defaults(**(presets or {}).get(preset, {}))
    args = parser.parse_args(argv)
    recipe = getattr(args, "recipe", getattr(args, "dataset", None))  # transfer.py has one recipe per data set
    parser.set_defaults(**(recipes or {}).get(recipe, {}), preset=preset)
    args = parser.parse_args(argv)
    if empty := [name for name, value in vars(args).items() if value == ""]:  # else it would count as not given
        raise UserError(f"--{empty[0].replace('_', '-')} is empty: is a shell variable in it not set?")
    check_warmup(args)
    if getattr(args, "tensorboard", False):
        summary_writer()  # if TensorBoard is missing, fail now and not when the run begins
    return args


def replaced(args, **changes):
    """Return a copy of the settings with some changed."""
    return argparse.Namespace(**{**vars(args), **changes})


def resolve(args, weights=None, names=SHAPE):
    """Return a copy of the settings in which those of the network and its images are no longer None.

    A value of the command line stays. Else the value recorded in `weights` is taken, if the setting is one of `names`;
    else the preset's. Mean and standard deviation of the pixels are the weights' too; a DataError if others were given.
    """
    by_preset = {**PAPER, **NETWORKS.get(args.preset, {})}
    unset = [name for name in by_preset if name in args and getattr(args, name) is None]
    config = (weights.config if weights else None) or {}
    by_weights = {name: config[name] for name in unset if name in names and config.get(name) is not None
                  and not same_value(name, config[name], by_preset[name])}
    if by_weights:
        print0("as the weights say:", *to_argv(by_weights))
    resolved = replaced(args, **{name: by_preset[name] for name in unset} | by_weights)
    return with_statistics(resolved, weights) if "mean" in args else resolved


def with_statistics(args, weights, keep_given=False):
    """Return settings with the mean and std of the images on which the Weights were trained, where these are known.

    Without weights (None), or if they do not say, the settings are returned unchanged. Raises DataError if the settings
    already ask for another mean or std; with `keep_given` those stay instead.
    """
    theirs = weights.statistics if weights else None
    if theirs and {len(theirs["mean"]), args.in_chans} == {1, 3}:  # from grey to colour, or the other way round
        theirs = {name: [round(sum(values) / len(values), 6)] * args.in_chans for name, values in theirs.items()}
    if not theirs or len(theirs["mean"]) != args.in_chans:
        return args
    taken = {}
    for name, ours in data.channel_statistics(args.in_chans, args.mean, args.std).items():
        given = getattr(args, name)
        if all(abs(a - b) <= 1e-3 for a, b in zip(ours, theirs[name])) or (given and keep_given):
            continue
        if given:
            raise DataError(f"{weights.source} learnt from images with {name} {theirs[name]}, here it is {ours}: "
                            f"leave --{name} out to take theirs, or choose a teacher and weights that agree")
        print0(f"{name} {theirs[name]} of the images, as {weights.source} says")
        taken[name] = theirs[name]
    return replaced(args, **taken)


def same_value(name, ours, theirs):
    """Return whether two values of the setting `name` mean the same: an image size of 64 is 64 x 64."""
    return pair(ours) == pair(theirs) if name in ("img_size", "position_size") else ours == theirs


def check_warmup(args):
    """Raise a UserError if the warm-up is as long as the training."""
    settings = vars(args)
    for unit in ("epochs", "iterations"):
        total, warmup = settings.get(unit), settings.get(f"warmup_{unit}")
        if total and warmup and warmup >= total:
            raise UserError(f"--warmup-{unit} {warmup} leaves nothing of --{unit} {total}: lower it too")


def parse_pairs(texts, flag):
    """Split ["NAME=VALUE", ...] into {NAME: VALUE}. Raises a UserError that names `flag` for any other text."""
    pairs = [text.partition("=")[::2] for text in texts]
    wrong = [text for text, (name, value) in zip(texts, pairs) if not (name and value)]
    if wrong or len({name for name, _ in pairs}) < len(pairs):
        raise UserError(f"{flag} {' '.join(wrong or texts)}: write NAME=VALUE, each name once")
    return dict(pairs)


def to_argv(settings):
    """Write {name: value} as words of a command line: --name value. None and False are left out."""
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
