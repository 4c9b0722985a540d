"""Test the figure scripts of Section 4 from command line to picture, on tiny models and a folder of images."""
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from appendix import a6_cka_settings
from common import options, report
from common.checkpoint import save_torch
from common.data import load_sets
from common.images import ImageSet
from common.loader import seed_everything
from common.mae import MAE
from common.vit import build_model, build_vit
from sec4_analysis import (
    attention_maps,
    fig1_layer_similarity,
    fig2_leading_blocks,
    fig3_fourier,
    fig4_leading_blocks_small_data,
    fig5_attention,
    images,
    leading_blocks,
    study,
)
from sec5_distill import fig6_distilled_similarity
from tests.helpers import assert_same, noisy

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Make 30 images of 3 unequal classes and 3 models, of which the first and the last have the same patch size."""
    folder, rng = tmp_path_factory.mktemp("figures"), np.random.default_rng(0)
    for split, counts in (("train", (8, 8, 8)), ("val", (5, 10, 15))):
        for label, count in enumerate(counts):
            (folder / "data" / split / f"class{label}").mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "data" / split / f"class{label}" / f"{i}.png")
    torch.manual_seed(0)
    for name, model in (("vit", build_vit("vit_demo", img_size=32, patch_size=8, num_classes=3)),
                        ("mae", MAE("vit_demo", img_size=24, patch_size=6)),
                        ("mae8", MAE("vit_demo", img_size=32, patch_size=8))):
        save_torch(folder / f"{name}.pt", {"model": model.state_dict(), "config": model.config})
    return folder


def run(module, folder, output, *words, models=True):
    """Run a figure from its command line."""
    named = ["--models", f"A={folder / 'vit.pt'}", f"B={folder / 'mae.pt'}"] if models else []
    parse = leading_blocks.parse if module is fig2_leading_blocks else study.parse
    return module.main(parse(module.build_parser(), [
        "--preset", "small", "--data-path", str(folder / "data"), "--device", "cpu", "--workers", "0",
        "--output", str(output), *named, *words]))


# Which images

def draw(labels, **settings):
    given = dict(num_images=10, order="drawn", batch_size=4, seed=0, image_seed=None)
    return images.draw_images(SimpleNamespace(labels=np.asarray(labels)), SimpleNamespace(**{**given, **settings}))


def test_every_class_is_drawn_alike_and_the_number_is_exact():
    labels = np.repeat([0, 1, 2, 3], [2, 20, 20, 20])
    chosen = draw(labels, num_images=23)
    assert len(set(chosen)) == 23 and np.bincount(labels[chosen]).tolist()[0] == 2
    assert sorted(np.bincount(labels[chosen])[1:]) == [7, 7, 7]
    assert (np.diff(labels[chosen]) < 0).any()  # mixed
    assert np.array_equal(chosen, draw(labels, num_images=23)) and not np.array_equal(chosen, draw(labels, seed=1,
                                                                                                    num_images=23))


def test_the_authors_order_is_class_by_class_in_whole_batches_until_there_are_more():
    labels = np.arange(2000) % 10  # in no class order on disk
    chosen = draw(labels, order="authors", num_images=1024, batch_size=128)
    assert len(chosen) == 1152 and (np.diff(labels[chosen]) >= 0).all()
    assert len(draw(labels, order="authors", num_images=1024, batch_size=64)) == 1088  # that of the MAE-Base pair


def test_images_without_labels_are_drawn_alike():
    args = SimpleNamespace(num_images=10, order="drawn", batch_size=4, seed=0, image_seed=None)
    unlabelled = ImageSet("folder", [f"{i}.png" for i in range(40)], None, [])
    authors = SimpleNamespace(**{**vars(args), "order": "authors"})
    chosen = images.draw_images(unlabelled, args)
    assert len(set(chosen)) == 10 and np.array_equal(chosen, draw(np.zeros(40, int)))
    assert images.draw_images(unlabelled, authors).tolist() == [*range(12)]


def test_more_images_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="--num-images 11 needs 11 images, there are 10: lower --num-im"):
        draw(np.arange(10), num_images=11)


@torch.inference_mode()
def test_batches_hold_each_image_once_in_nearly_equal_parts(place):
    model = build_vit("vit_demo", img_size=(16, 32), patch_size=8)
    args = study.parse(fig1_layer_similarity.build_parser(), [
        "--preset", "small", "--data-path", str(place / "data"), "--batch-size", "8", "--workers", "0"])
    val, = load_sets(options.resolve(args), splits=("val",))
    parts = list(images.batches(model, val, np.arange(17), args, torch.device("cpu")))
    assert [tuple(part.shape) for part in parts] == [(6, 3, 16, 32), (6, 3, 16, 32), (5, 3, 16, 32)]


def test_a_model_says_how_their_images_are_normalised():
    args = study.parse(fig1_layer_similarity.build_parser(), ["--preset", "small"])
    model = build_vit("vit_demo", img_size=32, patch_size=8)
    assert images.preprocessing(model, args)[1].tolist() == pytest.approx([255 * m for m in (0.485, 0.456, 0.406)])
    model.statistics = {"mean": [0.5] * 3, "std": [0.5] * 3}  # as load_model has it from timm
    size, mean, _ = images.preprocessing(model, args)  # one crop for all: tokens are compared by their place
    assert (size, mean.tolist()) == ([32, 32], [127.5] * 3)
    args.std = [0.25, 0.2, 0.1]  # alone: the mean is still the checkpoint's
    _, mean, std = images.preprocessing(model, args)
    assert mean.tolist() == [127.5] * 3 and std.tolist() == pytest.approx([63.75, 51, 25.5])


# Figures 1, 3, 5, 6 and the maps

FIGURES = {  # module -> what it gives: {name: shape}
    fig1_layer_similarity: ("fig1", {"A": (13, 13), "B": (13, 13)}),
    fig3_fourier: ("fig3", {"A": (2, 13, 2), "B": (2, 13, 2)}),
    fig5_attention: ("fig5", {"A": (2, 12, 13), "B": (2, 12, 13)}),
    fig6_distilled_similarity: ("fig6", {"A": (13, 13), "B": (13, 13)}),
    attention_maps: ("attention_maps", {
        f"{model}/{what}": shape for model, image in (("A", (32, 32, 3)), ("B", (24, 24, 3)))
        for what, shape in (("image", image), *((f"block {layer} head {head}", (4, 4))
                                                for layer in (1, 6, 12) for head in (1, 2)))}),
}


@pytest.mark.parametrize("module", FIGURES, ids=lambda module: module.__name__.split(".")[-1])
def test_a_figure_from_checkpoints_to_picture(module, place, tmp_path):
    item, shapes = FIGURES[module]
    arrays = run(module, place, tmp_path, "--num-images", "11", "--batch-size", "6")
    folder = tmp_path / item
    assert {name: array.shape for name, array in arrays.items()} == shapes
    assert all(np.isfinite(array).all() for array in arrays.values())
    about = json.loads((folder / f"{item}.json").read_text())
    assert about["images"] == 11 and about["models"]["B"]["checkpoint"].endswith("mae.pt") and about["environment"]
    assert (folder / f"{item}.md").stat().st_size and (folder / f"{item}.png").read_bytes().startswith(b"\x89PNG")

    (folder / f"{item}.png").unlink()  # drawn anew from the numbers alone
    again = module.main(study.parse(module.build_parser(), ["--from-numbers", str(folder / f"{item}.npz")]))
    assert (folder / f"{item}.png").exists() and all(np.array_equal(again[name], arrays[name]) for name in arrays)


def test_the_first_model_is_the_reference_and_a_random_one_is_its_twin(place, tmp_path):
    arrays = run(fig1_layer_similarity, place, tmp_path, "--models", f"vit={place / 'vit.pt'}", "twin=random",
                 "--num-images", "12", models=False)
    assert np.diagonal(arrays["vit"]) == pytest.approx(np.ones(13)) and np.allclose(arrays["vit"], arrays["vit"].T)
    assert arrays["twin"].max() < 1
    about = json.loads((tmp_path / "fig1" / "fig1.json").read_text())["models"]
    assert about["vit"]["fingerprint"] != about["twin"]["fingerprint"]


def test_the_authors_final_norm_changes_the_last_row_of_an_mae_alone(place, tmp_path):
    weights = torch.load(place / "mae.pt", weights_only=True)
    weights["model"]["norm.weight"] = torch.linspace(0.1, 3, 96)
    save_torch(tmp_path / "trained.pt", weights)
    own, authors = (run(fig1_layer_similarity, place, tmp_path, "--models", f"vit={place / 'vit.pt'}",
                        f"mae={tmp_path / 'trained.pt'}", "--num-images", "12", "--final-norm", norm, models=False)
                    for norm in ("own", "authors"))
    assert np.array_equal(own["vit"], authors["vit"]) and np.array_equal(own["mae"][:12], authors["mae"][:12])
    assert np.abs(own["mae"][12] - authors["mae"][12]).max() > 1e-3


@pytest.mark.parametrize(("words", "message"), [
    (("--models", "mae.pt"), "--models mae.pt: write NAME=VALUE, each name once"),
    (("--models", "a=x.pt", "a=y.pt"), "--models a=x.pt a=y.pt: write NAME=VALUE, each name once"),
    (("--models", "a=no/where.pt"), "no weights at no/where.pt"),
    (("--from-numbers", "fig1.json"), "--from-numbers fig1.json: give the .npz that this script wrote"),
    (("--num-images", "31"), "--num-images 31 needs 31 images, there are 30"),
    (("--num-images", "3"), "at least 4 images at once, not 3: choose a larger --batch-size"),
    (("--num-heads-of", "A=3"), "has num_heads = 12, not 3"),
    (("--num-heads-of", "A=0"), "--num-heads-of A=0: a number for one of A, B"),
    (("--models", "file=x.pt"), "--models file=...: choose another name"),
    (("--num-heads-of", "A=three"), "--num-heads-of A=three: a number for one of A, B"),
    (("--num-heads-of", "C=3"), "--num-heads-of C=3: a number for one of A, B"),
])
def test_mistakes_are_named(place, tmp_path, words, message):
    with pytest.raises((ValueError, OSError), match=message):
        run(fig1_layer_similarity, place, tmp_path, *words, models="--models" not in words)


def test_maps_of_what_is_not_there_are_errors(place, tmp_path):
    for words, message in ((("--image", "9"), "--image 9: 6 images are drawn"), (("--heads", "13"), "the model has 12"),
                           (("--layers", "13"), "--layers .13.: the model has 12 blocks"),
                           (("--query", "4", "0"), "has 4 rows")):
        with pytest.raises(ValueError, match=message):
            run(attention_maps, place, tmp_path, "--num-images", "6", *words)


def test_an_image_beyond_the_drawn_ones_is_said_before_anything_runs():
    with pytest.raises(ValueError, match="--image 6: 6 images are drawn"):
        attention_maps.parse_maps(attention_maps.build_parser(), ["--num-images", "6", "--image", "6"])


def test_the_twin_of_a_model_has_its_kind_s_initial_values():
    """A relative variant is initialised in its own way, not as a plain ViT (PAPER 1.6)."""
    relative = noisy(build_model("vit_tiny_rpe", img_size=32, patch_size=8, num_classes=3))
    twin = dict(study.untrained(relative, 0).named_parameters())
    for name, std in (("blocks.11.mlp.fc2.weight", 0.02 / 24 ** 0.5), ("patch_embed.proj.weight", 0.02)):
        assert twin[name].std().item() == pytest.approx(std, rel=0.05)
    assert not twin["blocks.3.attn.relative_position_bias_table"].any() and (twin["blocks.3.gamma_1"] == 0.1).all()
    mae = noisy(MAE("vit_demo", img_size=24, patch_size=6))
    mae.statistics = None
    seed_everything("weights", 5)
    expected = MAE(**mae.config).state_dict()
    assert_same(study.untrained(mae, 5).state_dict(), expected)


def test_a_picture_of_ones_own_needs_no_data_set(place, tmp_path):
    """Its maps equal those of the same image in a data set."""
    file = place / "data" / "val" / "class2" / "7.png"
    words = ["--models", f"A={place / 'vit.pt'}", "--picture", str(file), "--device", "cpu", "--output", str(tmp_path)]
    arrays = attention_maps.main(attention_maps.parse_maps(attention_maps.build_parser(), words))
    about = json.loads((tmp_path / "attention_maps" / "attention_maps.json").read_text())
    assert (about["preset"], about["data"], about["images"]) == (None, "7.png", 1)
    (tmp_path / "alone" / "val" / "all").mkdir(parents=True)
    (tmp_path / "alone" / "val" / "all" / "7.png").write_bytes(file.read_bytes())
    words = [*words[:2], "--preset", "small", "--data-path", str(tmp_path / "alone"), "--num-images", "1", *words[4:]]
    again = attention_maps.main(attention_maps.parse_maps(attention_maps.build_parser(), words))
    assert arrays.keys() == again.keys() and all(np.array_equal(arrays[key], again[key]) for key in again)
    for words, message in ((["--picture", "no.png", "--models", f"A={place / 'vit.pt'}"], "no.png: no such file"),
                           (["--picture", str(file)], "--picture needs --models")):
        with pytest.raises(ValueError, match=message):
            attention_maps.main(attention_maps.parse_maps(attention_maps.build_parser(),
                                                     [*words, "--output", str(tmp_path)]))


def test_models_of_different_depths_stand_in_one_table():
    shallow, deep = np.random.rand(2, 4, 3), np.random.rand(2, 6, 3)
    lines = fig3_fourier.table({"A": deep, "B": shallow}).splitlines()
    assert [line.count("|") for line in lines] == [8] * 4 and lines[3].count(".") == 4
    assert "| B" in fig5_attention.table({"A": deep, "B": shallow})


def test_too_few_images_are_said_before_hours_of_training(place, tmp_path, monkeypatch):
    monkeypatch.setattr(study.tables, "run_rows", lambda *args: pytest.fail("a stage was started"))
    with pytest.raises(ValueError, match="--num-images 31 needs 31 images, there are 30"):
        run(fig1_layer_similarity, place, tmp_path, "--num-images", "31", models=False)


def test_the_presets_own_runs_are_stages(place, tmp_path, capsys):
    """Without --models, the stages are listed, with those settings of the command line that concern them."""
    assert run(fig5_attention, place, tmp_path, "--dry-run", "--num-images", "7", "--batch-size", "4",
               "--set", "finetune.epochs=30", models=False) == {}
    printed = capsys.readouterr().out
    commands = [line for line in printed.splitlines() if line.startswith("python ")]
    assert printed.splitlines()[-1] == "# then this command without --dry-run: it finds these runs by their content"
    assert sum("pretrain_mae.py" in line for line in commands) == 1  # shared by MAE and MAE fine-tuned
    assert all("--preset small" in line for line in commands)
    assert not any("--num-images" in line or "--batch-size" in line for line in commands)
    assert all("--epochs 30" in line for line in commands if "finetune.py" in line)
    [pretrain], [tuned] = ([line.split() for line in commands if word in line]
                           for word in ("pretrain_mae.py", "--init"))
    assert tuned[tuned.index("--init") + 1] == pretrain[pretrain.index("--save-to") + 1]  # it can be run by hand


@pytest.mark.parametrize("module", [fig1_layer_similarity, a6_cka_settings], ids=["fig1", "a6"])
def test_a_dry_run_needs_neither_the_gpu_nor_the_files(module, tmp_path, monkeypatch, capsys):
    """A dry run works on the login node of a cluster, from where the jobs are sent."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = ["--dry-run", "--device", "cuda", "--output", str(tmp_path)]
    assert module.main(study.parse(module.build_parser(), words)) == {}
    assert "it finds these runs" in capsys.readouterr().out
    assert module.main(study.parse(module.build_parser(), [*words, "--models", "A=later.pt", "B=too.pt"])) == {}


def test_all_models_are_looked_for_before_the_first_is_measured(place, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "load", lambda *args: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match="--models B=no/where.pt: no weights at no/where.pt"):
        run(fig1_layer_similarity, place, tmp_path, "--models", f"A={place / 'vit.pt'}", "twin=random",
            "hub=timm:vit_tiny_patch16_224", "B=no/where.pt", models=False)


@pytest.mark.parametrize("module", [fig1_layer_similarity, attention_maps, a6_cka_settings, fig2_leading_blocks],
                         ids=["fig1", "maps", "a6", "fig2"])
def test_a_place_that_cannot_be_written_is_found_before_the_work(module, place, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way of a folder")
    for work in ((study, "load"), (study.tables, "run_rows")):
        monkeypatch.setattr(*work, lambda *args: pytest.fail("the work was begun"))
    with pytest.raises(OSError):
        run(module, place, tmp_path / "file")


@pytest.mark.parametrize("module", FIGURES, ids=lambda module: module.__name__.split(".")[-1])
def test_other_ranks_leave_before_anything_is_measured(module, place, tmp_path, monkeypatch):
    monkeypatch.setattr(study.distributed, "is_main", lambda: False)
    monkeypatch.setattr(study, "each_model", lambda *args: pytest.fail("a model was measured"))
    assert run(module, place, tmp_path, "--num-images", "6") == {}
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_checkpoint_in_the_mae_lite_format_gives_the_same_figure(place, tmp_path):
    weights = torch.load(place / "mae.pt", weights_only=True)["model"]
    save_torch(tmp_path / "lite.pth.tar", {"model": {f"model.{name}": value for name, value in weights.items()}})
    arrays = run(fig5_attention, place, tmp_path, "--models", f"ours={place / 'mae.pt'}",
                 f"lite={tmp_path / 'lite.pth.tar'}", "--num-images", "6", models=False)
    assert np.array_equal(arrays["ours"], arrays["lite"])


def test_distances_of_the_authors_are_labelled_with_their_unit(place, tmp_path):
    """The .npz names its unit, so a picture drawn again has the same label. Older files are in pixels."""
    arrays = run(fig5_attention, place, tmp_path, "--distance-unit", "authors", "--num-images", "6")
    path = tmp_path / "fig5" / "fig5.npz"
    assert set(arrays) == {"A", "B"} and "distances in 1/14 patch" in path.with_suffix(".md").read_text()
    assert fig5_attention.draw_box_plots(arrays, "1/14 patch").axes[0].get_ylabel() == "attention distance (1/14 patch)"
    picture = path.with_suffix(".png")
    drawn = picture.read_bytes()
    assert run(fig5_attention, place, tmp_path, "--from-numbers", str(path), models=False).keys() == arrays.keys()
    assert picture.read_bytes() == drawn
    np.savez(path, item=np.array("fig5"), **arrays)
    run(fig5_attention, place, tmp_path, "--from-numbers", str(path), models=False)
    assert picture.read_bytes() != drawn


@pytest.mark.slow
def test_under_torchrun_one_rank_analyses(place, tmp_path):
    words = ["--preset", "small", "--data-path", str(place / "data"), "--device", "cpu", "--workers", "0", "--output",
             str(tmp_path), "--models", f"A={place / 'vit.pt'}", f"B={place / 'mae.pt'}", "--num-images", "11"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    done = subprocess.run([*launch, str(ROOT / "sec4_analysis/fig1_layer_similarity.py"), *words], text=True,
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("A: ") == 1 and done.stdout.count("drawn: ") == 1
    with np.load(tmp_path / "fig1" / "fig1.npz") as two:
        one = run(fig1_layer_similarity, place, tmp_path / "one", "--num-images", "11")
        assert all(np.array_equal(two[name], one[name]) for name in one)


# Figures 2 and 4

TINY = ["--set", "finetune.model=vit_demo", "finetune.img_size=[16]", "finetune.epochs=1", "finetune.batch_size=12",
        "finetune.warmup_epochs=0", "finetune.mixup=0", "finetune.randaugment=none"]


def test_leading_blocks_from_checkpoints_to_picture(place, tmp_path):
    """k = 0 is one run for both methods; every other point starts from its own file and keeps its own k."""
    points = run(fig2_leading_blocks, place, tmp_path, "--models", f"A={place / 'vit.pt'}", f"B={place / 'mae8.pt'}",
                 "--blocks", "12", "0", "--seeds", "0", "1", *TINY, models=False)
    assert [(p["method"], p["k"], len(p["top1"])) for p in points] == [
        ("A", 0, 2), ("A", 12, 2), ("B", 0, 2), ("B", 12, 2)]
    assert points[0]["run"] == points[2]["run"] and len({name for p in points for name in p["run"]}) == 6
    settings = [json.loads(path.read_text()) for path in (tmp_path / "finetune").glob("*/settings.json")]
    assert sorted((Path(s["init"]).name, s["keep_blocks"]) for s in settings if s["init"]) == [
        ("mae8.pt", None), ("mae8.pt", None), ("vit.pt", 12), ("vit.pt", 12)]  # all of an encoder is Table 1's start
    assert "scratch" in points[0]["run"][0] and all(0 <= top1 <= 100 for p in points for top1 in p["top1"])
    picture = tmp_path / "fig2" / "fig2.png"
    picture.unlink()
    words = ["--from-numbers", str(picture.with_suffix(".json"))]
    again = fig2_leading_blocks.main(leading_blocks.parse(fig2_leading_blocks.build_parser(), words))
    assert again == points and picture.exists()


def test_from_scratch_is_the_network_of_the_given_files(place, tmp_path):
    """Otherwise the curve's first point would be another model, or see images normalised differently."""
    vit = build_vit("vit_small", img_size=(32, 16), patch_size=8, num_classes=3)
    other = {"mean": [0.5] * 3, "std": [0.2] * 3}
    torch.save({"model": vit.state_dict(), "config": vit.config, "statistics": other}, tmp_path / "small.pt")

    def scratch(*words):
        words = ["--preset", "small", "--models", *words]
        args = leading_blocks.parse(fig2_leading_blocks.build_parser(), words)
        return leading_blocks.scratch_settings(leading_blocks.given_weights(args),
                                               leading_blocks.settings_told(args, "sec3_benchmark/finetune.py"))
    network = {"model": "vit_small", "img_size": [32, 16], "patch_size": 8, "in_chans": 3, "num_heads": 12}
    assert scratch(f"A={tmp_path / 'small.pt'}") == {**network, **other}
    told = scratch(f"A={tmp_path / 'small.pt'}", "--img-size", "64", "--set", "finetune.model=vit_tiny")
    assert told == {key: value for key, value in {**network, **other}.items() if key not in ("img_size", "model")}
    with pytest.raises(ValueError, match="the start from random weights is one network for all"):
        scratch(f"A={tmp_path / 'small.pt'}", f"B={place / 'vit.pt'}")


def test_figure_2_trains_for_100_epochs_in_the_paper_and_pretrains_once_per_seed(tmp_path, capsys):
    parser = fig2_leading_blocks.build_parser()
    assert fig2_leading_blocks.main(leading_blocks.parse(parser, ["--data-path", "X", "--dry-run", "--seeds", "0", "1",
                                                                 "--output", str(tmp_path)])) == []
    printed = capsys.readouterr().out
    commands = [line for line in printed.splitlines() if line.startswith("python ")]
    tuned = [line for line in commands if "finetune.py" in line]
    assert all("--epochs 100" in line and "--preset paper" in line for line in tuned)
    assert "MoCo-v3: fine-tuned with --layer-decay 0.75, for its name has moco in it" in printed
    assert sum("pretrain_mae.py" in line for line in commands) == 2
    assert sum("--init" not in line for line in tuned) == 2  # k = 0


def test_ranks_meet_before_figure_4_looks_for_its_sets(monkeypatch, tmp_path):
    """Otherwise they would not wait for the rank that downloads the sets."""
    order = []
    monkeypatch.setattr(study.tables, "start_ranks", lambda args: order.append("met"))
    monkeypatch.setattr(fig4_leading_blocks_small_data, "panels", lambda args: order.append("looked"))
    monkeypatch.setattr(leading_blocks, "run_points", lambda args, panels, item: None)
    args = leading_blocks.parse(fig4_leading_blocks_small_data.build_parser(), ["--output", str(tmp_path), "--dry-run"])
    assert fig4_leading_blocks_small_data.main(args) == [] and order == ["met", "looked"]


def test_figure_4_transfers_to_every_set(tmp_path, capsys):
    words = ["--dry-run", "--models", "A=a.pt", "--blocks", "0", "5", "--output", str(tmp_path)]
    args = leading_blocks.parse(fig4_leading_blocks_small_data.build_parser(), words)
    assert fig4_leading_blocks_small_data.main(args) == []
    commands = [line for line in capsys.readouterr().out.splitlines() if line.startswith("python ")]
    assert [("--dataset fractals-small" in line, "--keep-blocks 5" in line) for line in commands] == [
        (True, False), (True, True), (False, False), (False, True)]


@pytest.mark.parametrize(("module", "words", "message"), [
    (fig2_leading_blocks, ["--blocks", "0", "13"], "--blocks 13: the models have 12 blocks, so 0 to 12"),
    (fig2_leading_blocks, ["--models", "B=random"], "--models B=random: no weights at random"),
    (fig4_leading_blocks_small_data, ["--datasets", "fractals-small", "coco"], "--datasets coco: Figure 4 is about"),
])
def test_mistakes_of_leading_blocks_are_named_before_anything_runs(tmp_path, monkeypatch, module, words, message):
    monkeypatch.setattr(leading_blocks.tables, "run_rows", lambda *args: pytest.fail("a stage was started"))
    with pytest.raises(ValueError, match=message):
        module.main(leading_blocks.parse(module.build_parser(), [*words, "--output", str(tmp_path)]))


def test_a_random_twin_has_the_first_model_s_heads(place):
    """If the first model's file has no number of heads, --num-heads-of the first also holds for its twin."""
    torch.save({"model": build_vit("vit_demo", img_size=32, patch_size=8, num_classes=3).state_dict()},
               place / "foreign.pth")
    args = study.parse(fig1_layer_similarity.build_parser(), ["--preset", "small", "--num-heads-of", "A=3"])
    models = study.load_all(args, {"A": str(place / "foreign.pth"), "Init": study.RANDOM})
    heads = [model.blocks[0].attn.num_heads for model in models.values()]
    assert heads == [3, 3]


@pytest.mark.parametrize("module", [fig2_leading_blocks, fig4_leading_blocks_small_data], ids=["fig2", "fig4"])
def test_other_ranks_leave_the_writing_to_the_first(tmp_path, monkeypatch, module):
    points = [{"panel": "", "method": "MAE", "k": 0, "top1": [1.0], "run": ["a"]}]
    monkeypatch.setattr(report, "is_main", lambda: False)
    monkeypatch.setattr(leading_blocks, "run_points", lambda *args: points)
    args = leading_blocks.parse(module.build_parser(), ["--output", str(tmp_path), "--device", "cpu"])
    assert module.main(args) == points and not list(tmp_path.rglob("*.*"))


def test_moco_is_fine_tuned_by_its_own_layer_decay_however_it_is_spelled():
    for name, expected in (("MoCo-v3", True), ("MoCov3-Tiny", True), ("MAE", False)):
        row = leading_blocks.point_row("sec3_benchmark/finetune.py", "", name, 6, [], "file.pt")
        assert ("--layer-decay 0.75" in row.lines[-1]) == expected
