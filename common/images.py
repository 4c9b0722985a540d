"""Decoding image files to uint8 tensors (C, H, W), and data sets of images.

simplejpeg decodes plain JPEG files, to the same pixels as Pillow and faster; Pillow decodes everything else.
(torchvision's decoders are deprecated, and its PNG decoder crashes the process on a damaged file.)
"""
import hashlib
import io
import math
import os
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from common.errors import DataError
from common.files import FileNames

try:
    import simplejpeg
except ImportError:  # Pillow alone gives the same pixels
    simplejpeg = None

# Increase this number whenever a change makes the same files give other pixels or crops. It is part of every data set's
# fingerprint, so that no run is reused or resumed with other pixels than it began with.
# Version 2: tensors are resized instead of PIL images, and crops are sampled by timm's rule.
PIXELS_VERSION = 2
ORIENTATION = 0x0112  # EXIF tag for how the camera was held; UPRIGHT: value of the tag -> operation that corrects it
UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
           5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
           8: Image.Transpose.ROTATE_90}


class UnreadableImage(DataError):
    """An image that could not be decoded; the message names the file."""


# Decoding

def read_image(path, in_chans: int = 3) -> torch.Tensor:
    """Decode a file to an upright uint8 tensor (in_chans, H, W). Raises whatever the decoder raises.

    An .npy file holds a uint8 array (H, W) or (H, W, C); only this format can have channels other than 1 or 3.
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
        pixels = np.array(eight_bits(upright(open_by_pillow(content))))  # a copy: Pillow's memory is read-only
    return to_channels(as_tensor(pixels), in_chans)


def decode_jpeg(content):
    """Decode a plain JPEG file's content to an array (H, W, 1 or 3), or return None if Pillow must decode it.

    Pillow must decode other formats, and JPEG files that are CMYK, damaged, or need rotation. (Tested on 24,000 files
    with changed or missing bytes: the result is always Pillow's pixels or None.)
    """
    if simplejpeg is None or not content.startswith(b"\xff\xd8\xff"):
        return None
    if b"Exif\0" in content or b"tiff:Orientation" in content:
        try:
            with Image.open(io.BytesIO(content)) as image:  # does not decode pixels
                turned = image.getexif().get(ORIENTATION) in UPRIGHT
        except Exception as error:  # damaged EXIF, ignored; or too large for Pillow, which then raises the error
            turned = isinstance(error, Image.DecompressionBombError)
        if turned:
            return None
    try:
        grey = simplejpeg.decode_jpeg_header(content)[2] == "Gray"
        return simplejpeg.decode_jpeg(content, "GRAY" if grey else "RGB")
    except ValueError:
        return None


def open_by_pillow(content):
    """Decode a file's content by Pillow. Raises whatever Pillow raises."""
    try:
        image = Image.open(io.BytesIO(content))
        image.load()  # before EXIF is read: load() rotates a TIFF, and a PNG may store EXIF after its pixels
    except Exception as error:
        bare = without_metadata(content) if content.startswith(b"\x89PNG") else content
        if bare != content:  # Pillow refuses malformed or long metadata, though the pixels may be intact
            return open_by_pillow(bare)
        if isinstance(error, UnidentifiedImageError):  # its own message shows an address in memory
            raise UnidentifiedImageError("cannot identify the format of the image") from None
        raise
    return image


def without_metadata(content):
    """Return a PNG file's content without its ancillary chunks (names in lower case) other than EXIF."""
    bare, start = content[:8], 8
    while start < len(content):
        end = start + 12 + int.from_bytes(content[start:start + 4], "big")
        name = content[start + 4:start + 8]
        bare += content[start:end] if name[:1].isupper() or name == b"eXIf" else b""
        start = end
    return bare


def upright(image):
    """Rotate or mirror a PIL image as its EXIF orientation says.

    Unlike Pillow's exif_transpose, this does not rewrite the EXIF block, so malformed tags do no harm.
    """
    try:
        turn = UPRIGHT.get(image.getexif().get(ORIENTATION))
    except Exception:  # damaged EXIF can raise any exception; the pixels are intact
        turn = None
    if turn is None:
        return image
    turned = image.transpose(turn)
    turned.format = image.format  # transpose forgets it
    return turned


def eight_bits(image):
    """Convert a PIL image of any mode to 8 bits: to mode L if it is grey, else to RGB.

    White is 65535 in 16-bit images and 1 in images of floats. Raises ValueError for values above white or below 0.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):  # more than 8 bits, which Pillow would clip at 255
        if image.mode == "I" and image.format not in ("PNG", "PPM"):  # in these two formats, mode I means 16 bits
            raise ValueError("signed or 32-bit whole numbers, of which no value is known to be white: store it "
                             "unsigned, with 8 or 16 bits")
        values = np.asarray(image, dtype=np.float64)
        levels = np.round(values * 255 if image.mode == "F" else values / 257)
        if not (levels.min() >= 0 and levels.max() <= 255):  # also true for NaN
            raise ValueError(f"floats from {values.min():g} to {values.max():g}, where 1 is white: scale them to 0..1, "
                             f"or store it with 8 or 16 bits")
        return Image.fromarray(levels.astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("L" if image.mode in ("1", "L", "LA", "La") else "RGB")


def as_tensor(array):
    """View a uint8 array (H, W) or (H, W, C) as a tensor (C, H, W) on the same memory."""
    return torch.from_numpy(array[..., None] if array.ndim == 2 else array).permute(2, 0, 1)


def from_pillow(image: Image.Image) -> torch.Tensor:
    """Convert a PIL image of mode RGB or L to a contiguous uint8 tensor (C, H, W)."""
    return contiguous(as_tensor(np.array(image)))


def contiguous(image: torch.Tensor) -> torch.Tensor:
    """Make a tensor (C, H, W) contiguous, as batches are. NumPy does it three times as fast as torch."""
    return torch.from_numpy(np.ascontiguousarray(image.numpy()))


def to_pillow(image: torch.Tensor) -> Image.Image:
    """Convert a uint8 tensor (1 or 3, H, W) to a PIL image of mode L or RGB, for operations that only Pillow has."""
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
        """Name an image for messages: its path, with escapes if it is not UTF-8, or its index in the array."""
        if not self.from_files:
            return f"{self.name}[{index}]"
        return os.fsencode(self.images[index]).decode(errors="backslashreplace")

    def read(self, index):
        """Read an image as an upright uint8 tensor (C, H, W), not to be written to. Raises UnreadableImage."""
        kept = self.kept and self.kept[index]
        return self.decode(index) if kept is None else kept

    def decode(self, index):
        """Read an image as `read` does, but decode its file even if the image is kept in memory."""
        try:
            if self.from_files:
                return read_image(self.images[index], self.in_chans)
            return to_channels(as_tensor(np.array(self.images[index])), self.in_chans)
        except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ...
            large = isinstance(error, Image.DecompressionBombError)
            remedy = "Make it smaller (appendix/tools/shrink_folder.py)" if large else "Repair, convert or remove it"
            raise UnreadableImage(f"{self.where(index)} could not be read ({type(error).__name__}: {error}). {remedy}"
                                  ) from None

    def fingerprint(self) -> str:
        """Hash the set's content, whatever its location, to a string of 16 hexadecimal digits.

        Covers the number of images, their names, labels and classes, and of up to 1,000 files the size and the first
        64 KiB.
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
