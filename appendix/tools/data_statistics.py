"""Measure mean and standard deviation per channel of a folder of images, and list those that cannot be read.

    python appendix/tools/data_statistics.py --data-path DIR                    # 64 px: some 2,000 a second and core
    python appendix/tools/data_statistics.py --data-path DIR --in-chans 5 --num-images 10000

Reads every image below DIR, or below its train/ if there is one, as training would. If there is a train/, mean and
deviation are those of train/ alone, and val/ is only searched for unreadable files. Pass the printed arguments to
pre-training, whose weights hand them on to later stages, or to training from scratch; the paper uses ImageNet's. Writes
statistics.json and unreadable.txt, with one line per unreadable file: its name, a tab, the reason.
"""
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np

from common import entry, options
from common.checkpoint import save_json
from common.data import image_tree
from common.distributed import print0
from common.errors import UserError
from common.files import list_images
from common.images import ImageSet, UnreadableImage
from common.ranges import Int
from common.watch import progress


def build_parser():
    parser = options.make_parser(__doc__)
    parser.add_argument("--data-path", required=True, metavar="DIR", help="any tree of images")
    parser.add_argument("--in-chans", type=Int(1), default=3,
                        help="channels; other than 1 and 3 are read from .npy files")
    parser.add_argument("--num-images", type=Int(1),
                        help="read so many random images of train/, and of val/; default: all")
    parser.add_argument("--seed", type=Int(0), default=0)
    parser.add_argument("--workers", type=Int(-1, 256), default=-1, help="reading processes; 0: none, -1: by the cores")
    parser.add_argument("--output", default=str(options.ROOT / "outputs"), metavar="DIR")
    return parser


def sums(images, index):
    """Sum the pixels of an image: float64 (1 + 2 C,), their number, then sums and sums of squares per channel, in 0..1.

    Returns (path, reason) instead if the image is unreadable.
    """
    try:
        image = images.read(index)
    except UnreadableImage as error:
        cause = error.__context__  # the decoder's error, without our message around it
        return str(images.where(index)), " ".join(f"{type(cause).__name__}: {cause}".split())
    pixels = image.numpy().reshape(images.in_chans, -1) / 255
    return np.concatenate([[pixels.shape[1]], pixels.sum(axis=1), np.square(pixels).sum(axis=1)])


def read_all(images, indices, workers):
    """Yield the result of `sums` for each image, in order."""
    with ProcessPoolExecutor(workers if workers > 0 else None) if workers else nullcontext() as pool:
        read = partial(pool.map, chunksize=64) if pool else map
        yield from progress(read(partial(sums, images), indices), f"reading {images.name}", len(indices))


def statistics(images, indices, workers=0):
    """Compute mean (C,) and std (C,) over the pixels of all images, so that larger images weigh more.

    Also returns [(path, reason)] of the unreadable images. Raises UserError if all are.
    """
    total, unreadable = 0.0, []
    for result in read_all(images, indices, workers):
        if isinstance(result, tuple):
            unreadable.append(result)
        else:
            total = total + result
    if len(unreadable) == len(indices):
        raise UserError(f"none of {len(indices)} images could be read; the first, {': '.join(unreadable[0])}")
    mean, square = np.split(total[1:] / total[0], 2)
    return mean, np.sqrt(np.maximum(square - mean**2, 0)), unreadable


def draw(images, args):
    """Draw the indices of the images to read, seeded."""
    return np.random.default_rng(args.seed).permutation(len(images))[:args.num_images].tolist()


def unreadable_of_val(args):
    """Return [(path, reason)] of the unreadable files in DIR/val, and how many files were read.

    Without DIR/train, the statistics cover the whole folder, val/ included, and nothing is read again.
    """
    folder = Path(args.data_path) / "val"
    if not (Path(args.data_path) / "train").is_dir():  # the statistics cover the whole tree
        return [], 0
    images = ImageSet("val", list_images(folder), None, [], args.in_chans)
    chosen = draw(images, args)
    return [found for found in read_all(images, chosen, args.workers) if isinstance(found, tuple)], len(chosen)


def main(args):
    """Measure and write the statistics; return {"mean", "std", "images" (number of images used), "unreadable"}."""
    folder = Path(args.output) / "data_statistics"
    (folder / "unreadable.txt").unlink(missing_ok=True)  # a failing call must not leave the list of another folder
    images = image_tree(args.data_path, args.in_chans)
    indices = draw(images, args)
    mean, std, unreadable = statistics(images, indices, args.workers)
    for channel in np.flatnonzero(std < 5e-5):  # printed as 0.0000; --std 0 would divide by zero
        print0(f"channel {channel} is {mean[channel]:.4f} everywhere: --std 1 makes it 0")
        std[channel] = 1.0
    used = len(indices) - len(unreadable)
    of_val, read_of_val = unreadable_of_val(args)
    unreadable += of_val
    result = {"mean": mean.tolist(), "std": std.tolist(), "images": used,
              "unreadable": [path for path, _ in unreadable]}
    folder.mkdir(parents=True, exist_ok=True)
    save_json(folder / "statistics.json", {**result, "data_path": args.data_path})
    (folder / "unreadable.txt").write_text("".join(f"{path}\t{reason}\n" for path, reason in unreadable),
                                           encoding="utf-8", errors="surrogateescape")
    print0(f"{result['images']} images: --mean {' '.join(f'{m:.4f}' for m in mean)} "
           f"--std {' '.join(f'{s:.4f}' for s in std)}")
    if read_of_val:
        print0(f"these are of train/ alone; {read_of_val} images of val/ were read too, {len(of_val)} are unreadable")
    print0(f"{len(unreadable)} unreadable" + (f", listed in {folder / 'unreadable.txt'}" if unreadable else ""))
    return result


if __name__ == "__main__":
    entry.run_script(main, build_parser())
