"""Makes a small copy of a folder of images, read more than twice as fast: short side 256 px, none enlarged.

    python appendix/tools/shrink_folder.py --data-path DIR --output SMALL                # as JPEG
    python appendix/tools/shrink_folder.py --data-path DIR --output SMALL --format keep  # PNG, BMP, TIFF become PNG

SMALL has the folders and names of DIR and takes its place as --data-path. Its images are upright, 8 bit, RGB or grey as
before. A JPEG that is all this already, and every .npy file, is copied byte for byte; what is no image is left out. The
ending of a name, .jpg or .png where it must change, says what the file becomes. The paper trains on ImageNet's files
as they are: a crop of a smaller image is more blurred.

After a stop the same command goes on. What is in SMALL already is not made again; delete a file to have it made anew.
SMALL/.unreadable.txt lists the files that cannot be read: the name, a tab, the reason.
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
SETTINGS, UNREADABLE, TEMPORARY = ".shrink_folder.json", ".unreadable.txt", ".shrink-{}.tmp"  # hidden, so no images


def build_parser():
    parser = options.make_parser(__doc__)
    parser.add_argument("--data-path", required=True, metavar="DIR", help="any tree of images, train/ and val/ or not")
    parser.add_argument("--output", required=True, metavar="SMALL", help="a new folder, or one to go on with")
    parser.add_argument("--short-side", type=Int(1), default=256, metavar="PX", help="at most so many pixels")
    parser.add_argument("--quality", type=Int(1, 100), default=95, help="of JPEG, 1 to 100")
    parser.add_argument("--format", choices=("jpeg", "keep"), default="jpeg", help="keep: what is no JPEG becomes PNG")
    parser.add_argument("--workers", type=Int(-1, 256), default=-1, help="processes; 0: none, -1: by the cores")
    return parser


def image_names(root):
    """Names below `root` of all that a training would list there. It lists train/, val/ and each class on its own, so
    of these each counts, even one that is a link to another.
    """
    if not root.is_dir():
        raise DataError(f"--data-path {root} is no folder: give the one that holds the images")
    _, _, splits = look_into(root)
    classes = [folder for split in splits for folder in look_into(split)[-1]]
    names = {os.path.relpath(path, root) for path in list_images(root)}
    names |= {os.path.relpath(path, root) for folder in splits + classes for path in list_images(folder, Counter())}
    names = sorted(names)
    if not names:
        raise DataError(f"no image below --data-path {root} (looked for {' '.join(EXTENSIONS)})")
    return names


def target_names(names, how):
    """The names in SMALL, all different."""
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
    """Makes the folder, which remembers its settings, or goes on with one that was begun with the same."""
    place, new, file = root.resolve(), small.resolve(), small / SETTINGS
    if new.is_relative_to(place) or place.is_relative_to(new):
        raise UserError(f"--output {small} and --data-path {root}: one lies in the other, name a folder apart")
    if file.exists():
        before = json.loads(file.read_text())
        old, now = (" ".join(options.to_argv({key: one[key] for key in settings if before[key] != settings[key]}))
                    for one in (before, settings))
        if old:
            raise UserError(f"{small} was begun with {old}, this call has {now}: repeat it with the former, or name "
                            f"another --output")
    elif small.exists() and (not small.is_dir() or any(small.iterdir())):
        raise UserError(f"--output {small} exists and was not begun by this script: name a new folder, or empty it")
    small.mkdir(parents=True, exist_ok=True)
    save_json(file, settings)
    for leftover in small.rglob(TEMPORARY.format("*")):  # of a call that was killed
        leftover.unlink(missing_ok=True)


@contextmanager
def of_any_size():
    """Let Pillow open images above its limit, which guards against files that were made to fill the memory."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def shrunk(path, as_jpeg, short_side, quality):
    """The content of the smaller file. Raises whatever the decoder raises."""
    if path.lower().endswith(".npy"):
        np.load(path, allow_pickle=False)
        return Path(path).read_bytes()
    content = Path(path).read_bytes()
    with of_any_size():
        image = open_by_pillow(content)  # its pixels are those of common/images.py
    turned, short = upright(image), min(image.size)
    plain = image.format == "JPEG" and image.mode in ("L", "RGB") and turned is image and short <= short_side
    if as_jpeg and plain:
        return content
    pixels = as_tensor(np.array(eight_bits(turned)))
    if short > short_side:
        size = [round(side * short_side / short) for side in pixels.shape[1:]]
        pixels = resize(pixels, size)  # as in training; six times as fast as Pillow's
    file = io.BytesIO()
    # Colours at half the resolution, as most photographs have them: at full resolution the copies are nearer to the
    # pixels (error 2.4 grey levels, not 3.8), but a third larger, and take 1.3 times as long to decode
    how = {"format": "JPEG", "quality": quality, "subsampling": "4:2:0"} if as_jpeg else {"format": "PNG"}
    to_pillow(pixels).save(file, **how)
    return file.getvalue()


def write(path, content):
    """The whole file or none, also if this process is killed. common.checkpoint's way would wait for the disk longer
    than the image takes to make. After a loss of power files may be empty instead: the next call makes these again.
    """
    temporary = path.with_name(TEMPORARY.format(uuid.uuid4().hex))
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"could not write {path} ({error}): free some space there; the same command goes on") from error


def shrink(names, root, small, **how):
    """Makes one file unless it is there: {"images": 1, "made": 0 or 1, "before": bytes, "after": bytes}, or the reason
    why it cannot be read.
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
    """Of the pool: one thread, no Ctrl-C; it ends when the main process has, even if that was killed."""
    def end():
        multiprocessing.parent_process().join()
        os._exit(1)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end, daemon=True).start()


def in_processes(work, items, workers):
    """Yields the result of each in order."""
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
    """The same, with a progress bar on a terminal and elsewhere a line each minute."""
    start = said = time.monotonic()
    for number, result in enumerate(progress(results, "shrinking", total), 1):
        yield result
        if not sys.stderr.isatty() and (now := time.monotonic()) > said + 60:
            said = now
            print0(f"{number} of {total} images, {number / (now - start):.0f} a second")


def main(args):
    """Returns {"images" (in SMALL), "made" (of them, now), "before", "after" (bytes of them all), "unreadable"}."""
    root, small = Path(args.data_path), Path(args.output)
    how = {"short_side": args.short_side, "quality": args.quality}
    names = image_names(root)
    pairs = list(zip(names, target_names(names, args.format)))
    begin(root, small, {"data_path": str(root.resolve()), **how, "format": args.format})
    for folder in {os.path.dirname(name) for name in names}:  # a class without any readable image, too
        (small / folder).mkdir(parents=True, exist_ok=True)
    start, totals, unreadable = time.monotonic(), Counter(images=0, made=0, before=0, after=0), []
    work = partial(shrink, root=root, small=small, **how)
    for result, name in zip(followed(in_processes(work, pairs, args.workers), len(pairs)), names):
        if isinstance(result, dict):
            totals.update(result)
        else:
            unreadable.append((str(root / name), result))
    listed = "".join(f"{name}\t{reason}\n" for name, reason in unreadable)
    (small / UNREADABLE).write_text(listed, encoding="utf-8", errors="backslashreplace")  # for names that are no UTF-8
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
