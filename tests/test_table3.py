"""Table 3: parts of a data set, drawn and listed; equal iterations; the table on a tiny folder."""
import json
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from common import options, tables
from common.errors import UserError
from common.images import ImageSet
from sec3_benchmark import pretrain_mae, subsets
from sec3_benchmark import table3_pretraining_data as table3
from tests.helpers import settings_of

# images per class of ImageNet-LT's train split, as published beside github.com/JiahuiKChen/LT-classification
OFFICIAL_LT = np.sort(json.loads((Path(__file__).parent / "imagenet_lt_class_counts.json").read_text()))[::-1]


def labelled(sizes):
    """Make an ImageSet with these numbers of images per class, named like ImageNet's files, in mixed order."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    files = [f"/d/train/n{label:08d}/n{label:08d}_{i}.JPEG" for i, label in enumerate(labels)]
    return ImageSet("toy", files, labels, [f"n{c:08d}" for c in range(len(sizes))])


def counts(images):
    return np.bincount(images.labels, minlength=len(images.classes))


# Drawn

def test_balanced_draws_have_the_counts_of_the_official_lists():
    """Of 1,281,167 images, 12,811 = 811 x 13 + 189 x 12 and 128,116 = 116 x 129 + 884 x 128, for any class sizes."""
    sizes = np.full(1000, 1300)
    sizes[:33] -= 568
    sizes[33] -= 89
    assert sizes.sum() == 1_281_167
    for fraction, expected in ((0.01, {13: 811, 12: 189}), (0.1, {129: 116, 128: 884})):
        values, classes = np.unique(subsets.balanced(sizes, fraction, 0, labelled([1])), return_counts=True)
        assert dict(zip(values.tolist(), classes.tolist())) == expected


def test_draws_are_nested_balanced_and_repeatable():
    images = labelled([30, 47, 33, 100, 25])
    before = set()
    for percent in ("3%", "4%", "10%", "25%", "50%"):  # of 235; 3% and 4% differ by the remainder alone
        part = subsets.part_of(images, percent)
        assert before < set(part.images) < set(images.images)
        assert len(part) == int(235 * float(percent[:-1]) / 100) and np.ptp(counts(part)) <= 1
        assert all(f"n{label:08d}/" in file for file, label in zip(part.images, part.labels))
        chosen = set(part.images)
        assert list(part.images) == [file for file in images.images if file in chosen]  # in the whole's order
        assert list(subsets.part_of(images, percent).images) == list(part.images)
        before = chosen
    other = subsets.part_of(images, "10%", seed=1)
    assert list(other.images) != list(subsets.part_of(images, "10%").images)


def test_a_share_that_is_no_binary_fraction_keeps_its_last_image():
    assert len(subsets.part_of(labelled([50, 50]), "29%")) == 29  # 0.29 * 100 is 28.999...


def test_pixels_and_labels_of_an_array_stay_together():
    """The embedded data are an array; here each image shows its label."""
    labels = np.arange(200) % 4
    images = ImageSet("array", np.repeat(labels, 48).reshape(200, 4, 4, 3).astype(np.uint8), labels, list(range(4)))
    for subset in ("10%", "lt"):
        part = subsets.part_of(images, subset)
        assert (part.images[:, 0, 0, 0] == part.labels).all()
        assert part.fingerprint() != images.fingerprint() == replace(images).fingerprint()


def test_the_long_tail_has_imagenet_lts_profile():
    """ImageNet-LT's sizes are samples of a distribution and ours its quantiles: sorted, they agree up to noise."""
    ours = subsets.long_tailed(np.full(1000, 1300), seed=0)
    assert (ours[:-1] < ours[1:]).any() and (ours[:-1] > ours[1:]).any()  # assigned to the classes at random
    ours = np.sort(ours)[::-1]
    assert OFFICIAL_LT.sum() == 115_846 and abs(ours.sum() - 115_846) < 0.01 * 115_846
    assert (ours.max(), ours.min()) == (OFFICIAL_LT.max(), OFFICIAL_LT.min()) == (1280, 5)
    assert np.median(ours) == np.median(OFFICIAL_LT) == 73
    for few, many in ((0, 19), (20, 100), (101, 9999)):  # few, medium and many shots
        assert abs(((ours >= few) & (ours <= many)).sum() - ((OFFICIAL_LT >= few) & (OFFICIAL_LT <= many)).sum()) <= 10
    assert np.abs(ours - OFFICIAL_LT)[20:].max() <= 30  # the twenty largest of a heavy tail scatter


def test_the_long_tail_fits_any_set():
    images = labelled([105] * 40 + [3])
    part = counts(subsets.part_of(images, "lt"))
    assert part.min() >= 1 and part[40] <= 3 and part.max() < 105
    assert 0.06 < part.sum() / len(images) < 0.11  # ImageNet-LT has 9 % of ImageNet
    assert len(set(subsets.part_of(images, "lt").images)) == part.sum()


@pytest.mark.parametrize(("sizes", "subset", "message"), [
    ([100, 5], "50%", "class n00000001 has 5 images of the 26 needed, 1 classes are too small"),
    ([5, 5], "1%", "that is less than one image"),
    ([5, 5], "a tenth", "--subset a tenth is no percentage such as 1%, not lt, and no file"),
    ([5, 5], "0%", "less than one image")])
def test_a_draw_that_cannot_be_is_refused(sizes, subset, message):
    with pytest.raises(UserError, match=message):
        subsets.part_of(labelled(sizes), subset)


# Listed

def test_both_official_forms_choose_the_images_they_name(tmp_path):
    images = labelled([20, 20, 20])
    wanted = sorted(np.random.default_rng(1).permutation(60)[:9])
    files = [Path(images.images[i]) for i in wanted]
    (tmp_path / "1percent.txt").write_text("\n".join(f.name for f in reversed(files)) + "\n\n")
    (tmp_path / "lt.txt").write_text("".join(f"train/{f.parent.name}/{f.name} {int(f.parent.name[1:])}\n"
                                             for f in files))
    for name in ("1percent.txt", "lt.txt"):
        part = subsets.part_of(images, str(tmp_path / name))
        assert list(part.images) == [str(file) for file in files]
        assert part.labels.tolist() == [images.labels[i] for i in wanted]


def test_equal_names_in_two_folders_are_told_apart(tmp_path):
    images = ImageSet("folder", ["/d/train/a/0.png", "/d/train/b/0.png"], np.array([0, 1]), ["a", "b"])
    (tmp_path / "list").write_text("train/b/0.png 1\n")
    assert list(subsets.part_of(images, str(tmp_path / "list")).images) == ["/d/train/b/0.png"]


FILES = ["/d/train/a/0.png", "/d/train/a/day1/1.png", "/d/train/a/day2/1.png", "/d/train/b/a/1.png",
         "/d/train/b/day1/1.png", "/d/train/a/1.png"]


@pytest.mark.parametrize(("entry", "taken"), [
    ("train/a/day1/1.png 0", 1), ("a/day1/1.png", 1), ("./a/day2/1.png", 2), ("/e/imagenet/train/b/day1/1.png 1", 4),
    ("train/a/1.png", 5), ("a/1.png 0", 5), ("train/b/a/1.png", 3), ("b/a/1.png", 3),
    ("day1/1.png", None), ("train/c/day1/1.png", None), ("train/b/day2/1.png", None), ("train/b/0.png", None)])
def test_a_list_takes_the_file_that_it_names_and_no_other(tmp_path, entry, taken):
    """Folders inside classes may contain files of equal names."""
    images = ImageSet("folder", FILES, np.array([0, 0, 0, 1, 1, 0]), ["a", "b"])
    (tmp_path / "list").write_text(entry + "\n")
    if taken is None:
        with pytest.raises(UserError, match="names 1 images, 1 of them are not among the 6"):
            subsets.part_of(images, str(tmp_path / "list"))
    else:
        part = subsets.part_of(images, str(tmp_path / "list"))
        assert list(part.images) == [FILES[taken]] and part.labels.tolist() == [images.labels[taken]]


def test_one_file_by_two_names_is_named_twice(tmp_path):
    images = ImageSet("folder", FILES, np.array([0, 0, 0, 1, 1, 0]), ["a", "b"])
    (tmp_path / "list").write_text("a/day1/1.png\ntrain/a/day1/1.png\ntrain/b/day1/1.png\n")
    with pytest.raises(UserError, match="names 3 images, 1 of them twice"):
        subsets.part_of(images, str(tmp_path / "list"))


@pytest.mark.parametrize(("content", "message"), [
    ("n00000000_999.JPEG\nn00000001_999.JPEG\n",
     "names 2 images, 2 of them are not among the 6 of toy \\(first: n00000000/n00000000_999.JPEG\\)"),
    ("n00000000_0.JPEG\nno image\n", "line 2: 'no image' is neither"),
    ("train/n00000000/n00000000_0.JPEG zero\n", "line 1: .* is neither"),
    ("n00000000_0.JPEG\nn00000000_0.JPEG\n", "names 2 images, 1 of them twice"),
    ("", "names 0 images")])
def test_a_list_that_does_not_fit_is_refused_with_counts(content, message, tmp_path):
    (tmp_path / "list.txt").write_text(content)
    with pytest.raises(UserError, match=message):
        subsets.part_of(labelled([3, 3]), str(tmp_path / "list.txt"))


def test_a_list_needs_files(tmp_path):
    (tmp_path / "list.txt").write_text("n00000000_0.JPEG\n")
    array = ImageSet("fractals-train", np.zeros((4, 2, 2, 3), np.uint8), np.arange(4), list(range(4)))
    with pytest.raises(UserError, match="fractals-train has none; choose a percentage or lt"):
        subsets.part_of(array, str(tmp_path / "list.txt"))


# The table

@pytest.mark.parametrize(("full", "part", "batch", "epochs", "warmup"), [
    (1_281_167, 12_811, 4096, 400, 40), (1_281_167, 128_116, 1024, 400, 40), (4000, 400, 128, 10, 1),
    (1_281_167, 14_197_122, 4096, 400, 40), (500, 450, 100, 2, 1)])
def test_equal_iterations_are_as_many_steps_to_half_an_epoch(full, part, batch, epochs, warmup):
    args = SimpleNamespace(epochs=epochs, warmup_epochs=warmup, batch_size=batch)
    settings = subsets.equal_iterations(args, range(full), range(part))
    per_epoch = len(list(range(batch, part + 1, batch)))  # whole batches, counted
    target = epochs * len(list(range(batch, full + 1, batch)))
    assert abs(settings["epochs"] * per_epoch - target) <= per_epoch / 2
    assert abs(settings["warmup_epochs"] / settings["epochs"] - warmup / epochs) < 0.05 or settings["epochs"] < 5
    assert 0 <= settings["warmup_epochs"] < settings["epochs"]


def test_one_percent_takes_a_hundred_times_the_epochs():
    """12,811 images are 3 batches of 4,096 and all of ImageNet is 312, so 400 epochs become 104 times as many."""
    args = SimpleNamespace(epochs=400, warmup_epochs=40, batch_size=4096)
    assert subsets.equal_iterations(args, range(1_281_167), range(12_811)) == \
        {"epochs": 41_600, "warmup_epochs": 4_160}


@pytest.fixture
def folder(tmp_path):
    """Write train and val of two classes with 20 and 4 noisy images each, and ten unlabelled images elsewhere."""
    rng = np.random.RandomState(0)
    for split, count in (("data/train/n00000001", 20), ("data/train/n00000002", 20), ("data/val/n00000001", 4),
                         ("data/val/n00000002", 4), ("more/any", 10)):
        (tmp_path / split).mkdir(parents=True)
        for i in range(count):
            image = Image.fromarray(rng.randint(0, 256, (16, 16, 3), dtype=np.uint8))
            image.save(tmp_path / split / f"{Path(split).name}_{i}.png")
    return tmp_path


def arguments(folder, *words):
    line = ["--preset", "demo", "--data", "folder", "--data-path", folder / "data", "--img-size", 16, "--device", "cpu",
            "--precision", "fp32", "--workers", 0, "--log-every", 1, "--output", folder / "out",
            "--set", "pretrain_mae.epochs=3", "pretrain_mae.warmup_epochs=1", "pretrain_mae.batch_size=4",
            "pretrain_mae.patch_size=8", "finetune.epochs=1", "finetune.warmup_epochs=0", "finetune.batch_size=8",
            "finetune.patch_size=8", *words]
    return tables.parse(table3.build_parser(), list(map(str, line)))


def test_the_table_from_command_line_to_picture(folder, capsys):
    """10 % (4 of 40 images, one step an epoch) takes as many steps as all; another folder stands in for IN21K."""
    rows = table3.main(arguments(folder, "--rows", "mae-10", "mae-full", "mae-in21k", "--in21k", folder / "more"))
    rows = {row["name"]: row for row in rows}
    small, full, other = (rows[f"MAE, {part}"] for part in ("10 %", "all", "IN21K"))
    assert small["data"] == {"images": 4, "classes": 2, "images_per_class": [2, 2.0, 2], "epochs": 30, "iterations": 30,
                             "chosen": "drawn, seed 0"}
    assert (full["data"]["images"], full["data"]["epochs"], full["data"]["iterations"]) == (40, 3, 30)
    assert other["data"] == {"images": 10, "epochs": 15, "iterations": 30, "chosen": "all"}
    assert rows["MAE, 1 %"]["status"] == "not chosen" and all(row["published"] is None for row in rows.values())
    steps = {}
    for run in (folder / "out/pretrain_mae").iterdir():
        settings = json.loads((run / "settings.json").read_text())
        steps[settings.get("subset"), settings["epochs"]] = json.loads((run / "log.jsonl").read_text().split("\n")[-2])
    assert {key: log["step"] for key, log in steps.items()} == {("10%", 30): 30, (None, 3): 30, (None, 15): 30}
    assert all(0 <= row["measured"][0] <= 100 for row in (small, full, other))
    assert len(list((folder / "out/finetune").iterdir())) == 3
    text = (folder / "out/table3/table3.md").read_text()
    assert "drawn, seed 0" in text and "equal iterations" in text and "MAE, long-tailed" in text
    assert Image.open(folder / "out/table3/table3.png").size[0] > 300


def dry_run(folder, capsys, *words):
    """List the settings of the pre-training commands that a dry run prints."""
    table3.main(arguments(folder, "--dry-run", "--rows", *words))
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if "pretrain_mae.py" in line]
    return [dict(zip(line, line[1:])) for line in lines]


def test_a_dry_runs_commands_say_part_and_length(folder, capsys):
    """--set gives the epochs on all of the data; the pre-training itself converts them for a part."""
    [part, full] = dry_run(folder, capsys, "mae-10", "mae-full")
    assert (part["--subset"], part["--equal"], part["--epochs"]) == ("10%", "iterations", "3")
    assert "--subset" not in full and "--equal" not in full and full["--epochs"] == "3"
    [part] = dry_run(folder, capsys, "mae-10", "--equal", "epochs")
    assert part["--equal"] == "epochs"
    [other] = dry_run(folder, capsys, "mae-in21k", "--in21k", str(folder / "more"))
    assert (other["--pretrain-path"], other["--equal"]) == (str(folder / "more"), "iterations")


def test_official_lists_take_the_place_of_draws(folder, capsys):
    ten = folder / "90percent.txt"
    ten.write_text("\n".join(f"n0000000{c}_{i}.png" for c in (1, 2) for i in (7, 11)))
    [part] = dry_run(folder, capsys, "mae-10", "--lists", f"10%={ten}")
    assert part["--subset"] == str(ten)
    with pytest.raises(UserError, match="MAE, 1 %: .* holds 10 % of the images. suncet names its lists by the part w"):
        dry_run(folder, capsys, "mae-1", "--preset", "small", "--lists", f"1%={ten}")
    with pytest.raises(UserError, match="--lists 5%=x: the parts with a list are 1%, 10%, lt"):
        dry_run(folder, capsys, "mae-10", "--lists", "5%=x")
    for words in (["10%"], ["10%="], [f"10%={ten}", "10%=other"]):
        with pytest.raises(UserError, match="--lists 10%.*: write NAME=VALUE, each name once"):
            dry_run(folder, capsys, "mae-10", "--lists", *words)


def test_rows_that_lack_their_data_say_so_before_anything_runs(folder, capsys):
    with pytest.raises(UserError, match="--rows mae-in21k needs --in21k DIR"):
        dry_run(folder, capsys, "mae-in21k")
    with pytest.raises(UserError, match="nowhere is not a folder"):  # though it is not named: it was meant to be there
        dry_run(folder, capsys, "all", "--in21k", str(folder / "nowhere"))
    with pytest.raises(UserError, match="less than one image"):
        dry_run(folder, capsys, "mae-full", "mae-1", "--preset", "small")
    with pytest.raises(UserError, match="--rows mae-lt has 3 images, fewer than one batch of 4: .*batch_size=N"):
        dry_run(folder, capsys, "mae-full", "mae-lt")
    assert {line.get("--subset") for line in dry_run(folder, capsys, "all")} == {"10%", None}  # the others are left out
    args = options.replaced(arguments(folder), rows=None, preset="demo")  # its own rows are asked for too
    with pytest.raises(UserError, match="--rows mae-10 has too few"):
        table3.unavailable(table3.ROWS[1], args, "has too few")
    assert not (folder / "out").exists()


def test_a_subset_is_part_of_a_runs_identity_by_its_images(folder):
    """The same images give the same run, whether they are drawn or listed."""
    def run(**settings):
        args = settings_of(pretrain_mae, {
            "preset": "demo", "data": "folder", "data_path": folder / "data", "img_size": [16], "patch_size": 8,
            "epochs": 1, "warmup_epochs": 0, "batch_size": 4, "workers": 0, "device": "cpu", "precision": "fp32",
            "output": folder / "out", **settings})
        return pretrain_mae.main(args)["run"]
    _, drawn = subsets.pretraining_images(SimpleNamespace(data="folder", data_path=folder / "data", in_chans=3,
                                                          subset="10%", pretrain_path=None, equal="epochs"))
    (folder / "same.txt").write_text("\n".join(Path(file).name for file in drawn.images))
    assert run(subset="10%") == run(subset=str(folder / "same.txt"))
    assert run(subset="20%") != run(subset="10%") != run()
    with pytest.raises(UserError, match="--subset 10% .* --pretrain-path .*: leave one of them out"):
        run(subset="10%", pretrain_path=folder / "more")
