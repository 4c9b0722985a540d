"""appendix/finetune_distilled.py: two heads, two targets, and a teacher that only answers."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from appendix import finetune_distilled
from appendix.finetune_distilled import Distilled, DistilledViT, build_distilled
from appendix.tools.convert_checkpoint import export_timm
from common import options, report
from common.augment import contiguous, eval_transform
from common.errors import UserError
from common.filling import load_encoder
from common.images import ImageSet
from common.mae import MAE
from common.pretrained import FormatError, read_weights
from common.rebuilding import load_model
from common.vit import SIZES, build_vit
from sec3_benchmark import finetune
from sec3_benchmark.layer_decay import layer_groups
from tests.helpers import assert_close, noisy, settings_of, tensor

SMALL = dict(img_size=12, patch_size=4, num_heads=4)


def settings(**explicit):
    return settings_of(finetune_distilled, dict(img_size=[12], patch_size=4, num_heads=4, device="cpu", workers=0,
                                                **explicit))


def distilled(num_classes=3):
    return noisy(build_vit("vit_demo", num_classes=num_classes, architecture=DistilledViT, **SMALL))


def test_two_heads_by_hand():
    """Mean of the patches -> fc_norm -> head; class token -> dist_norm -> head_dist; tested as their mean."""
    vit, images = distilled(), torch.randn(2, 3, 12, 12)
    tokens = vit.blocks(vit._pos_embed(vit.patch_embed(images)))

    def read(x, norm, head):
        return head(F.layer_norm(x, (96,), norm.weight, norm.bias, 1e-6))
    labels = read(tokens[:, 1:].mean(dim=1), vit.fc_norm, vit.head)
    teacher = read(tokens[:, 0], vit.dist_norm, vit.head_dist)
    assert_close(vit(images), (labels + teacher) / 2, 1e-5)
    for ours, expected in zip(vit.train()(images), (labels, teacher)):
        assert_close(ours, expected, 1e-5)


@pytest.mark.parametrize("mixup", [0.0, 0.8])
def test_loss(mixup):
    """A part from the labels, mixed and smoothed as the recipe says, one from the teacher's choice on those images."""
    args, vit, seen = settings(mixup=mixup, cutmix=0.0, smoothing=0.1, erasing=0.0, alpha=0.3), distilled().train(), []

    class Teacher(torch.nn.Module):
        num_classes = 3

        def forward(self, images):
            seen.append(images)
            return torch.eye(3)[torch.arange(len(images)) % 3]
    method = Distilled(vit, args, 3, teacher=Teacher())
    batch = {"image": torch.randn(4, 3, 12, 12), "label": torch.tensor([2, 0, 1, 1])}
    torch.manual_seed(0)
    np.random.seed(0)
    loss, logs = method.loss(batch, 0)
    labels, from_class_token = vit(seen[0])
    np.random.seed(0)
    np.random.rand()  # timm asks first whether to mix
    lam = float(np.random.beta(0.8, 0.8)) if mixup else 1.0
    soft = torch.full((4, 3), 0.1 / 3) + 0.9 * F.one_hot(batch["label"], 3)
    target = lam * soft + (1 - lam) * soft.flip(0)
    from_labels = -(target * labels.log_softmax(dim=1)).sum(dim=1).mean()
    choice = torch.arange(4) % 3
    from_teacher = -from_class_token.log_softmax(dim=1)[torch.arange(4), choice].mean()
    assert_close(logs["loss_teacher"], from_teacher, 1e-5)
    assert_close(loss, 0.7 * from_labels + 0.3 * from_teacher, 1e-4)


def test_new_parts_start_as_the_heads_do_and_learn_at_the_full_rate():
    torch.manual_seed(0)
    vit = build_vit("vit_tiny", num_classes=1000, architecture=DistilledViT)
    assert vit.head_dist.weight.std().item() == pytest.approx(0.02, rel=0.02) and not vit.head_dist.bias.any()
    groups = layer_groups(vit, 0.05, 0.5)
    scale = {name: group["lr_scale"] for group in groups for name in group["names"]}
    assert scale["head_dist.weight"] == scale["dist_norm.weight"] == 1 and scale["blocks.11.norm1.weight"] == 0.5


def test_an_mae_enters_and_a_distilled_model_can_be_evaluated(tmp_path):
    mae = noisy(MAE("vit_demo", **SMALL))
    torch.save({"model": mae.state_dict(), "config": mae.config}, tmp_path / "mae.pt")
    weights = read_weights(tmp_path / "mae.pt")
    vit = build_distilled(settings(), 3, weights)
    assert torch.equal(vit.blocks[2].attn.qkv.weight, mae.blocks[2].attn.qkv.weight)
    torch.save({"model": vit.state_dict(), "config": vit.config}, tmp_path / "distilled.pt")
    again = build_distilled(settings(), 3, read_weights(tmp_path / "distilled.pt"), keep_head=True)
    assert torch.equal(again.head_dist.weight, vit.head_dist.weight)
    with pytest.raises(UserError, match="dist_norm"):
        build_distilled(settings(), 3, plain_classifier(tmp_path), keep_head=True)
    with pytest.raises(UserError, match="leave --global-pool out"):
        build_distilled(settings(global_pool="token"), 3, None)


def plain_classifier(folder):
    vit = build_vit("vit_demo", num_classes=3, **SMALL)
    torch.save({"model": vit.state_dict(), "config": vit.config}, folder / "plain.pt")
    return read_weights(folder / "plain.pt")


def test_a_run(tmp_path, monkeypatch):
    """A timm folder teaches; its content, not its place, makes the run; a teacher of other classes is refused."""
    monkeypatch.setitem(SIZES, "vit_demo", {"embed_dim": 8, "depth": 1})
    monkeypatch.setattr(report, "draw_curve", lambda *paths: None)
    for name, classes in (("teacher", 2), ("copy", 2), ("other", 5)):
        torch.manual_seed(classes)
        teacher = build_vit("vit_demo", num_classes=classes, img_size=4, patch_size=2, num_heads=2)
        export_timm(teacher, tmp_path / name, (0.5,) * 3, (0.5,) * 3)
    pixels = np.random.RandomState(0).randint(0, 256, (8, 4, 4, 3), dtype=np.uint8)
    images = ImageSet("toy", pixels, np.arange(8) % 2, [0, 1])
    monkeypatch.setattr(finetune, "load_sets", lambda args: (images, images))
    monkeypatch.setattr(finetune_distilled, "load_sets", lambda args: (images, images))
    monkeypatch.setattr(finetune, "TrainViews", lambda args: contiguous)
    row = dict(preset="demo", model="vit_demo", patch_size=2, num_heads=2, batch_size=4, epochs=1,
               warmup_epochs=0, eval_every=0, device="cpu", workers=0, precision="fp32", output=str(tmp_path / "out"))

    def run(teacher):
        monkeypatch.setitem(options.NETWORKS["demo"], "img_size", [4])
        return finetune_distilled.main(settings_of(finetune_distilled, {**row, "teacher": str(tmp_path / teacher)}, {}))
    first = run("teacher")
    assert run("copy")["run"] == first["run"] and 0 <= first["top1"] <= 100
    assert "head_dist.weight" in torch.load(first["checkpoint"], weights_only=True)["model"]
    with pytest.raises(UserError, match="knows 5 classes, the data 2"):
        run("other")
    teacher = build_vit("vit_demo", num_classes=2, img_size=8, patch_size=2, num_heads=2)
    export_timm(teacher, tmp_path / "larger", (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(UserError, match="larger cannot read images of 3 x 4 x 4"):
        run("larger")
    export_timm(build_vit("vit_demo", num_classes=2, img_size=4, patch_size=2, num_heads=2), tmp_path / "named",
                (0.5,) * 3, (0.5,) * 3, ["1", "0"])
    with pytest.raises(UserError, match="named was trained on other classes than toy has, or in another order: 1 "):
        run("named")
    mae = MAE("vit_demo", img_size=8, patch_size=2, num_heads=2, decoder_dim=8, decoder_heads=2)
    torch.save({"model": mae.state_dict(), "config": mae.config}, tmp_path / "mae.pt")
    row["init"] = str(tmp_path / "mae.pt")
    monkeypatch.setattr(finetune, "train_classifier", lambda args, *rest: args.img_size)
    assert run("larger") == [8, 8]  # as the initial weights say
    with pytest.raises(UserError, match="teacher cannot read images of 3 x 8 x 8"):
        run("teacher")
    with pytest.raises(UserError, match="give timm:NAME or a timm folder"):
        run("out/" + first["checkpoint"].split("/out/")[1])


def test_a_distilled_model_starts_others_without_its_second_head(tmp_path):
    """As transfer.py and the probes take it; to analyses and the converter it is no plain ViT, and they say so."""
    vit = distilled(num_classes=2)
    torch.save({"model": vit.state_dict(), "config": vit.config}, tmp_path / "a.pt")
    plain = build_vit(**{**vit.config, "num_classes": 7})
    report = load_encoder(plain, read_weights(tmp_path / "a.pt"))
    assert torch.equal(plain.blocks[11].mlp.fc2.weight, vit.blocks[11].mlp.fc2.weight)
    assert {name for name in report.left_out if "dist" in name} == {
        "dist_norm.weight", "dist_norm.bias", "head_dist.weight", "head_dist.bias"}
    with pytest.raises(FormatError, match="a.pt has a second head"):
        load_model(tmp_path / "a.pt")


def test_an_evaluation_needs_no_teacher(tmp_path, monkeypatch):
    """It is neither read nor asked how images are normalised; heads and mean over both are those of the file."""
    vit = distilled(num_classes=2)
    torch.save({"model": vit.state_dict(), "config": vit.config}, tmp_path / "distilled.pt")
    pixels = np.random.RandomState(0).randint(0, 256, (40, 12, 12, 3), dtype=np.uint8)
    monkeypatch.setattr(finetune, "load_sets",
                        lambda args, splits: [ImageSet("toy", pixels, np.arange(40) % 2, [0, 1])])
    monkeypatch.setattr(finetune_distilled, "read_teacher", lambda *args: pytest.fail("the teacher was read"))
    result = finetune_distilled.main(settings(
        init=str(tmp_path / "distilled.pt"), eval_only=True, teacher="no/where", precision="fp32", preset="small"))
    transform = eval_transform([12])
    images = torch.stack([transform(tensor(image)) for image in pixels])
    mean, std = (torch.tensor(v).view(3, 1, 1) * 255 for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        hits = vit((images - mean) / std).argmax(dim=1) == torch.arange(40) % 2
    assert result["images"] == 40 and result["top1"] == pytest.approx(100 * hits.float().mean().item())


def test_the_recipe_is_ori():
    args = settings_of(finetune_distilled, {"preset": "paper"})
    assert (args.recipe, args.mixup, args.cutmix, args.erasing, args.drop_path) == ("ori", 0.8, 1.0, 0.25, 0.1)
    assert (args.alpha, args.teacher) == (0.5, "timm:regnety_160.deit_in1k")
