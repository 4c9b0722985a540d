"""Makes train/ and val/ of a folder of classes: DIR/<class>/... becomes SPLIT/train/<class>/... and SPLIT/val/...

    python appendix/tools/split_folder.py --data-path DIR --split-path SPLIT              # a tenth of each to val/
    python appendix/tools/split_folder.py --data-path DIR --split-path SPLIT --num-classes 20 --per-class 50 # small

SPLIT gets symbolic links, so DIR stays as it is and must stay where it is. Which images go where depends on their names
and --seed alone: each image has its place in a fixed order of its class, from whose front val/ is filled. The same
command gives the same split, a smaller --per-class a part of the larger one with the same val/.
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
    parser.add_argument("--num-classes", type=Int(1), metavar="N", help="the first so many by name; default: all")
    parser.add_argument("--per-class", type=Int(1), metavar="N", help="at most so many for training; default: all")
    parser.add_argument("--seed", type=Int(0), default=0)
    return parser


def order(paths, root, seed):
    """The paths of one class in an order that depends on each one's name below `root` and the seed alone."""
    def place(path):
        return hashlib.sha256(os.fsencode(f"{seed} {os.path.relpath(path, root)}")).digest()
    return sorted(paths, key=place)


def split(images, root, args):
    """{"train" or "val": [paths of each class]}."""
    parts = {"train": [], "val": []}
    for label, name in list(enumerate(images.classes))[:args.num_classes]:
        paths = order([images.images[i] for i in np.flatnonzero(images.labels == label)], root, args.seed)
        held_out = max(1, round(args.val_share * len(paths)))
        if held_out >= len(paths):
            raise UserError(f"class {name} has {len(paths)} images and {held_out} would go to val/: nothing is left to "
                            f"train on. Add images, remove the class, or lower --val-share {args.val_share}")
        parts["val"].append(paths[:held_out])
        parts["train"].append(paths[held_out:][:args.per_class])
    return parts


def link(paths, root, folder):
    """Links below `folder` with the same names as below `root`."""
    for path in paths:
        target = folder / os.path.relpath(path, root)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(os.path.abspath(path))


def check_places(root, target):
    """DIR holds classes and nothing else, and SPLIT lies apart from it."""
    if not root.is_dir():
        raise UserError(f"--data-path {root} is no folder: give the one that holds a folder of images for each class")
    place, new = root.resolve(), target.resolve()
    if new.is_relative_to(place):  # a class of the next split
        raise UserError(f"--split-path {target} lies inside --data-path {root}, whose folders are the classes: name a "
                        f"new folder outside")
    if place.is_relative_to(new):  # before "exists", whose remedy would remove the images
        raise UserError(f"--data-path {root} lies inside --split-path {target}: name a new folder beside it")
    if (root / "train").is_dir():
        raise UserError(f"{root} has a train/ already: give the folder that holds the classes")
    if target.exists():
        raise UserError(f"--split-path {target} exists: name a new folder, or remove it")


def main(args):
    """Returns {"train", "val"}: how many images each has."""
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
