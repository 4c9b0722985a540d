"""The classification data sets of Tables 4 and 5 and Figure 4: expected files, splits, readers.

--dataset-path ROOT contains them all, each in the folder that torchvision uses (`holds` in SETS). Any other set NAME is
read from ROOT/NAME/train/<class>/ and ROOT/NAME/test/<class>/, or val/ if there is no test/. The name `folder` means
ROOT itself. The two fractal sets are generated, with classes that no pre-training uses.
"""
import argparse
import json
import os
from pathlib import Path

import numpy as np
from torchvision import datasets as tv

from common import data
from common.distributed import once_per_node, print0
from common.errors import DataError
from common.images import ImageSet

SETS = {  # images: number for training, for testing; download: whether torchvision can fetch it; holds: expected files
    "flowers": dict(
        title="Flowers-102", images=(2_040, 6_149), classes=102, download=True,
        holds="flowers-102/ with jpg/, imagelabels.mat and setid.mat",
        source="https://www.robots.ox.ac.uk/~vgg/data/flowers/102/"),
    "pets": dict(
        title="Pets", images=(3_680, 3_669), classes=37, download=True,
        holds="oxford-iiit-pet/ with images/ and annotations/ (trainval.txt, test.txt)",
        source="https://www.robots.ox.ac.uk/~vgg/data/pets/"),
    "aircraft": dict(
        title="Aircraft", images=(6_667, 3_333), classes=100, download=True,
        holds="fgvc-aircraft-2013b/data/ with images/, variants.txt, images_variant_trainval.txt and "
              "images_variant_test.txt",
        source="https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/"),
    "cars": dict(
        title="Cars", images=(8_144, 8_041), classes=196, download=False,
        holds="stanford_cars/ with cars_train/, cars_test/, cars_test_annos_withlabels.mat and devkit/ "
              "(cars_train_annos.mat, cars_meta.mat)",
        source="a copy of cars_train.tgz, cars_test.tgz, car_devkit.tgz and cars_test_annos_withlabels.mat: the "
               "original address is dead"),
    "cifar100": dict(
        title="CIFAR-100", images=(50_000, 10_000), classes=100, download=True,
        holds="cifar-100-python/ with train, test and meta",
        source="https://www.cs.toronto.edu/~kriz/cifar.html"),
    "inat18": dict(
        title="iNat18", images=(437_513, 24_426), classes=8_142, download=False,
        holds="inat2018/ with train_val2018/, train2018.json, val2018.json and categories.json",
        source="https://github.com/visipedia/inat_comp/tree/master/2018 (120 GB)"),
}
FRACTALS = {"fractals-small": 40, "fractals-large": 200}  # images per class to train on, of 10 classes
FRACTAL_TEST = 50  # images per class to test on


# Each reader maps (root, train, download) to (images, labels, class names)

def flowers(root, train, download):
    """Read Flowers-102; training uses train and val, which torchvision keeps apart."""
    splits = ("train", "val") if train else ("test",)
    parts = [tv.Flowers102(root, split, loader=str, download=download) for split in splits]
    return *samples(*parts), tv.Flowers102.classes


def pets(root, train, download):
    """Read Pets with breeds as labels; training uses trainval."""
    # torchvision's class takes no loader, so its private lists are the only way not to open the images
    dataset = tv.OxfordIIITPet(root, "trainval" if train else "test", download=download)
    return [str(path) for path in dataset._images], dataset._labels, dataset.classes


def aircraft(root, train, download):
    """Read Aircraft with variants as labels; training uses trainval."""
    dataset = tv.FGVCAircraft(root, "trainval" if train else "test", "variant", loader=str, download=download)
    return *samples(dataset), dataset.classes


def cars(root, train, download):
    """Read Cars, which torchvision cannot download."""
    dataset = tv.StanfordCars(root, "train" if train else "test", loader=str)
    return *samples(dataset), dataset.classes


def cifar100(root, train, download):
    """Read CIFAR-100; its images are one array."""
    dataset = tv.CIFAR100(root, train, download=download)
    return dataset.data, dataset.targets, dataset.classes


def inat18(root, train, download):
    """Read iNat18 from its annotation files; torchvision's class does not separate train from val.

    As in the authors' code, classes are numbered by first appearance in train2018.json. Their names are in
    categories.json.
    """
    folder = Path(root) / "inat2018"
    annotations = json.loads((folder / "train2018.json").read_bytes())
    ids = dict.fromkeys(entry["category_id"] for entry in annotations["annotations"])
    labels = {category: label for label, category in enumerate(ids)}
    names = {entry["id"]: entry["name"] for entry in json.loads((folder / "categories.json").read_bytes())}
    if not train:
        annotations = json.loads((folder / "val2018.json").read_bytes())
    files = {entry["id"]: str(folder / entry["file_name"]) for entry in annotations["images"]}
    pairs = [(files[entry["image_id"]], labels[entry["category_id"]]) for entry in annotations["annotations"]]
    return *zip(*pairs), [names[category] for category in ids]


READERS = {"flowers": flowers, "pets": pets, "aircraft": aircraft, "cars": cars, "cifar100": cifar100,
           "inat18": inat18}


def samples(*datasets):
    """Return the file names and labels of torchvision sets whose loader is `str`, so that no image is opened."""
    return zip(*(dataset[index] for dataset in datasets for index in range(len(dataset))))


def official_set(name, root, train, args):
    """Load one split of a set in SETS. Raises DataError with the expected files and their source if incomplete."""
    about, split = SETS[name], "train" if train else "test"
    how = "--download fetches it, or get it from" if about["download"] else "--download cannot fetch it: take"
    remedy = f"{root} must hold {about['holds']}. {how} {about['source']}"
    try:
        with once_per_node() as mine:
            if mine and args.download and about["download"]:
                READERS[name](root, train, download=True)
        images, labels, classes = READERS[name](root, train, download=False)
    except (RuntimeError, OSError, ValueError, LookupError, TypeError) as error:  # missing or malformed files
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DataError(f"{about['title']} is not whole in {root} ({why}). {remedy}") from None
    found, expected = (len(images), len(classes)), (about["images"][not train], about["classes"])
    if found != expected:
        raise DataError(f"{about['title']} in {root}: {split} has {found[0]} images of {found[1]} classes, where "
                        f"{expected[0]} of {expected[1]} are expected. {remedy}")
    if not isinstance(images, np.ndarray):
        images = list(images)
        absent = [path for path in images[::max(1, len(images) // 1000)] if not os.path.isfile(path)]
        if absent:
            raise DataError(f"{about['title']}: {absent[0]} is not there. {remedy}")
    return ImageSet(f"{name}-{split}", images, np.asarray(labels), list(classes), args.in_chans)


def folder_sets(name, root, args):
    """Load [training set, test set] from the folders of ROOT/NAME, or of ROOT for the name `folder`.

    The test set is test/, or val/ if there is no test/. Raises DataError.
    """
    place = Path(root) if name == "folder" else Path(root) / name
    test = "test" if (place / "test").is_dir() else "val"
    if not (place / "train").is_dir() or not (place / test).is_dir():
        raise DataError(f"--dataset {name}: {place} does not hold train/ and test/ (or val/), one folder per class in "
                        f"each; appendix/tools/split_folder.py makes both of a folder of classes. The "
                        f"sets known by name are {', '.join([*SETS, *FRACTALS])}")
    print0(f"{name}: training on {place / 'train'}, testing on {place / test}")
    folder = argparse.Namespace(data="folder", data_path=str(place), in_chans=args.in_chans)
    return data.load_sets(folder, splits=("train", test))


def check_path(name, root):
    """Raise DataError for a path as name, for --dataset-path with a generated set, and for any other set without it."""
    if Path(name).name != name or name == "..":
        raise DataError(f"--dataset {name}: the name of a folder in --dataset-path, not a path; for that folder itself "
                        f"give it as --dataset-path, and --dataset folder")
    if name in FRACTALS and root:
        raise DataError(f"{name} is generated and reads no --dataset-path {root}: leave one of them out, or choose "
                        f"another --preset")
    if name not in FRACTALS and not root:
        raise DataError(f"{name} needs --dataset-path, the folder that holds it")


def load_downstream(args):
    """Load [training set, test set] of --dataset."""
    name, root = args.dataset, args.dataset_path
    check_path(name, root)
    if name in FRACTALS:
        return data.fractals(args, {"downstream-train": FRACTALS[name], "downstream-val": FRACTAL_TEST})
    if name not in SETS:
        return folder_sets(name, root, args)
    return [official_set(name, root, train, args) for train in (True, False)]
