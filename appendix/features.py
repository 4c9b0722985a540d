"""Frozen features for the probes: of any checkpoint and layer, class token or mean of the patch tokens; cached.

The hash in outputs/features/<hash>.pt covers weights, images and the settings that decide a feature. linear_probe.py
and knn_probe.py therefore share the file.
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
    """Add the arguments that the probes share: data, model, weights, layer and pooling; return the parser."""
    options.add_data(parser)
    options.add_model(parser, MODELS)
    group = parser.add_argument_group("features")
    group.add_argument("--init", metavar="CHECKPOINT", help="a checkpoint: ours, which holds model and image size, or "
                                                            "another project's (common/pretrained.py)")
    group.add_argument("--layer", type=Int(0), default=0,
                       help="block whose output is taken, from 1; 0: the last one, followed by the final norm")
    group.add_argument("--pooling", choices=POOLING, help="class token or mean of the patch tokens; default: token, "
                                                          "unless the model has none or its head reads the mean")
    return parser


def add_execution(parser, save_to, kept=True):
    """Add the arguments of options.add_execution that apply to features, which are float32.

    save_to: the help of --save-to. kept: whether the script caches its features, so that --fresh makes sense.
    """
    group = parser.add_argument_group("execution")
    group.add_argument("--output", default=str(options.ROOT / "outputs"), metavar="DIR", help="where results are kept")
    group.add_argument("--save-to", metavar="FILE", help=save_to)
    if kept:
        group.add_argument("--fresh", action="store_true", help="compute features again")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    group.add_argument("--micro-batch", type=Int(1), default=512, help="images at once on a device, 256 at most")
    group.add_argument("--workers", type=Int(-1, 256), default=-1, help="processes that load, per rank; -1: by cores")


def build_encoder(args, device):
    """Build the network of --init without its head, in evaluation mode on the device.

    Returns the network, the fingerprint of its weights, and args completed by what the weights say. Raises UserError if
    they have no class token or no such block, or if their pooling contradicts --pooling.
    """
    if not args.init:
        raise UserError("--init is missing: the weights whose features are probed")
    weights = read_weights(args.init)
    # fc_norm follows the mean in classifiers that average patch tokens. Other models without a class token have their
    # norm before the mean
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
    """Compute features (B, D) of images (B, C, H, W) from block `layer`; 0: from the last one, after the final norm."""
    [(patches, prefix)] = vit.forward_intermediates(images, indices=[layer - 1 if layer else len(vit.blocks) - 1],
                                                    norm=layer == 0, output_fmt="NLC", return_prefix_tokens=True,
                                                    stop_early=True, intermediates_only=True)
    pooled = prefix[:, 0] if pooling == "token" else patches.mean(dim=1)
    return pooled if layer or vit.fc_norm is None else vit.fc_norm(pooled)  # the identity unless a classifier averages


@torch.inference_mode()
def extract(vit, images, transform, args, device, view=0, unreadable=None):
    """Compute the features of all images: (N, D), float32, on the CPU of every rank; each rank computes its share.

    unreadable: a list to which the indices of unreadable images are added if args.on_bad_image is "skip"; their rows
    have no meaning.
    """
    rank, world = distributed.rank(), distributed.world_size()
    loader = eval_loader(images, transform, min(args.micro_batch, 256), args.workers, device, rank, world,
                         epoch=view, on_bad_image=getattr(args, "on_bad_image", None))
    everything = torch.zeros(len(images), vit.embed_dim)
    for batch in on_device(progress(loader, "features"), device, *statistics(args)):
        everything[batch["index"]] = features(vit, batch["image"], args.layer, args.pooling).float().cpu()
        if unreadable is not None:
            unreadable += batch["bad"][batch["bad"] >= 0].tolist()
    return distributed.all_sum(everything)  # exact: all ranks but one hold zeros


def settings_of(args):
    """Return the settings that decide a feature; weights and images decide it too."""
    names = ("model", "img_size", "patch_size", "num_heads", "layer", "pooling", "mean", "std")
    return {name: getattr(args, name) for name in names}


def kept_features(path):
    """Read the features that an earlier run wrote to `path`; return None if it is absent or damaged."""
    try:
        return load_verified(path)["features"]
    except FileNotFoundError:
        return None
    except Exception as error:  # damaged bytes can raise any exception
        print0(f"{path} is damaged ({type(error).__name__}): computed again")
        return None


def cached_features(encoder, fingerprint, images, args, device, fresh=False, transform=None, view=0):
    """Return the features of `extract` from their file, or compute and write them if it is absent or `fresh` is set.

    transform: None is the evaluation's centre crop. view: the number that seeds a random transform.
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
