"""Test Figures 6 and 7, Table 5 and D-MAE's rows of Table 1: the runs they ask for and the use of their results.

The stages are stand-ins; tests/test_distill.py runs the real one.
"""
import json

import numpy as np
import pytest

from common import tables
from common.errors import UserError
from common.images import ImageSet
from sec3_benchmark import finetune, table1_pretraining_methods, table4_transfer
from sec4_analysis import study
from sec5_distill import fig6_distilled_similarity, fig7_distilled_layer, pretrain_dmae, table5_distillation
from tests.helpers import commands, run

# Figure 6

def test_figure_6_compares_the_presets_own_runs(asked, tmp_path, monkeypatch):
    """The supervised model is first, the teacher is D-MAE's, and MAE has as many epochs as D-MAE."""
    seen = {}
    monkeypatch.setattr(study, "load_all", lambda args, checkpoints, heads: seen.update(checkpoints, heads=heads))
    run(fig6_distilled_similarity, tmp_path, "--seed", "4", "--set", "pretrain_dmae.teacher_heads=6", parse=study.parse)
    assert [name for name, _ in asked] == ["finetune", "pretrain_mae", "pretrain_dmae"]
    assert {settings["seed"] for _, settings in asked} == {4}
    assert asked[1][1]["epochs"] == asked[2][1]["epochs"] == pretrain_dmae.PRESETS["demo"]["epochs"]
    assert seen == {"supervised": f"{tmp_path}/run1/weights.pt", "teacher": "teacher.pt", "heads": {"teacher": 6},
                    "MAE": f"{tmp_path}/run2/weights.pt", "D-MAE": f"{tmp_path}/run3/weights.pt"}
    assert list(seen)[0] == "supervised"  # the reference


def test_figure_6_of_the_paper_leaves_the_recipes_alone(asked, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "load_all", lambda args, checkpoints, heads: {})
    monkeypatch.setattr(tables, "load_sets", lambda args: None)  # there is no ImageNet here
    monkeypatch.setattr(study, "images_to_analyse", lambda args: ImageSet("val", [], np.arange(1024) % 8, []))
    run(fig6_distilled_similarity, tmp_path, "--data-path", "IMAGENET", parse=study.parse)
    assert [settings["epochs"] for _, settings in asked] == [300, 400, 400]
    assert asked[2][1]["teacher"] == "timm:vit_base_patch16_224.mae" and asked[2][1]["distill_blocks"] == [12]


def test_figure_6_misses_images_before_it_trains(asked, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "images_to_analyse", lambda args: ImageSet("val", [], np.arange(1023) % 8, []))
    with pytest.raises(UserError, match="--num-images 1024 needs 1024 images, there are 1023"):
        run(fig6_distilled_similarity, tmp_path, "--preset", "small", "--data-path", "DIR", parse=study.parse)
    assert not asked


# Figure 7

def test_figure_7_distils_each_layer_and_fine_tunes_alike(asked, tmp_path):
    rows = run(fig7_distilled_layer, tmp_path, "--layers", "none", "4", "all", "--seeds", "0", "1",
               parse=tables.parse)
    pretrained, tuned = asked[::2], asked[1::2]
    assert [name for name, _ in pretrained] == ["pretrain_mae"] * 2 + ["pretrain_dmae"] * 4
    assert [settings.get("distill_blocks") for _, settings in pretrained] == [None, None, [4], [4],
                                                                              *[list(range(1, 13))] * 2]
    assert {settings["epochs"] for _, settings in pretrained} == {pretrain_dmae.PRESETS["demo"]["epochs"]}
    assert {settings["epochs"] for _, settings in tuned} == {finetune.PRESETS["demo"]["epochs"]}
    batch = pretrain_dmae.PRESETS["demo"]["batch_size"]
    assert [settings["init"] for _, settings in tuned] == [f"{tmp_path}/run{n}/weights.pt" for n in range(1, 12, 2)]
    assert [row["name"] for row in rows] == ["none", "layer 4", "all"]
    assert rows[1]["measured"] == [6.0, 8.0] and rows[1]["seconds_per_step"] == [batch / 10, batch / 14]
    assert (tmp_path / "fig7" / "fig7.png").stat().st_size > 10_000
    assert "| layer 4   | 7.0 ± 1.4" in (tmp_path / "fig7" / "fig7.md").read_text()


def test_figure_7_is_drawn_from_its_numbers_alone(asked, tmp_path):
    run(fig7_distilled_layer, tmp_path, "--layers", "none", "12", parse=tables.parse)
    before = (tmp_path / "fig7" / "fig7.png").read_bytes()
    (tmp_path / "fig7" / "fig7.png").unlink()
    count = len(asked)
    run(fig7_distilled_layer, tmp_path, "--from-numbers", str(tmp_path / "fig7" / "fig7.json"),
        parse=tables.parse)
    assert (tmp_path / "fig7" / "fig7.png").read_bytes() == before and len(asked) == count


def test_figure_7_takes_settings_of_stages_that_the_chosen_layers_do_not_have(asked, tmp_path):
    """So the same --set serves any choice of layers."""
    run(fig7_distilled_layer, tmp_path, "--layers", "12", "--set", "pretrain_mae.epochs=3", "pretrain_dmae.epochs=4",
        "finetune.epochs=5", parse=tables.parse)
    assert [(name, settings["epochs"]) for name, settings in asked] == [("pretrain_dmae", 4), ("finetune", 5)]


@pytest.mark.parametrize("layer", ["0", "13", "last"])
def test_a_layer_that_is_not_there_is_refused(layer, tmp_path):
    with pytest.raises(UserError, match=f"--layers {layer}: a layer is 1 to 12, none or all"):
        run(fig7_distilled_layer, tmp_path, "--layers", layer, parse=tables.parse)


def test_figure_7_fine_tunes_for_100_epochs_in_the_paper():
    assert fig7_distilled_layer.row_of("12", "paper").lines[1].endswith(" --epochs 100")


# Table 5

def test_table_5_shows_what_was_run_and_what_was_not(asked, tmp_path):
    run(table5_distillation, tmp_path, "--rows", "supervised", "dmae", "--imagenet")
    transfers = [settings for name, settings in asked if name == "transfer"]
    assert [settings["dataset"] for settings in transfers] == ["fractals-small", "fractals-large"] * 2
    table = json.loads((tmp_path / "table5" / "table5.json").read_text())
    rows = {row["key"]: row for row in table["rows"]}
    assert list(rows) == ["supervised", "mocov3", "mae", "dino", "simmim", "dmae", "d2mae"]
    assert rows["dmae"]["published"]["aircraft"] == 79.2 and rows["dmae"]["published"]["imagenet"] == 78.4
    assert set(rows["dmae"]["measured"]) == {"fractals-small", "fractals-large", "own"}
    lines = {line.split("|")[1].strip(): line for line in (tmp_path / "table5" / "table5.md").read_text().splitlines()
             if line.startswith("| ")}
    assert "42.3 / not run" in lines["D-MAE"] and "37.4 / not run" in lines["D-MAE"]
    assert "42.5 / not run" in lines["D2-MAE"] and "37.5 / not run" in lines["D2-MAE"]
    assert "78.7 / not run" in lines["D2-MAE"] and rows["d2mae"]["published"]["aircraft"] is None
    assert "77.2 / not run" in lines["DINO"] and "77.9 / not run" in lines["SimMIM"]
    assert "76.8 / not run" in lines["MoCo-v3"]
    assert "| fractals (as Table 1)" in lines["initialisation"]  # not the paper's ImageNet
    assert "| 78.4 / not run " in lines["D-MAE"] and "| - / 7.0 " in lines["D-MAE"]


def test_table_5s_last_column_is_table_1s(asked, tmp_path):
    """The supervised row is the classifier itself; D-MAE is fine-tuned."""
    run(table5_distillation, tmp_path, "--rows", "supervised", "dmae", "--imagenet")
    rows = {row["key"]: row for row in json.loads((tmp_path / "table5" / "table5.json").read_text())["rows"]}
    names = ["finetune", "transfer", "transfer", "pretrain_dmae", "transfer", "transfer", "finetune"]
    assert [name for name, _ in asked] == names  # each pre-training once
    assert asked[0][1]["init"] is None and asked[-1][1]["init"].endswith("run4/weights.pt")
    assert rows["supervised"]["measured"]["own"] == [1.0] and rows["dmae"]["measured"]["own"] == [7.0]
    run(table5_distillation, tmp_path, "--rows", "dmae")  # in the demo, only if asked for
    assert [name for name, _ in asked[7:]] == ["pretrain_dmae", "transfer", "transfer"]


def test_table_5_starts_from_given_weights(asked, tmp_path):
    files = {name: tmp_path / f"{name}.pt" for name in ("supervised", "mocov3", "dmae")}
    for file in files.values():
        file.touch()
    run(table5_distillation, tmp_path, "--imagenet", "--models", *(f"{name}={file}" for name, file in files.items()))
    asked_of = [(name, settings["init"].split("/")[-1]) for name, settings in asked]
    assert asked_of == [("transfer", f"{name}.pt") for name in files for _ in range(2)] + \
        [("finetune", "mocov3.pt"), ("finetune", "dmae.pt")]  # the supervised one is fine-tuned already
    assert [settings["layer_decay"] for _, settings in asked[6:]] == [0.75, 0.85]  # MoCo-v3's as in Table 1
    assert f"D-MAE: weights given: {tmp_path.name}/dmae.pt." in (tmp_path / "table5" / "table5.md").read_text()


@pytest.mark.parametrize("row", ["mocov3", "mae", "dino", "simmim", "dmae", "d2mae"])
def test_its_last_column_asks_for_table_1s_runs(row, capsys):
    ours = commands(table5_distillation, capsys, "--rows", row, "--imagenet")[-1]
    theirs = commands(table1_pretraining_methods, capsys, "--rows", row)[-1]
    assert [word.replace("table5", "table1") for word in ours] == theirs


def test_a_dry_run_of_table_5_prints_each_command_once(capsys):
    lines = [" ".join(words) for words in commands(table5_distillation, capsys, "--rows", "all", "--imagenet")]
    assert len(lines) == len(set(lines)) == 6 + 2 * 7 + 7  # pre-trainings, transfers, fine-tunings


@pytest.mark.parametrize("row", ["supervised", "mae"])
def test_table_5_asks_for_table_4s_runs(row, capsys):
    ours = commands(table5_distillation, capsys, "--rows", row)
    theirs = commands(table4_transfer, capsys, "--rows", row)
    assert [[word.replace("table5", "table4") for word in words] for words in ours] == theirs


def test_table_1_has_distilled_rows(asked, tmp_path):
    rows = run(table1_pretraining_methods, tmp_path, "--rows", "dmae", "dmae-ori", "d2mae")
    assert [name for name, _ in asked] == ["pretrain_dmae", "finetune", "finetune", "pretrain_dmae", "finetune"]
    assert [settings["recipe"] for name, settings in asked if name == "finetune"] == ["ori", "impr", "impr"]
    assert [settings["decoupled"] for name, settings in asked if name == "pretrain_dmae"] == [None, 8]
    measured = {row["name"]: (row["published"], row["measured"]) for row in rows if row["measured"]}
    assert measured == {"D-MAE, ori. recipe": (76.5, [2.0]), "D-MAE, impr. recipe": (78.4, [3.0]),
                        "D2-MAE, impr. recipe": (78.7, [5.0])}
