"""Test activations.py: hooks read what the encoder, written out block by block, computes."""
import weakref

import pytest
import timm
import torch
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import ParallelScalingBlock

from common.mae import MAE
from common.vit import build_vit
from sec4_analysis.activations import Activations, check_plain, final_norm, geometry, points
from tests.helpers import assert_close, assert_same
from tests.straightforward_vit import everything, tiny, tiny_mae

MODELS = {  # and the number of prefix tokens
    "class token": (tiny, 1),
    "no prefix": (lambda: tiny(class_token=False, global_pool="avg"), 0),
    "distilled DeiT": (lambda: tiny(VisionTransformerDistilled), 2),
    "registers": (lambda: tiny(reg_tokens=4, no_embed_class=True), 5),
    "norm_pre, layer scale, norms of q and k": (
        lambda: tiny(init_values=0.3, qk_norm=True, pre_norm=True, drop_path_rate=0.5), 1),
    "fc_norm": (lambda: tiny(global_pool="avg", fc_norm=True), 1),
    "any size": (lambda: tiny(dynamic_img_size=True), 1),  # its patch_embed gives rows and columns
    "relative positions": (lambda: tiny(Beit, init_values=0.2, use_rel_pos_bias=True), 1),
    "relative positions, one table": (lambda: tiny(Beit, use_abs_pos_emb=False, use_shared_rel_pos_bias=True), 1),
    "MAE": (tiny_mae, 1),
}


def noise(images=2):
    return torch.randn(images, 3, 32, 40, generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
@pytest.mark.parametrize("case", MODELS)
def test_every_activation_is_that_of_the_encoder_written_out(case):
    """All activations are bit-identical and in order, read together, one at a time, and in further batches."""
    build, prefix = MODELS[case]
    model, images = build(), noise(4)
    expected = everything(model, images)
    with Activations(model, expected) as read:
        assert_same(read(images), expected)
        assert_same(read(images[:3]), everything(model, images[:3]))
    for name, tensor in expected.items():
        with Activations(model, [name]) as read:
            assert_same(read(images), {name: tensor})
    assert geometry(model) == (prefix, (4, 5), (8, 8))
    assert expected["norm"].shape[1] == prefix + 20


@torch.no_grad()
@pytest.mark.parametrize("case", [case for case in MODELS if case != "MAE"])
def test_logits_are_those_of_the_attention_itself(case):
    """Their softmax is the one that timm's unfused attention passes to its dropout."""
    model, images, seen = MODELS[case][0](), noise(), {}
    for i, block in enumerate(model.blocks):
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(
            lambda module, inputs, output, name=f"blocks.{i}.logits": seen.update({name: inputs[0]}))
    with Activations(model, [f"blocks.{i}.logits" for i in range(3)]) as read:
        ours = read(images)
    assert list(ours) == list(seen)
    for name, logits in ours.items():
        assert_close(logits.softmax(dim=-1), seen[name], 1e-5)


@torch.no_grad()
def test_an_maes_encoder_sees_every_patch():
    model, images = tiny_mae(), noise()
    with Activations(model, ["patch_embed", "embedded", "norm"]) as read:
        ours = read(images)
    every = torch.arange(20).expand(2, -1)
    assert_close(ours["norm"], model.forward_encoder(model.patchify(images), every), 1e-5)
    assert_close(ours["patch_embed"] + model.pos_embed[:, 1:], ours["embedded"][:, 1:], 1e-6)


@torch.inference_mode()
def test_an_activation_is_let_go_before_the_next_block_runs():
    """An activation is freed before `reduce` gets the next one; only what `reduce` returned is kept."""
    before = []

    def reduce(activation):
        assert not any(given() is not None for given in before)
        before.append(weakref.ref(activation))
        return activation.sum().item()
    model, images = tiny(), noise()
    for part in (".norm1", ".logits"):  # the others are the residual stream, which lives on
        before.clear()
        names = [f"blocks.{i}{part}" for i in range(3)]
        with Activations(model, names, reduce) as read:
            values = read(images)
        assert len(before) == 3
        assert values == {name: everything(model, images)[name].sum().item() for name in names}


@torch.inference_mode()
def test_hooks_are_there_inside_the_with_alone():
    """Hooks are removed even if a measure fails, and do not change what the model computes."""
    model, images, calls = tiny(), noise(), []
    alone = model(images)

    def fail(activation):
        calls.append(activation)
        raise RuntimeError("a measure failed")
    with pytest.raises(RuntimeError, match="a measure failed"), Activations(model, ["blocks.1.logits"], fail) as read:
        read(images)
    assert len(calls) == 1 and torch.equal(model(images), alone) and len(calls) == 1
    with Activations(model, points(model)) as read:
        assert torch.equal(model(images), alone)
    with pytest.raises(KeyError):
        read(images)


@torch.inference_mode()
def test_another_norm_in_place_of_the_models_own():
    model, images, norm = tiny(), noise(), torch.nn.LayerNorm(24)
    with Activations(model, ["blocks.2", "norm"], norm=norm) as read:
        ours = read(images)
    assert torch.equal(ours["norm"], norm(ours["blocks.2"]))


def test_the_authors_final_norm_of_an_mae_is_untrained():
    model = MAE("vit_demo", img_size=16, patch_size=8)
    model.norm.weight.data.fill_(3)
    own, authors = final_norm(model), final_norm(model, authors=True)
    assert own is model.norm and authors.weight.eq(1).all() and authors.bias.eq(0).all() and authors.eps == 1e-6
    classifier = build_vit("vit_demo", img_size=16, patch_size=8)
    assert final_norm(classifier) is final_norm(classifier, authors=True) is classifier.fc_norm


def test_what_the_model_has_not_is_an_error():
    with pytest.raises(ValueError, match="no blocks.3.norm1, cls: its 3 blocks count from 0"):
        Activations(tiny(), ["cls", "norm", "blocks.3.norm1"])


def test_other_architectures_are_refused():
    check_plain(tiny())
    for model in (timm.create_model("resnet18"), tiny(block_fn=ParallelScalingBlock), tiny(global_pool="map")):
        with pytest.raises(ValueError, match="choose timm's VisionTransformer or Beit, or an MAE"):
            check_plain(model)
