"""Frozen features for the probes: any checkpoint, any layer, class token or mean of the patches; computed once, kept.

The file outputs/features/<hash>.pt is named after the weights, the images and the settings, so that linear_probe.py and
knn_probe.py share it, whatever they are told besides.
"""
import hashlib
import json
from pathlib import Path

import torch

from common import distributed, options
from common.augment import eval_transform
from common.checkpoint import load_verified, require_finite, save_torch
from common.data import statistics
from common.distributed import print0
from common.errors import UserError
from common.filling import load_encoder
from common.loader import eval_loader, on_device
from common.pretrained import read_weights
from common.ranges import Int
from common.shapes import tokens_of
from common.vit import MODELS, build_model, eval_mode
from common.watch import progress

POOLING = ("token", "avg")


def add_arguments(parser):
    """The arguments of both probes; returns the parser."""
    options.add_data(parser)
    options.add_model(parser, MODELS)
    group = parser.add_argument_group("features")
    group.add_argument("--init", metavar="CHECKPOINT", help="weights: ours, which say their size and model themselves, "
                                                            "or another project's (common/pretrained.py)")
    group.add_argument("--layer", type=Int(0), default=0,
                       help="block whose output is taken, from 1; 0: the last one, followed by the final norm")
    group.add_argument("--pooling", choices=POOLING, help="class token, the default, or mean of the patch tokens; a "
                                                          "classifier of the mean says so itself")
    return parser


def add_execution(parser, save_to, kept=True):
    """What of options.add_execution holds here: features are float32, and an unreadable image is an error. `save_to` is
    the help of --save-to; `kept`: features are kept and found again.
    """
    group = parser.add_argument_group("execution")
    group.add_argument("--output", default=str(options.ROOT / "outputs"), metavar="DIR", help="where results are kept")
    group.add_argument("--save-to", metavar="FILE", help=save_to)
    if kept:
        group.add_argument("--fresh", action="store_true", help="compute features anew")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    group.add_argument("--micro-batch", type=Int(1), default=512, help="most images at once on a device, up to 256")
    group.add_argument("--workers", type=Int(-1, 256), default=-1, help="loading processes per rank; -1: by the cores")


def build_encoder(args, device):
    """The network of --init without its head, the fingerprint of its weights, and settings as these say."""
    if not args.init:
        raise UserError("--init is missing: the weights whose features are probed")
    weights = read_weights(args.init)
    # a norm behind the mean: an averaging classifier; some have no class token, and their norm in front of the mean
    pool = "avg" if "fc_norm.weight" in weights.state else "token" if "cls_token" in weights.state else ""
    args = options.resolve(args, weights)
    if pool != "token" and args.pooling is None:
        print0("as the weights say: --pooling avg")
    if args.pooling == "token" and pool == "":
        raise UserError(f"{args.init} has no class token: leave --pooling token out")
    if args.pooling == "token" and pool == "avg" and not args.layer:
        raise UserError(f"{args.init} was fine-tuned on the mean of its patch tokens: leave --pooling token out, or "
                        f"take a block's output (--layer)")
    vit = build_model(args.model, img_size=args.img_size, patch_size=args.patch_size, in_chans=args.in_chans,
                      num_heads=args.num_heads, num_classes=0, global_pool=pool,
                      **tokens_of(weights, args.model, args.img_size, args.patch_size))
    print0(load_encoder(vit, weights))
    if args.layer > len(vit.blocks):
        raise UserError(f"--layer {args.layer}: from 1 to {len(vit.blocks)}, the model's blocks, or 0")
    return eval_mode(vit, device), weights.fingerprint, options.replaced(args, pooling=args.pooling or pool or "avg")


def features(vit, images, layer=0, pooling="token"):
    """Images (B, C, H, W) -> (B, D): block `layer`'s output, the last one's (0) after the final norm."""
    [(patches, prefix)] = vit.forward_intermediates(images, indices=[layer - 1 if layer else len(vit.blocks) - 1],
                                                    norm=layer == 0, output_fmt="NLC", return_prefix_tokens=True,
                                                    stop_early=True, intermediates_only=True)
    pooled = prefix[:, 0] if pooling == "token" else patches.mean(dim=1)
    return pooled if layer or vit.fc_norm is None else vit.fc_norm(pooled)  # an identity but in averaging classifiers


@torch.inference_mode()
def extract(vit, images, transform, args, device, view=0, unreadable=None):
    """Features (N, D) of all images, float32, on the CPU of every rank; each rank computes its share. With
    args.on_bad_image "skip" it adds the numbers of the unreadable ones, whose rows mean nothing, to a list.
    """
    mean, std = (values.to(device) for values in statistics(args))
    rank, world = distributed.rank(), distributed.world_size()
    loader = eval_loader(images, transform, min(args.micro_batch, 256), args.workers, device, rank, world,
                         epoch=view, on_bad_image=getattr(args, "on_bad_image", None))
    everything = torch.zeros(len(images), vit.embed_dim)
    for batch in on_device(progress(loader, "features"), device, mean, std):
        everything[batch["index"]] = features(vit, batch["image"], args.layer, args.pooling).float().cpu()
        if unreadable is not None:
            unreadable += batch["bad"][batch["bad"] >= 0].tolist()
    return distributed.all_sum(everything)  # of zeros and one rank's values: exact


def settings_of(args):
    """What decides a feature, beside weights and images."""
    names = ("model", "img_size", "patch_size", "num_heads", "layer", "pooling", "mean", "std")
    return {name: getattr(args, name) for name in names}


def kept_features(path):
    """The features in a file of an earlier run; None if there is none, or it is damaged."""
    try:
        return load_verified(path)["features"]
    except FileNotFoundError:
        return None
    except Exception as error:  # damaged bytes can raise any exception
        print0(f"{path} is damaged ({type(error).__name__}): computed anew")
        return None


def cached_features(encoder, fingerprint, images, args, device, fresh=False, transform=None, view=0):
    """`extract`, or its file unless `fresh`. `transform` None is the evaluation's crop; `view` numbers the draws of
    another one.
    """
    settings = settings_of(args)
    if transform is not None:
        settings["view"] = view
    key = json.dumps([fingerprint, images.fingerprint(), images.name, settings], sort_keys=True)
    path = Path(args.output) / "features" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt"
    kept = kept_features(path) if distributed.is_main() and not fresh else None
    if distributed.broadcast_object(kept is not None):
        return kept if kept is not None else load_verified(path)["features"]
    values = extract(encoder, images, transform or eval_transform(args.img_size), args, device, view)
    require_finite(path, {"feature": values.numpy()})
    if distributed.is_main():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_torch(path, {"features": values})
    return values
