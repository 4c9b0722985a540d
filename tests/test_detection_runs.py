"""sec3_benchmark/detect.py as runs: the recipe's numbers, stopping and continuing, two ranks, evaluation of a file.

The detector is the demo's ViT with heads of 8 channels, on ten generated scenes of 48 px.
"""
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common import options, scripts, tables
from common.errors import UserError
from common.vit import build_model, pair
from sec3_benchmark import detect, table4_transfer
from sec3_benchmark.detection import scenes
from sec3_benchmark.detection.average_precision import detect_all
from sec3_benchmark.detection.mask_rcnn import MaskRCNN
from sec3_benchmark.detection.scenes import load_detection_sets
from sec5_distill import table5_distillation
from tests.helpers import assert_same, log_rows, settings_of

ROOT = Path(__file__).resolve().parents[1]
TINY = dict(preset="demo", img_size=[48], patch_size=12, position_size=[48], window=2, channels=8, hidden=16,
            anchors=16, rois=16, proposals=20, iterations=5, batch_size=4, warmup_iterations=2, base_lr=1e-2,
            eval_every=1, draw=2, device="cpu", precision="fp32", workers=0, log_every=1)


@pytest.fixture
def few_scenes(monkeypatch):
    monkeypatch.setattr(scenes, "SPLITS", {"train": 10, "val": 3})
    monkeypatch.setattr(scenes, "TEXTURES", (2, 2))


def settings(output, **changes):
    if changes.get("eval_only"):  # the file says how it is built
        told = {name: value for name, value in TINY.items() if name not in detect.BUILT_FROM}
        words = options.to_argv({**told, "output": str(output), **changes})
        return detect.parse(detect.build_parser(), detect.PRESETS, words)
    return settings_of(detect, {**TINY, "output": str(output), **changes})


def weights(result):
    return torch.load(result["checkpoint"], weights_only=True)["model"]


# The recipe

def test_the_paper_preset_is_the_papers_recipe():
    """Appendix A.5 as released differs from ViTDet-B: no layer decay, weight decay 0.05, no drop path, 640 px."""
    args = vars(settings_of(detect, {"dataset_path": "COCO"}))
    expected = dict(preset="paper", model="vit_tiny", num_heads=12, patch_size=16, img_size=[640], window=14,
                    global_blocks=[2, 5, 8, 11], position_size=[224], channels=256, hidden=1024, anchors=256, rois=512,
                    proposals=1000, iterations=184_375, batch_size=64, base_lr=1e-4, warmup_iterations=250,
                    weight_decay=0.05, drop_path=0.0, jitter=[0.1, 2.0], clip_grad=0.0, schedule="step",
                    pyramid="simple", keep_activations=False)
    assert {name: args[name] for name in expected} == expected


def test_the_step_schedule():
    rate = [detect.step_rate(step, peak=1e-4, total_steps=184_375, warmup_steps=250)
            for step in (0, 125, 250, 163_887, 163_888, 177_545, 177_546, 184_374)]
    assert rate == pytest.approx([1e-7, 0.5005e-4, 1e-4, 1e-4, 1e-5, 1e-5, 1e-6, 1e-6])


def test_the_papers_detector_and_what_decays(few_scenes):
    """ViT-Tiny/16 at 640 px has tables of 27 and 79 offsets. Every bias decays; norms and positions do not."""
    args = settings_of(detect, {"dataset_path": "COCO"})
    with torch.device("meta"):
        model = MaskRCNN(*detector_parts(args), 81, {})
    tables = {name: len(p) for name, p in model.named_parameters() if name.endswith("rel_pos_h")}
    assert list(tables.values()) == [27, 27, 79] * 4
    assert model.backbone.position_grid == (14, 14) and model.backbone.grid == (40, 40)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, exempt = ({names[id(p)] for p in group["params"]} for group in detect.detector_groups(model, 0.05))
    assert "backbone.pos_embed" in exempt and "backbone.blocks.0.attn.qkv.bias" in decayed
    assert all("norm" in name or name == "backbone.pos_embed" or len(shape) == 1 for name, shape in
               ((name, p.shape) for name, p in model.named_parameters() if name in exempt))
    assert len(decayed) + len(exempt) == len(names)
    # 12 blocks: norm1, norm2; pyramid: 1 + 4 x 2; box and mask heads: 4 each; two tensors a norm
    assert len(exempt) == 1 + 2 * (24 + 9 + 8)


def detector_parts(args):
    vit = detect.build_vit(args.model, img_size=args.position_size, num_classes=0)
    return (detect.ViTBackbone(vit, args.img_size, args.window, args.global_blocks),
            detect.SimplePyramid(192, args.channels))


# Runs

class Stopped(detect.Detection):
    def after_step(self, step):
        if step + 1 == 2:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("changes", [{}, {"micro_batch": 2, "drop_path": 0.2, "pyramid": "topdown"}],
                         ids=["plain", "accumulated, drop path, batch norm"])
def test_a_stopped_run_continues_exactly(few_scenes, tmp_path, monkeypatch, changes):
    untouched = detect.main(settings(tmp_path / "a", **changes))
    with monkeypatch.context() as patch:
        patch.setattr(detect, "Detection", Stopped)
        with pytest.raises(SystemExit):
            detect.main(settings(tmp_path / "b", **changes))
    continued = detect.main(settings(tmp_path / "b", **changes))
    assert_same(weights(continued), weights(untouched))
    assert log_rows(Path(continued["run"])) == log_rows(Path(untouched["run"]))
    assert {name: continued[name] for name in ("box_ap", "mask_ap")} == \
        {name: untouched[name] for name in ("box_ap", "mask_ap")}


def test_a_run_leaves_pictures_and_is_evaluated_from_its_file(few_scenes, tmp_path):
    result = detect.main(settings(tmp_path))
    folder = Path(result["run"])
    assert {"predictions.png", "predictions.json", "curve.png", "best.pt", "weights.pt"} <= \
        {path.name for path in folder.iterdir()}
    logged = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logged if "eval" in row] == [2, 4, 5]  # two steps an epoch, and the end
    again = detect.main(settings(tmp_path, init=result["checkpoint"], eval_only=True))
    assert {name: result[name] for name in again} == again
    [drawn] = (tmp_path / "detect").glob("eval-*/predictions.json")
    assert drawn.read_text() == (folder / "predictions.json").read_text() != "[]\n"
    assert detect.main(settings(tmp_path))["run"] == result["run"]  # reused
    content = torch.load(result["checkpoint"], weights_only=True)
    assert content["classes"] == ["disc", "square", "triangle", "cross"]
    torch.save({**content, "classes": ["square", "disc", "triangle", "cross"]}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="other classes .*: square there is disc here"):
        detect.main(settings(tmp_path, init=str(tmp_path / "other.pt"), eval_only=True))


def test_an_evaluated_detector_is_built_as_its_file_says(tmp_path):
    """Another value on the command line is an error, except for --proposals. Presets and defaults do not count."""
    args = settings(tmp_path)
    model = detect.build_detector(args, 4)
    statistics = {"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}
    torch.save({"model": model.state_dict(), "config": model.config, "statistics": statistics}, tmp_path / "w.pt")
    file = detect.read_detector(tmp_path / "w.pt")

    def taken(**explicit):
        return vars(detect.as_built(settings(tmp_path, eval_only=True, **explicit), file))
    for found in (taken(), taken(img_size=[48], channels=8, mean=[0.5, 0.5, 0.5])):
        assert {name: found[name] for name in detect.BUILT_FROM} == {name: getattr(args, name)
                                                                     for name in detect.BUILT_FROM}
        assert {name: found[name] for name in statistics} == statistics
    assert [taken(proposals=number)["proposals"] for number in (7, 100, 20)] == [7, 100, 20]  # 100: the preset's
    for name, value, said in (("img_size", [64], r"img_size \[48\], not \[64\]: leave --img-size out"),
                              ("channels", 99, "channels 8, not 99: leave --channels out"),
                              ("channels", 64, "channels 8, not 64: leave --channels out"),  # as the preset has it
                              ("img_size", [96], r"img_size \[48\], not \[96\]: leave --img-size out"),
                              ("rois", 64, "rois 16, not 64: leave --rois out"),
                              ("pyramid", "topdown", "pyramid simple, not topdown: leave --pyramid out")):
        with pytest.raises(UserError, match=f"w.pt was built with {said}"):
            taken(**{name: value})
    with pytest.raises(UserError, match=r"images with mean \[0.5, 0.5, 0.5\], here it is \[0.4, 0.5, 0.5\]"):
        taken(mean=[0.4, 0.5, 0.5])


def test_ranks_share_the_evaluation(few_scenes, tmp_path):
    args = settings(tmp_path, micro_batch=1)
    _, images = load_detection_sets(args)
    model = detect.build_detector(args, 4)
    model.roi_heads.score_thresh = 0.0  # a fresh model finds nothing above the usual 0.05
    alone = detect_all(model, images, args, torch.device("cpu"))
    shared = [one for rank in (0, 1) for one in detect_all(model, images, args, torch.device("cpu"), rank, 2)]
    assert len(alone) > 10 and {one["image_id"] for one in alone} == {0, 1, 2}
    assert Counter(map(str, shared)) == Counter(map(str, alone))


def test_an_evaluation_does_not_compile_the_backbone_anew(few_scenes, tmp_path):
    """It would, for the mode and for the last, smaller batch. Here nothing is compiled before it."""
    args = settings(tmp_path, micro_batch=2)
    _, images = load_detection_sets(args)
    model = detect.build_detector(args, 4)
    compiled = []
    model.backbone.compile(backend=lambda graph, inputs: compiled.append(graph) or graph.forward)
    detect_all(model, images, args, torch.device("cpu"))
    assert not compiled
    model.backbone(torch.zeros(2, 3, *pair(args.img_size)))
    assert len(compiled) == 1


def test_initial_weights_reach_the_backbone(few_scenes, tmp_path):
    vit = detect.build_vit("vit_demo", img_size=96, patch_size=12, num_classes=5)
    torch.save({"model": vit.state_dict(), "config": vit.config}, tmp_path / "vit.pt")
    args = settings(tmp_path)
    model = detect.build_detector(args, 4, detect.read_weights(tmp_path / "vit.pt"))
    assert torch.equal(model.backbone.blocks[11].mlp.fc2.weight, vit.blocks[11].mlp.fc2.weight)
    assert model.backbone.pos_embed.shape == (1, 16, 96)  # 8 x 8 in the file, 4 x 4 asked for
    with pytest.raises(UserError, match="has 12 heads and the model 6"):
        detect.build_detector(settings(tmp_path, num_heads=6), 4, detect.read_weights(tmp_path / "vit.pt"))
    with pytest.raises(UserError, match="vit.pt is no detector"):
        detect.main(settings(tmp_path, init=str(tmp_path / "vit.pt"), eval_only=True))


def test_impossible_wishes_are_refused(tmp_path):
    with pytest.raises(UserError, match="--preset paper needs --dataset-path"):
        detect.main(settings(tmp_path, preset="paper"))
    with pytest.raises(UserError, match="the model has blocks 0 to 11"):
        detect.build_detector(settings(tmp_path, global_blocks=[12]), 4)
    for blocks in ([2, 5], [0, 3, 6, 9, 11], [2, 5, 8, 8]):
        with pytest.raises(UserError, match="--pyramid topdown is made of four"):
            detect.build_detector(settings(tmp_path, global_blocks=blocks, pyramid="topdown"), 4)
    for wrong, message in ((dict(jitter=[2.0, 0.1]), "--jitter 2.0 0.1"),
                           (dict(warmup_iterations=5), "--warmup-iterations 5 leaves nothing of --iterations 5")):
        with pytest.raises(UserError, match=message):
            detect.main(settings(tmp_path, **wrong))
    vit = build_model("vit_tiny_simmim", img_size=32, patch_size=16, num_classes=0)
    torch.save({"model": vit.state_dict(), "config": vit.config}, tmp_path / "simmim.pt")
    with pytest.raises(UserError, match="has relative positions .vit_tiny_simmim.: detect.py takes a plain ViT"):
        detect.main(settings(tmp_path, init=str(tmp_path / "simmim.pt")))


# Tables 4 and 5

def fake_run(script, words=()):
    """Return results as the scripts would, without a run."""
    name = Path(script).stem
    found = {"box_ap": 12.5, "mask_ap": 10.5} if name == "detect" else \
        {"top1": 50.0, "best_top1": 51.0, "train_images": 7}
    calls.append((name, words[words.index("--init") + 1] if "--init" in words else None))
    return {"checkpoint": f"weights of {name}", "run": "-", "seconds": 1.0, **found}


calls = []


def test_the_coco_columns(tmp_path, monkeypatch):
    """For `coco` in --datasets, detect.py replaces transfer.py and starts from the same weights."""
    monkeypatch.setattr(scripts, "run", fake_run)
    words = ["--rows", "random", "mae", "--datasets", "fractals-small", "coco", "--output", str(tmp_path),
             "--device", "cpu", "--set", "detect.iterations=7", "detect.warmup_iterations=2"]
    calls.clear()
    rows = {row["key"]: row for row in table4_transfer.main(tables.parse(table4_transfer.build_parser(), words))}
    assert rows["mae"]["measured"] == {"fractals-small": [50.0], "coco-box": [12.5], "coco-mask": [10.5]}
    weights = "weights of pretrain_mae"
    assert calls == [("transfer", None), ("detect", None), ("pretrain_mae", None), ("transfer", weights),
                     ("detect", weights)]
    text = (tmp_path / "table4/table4.md").read_text()
    assert "39.9 / 12.5" in text and "35.4 / 10.5" in text and "39.7 / not run" in text
    calls.clear()
    words[2] = "dmae"
    args = tables.parse(table5_distillation.build_parser(), words[:1] + words[2:])
    [row] = [row for row in table5_distillation.main(args) if row["key"] == "dmae"]
    assert row["measured"]["coco-mask"] == [10.5] and calls[-1] == ("detect", "weights of pretrain_dmae")
    assert "42.3 / 12.5" in (tmp_path / "table5/table5.md").read_text()
    words[2] = "mae"
    with pytest.raises(UserError, match="coco needs --dataset-path"):
        table4_transfer.main(tables.parse(table4_transfer.build_parser(), [*words, "--preset", "paper"]))


@pytest.mark.slow
def test_two_ranks_train_and_evaluate_every_image_once(tmp_path):
    """The data are COCO files in a folder coco/; one image has no objects, another only a crowd."""
    root = tmp_path / "coco"
    (root / "annotations").mkdir(parents=True)
    rng = np.random.RandomState(0)
    for split, count in (("train", 8), ("val", 5)):
        (root / f"{split}2017").mkdir()
        images, annotations = [], []
        for i in range(count):
            Image.fromarray(rng.randint(0, 255, (40, 60, 3), dtype=np.uint8)).save(root / f"{split}2017" / f"{i}.jpg")
            images.append({"id": i, "file_name": f"{i}.jpg", "height": 40, "width": 60})
            mask = np.zeros((40, 60), bool)
            mask[5:25, 10 + i:40] = True
            if i != 4 or split == "train":
                crowd = int(i == 3 and split == "val")
                annotations.append({**scenes.annotation(i + 1, i, mask, i % 2), "iscrowd": crowd})
        text = json.dumps({"images": images, "annotations": annotations,
                           "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]})
        (root / "annotations" / f"instances_{split}2017.json").write_text(text)
    words = options.to_argv({**TINY, "dataset_path": str(tmp_path), "output": str(tmp_path / "out"), "iterations": 3})
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         str(ROOT / "sec3_benchmark/detect.py"), *words], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert "global batch 4 = 2 ranks x 1 accumulation x 2" in done.stdout
    [path] = (tmp_path / "out/detect").glob("*/result.json")
    result = json.loads(path.read_text())
    assert "box_ap" in result and "mask_ap" in result
    alone = detect.main(settings(tmp_path / "alone", dataset_path=str(tmp_path), init=str(path.parent / "weights.pt"),
                                 eval_only=True, draw=0))
    assert alone == {name: result[name] for name in alone}
