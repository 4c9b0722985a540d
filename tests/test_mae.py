"""The fast MAE against reference values, and against the straightforward one on random input."""
import pytest
import torch
from straightforward_mae import StraightforwardMAE
from torch import nn

from appendix.tools.reconstruct import predict_all
from common import mae as mae_module
from common.errors import UserError
from common.mae import MAE, normalise_patches
from common.vit import SIZES
from tests.helpers import assert_close, fill_by_name, golden, parameter_count


@pytest.fixture
def golden_mae(monkeypatch):
    """Our model at the reference's size, filled by name, with the reference's arrays."""
    values = golden("mae")
    c = values["config"]
    monkeypatch.setitem(SIZES, "golden", {"embed_dim": c["dim"], "depth": c["depth"]})
    monkeypatch.setitem(mae_module.DECODERS, "golden", (c["dd"], c["ddepth"], c["dh"]))

    def build(norm_pix=True):
        model = MAE("golden", img_size=c["img"], patch_size=c["patch"], num_heads=c["heads"], mask_ratio=c["ratio"],
                    norm_pix=norm_pix)
        return fill_by_name(model)
    return build, {k: torch.as_tensor(v) for k, v in values.items() if k != "config"}


def test_reference_loss_and_gradients(golden_mae):
    build, values = golden_mae
    model = build()
    loss = model(values["images"], values["noise"])
    loss.backward()
    assert_close(loss, values["loss"], 1e-5)
    assert_close(build(norm_pix=False)(values["images"], values["noise"]), values["loss_without_norm_pix"], 1e-5)
    names = [name for name in values if name.startswith("grad_norm/")]
    assert {n.removeprefix("grad_norm/") for n in names} == {n for n, p in model.named_parameters() if p.requires_grad}
    for name in names:
        assert_close(model.get_parameter(name.removeprefix("grad_norm/")).grad.norm(), values[name], 1e-4)


def test_reference_reconstruction_and_positions(golden_mae):
    build, values = golden_mae
    model = build()
    with torch.no_grad():
        pred, mask = predict_all(model, values["images"], values["noise"])
    assert_close(pred, values["pred"], 1e-5)
    assert torch.equal(mask, values["mask"].to(mask.dtype))
    assert_close(model.pos_embed, values["pos_embed"], 1e-5)
    assert_close(model.decoder_pos_embed, values["decoder_pos_embed"], 1e-5)


@pytest.mark.parametrize(("size", "patch", "channels", "ratio", "depth"), [
    (32, 4, 3, 0.75, 1), ((32, 64), 8, 1, 0.6, 2), ((224, 160), 16, 3, 0.9, 1), (96, 16, 5, 0.5, 1)])
def test_equals_the_straightforward_mae(size, patch, channels, ratio, depth):
    """Loss and every gradient, at square and oblong sizes, other channel counts, ratios and decoder depths."""
    torch.manual_seed(0)
    fast = MAE("vit_demo", img_size=size, patch_size=patch, in_chans=channels, mask_ratio=ratio, decoder_depth=depth)
    slow = StraightforwardMAE(img_size=size, patch_size=patch, in_chans=channels, embed_dim=96, depth=12, num_heads=12,
                              decoder_embed_dim=48, decoder_depth=depth, decoder_num_heads=3)
    slow.load_state_dict(fast.state_dict())
    height, width = fast.config["img_size"]
    images, noise = torch.randn(3, channels, height, width), torch.rand(3, fast.num_patches)
    loss = fast(images, noise)
    expected, _, mask = slow(images, noise, mask_ratio=ratio)
    assert int(mask[0].sum()) == fast.num_patches - fast.num_visible
    loss.backward()
    expected.backward()
    assert_close(loss, expected, 1e-6)
    for name, parameter in slow.named_parameters():
        if parameter.requires_grad:
            assert_close(fast.get_parameter(name).grad, parameter.grad, 1e-4)


def test_epsilon_is_added_to_the_variance():
    """On a nearly flat patch the result depends on where epsilon is added, and on N - 1: compare with float64."""
    patch = torch.full((1, 8), 0.5)
    patch[0, 0] += 2e-3
    exact = patch.double()
    expected = (exact - exact.mean()) / torch.sqrt(exact.var(unbiased=True) + 1e-6)
    assert_close(normalise_patches(patch), expected.float(), 1e-4)
    assert normalise_patches(torch.full((1, 8), 0.3)).abs().max() < 1e-3  # a flat patch gives zeros, not NaN


def test_sizes_of_the_paper():
    """The paper's parameter counts and the patches kept at several ratios (floats bite: 0.8 keeps 39 of 196)."""
    model = MAE("vit_tiny")
    assert parameter_count(model) == 5_748_480
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 5_691_744
    assert parameter_count(MAE("vit_base")) == 111_907_840
    assert parameter_count(MAE("vit_small")) == 22_371_072
    assert [MAE("vit_demo", mask_ratio=r).num_visible for r in (0.75, 0.8, 0.6, 0.9)] == [49, 39, 78, 19]


def test_initial_values():
    """qkv xavier-uniform as one matrix (bound 0.0884), patch convolution on its flattened view with PyTorch's own bias,
    tokens normal 0.02, biases 0, norms 1 and 0; positions frozen, the class token's row zero."""
    torch.manual_seed(0)
    model = MAE("vit_tiny")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            bound = (6 / sum(module.weight.shape)) ** 0.5
            assert 0.98 * bound < module.weight.abs().max() <= bound, name
            assert abs(module.weight.std().item() / (bound / 3**0.5) - 1) < 0.02, name
            assert not module.bias.any(), name
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all() and not module.bias.any(), name
    assert abs((6 / (576 + 192)) ** 0.5 - 0.0884) < 1e-4  # qkv seen as one matrix
    conv = model.patch_embed.proj
    bound = (6 / (192 + 768)) ** 0.5
    assert 0.98 * bound < conv.weight.abs().max() <= bound
    assert 0 < conv.bias.abs().max() <= 768**-0.5  # Conv2d's default: uniform within 1 / sqrt(fan in)
    for token in (model.cls_token, model.mask_token):
        assert 0.013 < token.std() < 0.027
    assert not model.pos_embed.requires_grad and not model.decoder_pos_embed.requires_grad
    assert not model.pos_embed[0, 0].any()
    assert torch.allclose(model.pos_embed[0, 1 + 14 * 2 + 5, 0], torch.sin(torch.tensor(5.0)))  # column 5 comes first
    assert torch.allclose(model.pos_embed[0, 1 + 14 * 2 + 5, 96], torch.sin(torch.tensor(2.0)))  # then row 2


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="30 x 32.*--img-size"):
        MAE("vit_demo", img_size=(30, 32), patch_size=4)
    with pytest.raises(ValueError, match="not.*3, 32, 64"):
        MAE("vit_demo", img_size=(64, 32), patch_size=8)(torch.zeros(1, 3, 32, 64), torch.rand(1, 32))
    with pytest.raises(ValueError, match="mask-ratio 1.0"):
        MAE("vit_demo", mask_ratio=1.0)


@pytest.mark.parametrize(("heads", "flag"), [
    ({"num_heads": 5}, "--num-heads"), ({"decoder_heads": 5}, "--decoder-heads")])
def test_heads_that_do_not_divide_the_width_are_refused_by_their_own_argument(heads, flag):
    with pytest.raises(UserError, match=f"cannot be shared by 5 heads: choose a divisor as {flag}$"):
        MAE("vit_demo", img_size=32, patch_size=8, **heads)
