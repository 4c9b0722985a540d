"""Watching a pre-training: probes of its features, which do not change it, the picture of its log, and TensorBoard."""
import json
import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from appendix import features, knn_probe, pretrain_dino, pretrain_simmim
from common import options, probe, report, training
from common.augment import eval_transform
from common.errors import UserError
from common.images import ImageSet, to_pillow
from common.mae import MAE
from common.measures import effective_rank, knn_accuracy, spread
from common.runs import Run
from common.vit import SIZES
from sec3_benchmark import finetune, pretrain_mae, pretrain_mocov3, table1_pretraining_methods
from sec5_distill import pretrain_dmae
from tests.helpers import (
    assert_resumes_exactly,
    assert_same,
    commands,
    log_rows,
    noisy,
    settings_of,
    tiny_run,
)
from tests.processes import WAIT, said, start_ranks

CPU = torch.device("cpu")
SMALL = dict(model="vit_demo", patch_size=2, num_heads=2)
METHODS = {"mae": (pretrain_mae, {}), "moco": (pretrain_mocov3, dict(mlp_dim=16, out_dim=8)),
           "dino": (pretrain_dino, dict(local_size=4, local_crops=2, out_dim=10, hidden_dim=12, bottleneck_dim=6,
                                        drop_path=0.5)),
           "simmim": (pretrain_simmim, dict(model="vit_demo_simmim", drop_path=0.5)),
           "dmae": (pretrain_dmae, dict(teacher="teacher.pt", distill_blocks=[2])),
           "d2mae": (pretrain_dmae, dict(teacher="teacher.pt", decoupled=1, distill_blocks=[3]))}


def images(count, classes=3, seed=0):
    pixels = np.random.RandomState(seed).randint(0, 256, (count, 11, 12, 3), dtype=np.uint8)
    return ImageSet("toy", pixels, np.arange(count) % classes, list(range(classes)))


@pytest.fixture
def labels(monkeypatch):
    """Make the probe's labelled images, 12 to train on and 7 to validate, and let networks be narrow."""
    sets = images(12), images(7, seed=1)
    monkeypatch.setitem(SIZES, "vit_demo", {"embed_dim": 8, "depth": 2})
    monkeypatch.setattr(probe, "load_sets", lambda args: sets)
    return sets


@pytest.fixture
def teacher(tmp_path, monkeypatch, labels):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    mae = noisy(MAE("vit_demo", img_size=8, patch_size=2, num_heads=2, decoder_dim=8, decoder_depth=1, decoder_heads=1))
    torch.save({"model": mae.state_dict(), "config": mae.config}, "teacher.pt")


def weights(result):
    return torch.load(result["checkpoint"], weights_only=True)["model"]


def probes(result):
    return [row for row in log_rows(result["run"]) if "probe" in row]


# Measures

@pytest.mark.parametrize(("n", "d", "k"), [(7, 5, 1), (40, 16, 3), (40, 16, 16), (6, 9, 6)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 3e4])
def test_k_equal_singular_values_have_rank_k(n, d, k, scale):
    left, right = (torch.linalg.qr(torch.randn(side, side, generator=torch.Generator().manual_seed(side)))[0]
                   for side in (n, d))
    assert effective_rank(scale * left[:, :k] @ right[:k]) == pytest.approx(k, rel=1e-4)


def test_rank_of_unequal_and_of_no_singular_values():
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(4 / 27 ** 0.25)  # 4 / 3^(3/4)
    assert effective_rank(torch.zeros(4, 3)) == 1 == effective_rank(torch.ones(1, 5))
    assert effective_rank(torch.ones(50, 20)) == pytest.approx(1, abs=1e-6)


def test_spread_of_the_sphere_of_a_point_and_of_two_poles():
    noise = torch.randn(20000, 24, generator=torch.Generator().manual_seed(0))
    assert spread(noise) == pytest.approx(1, abs=0.01) == pytest.approx(spread(5 * noise), abs=0.01)
    for same in (torch.ones(9, 4), torch.arange(1.0, 9).unsqueeze(1) * torch.ones(4), torch.zeros(3, 2), noise[:1]):
        assert spread(same) == pytest.approx(0, abs=1e-6)  # the features' length does not matter
    assert spread(torch.eye(9)[:1] * torch.tensor([[1.0], [-1.0]])) == pytest.approx(1 / 3)  # one of nine dimensions


# A training

@pytest.mark.parametrize("method", METHODS)
def test_a_watched_run_ends_in_the_same_bits_and_its_probe_is_of_its_file(method, labels, teacher, tmp_path,
                                                                        monkeypatch):
    """The reference: features that appendix/features.py computes from weights.pt, measured with NumPy."""
    module, more = METHODS[method]
    plain = tiny_run(module, tmp_path / "plain", monkeypatch, **{**SMALL, **more})
    watched = tiny_run(module, tmp_path / "watched", monkeypatch, probe_every=1, **{**SMALL, **more})
    assert plain["run"].split("/")[-1] == watched["run"].split("/")[-1]
    assert_same(weights(watched), weights(plain))
    assert [row for row in log_rows(watched["run"]) if "probe" not in row] == log_rows(plain["run"])
    assert [row["epoch"] for row in probes(watched)] == [1, 2]
    measured = probes(watched)[-1]["probe"]

    train, val = labels
    args = settings_of(knn_probe, dict(init=watched["checkpoint"], device="cpu", workers=0))
    vit, _, args = features.build_encoder(args, CPU)
    for name, pooling in (("token", "token"), ("patches", "avg")):
        ours, queries = (features.extract(vit, each, eval_transform(8), options.replaced(args, pooling=pooling), CPU)
                         for each in (train, val))
        top1 = knn_accuracy(ours, torch.tensor(train.labels), queries, torch.tensor(val.labels), 3)["top1"]
        values = np.linalg.svd(ours.double().numpy(), compute_uv=False)
        shares, unit = values / values.sum(), ours.numpy() / np.linalg.norm(ours.numpy(), axis=1, keepdims=True)
        expected = [top1, np.exp(-(shares * np.log(shares)).sum()), unit.std(axis=0).mean() * 8 ** 0.5]
        assert [measured[f"{what}_{name}"] for what in ("knn", "rank", "spread")] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("stop", [2, 3])
@pytest.mark.parametrize("method", ["mae", "dino"])
def test_a_watched_run_resumes_exactly_and_has_each_row_once(method, stop, labels, tmp_path, monkeypatch):
    """Stopped at the step of a probe, and in the middle of an epoch."""
    module, more = METHODS[method]
    whole = assert_resumes_exactly(module, tmp_path, monkeypatch, stop=stop, probe_every=1, **{**SMALL, **more})
    plain = tiny_run(module, tmp_path / "plain", monkeypatch, **{**SMALL, **more})
    assert_same(weights(whole), weights(plain))
    assert log_rows(whole["run"].replace("/whole/", "/parts/")) == log_rows(whole["run"])


def test_a_row_without_its_checkpoint_is_taken_back(labels, tmp_path, monkeypatch):
    """The process ends between a probe and its checkpoint, and is continued with a worker, which changes nothing."""
    whole = tiny_run(pretrain_mae, tmp_path / "whole", monkeypatch, probe_every=1, **SMALL)
    save = training.Snapshot.save

    def fail(snapshot, step):
        if step == 2:
            raise KeyboardInterrupt
        save(snapshot, step)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training.Snapshot, "save", fail)
        tiny_run(pretrain_mae, tmp_path / "parts", monkeypatch, probe_every=1, save_minutes=0, **SMALL)
    parts = tiny_run(pretrain_mae, tmp_path / "parts", monkeypatch, probe_every=1, workers=1, **SMALL)
    assert log_rows(parts["run"]) == log_rows(whole["run"]) and len(probes(parts)) == 2
    assert_same(weights(parts), weights(whole))


def test_every_third_epoch_and_the_last_step(labels, tmp_path, monkeypatch):
    watched = tiny_run(pretrain_mae, tmp_path, monkeypatch, probe_every=3, epochs=7, **SMALL)
    assert [row["epoch"] for row in probes(watched)] == [3, 6, 7]


# Which images

def write(folder, count, seed):
    folder.mkdir(parents=True)
    for number, pixels in enumerate(torch.randint(0, 256, (count, 3, 9, 10), dtype=torch.uint8,
                                                  generator=torch.Generator().manual_seed(seed))):
        to_pillow(pixels).save(folder / f"{number}.png")


def pretraining(path, **more):
    return settings_of(pretrain_mae, dict(preset="demo", data="folder", data_path=str(path), img_size=[8], workers=0,
                                          device="cpu", **SMALL, **more))


def content(args):
    torch.manual_seed(0)
    mae = noisy(MAE("vit_demo", img_size=8, patch_size=2, num_heads=2, decoder_dim=8, decoder_depth=1, decoder_heads=1))
    return Run("nowhere", vars(args)).weights(mae)


@pytest.mark.parametrize("folders", [["photos"], ["train/a"], ["train/a", "train/b"], ["train/a", "val/a"],
                                     ["train/a", "train/b", "val/a"]])
def test_without_labels_spread_and_rank_remain_and_one_line_says_why(folders, tmp_path, capsys):
    for folder in folders:
        write(tmp_path / folder, 3, 0)
    args = pretraining(tmp_path)
    found = probe.Probe(args, pretrain_mae.subsets.pretraining_images(args)[1], CPU)(content(args))
    assert set(found) == {f"{what}_{tokens}" for what in ("spread", "rank") for tokens in ("token", "patches")}
    assert len([line for line in capsys.readouterr().out.splitlines() if "--probe-every" in line]) == 1


def test_what_cannot_be_read_is_left_out_and_counted(tmp_path, capsys):
    """One image of each split, or all of the validation set."""
    for seed, folder in enumerate(("train/a", "train/b", "val/a", "val/b")):
        write(tmp_path / folder, 4, seed)
    args = pretraining(tmp_path)

    def measure():
        return probe.Probe(args, None, CPU)(content(args))
    (tmp_path / "train/a/0.png").rename(tmp_path / "kept.png"), (tmp_path / "val/b/3.png").unlink()
    without = measure()
    for spoilt in ("train/a/0.png", "val/b/3.png"):
        (tmp_path / spoilt).write_bytes(b"no image")
    assert measure() == pytest.approx(without) and "knn_token" in without
    assert "1 of 8 images of folder" in capsys.readouterr().out
    for file in (tmp_path / "val").glob("*/*.png"):
        file.write_bytes(b"no image")
    assert "knn_token" not in measure() and "8 of 8 images" in capsys.readouterr().out


def test_the_images_are_few_fixed_and_keep_their_labels():
    many = images(5000)
    first, again = probe.draw_images(many, 2000), probe.draw_images(many, 2000)
    assert len(first) == 2000 and (first.images == again.images).all()
    place = {pixels.tobytes(): label for pixels, label in zip(many.images, many.labels)}
    assert [place[pixels.tobytes()] for pixels in first.images] == first.labels.tolist()
    assert len(probe.draw_images(images(5), 2000)) == 5


def test_two_ranks_measure_what_one_process_measures(tmp_path):
    for seed, folder in enumerate(("train/a", "train/b", "val/a", "val/b")):
        write(tmp_path / "data" / folder, 5, seed)
    args = pretraining(tmp_path / "data")
    torch.save(content(args), tmp_path / "content.pt")
    ranks = start_ranks([sys.executable, "-c", f"""
import json, torch
from common import distributed, probe
from tests.test_watching import pretraining
device = distributed.start_process_group("cpu")
args, content = pretraining({str(tmp_path / "data")!r}), torch.load({str(tmp_path / "content.pt")!r}, weights_only=True)
with open(f"rank{{distributed.rank()}}.json", "w", encoding="utf-8") as file:
    json.dump(probe.Probe(args, None, device)(content), file)
distributed.stop_process_group()
"""], tmp_path)
    assert [rank.wait(WAIT) for rank in ranks] == [0, 0], said(tmp_path)
    one = probe.Probe(args, None, CPU)(content(args))
    for rank in range(2):
        assert json.loads((tmp_path / f"rank{rank}.json").read_text()) == pytest.approx(one, rel=1e-5)


def test_features_that_are_not_finite_end_the_training_in_one_line(labels):
    args = pretraining("here")
    spoilt = content(args)
    spoilt["model"]["norm.weight"] = torch.full((8,), 3e38)
    with pytest.raises(FloatingPointError, match="features of the model in training are not finite"):
        probe.Probe(args, images(5), CPU)(spoilt)


# Settings

def test_tables_hand_both_settings_to_the_stages_that_know_them(capsys, monkeypatch):
    monkeypatch.setattr(options, "summary_writer", lambda: None)
    lines = commands(table1_pretraining_methods, capsys, "--data-path", "x", "--probe-every", "5", "--tensorboard")
    before = [line for line in lines if "/pretrain_" in line[0]]
    assert 0 < len(before) < len(lines)
    for line in lines:
        assert "--tensorboard" in line and ("--probe-every" in line) == (line in before)
        assert line not in before or line[line.index("--probe-every") + 1] == "5"


def test_without_the_package_one_line_says_so_before_anything_is_done(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    for module in (pretrain_mae, finetune):
        with pytest.raises(UserError, match="--tensorboard needs the package tensorboard.* pip install tensorboard"):
            settings_of(module, dict(tensorboard=True))


def test_tensorboard_has_the_numbers_of_the_log(labels, tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            written.append((folder, purge_step))

        def add_scalar(self, tag, value, step):
            written.append((tag, value, step))

        def close(self):
            written.append("closed")
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    whole = assert_resumes_exactly(pretrain_mae, tmp_path, monkeypatch, probe_every=1, tensorboard=True, **SMALL)
    parts = whole["run"].replace("/whole/", "/parts/")
    opened = [entry for entry in written if len(entry) == 2]
    assert opened == [(whole["run"], 1), (parts, 1), (parts, 4)] and written.count("closed") == 3
    rows = [json.loads(line) for line in open(f"{whole['run']}/log.jsonl")]
    expected = [(tag, value, row["step"]) for row in rows
                for tag, value in {**row, **{f"probe/{n}": v for n, v in row.get("probe", {}).items()}}.items()
                if tag not in ("step", "probe")]
    assert written[1:written.index("closed")] == expected and ("epoch", 2.0, 4) in expected


# The picture

def drawn(rows, tmp_path, monkeypatch):
    """Draw the picture of a log; return {a panel's label: the values of its lines}."""
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    figures = []
    monkeypatch.setattr(report, "save_figure", lambda figure, path: figures.append(figure))
    report.curve(tmp_path / "log.jsonl", tmp_path / "curve.png")
    return {axis.get_ylabel(): [line.get_ydata().tolist() for line in axis.lines] for axis in figures[0].axes}


def test_the_picture_shows_what_the_log_has(tmp_path, monkeypatch):
    rows = [{"step": step, "epoch": step / 2, "lr": 0.1 * step, "loss": 1 / step, "grad_norm": None}
            for step in (1, 2, 3)]
    bare = {f"{what}_{tokens}": 1.0 + place for place, tokens in enumerate(("token", "patches"))
            for what in ("spread", "rank")}
    looks = [{"step": step, "epoch": step / 2, "probe": {**bare, "knn_token": 5.0 * step, "knn_patches": 6.0 * step}}
             for step in (2, 3)]
    basis = {"training loss": [[1, 1 / 2, 1 / 3]], "learning rate": [[0.1, 0.2, pytest.approx(0.3)]]}
    assert drawn(rows, tmp_path, monkeypatch) == basis
    ranks = {"effective rank": [[1, 1], [2, 2]]}
    assert drawn([*rows, *looks], tmp_path, monkeypatch) == \
        {**basis, "top-1 of neighbours (%)": [[10, 15], [12, 18]], **ranks}
    without = [{**row, "probe": bare} for row in looks]
    assert drawn([*rows, *without], tmp_path, monkeypatch) == {**basis, **ranks}
    assert drawn([*rows, without[0], looks[1]], tmp_path, monkeypatch) == \
        {**basis, "top-1 of neighbours (%)": [[15], [18]], **ranks}  # labels came later
    evaluated = {"step": 3, "epoch": 1.5, "eval": {"top1": 40.0, "images": 3}}
    assert drawn([*rows, evaluated], tmp_path, monkeypatch) == {**basis, "top-1 on val (%)": [[40]]}


def test_the_picture_is_drawn_with_the_checkpoints_but_not_all_the_time(labels, tmp_path, monkeypatch, capsys):
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(Run, "draw_now_and_then", lambda run: asked.append(list(run.folder.glob("step-*.pt"))))
        tiny_run(pretrain_mae, tmp_path, monkeypatch, save_minutes=0, **SMALL)
    assert len(asked) == 3 and all(asked)  # steps 1 to 3; the last leaves weights.pt
    monkeypatch.undo()
    run = Run(tmp_path, {})
    run.draw()  # stopped before the first row
    assert not capsys.readouterr().out.count("was not drawn")
    run.log({"step": 1, "epoch": 1.0, "loss": 1.0, "lr": 0.1})
    run.draw_now_and_then()
    assert not (tmp_path / "curve.png").exists()  # half a minute has not passed
    run.drawn_at -= 31
    run.draw_now_and_then()
    first = (tmp_path / "curve.png").stat().st_mtime_ns
    run.draw_now_and_then()
    assert (tmp_path / "curve.png").stat().st_mtime_ns == first
    run.drawn_at -= 31
    run.log_path.write_text("{", encoding="utf-8")  # a log that cannot be drawn stops no training
    run.draw_now_and_then()
    assert "was not drawn" in capsys.readouterr().out
