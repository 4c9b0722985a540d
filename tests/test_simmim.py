"""appendix/simmim.py and pretrain_simmim.py: loss, mask, forward, initial values, schedule, layout, exact resume."""
import math
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from appendix import pretrain_simmim
from appendix.simmim import SimMIM, masked_l1, random_mask
from common.errors import UserError
from common.filling import load_encoder
from common.optim import parameter_groups
from common.pretrained import read_weights
from common.rebuilding import load_model
from common.vit import SIZES, build_model
from tests.helpers import (
    assert_close,
    assert_resumes_exactly,
    brute_force_bias,
    golden,
    noisy,
    parameter_count,
    settings_of,
    tiny_run,
)

SMALL = dict(img_size=(16, 8), patch_size=4, num_heads=4, drop_path=0.0)  # 4 x 2 patches


def test_golden_loss():
    values = golden("simmim")
    images, reconstruction = (torch.tensor(values[name]) for name in ("images", "reconstruction"))
    mask = torch.tensor(values["patch_mask"]).bool()
    assert_close(masked_l1(images, reconstruction, mask, int(values["patch_size"])), values["loss"], 1e-5)


def test_30_of_49_units_are_hidden():
    torch.manual_seed(0)
    masks = torch.stack([random_mask((14, 14)) for _ in range(200)])
    assert (masks.sum(dim=(1, 2)) == 120).all()  # of 196 patches
    units = masks.view(200, 7, 2, 7, 2).float().mean(dim=(2, 4))
    assert set(units.unique().tolist()) == {0.0, 1.0}  # whole units
    assert units.mean(dim=0).sub(30 / 49).abs().max() < 0.15  # anywhere in the image
    assert [int(random_mask((n, n), 1).sum()) for n in (1, 2, 3, 5, 6)] == [1, 3, 6, 15, 22]  # rounded up


def test_units_that_do_not_tile_the_patches_are_refused():
    with pytest.raises(UserError, match="units of 2 x 2 patches do not tile 7 x 4 patches"):
        random_mask((7, 4))
    with pytest.raises(UserError, match="hides 49 of 49"):
        pretrain_simmim.check_masking(types.SimpleNamespace(mask_ratio=1.0, mask_unit=2, patch_size=16), (14, 14))


def test_parameter_counts():
    model = SimMIM()
    assert parameter_count(model.decoder) == 148_224
    assert parameter_count(model.encoder) == parameter_count(
        build_model("vit_tiny_simmim", num_classes=0, global_pool="token", shared_table=True)) + 192
    assert SimMIM("vit_tiny").encoder.pos_embed.shape == (1, 197, 192)


@pytest.mark.parametrize("model", ["vit_demo_simmim", "vit_demo"])
def test_forward_by_hand(model):
    """Hidden patches become the token before the positions, all are encoded, and pixels come out (channel, row, column)
    from the 1x1 convolution; the loss sees hidden pixels only.
    """
    simmim = noisy(SimMIM(model, **SMALL))
    images, mask = torch.randn(3, 3, 16, 8), torch.stack([random_mask((4, 2), 1) for _ in range(3)])
    encoder, total, count = simmim.encoder, 0.0, 0
    for image, hidden in zip(images, mask):
        tokens = []
        for row in range(4):
            for column in range(2):
                patch = image[:, 4 * row:4 * row + 4, 4 * column:4 * column + 4]
                token = F.conv2d(patch[None], encoder.patch_embed.proj.weight, encoder.patch_embed.proj.bias).flatten()
                tokens.append(encoder.mask_token.flatten() if hidden[row, column] else token)
        x = torch.stack([encoder.cls_token.flatten(), *tokens])[None]
        if model == "vit_demo":
            x = x + encoder.pos_embed
            for block in encoder.blocks:
                x = block(x)
        else:
            bias = brute_force_bias(encoder.rel_pos_bias.relative_position_bias_table, 4, 2)[None]
            for block in encoder.blocks:
                x = block(x, shared_rel_pos_bias=bias)
        x = encoder.norm(x)[0, 1:]
        weight, bias = simmim.decoder[0].weight.flatten(1), simmim.decoder[0].bias
        for place, feature in enumerate(x):
            row, column = divmod(place, 2)
            if hidden[row, column]:
                patch = (weight @ feature + bias).view(3, 4, 4)
                total += (patch - image[:, 4 * row:4 * row + 4, 4 * column:4 * column + 4]).abs().sum()
                count += 3 * 16
    torch.testing.assert_close(simmim(images, mask), total / count, rtol=1e-4, atol=1e-5)


def test_initial_values():
    """PAPER 3.4: normals of std 0.02 cut at one std, outputs rescaled, LayerScale 0.1; the decoder PyTorch's."""
    torch.manual_seed(0)
    parameters = dict(SimMIM().named_parameters())
    cut = 0.02 * math.sqrt(1 - 2 * math.exp(-0.5) / math.sqrt(2 * math.pi) / math.erf(1 / math.sqrt(2)))  # its std
    for name, scale in {"encoder.patch_embed.proj.weight": 1, "encoder.blocks.4.attn.qkv.weight": 1,
                        "encoder.blocks.4.attn.proj.weight": math.sqrt(10), "encoder.mask_token": 1,
                        "encoder.blocks.11.mlp.fc2.weight": math.sqrt(24), "encoder.cls_token": 1}.items():
        value = parameters[name] * scale
        assert value.abs().max() <= 0.0200001, name
        assert value.std().item() == pytest.approx(cut, rel=0.02 if value.numel() > 1000 else 0.2), name
    assert not parameters["encoder.rel_pos_bias.relative_position_bias_table"].any()
    assert (parameters["encoder.blocks.0.gamma_1"] == 0.1).all()
    bound = 1 / math.sqrt(192)  # PyTorch's convolution
    assert 0.95 * bound < parameters["decoder.0.weight"].abs().max() <= bound


def test_what_is_decayed():
    """Not vectors, biases, class token, positions; the mask token and the table are."""
    for model in ("vit_demo_simmim", "vit_demo"):
        groups = parameter_groups(SimMIM(model, **SMALL), 0.05, exempt=("encoder.pos_embed", "encoder.cls_token"))
        plain = {name for group in groups if not group["weight_decay"] for name in group["names"]}
        decayed = {name for group in groups if group["weight_decay"] for name in group["names"]}
        assert "encoder.cls_token" in plain and "encoder.mask_token" in decayed
        assert not any(name.endswith((".bias", "q_bias", "v_bias", "gamma_1", "pos_embed")) for name in decayed)
        assert model == "vit_demo" or "encoder.rel_pos_bias.relative_position_bias_table" in decayed


def test_schedule():
    rates = [pretrain_simmim.step_decay(step, peak=1.0, warmup_lr=0.2, warmup_steps=4, drop_step=7)
             for step in range(9)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1, 0.1, 0.1])


def test_the_paper_preset():
    settings = vars(settings_of(pretrain_simmim, {"preset": "paper"}))
    expected = dict(model="vit_tiny_simmim", mask_ratio=0.6, warmup_epochs=10, warmup_lr=5e-7, weight_decay=0.05,
                    clip_grad=5.0, drop_path=0.1, crop_min=0.67, img_size=[224], patch_size=16, num_heads=12)
    assert {name: settings[name] for name in expected} == expected
    assert settings["base_lr"] * 512 / 256 == 1e-4 and settings["drop_at"] == 700 / 800


# Its files

class CfgNode(dict):
    """yacs's, as far as a file shows it."""


@pytest.mark.parametrize("model", ["vit_demo_simmim", "vit_demo"])
def test_our_file_gives_the_encoder_back(tmp_path, model):
    """The shared table is then in every block, and the features are the same when nothing is hidden."""
    simmim, images = noisy(SimMIM(model, **SMALL)), torch.randn(2, 3, 16, 8)
    torch.save({"model": simmim.state_dict(), "config": simmim.config}, tmp_path / "simmim.pt")
    encoder = load_model(tmp_path / "simmim.pt").eval()
    features = simmim.forward_encoder(images, torch.zeros(2, 4, 2, dtype=torch.bool)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(encoder.forward_features(images)[:, 1:], features)
    weights = read_weights(tmp_path / "simmim.pt")
    assert {name.split(".")[0] for name in weights.left_out} == {"decoder", "encoder"}  # its mask token


def test_an_official_file_is_read(tmp_path, monkeypatch):
    """{"model", "config": a yacs node, ...}, with index buffers; fine-tuning then starts from it."""
    yacs = types.ModuleType("yacs.config")
    yacs.CfgNode, CfgNode.__module__, CfgNode.__qualname__ = CfgNode, "yacs.config", "CfgNode"
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", yacs)
    simmim = noisy(SimMIM("vit_demo_simmim", **SMALL))
    state = {**simmim.state_dict(), "encoder.rel_pos_bias.relative_position_index": torch.zeros(9, 9)}
    config = CfgNode(MODEL=CfgNode(NAME="simmim"), AMP_OPT_LEVEL="O0")
    config.__dict__["__immutable__"] = True
    torch.save({"model": state, "config": config, "epoch": 799}, tmp_path / "ckpt.pth")
    monkeypatch.undo()
    weights = read_weights(tmp_path / "ckpt.pth")
    assert weights.layout == "SimMIM" and weights.config is None
    vit = build_model("vit_demo_simmim", img_size=(16, 8), patch_size=4, num_classes=3, num_heads=4)
    load_encoder(vit, weights)
    table = simmim.encoder.rel_pos_bias.relative_position_bias_table
    assert all(torch.equal(block.attn.relative_position_bias_table, table) for block in vit.blocks)
    with pytest.raises(UserError, match="relative positions .*fine-tune from it"):
        load_model(tmp_path / "ckpt.pth", num_heads=4)


# The run

def test_exact_resume(tmp_path, monkeypatch):
    """With drop path, two micro-batches a step, stopped in the middle of an epoch."""
    monkeypatch.setitem(SIZES, "vit_demo", {"embed_dim": 8, "depth": 2})
    row = dict(model="vit_demo_simmim", patch_size=2, num_heads=2, drop_path=0.5, micro_batch=2)
    assert_resumes_exactly(pretrain_simmim, tmp_path, monkeypatch, **row)


def test_the_file_is_ours_and_the_run_is_found_again(tmp_path, monkeypatch):
    monkeypatch.setitem(SIZES, "vit_demo", {"embed_dim": 8, "depth": 1})
    first = tiny_run(pretrain_simmim, tmp_path, monkeypatch, model="vit_demo", patch_size=2, num_heads=2)
    assert np.isfinite(first["seconds"]) and load_model(first["checkpoint"]).config["model"] == "vit_demo"
    again = tiny_run(pretrain_simmim, tmp_path, monkeypatch, model="vit_demo", patch_size=2, num_heads=2)
    assert again["run"] == first["run"] and again["seconds"] == first["seconds"]
