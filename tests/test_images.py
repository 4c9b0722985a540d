"""common/images.py: every kind of image is compared with pixels computed by hand and with Pillow's."""
import os
import struct
import warnings
import zlib
from contextlib import suppress

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from appendix.tools import shrink_folder
from common import images as images_module
from common.images import ImageSet, UnreadableImage, decode_jpeg, read_image
from common.loader import Views
from tests.helpers import settings_of

RANDOM = np.random.RandomState(0).randint(0, 256, (20, 24, 3), dtype=np.uint8)


def as_array(tensor):
    """(H, W, C), or (H, W) of one channel."""
    assert tensor.dtype == torch.uint8 and tensor.ndim == 3
    return tensor.permute(1, 2, 0).numpy() if len(tensor) != 1 else tensor[0].numpy()


def pixels(path, in_chans=3):
    tensor = read_image(path, in_chans)
    assert len(tensor) == in_chans
    return as_array(tensor)


def saved(path, image, **how):
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(path, **how)
    return path


def smooth(height, width, channels=3):
    """Return a smooth image, which JPEG compresses without visible errors."""
    waves = np.sin(np.arange(height)[:, None, None] / 9 + np.arange(width)[None, :, None] / 13 + np.arange(channels))
    return (127 + 100 * waves).astype(np.uint8)


# Pixels

def test_colour_and_greyscale_files_are_read_exactly(tmp_path):
    colour, grey = saved(tmp_path / "c.png", RANDOM), saved(tmp_path / "g.png", RANDOM[..., 0])
    assert np.array_equal(pixels(colour), RANDOM)
    assert np.array_equal(pixels(grey, 1), RANDOM[..., 0])
    assert np.array_equal(pixels(grey), np.repeat(RANDOM[..., :1], 3, axis=2))
    luma = RANDOM @ np.array([0.299, 0.587, 0.114])  # ITU-R 601, what Pillow and torchvision call grey
    assert np.abs(pixels(colour, 1) - luma).max() <= 1


def test_cmyk_becomes_rgb(tmp_path):
    cmyk = np.random.RandomState(1).randint(0, 256, (9, 7, 4), dtype=np.uint8)
    expected = (255 - cmyk[..., :3].astype(float)) * (255 - cmyk[..., 3:].astype(float)) / 255
    path = saved(tmp_path / "a.tif", Image.frombytes("CMYK", (7, 9), cmyk.tobytes()))
    assert np.abs(pixels(path) - expected).max() <= 1
    assert np.abs(pixels(path, 1) - expected @ np.array([0.299, 0.587, 0.114])).max() <= 2

    flat = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # red ink, through the inverted CMYK of Adobe's JPEG
    assert np.abs(pixels(saved(tmp_path / "a.jpg", flat)).astype(int) - [255, 0, 0]).max() <= 3


def palette_image():
    numbers = np.arange(12, dtype=np.uint8).reshape(3, 4) % 3
    image = Image.fromarray(numbers)
    image.putpalette([255, 0, 0, 10, 20, 30, 0, 0, 255])  # switches to mode P
    assert image.mode == "P"
    return image, np.array([[255, 0, 0], [10, 20, 30], [0, 0, 255]], np.uint8)[numbers]


@pytest.mark.parametrize(("suffix", "transparency"), [
    ("png", None), ("png", 1), ("png", b"\xff\x00\x80"), ("gif", None), ("gif", 1)])
def test_palette_gives_its_colours_with_and_without_transparency(tmp_path, suffix, transparency):
    """Transparency (none, one colour, one value for each colour) is dropped, not blended and not warned about."""
    image, expected = palette_image()
    path = saved(tmp_path / f"a.{suffix}", image, **({} if transparency is None else {"transparency": transparency}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(pixels(path), expected)
        assert np.abs(pixels(path, 1) - expected @ np.array([0.299, 0.587, 0.114])).max() <= 1


def test_alpha_is_dropped(tmp_path):
    alpha = np.random.RandomState(2).randint(0, 256, (20, 24, 1), dtype=np.uint8)
    path = saved(tmp_path / "a.png", np.concatenate([RANDOM, alpha], axis=2))
    assert np.array_equal(pixels(path), RANDOM)
    grey = saved(tmp_path / "la.png", Image.merge("LA", [Image.fromarray(c) for c in (RANDOM[..., 0], alpha[..., 0])]))
    assert np.array_equal(pixels(grey, 1), RANDOM[..., 0])
    assert np.array_equal(pixels(grey), np.repeat(RANDOM[..., :1], 3, axis=2))


def test_sixteen_bits_keep_their_range(tmp_path):
    """65535 is white; Pillow itself would clip everything above 255 to white."""
    values = np.array([[0, 257, 50 * 257, 128 * 257, 65535], [100, 200, 300, 40000, 65400]], np.uint16)
    path = saved(tmp_path / "a.png", values)
    with Image.open(path) as image:
        assert image.mode.startswith("I")  # the file really has 16 bits
    expected = np.round(values / 257).astype(np.uint8)
    assert expected[0].tolist() == [0, 1, 50, 128, 255]
    assert np.array_equal(pixels(path, 1), expected)
    assert np.array_equal(pixels(path), np.repeat(expected[..., None], 3, axis=2))


def test_floats_and_bits_keep_their_range(tmp_path):
    floats = saved(tmp_path / "f.tif", np.array([[0, 0.25, 1.0]], np.float32))
    assert pixels(floats, 1).tolist() == [[0, 64, 255]]
    bits = saved(tmp_path / "b.png", Image.fromarray(np.array([[0, 255, 255, 0]], np.uint8)).convert("1"))
    with Image.open(bits) as image:
        assert image.mode == "1"
    assert pixels(bits, 1).tolist() == [[0, 255, 255, 0]]
    assert pixels(bits).tolist() == [[[0] * 3, [255] * 3, [255] * 3, [0] * 3]]


@pytest.mark.parametrize(("array", "suffix"), [
    (np.full((2, 3), 0.5, np.float32) + [[np.nan, 0, 0]], "tif"), (np.full((2, 3), 0.5) + [[np.inf, 0, 0]], "tif"),
    (np.full((2, 3), 0.5) + [[-9999, 0, 0]], "tif"), (np.full((2, 3), 0.5) * [[255, 1, 1]], "tif"),
    (np.full((2, 3), 1.01), "tif"), (np.full((2, 3), 7, np.int32), "tif"), (np.full((2, 3), 40_000, np.int32), "tif"),
    (np.full((2, 3), 2**31 - 1, np.int32), "tif"), (np.full((2, 3), -1, np.int32), "tif")])
def test_values_of_no_known_range_are_refused(tmp_path, array, suffix):
    """They are not scaled by the maximum of each image, nor clipped to black or white."""
    array = array.astype(np.float32) if array.dtype != np.int32 else array
    with pytest.raises(UnreadableImage, match="white.* 8 or 16 bits"):
        one_file(saved(tmp_path / f"a.{suffix}", Image.fromarray(array)), 1).read(0)


def test_dark_images_of_16_bits_stay_dark(tmp_path):
    values = np.array([[0, 255, 200], [3, 128, 129]], np.uint16)  # as dark as one of 8 bits would be bright
    (tmp_path / "a.pgm").write_bytes(b"P5 3 2 65535\n" + values.astype(">u2").tobytes())
    for path in (tmp_path / "a.pgm", saved(tmp_path / "a.png", values), saved(tmp_path / "a.tif", values)):
        assert pixels(path, 1).tolist() == [[0, 1, 1], [0, 0, 1]]


def test_floats_do_not_depend_on_the_brightest(tmp_path):
    for values in ([[0.1, 0.2]], [[0.1, 1.0]], [[0.1, 1.0005]], [[0.1, -0.0005]]):  # a resampled one may overshoot
        path = saved(tmp_path / "a.tif", Image.fromarray(np.array(values, np.float32)))
        assert pixels(path, 1).tolist() == [[26, round(255 * values[0][1])]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(tmp_path, orientation):
    """EXIF says on which side of the scene the stored image's row 0 and column 0 are."""
    row, column = [("top", "left"), ("top", "right"), ("bottom", "right"), ("bottom", "left"),
                   ("left", "top"), ("right", "top"), ("right", "bottom"), ("left", "bottom")][orientation - 1]
    visual = np.kron(np.random.RandomState(3).randint(0, 256, (2, 3, 3)), np.ones((16, 16, 1))).astype(np.uint8)
    stored = visual if row in ("top", "bottom") else visual.transpose(1, 0, 2)
    stored = stored[::-1] if row in ("bottom", "right") else stored
    stored = stored[:, ::-1] if column in ("bottom", "right") else stored
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / "a.jpg", np.ascontiguousarray(stored), exif=exif, quality=100, subsampling=0)
    with Image.open(path) as raw:
        assert np.abs(np.asarray(raw).astype(int) - stored).max() <= 4  # as stored: Pillow alone does not turn it
    found = pixels(path)
    assert found.shape == visual.shape
    assert np.abs(found.astype(int) - visual).max() <= 4


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_does_not_make_an_image_unreadable(tmp_path):
    """ImageNet has such files, and their pixels are intact."""
    for exif in (b"Exif\0\0no tiff header here", b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01"):
        path = saved(tmp_path / "a.jpg", RANDOM, exif=exif)
        assert pixels(path).shape == RANDOM.shape


@pytest.mark.parametrize(("channels", "shape"), [
    (1, (5, 7)), (1, (5, 7, 1)), (2, (5, 7, 2)), (3, (5, 7, 3)), (5, (5, 7, 5))])
def test_npy_of_any_number_of_channels(tmp_path, channels, shape):
    array = np.random.RandomState(4).randint(0, 256, shape, dtype=np.uint8)
    np.save(tmp_path / "a.npy", array)
    os.rename(tmp_path / "a.npy", tmp_path / "a.NPY")
    if channels in (1, 3):
        expected = array.reshape(5, 7) if channels == 1 else array
        assert np.array_equal(pixels(tmp_path / "a.NPY", channels), expected)
    else:
        tensor = read_image(tmp_path / "a.NPY", channels)
        assert tensor.dtype == torch.uint8 and tensor.shape == (channels, 5, 7)
        assert np.array_equal(tensor.permute(1, 2, 0).numpy(), array)


# What cannot be read

def one_file(path, in_chans=3):
    return ImageSet("folder", [str(path)], None, [], in_chans)


@pytest.mark.parametrize(("array", "in_chans", "named"), [
    (np.zeros((4, 4, 5), np.float32), 5, r"float32 array of shape \(4, 4, 5\).*uint8"),
    (np.zeros((4, 4, 4), np.uint8), 5, r"shape \(4, 4, 4\).*--in-chans 5"),
    (np.zeros((4, 4), np.uint8), 3, r"shape \(4, 4, 1\).*--in-chans 3"),
    (np.zeros((2, 4, 4, 3), np.uint8), 3, r"shape \(2, 4, 4, 3\)"),
    (np.array([{}]), 3, "pickle"),
])
def test_npy_of_another_type_or_shape_is_named(tmp_path, array, in_chans, named):
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(UnreadableImage, match=named) as error:
        one_file(tmp_path / "a.npy", in_chans).read(0)
    assert str(tmp_path / "a.npy") in str(error.value)


@pytest.mark.parametrize("case", [
    "half a jpeg", "last byte lost", "half a png", "text", "empty", "empty npy", "missing"])
def test_unreadable_files_are_named(tmp_path, case):
    path = tmp_path / {"half a png": "bad.png", "empty npy": "bad.npy"}.get(case, "bad.jpg")
    if case in ("half a jpeg", "last byte lost", "half a png"):
        whole = saved(path, RANDOM).read_bytes()
        path.write_bytes(whole[:-1] if case == "last byte lost" else whole[: len(whole) // 2])
    elif case != "missing":
        path.write_bytes(b"<html>not found</html>" if case == "text" else b"")
    with pytest.raises(UnreadableImage) as error:
        one_file(path).read(0)
    assert str(path) in str(error.value)
    for choice, hinted in (("stop", True), (None, False)):  # in training, and in an evaluation, which has no choice
        with pytest.raises(UnreadableImage) as error:
            Views(one_file(path), None, 0, choice)[0, 0]
        assert ("--on-bad-image skip" in str(error.value)) == hinted and str(path) in str(error.value)


def test_image_files_have_one_or_three_channels(tmp_path):
    with pytest.raises(UnreadableImage, match="1 or 3 channels, --in-chans is 5.*npy"):
        one_file(saved(tmp_path / "a.png", RANDOM), 5).read(0)


def test_arrays_are_read_like_files():
    images = ImageSet("cifar10", np.stack([RANDOM, RANDOM[::-1]]), np.array([1, 0]), ["a", "b"])
    assert np.array_equal(as_array(images.read(1)), RANDOM[::-1])
    assert len(images) == 2 and images.where(1) == "cifar10[1]"
    grey = ImageSet("cifar10", images.images, None, [], 1).read(0)[0].numpy()
    assert np.abs(grey - RANDOM @ np.array([0.299, 0.587, 0.114])).max() <= 1


# Two decoders, one meaning

def as_pillow_reads_it(path):
    """Read an image by Pillow alone."""
    with Image.open(path) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


@pytest.mark.parametrize("how", [
    dict(quality=90), dict(quality=95, subsampling=0), dict(quality=75, progressive=True),
    dict(quality=30, optimize=True)])
@pytest.mark.parametrize("shape", [(37, 50), (64, 64), (1, 1), (8, 333)])
def test_jpegs_are_decoded_as_pillow_does_it(tmp_path, how, shape):
    for number, array in enumerate((smooth(*shape), smooth(*shape, 1)[..., 0])):
        path = saved(tmp_path / f"{number}.jpg", np.ascontiguousarray(array), **how)
        assert decode_jpeg(path.read_bytes()) is not None  # not by Pillow
        assert np.array_equal(pixels(path), as_pillow_reads_it(path))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("suffix", "fast"), [("jpg", True), ("png", False), ("tif", False)])
def test_every_decoder_turns_images_alike(tmp_path, orientation, suffix, fast):
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "a camera"
    path = saved(tmp_path / f"a.{suffix}", smooth(20, 30), exif=exif)
    assert (decode_jpeg(path.read_bytes()) is not None) == (fast and orientation == 1)
    assert np.array_equal(pixels(path), as_pillow_reads_it(path))


def test_orientation_in_xmp_alone_is_obeyed(tmp_path):
    """Pillow takes the orientation from XMP if EXIF has none."""
    packet = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    path = saved(tmp_path / "a.jpg", smooth(20, 30), xmp=packet)
    assert pixels(path).shape == (30, 20, 3) and np.array_equal(pixels(path), as_pillow_reads_it(path))


def test_an_odd_exif_tag_beside_the_orientation_does_no_harm(tmp_path):
    """Pillow's exif_transpose rewrites all tags and fails if it cannot write one. A PNG is always decoded by Pillow."""
    exif = Image.Exif()
    exif[0x0112] = 6
    block = bytearray(exif.tobytes())
    start = block.index(b"\x12\x01") if b"\x12\x01" in block else block.index(b"\x01\x12")
    odd = bytes(block[:start - 2]) + (2).to_bytes(2, "little") + b"\x00\x01\x0c\x00\x05\x00\x00\x00\xff\xff\xff\x7f" + \
        bytes(block[start:])  # before it a tag of doubles that lie far behind the end of the block
    for suffix in ("jpg", "png"):
        path = saved(tmp_path / f"a.{suffix}", smooth(20, 30), exif=odd)
        assert pixels(path).shape == (30, 20, 3)


def exif_block(*entries):
    """A little-endian EXIF block: Orientation 6 and raw entries (tag, type, count, 4 bytes)."""
    entries = sorted([(0x112, 3, 1, b"\6\0\0\0"), *entries])
    body = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHI", *e[:3]) + e[3] for e in entries)
    return b"Exif\0\0II*\0" + struct.pack("<I", 8) + body + b"\0" * 4


ODD_TAGS = {
    "text as bytes, name as number": [(0x10F, 3, 1, b"\1\0\0\0"), (0x131, 7, 4, b"abcd")],
    "resolution as text": [(0x11A, 2, 4, b"72\0\0")], "version as float": [(0x9000, 11, 1, b"\0\0\x80?")],
    "width as text": [(0x100, 2, 4, b"abc\0")], "tag of no type": [(0x9C9C, 99, 1, b"\0\0\0\0")],
    "value far behind the end": [(0x9C9B, 1, 4000, b"\xff\xff\xff\x7f")]}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tags", ODD_TAGS)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_odd_tags_beside_the_orientation_are_read_upright(tmp_path, suffix, tags):
    how = {"jpg": {}, "png": {}, "webp": dict(lossless=True)}[suffix]
    path = saved(tmp_path / f"a.{suffix}", RANDOM, exif=exif_block(*ODD_TAGS[tags]), **how)
    assert pixels(path).shape == (24, 20, 3)
    assert suffix == "jpg" or np.array_equal(pixels(path), np.rot90(RANDOM, -1))


def chunk(name, data, checksum=None):
    checksum = zlib.crc32(name + data) if checksum is None else checksum
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)


LONG = zlib.compress(bytes(3_000_000))
ODD_CHUNKS = {
    "long profile": chunk(b"iCCP", b"x\0\0" + LONG), "profile of no method": chunk(b"iCCP", b"x\0\5abc"),
    "long text": chunk(b"zTXt", b"x\0\0" + LONG), "long international text": chunk(b"iTXt", b"x\0\1\0\0\0" + LONG),
    "much text": b"".join(chunk(b"zTXt", b"x%d\0\0" % i + zlib.compress(bytes(1_000_000), 1)) for i in range(68)),
    "damaged text": chunk(b"tEXt", b"a\0b", 1), "damaged private chunk": chunk(b"prVt", b"abc", 1),
    "short gamma": chunk(b"gAMA", b"\0"), "short resolution": chunk(b"pHYs", b"\0"),
    "animation of no frames": chunk(b"fcTL", bytes(26))}


@pytest.mark.parametrize("case", ODD_CHUNKS)
@pytest.mark.parametrize("turned", [False, True])
def test_a_png_is_read_whatever_lies_beside_its_pixels(tmp_path, case, turned):
    """Exactly, and upright where EXIF says so; damaged pixels stay an error."""
    path = saved(tmp_path / "a.png", RANDOM, **(dict(exif=exif_block()) if turned else {}))
    whole = path.read_bytes()
    path.write_bytes(whole[:33] + ODD_CHUNKS[case] + whole[33:])  # behind the first chunk
    assert np.array_equal(pixels(path), np.rot90(RANDOM, -1) if turned else RANDOM)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UnreadableImage):
        one_file(path).read(0)


def test_images_above_pillows_limit_are_to_be_shrunk(tmp_path, monkeypatch):
    """The message names the tool that can read them. One that needs rotation is refused too, not read unrotated."""
    plain, turned = tmp_path / "a/1.png", tmp_path / "a/2.jpg"
    plain.parent.mkdir()
    saved(plain, RANDOM)
    saved(turned, RANDOM, exif=exif_block())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)  # twice as many are an error
    for path in (plain, turned):
        with pytest.raises(UnreadableImage, match="DecompressionBombError.*Make it smaller .appendix/tools/shrink"):
            one_file(path).read(0)
    shrink_folder.main(settings_of(shrink_folder, presets={}, given={
        "data_path": str(tmp_path / "a"), "output": str(tmp_path / "small"), "short_side": 10, "workers": 0}))
    assert Image.MAX_IMAGE_PIXELS == 200
    assert sorted(pixels(path).shape for path in (tmp_path / "small").glob("*.jpg")) == [(10, 12, 3), (12, 10, 3)]


def test_damaged_jpegs_are_read_as_pillow_reads_them_or_not_at_all(tmp_path):
    """One byte is changed, anywhere in the file."""
    rng, refused = np.random.RandomState(6), 0
    whole = bytearray(saved(tmp_path / "whole.jpg", smooth(40, 50)).read_bytes())
    for _ in range(300):
        content = bytearray(whole)
        content[rng.randint(len(content))] = rng.randint(256)
        (tmp_path / "a.jpg").write_bytes(content)
        expected = found = None
        with suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = as_pillow_reads_it(tmp_path / "a.jpg")
        with suppress(UnreadableImage):
            found = as_array(one_file(tmp_path / "a.jpg").read(0))
        assert (found is None) == (expected is None) and (found is None or np.array_equal(found, expected))
        refused += found is None
    assert 20 < refused < 200


def test_pillow_alone_gives_the_same_pixels(tmp_path, monkeypatch):
    path = saved(tmp_path / "a.jpg", smooth(40, 50))
    expected = pixels(path)
    monkeypatch.setattr(images_module, "simplejpeg", None)
    assert decode_jpeg(path.read_bytes()) is None and np.array_equal(pixels(path), expected)


# Fingerprints

def test_another_version_of_the_pixels_is_another_fingerprint(monkeypatch):
    """So no run is continued with other pixels than it began with."""
    images = ImageSet("cifar10", RANDOM[None], None, [])
    before = images.fingerprint()
    monkeypatch.setattr(images_module, "PIXELS_VERSION", images_module.PIXELS_VERSION + 1)
    assert images.fingerprint() != before


def test_another_pixel_or_label_changes_the_fingerprint_of_an_array():
    def fingerprint(array, labels):
        return ImageSet("cifar10", array, labels, ["a", "b"]).fingerprint()
    array, labels = np.stack([RANDOM, RANDOM[::-1]]), np.array([0, 1])
    changed = array.copy()
    changed[1, 2, 3, 1] ^= 1
    expected = fingerprint(array, labels)
    assert fingerprint(array.copy(), labels.astype(np.int32)) == expected
    assert len({expected, fingerprint(changed, labels), fingerprint(array, labels[::-1]),
                fingerprint(array[:1], labels[:1])}) == 4
