"""Split a folder of classes: link DIR/<class>/... as SPLIT/train/<class>/... and SPLIT/val/<class>/...

    python appendix/tools/split_folder.py --data-path DIR --split-path SPLIT              # a tenth of each to val/
    python appendix/tools/split_folder.py --data-path DIR --split-path SPLIT --num-classes 20 --per-class 50 # small

SPLIT gets symbolic links: DIR is not changed, and must not be moved. The split depends on the images' names and --seed
alone: they put the images of a class in a fixed order, and val/ takes the first of them. The same command therefore
gives the same split; a smaller --per-class gives a subset of the larger train/, with the same val/.
"""
import hashlib
import os
from pathlib import Path

import numpy as np

from common import entry, options
from common.data import labelled_folder
from common.distributed import print0
from common.errors import UserError
from common.ranges import Float, Int


def build_parser():
    parser = options.make_parser(__doc__)
    parser.add_argument("--data-path", required=True, metavar="DIR", help="one folder of images for each class")
    parser.add_argument("--split-path", required=True, metavar="SPLIT", help="a new folder")
    parser.add_argument("--val-share", type=Float(1e-6, 1), default=0.1, help="of each class; at least one image")
    parser.add_argument("--num-classes", type=Int(1), metavar="N", help="use the first N classes by name; default: all")
    parser.add_argument("--per-class", type=Int(1), metavar="N", help="at most N training images each; default: all")
    parser.add_argument("--seed", type=Int(0), default=0)
    return parser


def order(paths, root, seed):
    """Sort the paths of one class in a random order that depends on their names below `root` and the seed alone."""
    def place(path):
        return hashlib.sha256(os.fsencode(f"{seed} {os.path.relpath(path, root)}")).digest()
    return sorted(paths, key=place)


def split(images, root, args):
    """Return the split: {"train" and "val": [paths of each class]}. Raises UserError if a class is too small."""
    parts = {"train": [], "val": []}
    for label, name in enumerate(images.classes[:args.num_classes]):
        paths = order([images.images[i] for i in np.flatnonzero(images.labels == label)], root, args.seed)
        held_out = max(1, round(args.val_share * len(paths)))
        if held_out >= len(paths):
            raise UserError(f"class {name} has {len(paths)} images and {held_out} would go to val/: nothing is left to "
                            f"train on. Add images, remove the class, or lower --val-share {args.val_share}")
        parts["val"].append(paths[:held_out])
        parts["train"].append(paths[held_out:][:args.per_class])
    return parts


def link(paths, root, folder):
    """Link paths below `root` under the same names below `folder`."""
    for path in paths:
        target = folder / os.path.relpath(path, root)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(os.path.abspath(path))


def check_places(root, target):
    """Raise UserError unless DIR holds classes and SPLIT is a new folder outside of it."""
    if not root.is_dir():
        raise UserError(f"--data-path {root} is not a folder: give one that holds a folder of images for each class")
    place, new = root.resolve(), target.resolve()
    if new.is_relative_to(place):  # it would be a class of the next split
        raise UserError(f"--split-path {target} lies inside --data-path {root}, whose folders are the classes: name a "
                        f"new folder outside")
    if place.is_relative_to(new):  # first: the advice of "exists" would remove the images
        raise UserError(f"--data-path {root} lies inside --split-path {target}: name a new folder beside it")
    if (root / "train").is_dir():
        raise UserError(f"{root} has a train/ already: give the folder that holds the classes")
    if target.exists():
        raise UserError(f"--split-path {target} exists: name a new folder, or remove it")


def main(args):
    """Create the split; return {"train": number of images, "val": number of images}."""
    root, target = Path(args.data_path), Path(args.split_path)
    check_places(root, target)
    parts = split(labelled_folder(root, 3, "folder"), root, args)
    for part, classes in parts.items():
        for paths in classes:
            link(paths, root, target / part)
    counts = {part: sum(map(len, classes)) for part, classes in parts.items()}
    print0(f"{len(parts['train'])} classes, {counts['train']} images to train on and {counts['val']} to validate: "
           f"--data-path {target}")
    return counts


if __name__ == "__main__":
    entry.run_script(main, build_parser())
