"""What the analyses of Section 4 share: which models, which images, numbers before pictures.

A model is any checkpoint that common/formats.py reads (`--models NAME=CHECKPOINT`), or the preset's own runs, which are
trained here if they are not there yet. Every model sees the same validation images at its own size, in float32. One
rank analyses; under torchrun the others only help to train.
"""
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from timm.models.beit import Beit

from common import distributed, options, report, tables
from common.checkpoint import write_atomically
from common.distributed import print0
from common.errors import UserError
from common.formats import load_model
from common.loader import seed_everything
from common.mae import MAE
from common.tables import PREVIOUS, Row
from common.vit import eval_mode, init_relative_vit, init_vit
from common.weights import fingerprint
from sec4_analysis.features import check_plain
from sec4_analysis.images import batches, draw_images, preprocessing, validation_images

PRESETS = {"demo": {"data": "fractals", "num_images": 512}, "laptop": {"data": "folder"}, "small": {"data": "folder"}}
PRETRAIN, MOCO, FINETUNE = "sec3_benchmark.pretrain_mae", "sec3_benchmark.pretrain_mocov3", "sec3_benchmark.finetune"
# The preset's own models; the paper calls them DeiT-Tiny, MAE-Tiny, MAE-Tiny-FT and MoCov3-Tiny
SUPERVISED = Row("supervised", "supervised", None, ((FINETUNE, {}),))
MAE_ROW = Row("mae", "MAE", None, ((PRETRAIN, {}),))
MAE_FT = Row("mae-ft", "MAE, fine-tuned", None, ((PRETRAIN, {}), (FINETUNE, {"init": PREVIOUS})))
MOCOV3 = Row("mocov3", "MoCo-v3", None, ((MOCO, {}),))
UNTRAINED = Row("random", "random", None)
RANDOM = "random"  # as a checkpoint: the first model with initial values


# Command line

def make_parser(description, norm=True):
    """A figure's parser: data, models, images, execution. `norm`: offer a choice of the final norm, to those that look
    behind it.
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
    group.add_argument("--num-images", type=int, default=1024, help="exactly so many validation images")
    group.add_argument("--order", choices=("drawn", "authors"), default="drawn", help="drawn: by --seed, from all "
                       "classes alike; authors: whole batches in class order until there are more than --num-images")
    group.add_argument("--batch-size", type=int, default=128, help="images at once, and per mini-batch of CKA")
    group.add_argument("--image-seed", type=int, help="draws the images; default: --seed")
    group.add_argument("--seed", type=int, default=0, help="of the preset's own runs and of random models")
    tables.add_rows(parser)
    parser.add_argument("--from-numbers", metavar="FILE", help="draw the picture anew from this .npz and leave")
    options.add_execution(parser)
    return parser


def parse(parser, argv=None):
    """The arguments. --batch-size is the analysis's own, not that of the stages."""
    return tables.parse(parser, argv, presets=PRESETS, own=("batch_size",))


# Models

def given_models(args, words=()):
    """{name: checkpoint} of --models, `words` among the checkpoints. A file that is not there is named before the first
    model is measured or trained; a dry run may name files that are still to be made.
    """
    models = options.named(args.models, "--models")
    if next(iter(models.values())) in words:
        raise UserError(f"--models {args.models[0]}: a random model is the twin of the first one, so name that first")
    if taken := {"file", "allow_pickle"} & models.keys():  # savez's own arguments
        raise UserError(f"--models {taken.pop()}=...: choose another name")
    for name, checkpoint in models.items():
        somewhere_else = checkpoint in words or checkpoint.startswith("timm:")
        if not (args.dry_run or somewhere_else or Path(checkpoint).exists()):
            raise UserError(f"--models {name}={checkpoint}: no weights at {checkpoint}; check the path, or give "
                            f"timm:NAME for timm's hub")
    return models


def start(args):
    """This rank's device. A dry run is for a cluster's login node too, which has no GPU."""
    return distributed.start("cpu" if args.dry_run else args.device)


def sources(args, rows, script):
    """{name: checkpoint} of --models or of the preset's own runs, which are trained or found now."""
    start(args)
    if args.models:
        return given_models(args, words=(RANDOM,))
    results = own_runs(args, rows, script)
    return {row.name: results[row.key]["checkpoint"] if row.stages else RANDOM for row in rows}


def own_runs(args, rows, script):
    """{key of a row: result of its last stage}: the preset's own runs, which are trained or found now."""
    start(args)
    if args.data_path and not args.dry_run:  # too few images: said now, not after hours of training
        draw_images(validation_images(args).labels, args)
    args.seeds = [args.seed]
    results = tables.run_rows(rows, args, (), script)
    tables.require_weights(args)
    return {key: stages[-1] for key, [stages] in results.items()}


def heads_of(args, checkpoints):
    """{name: number of heads} of --num-heads-of."""
    heads = options.named(args.num_heads_of, "--num-heads-of")
    for name, number in heads.items():
        if name not in checkpoints or not number.isdigit() or not int(number):
            raise UserError(f"--num-heads-of {name}={number}: a number for one of {', '.join(checkpoints)}")
    return {name: int(number) for name, number in heads.items()}


def load(name, checkpoints, args, device):
    """One of the models {name: checkpoint}, ready to be measured. A random one is the twin of the first."""
    random = checkpoints[name] == RANDOM
    source = next(iter(checkpoints.values())) if random else checkpoints[name]
    heads = heads_of(args, checkpoints).get(next(iter(checkpoints)) if random else name)
    model = load_model(source, num_heads=heads, img_size=args.given.get("img_size"))
    check_plain(model, source)
    return eval_mode(untrained(model, args.seed) if random else model, device)


def untrained(model, seed):
    """The same model with initial values."""
    seed_everything("weights", seed)
    if isinstance(model, MAE):
        twin = MAE(**model.config)
        twin.statistics = model.statistics
        return twin
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return init_relative_vit(model) if isinstance(model, Beit) else init_vit(model)


# Measuring, writing, drawing

def analyse(args, checkpoints, measure, read=validation_images, **settings):
    """{name: measure(model, batches)} for every model {name: checkpoint} on the images that `read(args)` gives, and
    what a reader should know about it, `settings` included. None on ranks that are not needed any more, and after a
    dry run.
    """
    device = start(args)
    if args.dry_run:
        return None
    models = {name: load(name, checkpoints, args, "cpu") for name in checkpoints}
    first, *others = models
    args.img_size, args.in_chans = preprocessing(models[first], args)[0], models[first].patch_embed.proj.in_channels
    for name in others:
        if (channels := models[name].patch_embed.proj.in_channels) != args.in_chans:
            raise UserError(f"{name} reads {channels} channels and {first} {args.in_chans}: analyse them apart")
    images = read(args)
    if not distributed.is_main():
        return None
    chosen = draw_images(images.labels, args)
    values, about = {}, {}
    for name, checkpoint in checkpoints.items():
        model = eval_mode(models.pop(name), device)
        print0(f"{name}: {checkpoint}, {len(chosen)} images")
        with torch.inference_mode():
            values[name] = measure(model, batches(model, images, chosen, args, device))
        about[name] = {"checkpoint": "/".join(Path(checkpoint).parts[-2:]),
                       "num_heads": model.blocks[0].attn.num_heads, "fingerprint": fingerprint(model.state_dict())}
    return values, {"preset": args.preset, "data": args.data, "images": len(chosen), "order": args.order,
                    "seed": args.seed, "image_seed": args.image_seed, "data_fingerprint": images.fingerprint(),
                    "models": about, **settings}


def figure(args, item, numbers, describe, draw):
    """The numbers first, then the picture from their file; with --from-numbers the picture alone. Returns the arrays.

    `numbers()` gives ({name: array}, what a reader should know about them), or None where this rank leaves, with {}.
    `describe(arrays)` is them to read, in Markdown; `draw(arrays, path)` the picture.
    """
    folder = Path(args.output) / item
    if not args.from_numbers:
        if not args.dry_run:  # a place that cannot be written is found before the work
            folder.mkdir(parents=True, exist_ok=True)
        done = numbers()
        if done is None:
            return {}
        arrays, about = done
        write_atomically(folder / f"{item}.npz", lambda file: np.savez_compressed(file, **arrays))
        where = f"preset {args.preset}" if args.preset else args.data
        report.write_text(folder, item, {"item": item, **about}, f"{item}, {where}: {describe(arrays)}")

    path = Path(args.from_numbers or folder / f"{item}.npz")
    if path.suffix != ".npz":
        raise UserError(f"--from-numbers {path}: give the .npz that this script wrote")
    with np.load(path) as file:
        arrays = dict(file)
    draw(arrays, path.with_suffix(".png"))
    print0(f"drawn: {path.with_suffix('.png')}")
    return arrays


def line_styles():
    """Line style with marker, and colour, for each of up to 42 curves."""
    return zip(cycle(("o-", "s--", "^:", "D-.", "v-", "x--")), cycle(report.COLOURS))
