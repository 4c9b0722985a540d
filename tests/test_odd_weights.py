"""Weights as one finds them: wrapped, twice in a file, diverged, damaged, with other heads, tokens, sizes and names.

What is read is compared with the plain file of the same model, or with timm's own outputs; what cannot be is refused in
one line that names the file and the reason.
"""
import copy
import json

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from timm.models import save_for_hf
from torch.nn import DataParallel
from torch.optim.swa_utils import AveragedModel

from common.checkpoint import save_arrays, save_json
from common.errors import FormatError, UserError
from common.filling import load_encoder
from common.mae import MAE
from common.pretrained import Weights, fingerprint, read_weights
from common.rebuilding import load_model
from common.shapes import tokens_of
from common.vit import build_vit
from tests.helpers import assert_close, noisy

SMALL = {"model": "vit_demo", "img_size": 32, "patch_size": 8, "num_classes": 5}


def classifier(**settings):
    return noisy(build_vit(**{**SMALL, **settings}))


def saved(path, content):
    torch.save(content, path)
    return path


def own_file(path, model, **more):
    return saved(path, {"model": model.state_dict(), "config": model.config, **more})


def images(*size):
    return torch.randn(2, 3, *(size or (32, 32)), generator=torch.Generator().manual_seed(0))


# Wrappers of names, several models in a file

def named_inside(*parts):
    """Return a function that wraps a model so that its tensors' names begin with these parts, as in torch.compile."""
    def wrap(model):
        wrapper = model
        for part in reversed(parts):
            outer = torch.nn.Module()
            outer.add_module(part, wrapper)
            wrapper = outer
        return wrapper
    return wrap


def each_block(model):
    for i in range(len(model.blocks)):
        model.blocks[i] = named_inside("_orig_mod")(model.blocks[i])
    return model


@pytest.mark.parametrize("wrap", [
    named_inside("_orig_mod"), DataParallel, named_inside("module", "_orig_mod"), named_inside("_orig_mod", "module"),
    named_inside("module", "module"), AveragedModel, lambda m: AveragedModel(named_inside("_orig_mod", "module")(m)),
    lambda m: named_inside("_orig_mod")(AveragedModel(m)), each_block, named_inside("_fsdp_wrapped_module")])
def test_wrappers_leave_no_trace(tmp_path, wrap):
    model = classifier()
    state = wrap(copy.deepcopy(model)).state_dict()
    for content in (state, {"state_dict": state}, {"checkpoint": 1, "module": {"model": state}}):
        assert read_weights(saved(tmp_path / "a.pth", content)).fingerprint == fingerprint(model.state_dict())


@pytest.mark.parametrize(("raw", "ema"), [("state_dict", "state_dict_ema"), ("model", "model_ema"),
                                          ("model", "state_dict_ema")])
def test_of_raw_and_averaged_weights_one_is_taken_and_named(tmp_path, capsys, raw, ema):
    model = classifier()
    states = {ema: {name: value + 1 for name, value in model.state_dict().items()}, raw: model.state_dict()}
    assert read_weights(saved(tmp_path / "a.pth", states)).fingerprint == fingerprint(states[raw])
    assert f"{raw} and {ema}: {raw} is read" in capsys.readouterr().out
    assert read_weights(saved(tmp_path / "b.pth", {ema: states[ema]})).fingerprint == fingerprint(states[ema])
    assert capsys.readouterr().out == ""
    both = {**model.state_dict(), **{f"module.{name}": value for name, value in model.state_dict().items()}}
    with pytest.raises(FormatError, match="c.pth holds two models"):
        read_weights(saved(tmp_path / "c.pth", both))


@torch.no_grad()
@pytest.mark.parametrize("beside", [
    {"head.mlp.0.weight": (64, 96), "head.last_layer.weight_g": (9, 1)}, {"mask_token": (1, 96)},
    {"head.0.running_mean": (96,), "head.1.weight": (10, 96), "head.1.bias": (10,)}])
def test_what_lies_beside_an_encoder_hinders_no_script(tmp_path, beside):
    """Beside an encoder lie DINO's projector, DINOv2's mask token or the head of MAE's linear probe."""
    model = classifier(num_classes=0, global_pool="token")
    path = saved(tmp_path / "a.pth", {**model.state_dict(), **{name: torch.ones(s) for name, s in beside.items()}})
    assert torch.equal(load_model(path).eval()(images()), model(images()))
    vit = build_vit(**SMALL, global_pool="token").eval()
    load_encoder(vit, read_weights(path))
    assert torch.equal(vit.blocks[-1].mlp.fc2.weight, model.blocks[-1].mlp.fc2.weight)
    with pytest.raises(FormatError, match="holds no classifier"):
        load_encoder(vit, read_weights(path), keep_head=True)


# No numbers, damage

@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["cls_token", "blocks.3.mlp.fc1.weight", "head.bias"])
def test_weights_that_are_no_numbers_are_named(tmp_path, name, value):
    state = {key: tensor.half() for key, tensor in classifier().state_dict().items()}
    state[name].view(-1)[0] = value
    files = {"a.pth": state, "b.pth": {"model": state}, "c.pt": {"model": state, "config": classifier().config}}
    for file, content in files.items():
        saved(tmp_path / file, content)
    safetensors.torch.save_file(state, tmp_path / "d.safetensors")
    for path in tmp_path.iterdir():
        with pytest.raises(FormatError, match=rf"{path.name}: NaN or infinite values in 1 \({name}\)"):
            read_weights(path)
    with pytest.raises(FormatError, match=name):
        Weights(state, None, "timm:x", "timm", [])


def test_a_teacher_that_is_left_out_may_be_anything(tmp_path):
    model = classifier()
    content = {f"module.model.{name}": value for name, value in model.state_dict().items()}
    content["module.tch_model.cls_token"] = torch.full((1, 1, 96), torch.nan)
    assert read_weights(saved(tmp_path / "a.pth", {"model": content})).left_out == ["tch_model.cls_token"]


@pytest.mark.parametrize("ours", [True, False])
def test_no_flipped_byte_is_read(tmp_path, ours):
    """Flip 64 bytes anywhere: the file is refused, or, if they were padding, it gives the same weights."""
    model = classifier()
    path = own_file(tmp_path / "a.pt", model) if ours else saved(tmp_path / "a.pt", model.state_dict())
    raw, refused = path.read_bytes(), 0
    for place in np.random.default_rng(0).integers(0, len(raw) - 64, 25):
        path.write_bytes(raw[:place] + bytes(byte ^ 0x41 for byte in raw[place:place + 64]) + raw[place + 64:])
        try:
            assert read_weights(path).fingerprint == fingerprint(model.state_dict())
        except FormatError as error:
            refused += 1
            assert "a.pt" in str(error) and "weights_only" not in str(error)
    assert refused > 20


def test_files_without_checksums_are_read(tmp_path):
    model = classifier()
    torch.save(model.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    torch.save(model.state_dict(), tmp_path / "fast.pth")
    torch.serialization.set_crc32_options(before)
    for path in tmp_path.iterdir():
        assert read_weights(path).fingerprint == fingerprint(model.state_dict())


@pytest.mark.parametrize(("name", "value"), [
    ("model", 3), ("model", ["vit_tiny"]), ("img_size", "32"), ("img_size", [32.0, 32.0]), ("img_size", [0, 32]),
    ("img_size", [32, 32, 32]), ("patch_size", "8"), ("patch_size", 0), ("num_heads", None), ("num_heads", 12.0),
    ("num_heads", True), ("num_classes", "5"), ("in_chans", -3), ("global_pool", 1), ("reg_tokens", []),
    ("mask_ratio", torch.nan)])
def test_settings_that_no_model_can_have_are_named(tmp_path, name, value):
    model = classifier()
    path = saved(tmp_path / "a.pt", {"model": model.state_dict(), "config": {**model.config, name: value}})
    with pytest.raises(FormatError, match=f"a.pt: its settings say {name} = "):
        read_weights(path)


@pytest.mark.parametrize("more", [
    {"statistics": {"mean": [0.5] * 3}}, {"statistics": {"mean": ["a"] * 3, "std": [1] * 3}}, {"statistics": [0.5] * 3},
    {"statistics": {"mean": [torch.nan] * 3, "std": [0.2] * 3}}, {"classes": ["a", "b"]},
    {"classes": 5}])
def test_what_a_file_says_of_its_images_and_classes_must_fit(tmp_path, more):
    with pytest.raises(FormatError, match="a.pt: it"):
        read_weights(own_file(tmp_path / "a.pt", classifier(), **more))


@pytest.mark.parametrize("names", [
    {str(n): f"name{n}" for n in range(12)}, {str(n): f"name{n}" for n in reversed(range(12))},
    dict(sorted((str(n), f"name{n}") for n in range(12))), [f"name{n}" for n in range(12)]])
def test_a_class_has_the_name_of_its_number(tmp_path, names):
    settings = dict(img_size=32, embed_dim=96, depth=1, num_heads=3, num_classes=12, patch_size=8)
    model = timm.create_model("vit_tiny_patch16_224", **settings)
    save_for_hf(model, tmp_path, model_config=dict(model_args=settings, label_names=names), safe_serialization=True)
    assert read_weights(tmp_path).classes == [f"name{n}" for n in range(12)]
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "label_names": ["name0", "name1"]}))
    with pytest.raises(FormatError, match="no name for each of its 12 classes"):
        read_weights(tmp_path)


@pytest.mark.parametrize("content", [
    {"top1": np.nan}, {"rows": [{"x": 1}, {"measured": [1.0, np.inf]}]}, {"loss": np.float64("nan")}])
def test_a_result_that_is_no_number_is_not_written(tmp_path, content):
    save_json(tmp_path / "a.json", {"top1": 1.5})
    with pytest.raises(UserError, match="a.json is not written: .*(top1|rows.1.measured.1|loss) is not finite"):
        save_json(tmp_path / "a.json", content)
    assert json.loads((tmp_path / "a.json").read_text()) == {"top1": 1.5}
    for array in (np.array([[0.0, np.nan]]), np.full(3, np.inf, np.float32)):
        with pytest.raises(UserError, match="MAE is not finite"):
            save_arrays(tmp_path / "a.npz", {"names": np.array(["a"]), "whole": np.arange(3), "MAE": array})
    assert not (tmp_path / "a.npz").exists()


# Other tokens, other sizes

TOKENS = {
    "LayerScale, as DINOv2": dict(init_values=1e-5), "DeiT III": dict(init_values=1e-5, no_embed_class=True),
    "class token without a position": dict(no_embed_class=True),
    "registers": dict(reg_tokens=4), "registers without positions": dict(reg_tokens=4, no_embed_class=True),
    "no class token": dict(class_token=False, global_pool="avg")}


@torch.no_grad()
@pytest.mark.parametrize("settings", TOKENS.values(), ids=TOKENS)
def test_every_plain_vit_is_read_as_timm_reads_it(tmp_path, settings):
    """From a foreign file and from a timm folder: as a whole, into a network to train, and at another image size."""
    kind = dict(img_size=32, patch_size=8, embed_dim=96, depth=12, num_heads=12, num_classes=5, **settings)
    model = noisy(timm.create_model("vit_tiny_patch16_224", **kind))
    save_for_hf(model, tmp_path / "timm", model_config=dict(model_args=kind), safe_serialization=True)
    saved(tmp_path / "a.pth", {"model": model.state_dict()})
    for source in (tmp_path / "a.pth", tmp_path / "timm"):
        weights = read_weights(source)
        network = {**SMALL, "img_size": 48, "global_pool": settings.get("global_pool", "token")}
        vit = build_vit(**network, **tokens_of(weights, "vit_demo", 48, 8)).eval()
        report = load_encoder(vit, weights, keep_head=True)
        assert "resized from 4x4 to 6x6" in str(report) and not report.fresh
        assert_close(load_model(weights).eval()(images()), model(images()), 1e-5)
        assert_close(vit(images(48, 48)), load_model(weights, img_size=48).eval()(images(48, 48)), 1e-5)
    again = load_model(own_file(tmp_path / "b.pt", vit)).eval()
    assert torch.equal(again(images(48, 48)), vit(images(48, 48))) and again.config == vit.config


def by_hand(table, old, new, prefix):
    patches = table[:, prefix:].reshape(1, *old, -1).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=new, mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    return torch.cat([table[:, :prefix], patches], dim=1)


@pytest.mark.parametrize(("size", "grid"), [((64, 64), (8, 8)), ((24, 40), (3, 5)), ((64, 16), (8, 2))])
def test_analyses_resize_positions_too(tmp_path, capsys, size, grid):
    """Also from 4 x 4 to 8 x 2: as many patches, which timm 1.0.26 would not resize."""
    model = classifier()
    loaded = load_model(own_file(tmp_path / "a.pt", model), img_size=size)
    assert torch.equal(loaded.pos_embed, by_hand(model.pos_embed, (4, 4), grid, 1))
    assert f"positions resized from 4x4 to {grid[0]}x{grid[1]}" in capsys.readouterr().out
    mae = noisy(MAE("vit_demo", img_size=32, patch_size=8))
    loaded = load_model(own_file(tmp_path / "mae.pt", mae), img_size=size)
    assert torch.equal(loaded.pos_embed, by_hand(mae.pos_embed, (4, 4), grid, 1))
    assert torch.equal(loaded.decoder_pos_embed, by_hand(mae.decoder_pos_embed, (4, 4), grid, 1))
    assert capsys.readouterr().out.count("resized") == 1 and loaded.config["img_size"] == list(size)


def test_a_size_that_is_given_is_believed_before_a_square(tmp_path):
    wide = classifier(img_size=(16, 64), global_pool="token")  # 2 x 8, as many as 4 x 4
    path = saved(tmp_path / "a.pth", wide.state_dict())
    again = load_model(path, img_size=(16, 64)).eval()
    assert torch.equal(again(images(16, 64)), wide(images(16, 64))) and load_model(path).config["img_size"] == [32, 32]
    vit = build_vit(**{**SMALL, "img_size": (16, 64)})  # a training may mean either: resize 4 x 4, or take 2 x 8
    with pytest.raises(FormatError, match=r"\(2, 8\) or \(4, 4\)"):
        load_encoder(vit, read_weights(path))
    load_encoder(vit, read_weights(own_file(tmp_path / "b.pt", again)))
    assert torch.equal(vit.pos_embed, wide.pos_embed)


def test_what_no_tensor_tells_is_compared_with_timms_own_model():
    kind = dict(img_size=32, patch_size=8, embed_dim=96, num_heads=12, num_classes=5)
    for settings in ({"act_layer": "gelu_tanh"}, {"norm_layer": "layernorm", "act_layer": "relu"}):
        model = timm.create_model("vit_tiny_patch16_224", **kind, **settings)
        weights = Weights(model.state_dict(), {**classifier().config, "num_classes": 5}, "timm:x", "timm", [], model)
        with pytest.raises(FormatError, match="timm:x computes by"):
            load_encoder(classifier(), weights)
