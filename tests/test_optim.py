"""common/optim.py and layer_decay.py against the authors' code, and against what AdamW does to the weights."""
import numpy as np
import pytest
import torch

from common import optim
from common.mae import MAE
from common.optim import adamw, learning_rate, parameter_groups, set_learning_rate, warmup_cosine
from common.vit import SIZES, build_vit
from sec3_benchmark import finetune, pretrain_mae
from sec3_benchmark.layer_decay import EXEMPT, layer_groups, layer_index
from tests.helpers import golden, settings_of

IMAGENET = range(1_281_167)  # only its length counts


# Learning rate

@pytest.mark.parametrize("name", ["lr_pretrain", "lr_finetune"])
def test_reference_schedule(name):
    """Every step of the paper's epochs, the first (rate 0) and the one after the last included."""
    v = golden(name)
    per_epoch, last = int(v["steps_per_epoch"]), int(v["epochs"] * v["steps_per_epoch"])
    assert v["step"][0] == 0 and v["step"][-1] == last and v["lr"][0] == 0
    ours = [learning_rate(int(step), peak=float(v["base_lr"]), total_steps=last,
                          warmup_steps=int(v["warmup_epochs"]) * per_epoch, warmup_lr=float(v["warmup_lr"]),
                          min_lr=float(v["min_lr"])) for step in v["step"]]
    np.testing.assert_allclose(ours, v["lr"], rtol=1e-5, atol=1e-5 * v["lr"].max())
    assert max(ours) == pytest.approx(float(v["base_lr"]), rel=1e-12)


def test_schedule_without_warmup_and_beyond_its_end():
    rates = [learning_rate(step, peak=2.0, total_steps=4, warmup_steps=0, min_lr=1.0) for step in range(7)]
    assert rates == pytest.approx([2.0, 1.5 + 0.5 * 0.5**0.5, 1.5, 1.5 - 0.5 * 0.5**0.5, 1.0, 1.0, 1.0])
    assert learning_rate(1, peak=2.0, total_steps=2, warmup_steps=2, warmup_lr=1.0) == 1.5
    assert learning_rate(2, peak=2.0, total_steps=2, warmup_steps=2) == 2.0  # all warm-up: no division by zero


@pytest.mark.parametrize(("module", "per_epoch", "warmup", "peak", "end"), [
    (pretrain_mae, 312, 40, 2.4e-3, 0.0),
    (finetune, 1251, 5, 4e-3, 1e-6)])
def test_the_papers_rates_on_imagenet(module, per_epoch, warmup, peak, end, capsys):
    """Appendix A.1 and A.2: base rates are per 256 images, steps per epoch are rounded down, the first rate is 0."""
    args = settings_of(module, {"preset": "paper"})
    rate = warmup_cosine(args, IMAGENET, vars(args).get("min_lr", 0.0))
    assert f"{per_epoch} steps per epoch; peak lr {peak:.3g} = " in capsys.readouterr().out
    assert rate(0) == 0
    assert rate(per_epoch * warmup // 2) == pytest.approx(peak * (per_epoch * warmup // 2) / (per_epoch * warmup))
    assert rate(per_epoch * warmup) == pytest.approx(peak, rel=1e-12)
    middle = per_epoch * (warmup + args.epochs) / 2
    assert rate(middle) == pytest.approx((peak + end) / 2, rel=1e-9)
    assert rate(per_epoch * args.epochs) == pytest.approx(end, abs=1e-12)


# Layer decay and groups

def by_name(groups, key):
    """Return {parameter name: its group's value of `key`}, after checking that no name is in two groups."""
    found = [(name, group[key]) for group in groups for name in group["names"]]
    assert len(found) == len(dict(found))
    return dict(found)


def test_reference_layer_decay(monkeypatch):
    v = golden("layer_decay")
    depth = int(v["depth"])
    monkeypatch.setitem(SIZES, "golden", {"embed_dim": 24, "depth": depth})
    vit = build_vit("golden", img_size=16, patch_size=8, num_classes=4)
    groups = layer_groups(vit, float(v["weight_decay"]), float(v["layer_decay"]))
    names = v["names"].tolist()
    assert by_name(groups, "lr_scale") == pytest.approx(dict(zip(names, v["lr_scale"].tolist())), rel=1e-9)
    assert by_name(groups, "weight_decay") == dict(zip(names, v["weight_decays"].tolist()))
    assert set(names) == {name for name, _ in vit.named_parameters()}


@pytest.mark.parametrize(("layer_decay", "smallest"), [(0.85, 0.121), (0.75, 0.0238), (0.65, 0.0037)])
def test_smallest_scales_at_depth_12(layer_decay, smallest):
    """There are 14 scales. The embeddings have the smallest; head and fc_norm have the full rate."""
    groups = layer_groups(build_vit("vit_demo", img_size=32, patch_size=8, num_classes=3), 0.05, layer_decay)
    scales = by_name(groups, "lr_scale")
    assert len(set(scales.values())) == 14
    assert min(scales.values()) == pytest.approx(smallest, rel=0.005)
    assert scales["pos_embed"] == scales["cls_token"] == scales["patch_embed.proj.bias"] == min(scales.values())
    assert scales["blocks.0.norm1.weight"] == pytest.approx(min(scales.values()) / layer_decay)
    assert scales["blocks.11.mlp.fc2.bias"] == pytest.approx(layer_decay)
    assert scales["fc_norm.weight"] == scales["head.weight"] == scales["head.bias"] == 1


def test_layers_of_a_name():
    names = {"cls_token": 0, "reg_token": 0, "mask_token": 0, "pos_embed": 0, "patch_embed.proj.weight": 0,
             "blocks.0.norm1.bias": 1, "blocks.10.attn.qkv.weight": 11, "norm.weight": 13, "head.bias": 13}
    assert {name: layer_index(name, 12) for name in names} == names


def models():
    frozen = build_vit("vit_demo", img_size=32, patch_size=8, num_classes=3, global_pool="token", reg_tokens=2)
    frozen.patch_embed.requires_grad_(False)
    return {"mae": MAE("vit_demo", img_size=32, patch_size=8), "frozen": frozen,
            "vit": build_vit("vit_demo", img_size=32, patch_size=8, num_classes=3)}


@pytest.mark.parametrize("layer_decay", [1.0, 0.8])
@pytest.mark.parametrize("name", ["mae", "vit", "frozen"])
def test_every_trainable_parameter_is_in_exactly_one_group(name, layer_decay):
    model = models()[name]
    groups = layer_groups(model, 0.05, layer_decay)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(by_name(groups, "lr_scale")) == trainable.keys()
    for group in groups:
        assert len(group["names"]) == len(group["params"])
        assert all(p is trainable[name] for name, p in zip(group["names"], group["params"]))
    if layer_decay == 1.0:
        assert {group["lr_scale"] for group in groups} == {1.0} and len(groups) == 2


def test_mae_pretraining_decays_its_tokens():
    """Only vectors and biases are exempt. The fixed position embeddings are not trained."""
    model = models()["mae"]
    decay = by_name(parameter_groups(model, 0.05), "weight_decay")
    assert decay["cls_token"] == decay["mask_token"] == 0.05
    assert "pos_embed" not in decay and "decoder_pos_embed" not in decay
    exempt = {name for name, value in decay.items() if value == 0}
    assert exempt == {name for name in decay if model.get_parameter(name).ndim == 1}
    assert {"norm.weight", "blocks.3.attn.qkv.bias", "decoder_pred.bias"} <= exempt
    assert set(decay.values()) == {0, 0.05}


def test_finetuning_exempts_positions_and_class_token():
    vit = models()["vit"]
    decay = by_name(layer_groups(vit, 0.05, 0.85), "weight_decay")
    exempt = {name for name, value in decay.items() if value == 0}
    assert exempt == {name for name in decay if vit.get_parameter(name).ndim == 1} | {"pos_embed", "cls_token"}


def test_adamw_shrinks_each_weight_by_its_own_rate_and_decay():
    """With zero gradients AdamW only decays, w * (1 - lr * scale * decay), and leaves exempt names and vectors."""
    vit = models()["vit"]
    before = {name: p.detach().clone() for name, p in vit.named_parameters()}
    optimizer = adamw(layer_groups(vit, 0.5, 0.7), betas=(0.9, 0.95))
    for parameter in vit.parameters():
        parameter.grad = torch.zeros_like(parameter)
    set_learning_rate(optimizer, 0.1)
    optimizer.step()
    for name, parameter in vit.named_parameters():
        layer = 13 if name.startswith(("head.", "fc_norm.")) else 0
        layer = int(name.split(".")[1]) + 1 if name.startswith("blocks.") else layer
        decays = parameter.ndim > 1 and name not in EXEMPT
        expected = before[name] * (1 - 0.1 * 0.7 ** (13 - layer) * 0.5 * decays)
        assert torch.allclose(parameter, expected, rtol=1e-6, atol=0), name


def test_adamw_equals_the_textbook():
    """Two steps of Loshchilov and Hutter's algorithm in float64; betas as in MAE pre-training."""
    weight = torch.nn.Parameter(torch.tensor([[0.5, -2.0], [1.0, 0.1]]))
    optimizer = adamw([{"params": [weight], "lr_scale": 0.5, "weight_decay": 0.05}], betas=(0.9, 0.95))
    w, m, v = weight.detach().double(), 0, 0
    for step, lr in enumerate((0.1, 0.2), 1):
        gradient = torch.tensor([[0.3, -0.2], [0.0, 4.0]]) * step
        weight.grad = gradient.clone()
        set_learning_rate(optimizer, lr)
        optimizer.step()
        g, rate = gradient.double(), 0.5 * lr
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        w = w * (1 - rate * 0.05) - rate * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
    assert torch.allclose(weight.detach().double(), w, rtol=1e-5)


def test_an_epoch_says_how_many_images_sit_out():
    def said(images, batch_size):
        return optim.describe_epoch(range(images), batch_size)
    assert said(186, 128) == ("186 images, 1 steps per epoch (58 images sit out each epoch: lower --batch-size, raise "
                              "--base-lr)")
    assert said(1000, 64) == "1000 images, 15 steps per epoch"  # 4 %
