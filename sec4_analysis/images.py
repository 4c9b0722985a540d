"""The images that Section 4 analyses: the same for every model, each model reading them at its own size."""
import math

import numpy as np
import torch

from common.augment import eval_transform
from common.data import channel_statistics
from common.errors import UserError
from common.loader import Views, data_loader, on_device
from common.watch import progress
from sec4_analysis.activations import geometry


def draw_images(images, args):
    """Indices of the images to analyse. Drawn: every class as often as any other, up to one, in mixed order."""
    labels = np.zeros(len(images), int) if images.labels is None else images.labels
    if args.order == "authors":
        count = (args.num_images // args.batch_size + 1) * args.batch_size  # 1,152 for 1,024 in batches of 128
        chosen = np.argsort(labels, kind="stable")[:count]
    else:
        count = args.num_images
        chosen = draw_balanced(labels, count, args.seed if args.image_seed is None else args.image_seed)
    if len(chosen) < count or count < 1:
        raise UserError(f"--num-images {args.num_images} needs {count} images, there are {len(labels)}: lower "
                        f"--num-images")
    return chosen


def draw_balanced(labels, count, seed):
    """Draw indices of `count` images in random order; numbers of images per class differ by one at most, as far as the
    classes are large enough.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    rank = np.empty(len(labels), int)  # of each image within its class, in this random order
    for label in np.unique(labels):
        members = order[labels[order] == label]
        rank[members] = np.arange(len(members))
    by_rank = order[np.argsort(rank[order], kind="stable")]  # the first image of every class, then the second ones, ...
    return rng.permutation(by_rank[:count])


def preprocessing(model, args):
    """Image size, mean and std (0..255) of a model: --mean and --std, each where not given as its checkpoint says. The
    crop is the paper's for all models, so that a token shows each of them the same part of the image.
    """
    _, grid, patch = geometry(model)
    theirs = getattr(model, "statistics", None) or {}
    mean, std = (getattr(args, key) or theirs.get(key) for key in ("mean", "std"))
    normalisation = channel_statistics(model.patch_embed.proj.in_channels, mean, std)
    return [n * p for n, p in zip(grid, patch)], *(torch.tensor(values) * 255 for values in normalisation.values())


def batches(model, images, chosen, args, device, what="analysing"):
    """Yields the chosen images, normalised, (B, C, H, W), in batches whose sizes differ by one at most. `what` names
    the progress bar.
    """
    size, mean, std = preprocessing(model, args)
    parts = np.array_split(chosen, math.ceil(len(chosen) / args.batch_size))
    keys = [[(0, int(index)) for index in part] for part in parts]
    loader = data_loader(Views(images, eval_transform(size), seed=0), keys, args.workers, device)
    for batch in on_device(progress(loader, what), device, mean.to(device), std.to(device)):
        yield batch["image"]
