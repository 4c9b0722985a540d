"""Test teachers of every kind: their logits against timm's own attention and preprocessing; those that are refused."""
import json

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tvf

from common import mae as mae_module
from common.errors import UserError
from common.mae import MAE
from common.pretrained import read_weights
from common.vit import SIZES, build_model, build_vit
from sec5_distill import pretrain_dmae
from sec5_distill.distillation import DMAE
from sec5_distill.teachers import Teacher, at_relative_depth, check_teacher, conversion, load_teacher
from tests.helpers import assert_close, settings_of, stage

GRID = (4, 4)  # of the student, whose patches have 8 px
OURS = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
HALVES = {"mean": [0.5] * 3, "std": [0.5] * 3}
KINDS = {  # timm's name -> arguments that make it small, its tokens before the patches, the class token among them
    "vit_base_patch16_224.mae": (dict(embed_dim=48), 1, 1),
    "vit_small_patch14_dinov2": (dict(embed_dim=48), 1, 1),  # 37 x 37 positions, layer scale
    "vit_small_patch14_reg4_dinov2": (dict(embed_dim=48), 5, 1),  # the class token has no position
    "vit_base_patch16_clip_224": (dict(embed_dim=48), 1, 1),  # a norm before the blocks, other mean and std
    "vit_little_patch16_reg4_gap_256": (dict(embed_dim=40), 4, 0),  # no class token
    "vit_base_patch32_224.augreg_in21k": (dict(embed_dim=48, qk_norm=True), 1, 1),  # mean and std 0.5
}


def timm_folder(name, folder, **settings):
    """Save one of timm's models, two blocks deep with random weights, as a folder for local-dir:."""
    torch.manual_seed(0)
    settings = {"depth": 2, "num_classes": 0, **settings}
    model = timm.create_model(name, pretrained=False, **settings).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # nothing is 0, nothing is alike
    folder.mkdir()
    data = {key: model.pretrained_cfg[key] for key in ("mean", "std", "input_size", "fixed_input_size", "first_conv",
                                                       "classifier")}
    config = {"architecture": name.split(".")[0], "num_classes": 0, "num_features": model.num_features,
              "pretrained_cfg": data, "model_args": settings}
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")
    return model


def caught(model, images):
    """Return (logits, softmax) of each block's attention in timm's unfused forward: (B, heads, N, N) each."""
    logits, weights = [], []
    for block in model.blocks:
        attention, heads = block.attn, block.attn.num_heads
        attention.fused_attn = False

        def products(module, args, out, attention=attention, heads=heads):
            q, k, _ = out.view(*out.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
            logits.append(attention.q_norm(q) @ attention.k_norm(k).mT * attention.head_dim**-0.5)
        attention.qkv.register_forward_hook(products)
        attention.attn_drop.register_forward_hook(lambda module, args, out: weights.append(out))
    model.forward_features(images)
    return logits, weights


def pixels(seed=3):
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def normalised(images, statistics):
    return tvf.normalize(images, list(statistics["mean"]), list(statistics["std"]))


def without(x, prefix, cls):
    """Drop the rows and columns of registers."""
    kept = [*range(cls), *range(prefix, x.shape[-1])]
    return x[:, :, kept][..., kept]


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS)
def test_a_teacher_of_timm_sees_what_timm_would_show_it(name, tmp_path):
    """timm loads the folder for the resized image, and torchvision resizes and normalises. The softmax over the
    remaining tokens is timm's, each row rescaled to sum to 1.
    """
    settings, prefix, cls = KINDS[name]
    patch = timm_folder(name, tmp_path / "vit", **settings).patch_embed.proj.kernel_size[0]
    theirs = timm.create_model(f"local-dir:{tmp_path / 'vit'}", pretrained=True, img_size=4 * patch).eval()
    images = tvf.resize(pixels(), [4 * patch, 4 * patch], tvf.InterpolationMode.BICUBIC, antialias=True)
    logits, weights = caught(theirs, normalised(images, theirs.pretrained_cfg))
    encoder = load_teacher(read_weights(tmp_path / "vit"))
    teacher = Teacher(encoder, (2, 1), (2,), GRID, OURS)
    found, [hidden] = teacher(normalised(pixels(), OURS), torch.arange(16).expand(2, -1))
    for ours, raw, attention in zip(found, logits[::-1], weights[::-1], strict=True):
        assert ours.shape == (2, theirs.blocks[0].attn.num_heads, 16 + cls, 16 + cls)
        assert_close(ours, without(raw, prefix, cls), 1e-4)
        left = without(attention, prefix, cls)
        assert_close(ours.softmax(dim=-1), left / left.sum(dim=-1, keepdim=True), 1e-4)
    assert hidden.shape == (2, 16 + cls, settings["embed_dim"])


@torch.no_grad()
def test_some_patches_are_those_rows_of_all_only_in_the_first_block(tmp_path):
    """In the first block, the logits of the visible patches do not depend on which other patches are visible."""
    timm_folder("vit_small_patch14_reg4_dinov2", tmp_path / "vit", embed_dim=48)
    teacher, images = Teacher(load_teacher(read_weights(tmp_path / "vit")), (1,), (), GRID), pixels()
    ids = torch.tensor([[3, 0, 9], [15, 7, 2]])
    [few], [every] = (teacher(images, chosen)[0] for chosen in (ids, torch.arange(16).expand(2, -1)))
    for i, chosen in enumerate(ids):
        kept = [0, *(1 + chosen).tolist()]
        assert_close(few[i], every[i][:, kept][..., kept], 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("settings", [dict(reg_tokens=2), dict(class_token=False), dict(patch_size=4, img_size=24)])
def test_an_own_checkpoint_as_teacher(settings, tmp_path):
    """Its logits equal those of timm's own resizing of the model, on images of its patch size."""
    torch.manual_seed(0)
    vit = build_vit("vit_demo", **{"img_size": 32, "patch_size": 8, "num_classes": 2, **settings}).eval()
    torch.save({"model": vit.state_dict(), "config": vit.config}, tmp_path / "own.pt")
    teacher = Teacher(load_teacher(read_weights(tmp_path / "own.pt")), (12,), (), GRID)
    [ours], _ = teacher(pixels(), torch.arange(16).expand(2, -1))
    side = 4 * vit.config["patch_size"]
    vit.set_input_size(img_size=(side, side))
    logits, _ = caught(vit, tvf.resize(pixels(), [side, side], tvf.InterpolationMode.BICUBIC, antialias=True))
    assert_close(ours, without(logits[11], vit.num_prefix_tokens, int(vit.has_class_token)), 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in KINDS if "clip" not in name])  # its LayerNorm's eps is in no file
def test_a_bare_file_is_the_folders_model(name, tmp_path):
    """Width, depth, registers, layer scale and tokens with positions follow from the tensors; heads are given."""
    vit = timm_folder(name, tmp_path / "vit", **KINDS[name][0])
    torch.save(vit.state_dict(), tmp_path / "bare.pth")
    folder, bare = (Teacher(load_teacher(read_weights(tmp_path / source), vit.blocks[0].attn.num_heads), (2,), (), GRID)
                    for source in ("vit", "bare.pth"))
    assert torch.equal(*(teacher(pixels(), torch.arange(8).expand(2, -1))[0][0] for teacher in (folder, bare)))


def test_images_are_converted_only_where_mean_or_std_differ():
    assert conversion(OURS, None) is None and conversion(OURS, OURS) is None and conversion(None, OURS) is None
    scale, shift = conversion(OURS, HALVES)
    assert_close(normalised(pixels(), OURS) * scale + shift, normalised(pixels(), HALVES), 1e-5)


def test_without_a_class_token_the_patches_alone_are_distilled():
    """The loss equals that of the student's logits without first row and column."""
    torch.manual_seed(0)
    student = MAE("vit_demo", img_size=32, patch_size=8)
    vit = build_vit("vit_demo", img_size=32, patch_size=8, class_token=False)
    dmae = DMAE(student, teacher := Teacher(vit, (12,), (6,)), (12,), (6,))
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    target = teacher(images, noise.argsort(dim=1)[:, :4])
    assert target[0][0].shape == (2, 12, 4, 4) and target[1][0].shape == (2, 4, 96)
    _, parts = dmae(images, noise, *target)
    states = []
    student(images, noise, states)
    q, k, _ = student.blocks[11].attn.qkv(student.blocks[11].norm1(states[11])).view(2, 5, 3, 12, 8).unbind(2)
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k)[:, :, 1:, 1:] / 8**0.5
    mapped = torch.einsum("ts,bsqk->btqk", dmae.attn_adapter["adapter11"].weight.flatten(1), logits)
    assert_close(parts["attention"], (mapped - target[0][0]).square().mean(), 1e-5)


# Which blocks go together

@pytest.mark.parametrize(("numbers", "depth", "theirs", "expected"), [
    ([12], 12, 12, [12]), ([12], 12, 24, [24]), ([6, 12], 12, 24, [12, 24]), ([4, 12], 12, 18, [6, 18]),
    ([12], 12, 7, [7]), ([13], 13, 24, [24]), ([0], 12, 24, [0]), ([2, 4], 12, 6, [1, 2])])
def test_blocks_go_together_by_relative_depth(numbers, depth, theirs, expected):
    assert at_relative_depth(numbers, depth, theirs, "--teacher-blocks") == expected


@pytest.mark.parametrize(("numbers", "theirs"), [([1], 18), ([12, 7], 24 * 5 + 6), ([3], 6), ([11], 7)])
def test_a_depth_without_a_matching_block_is_refused(numbers, theirs):
    with pytest.raises(UserError, match=f"of the teacher's {theirs} .* say which by --teacher-blocks"):
        at_relative_depth(numbers, 12, theirs, "--teacher-blocks")


def test_a_run_with_the_same_numbers_is_the_one_that_it_was():
    """The default was once the same block number at any depth. Given explicitly, it finds that run; else a new one."""
    def place(**settings):
        args = pretrain_dmae.with_pairs(settings_of(pretrain_dmae, {"model": "vit_demo", **settings}), 24)
        weights = read_weights  # only its config is asked for
        weights.config = {"num_heads": 12}
        return pretrain_dmae.without_defaults(args, weights)
    assert place().teacher_blocks == [24] and place(teacher_blocks=[12]).teacher_blocks is None
    assert place().teacher_hidden_layers is place(hidden_layers=[]).teacher_hidden_layers is None


# What is no teacher

@pytest.mark.parametrize(("name", "reason"), [
    ("resnet18", "a ResNet is no plain ViT"),
    ("swin_tiny_patch4_window7_224", "a SwinTransformer is no plain ViT"),
    ("beit_base_patch16_224", "a Beit adds relative positions"), ("vit_small_patch16_dinov3", "a Eva is no"),
    ("deit_tiny_distilled_patch16_224", "a VisionTransformerDistilled is no"),
    ("vit_tiny_r_s16_p8_224", "a HybridEmbed, not a convolution alone, embeds"),
    ("vit_relpos_small_patch16_224", "a VisionTransformerRelPos is no")])
def test_what_can_be_no_teacher_is_refused_with_the_reason(name, reason):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(UserError, match=f"F is no teacher: {reason}.* Give an MAE or a plain ViT") as refused:
        check_teacher(model, "F")
    assert "\n" not in str(refused.value)


def test_files_that_are_no_teacher_are_refused(tmp_path):
    vit = build_model("vit_demo_rpe", img_size=32, patch_size=8)
    torch.save({"model": vit.state_dict(), "config": vit.config}, tmp_path / "own.pt")
    torch.save(vit.state_dict(), tmp_path / "bare.pt")
    timm_folder("vit_small_patch16_18x2_224", tmp_path / "parallel", embed_dim=48)
    for source, reason in (("own.pt", "a Beit adds"), ("bare.pt", "it has no absolute positions alone"),
                           ("parallel", "ParallelThingsBlock")):
        with pytest.raises(UserError, match=f"{source} is no teacher: .*{reason}"):
            load_teacher(read_weights(tmp_path / source))


# Whole runs

@pytest.fixture
def distil(tmp_path, monkeypatch):
    """Return a function that runs pretrain_dmae.main for two steps and returns its result."""
    monkeypatch.setitem(SIZES, "small", {"embed_dim": 24, "depth": 2})
    monkeypatch.setitem(mae_module.DECODERS, "small", (12, 1, 3))
    rng, pictures = np.random.RandomState(0), tmp_path / "pictures"
    pictures.mkdir()
    for i in range(8):
        Image.fromarray(rng.randint(0, 256, (40, 40, 3), dtype=np.uint8)).save(pictures / f"{i}.png")

    def run(**settings):
        return stage("sec5_distill/pretrain_dmae.py", dict(
            preset="demo", data="folder", data_path=str(pictures), img_size=[32], patch_size=8, num_heads=4,
            model="small", batch_size=4, epochs=1, warmup_epochs=0, device="cpu", workers=0, output=str(tmp_path),
            log_every=1, distill_blocks=[2], **settings))
    return run


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_runs_with_a_teacher_of_other_patches_registers_and_images(distil, tmp_path, precision):
    timm_folder("vit_small_patch14_reg4_dinov2", tmp_path / "vit", embed_dim=48)
    result = distil(teacher=str(tmp_path / "vit"), precision=precision)
    assert result["run"] != distil(teacher=str(tmp_path / "vit"), precision=precision, **HALVES)["run"]
    for values in map(json.loads, open(f"{result['run']}/log.jsonl")):
        assert all(np.isfinite(value) for value in values.values() if isinstance(value, float))


def test_the_teachers_own_mean_and_std_are_part_of_a_run(distil, tmp_path):
    """The same tensors, trained on other statistics, see other values, unless the student takes their statistics."""
    timm_folder("vit_small_patch16_224", tmp_path / "vit", embed_dim=48)
    config = json.loads((tmp_path / "vit" / "config.json").read_text())
    runs = []
    for statistics in (HALVES, OURS):
        config["pretrained_cfg"] |= statistics
        (tmp_path / "vit" / "config.json").write_text(json.dumps(config))
        runs.append(distil(teacher=str(tmp_path / "vit"), **HALVES)["run"])
    assert runs[0] != runs[1]


def test_a_folder_of_a_cnn_is_refused_before_a_run_begins(distil, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", pretrained=False, num_classes=2)
    (folder := tmp_path / "cnn").mkdir()
    (folder / "config.json").write_text(json.dumps({"architecture": "resnet10t", "num_classes": 2,
                                                    "pretrained_cfg": dict(model.pretrained_cfg)}, default=str))
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")
    with pytest.raises(UserError, match="cnn is no teacher: a ResNet is no plain ViT"):
        distil(teacher=str(folder))
    assert not (tmp_path / "pretrain_dmae").exists()
