"""Top-1 on ImageNet-1k's validation images, on the same images with reassessed labels (ReaL), and on ImageNetV2.

ReaL (Beyer et al. 2020): real.json holds, for the validation images in the order of their numbers, the list of classes
that are correct; an image whose list is empty is not scored (3,163 of 50,000). V2 (Recht et al. 2019), matched
frequency: 10,000 new images in folders named 0 to 999, the class numbers.
"""
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from common import distributed
from common.augment import eval_transform
from common.data import STATISTICS, labelled_folder
from common.images import DataError
from common.loader import on_device
from sec3_benchmark.evaluate import eval_loader


@torch.inference_mode()
def predictions(model, images, device, workers=-1, batch_size=256):
    """The best class of every image, (N,) int64 on every rank: float32, resize and centre crop as in all evaluations.

    model: on the device, in eval mode, with its `config`; its `statistics`, where it has them, normalise the images.
    """
    statistics = getattr(model, "statistics", None)
    mean, std = (255 * torch.tensor(values, device=device) for values in (statistics.values() if statistics else
                                                                          STATISTICS[3]))
    loader = eval_loader(images, eval_transform(model.config["img_size"]), batch_size, workers, device,
                         distributed.rank(), distributed.world_size())
    best = torch.zeros(len(images), dtype=torch.int64, device=device)
    for batch in on_device(loader, device, mean, std):
        best[batch["index"]] = model(batch["image"]).argmax(dim=1)
    return distributed.all_sum(best).cpu().numpy()  # each rank filled in its own images


def top1(best, labels):
    """Percent of the predictions that are the label."""
    return 100 * float((best == labels).mean())


def read_real(path):
    """real.json: a list of lists of correct classes, by image number less one."""
    try:
        lists = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is no json ({error}): give real.json of the ReaL labels") from None
    if not isinstance(lists, list) or not all(isinstance(classes, list) for classes in lists):
        raise DataError(f"{path} is not a list of lists of classes: give real.json of the ReaL labels")
    return lists


def image_numbers(images):
    """The number of each validation image, (N,), from its name ILSVRC2012_val_00000001.JPEG: 1, 2, ..."""
    numbers = [re.fullmatch(r"ILSVRC2012_val_(\d{8})", Path(file).stem) for file in images.images]
    if None in numbers:
        raise DataError(f"{images.images[numbers.index(None)]}: ReaL labels need the original file names "
                        f"ILSVRC2012_val_00000001.JPEG and so on")
    return np.array([int(match[1]) for match in numbers])


def real_top1(best, numbers, lists):
    """Percent of the predictions that are in the image's list, and how many images have a list that is not empty."""
    if not 1 <= min(numbers) <= max(numbers) <= len(lists):
        raise DataError(f"ReaL has {len(lists)} lists, for the images 1 to {len(lists)}; these have the numbers "
                        f"{min(numbers)} to {max(numbers)}: give all of real.json")
    scored = [(int(guess) in lists[number - 1]) for guess, number in zip(best, numbers) if lists[number - 1]]
    if not scored:
        raise DataError("no image has a ReaL label: give the real.json of these validation images")
    return 100 * sum(scored) / len(scored), len(scored)


def imagenet_val(root):
    """ImageNet's validation images, <root>/val/<wnid>/."""
    if not (Path(root) / "val").is_dir():
        raise DataError(f"--imagenet {root}: there is no folder val/ with a folder for each class in it")
    return labelled_folder(Path(root) / "val", 3, "imagenet")


def imagenet_v2(root):
    """ImageNetV2 with labels from the folders' names: sorted as strings, 10 would come before 2."""
    if not Path(root).is_dir():
        raise DataError(f"--imagenet-v2 {root} is not a folder")
    images = labelled_folder(root, 3, "imagenet-v2")
    if strange := [name for name in images.classes if not name.isdecimal()]:
        raise DataError(f"{root}: ImageNetV2's folders are named 0 to 999, not {strange[0]!r}")
    numbers = np.array([int(name) for name in images.classes])
    return replace(images, labels=numbers[images.labels], classes=sorted(numbers.tolist()))


def evaluate(model, device, val=None, real=None, v2=None, workers=-1):
    """{"top1", "real", "real_images", "v2"} (percent) of a classifier: those whose data are given."""
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
