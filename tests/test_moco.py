"""sec3_benchmark/moco.py and pretrain_mocov3.py against reference values, hand-written steps and PyTorch's own batch
norm; two ranks and several micro-batches against one process that has the whole batch. Models of two narrow blocks.
"""
import copy
import json
import math
import os
import random
import signal
import socket
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter, ImageOps
from torch import multiprocessing, nn
from torchvision.transforms import ColorJitter
from torchvision.transforms import functional as TF

from common import distributed, report
from common.errors import UserError
from common.filling import load_encoder
from common.images import ImageSet
from common.loader import Views, seed_everything, to_device
from common.mae import sincos_positions
from common.optim import learning_rate
from common.pretrained import FormatError, read_weights
from common.rebuilding import load_model
from common.training import Engine
from common.vit import SIZES, build_vit
from sec3_benchmark import finetune, pretrain_mocov3, subsets, table1_pretraining_methods
from sec3_benchmark.moco import (
    GlobalBatchNorm,
    MoCo,
    class_tokens,
    contrastive_loss,
    half_cosine,
    mlp,
    moco_positions,
    symmetric_loss,
    view_transform,
)
from sec3_benchmark.pretrain_mocov3 import MoCoMethod, MoCoViews, decay_everything
from tests.helpers import assert_close, crop_by_hand, golden, settings_of, tensor

CPU = torch.device("cpu")
TINY = {"embed_dim": 16, "depth": 2}
MODEL = dict(model="vit_demo", img_size=8, patch_size=4, num_heads=2, mlp_dim=24, out_dim=12)
IMAGES, BATCH, PER_EPOCH, EPOCHS = 35, 16, 2, 3
T = 0.2
# A key's bias and a shift before batch norm do not change the loss. Their gradients are rounding errors, which AdamW
# turns into steps of normal size, and the running mean follows the shift. So comparisons leave them out.
WITHOUT_EFFECT = ("qkv.bias", "encoder.norm.bias", "encoder.head.1.running_mean")


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch):
    monkeypatch.setitem(SIZES, "vit_demo", TINY)
    monkeypatch.setattr(report, "draw_curve", lambda *paths: None)


def tiny_moco(**settings):
    torch.manual_seed(0)
    return MoCo(**{**MODEL, **settings})


# Loss and schedule

def test_loss_and_momentum_are_the_public_codes():
    values = golden("mocov3")
    q1, q2, k1, k2 = (torch.from_numpy(values[name]) for name in ("q1", "q2", "k1", "k2"))
    assert_close(symmetric_loss(q1, q2, k1, k2, float(values["temperature"])), values["loss"], 1e-5)
    total, start = int(values["total_steps"]), float(values["momentum0"])
    assert_close([half_cosine(step, total, start) for step in values["step"].tolist()], values["momentum"], 1e-7)


def test_loss_by_a_loop_over_queries():
    q, k = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64).unbind()
    expected = 0.0
    for i in range(5):
        cosines = [float(q[i] @ k[j] / q[i].norm() / k[j].norm()) / T for j in range(5)]
        expected += 2 * T / 5 * (math.log(sum(map(math.exp, cosines))) - cosines[i])
    assert contrastive_loss(q.float(), k.float(), T).item() == pytest.approx(expected, rel=1e-5)


# The model

def test_tinys_heads_have_the_papers_sizes():
    with torch.device("meta"):
        projector, predictor = mlp(192, 4096, 4096, 256), mlp(256, 4096, 256)
    assert [sum(p.numel() for p in head.parameters()) for head in (projector, predictor)] == [18_628_608, 2_105_344]


def test_names_are_the_public_ones():
    """As in moco-v3's builder: three linear layers without bias, batch norms, the last without scale and shift."""
    counts = ("running_mean", "running_var", "num_batches_tracked")
    norm = [f"1.{name}" for name in ("weight", "bias", *counts)]
    projector = ["0.weight", *norm, "3.weight", *(f"4{name[1:]}" for name in norm), "6.weight",
                 *(f"7.{name}" for name in counts)]
    predictor = ["0.weight", *norm, "3.weight", *(f"4.{name}" for name in counts)]
    vit = [name for name in build_vit("vit_demo", img_size=8, patch_size=4, num_heads=2, num_classes=0,
                                      global_pool="token").state_dict()]
    encoder = [*vit, *(f"head.{name}" for name in projector)]
    assert list(tiny_moco().state_dict()) == [*(f"base_encoder.{name}" for name in encoder),
                                              *(f"momentum_encoder.{name}" for name in encoder),
                                              *(f"predictor.{name}" for name in predictor)]


def test_initial_values():
    """As in the paper: q, k, v separately (bound sqrt(6 / 384) at width 192), biases 0, heads by PyTorch's default."""
    SIZES["vit_demo"] = {"embed_dim": 192, "depth": 1}
    torch.manual_seed(0)
    moco = MoCo("vit_demo", img_size=32, mlp_dim=64, out_dim=32)
    base = moco.base_encoder
    bounds = {"blocks.0.attn.qkv": 0.125, "blocks.0.attn.proj": 0.125, "blocks.0.mlp.fc1": 0.0791,
              "patch_embed.proj": 0.0791, "head.0": 1 / math.sqrt(192), "head.3": 1 / 8}
    for name, bound in bounds.items():
        module = base.get_submodule(name)
        assert module.weight.abs().max().item() == pytest.approx(bound, rel=0.01), name
        assert module.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03), name
        assert module.bias is None or not module.bias.any()
    assert 0 < base.cls_token.abs().max() < 1e-5
    assert not base.pos_embed[0, 0].any() and torch.equal(base.pos_embed[0, 1:], moco_positions(192, (2, 2)))
    for name, value in moco.momentum_encoder.state_dict().items():
        assert torch.equal(value, base.state_dict()[name])


def test_positions_are_maes_with_the_grid_transposed():
    grid, dim = (3, 5), 16
    transposed = sincos_positions(dim, grid[::-1]).view(5, 3, dim).transpose(0, 1).reshape(15, dim)
    assert_close(moco_positions(dim, grid), transposed, 1e-7)
    for row, column in ((0, 4), (2, 1)):  # the public code's order: sines, cosines of the row, then of the column
        omega = [10000 ** (-k / 4) for k in range(4)]
        expected = [f(p * w) for p in (row, column) for f in (math.sin, math.cos) for w in omega]
        assert_close(moco_positions(dim, grid)[row * 5 + column], expected, 1e-6)


def test_what_is_trained():
    moco = tiny_moco()
    trained = {name for name, p in moco.named_parameters() if p.requires_grad}
    assert not any("momentum_encoder" in name or "pos_embed" in name for name in trained)
    assert {name for name, _ in moco.named_parameters() if name.startswith(("base", "pred"))} - trained == \
        {"base_encoder.pos_embed"}
    frozen = {name for name, p in tiny_moco(stop_grad_conv1=True).named_parameters() if p.requires_grad}
    assert trained - frozen == {"base_encoder.patch_embed.proj.weight", "base_encoder.patch_embed.proj.bias"}
    [group] = decay_everything(moco, 0.1)
    assert set(group["names"]) == trained and group["weight_decay"] == 0.1 and len(group["params"]) == len(trained)


# Views

def by_hand(image, size, blur, solarize):
    """Compute a view in the authors' order: crop, jitter, blur, grey, flip, solarise.

    Crop, blur and flip use Python's generator, the others torch's.
    """
    image, done = crop_by_hand(image, size, (0.08, 1), "bilinear"), []
    if torch.rand(1) <= 0.8:
        image = ColorJitter(0.4, 0.4, 0.2, 0.1)(image)
        done.append("jitter")
    if random.random() < blur:
        image = image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))
        done.append("blur")
    if torch.rand(1) < 0.2:
        image = TF.to_grayscale(image, num_output_channels=3)
        done.append("grey")
    if random.random() < 0.5:
        image = ImageOps.mirror(image)
        done.append("flip")
    if torch.rand(1) < solarize:
        image = ImageOps.solarize(image)
        done.append("solarize")
    return tensor(image), done


@pytest.mark.parametrize(("name", "blur", "solarize"), [("view1", 1.0, 0.0), ("view2", 0.1, 0.2)])
def test_a_view_is_made_in_the_authors_order(name, blur, solarize):
    args = settings_of(pretrain_mocov3, presets={}, given={"img_size": [24]})
    view, counts = getattr(MoCoViews(args), name), {}
    for seed in range(200):
        pixels = np.random.RandomState(seed).randint(0, 256, (10, 12, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((50, 60))
        seed_everything("test", seed)
        ours = view(tensor(image))
        seed_everything("test", seed)
        expected, done = by_hand(image, 24, blur, solarize)
        assert torch.equal(ours, expected), (seed, done)
        for step in done:
            counts[step] = counts.get(step, 0) + 1
    shares = {"jitter": 0.8, "blur": blur, "grey": 0.2, "flip": 0.5, "solarize": solarize}
    assert {step: counts.get(step, 0) / 200 for step in shares} == pytest.approx(shares, abs=0.1)


def test_the_loader_takes_two_views_of_an_image():
    args = SimpleNamespace(img_size=[8], in_chans=3, crop_min=0.5, blur_sigma=1.0)
    views = Views(toy_images(), MoCoViews(args), seed=0)
    batch = torch.utils.data.default_collate([views[0, i] for i in range(3)])
    assert batch["view1"].dtype == batch["view2"].dtype == torch.uint8 and "image" not in batch
    assert not torch.equal(batch["view1"], batch["view2"])
    mean, std = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0])
    raw = {name: batch[name].double() for name in ("view1", "view2")}
    moved = to_device(batch, CPU, mean, std)
    for name, value in raw.items():
        assert_close(moved[name], (value - mean.view(3, 1, 1)) / std.view(3, 1, 1), 1e-6)
    grey = view_transform(8, blur=1.0, solarize=1.0)(torch.zeros(1, 9, 9, dtype=torch.uint8))
    assert grey.shape == (1, 8, 8)
    with pytest.raises(UserError, match="--in-chans 4: .* 1 or 3"):
        MoCoViews(SimpleNamespace(img_size=[8], in_chans=4, crop_min=0.5, blur_sigma=1.0))


# One step

def batch_of(size, seed=0):
    images = torch.randn(2, size, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return {"view1": images[0], "view2": images[1]}


def pieces(batch, count):
    return [dict(zip(batch, parts)) for parts in zip(*(value.chunk(count) for value in batch.values()))]


def one_step(moco, batches, step=0, dtype=None, scale=None):
    """Run a step and return its loss; the gradients are left in the model."""
    args = SimpleNamespace(temperature=T, momentum=0.5, seed=0, batch_size=len(batches), micro_batch=1,
                           precision="fp32")
    method = MoCoMethod(moco, args, total_steps=10)
    method.prepare(CPU, dtype, compiled=False)
    engine = Engine(args, CPU, SimpleNamespace(add=lambda **values: None))
    engine.dtype, engine.batches = dtype, iter(batches)
    engine.scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    return method.accumulate(step, engine)


def apart(moco):
    """Perturb all parameters, as training would: encoders then differ, and norms are not at their initial values."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in moco.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return moco


def step_by_hand(moco, batch, step=0):
    """Compute the same from the paper's formulas with plain modules: update, queries, keys, loss, backward."""
    m = 1 - 0.5 * (1 + math.cos(math.pi * step / 10)) * (1 - 0.5)
    with torch.no_grad():
        for name, parameter in moco.momentum_encoder.named_parameters():
            parameter.copy_(m * parameter + (1 - m) * moco.base_encoder.get_parameter(name))
        k1, k2 = moco.momentum_encoder(batch["view1"]), moco.momentum_encoder(batch["view2"])
    q1, q2 = (moco.predictor(moco.base_encoder(batch[view])) for view in ("view1", "view2"))
    loss = 0.0
    for q, k in ((q1, k2), (q2, k1)):
        logits = F.cosine_similarity(q.unsqueeze(1), k.unsqueeze(0), dim=2) / T
        loss = loss - 2 * T * logits.log_softmax(dim=1).diagonal().mean()
    loss.backward()
    return loss.detach()


def gradients(moco):
    return {name: p.grad for name, p in moco.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("micro_batches", [1, 2, 3])
def test_a_step_is_that_of_the_formulas_in_one_piece_or_several(micro_batches):
    """Compared are gradients, loss, running statistics, and the momentum encoder, which is updated before the keys."""
    ours, batch = apart(tiny_moco()), batch_of(12)
    theirs, before = copy.deepcopy(ours), copy.deepcopy(ours)
    loss = one_step(ours, pieces(batch, micro_batches), step=3)
    assert_close(loss, step_by_hand(theirs, batch, step=3), 1e-5)
    for name, gradient in gradients(theirs).items():
        if not name.endswith(WITHOUT_EFFECT):
            assert_close(gradients(ours)[name], gradient, 1e-4)
    for name, value in theirs.state_dict().items():  # running statistics, all of them, and momentum encoder
        assert_close(ours.state_dict()[name], value, 1e-5)
    assert all(p.grad is None and not p.requires_grad for p in ours.momentum_encoder.parameters())

    late = copy.deepcopy(before)  # without the update the keys, and so the loss, would differ
    late.update_momentum_encoder = lambda m: None
    assert abs(one_step(late, [batch], step=3) - loss) > 1e-4


def test_micro_batches_under_autocast_and_a_loss_scale():
    """Weights cast for the pass without gradient must not be used in the pass with one."""
    batch, whole = batch_of(12), apart(tiny_moco())
    parts, scaled = copy.deepcopy(whole), copy.deepcopy(whole)
    one_step(whole, [batch], dtype=torch.bfloat16)
    one_step(parts, pieces(batch, 3), dtype=torch.bfloat16)
    one_step(scaled, pieces(batch, 3), dtype=torch.bfloat16, scale=1024.0)
    for name, gradient in gradients(whole).items():
        if not name.endswith(WITHOUT_EFFECT):
            assert gradient.any() and gradient.dtype == torch.float32
            assert_close(gradients(parts)[name], gradient, 0.05)
            assert_close(gradients(scaled)[name] / 1024, gradients(parts)[name], 1e-6)


def test_frozen_patch_embedding_gets_no_gradient():
    moco = apart(tiny_moco(stop_grad_conv1=True))
    one_step(moco, pieces(batch_of(12), 2))
    assert moco.base_encoder.patch_embed.proj.weight.grad is None
    assert moco.base_encoder.cls_token.grad.any()


# Whole runs, in one process and in two

def toy_images():
    pixels = np.random.RandomState(0).randint(0, 256, (IMAGES, 10, 10, 3), dtype=np.uint8)
    return ImageSet("toy", pixels, None, [])


def train_here(output, **explicit):
    """Run pretrain_mocov3.main on 35 images of noise, two steps an epoch; return its result."""
    SIZES["vit_demo"] = TINY
    subsets.pretraining_images = lambda args: (args, toy_images())
    row = {**MODEL, "preset": "demo", "img_size": [8], "batch_size": BATCH, "epochs": EPOCHS, "warmup_epochs": 1,
           "base_lr": 0.016, "momentum": 0.9, "device": "cpu", "precision": "fp32", "workers": 0, "log_every": 1,
           "output": str(output)}
    args = settings_of(pretrain_mocov3, {**row, **explicit}, {})
    return pretrain_mocov3.main(args)


@pytest.fixture
def trained(tmp_path, monkeypatch):
    monkeypatch.setattr(subsets, "pretraining_images", subsets.pretraining_images)  # put back at the end
    return lambda name="whole", **explicit: train_here(tmp_path / name, **explicit)


def weights(result):
    return torch.load(result["checkpoint"], weights_only=True)["model"]


def norm_step():
    """Return a batch norm, rows of large mean, and weights of these rows in a loss."""
    generator = torch.Generator().manual_seed(0)
    x, weigh = 3 + 2 * torch.randn(2, 12, 5, generator=generator)
    norm = GlobalBatchNorm(5)
    nn.init.normal_(norm.weight, generator=generator)
    return norm, x, weigh


def on_one_of_two(rank, port, folder):
    """Run one of two gloo ranks; leave its results in a file."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    report.draw_curve = lambda *paths: None
    distributed.start_process_group("cpu")
    norm, x, weigh = norm_step()
    mine = slice(6 * rank, 6 * rank + 6)
    x = x[mine].requires_grad_()
    y = norm(x)
    (y * weigh[mine]).sum().backward()
    found = {"y": y.detach(), "x": x.grad, **norm.state_dict(),
             "weight gradient": norm.weight.grad, "bias gradient": norm.bias.grad}
    values = {name: torch.from_numpy(value) for name, value in golden("mocov3").items() if value.ndim == 2}
    q1, q2, k1, k2 = (values[name][3 * rank:3 * rank + 3] for name in ("q1", "q2", "k1", "k2"))
    found["loss"] = symmetric_loss(q1, q2, k1, k2, T)
    for name, micro_batch in (("two ranks", 8), ("two ranks, accumulated", 4)):
        train_here(Path(folder) / name, micro_batch=micro_batch)
    torch.save(found, Path(folder) / f"found-{rank}.pt")
    distributed.stop_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Return the folder with the two runs, and both ranks' values."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    multiprocessing.spawn(on_one_of_two, (port, str(folder)), nprocs=2)
    return folder, [torch.load(folder / f"found-{rank}.pt", weights_only=True) for rank in range(2)]


def test_batch_norm_over_ranks_is_batch_norm_of_the_whole_batch(two_ranks):
    _, found = two_ranks
    norm, x, weigh = norm_step()
    plain = nn.BatchNorm1d(5)
    plain.load_state_dict(norm.state_dict())
    x.requires_grad_()
    y = plain(x)
    (y * weigh).sum().backward()
    assert_close(torch.cat([ours["y"] for ours in found]), y, 1e-5)
    assert_close(torch.cat([ours["x"] for ours in found]), x.grad, 1e-4)
    for name in ("weight", "bias"):  # each rank has the part of its rows
        assert_close(sum(ours[f"{name} gradient"] for ours in found), plain.get_parameter(name).grad, 1e-4)
    for name, value in plain.state_dict().items():
        for ours in found:
            assert_close(ours[name], value, 1e-5)


def test_keys_of_both_ranks_count_and_labels_follow_the_rank(two_ranks):
    _, found = two_ranks
    assert_close(sum(ours["loss"] for ours in found) / 2, golden("mocov3")["loss"], 1e-5)


def assert_nearly_the_same(ours, theirs):
    """Compare encoders, heads and running statistics up to the order of float32 sums; weights moved by about 1e-3."""
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        if not name.endswith(WITHOUT_EFFECT):
            torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("name", ["two ranks", "two ranks, accumulated"])
def test_two_ranks_equal_one_process(two_ranks, trained, name):
    [path] = (two_ranks[0] / name).glob("*/*/weights.pt")
    assert_nearly_the_same(torch.load(path, weights_only=True)["model"], weights(trained()))


def test_micro_batches_equal_the_whole_batch_over_a_run(trained):
    assert_nearly_the_same(weights(trained("parts", micro_batch=4)), weights(trained()))


def log_of(result):
    rows = [json.loads(line) for line in (Path(result["run"]) / "log.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in ("step", "lr", "loss", "grad_norm")} for row in rows]


def test_the_schedules_reach_the_loop(trained):
    result = trained(micro_batch=8)
    rows = log_of(result)
    assert [row["lr"] for row in rows] == pytest.approx([learning_rate(
        step, peak=1e-3, total_steps=6, warmup_steps=2, warmup_lr=1e-6) for step in range(6)])
    assert rows[0]["lr"] == 1e-6
    assert 0 < rows[0]["loss"] < 2 * 4 * T * math.log(BATCH)  # once, not once a micro-batch


def test_stopped_within_an_epoch_it_ends_in_the_same_bits(trained, monkeypatch):
    whole = trained(micro_batch=8)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(MoCoMethod, "after_step",
                      lambda self, step: step + 1 == 3 and os.kill(os.getpid(), signal.SIGTERM))
        trained("parts", micro_batch=8)
    assert stopped.value.code == 75
    parts = trained("parts", micro_batch=8)
    for name, value in weights(whole).items():
        assert torch.equal(weights(parts)[name], value), name
    assert log_of(parts) == log_of(whole)
    momentum, base = (weights(whole)[f"{part}_encoder.blocks.0.mlp.fc1.weight"] for part in ("momentum", "base"))
    assert not torch.equal(momentum, base)


# What others read

def public_file(path, moco):
    """Save the model as moco-v3 and mae-lite do after distributed training."""
    state = {f"module.{name}": value for name, value in moco.state_dict().items()}
    torch.save({"epoch": 300, "arch": "vit_tiny", "state_dict": state, "optimizer": {"state": {}}, "scaler": {}}, path)
    return path


def own_file(path, moco):
    torch.save({"model": moco.state_dict(), "config": moco.config}, path)
    return path


@pytest.mark.parametrize("write", [public_file, own_file])
def test_the_base_encoder_is_read_and_the_rest_is_left_out(tmp_path, write):
    moco = apart(tiny_moco())
    read = read_weights(write(tmp_path / "moco.pt", moco))
    expected = build_vit("vit_demo", img_size=8, patch_size=4, num_heads=2, num_classes=0, global_pool="token")
    assert set(read.state) == set(expected.state_dict())
    for name, value in read.state.items():
        assert torch.equal(value, moco.base_encoder.state_dict()[name])
    assert len(read.state) + len(read.left_out) == len(moco.state_dict())
    projector = [name for name in read.left_out if name.startswith("base_encoder.head.")]
    assert len(projector) == len(moco.base_encoder.head.state_dict())

    classifier = build_vit("vit_demo", img_size=8, patch_size=4, num_heads=2, num_classes=12)
    said = str(load_encoder(classifier, read))
    assert torch.equal(classifier.blocks[1].mlp.fc1.weight, moco.base_encoder.blocks[1].mlp.fc1.weight)
    assert "fresh fc_norm (2), head (2)" in said and "momentum_encoder" in said
    if write is own_file:
        with pytest.raises(FormatError, match="has 2 heads and the model 4"):
            load_encoder(build_vit("vit_demo", img_size=8, patch_size=4, num_heads=4), read)


def test_the_encoder_is_rebuilt_as_it_was_trained(tmp_path):
    """The analyses need token pooling with the trained norm, and no classes."""
    moco = apart(tiny_moco()).eval()
    images = batch_of(4)["view1"]
    for model in (load_model(own_file(tmp_path / "own.pt", moco)),
                  load_model(public_file(tmp_path / "public.pt", moco), num_heads=2)):
        assert_close(model.eval()(images), class_tokens(moco.base_encoder, images), 1e-6)


def test_finetuning_reads_a_finished_run(trained):
    result = trained()
    args = settings_of(finetune, presets={}, given={
        "preset": "paper", "model": "vit_demo", "img_size": [8], "patch_size": 4, "num_heads": 2})
    vit = finetune.build_classifier(args, 5, read_weights(result["checkpoint"]))
    state = weights(result)
    assert torch.equal(vit.blocks[0].attn.qkv.weight, state["base_encoder.blocks.0.attn.qkv.weight"])
    assert torch.equal(vit.pos_embed, state["base_encoder.pos_embed"]) and vit.pos_embed.requires_grad


def test_table1_pretrains_and_fine_tunes_it_as_the_authors_did(capsys):
    argv = ["--data-path", "imagenet", "--rows", "mocov3", "--dry-run"]
    table1_pretraining_methods.main(table1_pretraining_methods.tables.parse(
        table1_pretraining_methods.build_parser(), argv))
    first, second = [line for line in capsys.readouterr().out.splitlines() if line.startswith("python")]
    assert "pretrain_mocov3.py" in first and "--layer-decay 0.75" in second
    assert first.split("--save-to ")[1].split()[0] == second.split("--init ")[1].split()[0]
