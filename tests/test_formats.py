"""common/pretrained.py, filling.py, rebuilding.py: every layout is written from a real model's weights and read back.

Outputs are compared, not only names. Where a number can be had otherwise (interpolation, a grey image, counts of
tensors) it is. No network: the hub is replaced by timm building its model here.
"""
import argparse
import io
import os
import zipfile

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F

from common.filling import leading_blocks, load_encoder
from common.mae import MAE
from common.pretrained import SAFE_GLOBALS, FormatError, Weights, fingerprint, read_weights
from common.rebuilding import load_model
from common.vit import build_model, build_vit
from tests.helpers import assert_close, fill_by_name

SMALL = {"model": "vit_demo", "img_size": 32, "patch_size": 8}  # 96 wide, 12 blocks: 152 tensors as a classifier


def classifier(**settings):
    return fill_by_name(build_vit(**{**SMALL, "num_classes": 5, **settings}), fill_positions=True).eval()


def autoencoder(**settings):
    return fill_by_name(MAE(**{**SMALL, **settings})).eval()


def saved(path, content, **how):
    torch.save(content, path, **how)
    return path


def own_file(path, model):
    return saved(path, {"model": model.state_dict(), "config": model.config})


def images(channels=3, size=(32, 32)):
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def latent(mae, x):
    """The encoder's tokens of all patches, in order."""
    ids = torch.arange(mae.num_patches).expand(len(x), -1)
    return mae.forward_encoder(mae.patchify(x), ids)


@torch.no_grad()
def tokens_before_norm(model, x):
    """The same from a classifier, before its final norm."""
    return model.forward_intermediates(x, indices=[11], intermediates_only=True, output_fmt="NLC", norm=False)[0]


def changed(model, before):
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def copy_of(state):
    return {name: value.clone() for name, value in state.items()}


# Reading: each layout gives the same tensors.

def layouts(model):
    """Layout -> content of a file, as the projects write them."""
    state, epoch = model.state_dict(), {"optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}, "epoch": 7}
    mae_lite = {"start_epoch": 8, "optimizer": epoch["optimizer"], "scheduler": {"last_count": 3},
                "best_top1": np.float64(77.9), "best_top5": 93.5, "best_top1_epoch": np.int64(8), "scaler": {}}
    return {
        "ours": {"model": state, "config": model.config},
        "our checkpoint": {"model": state, "config": model.config, **epoch, "step": 12},
        "mae-lite, distributed": {"model": {f"module.model.{n}": v for n, v in state.items()}, **mae_lite},
        "mae-lite, one GPU": {"model": {f"model.{n}": v for n, v in state.items()}, **mae_lite},
        "facebook MAE or DeiT": {"model": state},
        "its training": {"model": state, **epoch, "scaler": {}, "args": argparse.Namespace(lr=1e-3, output_dir="x")},
        "timm training": {"state_dict": {f"module.{n}": v for n, v in state.items()}, "arch": "vit", **epoch},
        "bare": state,
    }


@pytest.mark.parametrize("make", [autoencoder, classifier])
def test_every_layout_gives_the_same_tensors_and_fingerprint(make, tmp_path):
    model = make()
    state = model.state_dict()
    for number, (name, content) in enumerate(layouts(model).items()):
        for zipped in (True, False):  # today's files and those from before torch 1.6
            path = saved(tmp_path / f"{number}.pth", content, _use_new_zipfile_serialization=zipped)
            weights = read_weights(path)
            assert weights.state.keys() == state.keys(), name
            assert all(torch.equal(weights.state[n], state[n]) for n in state), name
            assert weights.fingerprint == fingerprint(state) and weights.source == str(path)
            assert (weights.config == model.config) == name.startswith("our") and weights.left_out == []
            assert weights.layout.split()[0].rstrip(",") in ("ours" if name.startswith("our") else
                                                             "mae-lite" if name.startswith("mae-lite") else "plain")


def test_safetensors_are_read(tmp_path):
    model = classifier()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    weights = read_weights(tmp_path / "model.safetensors")
    assert weights.config is None and weights.fingerprint == fingerprint(model.state_dict())


def test_the_teacher_inside_a_distillation_file_is_left_out_and_counted(tmp_path):
    student, teacher = autoencoder(), autoencoder(num_heads=6)
    content = {f"module.model.{n}": v for n, v in student.state_dict().items()}
    content |= {f"module.tch_model.{n}": v + 1 for n, v in teacher.state_dict().items()}
    content["module.attn_adapter.adapter11.weight"] = torch.zeros(12, 12, 1, 1)
    weights = read_weights(saved(tmp_path / "d.pth.tar", {"model": content, "start_epoch": 400}))
    assert weights.fingerprint == fingerprint(student.state_dict())
    assert len(weights.left_out) == len(teacher.state_dict()) + 1
    report = str(load_encoder(classifier(), weights))
    assert f"tch_model ({len(teacher.state_dict())}), attn_adapter (1), decoder (20), norm (2)" in report
    content["module.surprise.weight"] = torch.zeros(1)
    with pytest.raises(FormatError, match="d.pth.tar holds no ViT in a known layout"):
        read_weights(saved(tmp_path / "d.pth.tar", {"model": content}))


def test_fingerprint_is_of_the_content_to_the_last_bit():
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1.0)}
    assert fingerprint(state) == fingerprint({"b": state["b"].clone(), "a": state["a"].t().contiguous().t()})
    bit = copy_of(state)
    bit["a"].view(torch.int32)[1, 2] ^= 1
    others = [bit, {**state, "a": state["a"].reshape(3, 2)}, {**state, "a": state["a"].view(torch.int32)},
              {"a": state["a"], "c": state["b"]}, {"a": state["a"]}, {**state, "b": state["b"].bfloat16()}]
    assert len({fingerprint(s) for s in [state, *others]}) == 1 + len(others)


# Reading: what must not be.

class Malicious:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


class Unknown:
    pass


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_does_not_run(tmp_path, zipped):
    mark = tmp_path / "ran"
    state = classifier().state_dict()
    code = Malicious(f"touch {mark}")
    path = saved(tmp_path / "bad.pth", {"model": state, "args": code}, _use_new_zipfile_serialization=zipped)
    with pytest.raises(FormatError, match=r"bad.pth needs (posix|nt)\.system"):
        read_weights(path)
    assert not mark.exists()
    function, arguments = code.__reduce__()  # what an unsafe reader would do
    function(*arguments)
    assert mark.exists()


def test_another_global_is_refused_by_name_and_nothing_stays_allowed(tmp_path):
    with pytest.raises(FormatError, match="Unknown") as error:
        read_weights(saved(tmp_path / "x.pth", {"model": classifier().state_dict(), "args": Unknown()}))
    assert "weights_only" not in str(error.value)  # PyTorch's own message suggests turning the check off
    with pytest.raises(FormatError, match="eval"):
        read_weights(saved(tmp_path / "x.pth", {"model": classifier().state_dict(), "args": eval}))
    assert not set(torch.serialization.get_safe_globals()) & set(SAFE_GLOBALS)
    assert len(SAFE_GLOBALS) == 11


def test_numpy_scalars_under_both_of_numpy_s_module_names(tmp_path):
    scalars = [np.float64(1.5), np.float32(2), np.float16(3), np.int64(4), np.int32(5), np.bool_(True)]
    buffer = io.BytesIO()
    torch.save({"model": classifier().state_dict(), "scalars": scalars}, buffer)
    names = (b"numpy.core.multiarray", b"numpy._core.multiarray")  # before NumPy 2, and since
    for wanted, other in (names, names[::-1]):
        path = tmp_path / "scalars.pth"
        with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w") as target:
            for record in source.namelist():
                data = source.read(record)
                target.writestr(record, data.replace(other, wanted) if record.endswith("data.pkl") else data)
        with zipfile.ZipFile(path) as written:
            assert any(wanted in written.read(record) for record in written.namelist())
        assert len(read_weights(path).state) == 152


def test_what_is_no_checkpoint_is_refused_with_its_path(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.pth"):
        read_weights(tmp_path / "nowhere.pth")
    whole = own_file(tmp_path / "whole.pth", classifier()).read_bytes()
    safetensors.torch.save_file(classifier().state_dict(), tmp_path / "whole.safetensors")
    contents = {"text.pth": b"hello world\n" * 9, "empty.pth": b"", "page.pth": b"<!DOCTYPE html><html>",
                "half.pth": whole[: len(whole) // 2], "almost.pth": whole[:-1], "pickle.pth": b"\x80\x02garbage",
                "half.safetensors": (tmp_path / "whole.safetensors").read_bytes()[:-5], "text.safetensors": b"hello"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(FormatError, match=name):
            read_weights(tmp_path / name)
    for content in (torch.zeros(3), [1], {"model": {"fc.weight": torch.zeros(1)}}, {}, {"model": None},
                    {"model": {**classifier().state_dict(), "note": "text"}}):
        with pytest.raises(FormatError, match="odd.pth"):
            read_weights(saved(tmp_path / "odd.pth", content))
    with pytest.raises(FormatError, match="config.json and model.safetensors"):
        read_weights(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(FormatError, match="timm cannot load"):
        read_weights(tmp_path)


# Loading into a classifier.

def test_an_mae_encoder_in_a_classifier_gives_the_same_tokens(tmp_path):
    mae, vit = autoencoder(), classifier()
    for path in (own_file(tmp_path / "a.pt", mae), saved(tmp_path / "b.pth", {"model": mae.state_dict()})):
        vit = build_vit(**SMALL, num_classes=5).eval()
        before = copy_of(vit.state_dict())
        report = load_encoder(vit, read_weights(path))
        with torch.no_grad():
            assert_close(mae.norm(tokens_before_norm(vit, images())), latent(mae, images())[:, 1:], 1e-5)
        assert changed(vit, before) == {n for n in before if not n.startswith(("fc_norm", "head"))}
        assert torch.equal(vit.fc_norm.weight, torch.ones(96))  # MAE's norm, filled with others, is not in it
        assert vit.pos_embed.requires_grad
        assert report.matched == 148 and set(report.fresh) == {n for n in before if n.startswith(("fc_norm", "head"))}
        assert f"loaded 148 of 152 tensors from {path}" in str(report).splitlines()[0]
        assert "fresh fc_norm (2), head (2); left out decoder (20), norm (2)" in str(report)
        assert ("WARNING: head count is not in the file, 12 assumed" in str(report)) == path.name.startswith("b")


def test_positions_are_resized_as_by_hand(tmp_path):
    source = classifier()  # a grid of 4 x 4
    for size, grid in (((64, 16), (8, 2)), ((64, 64), (8, 8)), ((16, 24), (2, 3))):  # 8 x 2 are as many as 4 x 4
        table = source.pos_embed.detach()[:, 1:].reshape(1, 4, 4, 96).permute(0, 3, 1, 2)
        table = F.interpolate(table, size=grid, mode="bicubic", antialias=True, align_corners=False)
        expected = torch.cat([source.pos_embed.detach()[:, :1], table.flatten(2).transpose(1, 2)], dim=1)
        for path in (own_file(tmp_path / "a.pt", source), saved(tmp_path / "b.pth", source.state_dict())):
            vit = build_vit(**{**SMALL, "img_size": size}, num_classes=5)
            if grid == (8, 2) and path.name == "b.pth":  # 8 x 2 or 4 x 4? Nothing in the file says
                with pytest.raises(FormatError, match=r"16 patches, \(8, 2\) or \(4, 4\)"):
                    load_encoder(vit, read_weights(path))
                continue
            report = load_encoder(vit, read_weights(path))
            assert_close(vit.pos_embed, expected, 1e-6)
            assert f"positions resized from 4x4 to {grid[0]}x{grid[1]}" in str(report)


def test_a_grid_that_is_not_square_comes_from_the_settings_or_is_refused(tmp_path):
    source = classifier(img_size=(16, 64))  # 2 x 8: taken for 4 x 4 where no settings say otherwise
    vit = classifier(img_size=(64, 16))
    load_encoder(vit, read_weights(own_file(tmp_path / "a.pt", source)))
    table = source.pos_embed.detach()[:, 1:].reshape(1, 2, 8, 96).permute(0, 3, 1, 2)
    table = F.interpolate(table, size=(8, 2), mode="bicubic", antialias=True)
    assert_close(vit.pos_embed[:, 1:], table.flatten(2).transpose(1, 2), 1e-6)
    same = classifier(img_size=(16, 64))
    assert "resized" not in str(load_encoder(same, read_weights(tmp_path / "a.pt")))
    assert torch.equal(same.pos_embed, source.pos_embed)
    foreign = saved(tmp_path / "b.pth", classifier(img_size=(16, 24)).state_dict())
    with pytest.raises(FormatError, match="b.pth has positions for 6 patches"):
        load_encoder(classifier(), read_weights(foreign))
    with pytest.raises(FormatError, match="6 patches"):
        load_model(foreign)
    assert load_model(foreign, img_size=(16, 24)).config["img_size"] == [16, 24]


@torch.no_grad()
def test_one_channel_reads_a_grey_image_as_rgb(tmp_path):
    source, grey = classifier(), images(channels=1)
    weights = read_weights(own_file(tmp_path / "a.pt", source))
    vit = classifier(in_chans=1)
    report = load_encoder(vit, weights, keep_head=True)
    assert_close(vit(grey), source(grey.expand(-1, 3, -1, -1)), 1e-5)
    assert "input channels summed from 3 to 1" in str(report)
    wide = classifier(in_chans=6)  # the same image twice: scaled by half, it gives the same tokens
    assert "repeated and scaled from 3 to 6" in str(load_encoder(wide, weights, keep_head=True))
    assert_close(wide(images().repeat(1, 2, 1, 1)), source(images()), 1e-5)
    grey_source, back = classifier(in_chans=1), classifier()
    report = load_encoder(back, read_weights(own_file(tmp_path / "g.pt", grey_source)), keep_head=True)
    assert_close(back(grey.expand(-1, 3, -1, -1)), grey_source(grey), 1e-5)  # and the other way round
    assert "input channel shared out to 3" in str(report)
    with pytest.raises(FormatError, match=r"proj.weight \[96, 4, 8, 8\] for \[96, 3, 8, 8\]"):
        load_encoder(classifier(), read_weights(own_file(tmp_path / "b.pt", classifier(in_chans=4))))


def test_another_number_of_heads_is_refused(tmp_path):
    weights = read_weights(own_file(tmp_path / "a.pt", autoencoder(num_heads=3)))
    vit = classifier()
    before = copy_of(vit.state_dict())
    with pytest.raises(FormatError, match="a.pt has 3 heads and the model 12.*--num-heads 3"):
        load_encoder(vit, weights)
    assert not changed(vit, before)
    assert load_encoder(classifier(num_heads=3), weights).matched == 148


@pytest.mark.parametrize("k", [0, 1, 5, 12])
def test_keep_blocks_loads_exactly_the_leading_blocks(tmp_path, k):
    source = autoencoder()
    weights = read_weights(saved(tmp_path / "a.pth", source.state_dict()))
    vit = build_vit(**SMALL, num_classes=5)
    with torch.no_grad():
        for parameter in vit.parameters():  # a value that nothing in the file has
            parameter.fill_(7.0)
    before = copy_of(vit.state_dict())
    report = load_encoder(vit, weights, keep_blocks=k)
    expected = set() if k == 0 else {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"} | {
        n for n in before if n.startswith("blocks.") and int(n.split(".")[1]) < k}
    assert changed(vit, before) == expected and report.matched == len(expected) == (k > 0) * 4 + 12 * k
    assert all(torch.equal(vit.state_dict()[n], source.state_dict()[n]) for n in expected)


def test_keep_blocks_out_of_range_and_unknown_tensors_are_refused(tmp_path):
    weights = read_weights(saved(tmp_path / "a.pth", autoencoder().state_dict()))
    for k in (-1, 13):
        with pytest.raises(FormatError, match=f"keep-blocks {k}: the model has 12 blocks"):
            load_encoder(classifier(), weights, keep_blocks=k)
    for name in ("blocks.0.extra.weight", "surprise"):
        weights.state[name] = torch.zeros(1)
        with pytest.raises(FormatError, match=name):
            load_encoder(classifier(), weights, keep_blocks=1)
        del weights.state[name]
    del weights.state["blocks.3.norm1.bias"]  # needed for 4 blocks, not for 3
    assert load_encoder(classifier(), weights, keep_blocks=3).matched == 40
    with pytest.raises(FormatError, match=r"missing 1 \(blocks.3.norm1.bias\)"):
        load_encoder(classifier(), weights, keep_blocks=4)


def test_what_is_not_explained_is_refused_with_counts_and_the_model_stays_as_it_was(tmp_path):
    state = autoencoder().state_dict()
    cases = [({**state, "blocks.12.norm1.weight": torch.zeros(96)}, r"unexpected 1 \(blocks.12.norm1.weight\)"),
             ({**state, "fc_norm2.weight": torch.zeros(1)}, r"unexpected 1 \(fc_norm2.weight\)"),
             ({n: v for n, v in state.items() if not n.startswith("blocks.11.")},
              r"missing 12 \(blocks.11.norm1.weight, .*, \.\.\.\), unexpected 0"),
             ({**state, "cls_token": torch.zeros(1, 1, 64)}, r"cls_token \[1, 1, 64\] for \[1, 1, 96\]"),
             ({"patch_embed.proj.weight": state["patch_embed.proj.weight"]}, "missing 147")]
    vit = classifier()
    before = copy_of(vit.state_dict())
    for content, message in cases:
        with pytest.raises(FormatError, match=message):
            load_encoder(vit, read_weights(saved(tmp_path / "a.pth", content)))
    for other in (classifier(patch_size=4), fill_by_name(build_vit("vit_tiny", img_size=32, patch_size=8))):
        with pytest.raises(FormatError, match="pass --patch-size 4|pass --model vit_tiny"):
            load_encoder(vit, read_weights(own_file(tmp_path / "b.pt", other)))
    with pytest.raises(FormatError, match=r"unexpected 2 \(fc_norm"):  # pooled: its norm has no place before a token
        load_encoder(classifier(global_pool="token"), read_weights(own_file(tmp_path / "c.pt", classifier())))
    assert not changed(vit, before)


@torch.no_grad()
@pytest.mark.parametrize(("settings", "remedy"), [
    ({"model": "vit_tiny"}, "a.pt is 192 wide and the model 96: pass --model vit_tiny"),
    ({"patch_size": 16}, "a.pt has patches of 16 px and the model of 8: pass --patch-size 16"),
    ({"model": "vit_demo_rpe"}, "a.pt has relative positions and the model has none: pass --model vit_demo_rpe")])
def test_another_size_or_kind_says_which_argument_to_change(tmp_path, settings, remedy):
    source = own_file(tmp_path / "a.pt", build_model(**{**SMALL, "num_classes": 5, "num_heads": 12, **settings}))
    with pytest.raises(FormatError, match=remedy):
        load_encoder(classifier(), read_weights(source))


def test_the_published_classifier_with_relative_positions_is_rebuilt(tmp_path):
    """From a file of tensors alone. Even the number of heads is known: a table has a column for each head."""
    source = build_model("vit_demo_rpe", img_size=32, patch_size=8, num_classes=5, num_heads=6).eval()
    torch.nn.init.normal_(source.blocks[3].attn.relative_position_bias_table)
    again = load_model(saved(tmp_path / "a.pth", source.state_dict())).eval()
    assert again.config == source.config
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(again(images), source(images))
    without = {name: value for name, value in source.state_dict().items() if not name.startswith("head.")}
    with pytest.raises(FormatError, match="relative positions and is no classifier"):
        load_model(saved(tmp_path / "b.pth", without))


def test_the_head_is_dropped_or_kept(tmp_path):
    source = classifier()
    weights = read_weights(own_file(tmp_path / "a.pt", source))
    for keep in (False, True):
        vit = build_vit(**SMALL, num_classes=5).eval()
        assert load_encoder(vit, weights, keep_head=keep).matched == 150 + 2 * keep  # fc_norm comes along either way
        assert torch.equal(vit(images()), source(images())) == keep
    other = build_vit(**SMALL, num_classes=6)
    assert load_encoder(other, weights).matched == 150
    with pytest.raises(FormatError, match="classifies 5 classes after fc_norm.weight, the model 6"):
        load_encoder(other, weights, keep_head=True)
    token = read_weights(own_file(tmp_path / "b.pt", classifier(global_pool="token")))  # its head reads norm
    assert load_encoder(classifier(), token).matched == 148
    with pytest.raises(FormatError, match="after norm.weight, .* --global-pool token"):
        load_encoder(classifier(), token, keep_head=True)
    with pytest.raises(FormatError, match="keep_blocks=3"):
        load_encoder(classifier(), weights, keep_blocks=3, keep_head=True)


def test_a_second_head_stays_behind_or_is_asked_for(tmp_path):
    """A training that starts from a distilled classifier drops both heads; an evaluation needs both."""
    source = classifier()
    second = {"dist_norm.weight": torch.ones(96), "dist_norm.bias": torch.zeros(96),
              "head_dist.weight": torch.ones(5, 96), "head_dist.bias": torch.zeros(5)}
    torch.save({"model": {**source.state_dict(), **second}, "config": source.config}, tmp_path / "a.pt")
    weights, target = read_weights(tmp_path / "a.pt"), classifier()
    assert set(second) <= set(load_encoder(target, weights).left_out)
    with pytest.raises(FormatError, match="second head: appendix/finetune_distilled.py"):
        load_encoder(target, weights, keep_head=True)


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_r_s16_p8_224"])
def test_what_is_no_plain_vit_is_said_to_be_none(name):
    """A network without patches, and a hybrid, in which a ResNet embeds the patches."""
    state = timm.create_model(name).state_dict()
    weights = Weights(state, None, f"timm:{name}", "timm", [])
    with pytest.raises(FormatError, match=f"timm:{name} is no plain ViT"):
        load_encoder(build_vit("vit_tiny"), weights)


@pytest.mark.parametrize(("names", "read"), [
    (["cat", "dog"], ["cat", "dog"]), (("cat", "dog"), ["cat", "dog"]), ({"0": "cat", "1": "dog"}, ["cat", "dog"]),
    ([7, 9], ["7", "9"]), (None, None)])
def test_class_names_of_a_timm_folder(tmp_path, monkeypatch, names, read):
    """timm allows a list, a tuple or a dict from number to name."""
    model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=2, img_size=32)
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": names}
    monkeypatch.setattr(timm, "create_model", lambda *args, **settings: model)
    assert read_weights("timm:vit_tiny_patch16_224").classes == read


def test_positions_of_a_foreign_file_that_is_not_square(tmp_path):
    """20 patches are not a square: they have the model's grid if it has 20 patches, else the size must be given."""
    source = classifier(img_size=(16, 80), patch_size=8)
    torch.save(source.state_dict(), tmp_path / "a.pth")
    weights, same = read_weights(tmp_path / "a.pth"), classifier(img_size=(16, 80), patch_size=8)
    assert not any("resized" in note for note in load_encoder(same, weights).notes)
    assert torch.equal(same.pos_embed, source.pos_embed)
    with pytest.raises(FormatError, match="positions for 20 patches .* --img-size"):
        load_encoder(classifier(img_size=(16, 96), patch_size=8), weights)


def test_a_distilled_deit_is_refused(tmp_path):
    deit = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=5)
    path = saved(tmp_path / "deit.pth", {"model": deit.state_dict()})
    assert deit.pos_embed.shape[1] == 198
    plain = build_vit(num_classes=5, global_pool="token", num_heads=3)
    for attempt in (lambda: load_encoder(plain, read_weights(path)), lambda: load_model(path)):
        with pytest.raises(FormatError, match="deit.pth is a distilled DeiT"):
            attempt()


def test_timm_models_can_be_loaded_into(tmp_path):
    source = classifier(global_pool="token", reg_tokens=2, num_heads=6)
    vit = timm.create_model("vit_tiny_patch16_224", embed_dim=96, patch_size=8, img_size=64, num_classes=5, num_heads=6,
                            reg_tokens=2).eval()
    report = load_encoder(vit, read_weights(own_file(tmp_path / "a.pt", source)))
    assert report.matched == 151 and torch.equal(vit.pos_embed[:, :3], source.pos_embed[:, :3])
    assert torch.equal(vit.norm.weight, source.norm.weight)


# The model of a file.

@torch.no_grad()
@pytest.mark.parametrize("model", [
    {"make": classifier}, {"make": classifier, "global_pool": "token", "num_heads": 3, "img_size": (16, 24)},
    {"make": classifier, "num_classes": 0, "in_chans": 1, "reg_tokens": 2, "patch_size": 4},
    {"make": autoencoder, "num_heads": 6, "decoder_heads": 2, "decoder_depth": 2, "decoder_dim": 32,
     "img_size": (16, 24)},
], ids=["pooled", "token", "encoder", "mae"])
def test_load_model_rebuilds_ours_and_foreign_files(tmp_path, model, capsys):
    settings = dict(model)
    original = settings.pop("make")(**settings)
    x = images(original.config["in_chans"], original.config["img_size"])
    noise = torch.rand(2, original.num_patches) if isinstance(original, MAE) else None
    outputs = original(x) if noise is None else original(x, noise)
    known = {name: settings[name] for name in ("num_heads", "decoder_heads", "img_size") if name in settings}
    for path, given in ((own_file(tmp_path / "a.pt", original), {"num_heads": None}),
                        (saved(tmp_path / "b.pth", {"model": original.state_dict()}), known)):
        capsys.readouterr()
        rebuilt = load_model(path, **given).eval()
        assert rebuilt.config == original.config and type(rebuilt) is type(original)
        assert torch.equal(rebuilt(x) if noise is None else rebuilt(x, noise), outputs)
        assumed = "b.pth" in path.name and "num_heads" not in settings
        assert ("num_heads 12 ASSUMED" in capsys.readouterr().out) == assumed


def test_load_model_of_a_foreign_mae_needs_to_be_told_its_decoder_heads(tmp_path, capsys):
    path = saved(tmp_path / "a.pth", {"model": autoencoder(decoder_heads=6).state_dict()})
    assert load_model(path).config["decoder_heads"] == 3
    assert "decoder_heads 3 ASSUMED" in capsys.readouterr().out
    assert load_model(path, decoder_heads=6).config["decoder_heads"] == 6


def test_load_model_refuses_what_contradicts_the_file(tmp_path):
    path = own_file(tmp_path / "a.pt", classifier())
    for wrong in ({"num_heads": 3}, {"num_classes": 4}, {"model": "vit_tiny"}, {"in_chans": 1},
                  {"global_pool": "token"}):
        with pytest.raises(FormatError, match=f"has {next(iter(wrong))} = "):
            load_model(path, **wrong)
    assert_close(load_model(path, img_size=32, num_heads=12, drop_path=0.1).blocks[-1].drop_path1.drop_prob, 0.1, 1e-6)
    mae = own_file(tmp_path / "b.pt", autoencoder())
    assert load_model(mae, mask_ratio=0.5).num_visible == 8
    with pytest.raises(TypeError, match="nonsense"):
        load_model(path, nonsense=1)
    state = classifier().state_dict()
    for content in ({n: v for n, v in state.items() if n != "head.bias"}, {**state, "extra": torch.zeros(1)}):
        with pytest.raises(FormatError, match=r"missing 1 \(head.bias\)|unexpected 1 \(extra\)"):
            load_model(saved(tmp_path / "c.pth", content))
    odd = {n: v for n, v in state.items() if not n.startswith("blocks.11.")}
    with pytest.raises(FormatError, match="width and depth"):
        load_model(saved(tmp_path / "d.pth", odd))


# timm.

def test_hub_weights_come_with_their_own_heads(monkeypatch):
    build, asked = timm.create_model, []

    def hub(name, pretrained):
        asked.append((name, pretrained))
        return fill_by_name(build(name, num_classes=5), fill_positions=True)

    monkeypatch.setattr(timm, "create_model", hub)
    weights = read_weights("timm:vit_tiny_patch16_224.augreg_in21k")
    assert asked == [("vit_tiny_patch16_224.augreg_in21k", True)]
    assert weights.config == {"model": "vit_tiny", "img_size": [224, 224], "patch_size": 16, "in_chans": 3,
                              "num_classes": 5, "num_heads": 3, "global_pool": "token", "class_token": True,
                              "reg_tokens": 0, "no_embed_class": False, "init_values": None}
    with pytest.raises(FormatError, match="3 heads and the model 12"):
        load_encoder(build_vit(), weights)
    model = load_model("timm:vit_tiny_patch16_224")
    assert model.blocks[0].attn.num_heads == 3 and fingerprint(model.state_dict()) == weights.fingerprint
    assert load_model("timm:resnet10t").config is None


def test_an_unreachable_hub_says_how_to_get_the_file(monkeypatch):
    def hub(name, pretrained):
        raise ConnectionError("no route")

    monkeypatch.setattr(timm, "create_model", hub)
    with pytest.raises(FormatError, match="no route.*fetch.*model.safetensors of huggingface.co/timm/vit_tiny"):
        load_model("timm:vit_tiny_patch16_224")


def test_leading_blocks_and_required_names_agree():
    """With as many blocks as the model has, keep_blocks requires the same tensors as loading without it."""
    state = classifier().state_dict()
    assert set(leading_blocks(state, 12)) == {n for n in state if not n.startswith(("norm.", "fc_norm.", "head."))}
