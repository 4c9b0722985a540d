"""Image files: how they are listed, how they are decoded to uint8 tensors (C, H, W), and data sets of them.

simplejpeg decodes plain JPEG files, to the same pixels as Pillow and faster; Pillow decodes everything else.
(torchvision's decoders are deprecated, and its PNG decoder crashes the process on a damaged file.)
"""
import hashlib
import io
import math
import os
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from common.errors import UserError

try:
    import simplejpeg
except ImportError:  # Pillow alone gives the same pixels
    simplejpeg = None

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".npy")
# Increase it whenever the same files give other pixels or crops. It is part of every fingerprint, so that no run is
# reused or resumed with pixels other than those it began with. 2: tensors are resized, crops sampled by timm's rule
PIXELS_VERSION = 2
ORIENTATION = 0x0112  # EXIF tag for how the camera was held; UPRIGHT: its value -> the operation that corrects it
UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
           5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
           8: Image.Transpose.ROTATE_90}


class DataError(UserError):
    """The data are not what the arguments say. The message names the place, what was found and the remedy."""


class UnreadableImage(DataError):
    """An image that could not be decoded; the message names the file."""


# Listing

class Packed:
    """A read-only sequence of byte strings, stored in one block of memory.

    Worker processes share the block. A list of a million Python objects would be copied into every worker, page by
    page, because even reading an object writes its reference count.
    """

    def __init__(self, parts):
        parts = list(parts)
        self.block, self.ends = b"".join(parts), np.cumsum([0, *map(len, parts)])

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, index):
        first, end = self.ends[range(len(self))[index]:][:2]
        return self.block[first:end]

    def digest(self):
        """Return the sha256 of the parts in their order."""
        return hashlib.sha256(self.ends.tobytes() + self.block).digest()


class FileNames(Packed):
    """A read-only sequence of paths; indexing with a slice or an array gives FileNames again.

    The digest covers the names below the paths' common folder, not the folder itself.
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


def list_images(root) -> list[str]:
    """List the paths of all images below a folder, sorted; empty if the folder does not exist.

    Images are regular files with an extension in EXTENSIONS. Hidden names are skipped. Links to folders are followed,
    except upwards, and each folder is listed once. Raises DataError for a subfolder that cannot be read.
    """
    found, listed, waiting = [], set(), [os.fspath(root)] if os.path.isdir(root) else []
    while waiting:
        folder = waiting.pop()
        here = os.path.realpath(folder)
        if here in listed:
            continue
        listed.add(here)
        try:
            with os.scandir(folder) as entries:
                shown = [entry for entry in entries if not entry.name.startswith(".")]
                found += [e.path for e in shown if e.name.lower().endswith(EXTENSIONS) and e.is_file()]
                below = [e.path for e in shown if e.is_dir() and not (e.is_symlink() and leads_up(e.path, here))]
        except OSError as error:
            raise DataError(f"{folder} cannot be listed ({error.strerror}): make it readable or remove it") from None
        waiting += sorted(below, reverse=True)  # a folder reachable by two names is listed by the first
    return sorted(found)


def leads_up(link, folder):
    """Return whether a link in `folder` (a real path) points to that folder or to one of its parents."""
    target = os.path.realpath(link)
    return os.path.commonpath((target, folder)) == target


# Decoding

def read_image(path, in_chans: int = 3) -> torch.Tensor:
    """Decode a file to an upright uint8 tensor (in_chans, H, W). Raises whatever the decoder raises.

    An .npy file holds a uint8 array (H, W) or (H, W, C); only this format can have other than 1 or 3 channels.
    """
    if str(path).lower().endswith(".npy"):
        array = np.load(path, allow_pickle=False)
        array = array[..., None] if array.ndim == 2 else array
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != in_chans:
            raise ValueError(f"{array.dtype} array of shape {array.shape}; --in-chans {in_chans} reads uint8 arrays of "
                             f"shape (height, width, {in_chans})")
        return as_tensor(array)
    with open(path, "rb") as file:
        content = file.read()
    if in_chans not in (1, 3):
        raise ValueError(f"an image file has 1 or 3 channels, --in-chans is {in_chans}: store such images as .npy")
    pixels = decode_jpeg(content)
    if pixels is None:
        with Image.open(io.BytesIO(content)) as image:
            image.load()  # before EXIF is read: load() rotates a TIFF, and a PNG may store EXIF after its pixels
            pixels = np.array(eight_bits(upright(image)))  # a copy: Pillow's memory is read-only
    return to_channels(as_tensor(pixels), in_chans)


def decode_jpeg(content):
    """Decode a plain JPEG file's content to an array (H, W, 1 or 3), or return None if Pillow must decode it.

    None for other formats and for JPEG files that are CMYK, damaged, or need rotation. (Tested on 24,000 files with
    changed or missing bytes: always Pillow's pixels or None.)
    """
    if simplejpeg is None or not content.startswith(b"\xff\xd8\xff"):
        return None
    if b"Exif\0" in content or b"tiff:Orientation" in content:
        with suppress(Exception), Image.open(io.BytesIO(content)) as image:  # does not decode pixels
            if image.getexif().get(ORIENTATION) in UPRIGHT:
                return None
    try:
        grey = simplejpeg.decode_jpeg_header(content)[2] == "Gray"
        return simplejpeg.decode_jpeg(content, "GRAY" if grey else "RGB")
    except ValueError:
        return None


def upright(image):
    """Rotate or mirror a PIL image as its EXIF orientation says.

    Unlike Pillow's exif_transpose, it does not rewrite the EXIF block, so malformed tags do no harm.
    """
    try:
        turn = UPRIGHT.get(image.getexif().get(ORIENTATION))
    except Exception:  # damaged EXIF can raise any exception; the pixels are intact
        turn = None
    return image if turn is None else image.transpose(turn)


def eight_bits(image):
    """Convert a PIL image of any mode to 8 bits: L if it is grey, else RGB."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):  # more than 8 bits, which Pillow would clip at 255
        values = np.asarray(image, dtype=np.float64)
        # Mode I does not state its bit depth: an image whose values stay below 256 is taken as 8-bit
        scale = 1 / 257 if image.mode.startswith("I;16") or values.max() > 255 else 1
        scale = 255 if image.mode == "F" and values.max() <= 1 else scale
        return Image.fromarray(np.clip(np.round(values * scale), 0, 255).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("L" if image.mode in ("1", "L", "LA", "La") else "RGB")


def as_tensor(array):
    """View a uint8 array (H, W) or (H, W, C) as a tensor (C, H, W) on the same memory."""
    return torch.from_numpy(array[..., None] if array.ndim == 2 else array).permute(2, 0, 1)


def from_pillow(image: Image.Image) -> torch.Tensor:
    """Convert a PIL image, RGB or L, to a contiguous uint8 tensor (C, H, W)."""
    return contiguous(as_tensor(np.array(image)))


def contiguous(image: torch.Tensor) -> torch.Tensor:
    """Make a tensor (C, H, W) contiguous, as batches are. NumPy does it three times as fast as torch."""
    return torch.from_numpy(np.ascontiguousarray(image.numpy()))


def to_pillow(image: torch.Tensor) -> Image.Image:
    """Convert a uint8 tensor (1 or 3, H, W) to a PIL image, L or RGB, for operations that only Pillow has."""
    array = image.permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(array if array.shape[2] == 3 else array[..., 0])


def to_channels(pixels, in_chans):
    """Convert between grey and colour: (1 or 3, H, W) -> (in_chans, H, W). Colour to grey uses Pillow's weights."""
    if len(pixels) == in_chans:
        return pixels
    if {len(pixels), in_chans} != {1, 3}:
        raise ValueError(f"it has {len(pixels)} channels, --in-chans is {in_chans}")
    return pixels.expand(3, -1, -1) if in_chans == 3 else from_pillow(to_pillow(pixels).convert("L"))


# Sets

@dataclass
class ImageSet:
    """A data set: images as files or as one uint8 array (N, H, W, C), with labels (N,) or None."""

    name: str
    images: FileNames | np.ndarray  # a list of paths is converted to FileNames
    labels: np.ndarray | None
    classes: list
    in_chans: int = 3

    def __post_init__(self):
        if isinstance(self.images, (list, tuple)):
            self.images = FileNames(self.images)
        self.from_files = isinstance(self.images, FileNames)
        self.kept = None  # decoded images in memory, set by keep_decoded

    def __len__(self):
        return len(self.images)

    def where(self, index):
        """Name an image for messages: its path, escaped where it is not UTF-8, or its index in the array."""
        if not self.from_files:
            return f"{self.name}[{index}]"
        return os.fsencode(self.images[index]).decode(errors="backslashreplace")

    def read(self, index):
        """Read an image as an upright uint8 tensor (C, H, W), not to be written to. Raises UnreadableImage."""
        kept = self.kept and self.kept[index]
        return self.decode(index) if kept is None else kept

    def decode(self, index):
        """Read an image as `read` does, but from its file even if it is kept in memory."""
        try:
            if self.from_files:
                return read_image(self.images[index], self.in_chans)
            return to_channels(as_tensor(np.array(self.images[index])), self.in_chans)
        except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ...
            raise UnreadableImage(f"{self.where(index)} could not be read ({type(error).__name__}: {error}). Repair or "
                                  f"remove it") from None

    def fingerprint(self) -> str:
        """Hash the content of the set, not its location: a string of 16 hexadecimal digits.

        Covers the number of images, names, labels, classes, and size and first 64 KiB of up to 1,000 files.
        """
        digest = hashlib.sha256(f"{len(self)} {self.classes} {self.in_chans} pixels {PIXELS_VERSION}".encode())
        digest.update(b"" if self.labels is None else np.asarray(self.labels, np.int64).tobytes())
        digest.update(self.images.digest() if self.from_files else b"")
        for index in range(0, len(self), math.ceil(len(self) / 1000)):
            if self.from_files:
                digest.update(str(os.path.getsize(self.images[index])).encode())
                with open(self.images[index], "rb") as file:
                    digest.update(file.read(1 << 16))
            else:
                digest.update(np.ascontiguousarray(self.images[index]).tobytes())
        return digest.hexdigest()[:16]
