"""appendix/tools/reconstruct.py: what is drawn is what the model saw and predicted."""
from pathlib import Path

import numpy as np
import pytest
import torch

from appendix.tools import reconstruct
from common import checkpoint, options
from common.mae import MAE
from common.vit import build_vit
from tests.helpers import assert_close, settings_of


@pytest.fixture
def saved(tmp_path):
    def save(model):
        checkpoint.save_torch(tmp_path / "weights.pt", {"model": model.state_dict(), "config": model.config})
        return settings_of(reconstruct, {"checkpoint": str(tmp_path / "weights.pt"), "output": str(tmp_path),
                                         "num_images": 2})
    return save


def test_pixels_are_those_of_the_true_patch_where_the_prediction_is_perfect():
    """Normalising by hand and undoing it gives the patch back; raw pixels pass unchanged."""
    patches = torch.rand(2, 4, 48)
    normalised = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    assert_close(reconstruct.pixels_from(normalised, patches, norm_pix=True), patches, 1e-5)
    assert torch.equal(reconstruct.pixels_from(normalised, patches, norm_pix=False), normalised)


def test_visible_patches_stay_and_masked_ones_go():
    torch.manual_seed(0)
    model = MAE("vit_demo", img_size=(16, 32), patch_size=8)
    images, noise = torch.randn(2, 3, 16, 32), torch.rand(2, 8)
    masked, pasted, predicted = reconstruct.reconstruct(model, images, noise)
    for i in range(2):
        for patch in range(8):
            row, column = divmod(patch, 4)
            here = (i, slice(None), slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8))
            visible = bool(noise[i].argsort()[:2].eq(patch).any())
            assert torch.equal(masked[here], images[here] if visible else torch.zeros(3, 8, 8))
            assert torch.equal(pasted[here], images[here] if visible else predicted[here])


def test_the_script_writes_numbers_and_picture(saved, tmp_path):
    folder = reconstruct.main(saved(MAE("vit_demo", img_size=32, patch_size=8)))["folder"]
    with np.load(f"{folder}/reconstruction.npz") as arrays:
        assert {name: arrays[name].shape for name in arrays} == dict.fromkeys(
            ("input", "visible", "predicted", "predicted + visible"), (2, 32, 32, 3))
    assert Path(folder).parent == tmp_path / "reconstruct"
    assert (Path(folder) / "reconstruction.png").read_bytes().startswith(b"\x89PNG")


def test_the_checkpoint_alone_says_size_and_channels(saved, tmp_path):
    """One channel, not square: the generated images come so too, and nothing says otherwise."""
    folder = reconstruct.main(saved(MAE("vit_demo", img_size=(16, 32), patch_size=8, in_chans=1)))["folder"]
    with np.load(f"{folder}/reconstruction.npz") as arrays:
        assert arrays["input"].shape == (2, 16, 32, 1)
    with pytest.raises(SystemExit):
        settings_of(reconstruct, {"checkpoint": "x", "in_chans": 3})


def test_what_a_foreign_file_cannot_say(tmp_path, capsys):
    """Raw pixels, another share of patches, a size that is not square: given, the picture is that of our own file."""
    mae = MAE("vit_demo", img_size=(16, 32), patch_size=8, norm_pix=False, mask_ratio=0.5)
    checkpoint.save_torch(tmp_path / "ours.pt", {"model": mae.state_dict(), "config": mae.config})
    checkpoint.save_torch(tmp_path / "foreign.pth", {"model": mae.state_dict()})
    drawn = []
    for name, told in (("ours.pt", {}), ("foreign.pth", dict(raw_pixels=True, mask_ratio=0.5, img_size=[16, 32]))):
        explicit = {"checkpoint": str(tmp_path / name), "output": str(tmp_path), "num_images": 2, **told}
        folder = reconstruct.main(settings_of(reconstruct, explicit))["folder"]
        with np.load(f"{folder}/reconstruction.npz") as arrays:
            drawn.append(dict(arrays))
    assert all(np.array_equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
    usual = MAE("vit_demo", img_size=32, patch_size=8)
    checkpoint.save_torch(tmp_path / "usual.pt", {"model": usual.state_dict(), "config": usual.config})
    with pytest.raises(ValueError, match="norm_pix = True, not False"):
        reconstruct.main(settings_of(reconstruct, {
            "checkpoint": str(tmp_path / "usual.pt"), "output": str(tmp_path), "raw_pixels": True}))


def test_a_classifier_cannot_reconstruct(saved):
    args = saved(build_vit("vit_demo", img_size=32, patch_size=8, num_classes=2))
    args.raw_pixels = True
    with pytest.raises(ValueError, match="no MAE decoder"):
        reconstruct.main(args)


@pytest.mark.parametrize("flag", ["--checkpoint", "--init"])
def test_the_file_goes_by_either_name(flag):
    """As elsewhere too: --init in the probes, --checkpoint in the converter."""
    args = options.parse(reconstruct.build_parser(), reconstruct.PRESETS, argv=[flag, "a file.pt"])
    assert args.checkpoint == "a file.pt" and not hasattr(args, "init")
    assert options.to_argv({"checkpoint": "a file.pt"}) == ["--checkpoint", "a file.pt"]


def test_a_required_argument_is_asked_for(capsys):
    with pytest.raises(SystemExit):
        options.parse(reconstruct.build_parser(), reconstruct.PRESETS, argv=[])
    assert "--checkpoint" in capsys.readouterr().err
