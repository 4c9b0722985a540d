"""Subsets of a labelled data set for pre-training (Table 3), drawn at random or listed in a file.

    --subset 1%      balanced: floor(1 % of the images), class sizes differ by at most one; 1% is contained in 10%
    --subset lt      long-tailed: ImageNet-LT's class sizes, assigned to the classes at random
    --subset FILE    the images that FILE names, one a line, in either of the two official forms:
                     n01440764_10043.JPEG (SimCLR, MSN, suncet) or train/n01440764/n01440764_190.JPEG 0 (ImageNet-LT)

suncet names its files by the fraction WITHOUT labels: its 99percent.txt lists 1 % of ImageNet. A drawn subset depends
on the labels and SEED alone, not on a run's --seed. So it is fixed, as an official list would be.
"""
import os
import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np

from common import options
from common.data import image_tree, load_images, load_sets
from common.distributed import print0
from common.errors import DataError, UserError
from common.optim import steps_per_epoch

SEED = 0
# Our fit to ImageNet-LT's 1,000 class sizes (115,846 images): samples of 5 + 554 x Pareto of power 6, at most 1,280,
# from a data set whose largest class has 1,300 images. The tests compare mean, median and quantiles with the true ones.
TAIL_POWER, TAIL_LEAST, TAIL_SCALE, TAIL_MOST, TAIL_LARGEST_CLASS = 6, 5, 554, 1280, 1300
LINE = re.compile(r"(?P<path>.*[^/]/[^/\s]+)(?:\s+\d+)?|(?P<prefix>[^/\s]+)_[^/_\s]+\.\w+")


def add_argument(parser):
    group = parser.add_argument_group("part of the data (Table 3)")
    group.add_argument("--subset", metavar="PART", help="1%%, 10%%, lt or a list of files; default: all. Needs labels")
    group.add_argument("--pretrain-path", metavar="DIR", help="pre-train on all images of this folder instead of those "
                                                              "of --data")
    group.add_argument("--equal", choices=("epochs", "iterations"), default="epochs", help="what the pre-training on a "
                       "part or on other images has in common with that on all images of --data")


def pretraining_images(args):
    """Return (settings, images) of a pre-training on --data, its --subset, or --pretrain-path.

    In the settings, epochs and warm-up follow --equal. --equal and --pretrain-path are cleared: the number of epochs
    and the fingerprint of the images stand for them in a run's identity.
    """
    if args.subset and args.pretrain_path:
        raise UserError(f"--subset {args.subset} is a part of --data, and --pretrain-path {args.pretrain_path} takes "
                        f"its place: leave one of them out")
    if args.subset is None and args.pretrain_path is None:
        images = load_images(args)
        return options.replaced(args, equal=None), images
    [whole] = load_sets(args, splits=("train",))
    if args.pretrain_path:
        images = image_tree(args.pretrain_path, args.in_chans)
    else:
        images = part_of(whole, args.subset)
        print0(f"--subset {args.subset}: {len(images)} images; smallest, median and largest class: "
               f"{', '.join(f'{size:g}' for size in describe(images)['images_per_class'])}")
    longer = equal_iterations(args, whole, images) if args.equal == "iterations" else {}
    if longer:
        print0(f"--equal iterations: {longer['epochs']} epochs of these are as many steps as {args.epochs} of all")
    return options.replaced(args, equal=None, pretrain_path=None, **longer), images


def equal_iterations(args, whole, part):
    """Return {"epochs", "warmup_epochs"} on the ImageSet `part` for as many steps as --epochs on `whole`.

    Both are rounded; the warm-up keeps its share of the epochs.
    """
    ratio = steps_per_epoch(whole, args.batch_size) / steps_per_epoch(part, args.batch_size)
    epochs = max(1, round(args.epochs * ratio))
    return {"epochs": epochs, "warmup_epochs": min(round(args.warmup_epochs * ratio), epochs - 1)}


def part_of(images, subset, seed=SEED):
    """Select a subset ("1%", "lt" or a list file) of an ImageSet, in the order of the whole. Raises DataError."""
    percent = re.fullmatch(r"(\d+(?:\.\d+)?)%", subset)
    if percent:
        chosen = draw(images.labels, balanced(class_sizes(images), float(percent[1]) / 100, seed, images), seed)
    elif subset == "lt":
        chosen = draw(images.labels, long_tailed(class_sizes(images), seed), seed)
    elif Path(subset).is_file():
        chosen = listed(images, subset)
    else:
        raise DataError(f"--subset {subset} is no percentage such as 1%, not lt, and no file: a list of images, one a "
                        f"line")
    return replace(images, name=f"{images.name} {Path(subset).name}", images=images.images[chosen],
                   labels=images.labels[chosen])


def describe(images):
    """Count an ImageSet: {"images"} and, with labels, {"classes", "images_per_class": [min, median, max]}."""
    if images.labels is None:
        return {"images": len(images)}
    sizes = class_sizes(images)
    return {"images": len(images), "classes": int((sizes > 0).sum()),
            "images_per_class": [int(sizes.min()), float(np.median(sizes)), int(sizes.max())]}


def class_sizes(images):
    return np.bincount(images.labels, minlength=len(images.classes))


# Drawn subsets

def balanced(sizes, fraction, seed, images):
    """Compute how many images to take of each class (C,) for a balanced subset of floor(fraction * all) images.

    Random classes get one image more, so that the total is exact. On ImageNet this gives 811 x 13 + 189 x 12 and
    116 x 129 + 884 x 128, as in the official lists. Raises DataError for a class with too few images.
    """
    # 1e-6 is added since 0.29 * 100 is 28.999999999999996
    each, remainder = divmod(int(fraction * sizes.sum() + 1e-6), len(sizes))
    counts = np.full(len(sizes), each)
    counts[np.random.default_rng(seed).permutation(len(sizes))[:remainder]] += 1
    short = np.flatnonzero(counts > sizes)
    if counts.sum() == 0 or len(short):
        why = "that is less than one image"
        if len(short):
            why = (f"class {images.classes[short[0]]} has {sizes[short[0]]} images of the {counts[short[0]]} needed, "
                   f"{len(short)} classes are too small")
        raise DataError(f"{images.name}: no class-balanced {100 * fraction:g}% of {sizes.sum()} images in {len(sizes)} "
                        f"classes: {why}. Choose another percentage")
    return counts


def long_tailed(sizes, seed):
    """Compute how many images to take of each class (C,) for a long-tailed subset.

    Quantiles of ImageNet-LT's distribution, scaled by the largest class, are assigned to the classes in random order.
    Each class gives at least one image and at most all it has.
    """
    share = (np.arange(len(sizes)) + 0.5) / len(sizes)  # of the classes that are larger than this one
    profile = np.minimum(TAIL_MOST, TAIL_LEAST + TAIL_SCALE * (share ** (-1 / TAIL_POWER) - 1))
    counts = np.empty(len(sizes), int)
    counts[np.random.default_rng(seed).permutation(len(sizes))] = np.round(
        profile * sizes.max() / TAIL_LARGEST_CLASS)
    return np.minimum(np.maximum(counts, 1), sizes)


def draw(labels, counts, seed):
    """Draw counts[c] images of each class c: their indices, ascending.

    They are the first in an order that depends on the seed and c alone. So a draw with smaller counts is contained in
    one with larger counts.
    """
    drawn = [np.random.default_rng((seed, c)).permutation(np.flatnonzero(labels == c))[:count]
             for c, count in enumerate(counts)]
    return np.sort(np.concatenate(drawn))


# Official lists

def read_list(path):
    """Read the paths of a list in either official form; all include the class's folder. Raises DataError."""
    names = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        match = LINE.fullmatch(line.strip())
        if line.strip() and not match:
            raise DataError(f"{path}, line {number}: {line.strip()[:80]!r} is neither n01440764_10043.JPEG nor "
                            f"train/n01440764/n01440764_190.JPEG 0")
        if match:
            names.append(match["path"] or f"{match['prefix']}/{match[0]}")
    return names


def listed(images, path):
    """Return the indices, ascending, of the images that a list names. Raises DataError if one is missing or twice."""
    if not images.from_files:
        raise DataError(f"--subset {path}: a list needs image files in class folders, and {images.name} has none; "
                        f"choose a percentage or lt")
    by_end = defaultdict(list)  # the last two parts of a path -> indices
    for index, file in enumerate(images.images):
        by_end[tuple(file.split("/")[-2:])].append(index)
    names = read_list(path)
    chosen = [best_match(name, images, by_end[tuple(name.split("/")[-2:])]) for name in names]
    different = {name if index is None else index for name, index in zip(names, chosen)}
    if len(different) != len(names) or not names:
        raise DataError(f"{path} names {len(names)} images, {len(names) - len(different)} of them twice: no such list "
                        f"is official, fetch it again")
    if missing := [name for name, index in zip(names, chosen) if index is None]:
        raise DataError(f"{path} names {len(names)} images, {len(missing)} of them are not among the {len(images)} of "
                        f"{images.name} (first: {missing[0]}): give the data set that the list was made for")
    return np.sort(chosen)


def best_match(name, images, candidates):
    """Return the candidate, an index, whose path has the longest common ending with `name`, an entry of a list.

    The ending must include the folder of the image's class. Returns None if no candidate has such an ending.
    """
    def agreement(index):
        path, entry = images.images[index].split("/"), name.split("/")
        parts = len(os.path.commonprefix([path[::-1], entry[::-1]]))
        of_class = str(images.classes[images.labels[index]]) in path[-parts:-1]
        return of_class * parts, -len(path)  # the shortest path of equals: for a/1.png that, rather than a/a/1.png

    best = max(candidates, key=agreement, default=None)
    return None if best is None or not agreement(best)[0] else best
