"""appendix/tools/predict.py: classes by name, and the accuracy that the classifier's own evaluation had."""
import csv
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from appendix.tools import convert_checkpoint, predict
from common.checkpoint import save_torch
from common.errors import UserError
from common.mae import MAE
from tests.helpers import settings_of, stage


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of two classes and a hidden one, and classifiers of it: colour and grey."""
    folder, rng = tmp_path_factory.mktemp("predict"), np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 9)):
        for name, level in (("cat", 60), ("dog", 150)):
            (folder / "data" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(level - 60, level + 60, (20, 20, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / "data" / split / name / f"{i}.png")
    hidden = folder / "data" / "train" / ".ipynb_checkpoints"
    hidden.mkdir()
    Image.new("RGB", (20, 20)).save(hidden / "0.png")
    common = {"preset": "small", "data_path": str(folder / "data"), "output": str(folder / "outputs"), "device": "cpu",
              "workers": 0, "img_size": [16], "patch_size": 8, "model": "vit_demo", "epochs": 3, "batch_size": 16,
              "warmup_epochs": 0, "precision": "fp32", "randaugment": "none", "mixup": 0.0}
    trained = {name: stage("sec3_benchmark/finetune.py", {**common, "in_chans": channels})
               for name, channels in (("colour", 3), ("grey", 1))}
    return SimpleNamespace(folder=folder, **trained)


def run(place, tmp_path, init, data, **given):
    return predict.main(settings_of(predict, presets={}, given={
        "init": str(init), "data_path": str(data), "device": "cpu", "workers": 0, "output": str(tmp_path), **given}))


@pytest.mark.parametrize("kind", ["colour", "grey"])
def test_the_accuracy_is_that_of_the_evaluation(place, tmp_path, kind, capsys):
    trained = getattr(place, kind)
    found = run(place, tmp_path, trained["checkpoint"], place.folder / "data" / "val")
    assert 100 * found["accuracy"] == pytest.approx(trained["top1"]) and trained["top1"] > 50
    with open(found["file"], newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 18 and {row["folder"] for row in rows} == {"cat", "dog"}
    right = sum(row["class"] == row["folder"] for row in rows)
    assert right / 18 == found["accuracy"] and f"{100 * right / 18:.2f} % of 18 images are right" in \
        capsys.readouterr().out


def test_16_bit_and_single_images_are_read_as_in_training(place, tmp_path):
    original = place.folder / "data" / "val" / "dog" / "0.png"
    grey = np.asarray(Image.open(original).convert("L"))
    home = tmp_path / "cat"  # a folder above the image tells nothing of it
    home.mkdir()
    for name, array in (("8.png", grey), ("16.png", grey.astype(np.uint16) * 257)):
        Image.fromarray(array).save(home / name)
    assert run(place, tmp_path, place.colour["checkpoint"], home)["accuracy"] is None
    rows = []
    for name in ("8.png", "16.png"):
        found = run(place, tmp_path, place.colour["checkpoint"], home / name)
        rows.append(list(csv.DictReader(open(found["file"], newline="")))[0])
        assert found["accuracy"] is None and "folder" not in rows[-1]
    assert rows[0]["class"] == rows[1]["class"] and rows[0]["probability"] == rows[1]["probability"]


def test_the_names_travel_to_timm(place, tmp_path):
    convert_checkpoint.main(settings_of(convert_checkpoint, presets={}, given={
        "checkpoint": place.colour["checkpoint"], "to": "timm", "output": str(tmp_path / "out")}))
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert list(model.pretrained_cfg["label_names"]) == ["cat", "dog"]
    found = run(place, tmp_path, tmp_path / "out", place.folder / "data" / "val")
    assert 100 * found["accuracy"] == pytest.approx(place.colour["top1"])


def test_links_strays_and_odd_names(place, tmp_path, capsys):
    """A class behind a link counts, what lies in no class's folder is read and said, a name need not be UTF-8."""
    data, val = tmp_path / "data", place.folder / "data" / "val"
    data.mkdir()
    (data / "cat").symlink_to(val / "cat")
    (data / "dog").symlink_to(val / "dog")
    stray = data / os.fsdecode(b"caf\xe9")
    stray.mkdir()
    (stray / os.fsdecode(b"caf\xe9.png")).symlink_to(val / "cat" / "0.png")
    found = run(place, tmp_path, place.colour["checkpoint"], data)
    assert 100 * found["accuracy"] == pytest.approx(place.colour["top1"]) and len(found["classes"]) == 19
    assert "of 18 images are right (1 lie in no folder of a class)" in capsys.readouterr().out
    assert b"caf\xe9.png" in open(found["file"], "rb").read()


@pytest.mark.parametrize(("name", "expected"), [
    ("=1+1", "'=1+1"), ("+cat", "'+cat"), ("-cat", "'-cat"), ("@SUM(A1)", "'@SUM(A1)"), ("cat", "cat"), ("a=b", "a=b"),
    ("", "")])
def test_no_name_is_a_formula_in_a_spreadsheet(name, expected):
    assert predict.cell(name) == expected


def test_a_class_called_like_a_formula_is_quoted_in_the_table_alone(place, tmp_path):
    content = torch.load(place.colour["checkpoint"], weights_only=True)
    save_torch(tmp_path / "odd.pt", {**content, "classes": ["=cat", "\x1b[31mdog"]})
    found = run(place, tmp_path, tmp_path / "odd.pt", place.folder / "data" / "val")
    assert set(found["classes"]) <= {"=cat", "\x1b[31mdog"}
    with open(found["file"], newline="") as file:
        assert {row["class"] for row in csv.DictReader(file)} <= {"'=cat", "\x1b[31mdog"}


def test_without_names_and_without_a_classifier(place, tmp_path, capsys):
    content = torch.load(place.colour["checkpoint"], weights_only=True)
    del content["classes"]  # as in files of before
    save_torch(tmp_path / "old.pt", content)
    found = run(place, tmp_path, tmp_path / "old.pt", place.folder / "data" / "val")
    assert found["accuracy"] is None
    assert set(found["classes"]) <= {"0", "1"} and "does not name its classes" in capsys.readouterr().out
    model = MAE("vit_demo", img_size=16, patch_size=8)
    save_torch(tmp_path / "mae.pt", {"model": model.state_dict(), "config": model.config})
    with pytest.raises(UserError, match="holds no classifier"):
        run(place, tmp_path, tmp_path / "mae.pt", place.folder / "data" / "val")
    with pytest.raises(UserError, match="no such file or folder"):
        run(place, tmp_path, place.colour["checkpoint"], tmp_path / "nowhere")


def test_unreadable_images_have_no_class_and_the_rows_of_the_others_stay(place, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(place.folder / "data" / "val", data)
    whole = run(place, tmp_path, place.colour["checkpoint"], data)["classes"]
    for name, content in {"cat/0.png": b"text", "cat/7.png": b"", "dog/4.png": None}.items():
        path = data / name
        path.write_bytes(path.read_bytes()[:70] if content is None else content)
    with pytest.raises(UserError, match="cat/0.png could not be read.*--on-bad-image skip"):
        run(place, tmp_path, place.colour["checkpoint"], data, on_bad_image="stop")
    capsys.readouterr()
    for batch_size in (128, 4):
        found = run(place, tmp_path, place.colour["checkpoint"], data, batch_size=batch_size)
        bad = [0, 7, 13]  # of cat/0 ... cat/8, dog/0 ...
        assert found["classes"] == ["" if i in bad else name for i, name in enumerate(whole)]
        assert found["unreadable"] == [str(data / name) for name in ("cat/0.png", "cat/7.png", "dog/4.png")]
        rows = list(csv.DictReader(open(found["file"], newline="")))
        assert [row["class"] for row in rows] == found["classes"] and all(
            bool(row["class"]) == bool(row["probability"]) for row in rows)
        read = [(row["class"], row["folder"]) for row in rows if row["class"]]
        assert found["accuracy"] == pytest.approx(sum(a == b for a, b in read) / 15)
        assert "3 of 18 images are unreadable and left out: " in capsys.readouterr().out
