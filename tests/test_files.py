"""common/files.py: which files below a folder are the images of a set, by one rule for sets with labels and without."""
import os
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from common import files
from common.data import images_to_analyse, labelled_folder, load_images, load_sets
from common.errors import DataError
from common.files import FileNames, Packed, list_images
from common.images import ImageSet

RANDOM = np.random.RandomState(0).randint(0, 256, (20, 24, 3), dtype=np.uint8)


def saved(path, image, **how):
    Image.fromarray(image).save(path, **how)
    return path


def tree(root, *names):
    """Files below root, each with its own content, which nobody decodes here."""
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(bytes([number]) * (number + 5))
    return root


def arguments(path, **settings):
    return SimpleNamespace(**{"data": "folder", "data_path": str(path), "in_chans": 3, "img_size": [8], **settings})


def below(root, images):
    return [os.path.relpath(path, root) for path in images.images]


# Names

def test_packed_strings_come_back():
    parts = [b"", b"abc", b"", "ä".encode(), b"z" * 1000]
    packed = Packed(parts)
    assert len(packed) == 5 and list(packed) == parts and packed[-1] == parts[-1]
    with pytest.raises(IndexError):
        packed[5]
    assert packed.digest() != Packed([b"a", b"bc", b"", parts[3], parts[4]]).digest()  # the same bytes, cut otherwise


def test_file_names_come_back_and_are_told_apart_below_their_folder():
    paths = ["/data/set/a/1.png", "/data/set/a/2.png", "/data/set/ab/1.png"]
    names = FileNames(paths)
    assert list(names) == paths and list(names[1:]) == paths[1:]
    assert list(names[np.array([2, 0])]) == [paths[2], paths[0]]
    moved = FileNames([path.replace("/data/set", "elsewhere") for path in paths])
    assert moved.digest() == names.digest() != FileNames(paths[:2]).digest()
    assert list(FileNames(["one.png"])) == ["one.png"] and list(FileNames([])) == []


def test_names_need_not_be_utf8(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", os.fsencode(tmp_path / "caf") + b"\xe9.png")
    images = ImageSet("folder", list_images(tmp_path), None, [])
    assert len(images) == 1 and images.read(0).shape == (3, 4, 4) and len(images.fingerprint()) == 16
    assert images.where(0).endswith("caf\\xe9.png") and images.where(0).encode()


# Listing

def test_a_link_to_the_folder_above_the_listed_one_is_not_followed(tmp_path):
    """From a class's folder, it would lead to all other classes, and from train/ to val/."""
    for place in ("train/a/1.png", "train/b/2.png", "val/a/3.png"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        saved(tmp_path / place, RANDOM)
    (tmp_path / "train/a/up").symlink_to("..")
    (tmp_path / "train/a/top").symlink_to(tmp_path)
    assert list_images(tmp_path / "train/a") == [str(tmp_path / "train/a/1.png")]
    assert len(list_images(tmp_path / "train")) == 2


def test_hidden_and_irregular_files_are_passed_over(tmp_path):
    for place in ("a/1.png", "a/._1.png", ".cache/2.png", "a/.ipynb_checkpoints/3.png", "b.png/4.png"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        saved(tmp_path / place, RANDOM, format="PNG")
    os.mkfifo(tmp_path / "a" / "pipe.png")
    (tmp_path / "a" / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    assert [os.path.relpath(path, tmp_path) for path in list_images(tmp_path)] == ["a/1.png", "b.png/4.png"]


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    scandir = os.scandir

    def refused(folder):
        if str(folder).endswith("a"):
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)
    monkeypatch.setattr(files.os, "scandir", refused)
    with pytest.raises(DataError, match=r"/a cannot be listed \(Permission denied\)"):
        list_images(tmp_path)
    (tmp_path / "a" / "a").mkdir()
    for listed in (lambda: labelled_folder(tmp_path, 3, ""), lambda: load_images(arguments(tmp_path)),
                   lambda: images_to_analyse(arguments(tmp_path))):
        with pytest.raises(DataError, match=r"/a cannot be listed \(Permission denied\)"):
            listed()


def test_links_are_followed_but_not_back_up(tmp_path):
    """Nor in circles: an image would be found again on each round."""
    (tmp_path / "data" / "a").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for place in ("data/a/1.png", "elsewhere/2.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / place)
    (tmp_path / "data" / "a" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "data" / "a")
    names = [os.path.relpath(path, tmp_path / "data") for path in list_images(tmp_path / "data")]
    assert names == ["a/1.png", "b/2.png"]


# One rule

ADVERSITIES = {
    "link to the folder above": lambda root: (root / "a/here").symlink_to(".."),
    "link to itself": lambda root: (root / "a/loop").symlink_to(root / "a"),
    "class that is a link to all": lambda root: (root / "up").symlink_to(root),
    "resource forks of macOS": lambda root: tree(root, "a/._1.png", "b/deep/._2.JPG"),
    "hidden folders": lambda root: tree(root, ".git/1.png", "a/.ipynb_checkpoints/1.png", "b/deep/.thumbs/.x/1.png"),
    "a pipe": lambda root: os.mkfifo(root / "a/pipe.jpg"),
    "a broken link": lambda root: (root / "a/gone.png").symlink_to(root / "nowhere.png"),
    "other files": lambda root: tree(root, "a/notes.txt", "b/1.png.json", "b/jpg", "b/animated.gif"),
}


@pytest.mark.parametrize("adversity", ADVERSITIES)
def test_sets_with_and_without_labels_list_each_file_once(tmp_path, adversity):
    root = tree(tmp_path / "set", "a/1.png", "a/9.JPG", "b/deep/2.Jpeg", "b/3.TIF", "b/4.jfif")
    ADVERSITIES[adversity](root)
    expected = ["a/1.png", "a/9.JPG", "b/3.TIF", "b/4.jfif", "b/deep/2.Jpeg"]
    labelled = labelled_folder(root, 3, "folder")
    assert below(root, labelled) == expected and labelled.labels.tolist() == [0, 0, 1, 1, 1]
    assert below(root, load_images(arguments(root))) == expected
    assert below(root, images_to_analyse(arguments(root))) == expected


def test_what_is_passed_over_is_counted_aloud_and_once(tmp_path, capsys):
    root = tree(tmp_path, "a/1.png", "b/2.jpe", "a/3.gif", "b/x/4.GIF", "b/5.heic", "a/6", "b/.hidden.gif")
    os.mkfifo(root / "b/pipe.png")
    for _ in range(2):
        assert len(labelled_folder(root, 3, "folder")) == 2 == len(load_images(arguments(root)))
    out = capsys.readouterr().out.splitlines()
    [line] = {line for line in out if "passed over" in line}
    assert "2 images; 5 other files" in line and "2 .gif" in line and "1 .heic" in line and "1 without ext" in line
    assert "1 .png (broken links or no regular files)" in line
    assert len(out) <= 2


@pytest.mark.parametrize(("names", "said"), [
    (["a/1.png", "b/2.png", "b/deep/3.png"], None),
    (["x/a/1.png", "x/b/2.png"], "(1: x); all images lie deeper, as"),
    (["day1/a/1.png", "day2/b/2.png"], "(2: day1, day2); all images lie deeper, as"),
    (["all/1.png", "all/2.png"], "(1: all); is this the right folder?"),
    (["a/1.png", "b/2.png", "3.png"], "1 images beside the folders of the classes are passed over, such as"),
])
def test_classes_that_may_lie_elsewhere_are_said(tmp_path, capsys, names, said):
    labelled_folder(tree(tmp_path, *names), 3, "folder")
    out = capsys.readouterr().out
    assert said in out if said else out == ""


def test_jpegs_of_other_names_are_read_alike(tmp_path):
    for suffix in ("jpg", "jfif", "jpe", "JFIF"):
        saved(tmp_path / f"{suffix}.{suffix}", RANDOM, format="JPEG")
    images = load_images(arguments(tmp_path))
    assert len(images) == 4 and len({images.read(i).numpy().tobytes() for i in range(4)}) == 1


@pytest.mark.parametrize(("names", "found", "classes"), [
    (["val/a/1.png", "val/b/2.png", "train/a/3.png"], ["val/a/1.png", "val/b/2.png"], ["a", "b"]),
    (["val/1.png", "val/deep/er/2.png", "train/a/3.png"], ["val/1.png", "val/deep/er/2.png"], []),
    (["b/1.png", "a/2.png"], ["a/2.png", "b/1.png"], ["a", "b"]),
    (["1.png", "a/b/c/2.JPG"], ["1.png", "a/b/c/2.JPG"], []),
    (["val/a/1.png", "val/empty/readme"], ["val/a/1.png"], ["a"]),
])
def test_any_tree_of_images_can_be_analysed(tmp_path, names, found, classes):
    images = images_to_analyse(arguments(tree(tmp_path, *names)))
    assert below(tmp_path, images) == found and images.classes == classes
    assert (images.labels is None) == (not classes)


def test_nothing_to_analyse_is_an_error(tmp_path):
    with pytest.raises(DataError, match=f"no image below {tmp_path}"):
        images_to_analyse(arguments(tree(tmp_path, "a/readme")))
    with pytest.raises(DataError, match="nowhere is not a folder"):
        images_to_analyse(arguments(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="val is not a folder.*--data folder"):
        images_to_analyse(arguments(tmp_path, data="imagenet"))


def test_fingerprints_of_before_are_those_of_today(tmp_path):
    """If they changed, finished runs would not be found. They were recorded when classes were listed one by one."""
    root = tree(tmp_path, "train/b-1/2.png", "train/b/x/1.JPG", "train/b/0.jpeg", "train/a/3.tif", "val/a/1.webp",
                "val/b/2.npy", "val/b-1/9.bmp")
    train, val = load_sets(arguments(root))
    assert [train.fingerprint(), val.fingerprint()] == ["ac94c907c6a6b036", "8fc1b388f639402e"]
    assert images_to_analyse(arguments(root)).fingerprint() == "8fc1b388f639402e"
    assert load_images(arguments(root)).fingerprint() == "ed83db440cf6657e"
    assert load_images(arguments(root / "val")).fingerprint() == "aced19adf7cfc2c4"
