"""Copy a folder of images at reduced size (short side at most 256 px), to be read more than twice as fast.

    python appendix/tools/shrink_folder.py --data-path DIR --output SMALL                # as JPEG
    python appendix/tools/shrink_folder.py --data-path DIR --output SMALL --format keep  # PNG, BMP, TIFF become PNG

SMALL has the folders and names of DIR and replaces it as --data-path. Its images are upright, 8 bit, RGB or grey as
before. JPEGs that fulfil all this already, and .npy files, are copied byte for byte; files that are not images are left
out. A file that changes its format gets the ending .jpg or .png. The paper trains on ImageNet's original files: crops
of smaller images are more blurred.

After an interruption the same command continues. Files that exist in SMALL are not made again; delete a file to remake
it. SMALL/.unreadable.txt lists the files that cannot be read: the name, a tab, the reason.
"""
import io
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import uuid
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common import entry, options
from common.augment import resize
from common.checkpoint import save_json
from common.distributed import print0
from common.errors import DataError, UserError
from common.files import EXTENSIONS, list_images, look_into
from common.images import as_tensor, eight_bits, open_by_pillow, to_pillow, upright
from common.ranges import Int
from common.watch import progress

JPEG = (".jpg", ".jpeg")
# Hidden, so that they are not listed as images
SETTINGS, UNREADABLE, TEMPORARY = ".shrink_folder.json", ".unreadable.txt", ".shrink-{}.tmp"


def build_parser():
    parser = options.make_parser(__doc__)
    parser.add_argument("--data-path", required=True, metavar="DIR", help="any tree of images, train/ and val/ or not")
    parser.add_argument("--output", required=True, metavar="SMALL", help="a new folder, or one to continue")
    parser.add_argument("--short-side", type=Int(1), default=256, metavar="PX", help="of a copy, at most")
    parser.add_argument("--quality", type=Int(1, 100), default=95, help="of JPEG, 1 to 100")
    parser.add_argument("--format", choices=("jpeg", "keep"), default="jpeg", help="keep: others become PNG")
    parser.add_argument("--workers", type=Int(-1, 256), default=-1, help="processes; 0: none, -1: by the cores")
    return parser


def image_names(root):
    """List the names below `root` of all images that a training would find, sorted.

    A training lists train/, val/ and each class separately, so each of them counts, even if it is a link to another.
    """
    if not root.is_dir():
        raise DataError(f"--data-path {root} is not a folder: give the one that holds the images")
    _, _, splits = look_into(root)
    classes = [folder for split in splits for folder in look_into(split)[-1]]
    paths = list_images(root)
    for folder in splits + classes:
        paths += list_images(folder, Counter())  # files that are not images were reported above
    if not paths:
        raise DataError(f"no image below --data-path {root} (looked for {' '.join(EXTENSIONS)})")
    return sorted({os.path.relpath(path, root) for path in paths})


def target_names(names, how):
    """Return the name in SMALL of each image. Raises DataError if two images would get the same name."""
    kept, other = ((*JPEG, ".npy"), ".jpg") if how == "jpeg" else ((*JPEG, ".npy", ".png"), ".png")
    taken = {}
    for name in names:
        stem, ending = os.path.splitext(name)
        target = name if ending.lower() in kept else stem + other
        if target in taken:
            raise DataError(f"{taken[target]} and {name} would both become {target}: rename one of them"
                            + ", or try --format keep" * (how == "jpeg"))
        taken[target] = name
    return list(taken)


def begin(root, small, settings):
    """Create the folder and store the settings in it, or continue one with the same settings.

    Raises UserError if the settings differ, if the folder is not ours, or if one folder lies in the other.
    """
    place, new, file = root.resolve(), small.resolve(), small / SETTINGS
    if new.is_relative_to(place) or place.is_relative_to(new):
        raise UserError(f"--output {small} and --data-path {root}: one lies in the other, name a folder apart")
    if file.exists():
        before = json.loads(file.read_text())
        if changed := [key for key in settings if before[key] != settings[key]]:
            old, now = (" ".join(options.to_argv({key: one[key] for key in changed})) for one in (before, settings))
            raise UserError(f"{small} was begun with {old}, this call has {now}: repeat it with the former, or name "
                            f"another --output")
    elif small.exists() and (not small.is_dir() or any(small.iterdir())):
        raise UserError(f"--output {small} exists and was not begun by this script: name a new folder, or empty it")
    small.mkdir(parents=True, exist_ok=True)
    save_json(file, settings)
    for leftover in small.rglob(TEMPORARY.format("*")):  # from a killed process
        leftover.unlink(missing_ok=True)


@contextmanager
def of_any_size():
    """Let Pillow open images above its size limit, which guards against files that would fill the memory."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def shrunk(path, as_jpeg, short_side, quality):
    """Return the content of the smaller file. Raises whatever the decoder raises."""
    if path.lower().endswith(".npy"):
        np.load(path, allow_pickle=False)
        return Path(path).read_bytes()
    content = Path(path).read_bytes()
    with of_any_size():
        image = open_by_pillow(content)  # the same pixels as common/images.py
    turned, short = upright(image), min(image.size)
    plain = image.format == "JPEG" and image.mode in ("L", "RGB") and turned is image and short <= short_side
    if as_jpeg and plain:
        return content
    pixels = as_tensor(np.array(eight_bits(turned)))
    if short > short_side:
        size = [round(side * short_side / short) for side in pixels.shape[1:]]
        pixels = resize(pixels, size)  # as in training; six times as fast as Pillow
    file = io.BytesIO()
    # Chroma at half the resolution (4:2:0), as in most photographs. At full resolution the copies would be closer to
    # the pixels (error 2.4 grey levels instead of 3.8), but a third larger and 1.3 times as slow to decode
    how = {"format": "JPEG", "quality": quality, "subsampling": "4:2:0"} if as_jpeg else {"format": "PNG"}
    to_pillow(pixels).save(file, **how)
    return file.getvalue()


def write(path, content):
    """Write a file completely or not at all, even if this process is killed.

    Unlike common.checkpoint, this does not wait for the disk, which would take longer than making the image. After a
    loss of power a file may therefore be empty; the next call makes it again.
    """
    temporary = path.with_name(TEMPORARY.format(uuid.uuid4().hex))
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"could not write {path} ({error}): free some space there; the same command goes on") from error


def shrink(names, root, small, **how):
    """Make one file unless it exists; return {"images": 1, "made": 0 or 1, "before": bytes, "after": bytes}.

    names: (below root, below small). Returns the reason, a string, if the image cannot be read.
    """
    path, target = os.path.join(root, names[0]), small / names[1]
    made = not target.exists() or not target.stat().st_size
    if made:
        try:
            content = shrunk(path, target.suffix.lower() in JPEG, **how)
        except Exception as error:  # decoders raise anything
            return " ".join(f"{type(error).__name__}: {error}".split())
        write(target, content)
    return {"images": 1, "made": int(made), "before": os.path.getsize(path), "after": target.stat().st_size}


def prepare_process():
    """Initialise a worker process: one thread, no Ctrl-C, and an end with the main process, even if that is killed."""
    def end():
        multiprocessing.parent_process().join()
        os._exit(1)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end, daemon=True).start()


def in_processes(work, items, workers):
    """Yield work(item) for each item in order, from a pool of processes unless workers is 0."""
    if not workers:
        yield from map(work, items)
        return
    try:
        with ProcessPoolExecutor(workers if workers > 0 else None, initializer=prepare_process) as pool:
            yield from pool.map(work, items, chunksize=32)
    except BrokenProcessPool:
        raise UserError("a process was killed, perhaps for lack of memory: the same command goes on, give it fewer "
                        "--workers") from None


def followed(results, total):
    """Yield the results unchanged, and show a progress bar on a terminal, or else print a line every minute."""
    start = said = time.monotonic()
    for number, result in enumerate(progress(results, "shrinking", total), 1):
        yield result
        if not sys.stderr.isatty() and (now := time.monotonic()) > said + 60:
            said = now
            print0(f"{number} of {total} images, {number / (now - start):.0f} a second")


def main(args):
    """Shrink the folder; return {"images", "made", "before", "after", "unreadable"}.

    images: number in SMALL; made: those made by this call; before, after: bytes of all of them.
    """
    root, small = Path(args.data_path), Path(args.output)
    how = {"short_side": args.short_side, "quality": args.quality}
    names = image_names(root)
    pairs = list(zip(names, target_names(names, args.format)))
    begin(root, small, {"data_path": str(root.resolve()), **how, "format": args.format})
    for folder in {os.path.dirname(name) for name in names}:  # even for a class without a readable image
        (small / folder).mkdir(parents=True, exist_ok=True)
    start, totals, unreadable = time.monotonic(), Counter(images=0, made=0, before=0, after=0), []
    work = partial(shrink, root=root, small=small, **how)
    for result, name in zip(followed(in_processes(work, pairs, args.workers), len(pairs)), names):
        if isinstance(result, dict):
            totals.update(result)
        else:
            unreadable.append((str(root / name), result))
    listed = "".join(f"{name}\t{reason}\n" for name, reason in unreadable)
    (small / UNREADABLE).write_text(listed, encoding="utf-8", errors="backslashreplace")  # names may not be UTF-8
    if not totals["images"]:
        raise DataError(f"none of {len(names)} images could be read; the first, {': '.join(unreadable[0])}")
    rate = totals["made"] / (time.monotonic() - start)
    print0(f"{totals['images']} images, {totals['made']} of them made now, {rate:.0f} a second: "
           f"{totals['before'] / 1e6:,.1f} MB before, {totals['after'] / 1e6:,.1f} MB after")
    if unreadable:
        print0(f"{len(unreadable)} unreadable ones are left out: see {small / UNREADABLE}")
    print0(f"use the smaller ones by --data-path {small}")
    return {**totals, "unreadable": [name for name, _ in unreadable]}


if __name__ == "__main__":
    entry.run_script(main, build_parser())
