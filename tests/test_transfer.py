"""Table 4: each data set's splits, from tiny copies of the official layouts; the transfer recipe against Appendix A.4's
numbers and torch's plain SGD; short runs, stopped and continued; cells of the table, run once and reused.
"""
import argparse
import json
import os
import pickle
import signal
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from scipy.io import savemat

from common import options, report, tables
from common.errors import UserError
from common.images import DataError, ImageSet
from common.mae import DECODERS, MAE
from common.runs import settings_hash
from common.vit import SIZES, build_vit
from sec3_benchmark import downstream, downstream_sets, pretrain_mae, table4_transfer, transfer
from sec3_benchmark.downstream import PUBLISHED
from sec3_benchmark.downstream_sets import FRACTALS, SETS, load_downstream
from sec3_benchmark.layer_decay import layer_groups
from tests.helpers import assert_close, assert_same, settings_of
from tests.processes import ROOT, start, start_ranks


def picture(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.RandomState(seed).randint(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)


def asked(name, root, **settings):
    return argparse.Namespace(**{"dataset": name, "dataset_path": str(root), "download": False, "in_chans": 3,
                                 "img_size": [8], "output": str(root), **settings})


# The official layouts. Each function makes a tiny one and returns what must be read: file names below the root, labels.

def make_flowers(root):
    folder = root / "flowers-102"
    for number in range(1, 7):
        picture(folder / "jpg" / f"image_{number:05d}.jpg")
    savemat(folder / "imagelabels.mat", {"labels": np.array([[2, 1, 102, 5, 1, 5]])})
    savemat(folder / "setid.mat", {"trnid": [[3, 1]], "valid": [[5, 6]], "tstid": [[2, 4]]})
    names = [f"flowers-102/jpg/image_{number:05d}.jpg" for number in range(7)]
    return ([names[i] for i in (3, 1, 5, 6)], [101, 1, 0, 4]), ([names[2], names[4]], [0, 4])


def make_pets(root):
    folder = root / "oxford-iiit-pet"
    lists = {"trainval": ("Abyssinian_100 1 1 1", "great_pyrenees_3 2 2 1", "Abyssinian_7 1 1 1"),
             "test": ("great_pyrenees_1 2 2 1", "Abyssinian_2 1 1 1")}
    for split, lines in lists.items():
        for line in lines:
            picture(folder / "images" / f"{line.split()[0]}.jpg")
        (folder / "annotations").mkdir(exist_ok=True)
        (folder / "annotations" / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return [([f"oxford-iiit-pet/images/{line.split()[0]}.jpg" for line in lists[split]], labels)
            for split, labels in (("trainval", [0, 1, 0]), ("test", [1, 0]))]


def make_aircraft(root):
    folder = root / "fgvc-aircraft-2013b" / "data"
    lists = {"trainval": ("0034309 Cessna 172", "0000001 707-320"), "test": ("0000009 727-200",)}
    for split, lines in lists.items():
        for line in lines:
            picture(folder / "images" / f"{line.split()[0]}.jpg")
        (folder / f"images_variant_{split}.txt").write_text("\n".join(lines) + "\n")
    (folder / "variants.txt").write_text("707-320\n727-200\nCessna 172\n")
    return [([f"fgvc-aircraft-2013b/data/images/{line.split()[0]}.jpg" for line in lists[split]], labels)
            for split, labels in (("trainval", [2, 0]), ("test", [1]))]


def make_cars(root):
    folder, found = root / "stanford_cars", []
    (folder / "devkit").mkdir(parents=True)
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": np.array([["Acura RL", "Audi A6", "BMW X5"]], object)})
    for split, labels, file in (("train", [3, 1, 2], "devkit/cars_train_annos.mat"),
                                ("test", [2, 2], "cars_test_annos_withlabels.mat")):
        names = [f"{number:05d}.jpg" for number in range(1, len(labels) + 1)]
        records = np.array([[(1, 2, 30, 40, label, name) for label, name in zip(labels, names)]],
                           [(key, object) for key in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")])
        savemat(folder / file, {"annotations": records})
        for name in names:
            picture(folder / f"cars_{split}" / name)
        found.append(([f"stanford_cars/cars_{split}/{name}" for name in names], [label - 1 for label in labels]))
    return found


def make_cifar100(root):
    folder, found = root / "cifar-100-python", []
    folder.mkdir()
    for split, labels in (("train", [5, 99, 0]), ("test", [7, 7])):
        pixels = np.random.RandomState(len(labels)).randint(0, 256, (len(labels), 3072), dtype=np.uint8)
        (folder / split).write_bytes(pickle.dumps({"data": pixels, "fine_labels": labels, "coarse_labels": [0, 0, 0]}))
        found.append((pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [str(n) for n in range(100)]}))
    return found


def make_inat18(root):
    """Write a tiny iNat18. Its annotations have category 7 first, then 3, then 0; the images are in another order."""
    folder = root / "inat2018"
    parts = {"train2018": [(11, 7), (10, 3), (13, 7), (12, 0)], "val2018": [(21, 0), (20, 7)]}
    found = []
    for split, pairs in parts.items():
        files = {image: f"train_val2018/Aves/{category}/{image}.jpg" for image, category in pairs}
        for file in files.values():
            picture(folder / file)
        (folder / f"{split}.json").write_text(json.dumps({
            "images": [{"id": image, "file_name": files[image]} for image in sorted(files)],
            "annotations": [{"id": 5, "image_id": image, "category_id": category} for image, category in pairs]}))
        found.append(([f"inat2018/{files[image]}" for image, _ in pairs], [{7: 0, 3: 1, 0: 2}[c] for _, c in pairs]))
    (folder / "categories.json").write_text(json.dumps([{"id": i, "name": f"species {i}"} for i in range(9)]))
    return found


MAKERS = {"flowers": make_flowers, "pets": make_pets, "aircraft": make_aircraft, "cars": make_cars,
          "cifar100": make_cifar100, "inat18": make_inat18}
CLASSES = {"flowers": 102, "pets": 2, "aircraft": 3, "cars": 3, "cifar100": 100, "inat18": 3}


@pytest.fixture
def tiny(monkeypatch):
    """Return a function that writes a tiny official set and sets the expected counts. Checksums are not compared."""
    for module in ("cifar", "flowers102"):
        monkeypatch.setattr(getattr(torchvision.datasets, module), "check_integrity",
                            lambda path, md5=None: os.path.isfile(path))

    def make(name, root):
        train, test = MAKERS[name](root)
        counts = {"images": (len(train[1]), len(test[1])), "classes": CLASSES[name]}
        monkeypatch.setitem(SETS, name, {**SETS[name], **counts})
        return train, test
    return make


@pytest.mark.parametrize("name", SETS)
def test_splits_and_labels_are_the_official_ones(tiny, tmp_path, name):
    """trainval is used where there is one; iNat18's classes are in the order of the training annotations."""
    for (images, labels), read in zip(tiny(name, tmp_path), load_downstream(asked(name, tmp_path)), strict=True):
        if isinstance(images, np.ndarray):
            assert np.array_equal(read.images, images)
        else:
            assert [os.path.relpath(path, tmp_path) for path in read.images] == images
        assert read.labels.tolist() == labels and len(read.classes) == CLASSES[name]
        assert read.read(0).dtype == torch.uint8 and len(read.read(0)) == 3 and len(read.fingerprint()) == 16


def test_names_of_classes_follow_the_labels(tiny, tmp_path):
    names = {}
    for name in ("pets", "aircraft", "cars", "inat18"):
        tiny(name, tmp_path)
        names[name] = load_downstream(asked(name, tmp_path))[0].classes
    assert names == {"pets": ["Abyssinian", "Great Pyrenees"], "aircraft": ["707-320", "727-200", "Cessna 172"],
                     "cars": ["Acura RL", "Audi A6", "BMW X5"], "inat18": ["species 7", "species 3", "species 0"]}


@pytest.mark.parametrize("name", SETS)
def test_an_absent_set_says_what_is_needed_and_where_from(tmp_path, name):
    with pytest.raises(DataError) as error:
        load_downstream(asked(name, tmp_path))
    for part in (SETS[name]["title"], str(tmp_path), SETS[name]["holds"], SETS[name]["source"]):
        assert part in str(error.value)
    assert ("cannot fetch it" in str(error.value)) == (name in ("cars", "inat18"))


@pytest.mark.parametrize("name", ["cars", "inat18"])
def test_download_is_not_tried_where_there_is_nothing_to_fetch(tiny, tmp_path, name):
    tiny(name, tmp_path)
    load_downstream(asked(name, tmp_path, download=True))


@pytest.mark.parametrize(("name", "file"), [
    ("flowers", "flowers-102/setid.mat"), ("pets", "oxford-iiit-pet/annotations/test.txt"),
    ("aircraft", "fgvc-aircraft-2013b/data/images_variant_test.txt"), ("cars", "stanford_cars/devkit/cars_meta.mat"),
    ("cars", "stanford_cars/cars_test_annos_withlabels.mat"), ("cifar100", "cifar-100-python/test"),
    ("inat18", "inat2018/categories.json"), ("inat18", "inat2018/val2018.json"),
    ("flowers", "flowers-102/jpg/image_00003.jpg"), ("inat18", "inat2018/train_val2018/Aves/7/11.jpg")])
def test_a_missing_file_is_noticed_before_anything_runs(tiny, tmp_path, name, file):
    tiny(name, tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(DataError, match=SETS[name]["title"] + ".* must hold "):
        load_downstream(asked(name, tmp_path))


def test_a_list_that_was_cut_short_is_noticed(tiny, tmp_path):
    tiny("inat18", tmp_path)
    path = tmp_path / "inat2018" / "train2018.json"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="iNat18 is not whole .* must hold inat2018/"):
        load_downstream(asked("inat18", tmp_path))


@pytest.mark.parametrize(("old", "new"), [('"annotations"', '"notes"'), ('"category_id"', '"category"'), ("{", "[{")])
def test_a_list_of_other_entries_is_noticed(tiny, tmp_path, old, new):
    tiny("inat18", tmp_path)
    path = tmp_path / "inat2018" / "train2018.json"
    path.write_text(path.read_text().replace(old, new, 1) + "]" * (new == "[{"))
    with pytest.raises(DataError, match="iNat18 is not whole .*(KeyError|TypeError).* must hold inat2018/"):
        load_downstream(asked("inat18", tmp_path))


def test_a_category_that_training_lacks_is_noticed(tiny, tmp_path):
    tiny("inat18", tmp_path)
    path = tmp_path / "inat2018" / "val2018.json"
    path.write_text(path.read_text().replace('"category_id": 7', '"category_id": 8'))
    with pytest.raises(DataError, match="iNat18 is not whole .*KeyError: 8.* must hold inat2018/"):
        load_downstream(asked("inat18", tmp_path))


def test_another_number_of_images_or_classes_is_refused(tiny, tmp_path, monkeypatch):
    tiny("pets", tmp_path)
    monkeypatch.setitem(SETS, "pets", {**SETS["pets"], "images": (3_680, 3_669), "classes": 37})
    with pytest.raises(DataError, match="train has 3 images of 2 classes, where 3680 of 37 are expected"):
        load_downstream(asked("pets", tmp_path))


def test_the_official_counts():
    counts = {name: (*about["images"], about["classes"]) for name, about in SETS.items()}
    assert counts == {"flowers": (2040, 6149, 102), "pets": (3680, 3669, 37), "aircraft": (6667, 3333, 100),
                      "cars": (8144, 8041, 196), "cifar100": (50000, 10000, 100), "inat18": (437513, 24426, 8142)}


# Folders and fractals

def make_folder(root, splits=("train", "val"), count=8):
    places = [root / split / label / f"{i}.png" for split in splits for label in ("a", "b") for i in range(count)]
    for seed, place in enumerate(places):
        picture(place, seed)
    return root


def test_any_folder_is_a_set_by_its_name_or_as_the_path_itself(tmp_path):
    make_folder(tmp_path / "mine", ("train", "val", "test"))
    for name, root in (("mine", tmp_path), ("folder", tmp_path / "mine")):
        train, test = load_downstream(asked(name, root))
        assert len(train) == len(test) == 16 and {Path(p).parts[-3] for p in test.images} == {"test"}
    make_folder(tmp_path / "other")
    assert Path(load_downstream(asked("other", tmp_path))[1].images[0]).parts[-3] == "val"


@pytest.mark.parametrize("name", ["/root/mine", "../mine", "mine/", ".."])
def test_a_set_s_name_is_no_path(tmp_path, name):
    """The name is part of the run's folder too, which a path would put among the user's data."""
    with pytest.raises(DataError, match="the name of a folder in --dataset-path, not a path"):
        downstream_sets.check_path(name, str(tmp_path))


def test_mistakes_with_folders(tmp_path):
    make_folder(tmp_path / "mine", ("train",))
    with pytest.raises(DataError, match="--dataset mine: .*mine does not hold train/ and test/.*flowers, pets"):
        load_downstream(asked("mine", tmp_path))
    make_folder(tmp_path / "mine", ("test",))
    (tmp_path / "mine" / "test" / "b").rename(tmp_path / "mine" / "test" / "c")
    with pytest.raises(DataError, match="in one of them only: b, c"):
        load_downstream(asked("mine", tmp_path))
    with pytest.raises(DataError, match="flowers needs --dataset-path"):
        load_downstream(asked("flowers", ""))
    with pytest.raises(DataError, match="fractals-small is generated and reads no --dataset-path"):
        load_downstream(asked("fractals-small", tmp_path))


def test_the_fractal_sets_share_classes_and_test_images_and_none_with_pretraining(tmp_path):
    sets = {name: load_downstream(asked(name, "", output=str(tmp_path))) for name in FRACTALS}
    (small, test), (large, same) = sets.values()
    assert (len(small), len(large)) == (400, 2000) and np.array_equal(test.images, same.images)
    assert np.array_equal(large.images[:400], small.images) and small.images.shape[1:] == (9, 9, 3)
    files = sorted(path.name.split("-seed0-")[1] for path in (tmp_path / "data").iterdir())
    assert [name.split("-10x")[0] for name in files] == ["downstream-train"] * 2 + ["downstream-val"]


# The recipe

def resolved(**explicit):
    return settings_of(transfer, explicit)


def test_the_paper_preset_is_the_authors_recipe():
    """Appendix A.4: the class defaults, and CIFAR-100's published settings."""
    settings = vars(resolved(preset="paper", dataset="anything", dataset_path="somewhere"))
    expected = dict(epochs=300, warmup_epochs=20, batch_size=512, base_lr=0.03, lr=None, min_lr=1e-6, momentum=0.9,
                    weight_decay=0, clip_grad=1, layer_decay=0.75, crop_min=0.08, global_pool="avg", eval_every=10,
                    img_size=[224], model="vit_tiny", num_heads=12, patch_size=16)
    assert {name: settings[name] for name in expected} == expected
    cifar = vars(resolved(preset="paper"))
    published = dict(dataset="cifar100", epochs=50, warmup_epochs=10, lr=0.1, layer_decay=0.75, batch_size=512)
    assert {name: cifar[name] for name in published} == published


def test_a_sets_settings_give_way_to_the_command_line_and_win_over_the_preset():
    assert resolved(preset="small", dataset="cifar100").epochs == 50
    assert resolved(preset="small", dataset="cifar100", epochs=70).epochs == 70
    assert resolved(preset="small", dataset="mine").epochs == transfer.PRESETS["small"]["epochs"]
    assert resolved().dataset == "fractals-large"
    assert resolved().epochs == downstream.SETTINGS["fractals-large"]["epochs"]  # for the set that the preset chose
    assert resolved(dataset_path="somewhere").preset == "paper"


def test_every_set_is_in_both_literals():
    assert set(downstream.SETTINGS) == {*SETS, *FRACTALS} and set(downstream_sets.READERS) == set(SETS)
    assert PUBLISHED["random"]["inat18"] == 58.7 and PUBLISHED["mocov3"]["coco-mask"] == 35.1
    assert PUBLISHED["dmae"]["imagenet"] == 78.4 and PUBLISHED["mae"]["pets"] == 76.5
    assert {row: numbers.get("imagenet") for row, numbers in PUBLISHED.items()} == {
        "random": None, "supervised": 75.8, "mocov3": 76.8, "mae": 78.0, "dino": 77.2, "simmim": 77.9, "dmae": 78.4,
        "d2mae": 78.7}


def rates(images, **settings):
    """Compute the rate at the start, after the warm-up, in the middle of the cosine, in the last step and after it."""
    args, images = resolved(preset="paper", dataset="anything", **settings), ImageSet("set", [""] * images, None, [])
    return [transfer.schedule(args, images)(step) for step in (0, 20 * 3, 160 * 3, 300 * 3 - 1, 300 * 3)]


def test_the_rate_is_per_512_images_unless_it_is_absolute():
    """2,040 images in batches of 512 are 3 steps; the middle of the cosine is epoch 160."""
    for batch, settings, peak in ((512, {}, 0.03), (600, {}, 0.03 * 600 / 512), (600, {"lr": 0.1}, 0.1)):
        start, top, middle, nearly, end = rates(2040, batch_size=batch, **settings)
        assert start == 0 and top == pytest.approx(peak) and middle == pytest.approx((peak + 1e-6) / 2)
        assert end == pytest.approx(1e-6) and end < nearly < 1e-5


def test_impossible_schedules_are_refused():
    with pytest.raises(UserError, match="--warmup-epochs 10 leaves nothing of --epochs 7"):
        resolved(dataset="cifar100", epochs=7)
    with pytest.raises(UserError, match="set has 511 images, fewer than one batch of 512"):
        rates(511)


def test_layers_are_slowed_down_and_nothing_decays():
    vit = build_vit("vit_tiny", num_classes=5)
    groups = layer_groups(vit, 0.0, 0.75)
    scale = {name: group["lr_scale"] for group in groups for name in group["names"]}
    assert scale["patch_embed.proj.weight"] == scale["pos_embed"] == pytest.approx(0.0238, abs=5e-5)
    assert scale["head.weight"] == scale["fc_norm.bias"] == 1 and scale["blocks.11.mlp.fc1.bias"] == 0.75
    assert len(groups) == 14 and {group["weight_decay"] for group in groups} == {0.0}


def test_sgd_is_torchs_plain_nesterov_and_starts_clean_after_a_skipped_update():
    ours, plain = (torch.nn.Linear(7, 5) for _ in range(2))
    plain.load_state_dict(ours.state_dict())
    fused = transfer.sgd([{"params": list(ours.parameters()), "lr": 0.1}], 0.9)
    reference = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, nesterov=True, foreach=False, fused=False)
    before = [p.detach().clone() for p in ours.parameters()]
    for step in range(6):
        skipped = step in (0, 3)
        for a, b in zip(ours.parameters(), plain.parameters()):
            a.grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(step))
            b.grad = a.grad.clone()
            if skipped:
                a.grad.fill_(torch.nan)
        fused.grad_scale, fused.found_inf = None, torch.tensor(float(skipped))
        fused.step()
        if step == 0:
            assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), before))
        if not skipped:
            reference.step()
    for a, b in zip(ours.parameters(), plain.parameters()):
        assert_close(a, b, 1e-6)


def test_only_what_changes_the_result_identifies_a_run():
    settings = vars(resolved(dataset="mine", dataset_path="here"))
    assert settings_hash({**settings, "dataset_path": "/there"}, {}) == settings_hash(settings, {})
    for name in ("dataset", "lr", "layer_decay", "keep_blocks"):
        assert settings_hash({**settings, name: 7}, {}) != settings_hash(settings, {}), name
    paper = vars(resolved(preset="paper", dataset_path="anywhere"))
    assert settings_hash(paper, {"data": "0123456789abcdef"}) == "05122e3ae2"  # changes only where results do


# Runs

@pytest.fixture
def small(tmp_path, monkeypatch):
    """Return a function settings -> result: transfer.main on 16 + 16 images of noise, a narrow model of two blocks."""
    monkeypatch.setitem(SIZES, "vit_demo", {"embed_dim": 12, "depth": 2})
    monkeypatch.setitem(DECODERS, "vit_demo", (12, 1, 2))
    monkeypatch.setattr(report, "draw_curve", lambda *paths: None)  # half the time of such short runs
    make_folder(tmp_path / "mine")
    row = dict(preset="demo", model="vit_demo", dataset="mine", dataset_path=str(tmp_path), img_size=[16], patch_size=8,
               num_heads=3, batch_size=4, epochs=2, warmup_epochs=1, lr=0.1, eval_every=1, log_every=1, device="cpu",
               precision="fp32", workers=0)

    def run(output="out", **explicit):
        explicit = {"output": str(tmp_path / output), **explicit}
        return transfer.main(settings_of(transfer, {**row, **explicit}, {}))
    return run


def checkpoint_of(kind, path):
    """Save weights as pre-training leaves them: MAE with its decoder, or MoCo-v3 in its public layout."""
    shape = dict(img_size=16, patch_size=8, num_heads=3)
    torch.manual_seed(3)
    model = MAE("vit_demo", decoder_heads=2, **shape) if kind == "mae" else \
        build_vit("vit_demo", num_classes=0, global_pool="token", **shape)
    moco = {f"module.base_encoder.{name}": value for name, value in model.state_dict().items()}
    moco |= {"module.base_encoder.head.0.weight": torch.ones(4, 12), "module.predictor.0.weight": torch.ones(4, 4)}
    torch.save({"model": model.state_dict(), "config": model.config} if kind == "mae" else {"state_dict": moco}, path)
    return str(path), model.state_dict()


def weights(result):
    return torch.load(result["checkpoint"], weights_only=True)["model"]


@pytest.mark.parametrize("kind", ["random", "mae", "moco"])
def test_two_epochs_from_each_start_resume_exactly(small, tmp_path, monkeypatch, kind):
    init = None if kind == "random" else checkpoint_of(kind, tmp_path / "init.pt")[0]
    whole = small(init=init)
    assert whole["train_images"] == 16 and 0 <= whole["top1"] <= whole["best_top1"] <= 100
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(transfer.CrossEntropy, "after_step",
                      lambda self, step: step == 2 and os.kill(os.getpid(), signal.SIGTERM))
        small("again", init=init)
    assert stopped.value.code == 75
    assert_same(weights(small("again", init=init)), weights(whole))


def test_what_the_checkpoint_gives_and_keep_blocks(small, tmp_path):
    """At a learning rate of 0 the weights stay the initial ones."""
    init, state = checkpoint_of("mae", tmp_path / "init.pt")
    started = weights(small(init=init, lr=0.0, min_lr=0.0))
    for name, value in started.items():
        if name in state:
            assert torch.equal(value, state[name]), name
    assert torch.equal(started["fc_norm.weight"], torch.ones(12))  # MAE's norm is not the classifier's
    kept = weights(small(init=init, lr=0.0, min_lr=0.0, keep_blocks=1))
    assert torch.equal(kept["blocks.0.attn.qkv.weight"], state["blocks.0.attn.qkv.weight"])
    assert not torch.equal(kept["blocks.1.attn.qkv.weight"], state["blocks.1.attn.qkv.weight"])
    with pytest.raises(UserError, match="--keep-blocks needs --init"):
        small(keep_blocks=1)


def test_a_reused_run_says_its_accuracy(small, capsys):
    first, said = small(), capsys.readouterr().out.splitlines()[-1]
    assert small()["top1"] == first["top1"]
    assert said == capsys.readouterr().out.splitlines()[-1]
    assert said == f"mine: top-1 {first['top1']:.2f} after the last epoch (best {first['best_top1']:.2f})"


def test_accumulation_changes_nothing_but_rounding(small):
    whole, parts = weights(small()), weights(small("parts", micro_batch=2))
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=0, atol=1e-5)


def test_a_set_smaller_than_a_batch_is_an_error_that_names_both(small):
    with pytest.raises(UserError, match="folder has 16 images, fewer than one batch of 32: lower --batch-size"):
        small(batch_size=32)


@pytest.mark.slow
def test_two_ranks_equal_one_process(tmp_path):
    make_folder(tmp_path / "mine")
    words = [sys.executable, str(ROOT / "sec3_benchmark" / "transfer.py"), "--preset", "demo", "--dataset", "mine",
             "--dataset-path", str(tmp_path), "--img-size", "16", "--patch-size", "8", "--batch-size", "4", "--epochs",
             "2", "--warmup-epochs", "1", "--lr", "0.1", "--log-every", "1", "--device", "cpu", "--precision", "fp32",
             "--workers", "0"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert start([*words, "--output", str(one)], one).wait(120) == 0
    for rank in start_ranks([*words, "--output", str(two)], two):
        assert rank.wait(120) == 0, (two / "said.txt").read_text()
    ours, theirs = (torch.load(next(place.glob("transfer/*/weights.pt")), weights_only=True)["model"]
                    for place in (one, two))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-5)


# The table

@pytest.fixture
def table(small, tmp_path, monkeypatch):
    """Return a function words -> rows: table4_transfer.main on two tiny folders, with a stub for MoCo-v3's script."""
    make_folder(tmp_path / "more", count=12)
    stub = ModuleType("sec3_benchmark.pretrain_mocov3")
    stub.build_parser, stub.PRESETS = pretrain_mae.build_parser, pretrain_mae.PRESETS
    stub.main = lambda args: {"checkpoint": checkpoint_of("moco", tmp_path / f"moco{args.seed}.pt")[0]}
    monkeypatch.setitem(sys.modules, "sec3_benchmark.pretrain_mocov3", stub)
    common = ["--preset", "demo", "--data", "folder", "--data-path", str(tmp_path / "mine"), "--dataset-path",
              str(tmp_path), "--img-size", "16", "--device", "cpu", "--precision", "fp32",
              "--workers", "0", "--output", str(tmp_path / "out")]

    def run(*words, stages=("finetune", "pretrain_mae", "pretrain_mocov3", "transfer")):
        sets = ["--set", "transfer.warmup_epochs=1", "transfer.lr=0.05"] + [
            f"{stage}.{setting}" for stage in stages
            for setting in ("epochs=2", "batch_size=4", "patch_size=8", "num_heads=3")]
        return table4_transfer.main(tables.parse(table4_transfer.build_parser(), [*common, *words, *sets]))
    return run


def test_cells_are_run_once_for_each_seed_and_reused(table, tmp_path, monkeypatch):
    rows = {row["key"]: row for row in table("--datasets", "mine", "--seeds", "0", "1")}
    assert [key for key, row in rows.items() if row["seeds"]] == list(table4_transfer.DEMO)
    for row in (rows[key] for key in table4_transfer.DEMO):
        assert row["seeds"] == 2 and row["published"] == PUBLISHED[row["key"]]
        assert len(row["measured"]["mine"]) == 2 and row["train_images"] == {"mine": 16}
        assert row["run"]["mine"][0] != row["run"]["mine"][1]
    folder = tmp_path / "out" / "table4"
    stored = json.loads((folder / "table4.json").read_text())
    assert stored["rows"] == list(rows.values()) and (folder / "table4.png").stat().st_size > 5000
    text = (folder / "table4.md").read_text()
    assert " ± " in text and "32.7 / not run" in text and "Training images: mine 16." in text
    settings = json.loads((Path(rows["random"]["run"]["mine"][1]) / "settings.json").read_text())
    assert {name: settings[name] for name in ("lr", "seed", "init", "img_size")} == dict(lr=0.05, seed=1, init=None,
                                                                                         img_size=[16])
    assert json.loads((Path(rows["mae"]["run"]["mine"][0]) / "settings.json").read_text())["init"]

    monkeypatch.setattr(transfer, "train", None)  # nothing is trained a second time
    monkeypatch.setattr(pretrain_mae, "train", None)
    assert {row["key"]: row for row in table("--datasets", "mine", "--seeds", "0", "1")} == rows


def test_given_weights_are_transferred_and_nothing_is_pretrained(table, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain_mae, "train", None)
    first, second = (checkpoint_of(kind, tmp_path / f"{kind}.pt")[0] for kind in ("mae", "moco"))
    words = ("--models", f"mae={first}", f"late={second}", "--rows", "random", "--datasets", "mine", "more")
    rows = {row["key"]: row for row in table(*words, stages=("transfer",))}
    assert [key for key, row in rows.items() if row["seeds"]] == ["random", "mae", "late"]
    assert rows["mae"]["published"] == PUBLISHED["mae"] and rows["late"]["published"] == {}
    assert rows["mae"]["note"] == f"weights given: {tmp_path.name}/mae.pt"
    settings = [json.loads((Path(rows[key]["run"]["mine"][0]) / "settings.json").read_text())
                for key in ("random", "mae")]
    assert all(settings[0][name] == settings[1][name] for name in options.SHAPE)
    for row in (rows["random"], rows["mae"], rows["late"]):
        assert row["train_images"] == {"mine": 16, "more": 24} and list(row["measured"]) == ["mine", "more"]
    for words in (["mae"], ["mae="], ["=file"], ["mae=a", "mae=b"]):
        with pytest.raises(UserError, match="--models .*: write NAME=VALUE, each name once"):
            table("--models", *words, "--datasets", "mine")


def test_the_random_row_is_the_network_of_the_given_files(tmp_path):
    """Otherwise it would be the preset's network, and differ from the weights in model, size and normalisation."""
    model = MAE("vit_small", img_size=(32, 16), patch_size=8)
    other = {"mean": [0.5] * 3, "std": [0.2] * 3}
    torch.save({"model": model.state_dict(), "config": model.config, "statistics": other}, tmp_path / "mae.pt")

    def random_row(*words):
        args = tables.parse(table4_transfer.build_parser(), ["--preset", "small", "--models", f"mae={tmp_path}/mae.pt",
                                                             *words])
        rows, args = downstream.with_models(table4_transfer.ROWS, args)
        line = downstream.random_like(next(row for row in rows if row.key == "random"), args).lines[0]
        return options.given(transfer.build_parser(), line.split()[1:])
    shape = {"model": "vit_small", "img_size": [32, 16], "patch_size": 8, "in_chans": 3, "num_heads": 12, **other}
    assert random_row("--rows", "random") == shape
    assert random_row() == {}  # not to be run
    assert "img_size" not in random_row("--rows", "all", "--img-size", "64")


def test_in_coco_the_random_network_has_the_size_of_the_given_files_and_the_canvas_of_the_other_rows(tmp_path, capsys):
    model = MAE("vit_tiny", img_size=64, patch_size=8)
    torch.save({"model": model.state_dict(), "config": model.config}, tmp_path / "mae.pt")
    words = ["--preset", "small", "--datasets", "coco", "--dataset-path", "ROOT", "--dry-run", "--rows", "random"]
    table4_transfer.main(tables.parse(table4_transfer.build_parser(), [*words, "--models", f"mae={tmp_path}/mae.pt"]))
    [random, given] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("python ")]
    assert "--position-size 64 64 --patch-size 8" in random and "--init" in given
    assert "--img-size" not in random + given  # small's canvas in both


def test_given_weights_of_simmim_may_be_a_plain_vit(tmp_path):
    args = tables.parse(table4_transfer.build_parser(), ["--models", "simmim=plain.pt", "--rows", "mae"])
    given = downstream.cells(downstream.with_models(table4_transfer.ROWS, args)[0], ["coco"])
    assert "simmim" in {row.key for row in given}
    assert "simmim" not in {row.key for row in downstream.cells(table4_transfer.ROWS, ["coco"])}
    with pytest.raises(UserError, match="--rows simmim: detect.py takes plain ViTs"):
        downstream.cells(table4_transfer.ROWS, ["coco"], ["mae", "simmim"])


def test_a_dry_run_prints_commands_that_mean_the_same(table, capsys):
    table("--dry-run", "--rows", "mae", "--datasets", "mine", "more")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("python ")]
    scripts = [line.split()[1] for line in lines]
    assert scripts == ["sec3_benchmark/pretrain_mae.py", *2 * ["sec3_benchmark/transfer.py"]]
    saved = lines[0].split("--save-to ")[1].split()[0]
    assert all(f"--init {saved} " in line and "--dataset-path" in line for line in lines[1:])
    assert all("--data " not in line and "--data-path" not in line for line in lines[1:])  # of the pre-training


def test_absent_sets_stop_the_table_before_it_pretrains(table, monkeypatch):
    monkeypatch.setattr(pretrain_mae, "train", None)
    with pytest.raises(DataError, match="Pets is not whole"):
        table("--datasets", "mine", "pets")


def test_gaps_are_differences_to_the_supervised_row():
    rows = [{"key": row.key, "name": row.name, "published": row.published, "measured": {}}
            for row in table4_transfer.ROWS]
    gaps = table4_transfer.gaps(rows, table4_transfer.published)
    assert set(gaps) == {"MoCo-v3", "MAE", "DINO", "SimMIM"} and set(gaps["MAE"]) == set(SETS)
    assert gaps["MAE"]["pets"] == pytest.approx([-16.6]) and gaps["MoCo-v3"]["inat18"] == pytest.approx([-9.1])
    assert table4_transfer.gaps(rows, table4_transfer.measured) == {}
    rows[1]["measured"], rows[3]["measured"] = {"mine": [50.0, 60.0]}, {"mine": [45.0, 57.0], "more": [1.0, 2.0]}
    assert table4_transfer.gaps(rows, table4_transfer.measured) == {"MAE": {"mine": [-5.0, -3.0]}}


def test_given_weights_keep_their_row_s_settings_and_the_picture_holds_them_all():
    given = {"simmim": "F", "a": "F", "b": "F"}
    args = argparse.Namespace(models=[f"{name}={file}" for name, file in given.items()], rows=["random"])
    rows, args = downstream.with_models(table4_transfer.ROWS, args)
    rows = {row.key: row for row in rows}
    assert args.rows == ["random", "simmim", "a", "b"]
    assert rows["simmim"].lines == rows["a"].lines == ["sec3_benchmark/transfer.py --init F"]
    figure = table4_transfer.draw([
        {"key": row.key, "name": row.name, "published": row.published, "measured": {"mine": [50.0 + i], "same": [40.0]},
         "train_images": {"mine": 100, "same": 100}} for i, row in enumerate(rows.values())])
    figure.draw_without_rendering()
    for axis in figure.axes:  # even of sets of one size
        boxes = [label.get_window_extent() for label in axis.get_xticklabels()]
        assert len(boxes) > 1 and not any(box.overlaps(other) for box, other in zip(boxes, boxes[1:]))
