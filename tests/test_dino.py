"""appendix/dino.py and pretrain_dino.py: loss, centre, crops, head, schedules, gradients, files, ranks, resume."""
import os
import random
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import ColorJitter

from appendix import dino, pretrain_dino
from appendix.dino import DINO, DINOHead, MultiCrop, clip_each, dino_loss, teacher_temperature, update_center
from common.errors import UserError
from common.filling import load_encoder
from common.loader import seed_everything
from common.pretrained import read_weights
from common.rebuilding import load_model
from common.vit import SIZES, build_vit
from sec3_benchmark.moco import half_cosine
from tests.helpers import (
    assert_close,
    assert_resumes_exactly,
    crop_by_hand,
    golden,
    parameter_count,
    settings_of,
    tensor,
    tiny_run,
)

ROOT = Path(__file__).resolve().parents[1]
TINY = dict(img_size=16, local_size=8, patch_size=4, num_heads=4, out_dim=10, hidden_dim=12, bottleneck_dim=6)
STAGE = dict(model="vit_demo", local_size=4, local_crops=2, patch_size=2, num_heads=2, out_dim=10, hidden_dim=12,
             bottleneck_dim=6)


# The loss and the schedules

def test_golden_loss_and_center():
    values = golden("dino")
    student, teacher, center = (torch.tensor(values[name]) for name in
                                ("student_output", "teacher_output", "center_before"))
    temperature = teacher_temperature(int(values["epoch"]), float(values["warmup_teacher_temp"]),
                                      float(values["teacher_temp"]), int(values["warmup_teacher_temp_epochs"]))
    loss = dino_loss(student, teacher, center, temperature, float(values["student_temp"]))
    assert_close(loss, values["loss"], 1e-5)
    after = update_center(center, teacher.sum(dim=0), len(teacher), float(values["center_momentum"]))
    assert_close(after, values["center_after"], 1e-5)


def test_loss_is_the_mean_over_pairs_of_different_crops():
    torch.manual_seed(0)
    student, teacher, center = torch.randn(50, 7), torch.randn(10, 7), torch.randn(1, 7)
    terms = []
    for t in range(2):
        for s in range(10):
            if s != t:
                for b in range(5):
                    q = torch.softmax((teacher[5 * t + b] - center[0]) / 0.05, dim=0)
                    p = torch.softmax(student[5 * s + b] / 0.1, dim=0)
                    terms.append(-(q * p.log()).sum())
    assert len(terms) == 18 * 5
    assert_close(dino_loss(student, teacher, center, 0.05), torch.stack(terms).mean(), 1e-5)


def test_loss_stays_in_float32_under_autocast():
    torch.manual_seed(0)
    outputs = torch.randn(8, 100), torch.randn(4, 100), torch.zeros(1, 100)
    with torch.autocast("cpu", torch.bfloat16):
        inside = dino_loss(*outputs, 0.04)
    assert inside.dtype == torch.float32 and torch.equal(inside, dino_loss(*outputs, 0.04))


def test_schedules():
    assert [teacher_temperature(e, 0.04, 0.07, 30) for e in (0, 29, 30, 99)] == pytest.approx([0.04, 0.07, 0.07, 0.07])
    assert teacher_temperature(12, 0.04, 0.07, 30) == pytest.approx(np.linspace(0.04, 0.07, 30)[12])
    assert teacher_temperature(0, 0.04, 0.07, 0) == 0.07
    assert [half_cosine(s, 100, 0.04, 0.4) for s in (0, 50, 100)] == pytest.approx([0.04, 0.22, 0.4])
    assert [half_cosine(s, 100, 0.996, 1.0) for s in (0, 50, 100)] == pytest.approx([0.996, 0.998, 1.0])


def test_each_tensor_is_clipped_by_itself():
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.zeros(3, 2)) for _ in range(3)]
    for parameter, scale in zip(parameters, (10.0, 0.1)):
        parameter.grad = torch.randn(3, 2) * scale
    expected = [p.grad * min(1.0, 3.0 / (p.grad.norm().item() + 1e-6)) for p in parameters[:2]]
    clip_each(parameters, 3.0)
    for parameter, gradient in zip(parameters, expected):
        torch.testing.assert_close(parameter.grad, gradient)
    assert parameters[0].grad.norm() == pytest.approx(3, rel=1e-5) and parameters[2].grad is None


# Crops and the model

def test_crops_of_the_paper_and_small_ones():
    image = tensor(np.random.RandomState(0).randint(0, 256, (300, 260, 3), dtype=np.uint8))
    for size, local in ((224, 96), (64, 32), (36, 18), ((48, 32), 16)):
        views = MultiCrop(size, local, 8)(image)
        height, width = size if isinstance(size, tuple) else (size, size)
        assert views["large"].shape == (2, 3, height, width) and views["small"].shape == (8, 3, local, local)
        assert views["large"].dtype == torch.uint8
    assert set(MultiCrop(36, 18, 0)(image)) == {"large"}


def by_hand(image, size, area, blur, solarize):
    """The official order: crop, flip, jitter, grey, blur, solarise (PAPER 3.3). Crop, flip and blur are drawn by
    Python's generator, the rest by torch's.
    """
    image, done = crop_by_hand(image, size, area, "bicubic"), []
    if random.random() < 0.5:
        image, done = ImageOps.mirror(image), ["flip"]
    if torch.rand(1) <= 0.8:
        image, done = ColorJitter(0.4, 0.4, 0.2, 0.1)(image), [*done, "jitter"]
    if torch.rand(1) < 0.2:
        image, done = image.convert("L").convert("RGB"), [*done, "grey"]
    if random.random() < blur:
        image, done = image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0))), [*done, "blur"]
    if torch.rand(1) < solarize:
        image, done = ImageOps.solarize(image), [*done, "solarize"]
    return tensor(image), done


@pytest.mark.parametrize(("which", "size", "area", "blur", "solarize"), [
    (0, 16, (0.4, 1.0), 1.0, 0.0), (1, 16, (0.4, 1.0), 0.1, 0.2), (2, 8, (0.05, 0.4), 0.5, 0.0)])
def test_a_crop_is_made_in_the_official_order(which, size, area, blur, solarize):
    crops, counts = MultiCrop(16, 8, 2), Counter()
    crop = [*crops.large, crops.small[0]][which]
    for seed in range(200):
        image = Image.fromarray(np.random.RandomState(seed).randint(0, 256, (10, 12, 3), np.uint8)).resize((50, 60))
        seed_everything("test", seed)
        ours = crop(tensor(image))
        seed_everything("test", seed)
        expected, done = by_hand(image, size, area, blur, solarize)
        assert torch.equal(ours, expected), (seed, done)
        counts.update(done)
    shares = {"flip": 0.5, "jitter": 0.8, "grey": 0.2, "blur": blur, "solarize": solarize}
    assert {step: counts[step] / 200 for step in shares} == pytest.approx(shares, abs=0.1)


def test_parameter_counts():
    """PAPER 1.3: the head 192-2048-2048-256 and the last layer 256 x 65536, whose lengths are fixed."""
    head = DINOHead(192, 65536, 2048, 256)
    assert parameter_count(head.mlp) == 5_116_160
    assert head.last_layer.weight_v.numel() == 16_777_216
    assert not head.last_layer.weight_g.requires_grad and (head.last_layer.weight_g == 1).all()


@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_the_last_layer_is_weight_normalised():
    torch.manual_seed(0)
    layer, x = dino.NormLinear(6, 10), torch.randn(3, 6)
    reference = torch.nn.utils.weight_norm(torch.nn.Linear(6, 10, bias=False))  # the official one
    reference.load_state_dict(layer.state_dict())  # its names too
    torch.testing.assert_close(layer(x), reference(x))


def test_forward_at_both_sizes():
    """Large crops as timm's ViT has them; small ones like a ViT of that size with interpolated positions."""
    torch.manual_seed(0)
    model = DINO("vit_demo", drop_path=0.0, **TINY).eval()
    large, small = torch.randn(3, 2, 3, 16, 16), torch.randn(3, 4, 3, 8, 8)
    with torch.no_grad():
        for parameter in model.teacher.parameters():
            parameter.mul_(1.1)  # so that it is not the student
    student, teacher = model(large, small)
    assert student.shape == (18, 10) and teacher.shape == (6, 10) and not teacher.requires_grad
    head, backbone = model.student["head"], model.student["backbone"]
    state = backbone.state_dict()
    grid = state["pos_embed"][:, 1:].reshape(1, 4, 4, 96).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(2, 2), mode="bicubic", align_corners=False).permute(0, 2, 3, 1).reshape(1, 4, 96)
    state["pos_embed"] = torch.cat([state["pos_embed"][:, :1], grid], dim=1)
    little = build_vit("vit_demo", img_size=8, patch_size=4, num_heads=4, num_classes=0, global_pool="token").eval()
    little.load_state_dict(state)
    for crop in range(2):
        torch.testing.assert_close(student[3 * crop:3 * crop + 3], head(backbone(large[:, crop])))
        torch.testing.assert_close(teacher[3 * crop:3 * crop + 3],
                                   model.teacher["head"](model.teacher["backbone"](large[:, crop])))
    for crop in range(4):
        ours = student[6 + 3 * crop:9 + 3 * crop]
        torch.testing.assert_close(ours, head(little(small[:, crop])), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(large)[0], student[:6])


def test_positions_at_the_papers_sizes():
    assert DINO("vit_demo", out_dim=8, hidden_dim=8, bottleneck_dim=8).resize.shape == (36, 196)
    with pytest.raises(UserError, match="16 px do not tile an image of 100 x 100"):
        DINO("vit_demo", local_size=100, out_dim=8)


def test_initial_values():
    """Truncated normal 0.02 for backbone and head, the teacher equal to the student; drop path for the student only."""
    torch.manual_seed(0)
    model = DINO("vit_demo", out_dim=64, hidden_dim=256, bottleneck_dim=64)
    parameters = dict(model.named_parameters())
    for name in ("backbone.pos_embed", "backbone.blocks.3.attn.qkv.weight", "head.mlp.2.weight"):
        assert parameters[f"student.{name}"].std().item() == pytest.approx(0.02, rel=0.05), name
    assert not parameters["student.head.mlp.4.bias"].any()
    for name, value in model.student.named_parameters():
        assert torch.equal(parameters[f"teacher.{name}"], value) and not parameters[f"teacher.{name}"].requires_grad
    rates = [[getattr(block.drop_path1, "drop_prob", 0.0) for block in network["backbone"].blocks]
             for network in (model.student, model.teacher)]
    assert rates == [pytest.approx(np.linspace(0, 0.1, 12).tolist()), [0.0] * 12]


# The step

def test_what_is_decayed_and_when():
    """Class token and positions too, vectors and biases never; the other group stays at 0."""
    model = DINO("vit_demo", **TINY)
    groups = pretrain_dino.regularised_groups(model)
    names = {kind: {name for group in groups if group["regularised"] is kind for name in group["names"]}
             for kind in (True, False)}
    assert {"student.backbone.cls_token", "student.backbone.pos_embed",
            "student.head.last_layer.weight_v"} <= names[True]
    assert all(name.endswith(".bias") or ".norm" in name for name in names[False])
    assert not any(name.startswith("teacher") or name.endswith("weight_g") for name in names[True] | names[False])


def recorded(monkeypatch):
    """Values of every update, taken when the teacher has followed."""
    rows = []

    def after_step(self, step, original=pretrain_dino.DINOMethod.after_step):
        before = self.model.teacher["head"].mlp[0].weight.clone()
        original(self, step)
        rows.append({"before": before, "teacher": self.model.teacher["head"].mlp[0].weight.clone(),
                     "student": self.model.student["head"].mlp[0].weight.detach().clone(),
                     "last": self.model.student["head"].last_layer.weight_v.detach().clone(),
                     "decay": [(g["regularised"], g["weight_decay"]) for g in self.optimizer.param_groups],
                     "center": self.center.clone()})
    monkeypatch.setattr(pretrain_dino.DINOMethod, "after_step", after_step)
    return rows


@pytest.fixture
def narrow(monkeypatch):
    monkeypatch.setitem(SIZES, "vit_demo", {"embed_dim": 8, "depth": 2})


def test_a_run_step_by_step(tmp_path, monkeypatch, narrow):
    """The last layer rests for an epoch of two steps, the decay rises, the teacher follows after the update."""
    rows = recorded(monkeypatch)
    tiny_run(pretrain_dino, tmp_path, monkeypatch, momentum=0.5, **STAGE)
    assert torch.equal(rows[0]["last"], rows[1]["last"]) and not torch.equal(rows[1]["last"], rows[2]["last"])
    for step, row in enumerate(rows):
        m = half_cosine(step, 4, 0.5, 1.0)
        torch.testing.assert_close(row["teacher"], m * row["before"] + (1 - m) * row["student"])
        decay = half_cosine(step, 4, 0.04, 0.4)
        assert dict(row["decay"]) == {True: pytest.approx(decay), False: 0.0}
    assert not torch.equal(rows[2]["center"], rows[1]["center"])


def test_accumulation_changes_nothing(tmp_path, monkeypatch, narrow):
    """One centre for all micro-batches of a step, updated once."""
    results = []
    for micro in (4, 2, 1):
        rows = recorded(monkeypatch)
        tiny_run(pretrain_dino, tmp_path / str(micro), monkeypatch, micro_batch=micro, drop_path=0.0, **STAGE)
        results.append(rows[:4])
    for rows in results[1:]:
        for ours, theirs in zip(rows, results[0]):
            for name in ("student", "teacher", "last", "center"):
                torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-5)


def test_exact_resume(tmp_path, monkeypatch, narrow):
    """With drop path, a frozen last layer, the centre, and two micro-batches a step."""
    assert_resumes_exactly(pretrain_dino, tmp_path, monkeypatch, drop_path=0.5, micro_batch=2, **STAGE)


@pytest.mark.slow
def test_two_ranks_equal_one_process(tmp_path):
    """The same global batch in one or two pieces: centre, clipping and teacher included."""
    rng = np.random.RandomState(0)
    (tmp_path / "data").mkdir()
    for i in range(8):
        image = Image.fromarray(rng.randint(0, 256, (20, 20, 3), dtype=np.uint8))
        image.save(tmp_path / "data" / f"{i}.png")
    words = [sys.executable, str(ROOT / "appendix/pretrain_dino.py"), "--preset", "demo", "--data", "folder",
             "--data-path", str(tmp_path / "data"), "--img-size", "16", "--local-size", "8", "--patch-size", "8",
             "--local-crops", "2", "--batch-size", "4", "--epochs", "2", "--out-dim", "32", "--drop-path", "0",
             "--precision", "fp32", "--device", "cpu", "--workers", "0", "--log-every", "1"]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    group = {**environment, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    runs = [subprocess.Popen([*words, "--output", str(tmp_path / "two")], env={**group, "RANK": r, "LOCAL_RANK": r},
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for r in "01"]
    runs.append(subprocess.Popen([*words, "--output", str(tmp_path / "one")], env=environment, stdout=subprocess.PIPE,
                                 stderr=subprocess.STDOUT))
    for run in runs:
        said = run.communicate(timeout=300)[0].decode()
        assert run.returncode == 0, said
    two, one = (torch.load(next((tmp_path / name).glob("*/*/weights.pt")), weights_only=True)["model"]
                for name in ("two", "one"))
    for name, value in one.items():
        tolerance = 1e-4 if name.endswith("qkv.bias") else 2e-6  # biases of keys: gradients of nothing but rounding
        torch.testing.assert_close(two[name], value, rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}")


# Files

def test_files_give_the_teacher(tmp_path):
    """Ours and the official training checkpoint; ours comes back as a model too."""
    torch.manual_seed(0)
    model, images = DINO("vit_demo", **TINY).eval(), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        for parameter in model.student.parameters():
            parameter.mul_(2.0)
    features = model.teacher["backbone"](images)
    state = model.state_dict()
    torch.save({"model": state, "config": model.config}, tmp_path / "ours.pt")
    torch.testing.assert_close(load_model(tmp_path / "ours.pt").eval()(images), features)
    official = {"student": {f"module.{n}": v for n, v in model.student.state_dict().items()},
                "teacher": model.teacher.state_dict(), "epoch": 3, "args": None}
    torch.save(official, tmp_path / "official.pth")
    weights = read_weights(tmp_path / "official.pth")
    assert weights.layout == "DINO: the teacher" and {n.split(".")[0] for n in weights.left_out} == {"head"}
    vit = build_vit("vit_demo", img_size=16, patch_size=4, num_heads=4, num_classes=0, global_pool="token").eval()
    load_encoder(vit, weights)
    torch.testing.assert_close(vit(images), features)


def test_impossible_settings_are_refused(tmp_path):
    for changes, message in ((dict(local_min=0.5), "must be smaller"), (dict(in_chans=4), "need 1 or 3")):
        args = settings_of(pretrain_dino, changes)
        with pytest.raises(UserError, match=message):
            pretrain_dino.crops_of(args)


def test_the_paper_preset():
    settings = vars(settings_of(pretrain_dino, {"preset": "paper"}))
    expected = dict(model="vit_tiny", num_heads=12, img_size=[224], local_size=96, local_crops=8, out_dim=65536,
                    base_lr=5e-4, min_lr=1e-6, warmup_epochs=10, weight_decay=0.04, weight_decay_end=0.4, clip_each=3.0,
                    clip_grad=0, freeze_last_layer=1, teacher_temp=0.04, teacher_temp_epochs=0, momentum=0.996,
                    drop_path=0.1, global_min=0.4, local_min=0.05)
    assert {name: settings[name] for name in expected} == expected
