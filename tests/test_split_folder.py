"""appendix/tools/split_folder.py: each image on one side, the same again, and smaller draws as parts of larger ones."""
import os

import pytest
from PIL import Image

from appendix.tools import split_folder
from common.data import load_sets
from common.errors import UserError
from sec3_benchmark import finetune
from tests.helpers import settings_of

SIZES = {"a": 10, "b": 25, "c": 2}


@pytest.fixture
def classes(tmp_path):
    for name, count in SIZES.items():
        for i in range(count):
            path = tmp_path / "classes" / name / ("deep" if i % 2 else "") / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4), (i, 0, 0)).save(path)
    return tmp_path / "classes"


def run(folder, target, **given):
    return split_folder.main(settings_of(split_folder, presets={}, given={
        "data_path": str(folder), "split_path": str(target), **given}))


def files(folder):
    return {path.relative_to(folder) for path in folder.rglob("*.png")}


def test_every_image_is_on_one_side_and_read_from_there(classes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("classes", "split", val_share=0.2) == {"train": 8 + 20 + 1, "val": 2 + 5 + 1}
    train, val = files(tmp_path / "split" / "train"), files(tmp_path / "split" / "val")
    assert not train & val and train | val == files(classes)
    monkeypatch.chdir("/")  # the links hold from anywhere
    args = settings_of(finetune, presets={}, given={"data": "folder", "data_path": str(tmp_path / "split")})
    sets = load_sets(args)
    assert [len(images) for images in sets] == [29, 8] and sets[0].read(0).shape == (3, 4, 4)


def test_the_draw_is_of_names_and_seed(classes, tmp_path):
    for number, given in enumerate(({}, {}, {"seed": 1}, {"per_class": 4}, {"per_class": 2, "num_classes": 2})):
        run(classes, tmp_path / str(number), **given)
    train, val = ([files(tmp_path / str(number) / part) for number in range(5)] for part in ("train", "val"))
    assert train[0] == train[1] != train[2] and val[0] == val[1] == val[3]
    assert train[4] < train[3] < train[0] and len(train[3]) == 4 + 4 + 1
    assert {path.parts[0] for path in train[4]} == {"a", "b"}
    Image.new("RGB", (4, 4)).save(classes / "b" / "new.png")  # moves no other image but one at the border
    run(classes, tmp_path / "later")
    assert len(val[0] - files(tmp_path / "later" / "val")) <= 1


@pytest.mark.parametrize(("given", "message"), [
    ({"val_share": 0.9}, "class c has 2 images and 2 would go to val/"),
    ({"split_path": "old"}, "--split-path old exists: name a new folder"),
    ({"data_path": "no/where"}, "no/where is not a folder: give one that holds a folder of images for each class"),
    ({"data_path": "old"}, "must hold one folder of images for each class"),
    ({"split_path": "classes/new"}, "classes/new lies inside --data-path .*/classes"),
    ({"split_path": "old/../classes/deeper/new"}, "lies inside --data-path"),
    ({"split_path": "link/new"}, "link/new lies inside --data-path"),
    ({"split_path": "classes"}, "--split-path classes lies inside --data-path"),
    ({"split_path": "."}, r"--data-path .*/classes lies inside --split-path \."),  # and never "remove it"
])
def test_what_cannot_be_split_is_said(classes, tmp_path, monkeypatch, given, message):
    monkeypatch.chdir(tmp_path)
    os.mkdir("old")
    os.symlink("classes", "link")
    with pytest.raises(UserError, match=message):
        run(**{"folder": classes, "target": "new", **given})
    assert not os.path.exists("new") and sorted(os.listdir("classes")) == ["a", "b", "c"]
