"""Extract features of a folder of images with any checkpoint: one row per image, in an .npz with the file names.

    python appendix/tools/extract_features.py --init outputs/pretrain_mae/RUN/weights.pt --preset small --data-path DIR
    python appendix/tools/extract_features.py --init FILE --data-path DIR --layer 8 --pooling avg --save-to features.npz
    torchrun --nproc-per-node=8 appendix/tools/extract_features.py --init timm:NAME --data-path DIR

Reads every image below DIR, or below its val/ if there is one, with the evaluation's resize and crop. Labels are not
needed. `np.load(FILE)` then holds "features" (N, D), float32; "files" (N,), paths below DIR in the same order;
"unreadable", paths of images that could not be read and have no row (an error with --on-bad-image stop); and "about",
the settings as JSON. A classifier that was fine-tuned on the mean of its patch tokens gives that mean; for the output
of a block (--layer), --pooling may choose. Without DIR the images are generated, and named by their numbers.
"""
import hashlib
import json
import os
from pathlib import Path

import numpy as np

from appendix.features import add_arguments, add_execution, build_encoder, extract, settings_of
from common import distributed, entry, options
from common.augment import eval_transform
from common.checkpoint import save_arrays
from common.data import images_to_analyse
from common.distributed import print0
from common.errors import UserError
from sec3_benchmark.evaluate import say_unreadable

PRESETS = {"demo": dict(data="fractals"), **dict.fromkeys(("laptop", "small", "paper"), dict(data="folder"))}


def build_parser():
    parser = add_arguments(options.make_parser(__doc__))
    add_execution(parser, save_to="the file of the features; default: outputs/extract_features/<weights>-<...>.npz",
                  kept=False)
    parser.add_argument("--on-bad-image", choices=("skip", "stop"), default="skip", help="skip: list it, without a row")
    return parser


def names_of(images, root):
    """Return the path of each image below `root`, or its number if it is not a file (fractals, CIFAR)."""
    if not images.from_files:
        return [str(number) for number in range(len(images))]
    return [os.path.relpath(path, root) for path in images.images]


def read_alone(root):
    """Return a line saying that only val/ was read, or None if the folder has no val/."""
    if not root or not (Path(root) / "val").is_dir():
        return None
    others = [str(path) for path in sorted(Path(root).iterdir()) if path.is_dir() and path.name != "val"]
    remedy = f"; --data-path {' or '.join(others[:3])} reads the others" if others else ""
    return f"these are of {Path(root) / 'val'} alone{remedy}"


def main(args):
    """Extract and write the features; return {"features": file, "images", "dim"}, and "unreadable" names if any."""
    device = distributed.start_process_group(args.device)
    encoder, fingerprint, args = build_encoder(args, device)
    images = images_to_analyse(args)
    about = json.dumps({"weights": fingerprint, "images": images.fingerprint(), **settings_of(args)}, sort_keys=True)
    name = f"{Path(args.init).name}-layer{args.layer}-{args.pooling}-{hashlib.sha256(about.encode()).hexdigest()[:10]}"
    place = Path(args.save_to or Path(args.output) / "extract_features" / f"{name}.npz")
    if place.is_dir():
        raise UserError(f"--save-to {place} is a folder: name a file in it")
    place.parent.mkdir(parents=True, exist_ok=True)
    unreadable, files = [], np.array(names_of(images, args.data_path))
    values = extract(encoder, images, eval_transform(args.img_size), args, device, unreadable=unreadable).numpy()
    unreadable = sorted(sum(distributed.gather(unreadable), []))
    say_unreadable(images, unreadable)
    read = np.setdiff1d(np.arange(len(images)), unreadable)
    values, left_out = values[read], files[unreadable]
    if distributed.is_main():
        save_arrays(place, {"features": values, "files": files[read], "unreadable": left_out, "about": about})
    layer = f"block {args.layer}" if args.layer else "the last block, after the final norm"
    print0(f"{place}: {len(values)} images x {values.shape[1]} features of {layer}, pooling {args.pooling}")
    if images.from_files and (line := read_alone(args.data_path)):
        print0(line)
    return {"features": str(place), "images": len(values), "dim": values.shape[1],
            **({"unreadable": left_out.tolist()} if unreadable else {})}


if __name__ == "__main__":
    entry.run_script(main, build_parser(), PRESETS)
