"""A.4, A.5 and B.5: which runs they ask for and what they make of the results. The stages are stand-ins."""
import json

import pytest

from appendix import a4_transfer_sweep, a5_detection_settings, b5_dino_simmim
from common import options, scripts
from common.errors import UserError
from common.pretrained import HubError
from sec3_benchmark import detect
from sec3_benchmark.downstream import MOCO_FINETUNING
from tests.helpers import run


def table(tmp_path, item):
    """{row name: its cells} of the Markdown, and the rows of the json."""
    lines = (tmp_path / item / f"{item}.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return {row[0]: dict(zip(cells[0], row)) for row in cells[1:]}, \
        json.loads((tmp_path / item / f"{item}.json").read_text())["rows"]


def test_a4_sweeps_each_pair_once_from_one_pre_training(asked, tmp_path):
    run(a4_transfer_sweep, tmp_path, "--lrs", "0.03", "0.1", "--layer-decays", "0.75", "1.0", "--seeds", "0", "1",
        parse=a4_transfer_sweep.parse)
    assert [name for name, _ in asked].count("pretrain_mae") == 2  # one for each seed
    swept = [(s["lr"], s["layer_decay"], s["seed"]) for name, s in asked if name == "transfer"]
    assert sorted(swept) == [(lr, decay, seed) for lr in (0.03, 0.1) for decay in (0.75, 1.0) for seed in (0, 1)]
    weights = {s["seed"]: f"run{number}/weights.pt" for number, (name, s) in enumerate(asked, 1)
               if name == "pretrain_mae"}
    assert all(s["init"].endswith(weights[s["seed"]]) for name, s in asked if name == "transfer")
    rows, _ = table(tmp_path, "a4")
    assert len(rows) == 4 and {row["published"] for row in rows.values()} == {"-"}  # a fractal set has none


@pytest.mark.parametrize("init, published", [((), {"0.1-0.75": 78.9}), (("--init", "mae.pt"), {})])
def test_a4_has_one_published_cell_and_only_from_mae(init, published):
    args = a4_transfer_sweep.parse(a4_transfer_sweep.build_parser(), ["--preset", "paper", *init])
    rows = {row.key: row.published for row in a4_transfer_sweep.rows_of(args)}
    assert len(rows) == 16 and {key: value for key, value in rows.items() if value} == published


def test_a4_wants_the_data_set_before_it_trains(asked, tmp_path):
    with pytest.raises(UserError, match="pets needs --dataset-path"):
        run(a4_transfer_sweep, tmp_path, "--dataset", "pets", parse=a4_transfer_sweep.parse)
    with pytest.raises(UserError, match="Pets is not whole"):
        run(a4_transfer_sweep, tmp_path, "--preset", "small", "--dataset", "pets", "--dataset-path", str(tmp_path),
            parse=a4_transfer_sweep.parse)
    assert not asked


def test_a5_puts_both_protocols_beside_the_published_numbers(asked, tmp_path):
    run(a5_detection_settings, tmp_path)
    (first, vitdet), (second, other) = asked
    assert first == second == "detect" and (vitdet["pyramid"], other["pyramid"]) == ("simple", "topdown")
    changed = {name for name in vitdet if vitdet[name] != other[name]}
    form = options.given(detect.build_parser(), a5_detection_settings.FORM.split()[1:])
    assert changed == set(form)  # at one size and rate
    rows, kept = table(tmp_path, "a5_detection")
    assert rows["ViTDet (released code)"]["box AP"] == "39.9 / 1.0"
    assert rows["ViTDet (released code)"]["mask AP"] == "35.4 / 0.5"
    assert rows["Li et al. 2021, at the preset's size and rate"]["box AP"] == "- / 2.0"
    assert [row["status"] for row in kept] == ["run", "not chosen", "run"]
    run(a5_detection_settings, tmp_path, "--rows", "li2021-form", "--img-size", "48")
    assert asked[-1][1]["img_size"] == [48]
    assert "(box_ap 39.9, mask_ap 35.4: not chosen)" in (tmp_path / "a5_detection" / "a5_detection.md").read_text()


def test_a5_says_which_weights_it_could_not_get(asked, tmp_path, monkeypatch):
    def offline(*args, **settings):
        raise HubError("no hub", "timm:x")
    monkeypatch.setattr(scripts, "run", offline)
    run(a5_detection_settings, tmp_path, "--init", "timm:x", "--rows", "vitdet")
    assert table(tmp_path, "a5_detection")[1][0]["status"].startswith("needs weights: no hub, in place of its name: ")


def test_a5_in_full_has_the_papers_size_and_rate():
    rows = {row.key: row for row in a5_detection_settings.ROWS}
    assert rows["li2021"].presets == ("paper",)
    script, *words = rows["li2021"].lines[0].split()
    settings = scripts.settings_of(script, [*words, "--preset", "paper"])
    assert settings.img_size == [1024] and settings.warmup_iterations == round(118_000 / 64 / 4)


def test_b5_probes_the_weights_that_it_fine_tunes(asked, tmp_path):
    run(b5_dino_simmim, tmp_path, "--rows", "all")
    stages = [asked[i:i + 4] for i in range(0, len(asked), 4)]
    assert [row[0][0] for row in stages] == ["pretrain_mae", "pretrain_mocov3", "pretrain_simmim", "pretrain_dino"]
    assert all([name for name, _ in row[1:]] == ["knn_probe", "linear_probe", "finetune"] for row in stages)
    poolings = [[settings["pooling"] for _, settings in row[1:3]] for row in stages]
    assert poolings == [["token"] * 2, ["token"] * 2, ["avg"] * 2, ["token"] * 2]  # SimMIM leaves its token idle
    decays = [row[3][1]["layer_decay"] for row in stages]
    assert MOCO_FINETUNING == f"--layer-decay {decays[1]}" and len({decays[0], *decays[2:]}) == 1
    rows, _ = table(tmp_path, "b5")
    assert [rows["SimMIM"][column] for column in ("published", "kNN", "linear", "fine-tuned")] == \
        ["77.9", "10.0", "11.0", "12.0"]
    assert rows["MAE"]["published, linear"] == "23.4" and rows["DINO"]["published, linear"] == ""
