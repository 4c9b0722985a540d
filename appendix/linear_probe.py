"""Linear probing: how well does one linear layer read the classes from frozen features?

    python appendix/linear_probe.py --init outputs/pretrain_mae/RUN/weights.pt                   # on generated images
    python appendix/linear_probe.py --init FILE --preset small --data-path DIR --layer 8 --pooling avg
    torchrun --nproc-per-node=8 appendix/linear_probe.py --init FILE --data-path IMAGENET --views 90
    python appendix/linear_probe.py --init FILE --data-path DIR --shots 1 5 10                  # so many labels a class

Published: MAE-Tiny 23.4 on ImageNet-1k, by a protocol that no source gives. The default is the official MAE's: class
token after the last norm, batch norm without scale, LARS at 0.1 x batch / 256, batch 16384, 90 epochs. The official
protocol crops and flips at random in every epoch. Here, features are computed once, of the centre crop or of --views
random crops that the epochs use in turn; 90 views are the official protocol. `--recipe quick` is our own: AdamW for 20
epochs. --shots fits logistic regressions on a few images of each class instead (appendix/few_shots.py). Once features
are computed, each takes seconds. Writes outputs/linear_probe/<data>-<model>-<weights>-<hash>.json.
"""
import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from timm.optim import Lars
from torch import nn

from appendix import few_shots
from appendix.features import add_arguments, add_execution, build_encoder, cached_features
from appendix.probes import check_save_to, write_result
from common import distributed, entry, options
from common.augment import pretrain_transform
from common.data import load_sets
from common.distributed import print0
from common.errors import UserError
from common.loader import epoch_order, seed_everything
from common.measures import hits
from common.optim import learning_rate, set_learning_rate
from common.ranges import Float, Int
from common.watch import progress
from sec3_benchmark.evaluate import count_classes

READS = "labels"
PRESETS = {  # base_lr gives the official peak of 6.4 at a smaller batch
    "demo": dict(data="fractals", batch_size=512, base_lr=3.2),
    "laptop": dict(data="folder", batch_size=512, base_lr=3.2),
    "small": dict(data="folder", batch_size=512, base_lr=3.2),
}
RECIPES = {"official": {}, "quick": dict(epochs=20, batch_size=512, base_lr=5e-3, warmup_epochs=1)}


def build_parser():
    parser = add_arguments(options.make_parser(__doc__))
    group = parser.add_argument_group("recipe (official MAE)")
    group.add_argument("--recipe", choices=tuple(RECIPES), default="official", help="quick: AdamW, few epochs")
    group.add_argument("--views", type=Int(0), default=0,
                       help="random crops of each image, used in turn by the epochs; 0: the centre crop")
    group.add_argument("--epochs", type=Int(1), default=90)
    group.add_argument("--batch-size", type=Int(2), default=16384)
    group.add_argument("--base-lr", type=Float(0), default=0.1, help="per 256 images: the peak is base * batch / 256")
    group.add_argument("--warmup-epochs", type=Int(0), default=10, help="linear from 0")
    group.add_argument("--seed", type=Int(0), default=0)
    group = parser.add_argument_group("few labels, in place of all of them")
    group.add_argument("--shots", type=Int(1), nargs="+", metavar="K", help="images of each class")
    group.add_argument("--draws", type=Int(1), help="random draws of the images; default: 5")
    add_execution(parser, save_to="also copy the probed weights to this file, for a row's next stage")
    return parser


def build_probe(dim, num_classes):
    """Build batch norm without scale and shift, followed by a linear layer with weights of deviation 0.01."""
    probe = nn.Sequential(nn.BatchNorm1d(dim, affine=False, eps=1e-6), nn.Linear(dim, num_classes))
    nn.init.trunc_normal_(probe[1].weight, std=0.01)
    nn.init.zeros_(probe[1].bias)
    return probe


def make_optimizer(parameters, recipe):
    """Build LARS (steps of 0.001 of a matrix's norm, plain SGD for a bias) for the official recipe, else AdamW."""
    groups = [{"params": [p], "lr_scale": 1.0, "always_adapt": p.ndim > 1} for p in parameters]
    return Lars(groups, lr=0.0, momentum=0.9, eps=0.0) if recipe == "official" else \
        torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0)


def fit_probe(probe, view_of, labels, args):
    """Train the probe on features and return the loss of the last batch. Every rank does the same on its own device.

    view_of: epoch -> features (N, D). labels: (N,). Raises FloatingPointError if the loss is not finite.
    """
    optimizer = make_optimizer(probe.parameters(), args.recipe)
    N, steps = len(labels), len(labels) // args.batch_size
    if not steps:
        raise UserError(f"{N} training images, fewer than one batch of {args.batch_size}: lower "
                        f"--batch-size, and raise --base-lr, which is multiplied by the batch")
    for step in progress(range(args.epochs * steps), "training the probe", unit="step"):
        epoch, first = step // steps, step % steps * args.batch_size
        if first == 0:
            order = torch.from_numpy(epoch_order(N, args.seed, epoch)).to(labels.device)
            view = view_of(epoch)
        chosen = order[first:first + args.batch_size]
        set_learning_rate(optimizer, learning_rate(step, peak=args.base_lr * args.batch_size / 256,
                                                   total_steps=args.epochs * steps,
                                                   warmup_steps=args.warmup_epochs * steps))
        loss = F.cross_entropy(probe(view[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if not math.isfinite(last := loss.item()):
        raise FloatingPointError(f"the probe's loss is {last} after {args.epochs} epochs: lower --base-lr "
                                 f"{args.base_lr:g}")
    return last


@torch.inference_mode()
def probe_accuracy(probe, val, targets):
    """Return the accuracy on features val (M, D) with labels targets (M,): {"top1", "top5"} in percent."""
    scores = probe.eval()(val)
    return {f"top{k}": 100 * hits(scores, targets, k).mean().item() for k in (1, 5)}


def main(args):
    """Train and evaluate the probe; return {"top1", "top5", "checkpoint": the probed weights, ...}.

    With --shots, {"shots": {images of each class: [top-1 of each draw]}, ...} instead of "top1" and "top5".
    """
    check_save_to(args)
    device = distributed.start_process_group(args.device)
    encoder, fingerprint, args = build_encoder(args, device)
    train_set, val_set = load_sets(args)
    num_classes = count_classes(train_set)
    views = max(1, args.views)
    crop = pretrain_transform(args.img_size, interpolation="bicubic") if args.views else None  # None: the centre crop

    @lru_cache(maxsize=1)  # keep one view in memory: there may be 90
    def train_view(view, fresh):
        return cached_features(encoder, fingerprint, train_set, args, device, fresh, crop, view).to(device)

    def view_of(epoch):  # --fresh recomputes a view in the first epoch that uses it
        return train_view(epoch % views, args.fresh and epoch < views)

    val = cached_features(encoder, fingerprint, val_set, args, device, args.fresh).to(device)
    labels, targets = (torch.as_tensor(images.labels).to(device) for images in (train_set, val_set))
    if args.shots:
        train, draws = view_of(0), args.draws or 5
        found = {shots: few_shots.accuracies(train, labels, val, targets, shots, draws, args.seed)
                 for shots in args.shots}
        print0(few_shots.table(found))
        return write_result("linear_probe", args, fingerprint, (train_set, val_set), {"shots": found})
    seed_everything("weights", args.seed)
    probe = build_probe(encoder.embed_dim, num_classes).to(device)
    loss = fit_probe(probe, view_of, labels, args)
    result = {**probe_accuracy(probe, val, targets), "train_loss": loss}
    print0("published for MAE-Tiny on ImageNet-1k: 23.4, protocol not given")
    return write_result("linear_probe", args, fingerprint, (train_set, val_set), result)


if __name__ == "__main__":
    entry.run_script(main, build_parser(), PRESETS, RECIPES)
