"""Test D2-MAE: loss and gradients against a straightforward version, its files as those of an MAE, its runs."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from straightforward_dmae import with_explicit_attention
from straightforward_mae import StraightforwardMAE

from common import mae as mae_module
from common import options
from common.errors import UserError
from common.filling import load_encoder
from common.mae import MAE
from common.pretrained import FormatError, read_weights
from common.rebuilding import load_model
from common.vit import SIZES, build_vit
from sec5_distill import pretrain_dmae
from sec5_distill.decoupled import DecoupledMAE
from sec5_distill.distillation import DMAE, visible_ids
from sec5_distill.teachers import Teacher
from tests.helpers import assert_close, assert_same, settings_of, stage

VIEW = dict(img_size=32, patch_size=8)  # 16 patches, 4 of them visible
SMALL = dict(embed_dim=24, depth=4, num_heads=4, decoder_embed_dim=12, decoder_num_heads=3)
EARLY, LATE = ("blocks.0.", "blocks.1."), ("blocks.2.", "blocks.3.", "blocks.4.")  # before and behind the decoder's


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Register `small` as the name of a model of four blocks."""
    monkeypatch.setitem(SIZES, "small", {"embed_dim": 24, "depth": 4})
    monkeypatch.setitem(mae_module.DECODERS, "small", (12, 1, 3))


def student(seed=0):
    torch.manual_seed(seed)
    return DecoupledMAE("small", num_heads=4, decoder_block=2, **VIEW)


def with_teacher():
    """Build a D2-MAE and the targets of a batch, from a teacher whose attention is far from uniform."""
    torch.manual_seed(1)
    encoder = MAE("vit_demo", num_heads=6, **VIEW)
    for block in encoder.blocks:
        block.attn.qkv.weight.data *= 4
    dmae = DMAE(student(), teacher := Teacher(encoder, (12,)), (5,))
    images, noise = torch.randn(3, 3, 32, 32), torch.rand(3, 16)
    return dmae, images, noise, teacher(images, visible_ids(dmae.model, noise))


def gradients(dmae, loss):
    """Return {name: gradient} of the student's trained parameters; None where the loss does not depend on one."""
    named = {name: p for name, p in dmae.model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, named.values(), allow_unused=True, retain_graph=True)))


# The method

def test_each_part_learns_from_the_losses_of_the_figure():
    """Blocks 1 to 8 (here 2) learn from both, later ones and the half block from the attention, norm from MAE's."""
    dmae, images, noise, target = with_teacher()
    _, parts = dmae(images, noise, *target)
    by_loss = {loss: {name for name, gradient in gradients(dmae, parts[loss]).items()
                      if gradient is not None and gradient.abs().max() > 0} for loss in ("mae", "attention")}
    trained = set(gradients(dmae, parts["mae"]))
    shared = {name for name in trained if name.startswith((*EARLY, "patch_embed", "cls_token"))}
    late = {name for name in trained if name.startswith(LATE)}
    assert by_loss["attention"] == (shared | late) and by_loss["mae"] == trained - late
    assert {"norm.weight", "norm.bias", "decoder_pred.weight"} <= by_loss["mae"]
    assert {name for name in trained if name.startswith("blocks.4.")} == {
        f"blocks.4.{part}.{kind}" for part in ("norm1", "attn.qkv") for kind in ("weight", "bias")}


def test_it_equals_the_straightforward_version():
    """Loss and gradients agree with four whole blocks, a decoder on the second one's output, and logits by hand."""
    dmae, images, noise, target = with_teacher()
    slow, half = with_explicit_attention(StraightforwardMAE(**VIEW, **SMALL)), dmae.model.blocks[-1]
    slow.load_state_dict({k: v for k, v in dmae.model.state_dict().items() if not k.startswith("blocks.4.")})
    outputs = []
    for block in slow.blocks:
        block.register_forward_hook(lambda module, args, out: outputs.append(out))
    _, mask, ids_restore = slow.encode(images, noise, 0.75)
    reconstruction = slow.reconstruction_loss(images, slow.decode(slow.norm(outputs[1]), ids_restore), mask)
    x = F.layer_norm(outputs[3], (24,), half.norm1.weight, half.norm1.bias, 1e-6)
    q, k = (x @ half.attn.qkv.weight.T + half.attn.qkv.bias).view(3, 5, 2, 4, 6).permute(2, 0, 3, 1, 4)
    mapped = torch.einsum("ts,bsqk->btqk", dmae.attn_adapter["adapter4"].weight.flatten(1), q @ k.mT / math.sqrt(6))
    attention = (mapped - target[0][0]).square().mean()
    loss, parts = dmae(images, noise, *target)
    assert parts["attention"] > 0.1 and parts["mae"] > 0.1
    assert_close(parts["mae"], reconstruction, 1e-6)
    assert_close(parts["attention"], attention, 1e-5)
    loss.backward()
    (reconstruction + attention).backward()
    for name, parameter in slow.named_parameters():
        if parameter.requires_grad:
            assert_close(dmae.model.get_parameter(name).grad, parameter.grad, 1e-4)


def test_it_starts_as_the_mae_of_its_seed_with_rows_of_a_whole_qkv():
    torch.manual_seed(0)
    plain, ours = MAE("small", num_heads=4, **VIEW).state_dict(), student().state_dict()
    assert_same({name: ours[name] for name in plain}, dict(plain))
    rows = ours["blocks.4.attn.qkv.weight"]
    assert rows.shape == (48, 24) and 0.95 < rows.abs().max() / math.sqrt(6 / (24 + 72)) <= 1  # Xavier's bound


# Its files

def ours(path):
    dmae, *_ = with_teacher()
    torch.save({"model": dmae.state_dict(), "config": dmae.config}, path)
    return dmae


def authors(path):
    """Save a file in the authors' layout: DDP's prefix, a whole qkv in the half block, the teacher's weights too."""
    dmae, *_ = with_teacher()
    state = dmae.state_dict()
    for kind in ("weight", "bias"):
        rows = state[name := f"model.blocks.4.attn.qkv.{kind}"]
        state[name] = torch.cat([rows, rows[:24]])
    state["tch_model.blocks.0.norm1.weight"] = torch.ones(8)
    torch.save({"start_epoch": 400, "model": {f"module.{name}": value for name, value in state.items()}}, path)
    return dmae


@pytest.mark.parametrize("save", [ours, authors])
def test_its_file_is_read_as_an_encoder_of_the_whole_blocks(save, tmp_path):
    model = save(path := tmp_path / "d2mae.pt").model
    vit, plain = build_vit("small", num_heads=4, num_classes=3, **VIEW), student().state_dict()
    report = load_encoder(vit, read_weights(path))
    assert {name for name in report.left_out if "blocks.4." in name} == {
        f"model.blocks.4.{part}.{kind}" for part in ("norm1", "attn.qkv") for kind in ("weight", "bias")}
    blocks = {name: value for name, value in vit.state_dict().items() if name.startswith("blocks.")}
    assert_same(blocks, {name: model.state_dict()[name] for name in blocks})
    assert len({name for name in plain if name.startswith("blocks.")}) == len(blocks) + 4


@pytest.mark.parametrize("save", [ours, authors])
def test_loaded_as_an_mae_its_decoder_reads_the_same_block(save, tmp_path):
    """An analysis runs all whole blocks, a reconstruction those before the decoder."""
    model = save(path := tmp_path / "d2mae.pt").model
    given = {} if save is ours else dict(num_heads=4, decoder_block=2)  # else 12 and 8 are assumed
    loaded = load_model(path, **given)
    assert type(loaded) is MAE and len(loaded.blocks) == 4 and loaded.decoder_block == 2
    images, noise, states = torch.randn(2, 3, 32, 32), torch.rand(2, 16), []
    assert_close(loaded(images, noise), model(images, noise, states), 1e-6)
    ids = visible_ids(model, noise)
    visible = mae_module.take(model.patchify(images), ids)
    assert_close(loaded.forward_encoder(visible, ids), model.norm(states[4]), 1e-6)
    assert_close(loaded.forward_encoder(visible, ids, last=2), model.norm(states[2]), 1e-6)
    assert save is ours or load_model(path, num_heads=4).decoder_block == 8


@pytest.mark.parametrize("lost", ["blocks.3.mlp.", "blocks.3.attn.proj.", "blocks.4.norm1."])
def test_a_damaged_block_is_not_taken_for_the_half_one(lost, tmp_path):
    state = {k: v for k, v in with_teacher()[0].state_dict().items() if not k.startswith(f"model.{lost}")}
    torch.save({"model": state, "config": student().config}, tmp_path / "a.pt")
    with pytest.raises(FormatError, match="missing [1-9]|unexpected [1-9]"):
        load_encoder(build_vit("small", num_heads=4, **VIEW), read_weights(tmp_path / "a.pt"))


# Its runs

@pytest.mark.parametrize("preset", options.PRESET_NAMES)
@pytest.mark.parametrize("depth", [12, 24])
def test_in_every_preset_the_teachers_last_block_goes_with_the_half_one(preset, depth):
    args = options.resolve(settings_of(pretrain_dmae, {"preset": preset, "decoupled": 8}))
    args = pretrain_dmae.with_pairs(args, depth)
    assert (args.distill_blocks, args.teacher_blocks) == ([13], [depth])
    assert (args.hidden_layers, args.teacher_hidden_layers) == ([], [])


@pytest.mark.parametrize(("settings", "message"), [
    ({"distill_blocks": [4, 12]}, "--decoupled distils the attention of block 13"),
    ({"hidden_layers": [12]}, "leave --distill-blocks and --hidden-layers out"),
    ({"teacher_blocks": [13]}, "--teacher-blocks 13: the teacher has 1 to 12"),
    ({"decoupled": 13}, "--decoupled 13: the student has 1 to 12")])
def test_what_cannot_be_decoupled_is_refused(settings, message):
    args = options.resolve(settings_of(pretrain_dmae, {"preset": "demo", "decoupled": 8, **settings}))
    with pytest.raises(UserError, match=message):
        pretrain_dmae.with_pairs(args, 12)


def test_a_run_from_the_command_line_to_the_next_stage(tmp_path):
    """The weights name the decoder's block and can be fine-tuned; D-MAE with the same settings is another run."""
    rng = np.random.RandomState(0)
    for split in ("train", "val"):
        for i in range(8):
            (folder := tmp_path / split / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.randint(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    torch.manual_seed(0)
    encoder = MAE("vit_demo", **VIEW)
    torch.save({"model": encoder.state_dict(), "config": encoder.config}, tmp_path / "teacher.pt")
    images = dict(preset="demo", data="folder", data_path=str(tmp_path), batch_size=4, warmup_epochs=0, device="cpu",
                  precision="fp32", workers=0, output=str(tmp_path))
    settings = {**images, "img_size": [32], "patch_size": 8, "epochs": 1, "teacher": str(tmp_path / "teacher.pt")}
    first, other = (stage("sec5_distill/pretrain_dmae.py", {**settings, **more}) for more in ({"decoupled": 8}, {}))
    assert first["run"] != other["run"]
    saved = torch.load(first["checkpoint"], weights_only=True)
    assert saved["config"]["decoder_block"] == 8 and "decoder_block" not in torch.load(
        other["checkpoint"], weights_only=True)["config"]
    assert saved["model"]["attn_adapter.adapter12.weight"].shape == (12, 12, 1, 1)
    tuned = stage("sec3_benchmark/finetune.py", {**images, "init": first["checkpoint"], "epochs": 1})
    assert 0 <= tuned["top1"] <= 100
