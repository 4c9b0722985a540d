"""common/data.py: every kind of image against pixels known by hand, every layout of folders, and what is refused."""
import os
import pickle
import shutil
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from common.data import (
    EXTENSIONS,
    STATISTICS,
    DataError,
    ImageSet,
    UnreadableImage,
    channel_statistics,
    image_files,
    image_tree,
    load_images,
    load_sets,
    read_image,
    statistics,
    take_statistics,
)
from common.loader import Views

RANDOM = np.random.RandomState(0).randint(0, 256, (20, 24, 3), dtype=np.uint8)


def pixels(path, in_chans=3):
    """What is read, as an array; checks the mode on the way."""
    image = read_image(path, in_chans)
    assert image.mode == ("RGB" if in_chans == 3 else "L")
    return np.asarray(image)


def saved(path, image, **how):
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(path, **how)
    return path


def arguments(**settings):
    return SimpleNamespace(**{"data": "folder", "data_path": None, "in_chans": 3, "img_size": [8], "mean": None,
                              "std": None, "download": False, **settings})


def make_tree(root, *files):
    """Small images, each with its own pixels, at the given places below root."""
    for number, file in enumerate(files):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        fmt = "JPEG" if file.lower().endswith((".jpg", ".jpeg")) else "PNG"
        saved(root / file, RANDOM[number % 8 :, :, :], format=fmt)
    return root


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


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(tmp_path, orientation):
    """The camera's rule: which visual side row 0 and column 0 of the stored image are."""
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
    """ImageNet has some; the pixels are what counts."""
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
    assert np.array_equal(np.asarray(images.read(1)), RANDOM[::-1])
    assert len(images) == 2 and images.where(1) == "cifar10[1]"
    grey = np.asarray(ImageSet("cifar10", images.images, None, [], 1).read(0))
    assert np.abs(grey - RANDOM @ np.array([0.299, 0.587, 0.114])).max() <= 1


# Folders

def test_labelled_folders_number_their_classes_by_name(tmp_path):
    make_tree(tmp_path, "train/b/1.png", "train/b/deep/2.JPG", "train/a/3.jpeg", "train/a/notes.txt.png", "val/a/4.png",
              "val/b/5.png")
    (tmp_path / "train" / "a" / "notes.txt").write_text("not an image")
    train, val = load_sets(arguments(data_path=str(tmp_path)))
    assert train.classes == val.classes == ["a", "b"]
    assert [(os.path.relpath(p, tmp_path), int(n)) for p, n in zip(train.images, train.labels)] == [
        ("train/a/3.jpeg", 0), ("train/a/notes.txt.png", 0), ("train/b/1.png", 1), ("train/b/deep/2.JPG", 1)]
    assert val.labels.tolist() == [0, 1] and len(val) == 2


def test_classes_in_one_split_only_are_named(tmp_path):
    make_tree(tmp_path, "train/cat/1.png", "train/dog/1.png", "val/cat/1.png", "val/dgo/1.png", "val/owl/1.png")
    with pytest.raises(DataError, match="train has 2 classes and val 3.*dgo, dog, owl") as error:
        load_sets(arguments(data_path=str(tmp_path)))
    assert "cat" not in str(error.value).rsplit(":", 1)[1]


def test_missing_and_empty_folders_are_named(tmp_path):
    with pytest.raises(DataError, match="needs --data-path"):
        load_sets(arguments())
    with pytest.raises(DataError, match=f"{tmp_path}/nowhere/train is not a folder.*val/<class>/"):
        load_sets(arguments(data_path=str(tmp_path / "nowhere")))
    make_tree(tmp_path, "train/a/1.png", "train/b/1.png")
    with pytest.raises(DataError, match=f"{tmp_path}/val is not a folder"):
        load_sets(arguments(data_path=str(tmp_path)))
    make_tree(tmp_path, "val/a/1.png")
    (tmp_path / "val" / "b").mkdir()
    (tmp_path / "val" / "b" / "readme.txt").write_text("no image")
    with pytest.raises(DataError, match=r"val: .*\bb\b"):
        load_sets(arguments(data_path=str(tmp_path)))
    (tmp_path / "flat" / "train").mkdir(parents=True)
    with pytest.raises(DataError, match="flat/train.*one folder of images for each class"):
        load_sets(arguments(data_path=str(tmp_path / "flat")))


def test_imagenet_has_1000_classes(tmp_path):
    make_tree(tmp_path, *(f"{split}/{c}/1.png" for split in ("train", "val") for c in "ab"))
    with pytest.raises(DataError, match="1000 classes, found 2.*--data folder"):
        load_sets(arguments(data="imagenet", data_path=str(tmp_path)))


def test_any_tree_of_images_serves_to_pretrain(tmp_path):
    make_tree(tmp_path, "z.png", "deep/er/B.JPG", "deep/a.JpEg", "deep/er/c.Png")
    (tmp_path / "deep" / "notes.md").write_text("no image")
    os.symlink(tmp_path / "deep" / "er", tmp_path / "linked")
    images = load_images(arguments(data_path=str(tmp_path)))
    assert images.labels is None
    assert [os.path.relpath(p, tmp_path) for p in images.images] == [
        "deep/a.JpEg", "deep/er/B.JPG", "deep/er/c.Png", "linked/B.JPG", "linked/c.Png", "z.png"]
    assert all(images.read(i).mode == "RGB" for i in range(len(images)))


def test_imagenet_is_pretrained_on_its_train_folder_alone(tmp_path):
    """Else the validation images of a root with other names would be trained on."""
    make_tree(tmp_path, "imagenet_train/a/1.png", "imagenet_val/a/2.png")
    with pytest.raises(DataError, match=f"{tmp_path}/train is not a folder; --data folder"):
        load_images(arguments(data="imagenet", data_path=str(tmp_path)))


def test_pretraining_leaves_the_validation_images_alone(tmp_path):
    make_tree(tmp_path, "train/a/1.png", "train/2.png", "val/a/3.png")
    images = load_images(arguments(data_path=str(tmp_path)))
    assert [os.path.relpath(p, tmp_path) for p in images.images] == ["train/2.png", "train/a/1.png"]


def test_trees_without_images_are_named(tmp_path):
    with pytest.raises(DataError, match=f"{tmp_path}/nowhere is not a folder"):
        load_images(arguments(data_path=str(tmp_path / "nowhere")))
    (tmp_path / "a.txt").write_text("no image")
    with pytest.raises(DataError, match=f"no image below {tmp_path}.*{EXTENSIONS[0]}"):
        load_images(arguments(data_path=str(tmp_path)))


def test_a_data_path_is_never_ignored(tmp_path):
    """--preset demo means --data fractals: with a --data-path that must not pass in silence (no silent fallback)."""
    make_tree(tmp_path, "train/a/1.png", "val/a/1.png")
    with pytest.raises(DataError, match="--data-path"):
        load_sets(arguments(data="fractals", data_path=str(tmp_path), output=str(tmp_path)))


@pytest.fixture(autouse=True)
def few_fractals(monkeypatch):
    for name, value in (("CLASSES", 2), ("TRAIN", 3), ("VAL", 2)):
        monkeypatch.setattr(f"common.data.FRACTAL_{name}", value)


def test_fractals_need_no_path_and_suit_the_evaluation(tmp_path):
    """They are drawn so large that the evaluation's resize to size / 0.875 leaves them alone."""
    train, val = load_sets(arguments(data="fractals", img_size=[28, 56], output=str(tmp_path)))
    assert train.images.shape == (6, 32, 64, 3) and val.images.shape == (4, 32, 64, 3)
    assert sorted(train.labels) == [0, 0, 0, 1, 1, 1] and train.classes == val.classes == [0, 1]
    assert train.fingerprint() != val.fingerprint()


# Fingerprints

TREE = ("train/a/1.png", "train/a/2.png", "train/b/3.png")


def labelled(root):
    make_tree(root, "val/a/1.png", "val/b/1.png") if not (root / "val").exists() else None
    return load_sets(arguments(data_path=str(root)))[0]


def test_a_copied_tree_has_the_same_fingerprint(tmp_path, monkeypatch):
    here, there = make_tree(tmp_path / "here", *TREE), tmp_path / "mnt" / "deep" / "there"
    expected = labelled(here).fingerprint(), load_images(arguments(data_path=str(here))).fingerprint()
    shutil.copytree(here, there)
    os.utime(there / TREE[0], (1, 1))
    for place in (there, f"{there}/"):
        args = arguments(data_path=str(place))
        assert (load_sets(args)[0].fingerprint(), load_images(args).fingerprint()) == expected
    monkeypatch.chdir(there)
    for place in (".", "../there"):
        assert load_sets(arguments(data_path=place))[0].fingerprint() == expected[0]
    monkeypatch.chdir(there / "train")
    assert load_images(arguments(data_path=".")).fingerprint() == expected[1]


def test_another_name_size_or_label_changes_the_fingerprint(tmp_path):
    root = make_tree(tmp_path, *TREE)
    seen = [labelled(root).fingerprint()]
    os.rename(root / TREE[1], root / "train/a/5.png")
    seen.append(labelled(root).fingerprint())
    with open(root / TREE[0], "ab") as file:
        file.write(b"\0")
    seen.append(labelled(root).fingerprint())
    os.rename(root / TREE[2], root / "train/b/3.bmp")
    seen.append(labelled(root).fingerprint())
    os.rename(root / "train/a", root / "train/c")
    make_tree(root, "val/c/1.png")
    shutil.rmtree(root / "val/a")
    seen.append(labelled(root).fingerprint())
    make_tree(root, "train/c/6.png")
    seen.append(labelled(root).fingerprint())
    images = labelled(root)
    images.labels = 1 - images.labels
    seen.append(images.fingerprint())
    images.in_chans = 1
    seen.append(images.fingerprint())
    images.labels = None
    seen.append(images.fingerprint())
    assert len(set(seen)) == len(seen)


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


# Statistics and torchvision's sets

def test_statistics_are_per_channel_in_0_to_255():
    mean, std = statistics(arguments())
    assert torch.allclose(mean, torch.tensor([123.675, 116.28, 103.53]))  # ImageNet's, as published in bytes
    assert torch.allclose(std, torch.tensor([58.395, 57.12, 57.375]))
    for channels in (1, 2, 5):
        mean, std = statistics(arguments(in_chans=channels))
        assert mean.shape == std.shape == (channels,) and mean.dtype == torch.float32
        assert ((mean > 100) & (mean < 155) & (std > 50) & (std < 70)).all()
    mean, std = statistics(arguments(in_chans=2, mean=[0.1, 0.2], std=[0.4, 1.0]))
    assert torch.allclose(mean, torch.tensor([25.5, 51.0])) and torch.allclose(std, torch.tensor([102.0, 255.0]))


@pytest.mark.parametrize(("channels", "mean", "std", "named"), [
    (3, [0.5], None, "--mean has 1 and --std 3 numbers, --in-chans is 3"),
    (5, None, [0.2] * 4, "--mean has 5 and --std 4 numbers, --in-chans is 5"),
    (3, [124, 116, 104], [58, 57, 57], "--mean .124, 116, 104. --std .*divide those of bytes by 255"),
    (1, [0.4], [0.0], "--std .0.0.: both are of values in 0..1"),
])
def test_wrong_counts_of_statistics_are_named(channels, mean, std, named):
    with pytest.raises(DataError, match=named):
        statistics(arguments(in_chans=channels, mean=mean, std=std))


def test_statistics_travel_with_weights():
    """Taken where nothing was said; the usual ones leave the arguments, so the run's identity, as they are."""
    grey, usual = {"mean": [0.5] * 3, "std": [0.2] * 3}, dict(zip(("mean", "std"), map(list, STATISTICS[3])))
    args = arguments(in_chans=3)
    take_statistics(args, None)
    take_statistics(args, SimpleNamespace(statistics=None, source="file"))
    take_statistics(args, SimpleNamespace(statistics=usual, source="file"))
    assert args.mean is None and args.std is None
    take_statistics(args, SimpleNamespace(statistics=grey, source="file"))
    assert channel_statistics(3, args.mean, args.std) == grey
    with pytest.raises(DataError, match=r"other learnt from images with mean \[0.485.* leave --mean out"):
        take_statistics(args, SimpleNamespace(statistics=usual, source="other"))
    narrow, more = arguments(in_chans=1), arguments(in_chans=5)
    for args in (narrow, more):
        take_statistics(args, SimpleNamespace(statistics={"mean": [0.2, 0.3, 0.7], "std": [0.2] * 3}, source="file"))
    assert narrow.mean == [0.4] and narrow.std == [0.2]  # as the input layer is summed
    assert more.mean is None  # nothing to take
    wide = arguments(in_chans=3)
    take_statistics(wide, SimpleNamespace(statistics={"mean": [0.4], "std": [0.2]}, source="file"))
    assert wide.mean == [0.4] * 3 and wide.std == [0.2] * 3


def test_links_are_followed_but_not_back_up(tmp_path):
    """Nor round in circles: else each image would be found again below every turn."""
    (tmp_path / "data" / "a").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for place in ("data/a/1.png", "elsewhere/2.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / place)
    (tmp_path / "data" / "a" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "data" / "a")
    names = [os.path.relpath(path, tmp_path / "data") for path in image_files(tmp_path / "data")]
    assert names == ["a/1.png", "b/2.png", "b/back/1.png"]


def test_names_need_not_be_utf8(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", os.fsencode(tmp_path / "caf") + b"\xe9.png")
    images = image_tree(tmp_path, 3)
    assert len(images) == 1 and images.read(0).size == (4, 4) and len(images.fingerprint()) == 16
    assert images.where(0).endswith("caf\\xe9.png") and images.where(0).encode()


def test_cifar10_is_read_from_torchvisions_files(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rows = np.random.RandomState(5).randint(0, 256, (6, 3072), dtype=np.uint8)  # a row: the red plane, green, blue
    for number, name in enumerate(["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5",
                                   "test_batch"]):
        (folder / name).write_bytes(pickle.dumps({"data": rows[number : number + 1], "labels": [9 - number]}))
    classes = [f"class {i}" for i in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": classes}))
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda path, md5=None: os.path.isfile(path))
    train, val = load_sets(arguments(data="cifar10", data_path=str(tmp_path)))
    assert train.labels.tolist() == [9, 8, 7, 6, 5] and val.labels.tolist() == [4] and train.classes == classes
    assert np.array_equal(np.asarray(train.read(3)), rows[3].reshape(3, 32, 32).transpose(1, 2, 0))
    assert train.fingerprint() != val.fingerprint()


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_absent_cifar_says_how_to_get_it(tmp_path, name):
    with pytest.raises(DataError, match=f"{name} is not whole in {tmp_path}.*--download"):
        load_sets(arguments(data=name, data_path=str(tmp_path)))
