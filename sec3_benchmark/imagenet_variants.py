"""Top-1 accuracy on ImageNet-1k's validation images, on the same with reassessed labels (ReaL), and on ImageNetV2.

ReaL (Beyer et al. 2020): real.json holds a list of correct classes for each validation image, in the order of the
images' numbers; images with an empty list are not scored (3,163 of 50,000). ImageNetV2 (Recht et al. 2019), matched
frequency: 10,000 new images in folders named by class number, 0 to 999.
"""
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from common import distributed
from common.augment import eval_transform
from common.data import channel_statistics, labelled_folder
from common.errors import DataError
from common.loader import eval_loader, on_device
from common.watch import progress


@torch.inference_mode()
def predictions(model, images, device, workers=-1, batch_size=256):
    """Predict the class of every image: (N,) int64, complete on every rank.

    In float32, with the resize and centre crop of all evaluations. model: on the device, in eval mode, with a `config`;
    images are normalised by its `statistics` (mean, std) if it has that attribute, else by ImageNet's. Raises
    FloatingPointError for scores that are not finite.
    """
    theirs = getattr(model, "statistics", None) or {}
    mean, std = (255 * torch.tensor(values, device=device) for values in channel_statistics(3, **theirs).values())
    loader = eval_loader(images, eval_transform(model.config["img_size"]), batch_size, workers, device,
                         distributed.rank(), distributed.world_size())
    best = torch.zeros(len(images), dtype=torch.int64, device=device)
    for batch in on_device(progress(loader, images.name), device, mean, std):
        logits = model(batch["image"])
        best[batch["index"]] = logits.argmax(dim=1).where(logits.isfinite().all(dim=1), -1)
    best = distributed.all_sum(best).cpu().numpy()  # a rank's other entries are 0
    if (best < 0).any():
        raise FloatingPointError(f"the classifier's scores are not finite on {(best < 0).sum()} of {len(best)} images "
                                 f"of {images.name}, so it has no accuracy there: is its file damaged?")
    return best


def top1(best, labels):
    """Compute the percentage of predictions that equal the label: best, labels (N,)."""
    return 100 * float((best == labels).mean())


def read_real(path):
    """Read real.json: a list of lists of correct classes, at index image number - 1. Raises DataError."""
    try:
        lists = json.loads(Path(path).read_bytes())
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is no json ({error}): give real.json of the ReaL labels") from None
    if not isinstance(lists, list) or not all(isinstance(classes, list) for classes in lists):
        raise DataError(f"{path} is not a list of lists of classes: give real.json of the ReaL labels")
    return lists


def image_numbers(images):
    """Parse each validation image's number, (N,), from its name, as in ILSVRC2012_val_00000001.JPEG.

    Raises DataError for other file names.
    """
    numbers = [re.fullmatch(r"ILSVRC2012_val_(\d{8})", Path(file).stem) for file in images.images]
    if None in numbers:
        raise DataError(f"{images.images[numbers.index(None)]}: ReaL labels need the original file names "
                        f"ILSVRC2012_val_00000001.JPEG and so on")
    return np.array([int(match[1]) for match in numbers])


def real_top1(best, numbers, lists):
    """Compute the percentage of predictions in their image's list of correct classes, and the number of images scored.

    best, numbers: (N,). Images with an empty list are not scored. Raises DataError if the lists do not fit the images.
    """
    if not 1 <= min(numbers) <= max(numbers) <= len(lists):
        raise DataError(f"ReaL has {len(lists)} lists, for the images 1 to {len(lists)}; these have the numbers "
                        f"{min(numbers)} to {max(numbers)}: give all of real.json")
    scored = [int(guess) in lists[number - 1] for guess, number in zip(best, numbers) if lists[number - 1]]
    if not scored:
        raise DataError("no image has a ReaL label: give the real.json of these validation images")
    return 100 * sum(scored) / len(scored), len(scored)


def imagenet_val(root):
    """Load ImageNet's validation images from <root>/val/<wnid>/. Raises DataError."""
    if not (Path(root) / "val").is_dir():
        raise DataError(f"--imagenet {root}: there is no folder val/ with a folder for each class in it")
    return labelled_folder(Path(root) / "val", 3, "imagenet")


def imagenet_v2(root):
    """Load ImageNetV2; labels are the folders' names, as their sorted order would put 10 before 2. Raises DataError."""
    if not Path(root).is_dir():
        raise DataError(f"--imagenet-v2 {root} is not a folder")
    images = labelled_folder(root, 3, "imagenet-v2")
    expected = {str(number) for number in range(len(images.classes))}
    if strange := [name for name in images.classes if name not in expected]:
        raise DataError(f"{root}: ImageNetV2's folders are named 0 to 999, not {strange[0]!r} beside "
                        f"{len(expected) - 1} others: give the folders of its archive, all of them")
    numbers = np.array([int(name) for name in images.classes])
    return replace(images, labels=numbers[images.labels], classes=sorted(numbers.tolist()))


def evaluate(model, device, val=None, real=None, v2=None, workers=-1):
    """Evaluate a classifier on the data that are given: {"top1", "real", "v2"} in percent, and "real_images".

    val, v2: ImageSets; real: the lists of `read_real`. Raises DataError if the numbers of classes differ.
    """
    result, classes = {}, model.config["num_classes"]
    for images in (val, v2):
        if images is not None and classes != len(images.classes):
            raise DataError(f"the model knows {classes} classes, {images.name} has {len(images.classes)}")
    if val is not None:
        best = predictions(model, val, device, workers)
        result["top1"] = top1(best, val.labels)
        if real is not None:
            result["real"], result["real_images"] = real_top1(best, image_numbers(val), real)
    if v2 is not None:
        result["v2"] = top1(predictions(model, v2, device, workers), v2.labels)
    return result
