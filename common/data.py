"""The data sets that --data and --data-path name.

    fractals           generated, labelled images (common/fractals.py); without --data-path
    folder             --data-path holds train/<class>/ and val/<class>/; to pre-train or analyse, any tree of images
    imagenet           the same folders, with exactly 1,000 classes
    cifar10, cifar100  torchvision's, in --data-path (--download fetches them)
"""
import os
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torchvision import datasets as tv

from common.augment import CROP_PCT
from common.distributed import once_per_node, remark
from common.errors import DataError
from common.files import EXTENSIONS, list_images, look_into, report_others
from common.fractals import fractal_set
from common.images import ImageSet
from common.vit import pair

NAMES = ("fractals", "folder", "imagenet", "cifar10", "cifar100")
STATISTICS = {  # channels -> mean and std, in 0..1; ImageNet's for every colour data set, as the paper does
    1: ((0.449,), (0.226,)),
    3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
FRACTAL_CLASSES, FRACTAL_TRAIN, FRACTAL_VAL = 10, 400, 100  # 4,000 images to train on, 1,000 to validate


def labelled_folder(root, in_chans, name):
    """Make a labelled ImageSet of the images in <root>/<class>/. Raises DataError if a class has none."""
    root = os.fspath(root)
    if not os.path.isdir(root):
        raise DataError(f"{root} is not a folder. --data-path must hold train/<class>/ and val/<class>/ (to analyse, "
                        f"any tree will do: --data folder); appendix/tools/split_folder.py makes both of a folder of "
                        f"classes")
    files, loose = images_by_folder(root)
    if empty := [folder for folder, found in files.items() if not found]:
        raise DataError(f"{root}: no image in {', '.join(empty[:5])} (looked for {' '.join(EXTENSIONS)}). It must hold "
                        f"one folder of images for each class, and no other")
    if not files:
        raise DataError(f"{root} holds no folder. It must hold one folder of images for each class")
    if loose:
        remark(f"{root}: {len(loose)} images beside the folders of the classes are passed over, such as {loose[0]}")
    report_odd_levels(root, files)
    return by_class(name, files, in_chans)


def images_by_folder(root):
    """List the images below a folder: {subfolder: [paths]}, sorted, and the paths of images in no subfolder."""
    loose, extensions, folders = look_into(root)
    others = Counter(extensions)
    files = {os.path.basename(folder): list_images(folder, others) for folder in sorted(folders)}
    report_others(root, sum(map(len, files.values())) + len(loose), others)
    return files, loose


def by_class(name, files, in_chans):
    """Make a labelled ImageSet of {class: [paths]}."""
    labels = np.repeat(np.arange(len(files)), list(map(len, files.values())))
    return ImageSet(name, [path for found in files.values() for path in found], labels, list(files), in_chans)


def report_odd_levels(root, files):
    """Print a line if {class: [paths]} look as if the classes' folders were a level deeper or higher than `root`."""
    deep = all(os.path.dirname(path) != os.path.join(root, name) for name in files for path in files[name])
    if deep or len(files) == 1:
        where = f"all images lie deeper, as {next(iter(files.values()))[0]}" if deep else "is this the right folder?"
        remark(f"{root}: its folders are the classes ({len(files)}: {', '.join([*files][:5])}); {where}")


def image_tree(root, in_chans):
    """Make an ImageSet without labels of the images in <root>/train/ if it exists, else of all below the root."""
    train = os.path.join(root, "train")
    return all_images(train if os.path.isdir(train) else root, in_chans)


def all_images(root, in_chans):
    """Make an ImageSet without labels of all images below a folder. Raises DataError if there are none."""
    if not os.path.isdir(root):
        raise DataError(f"--data-path {root} is not a folder")
    if not (paths := list_images(root)):
        raise DataError(f"no image below {root} (looked for {' '.join(EXTENSIONS)})")
    return ImageSet("folder", paths, None, [], in_chans)


def load_images(args):
    """Load the images to pre-train on, an ImageSet; it may have no labels. Raises DataError."""
    if args.data == "imagenet" and args.data_path and not (Path(args.data_path) / "train").is_dir():
        raise DataError(f"{args.data_path}/train is not a folder; --data folder --preset small pre-trains "
                        f"on any tree of images")
    if args.data in ("folder", "imagenet") and args.data_path:
        return image_tree(args.data_path, args.in_chans)
    return load_sets(args, splits=("train",))[0]


def images_to_analyse(args):
    """Load the images to analyse, an ImageSet: those in val/ if --data-path has it, else all below --data-path.

    They have labels if all of them are in subfolders, as in val/<class>/. Raises DataError.
    """
    if args.data != "folder" or not args.data_path:
        return load_sets(args, splits=("val",))[0]
    val = os.path.join(args.data_path, "val")
    root = val if os.path.isdir(val) else os.fspath(args.data_path)
    if os.path.isdir(root) and not look_into(root)[0]:
        files, _ = images_by_folder(root)
        if labelled := {folder: found for folder, found in files.items() if found}:
            return by_class("folder", labelled, args.in_chans)
    return all_images(root, args.in_chans)


def load_sets(args, splits=("train", "val")):
    """Load the labelled training and validation set, a tuple of ImageSets; `splits` may name one of them alone.

    Raises DataError if files or folders are not as --data says, or if the two have different classes.
    """
    if args.data != "fractals" and not args.data_path:
        raise DataError(f"--data {args.data} needs --data-path; without data, use --data fractals")
    if args.data == "fractals" and args.data_path:
        raise DataError(f"--data-path {args.data_path} is not read with --data fractals: leave it out "
                        f"(--preset demo), or pass --data folder")
    if args.data == "fractals":
        sets = fractals(args, {split: FRACTAL_TRAIN if split == "train" else FRACTAL_VAL for split in splits})
    elif args.data in ("folder", "imagenet"):
        sets = [labelled_folder(Path(args.data_path) / split, args.in_chans, args.data) for split in splits]
    else:
        sets = [cifar(args, split == "train") for split in splits]
    train, val = sets[0], sets[-1]
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))
        raise DataError(f"{args.data_path}: train has {len(train.classes)} classes and val {len(val.classes)}; "
                        f"in one of them only: {', '.join(map(str, odd[:5]))}")
    if args.data == "imagenet" and len(train.classes) != 1000:
        raise DataError(f"{args.data_path}: ImageNet-1k has 1000 classes, found {len(train.classes)}; "
                        f"use --data folder for other sets")
    return tuple(sets)


def fractals(args, splits):
    """Load generated images: {split: images per class} -> list of ImageSets.

    They have the size to which evaluation resizes, so that it leaves them as they are.
    """
    size = tuple(int(side / CROP_PCT) for side in pair(args.img_size))
    sets = []
    for split, per_class in splits.items():
        images, labels = fractal_set(Path(args.output) / "data", split, FRACTAL_CLASSES, per_class, size)
        sets.append(ImageSet(f"fractals-{split}", images, labels, list(range(FRACTAL_CLASSES)), args.in_chans))
    return sets


def cifar(args, train):
    """Load CIFAR-10 or CIFAR-100, its training or its test images, as an ImageSet."""
    dataset = {"cifar10": tv.CIFAR10, "cifar100": tv.CIFAR100}[args.data]
    try:
        with once_per_node() as mine:
            if mine and args.download:
                dataset(args.data_path, train=train, download=True)
        cifar = dataset(args.data_path, train=train)
    except RuntimeError as error:
        raise DataError(f"{args.data} is not whole in {args.data_path} ({error}); --download fetches it") from None
    return ImageSet(args.data, cifar.data, np.asarray(cifar.targets), cifar.classes, args.in_chans)


def channel_statistics(in_chans, mean=None, std=None):
    """Return {"mean", "std"}, a number per channel in 0..1: those that are given, else the usual ones.

    Raises DataError for a wrong number of values and for values outside 0..1.
    """
    usual = STATISTICS.get(in_chans, ((0.5,) * in_chans, (0.25,) * in_chans))
    mean, std = list(mean or usual[0]), list(std or usual[1])
    if len(mean) != in_chans or len(std) != in_chans:
        raise DataError(f"--mean has {len(mean)} and --std {len(std)} numbers, --in-chans is {in_chans}")
    if not all(0 <= m <= 1 for m in mean) or not all(0 < s <= 1 for s in std):
        raise DataError(f"--mean {mean} --std {std}: both are of values in 0..1, so divide those of bytes by 255")
    return {"mean": mean, "std": std}


def statistics(args):
    """Return mean and std per channel of a run's images, two float tensors (C,), in 0..255."""
    usual = channel_statistics(args.in_chans, args.mean, args.std)
    return tuple(torch.tensor(values) * 255 for values in usual.values())
