"""common/data.py: every layout of folders, what is refused, fingerprints and statistics."""
import os
import pickle
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from common.data import STATISTICS, channel_statistics, load_images, load_sets, statistics
from common.errors import DataError
from common.files import EXTENSIONS
from common.options import with_statistics

RANDOM = np.random.RandomState(0).randint(0, 256, (20, 24, 3), dtype=np.uint8)


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
        "deep/a.JpEg", "deep/er/B.JPG", "deep/er/c.Png", "z.png"]  # linked/ is a folder that is there already
    assert all(len(images.read(i)) == 3 for i in range(len(images)))


def test_imagenet_is_pretrained_on_its_train_folder_alone(tmp_path):
    """Otherwise it might train on validation images, in a folder that is not named val."""
    make_tree(tmp_path, "imagenet_train/a/1.png", "imagenet_val/a/2.png")
    with pytest.raises(DataError, match=f"{tmp_path}/train is not a folder; --data folder --preset small"):
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
    """--preset demo means --data fractals, which reads no --data-path: giving both is an error."""
    make_tree(tmp_path, "train/a/1.png", "val/a/1.png")
    with pytest.raises(DataError, match="--data-path"):
        load_sets(arguments(data="fractals", data_path=str(tmp_path), output=str(tmp_path)))


@pytest.fixture(autouse=True)
def few_fractals(monkeypatch):
    for name, value in (("CLASSES", 2), ("TRAIN", 3), ("VAL", 2)):
        monkeypatch.setattr(f"common.data.FRACTAL_{name}", value)


def test_fractals_need_no_path_and_suit_the_evaluation(tmp_path):
    """They are drawn in the size to which evaluation resizes, size / 0.875, so that it does not change them."""
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
    """They are taken if none were given. The usual ones change no argument, so the run's identity stays the same."""
    grey, usual = {"mean": [0.5] * 3, "std": [0.2] * 3}, dict(zip(("mean", "std"), map(list, STATISTICS[3])))

    def of(statistics, source="file"):
        return SimpleNamespace(statistics=statistics, source=source)
    args = arguments(in_chans=3)
    for weights in (None, of(None), of(usual)):
        assert vars(with_statistics(args, weights)) == vars(args)
    taken = with_statistics(args, of(grey))
    assert channel_statistics(3, taken.mean, taken.std) == grey and args.mean is None
    with pytest.raises(DataError, match=r"other learnt from images with mean \[0.485.* leave --mean out"):
        with_statistics(taken, of(usual, "other"))
    colour = of({"mean": [0.2, 0.3, 0.7], "std": [0.2] * 3})
    narrow, more = (with_statistics(arguments(in_chans=channels), colour) for channels in (1, 5))
    assert narrow.mean == [0.4] and narrow.std == [0.2]  # as the input layer is summed
    assert more.mean is None  # nothing to take
    wide = with_statistics(arguments(in_chans=3), of({"mean": [0.4], "std": [0.2]}))
    assert wide.mean == [0.4] * 3 and wide.std == [0.2] * 3


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
    assert np.array_equal(train.read(3).numpy(), rows[3].reshape(3, 32, 32))
    assert train.fingerprint() != val.fingerprint()


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_absent_cifar_says_how_to_get_it(tmp_path, name):
    with pytest.raises(DataError, match=f"{name} is not whole in {tmp_path}.*--download"):
        load_sets(arguments(data=name, data_path=str(tmp_path)))
