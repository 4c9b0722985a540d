"""appendix/tools/convert_checkpoint.py: what goes out computes what came in, through timm's own loading too."""
import json

import pytest
import safetensors.torch
import timm
import torch

from appendix.tools import convert_checkpoint
from appendix.tools.convert_checkpoint import export_timm
from common.errors import UserError
from common.filling import load_encoder
from common.pretrained import FormatError, Weights, fingerprint, read_weights
from common.rebuilding import load_model
from common.vit import build_model, build_vit
from tests.helpers import assert_close, fill_by_name, settings_of
from tests.test_formats import autoencoder, classifier, images, latent, own_file


def convert(**given):
    return convert_checkpoint.main(settings_of(convert_checkpoint, given))


@pytest.mark.parametrize("model", [classifier, autoencoder])
@pytest.mark.parametrize("to", ["timm", "plain"])
def test_the_script_writes_reads_and_compares(tmp_path, model, to):
    source = own_file(tmp_path / "a.pt", model())
    result = convert(checkpoint=str(source), to=to, output=str(tmp_path / "out"))
    assert result["difference"] < 1e-6
    if to == "plain":
        again = torch.load(tmp_path / "out", weights_only=True)
        assert next(iter(again)) == "model" and list(again["model"]) == list(model().state_dict())


def test_moco_s_names_come_back_as_its_encoder(tmp_path):
    source = own_file(tmp_path / "a.pt", classifier(global_pool="token"))
    assert convert(checkpoint=str(source), to="mocov3", output=str(tmp_path / "out.pth.tar"))["difference"] < 1e-6
    written = torch.load(tmp_path / "out.pth.tar", weights_only=True)["state_dict"]
    assert all(name.startswith("module.base_encoder.") and ".head." not in name for name in written)
    assert read_weights(tmp_path / "out.pth.tar").config["num_classes"] == 0
    for model in (classifier(), autoencoder()):
        with pytest.raises(UserError, match="Choose --to plain"):
            convert(checkpoint=str(own_file(tmp_path / "b.pt", model)), to="mocov3", output=str(tmp_path / "c"))


@pytest.mark.parametrize("to", ["plain", "mocov3"])
def test_what_other_readers_do_not_see_is_printed_and_ours_read_it(tmp_path, capsys, to):
    """Heads, mean and std, a size that is not square, in a folder that is not there yet."""
    vit = classifier(num_heads=6, img_size=(16, 64), global_pool="token")
    statistics = {"mean": [0.5, 0.4, 0.3], "std": [0.229, 0.224, 0.225]}
    torch.save({"model": vit.state_dict(), "config": vit.config, "statistics": statistics}, tmp_path / "a.pt")
    convert(checkpoint=str(tmp_path / "a.pt"), to=to, output=str(tmp_path / "new" / "out.pth"))
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == "tell other projects' readers: --num-heads 6 --img-size 16 64 --mean 0.5 0.4 0.3"
    again, x = read_weights(tmp_path / "new" / "out.pth"), images(size=(16, 64))
    assert again.statistics == statistics and "imagenet" not in capsys.readouterr().out
    assert torch.equal(load_model(again).eval().forward_features(x), vit.forward_features(x))
    usual = own_file(tmp_path / "b.pt", classifier(num_heads=12, global_pool="token"))
    convert(checkpoint=str(usual), to=to, output=str(tmp_path / "out.pth"))
    assert "other projects" not in capsys.readouterr().out


def test_other_models_are_refused_in_one_line(tmp_path, monkeypatch):
    resnet = timm.create_model("resnet10t")
    resnet.config = None  # as read_weights leaves it
    weights = Weights(resnet.state_dict(), None, "timm:resnet10t", "timm", [], resnet)
    monkeypatch.setattr(convert_checkpoint, "read_weights", lambda source: weights)
    with pytest.raises(UserError, match="timm:resnet10t is a ResNet"):
        convert(checkpoint="timm:resnet10t", to="timm", output=str(tmp_path / "out"))


def test_the_script_refuses_another_function(tmp_path, monkeypatch):
    """As if what was written did not come back: the head count lost on the way."""
    source = own_file(tmp_path / "a.pt", classifier(num_heads=12))
    load = load_model

    def forgetful(source, **given):
        model = load(source, **given)
        if "unchecked" in str(source):
            for block in model.blocks:
                block.attn.num_heads, block.attn.head_dim, block.attn.scale = 3, 32, 32**-0.5
        return model
    monkeypatch.setattr(convert_checkpoint, "load_model", forgetful)
    with pytest.raises(UserError, match="computes something else"):
        convert(checkpoint=str(source), to="plain", output=str(tmp_path / "out.pth"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]
    relative = own_file(tmp_path / "b.pt", build_model("vit_demo_rpe", img_size=32, patch_size=8, num_classes=5))
    with pytest.raises(UserError, match="b.pt has relative positions, which no plain ViT has"):
        convert(checkpoint=str(relative), to="plain", output=str(tmp_path / "out.pth"))


@torch.no_grad()
def test_export_travels_through_timm_with_its_heads(tmp_path):
    vit = fill_by_name(build_vit("vit_tiny", num_classes=7, global_pool="token"), fill_positions=True).eval()
    export_timm(vit, tmp_path / "out", mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.1), class_names=list("abcdefg"))
    x = images(size=(224, 224))[:1]
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert torch.equal(loaded(x), vit(x)) and loaded.blocks[0].attn.num_heads == 12
    cfg = loaded.pretrained_cfg
    assert tuple(cfg["mean"]) == (0.5, 0.4, 0.3) and tuple(cfg["std"]) == (0.2, 0.2, 0.1) and cfg["crop_pct"] == 0.875
    assert tuple(cfg["input_size"]) == (3, 224, 224) and cfg["num_classes"] == 7 and cfg["interpolation"] == "bicubic"
    assert list(cfg["label_names"]) == list("abcdefg")
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=7).eval()  # 3 heads: it loads, and is wrong
    plain.load_state_dict(safetensors.torch.load_file(tmp_path / "out" / "model.safetensors"))
    assert (plain(x) - vit(x)).abs().max() > 0.05 * vit(x).abs().max()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"img_size": (16, 64), "in_chans": 1, "patch_size": 4, "num_heads": 6},
                                      {"class_token": False, "reg_tokens": 3, "num_classes": 0}])
def test_export_of_other_sizes_and_back(tmp_path, settings):
    vit = classifier(**settings)
    channels, size = vit.config["in_chans"], vit.config["img_size"]
    export_timm(vit, tmp_path, [0.5] * channels, [0.2] * channels)
    x = images(channels, size)
    for loaded in (timm.create_model(f"local-dir:{tmp_path}", pretrained=True), load_model(tmp_path)):
        assert torch.equal(loaded.eval()(x), vit(x))
    weights = read_weights(tmp_path)
    assert weights.config == vit.config == loaded.config and weights.fingerprint == fingerprint(vit.state_dict())
    assert load_encoder(classifier(**settings), weights).notes == []
    for wrong in ({"num_heads": 3}, {"nonsense": 1}):
        with pytest.raises(FormatError, match=next(iter(wrong))):
            load_model(tmp_path, **wrong)


@torch.no_grad()
def test_export_of_a_timm_model_that_pools_after_its_norm(tmp_path):
    vit = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, num_classes=5, global_pool="avg",
                            fc_norm=False)
    fill_by_name(vit, fill_positions=True).eval()
    export_timm(vit, tmp_path, (0.5,) * 3, (0.5,) * 3)
    loaded = load_model(tmp_path).eval()
    assert torch.equal(loaded(images()), vit(images()))
    assert loaded.config["global_pool"] == "avg" and loaded.config["model"] is None  # 2 blocks: no size of ours


@torch.no_grad()
def test_export_of_an_encoder(tmp_path):
    mae = autoencoder(num_heads=6, img_size=(16, 64))
    export_timm(mae, tmp_path, (0.5,) * 3, (0.5,) * 3)
    loaded, x = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval(), images(size=(16, 64))
    assert_close(loaded.forward_features(x), latent(mae, x), 1e-5)
    assert_close(loaded(x), latent(mae, x)[:, 0], 1e-5)
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["num_classes"] == 0 and content["model_args"]["global_pool"] == "token"


def test_export_refuses_what_timm_s_plain_vit_cannot_be(tmp_path):
    for model, error in ((timm.create_model("deit_tiny_distilled_patch16_224"), UserError),
                         (timm.create_model("vit_tiny_patch16_224", qk_norm=True, depth=1), FormatError),
                         (timm.create_model("vit_tiny_patch16_224", pre_norm=True, depth=1), FormatError)):
        with pytest.raises(error):
            export_timm(model, tmp_path / "out", (0.5,) * 3, (0.5,) * 3)
    for mean, names in (((0.5,), None), ((0.5,) * 3, ["a"])):
        with pytest.raises(UserError, match="do not suit"):
            export_timm(classifier(), tmp_path / "out", mean, (0.5,) * 3, names)
    assert not (tmp_path / "out").exists()
