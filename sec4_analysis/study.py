"""Shared by the analyses of Section 4: their command line, models, images, and files of results.

The models are checkpoints that common/pretrained.py reads (`--models NAME=CHECKPOINT`) or, without --models, the
preset's own runs, which are trained first if they are not finished. Every model sees the same validation images, at its
own size, in float32. Rank 0 analyses; under torchrun the other ranks only take part in the training.

A figure's `main` calls `models`, `load_all` and `images`, then its measure for `each_model`, then `about` and `save`,
and draws last. With --from-numbers, `report.read_numbers` replaces everything before the drawing.
"""
from itertools import cycle
from pathlib import Path

import numpy as np
from timm.models.beit import Beit

from common import distributed, options, report, tables
from common.checkpoint import save_arrays
from common.data import images_to_analyse
from common.distributed import print0
from common.errors import UserError
from common.loader import seed_everything
from common.mae import MAE
from common.pretrained import fingerprint
from common.ranges import Int
from common.rebuilding import load_model
from common.rows import Row
from common.vit import eval_mode, init_relative_vit, init_vit
from sec4_analysis.activations import check_plain
from sec4_analysis.images import batches, draw_images, preprocessing

PRESETS = {"demo": {"data": "fractals", "num_images": 512}, "laptop": {"data": "folder"}, "small": {"data": "folder"}}
PRETRAIN_MAE, PRETRAIN_MOCOV3 = "sec3_benchmark/pretrain_mae.py", "sec3_benchmark/pretrain_mocov3.py"
# The preset's own models; the first four are the paper's DeiT-Tiny, MAE-Tiny, MAE-Tiny-FT and MoCov3-Tiny
SUPERVISED = Row("supervised", "supervised", None, ["sec3_benchmark/finetune.py"])
MAE_ROW = Row("mae", "MAE", None, [PRETRAIN_MAE])
MAE_FT = Row("mae-ft", "MAE, fine-tuned", None, [PRETRAIN_MAE, "sec3_benchmark/finetune.py --init {previous}"])
MOCOV3 = Row("mocov3", "MoCo-v3", None, [PRETRAIN_MOCOV3])
UNTRAINED = Row("random", "random", None)
RANDOM = "random"  # in place of a checkpoint: the first model with newly initialised weights


# Command line

def make_parser(description, norm=True):
    """Build the parser of a figure: data, models, images, execution.

    norm: add --final-norm, for figures that measure the output of the final norm.
    """
    parser = options.make_parser(description)
    options.add_data(parser)
    group = parser.add_argument_group("models")
    group.add_argument("--models", nargs="+", action="extend", metavar="NAME=CHECKPOINT",
                       help="files, timm folders, timm:NAME or random; the first is the reference. Default: the "
                            "preset's own runs")
    group.add_argument("--num-heads-of", nargs="+", action="extend", default=[], metavar="NAME=N",
                       help="for files that cannot say and have other than 12; DeiT-Tiny's own has 3")
    if norm:
        group.add_argument("--final-norm", choices=("own", "authors"), default="own",
                           help="authors: an untrained one for MAE, as in their script")
    group = parser.add_argument_group("images")
    group.add_argument("--num-images", type=Int(1), default=1024, help="exactly so many images, of val/ if "
                       "--data-path has one, else of all that lies below it")
    group.add_argument("--order", choices=("drawn", "authors"), default="drawn", help="drawn: by --seed, from all "
                       "classes alike; authors: whole batches in class order until there are more than --num-images")
    group.add_argument("--batch-size", type=Int(1), default=128, help="images at once, and per mini-batch of CKA")
    group.add_argument("--image-seed", type=Int(0), help="draws the images; default: --seed")
    group.add_argument("--seed", type=Int(0), default=0, help="of the preset's own runs and of random models")
    tables.add_rows(parser)
    report.add_pictures(parser, ".npz")
    options.add_execution(parser)
    return parser


def parse(parser, argv=None):
    """Parse the command line. --batch-size is the analysis's own; it is not passed on to the trainings."""
    return tables.parse(parser, argv, presets=PRESETS, own=("batch_size",))


# Models

def given_models(args, words=()):
    """Return {name: checkpoint} of --models.

    words: what may stand in place of a checkpoint. Raises UserError for a missing file, so before the first model is
    measured or trained. A dry run may name files that do not exist yet.
    """
    models = options.parse_pairs(args.models, "--models")
    if next(iter(models.values())) in words:
        raise UserError(f"--models {args.models[0]}: a random model is the twin of the first one, so name that first")
    if taken := {"file", "allow_pickle", "item", "distance_unit"} & models.keys():  # reserved in the .npz
        raise UserError(f"--models {taken.pop()}=...: choose another name")
    for name, checkpoint in models.items():
        somewhere_else = checkpoint in words or checkpoint.startswith("timm:")
        if not (args.dry_run or somewhere_else or Path(checkpoint).exists()):
            raise UserError(f"--models {name}={checkpoint}: no weights at {checkpoint}; check the path, or give "
                            f"timm:NAME for timm's hub")
    return models


def checkpoints(args, rows, item):
    """Return {name: checkpoint} of --models or of the preset's own runs, which are trained now; {} after a dry run."""
    if args.models:
        prepare(args, item)
        checkpoints = given_models(args, words=(RANDOM,))
    else:
        results = own_runs(args, rows, item)
        checkpoints = {row.name: results[row.key]["checkpoint"] if row.lines else RANDOM for row in rows}
    return {} if args.dry_run else checkpoints


def prepare(args, item):
    """Join the ranks and make the folder of the results, so that a folder that cannot be written fails at once."""
    tables.start_ranks(args)
    if not args.dry_run:
        (Path(args.output) / item).mkdir(parents=True, exist_ok=True)


def own_runs(args, rows, item):
    """Train the preset's own runs, or find them finished. Return {key of a row: result of its last stage}."""
    prepare(args, item)
    if args.data_path and not args.dry_run:  # raises for too few images now, not after hours of training
        draw_images(images_to_analyse(options.resolve(args)), args)
    results, without = tables.run_rows(rows, options.replaced(args, seeds=[args.seed]), (), item)
    tables.require_weights(without)
    return {key: lines[-1] for key, [lines] in results.items()}


def heads_of(args, checkpoints):
    """Return {name: number of heads} of --num-heads-of."""
    heads = options.parse_pairs(args.num_heads_of, "--num-heads-of")
    for name, number in heads.items():
        if name not in checkpoints or not number.isdigit() or not int(number):
            raise UserError(f"--num-heads-of {name}={number}: a number for one of {', '.join(checkpoints)}")
    return {name: int(number) for name, number in heads.items()}


def load_all(args, checkpoints, heads=None):
    """Load the models {name: checkpoint} onto the CPU; return {name: model}. All are checked before one is measured.

    heads: {name: number of heads}, which --num-heads-of overrides. Raises UserError for a model that is no plain ViT,
    and for models that read different numbers of channels.
    """
    if not checkpoints:  # after a dry run
        return {}
    heads = {**(heads or {}), **heads_of(args, checkpoints)}
    loaded = {name: load(name, checkpoints, heads, args) for name in checkpoints}
    channels = {name: model.patch_embed.proj.in_channels for name, model in loaded.items()}
    first = next(iter(channels))
    for name in channels:
        if channels[name] != channels[first]:
            raise UserError(f"{name} reads {channels[name]} channels and {first} {channels[first]}: analyse them apart")
    return loaded


def load(name, checkpoints, heads, args):
    """Load the model `name` of {name: checkpoint}, and keep its checkpoint as an attribute.

    A random model has the architecture of the first one.
    """
    random = checkpoints[name] == RANDOM
    source = next(iter(checkpoints)) if random else name
    model = load_model(checkpoints[source], num_heads=heads.get(source), img_size=args.img_size)
    check_plain(model, checkpoints[source])
    model = untrained(model, args.seed) if random else model
    model.checkpoint = checkpoints[name]
    return eval_mode(model, "cpu")


def untrained(model, seed):
    """Return a model of the same architecture with newly initialised weights."""
    seed_everything("weights", seed)
    if isinstance(model, MAE):
        twin = MAE(**model.config)
        twin.statistics = model.statistics
        return twin
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return init_relative_vit(model) if isinstance(model, Beit) else init_vit(model)


# Images, numbers, pictures

def images(args, models):
    """Find the images to analyse, with the channels that the models {name: model} read; return their ImageSet.

    Returns None after a dry run, which has no models, and on ranks other than 0.
    """
    if not models:
        return None
    first = next(iter(models.values()))
    size, channels = preprocessing(first, args)[0], first.patch_embed.proj.in_channels
    reading = options.replaced(args, img_size=size, in_chans=channels)
    found = images_to_analyse(reading)  # all ranks must take part
    return found if distributed.is_main() else None


def each_model(args, models, images):
    """Yield (name, model on this rank's device, batches of the drawn images) for each of the models {name: model}."""
    device, chosen = tables.start_ranks(args), draw_images(images, args)
    for name, model in models.items():
        print0(f"{name}: {model.checkpoint}, {len(chosen)} images")
        yield name, eval_mode(model, device), batches(model, images, chosen, args, device, name)
        model.to("cpu")  # frees the device's memory for the next one


def about(args, models, images, **settings):
    """Return where the numbers come from, for the .json: data, images, models, and `settings` of the measure."""
    known = {name: {"checkpoint": "/".join(Path(model.checkpoint).parts[-2:]),
                    "num_heads": model.blocks[0].attn.num_heads, "fingerprint": fingerprint(model.state_dict())}
             for name, model in models.items()}
    return {"preset": args.preset, "data": args.data, "images": len(draw_images(images, args)),
            "order": args.order, "seed": args.seed, "image_seed": args.image_seed,
            "data_fingerprint": images.fingerprint(), "models": known, **settings}


def save(args, item, arrays, about, text):
    """Write the arrays {name: array} as <item>.npz, `about` as .json, and the Markdown text as .md."""
    folder = Path(args.output) / item
    save_arrays(folder / f"{item}.npz", {**arrays, "item": np.array(item)})
    where = report.origin(args.preset, args.data) if args.preset else args.data
    report.write_text(folder, item, {"item": item, **about}, f"{item}, {where}: {text}")


def line_styles():
    """Return an endless iterator of (line style with marker, colour), one for each curve; the first 42 differ."""
    return zip(cycle(("o-", "s--", "^:", "D-.", "v-", "x--")), cycle(report.COLOURS))
