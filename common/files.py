"""Listing the image files below a folder, by one rule for all data sets, and storing their names in little memory."""
import hashlib
import os
from collections import Counter

import numpy as np

from common.distributed import remark
from common.errors import DataError

EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".npy")


def list_images(root, others=None) -> list[str]:
    """List the paths of all images below a folder, sorted; an empty list if the folder does not exist.

    Images are regular files with an extension in EXTENSIONS; files and folders with a hidden name (.name) are ignored.
    The extensions of all other files are counted in the Counter `others`; without one, a line about them is printed.
    Links to folders are followed, except upwards, and each folder is listed once. Raises DataError for a folder that
    cannot be read.
    """
    found, skipped, seen = [], Counter(), set()
    waiting = [os.fspath(root)] if os.path.isdir(root) else []
    while waiting:
        folder = waiting.pop()
        if (real := os.path.realpath(folder)) in seen:
            continue
        seen.add(real)
        images, extensions, folders = look_into(folder)
        found += images
        skipped.update(extensions)
        waiting += sorted(folders, reverse=True)  # taken from the end, so that of a folder's two names the first counts
    if others is None:
        report_others(root, len(found), skipped)
    else:
        others.update(skipped)
    return sorted(found)


def report_others(root, images, others):
    """Print a line about the files below `root` that are not images, if any; `others` counts their extensions."""
    if others:
        kinds = ", ".join(f"{count} {kind or 'without extension'}"
                          + " (broken links or no regular files)" * (kind in EXTENSIONS)
                          for kind, count in others.most_common(8))
        remark(f"{root}: {images} images; {others.total()} other files are passed over: {kinds}")


def look_into(folder):
    """List a folder: the paths of its images, sorted; the extensions of its other files; the paths of its subfolders.

    Hidden names and links that lead upwards are left out. Raises DataError if the folder cannot be read.
    """
    here = os.path.realpath(folder)
    try:
        with os.scandir(folder) as entries:
            shown = [entry for entry in entries if not entry.name.startswith(".")]
        folders = [e.path for e in shown if e.is_dir() and not (e.is_symlink() and leads_up(e.path, here))]
        files = [entry for entry in shown if not entry.is_dir()]
        images = {e.path for e in files if e.name.lower().endswith(EXTENSIONS) and e.is_file()}
    except OSError as error:
        raise DataError(f"{error.filename or folder} cannot be listed ({error.strerror}): make it readable or remove "
                        f"it") from None
    return sorted(images), [os.path.splitext(e.name)[1].lower() for e in files if e.path not in images], folders


def leads_up(link, folder):
    """Return whether a link in `folder` (a path without links) points to that folder or to one of its parents."""
    target = os.path.realpath(link)
    return os.path.commonpath((target, folder)) == target


class Packed:
    """A read-only sequence of byte strings, stored in one block of memory.

    Worker processes share the block. A list of a million Python objects would be copied into every worker, page by
    page, because even reading an object changes its reference count.
    """

    def __init__(self, parts):
        parts = list(parts)
        self.block, self.ends = b"".join(parts), np.cumsum([0, *map(len, parts)])

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, index):
        index = range(len(self))[index]  # a negative index counts from the end; IndexError beyond it
        return self.block[self.ends[index]:self.ends[index + 1]]

    def digest(self):
        """Return the sha256 of the byte strings in their order."""
        return hashlib.sha256(self.ends.tobytes() + self.block).digest()


class FileNames(Packed):
    """A read-only sequence of paths; a slice or an array of indices selects other FileNames.

    The digest covers the paths relative to their common folder, so that the data set may be moved.
    """

    def __init__(self, paths):
        paths = list(map(os.fspath, paths))
        shared = os.path.commonprefix((min(paths), max(paths))) if paths else ""
        self.root = shared[:shared.rfind("/") + 1]
        super().__init__(os.fsencode(path)[len(os.fsencode(self.root)):] for path in paths)

    def __getitem__(self, index):
        if not isinstance(index, (int, np.integer)):
            return FileNames(self[i] for i in np.arange(len(self))[index])
        return self.root + os.fsdecode(super().__getitem__(index))
