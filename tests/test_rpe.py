"""common/vit.py: the variants with relative positions, their index, logits, initial values, loading and layer decay."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.augment import contiguous
from common.filling import load_encoder
from common.images import ImageSet
from common.mae import MAE
from common.pretrained import FormatError, read_weights
from common.rebuilding import load_model
from common.vit import SIZES, build_model
from sec3_benchmark import finetune
from sec3_benchmark.layer_decay import layer_groups
from sec4_analysis.activations import Activations
from sec4_analysis.attention import attention_logits
from tests.helpers import brute_force_bias, noisy, parameter_count, settings_of, table_row

SMALL = dict(img_size=(12, 8), patch_size=4, num_classes=3, num_heads=4)  # 3 x 2 patches


def test_tables_of_another_grid_are_refused(tmp_path):
    """3 x 2 and 2 x 3 patches have tables of one shape that mean different offsets; none is resized."""
    source = build_model("vit_demo_rpe", **SMALL)
    torch.save({"model": source.state_dict(), "config": source.config}, tmp_path / "a.pt")
    weights = read_weights(tmp_path / "a.pt")
    assert "resized" not in str(load_encoder(build_model("vit_demo_rpe", **SMALL), weights))
    for size in ((8, 12), (16, 16)):
        with pytest.raises(FormatError, match="relative positions for images of 12 x 8 px, which cannot be resized"):
            load_encoder(build_model("vit_demo_rpe", **{**SMALL, "img_size": size}), weights)
    with pytest.raises(FormatError, match="pass --model vit_demo_rpe"):  # of its own width
        load_encoder(build_model("vit_demo", **SMALL), weights)


# The model

def test_parameter_counts():
    """PAPER: the plain 5,717,416 + 105,408 of the tables + 4,608 gammas - 2,304 for the biases of the keys."""
    assert parameter_count(build_model("vit_tiny_rpe")) == 5_825_128
    positions, one_table = 197 * 192, 732 * 12
    assert parameter_count(build_model("vit_tiny_simmim")) == 5_825_128 - positions
    assert parameter_count(build_model("vit_tiny_simmim", shared_table=True)) == 5_825_128 - positions - 11 * one_table
    assert parameter_count(build_model("vit_tiny")) == 5_717_416


@pytest.mark.parametrize("grid", [(3, 2), (1, 1), (14, 14)])
def test_relative_index_by_brute_force(grid):
    rows, columns = grid
    attention = build_model("vit_demo_rpe", img_size=(rows * 2, columns * 2), patch_size=2).blocks[0].attn
    tokens = range(1 + rows * columns)
    expected = [[table_row(q, k, rows, columns) for k in tokens] for q in tokens]
    assert attention.relative_position_index.tolist() == expected
    assert len(attention.relative_position_bias_table) == (2 * rows - 1) * (2 * columns - 1) + 3


def test_forward_is_the_one_written_out_by_hand():
    """Pre-norm blocks with LayerScale, the bias after the scaling, no bias for keys, mean -> fc_norm."""
    model = noisy(build_model("vit_demo_rpe", **SMALL))
    images, p = torch.randn(2, 3, 12, 8), dict(model.named_parameters())

    def norm(x, name):
        return F.layer_norm(x, (96,), p[f"{name}.weight"], p[f"{name}.bias"], eps=1e-6)
    x = F.conv2d(images, p["patch_embed.proj.weight"], p["patch_embed.proj.bias"], stride=4).flatten(2).transpose(1, 2)
    x = torch.cat([p["cls_token"].expand(2, -1, -1), x], dim=1) + p["pos_embed"]
    for block in (f"blocks.{i}" for i in range(12)):
        qkv = norm(x, f"{block}.norm1") @ p[f"{block}.attn.qkv.weight"].T
        q, k, v = (part.reshape(2, 7, 4, 24).transpose(1, 2) for part in qkv.split(96, dim=2))
        q, v = (part + p[f"{block}.attn.{name}_bias"].reshape(4, 1, 24) for part, name in ((q, "q"), (v, "v")))
        logits = q @ k.transpose(2, 3) / math.sqrt(24)
        logits = logits + brute_force_bias(p[f"{block}.attn.relative_position_bias_table"], 3, 2)
        out = (logits.softmax(dim=3) @ v).transpose(1, 2).reshape(2, 7, 96)
        out = out @ p[f"{block}.attn.proj.weight"].T + p[f"{block}.attn.proj.bias"]
        x = x + p[f"{block}.gamma_1"] * out
        hidden = norm(x, f"{block}.norm2") @ p[f"{block}.mlp.fc1.weight"].T + p[f"{block}.mlp.fc1.bias"]
        x = x + p[f"{block}.gamma_2"] * (F.gelu(hidden) @ p[f"{block}.mlp.fc2.weight"].T + p[f"{block}.mlp.fc2.bias"])
    expected = norm(x[:, 1:].mean(dim=1), "fc_norm") @ p["head.weight"].T + p["head.bias"]
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)


def test_a_shared_table_is_the_same_table_in_every_block():
    """The copy that loading SimMIM's weights for fine-tuning makes."""
    shared = noisy(build_model("vit_demo_simmim", shared_table=True, **SMALL))
    blocks = build_model("vit_demo_simmim", **SMALL).eval()
    state = shared.state_dict()
    table = state.pop("rel_pos_bias.relative_position_bias_table")
    state.update({f"blocks.{i}.attn.relative_position_bias_table": table for i in range(12)})
    blocks.load_state_dict(state)
    images = torch.randn(2, 3, 12, 8)
    torch.testing.assert_close(blocks(images), shared(images))


def test_attention_logits_hold_the_bias():
    model = noisy(build_model("vit_demo_rpe", **SMALL))
    attention, tokens = model.blocks[3].attn, torch.randn(2, 7, 96)
    logits = attention_logits(attention, tokens)
    values = (tokens @ attention.qkv.weight[192:].T + attention.v_bias).reshape(2, 7, 4, 24).transpose(1, 2)
    mixed = (logits.softmax(dim=3) @ values).transpose(1, 2).reshape(2, 7, 96)
    torch.testing.assert_close(attention.proj(mixed), attention(tokens), rtol=1e-4, atol=1e-5)
    before = logits.detach()
    with torch.no_grad():
        attention.relative_position_bias_table += 1
    torch.testing.assert_close(attention_logits(attention, tokens), before + 1)


def test_the_analysis_reads_relative_models():
    """Its logits of every block, softmaxed, give the attention's own output; one table for all or one each."""
    images = torch.randn(2, 3, 12, 8)
    for shared in (False, True):
        model = noisy(build_model("vit_demo_simmim", shared_table=shared, **SMALL))
        with Activations(model, ["blocks.3.norm1", "blocks.3.logits"]) as read:
            found = read(images)
        attention, tokens = model.blocks[3].attn, found["blocks.3.norm1"]
        values = (tokens @ attention.qkv.weight[192:].T + attention.v_bias).reshape(2, 7, 4, 24).transpose(1, 2)
        mixed = attention.proj((found["blocks.3.logits"].softmax(dim=3) @ values).transpose(1, 2).reshape(2, 7, 96))
        bias = {"shared_rel_pos_bias": model.rel_pos_bias()} if shared else {}
        torch.testing.assert_close(mixed, attention(tokens, **bias), rtol=1e-4, atol=1e-5)


def test_initial_values():
    """PAPER 1.6: truncated normal 0.02 (the convolution too), outputs rescaled by depth, head times 0.001."""
    torch.manual_seed(0)
    model = build_model("vit_tiny_rpe")
    parameters = dict(model.named_parameters())
    spread = {name: 0.02 for name in ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.7.attn.qkv.weight",
                                      "blocks.7.mlp.fc1.weight")}
    spread.update({f"blocks.{i}.{name}.weight": 0.02 / math.sqrt(2 * (i + 1))
                   for i in (0, 7, 11) for name in ("attn.proj", "mlp.fc2")}, **{"head.weight": 0.02e-3})
    for name, std in spread.items():
        assert parameters[name].std().item() == pytest.approx(std, rel=0.2 if name == "cls_token" else 0.02), name
    for name, value in parameters.items():
        if name.endswith(("gamma_1", "gamma_2")):
            assert torch.equal(value, torch.full_like(value, 0.1))
        elif name.endswith(("bias", "bias_table")):
            assert not value.any(), name


# Loading

def test_an_mae_enters_and_what_it_lacks_is_named(tmp_path):
    """qkv.bias is dropped, tables and scales start anew (trap 8); a plain model still wants all of its tensors."""
    mae = noisy(MAE("vit_demo", img_size=12, patch_size=4, num_heads=4))
    torch.save({"model": mae.state_dict(), "config": mae.config}, tmp_path / "mae.pt")
    weights = read_weights(tmp_path / "mae.pt")
    vit = build_model("vit_demo_rpe", img_size=12, patch_size=4, num_classes=3, num_heads=4)
    report = load_encoder(vit, weights)
    assert torch.equal(vit.blocks[5].attn.qkv.weight, mae.blocks[5].attn.qkv.weight)
    assert torch.equal(vit.pos_embed, mae.pos_embed) and not vit.blocks[5].attn.q_bias.any()
    fresh = {name for name in report.fresh if name.startswith("blocks.5.")}
    assert fresh == {f"blocks.5.{name}" for name in ("gamma_1", "gamma_2", "attn.q_bias", "attn.v_bias",
                                                     "attn.relative_position_bias_table")}
    assert "blocks.5.attn.qkv.bias" in report.left_out


def test_our_file_comes_back_as_the_same_model(tmp_path):
    model, images = noisy(build_model("vit_demo_rpe", **SMALL)), torch.randn(2, 3, 12, 8)
    state = model.state_dict()
    torch.save({"model": state, "config": model.config}, tmp_path / "rpe.pt")
    torch.testing.assert_close(load_model(tmp_path / "rpe.pt").eval()(images), model(images))
    index = {f"blocks.{i}.attn.relative_position_index": torch.zeros(7, 7) for i in range(12)}  # as official files hold
    torch.save({"model": {**state, **index}, "config": model.config}, tmp_path / "with_index.pt")
    torch.testing.assert_close(load_model(tmp_path / "with_index.pt").eval()(images), model(images))
    weights = read_weights(tmp_path / "with_index.pt")
    assert len(weights.left_out) == 12
    short = {name: value for name, value in state.items() if not name.endswith("5.attn.q_bias")}
    torch.save({"model": short, "config": model.config}, tmp_path / "short.pt")
    with pytest.raises(FormatError, match="missing 1 .*q_bias"):  # of such a file nothing may be missing
        load_encoder(build_model("vit_demo_rpe", **SMALL), read_weights(tmp_path / "short.pt"))


def test_layer_decay():
    """Trap 12: a block's table belongs to the block, a shared one to the last layer; tables are decayed (trap 13)."""
    def scales(model):
        groups = layer_groups(model, 0.05, 0.5)
        return {name: (group["lr_scale"], group["weight_decay"]) for group in groups for name in group["names"]}
    own = scales(build_model("vit_demo_rpe", **SMALL))
    for block in (0, 11):
        scale = 0.5 ** (12 - block)
        assert own[f"blocks.{block}.attn.relative_position_bias_table"] == (scale, 0.05)
        for name in ("attn.q_bias", "attn.v_bias", "gamma_1", "gamma_2"):
            assert own[f"blocks.{block}.{name}"] == (scale, 0.0)
    assert own["pos_embed"] == (0.5 ** 13, 0.0)
    shared = scales(build_model("vit_demo_simmim", shared_table=True, **SMALL))
    assert shared["rel_pos_bias.relative_position_bias_table"] == (1.0, 0.05)


def test_finetune_takes_it_by_name_or_from_the_file(tmp_path, monkeypatch):
    """--model vit_demo_rpe from scratch, then from its weights alone: the same architecture and start."""
    monkeypatch.setitem(SIZES, "vit_demo", {"embed_dim": 8, "depth": 1})
    pixels = np.random.RandomState(0).randint(0, 256, (8, 4, 4, 3), dtype=np.uint8)
    images = ImageSet("toy", pixels, np.arange(8) % 2, [0, 1])
    monkeypatch.setattr(finetune, "load_sets", lambda args: (images, images))
    monkeypatch.setattr(finetune, "TrainViews", lambda args: contiguous)
    row = dict(preset="demo", img_size=[4], patch_size=2, num_heads=2, batch_size=4, epochs=1, warmup_epochs=0,
               eval_every=0, device="cpu", workers=0, precision="fp32", output=str(tmp_path))

    def run(**explicit):
        return finetune.main(settings_of(finetune, {**row, **explicit}, {}))
    first = run(model="vit_demo_rpe")
    assert load_model(first["checkpoint"]).config["model"] == "vit_demo_rpe"
    second = run(init=first["checkpoint"], base_lr=0.0, min_lr=0.0)
    before, after = (load_model(result["checkpoint"]) for result in (first, second))
    assert after.config["model"] == "vit_demo_rpe"
    for (name, ours), theirs in zip(after.blocks.named_parameters(), before.blocks.parameters()):
        assert torch.equal(ours, theirs), name
