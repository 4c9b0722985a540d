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
    """Return the indices of the images to analyse, in the order of --order. Raises UserError if there are too few."""
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
    """Draw the indices of `count` images in random order, as evenly from all classes as possible."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    rank = np.empty(len(labels), int)  # of each image within its class, in this random order
    for label in np.unique(labels):
        members = order[labels[order] == label]
        rank[members] = np.arange(len(members))
    by_rank = order[np.argsort(rank[order], kind="stable")]  # the first image of every class, then the second ones, ...
    return rng.permutation(by_rank[:count])


def preprocessing(model, args):
    """Return a model's image size [height, width], and the mean and std of its images in 0..255.

    Mean and std are those of --mean and --std; where one is not given, the checkpoint's. The crop is the paper's for
    all models, so that the same token covers the same part of the image in each of them.
    """
    _, grid, patch = geometry(model)
    theirs = getattr(model, "statistics", None) or {}
    mean, std = (getattr(args, key) or theirs.get(key) for key in ("mean", "std"))
    normalisation = channel_statistics(model.patch_embed.proj.in_channels, mean, std)
    return [n * p for n, p in zip(grid, patch)], *(torch.tensor(values) * 255 for values in normalisation.values())


def batches(model, images, chosen, args, device, what="analysing"):
    """Yield the chosen images, normalised, as batches (B, C, H, W) whose sizes differ by one at most.

    what: the title of the progress bar.
    """
    size, mean, std = preprocessing(model, args)
    parts = np.array_split(chosen, math.ceil(len(chosen) / args.batch_size))
    keys = [[(0, int(index)) for index in part] for part in parts]
    loader = data_loader(Views(images, eval_transform(size), seed=0), keys, args.workers, device)
    for batch in on_device(progress(loader, what), device, mean, std):
        yield batch["image"]
