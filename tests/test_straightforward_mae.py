"""The reference itself must be right: it gives the numbers of the public implementation, on CPU in a second."""
import pytest
import torch
from straightforward_mae import StraightforwardMAE

from tests.helpers import assert_close, fill_by_name, golden

GOLDEN = golden("mae")


def build(**changes):
    c = GOLDEN["config"]
    settings = {
        "img_size": c["img"], "patch_size": c["patch"],
        "embed_dim": c["dim"], "depth": c["depth"], "num_heads": c["heads"],
        "decoder_embed_dim": c["dd"], "decoder_depth": c["ddepth"], "decoder_num_heads": c["dh"],
    }
    return fill_by_name(StraightforwardMAE(**{**settings, **changes}))


def run(model):
    images, noise = torch.from_numpy(GOLDEN["images"]), torch.from_numpy(GOLDEN["noise"])
    return model(images, noise, GOLDEN["config"]["ratio"])


def test_forward_matches_the_reference():
    loss, pred, mask = run(build())
    assert_close(loss, GOLDEN["loss"], 1e-5)
    assert_close(pred, GOLDEN["pred"], 1e-5)
    assert_close(mask, GOLDEN["mask"], 0)


def test_loss_on_raw_pixels_matches_the_reference():
    assert_close(run(build(norm_pix_loss=False))[0], GOLDEN["loss_without_norm_pix"], 1e-5)


@pytest.mark.parametrize("name", ["pos_embed", "decoder_pos_embed"])
def test_position_tables_match_the_reference(name):
    assert_close(getattr(build(), name), GOLDEN[name], 1e-5)


def test_gradients_match_the_reference():
    model = build()
    run(model)[0].backward()
    trained = {f"grad_norm/{n}": p.grad.norm() for n, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == {key for key in GOLDEN if key.startswith("grad_norm/")}
    for key, norm in trained.items():
        assert_close(norm, GOLDEN[key], 1e-4)


def test_mae_tiny_has_the_published_size():
    model = StraightforwardMAE()
    assert sum(p.numel() for p in model.parameters()) == 5_748_480
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 5_691_744


@pytest.mark.parametrize("ratio, kept", [(0.75, 49), (0.8, 39), (0.6, 78), (0.9, 19)])
def test_kept_patches_are_those_of_least_noise(ratio, kept):
    noise = torch.rand(2, 196, generator=torch.Generator().manual_seed(0))
    tokens = torch.arange(196.0).expand(2, 196).unsqueeze(-1)
    visible, mask, _ = StraightforwardMAE(depth=1).random_masking(tokens, noise, ratio)
    for b in range(2):
        least = noise[b].sort().indices[:kept]
        assert visible[b, :, 0].tolist() == least.tolist()
        assert mask[b].nonzero().flatten().tolist() == sorted(set(range(196)) - set(least.tolist()))


def test_epsilon_is_added_to_the_variance():
    """The reference images are far from flat. On nearly flat ones and pred = 0, a patch costs (N-1)/N var/(var+eps)."""
    model, images = build(), 1e-3 * torch.from_numpy(GOLDEN["images"])
    var, size = model.patchify(images).var(dim=-1), 8 * 8 * 3  # var (B, L), about 1e-6
    loss = model.reconstruction_loss(images, torch.zeros(*var.shape, size), torch.ones_like(var))
    assert_close(loss, ((size - 1) / size * var / (var + 1e-6)).mean(), 1e-5)


def test_oblong_images():
    """Beyond the reference, which is square: 2 rows of 3 patches."""
    model = build(img_size=(16, 24))
    images = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    patch = images[1, :, 8:16, 16:24]  # row 1, column 2
    assert torch.equal(model.patchify(images)[1, 5], patch.permute(1, 2, 0).flatten())
    columns, rows = model.pos_embed[0, 1:, :24], model.pos_embed[0, 1:, 24:]
    assert torch.equal(columns[5], columns[2]) and torch.equal(rows[5], rows[3])
    assert not torch.equal(columns[5], columns[4]) and not torch.equal(rows[5], rows[2])
    with pytest.raises(ValueError, match="24, 16"):
        model(images.transpose(2, 3), torch.rand(2, 6))


def test_initial_weights():
    """Xavier over the whole matrix: qkv as one, the patch convolution as a Linear; tokens at 0.02."""
    torch.manual_seed(0)
    model = StraightforwardMAE(depth=1)
    bounds = {"blocks.0.attn.qkv.weight": (6 / (192 + 576)) ** 0.5, "patch_embed.proj.weight": (6 / (192 + 768)) ** 0.5}
    for name, bound in bounds.items():
        weight = model.get_parameter(name)
        assert 0.99 * bound < weight.abs().max() <= bound
        assert weight.is_leaf
    assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert model.patch_embed.proj.bias.abs().max() > 0 and model.blocks[0].attn.qkv.bias.abs().max() == 0


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="do not tile"):
        StraightforwardMAE(img_size=30, patch_size=8)
    with pytest.raises(ValueError, match="divisible by 4"):
        StraightforwardMAE(embed_dim=90, num_heads=3)
