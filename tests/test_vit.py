"""common/vit.py against reference values, published parameter counts, timm 0.4.12's initial values, and by hand."""
import pytest
import torch
import torch.nn.functional as F

from common.filling import leading_blocks
from common.vit import (
    SIZES,
    build_vit,
    eval_mode,
    pair,
    patch_grid,
    set_fused_attention,
)
from sec4_analysis.attention import attention_logits
from tests.helpers import assert_close, fill_by_name, golden, parameter_count


def demo(**settings):
    return build_vit("vit_demo", **{"img_size": 32, "patch_size": 8, "num_classes": 5, **settings})


def images(height=32, width=32, channels=3, batch=2):
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(0))


# Reference values

@torch.no_grad()
def test_reference_logits(monkeypatch):
    values = golden("finetune_forward")
    c = values["config"]
    monkeypatch.setitem(SIZES, "golden", {"embed_dim": c["dim"], "depth": c["depth"]})
    vit = build_vit("golden", img_size=c["img"], patch_size=c["patch"], num_classes=11, num_heads=c["heads"])
    fill_by_name(vit, fill_positions=True).eval()
    for model in (vit, set_fused_attention(vit, "cpu", torch.bfloat16)):
        assert_close(model(torch.from_numpy(values["images"])), values["logits"], 1e-5)


@torch.no_grad()
def test_reference_block(monkeypatch):
    values = golden("block")
    heads, tokens = int(values["heads"]), torch.from_numpy(values["tokens"])
    monkeypatch.setitem(SIZES, "golden", {"embed_dim": tokens.shape[-1], "depth": 1})
    block = fill_by_name(build_vit("golden", img_size=32, patch_size=8, num_heads=heads).blocks[0]).eval()
    assert_close(attention_logits(block.attn, block.norm1(tokens)), values["attention_logits"], 1e-5)
    assert_close(block(tokens), values["output"], 1e-5)


@torch.no_grad()
def test_logits_are_what_the_attention_takes_the_softmax_of():
    """Attention computed from `attention_logits` and the values equals the module's own output."""
    attention = fill_by_name(demo().blocks[0].attn).eval()
    x = torch.randn(3, 17, 96, generator=torch.Generator().manual_seed(1))
    weights = attention_logits(attention, x).softmax(dim=-1)
    assert weights.shape == (3, 12, 17, 17)
    value = F.linear(x, attention.qkv.weight[192:], attention.qkv.bias[192:]).view(3, 17, 12, 8).transpose(1, 2)
    expected = attention.proj((weights @ value).transpose(1, 2).reshape(3, 17, 96))
    assert_close(attention(x), expected, 1e-5)


# Sizes

def test_published_parameter_counts():
    """The paper gives 5.7M for ViT-Tiny. The meta device allocates and initialises nothing."""
    with torch.device("meta"):
        assert parameter_count(build_vit()) == 5_717_416
        assert parameter_count(build_vit(num_heads=3)) == 5_717_416
        assert parameter_count(build_vit(global_pool="token")) == 5_717_416
        for classes in (2, 100, 365):
            assert parameter_count(build_vit(num_classes=classes)) == 5_524_416 + 193 * classes
        assert parameter_count(build_vit("vit_small")) == 22_050_664
        assert parameter_count(build_vit("vit_base", num_classes=0)) == 85_798_656
        for name, size in SIZES.items():
            assert len(build_vit(name, num_classes=1).blocks) == size["depth"] == 12


def test_details_of_the_architecture():
    """Head width 16, scale 0.25, MLP ratio 4, qkv bias, exact GELU, norms with eps 1e-6, no dropout."""
    with torch.device("meta"):
        vit = build_vit()
    attention = vit.blocks[0].attn
    assert (attention.num_heads, attention.head_dim, attention.scale) == (12, 16, 0.25)
    assert attention.qkv.bias is not None and vit.blocks[0].mlp.fc1.out_features == 768
    gelus = [m for m in vit.modules() if isinstance(m, torch.nn.GELU)]
    norms = [m for m in vit.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert len(gelus) == 12 and all(gelu.approximate == "none" for gelu in gelus)
    assert len(norms) == 25 and all(norm.eps == 1e-6 for norm in norms)
    assert all(m.p == 0 for m in vit.modules() if isinstance(m, torch.nn.Dropout))
    assert vit.pos_embed.shape == (1, 197, 192)


@torch.no_grad()
def test_the_number_of_heads_changes_the_function_and_not_the_shapes():
    twelve, three = demo(), demo(num_heads=3)
    three.load_state_dict(twelve.state_dict())
    assert not torch.allclose(twelve.eval()(images()), three.eval()(images()), atol=1e-4)


# Initial values

def test_initial_values():
    """As timm 0.4.12: normal of std 0.02, cut only at +-2, for Linear weights (the head too), positions, class token,
    registers; biases 0, norms 1 and 0; the patch convolution as PyTorch makes it. Every tensor is one of these.
    """
    torch.manual_seed(0)
    vit = build_vit(reg_tokens=4)
    seen = set()
    for name, value in vit.named_parameters():
        value = value.detach().flatten()
        if name.startswith("patch_embed.proj"):  # uniform within 1 / sqrt(fan in)
            bound = (3 * 16 * 16) ** -0.5
            assert 0.9 * bound < value.abs().max() <= bound, name
            assert value.std() == pytest.approx(bound / 3**0.5, rel=0.02 if value.numel() > 1000 else 0.15), name
            seen.add("convolution")
        elif "norm" in name:
            assert (value == (1 if name.endswith("weight") else 0)).all(), name
            seen.add("norm")
        elif name.endswith("bias"):
            assert not value.any(), name
            seen.add("bias")
        else:
            assert name.endswith("weight") or name in ("pos_embed", "cls_token", "reg_token"), name
            few = value.numel() < 10_000  # the class token has 192 values
            assert value.std() == pytest.approx(0.02, rel=0.2 if few else 0.02), name
            assert abs(value.mean()) < 5 * 0.02 / value.numel() ** 0.5, name
            assert (value.abs() < 0.02).float().mean() == pytest.approx(0.683, abs=0.12 if few else 0.01), name
            if not few:
                assert 0.07 < value.abs().max() < 0.14, name  # more than 3.5 std: not cut at two
            seen.add(name.split(".")[0])
    assert seen == {"convolution", "norm", "bias", "blocks", "head", "pos_embed", "cls_token", "reg_token"}


# Forward

@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"global_pool": "token"}, {"class_token": False, "img_size": (16, 40)}])
def test_plain_attention_equals_the_fused_kernel(settings):
    vit = fill_by_name(demo(**settings), fill_positions=True).eval()
    x = images(*vit.patch_embed.img_size)
    assert all(block.attn.fused_attn for block in vit.blocks)  # else there is nothing to compare
    fused = vit(x)
    assert not any(block.attn.fused_attn for block in set_fused_attention(vit, "cpu", torch.bfloat16).blocks)
    assert_close(vit(x), fused, 1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("class_token", "reg_tokens"), [(True, 0), (False, 0), (True, 4), (False, 3)])
def test_average_pooling_leaves_out_prefix_tokens(class_token, reg_tokens):
    """Mean over the patch tokens, then fc_norm, then head, worked out from the last block's tokens."""
    vit = fill_by_name(demo(class_token=class_token, reg_tokens=reg_tokens), fill_positions=True).eval()
    tokens = []
    vit.blocks[-1].register_forward_hook(lambda module, inputs, output: tokens.append(output))
    logits, prefix = vit(images()), class_token + reg_tokens
    assert tokens[0].shape == (2, prefix + 16, 96)
    mean = tokens[0][:, prefix:].mean(dim=1)
    normed = F.layer_norm(mean, (96,), vit.fc_norm.weight, vit.fc_norm.bias, 1e-6)
    assert_close(logits, F.linear(normed, vit.head.weight, vit.head.bias), 1e-5)
    names = dict(vit.named_parameters())
    assert ("cls_token" in names, "reg_token" in names) == (class_token, reg_tokens > 0)
    assert not any(name.startswith("norm.") for name in names)
    assert (vit.config["class_token"], vit.config["reg_tokens"]) == (class_token, reg_tokens)


@torch.no_grad()
def test_token_pooling_reads_the_normed_class_token():
    vit = fill_by_name(demo(global_pool="token", reg_tokens=2), fill_positions=True).eval()
    tokens = []
    vit.blocks[-1].register_forward_hook(lambda module, inputs, output: tokens.append(output))
    logits = vit(images())
    normed = F.layer_norm(tokens[0][:, 0], (96,), vit.norm.weight, vit.norm.bias, 1e-6)
    assert_close(logits, F.linear(normed, vit.head.weight, vit.head.bias), 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_oblong_images_have_their_patches_row_by_row(channels):
    """16 x 40 pixels, patches of 8: five to a row. A change of patch (1, 3) reaches token 1 + 5 + 3 alone."""
    vit = demo(img_size=(16, 40), in_chans=channels).eval()
    assert vit.pos_embed.shape == (1, 1 + 10, 96) and vit.config["img_size"] == [16, 40]
    embedded = []
    vit.blocks[0].register_forward_pre_hook(lambda module, inputs: embedded.append(inputs[0]))
    x = images(16, 40, channels)
    vit(x)
    x[:, :, 8:16, 24:32] += 1
    assert vit(x).shape == (2, 5)
    changed = (embedded[0] != embedded[1]).any(dim=-1)
    assert changed.nonzero()[:, 1].tolist() == [9, 9]
    with pytest.raises(AssertionError):
        vit(images(40, 16, channels))


def test_drop_path_rises_linearly_from_zero():
    """linspace(0, rate, depth): none at the first block, none at all in evaluation."""
    vit = demo(drop_path=0.11)
    rates = [[getattr(drop, "drop_prob", 0.0) for drop in (b.drop_path1, b.drop_path2)] for b in vit.blocks]
    assert torch.allclose(torch.tensor(rates), torch.linspace(0, 0.11, 12).unsqueeze(1).expand(12, 2), atol=1e-7)
    x = images(batch=16)
    assert torch.equal(vit.eval()(x), vit(x))
    assert not torch.equal(vit.train()(x), vit(x))
    without = demo().train()
    assert torch.equal(without(x), without(x))


def test_eval_mode_is_float32_and_without_dropping():
    vit = eval_mode(demo(drop_path=0.5).half().train(), torch.device("cpu"))
    assert {p.dtype for p in vit.parameters()} == {torch.float32}
    assert not any(module.training for module in vit.modules())


# Leading blocks

@pytest.mark.parametrize("k", [0, 1, 5, 12])
def test_leading_blocks_keep_the_embedding_and_the_first_k(k):
    state = demo(reg_tokens=1).state_dict()
    kept = leading_blocks(state, k)
    assert all(kept[name] is state[name] for name in kept)
    embedding = {"cls_token", "reg_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert {name for name in kept if not name.startswith("blocks.")} == (embedding if k else set())
    per_block = {name.split(".", 2)[2] for name in state if name.startswith("blocks.")}
    assert len(per_block) == 12
    expected = {f"blocks.{i}.{name}" for i in range(k) for name in per_block}
    assert {name for name in kept if name.startswith("blocks.")} == expected


# Refusals

def test_an_image_size_is_one_number_or_two():
    assert pair(7) == pair([7]) == pair((7, 7)) == (7, 7) and pair([3, 5]) == (3, 5)
    assert patch_grid((32, 48), 16) == (2, 3)
    with pytest.raises(ValueError, match=r"not \(1, 2, 3\)"):
        pair([1, 2, 3])


@pytest.mark.parametrize(("settings", "named"), [
    ({"img_size": 30}, "8 px do not tile an image of 30 x 30 px.*--img-size.*--patch-size"),
    ({"img_size": (32, 44)}, "32 x 44"),
    ({"num_heads": 7}, r"96.*\b7\b|\b7\b.*96"),
])
def test_sizes_that_do_not_fit_are_named(settings, named):
    with pytest.raises(ValueError, match=named):
        demo(**settings)


def test_an_unknown_model_is_named():
    with pytest.raises(ValueError, match="unknown model 'vit_huge': one of vit_tiny, vit_small"):
        build_vit("vit_huge")
