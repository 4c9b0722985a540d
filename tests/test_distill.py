"""Test the distillation of Section 5 against reference values and a straightforward version, and in whole runs."""
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from straightforward_dmae import StraightforwardDMAE
from timm.models import VisionTransformer

from appendix.tools.convert_checkpoint import export_timm
from common import mae as mae_module
from common import options, scripts
from common.checkpoint import load_newest
from common.errors import UserError
from common.mae import MAE, take
from common.pretrained import read_weights
from common.rebuilding import load_model
from common.vit import SIZES, build_vit, set_fused_attention
from sec5_distill import pretrain_dmae
from sec5_distill.distillation import DMAE, attention_loss, block_logits, hidden_loss, visible_ids
from sec5_distill.teachers import Teacher, check_channels
from tests.helpers import assert_close, assert_same, fill_by_name, golden, settings_of, stage
from tests.processes import assert_nearly_the_same, said, start_ranks

ROOT = Path(__file__).resolve().parents[1]
VIEW = dict(img_size=32, patch_size=8)  # 16 patches, 4 of them visible
SMALL = dict(embed_dim=24, depth=3, num_heads=4, decoder_embed_dim=12, decoder_num_heads=3)
LARGE = dict(embed_dim=40, depth=5, num_heads=5, decoder_embed_dim=16, decoder_num_heads=2)


@pytest.fixture(autouse=True)
def sizes(monkeypatch):
    """Register `small` and `large` as names of models."""
    for name, size in (("small", SMALL), ("large", LARGE)):
        monkeypatch.setitem(SIZES, name, {"embed_dim": size["embed_dim"], "depth": size["depth"]})
        monkeypatch.setitem(mae_module.DECODERS, name, (size["decoder_embed_dim"], 1, size["decoder_num_heads"]))


def student(seed=0):
    torch.manual_seed(seed)
    return MAE("small", num_heads=4, **VIEW)


def larger(seed=1):
    """Build an MAE of other width, depth and heads whose attention is far from uniform."""
    torch.manual_seed(seed)
    mae = MAE("large", num_heads=5, **VIEW)
    for block in mae.blocks:
        block.attn.qkv.weight.data *= 4
    return mae


def batch(seed=2, images=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, 3, 32, 32, generator=generator), torch.rand(images, 16, generator=generator)


def dmae_loss(dmae, teacher, images, noise):
    return dmae(images, noise, *teacher(images, visible_ids(dmae.model, noise)))


# The loss

def test_reference_loss_of_the_attention():
    values = {name: torch.from_numpy(value) for name, value in golden("distill_attention").items()}
    loss = attention_loss(values["student_logits"], values["teacher_logits"], values["head_map"])
    assert_close(loss, values["loss"], 1e-5)


def test_reference_logits_of_a_block(monkeypatch):
    values = golden("block")
    tokens = torch.from_numpy(values["tokens"])
    monkeypatch.setitem(SIZES, "golden", {"embed_dim": tokens.shape[-1], "depth": 1})
    vit = build_vit("golden", num_heads=int(values["heads"]), **VIEW)
    block = fill_by_name(vit.blocks[0])
    assert_close(block_logits(block, tokens), values["attention_logits"], 1e-5)


def test_losses_are_in_float32_under_autocast():
    """The values differ by less than bf16 can represent."""
    a = torch.full((1, 2, 2, 2), 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention_loss(a, a + 1e-3, torch.eye(2)).item() == pytest.approx(1e-6, rel=1e-3)
        assert hidden_loss(a[0], a[0] + 1e-3, torch.eye(2)).item() == pytest.approx(1e-6, rel=1e-3)


@pytest.mark.parametrize(("pairs", "weight"), [([(3, 5)], 1.0), ([(1, 1), (2, 4), (3, 4)], 0.3)])
def test_equals_the_straightforward_dmae(pairs, weight):
    """Loss and all gradients agree, for a teacher of other width, depth and heads; the other computes all attention."""
    blocks, theirs = zip(*pairs)
    ours = DMAE(student(), teacher := Teacher(larger(), theirs), blocks, attention_weight=weight)
    slow = StraightforwardDMAE({**VIEW, **SMALL}, {**VIEW, **LARGE}, pairs, weight)
    slow.load_state_dict({**ours.state_dict(), **{f"tch_model.{k}": v for k, v in larger().state_dict().items()}})
    images, noise = batch()
    loss, parts = dmae_loss(ours, teacher, images, noise)
    expected = slow(images, noise)
    assert parts["attention"] > 0.1 and parts["mae"] > 0.1  # neither is lost beside the other
    assert_close(loss, expected, 1e-6)
    loss.backward()
    expected.backward()
    for name, parameter in slow.named_parameters():
        if parameter.requires_grad:
            assert_close(ours.get_parameter(name).grad, parameter.grad, 1e-4)


def test_distilled_from_itself_by_the_identity_the_loss_is_zero():
    twin = student()
    dmae = DMAE(student(), teacher := Teacher(twin, (1, 3), (0, 2, 3)), (1, 3), (0, 2, 3))
    for adapter in (*dmae.attn_adapter.values(), *dmae.hidden_adapter.values()):
        weight = adapter.weight.data
        weight.copy_(torch.eye(len(weight)).view_as(weight))
    loss, parts = dmae_loss(dmae, teacher, *batch())
    assert parts["attention"] < 1e-10 and parts["hidden"] < 1e-10 and loss.item() == pytest.approx(parts["mae"].item())
    with torch.no_grad():
        dmae.model.blocks[2].attn.qkv.bias[0] += 1
    assert dmae_loss(dmae, teacher, *batch())[1]["attention"] > 1e-4


def test_hidden_states_are_the_norms_outputs():
    """Layer 1 of the student is matched with layer 4 of the teacher, and final norm with final norm."""
    dmae = DMAE(student(), teacher := Teacher(large := larger(), (), (4, 5)), (), (1, 3), hidden_weight=0.5)
    images, noise = batch()
    ids = visible_ids(dmae.model, noise)
    visible = take(dmae.model.patchify(images), ids)
    ours, theirs = [], []
    dmae.model.forward_encoder(visible, ids, ours)
    large.forward_encoder(visible, ids, theirs)
    expected = 0
    for layer, (a, b) in {"1": (dmae.model.blocks[1].norm1(ours[1]), large.blocks[4].norm1(theirs[4])),
                          "3": (dmae.model.norm(ours[3]), large.norm(theirs[5]))}.items():
        expected += (a @ dmae.hidden_adapter[f"adapter{layer}"].weight.T - b).square().mean()
    loss, parts = dmae_loss(dmae, teacher, images, noise)
    assert_close(parts["hidden"], expected, 1e-5)
    assert_close(loss, parts["mae"] + 0.5 * expected, 1e-5)


# The teacher

@torch.no_grad()
@pytest.mark.parametrize("settings", [dict(global_pool="avg"), dict(global_pool="token", no_embed_class=True),
                                      dict(global_pool="token", pre_norm=True, num_classes=0)])
def test_a_timm_vit_as_teacher_sees_what_it_would_see(settings):
    """Given all patches in order, it computes what timm's own forward does; hooks catch each norm1 output."""
    torch.manual_seed(0)
    vit = VisionTransformer(embed_dim=40, depth=5, num_heads=5, fc_norm=settings["global_pool"] == "avg", **VIEW,
                            **settings).eval()
    images, seen = batch()[0], {}
    for i, block in enumerate(vit.blocks):
        block.norm1.register_forward_hook(lambda module, args, out, i=i: seen.__setitem__(i, out))
    features = vit.forward_features(images)
    seen[5] = vit.fc_norm(features) if settings["global_pool"] == "avg" else features
    teacher = Teacher(vit, (1, 3, 5), (0, 4, 5))
    logits, hidden = teacher(images, torch.arange(16).expand(3, -1))
    for i, found in zip((0, 2, 4), logits, strict=True):
        q, k, _ = vit.blocks[i].attn.qkv(seen[i]).view(3, 17, 3, 5, 8).permute(2, 0, 3, 1, 4)
        assert_close(found, q @ k.transpose(-2, -1) / 8**0.5, 1e-5)
    for i, found in zip((0, 4, 5), hidden, strict=True):
        assert_close(found, seen[i], 1e-5)


def test_it_runs_no_further_than_asked():
    """Blocks 1 to 3 run whole, of block 4 only norm1, q and k, of block 5 nothing."""
    teacher = Teacher(encoder := larger(), (4, 2))
    ran = []
    for i, block in enumerate(encoder.blocks, start=1):
        for part in (block.attn.qkv, block.mlp):  # logits alone read a part of qkv's weights, not qkv
            part.register_forward_hook(lambda *_, i=i: ran.append(i))
    logits, hidden = teacher(torch.randn(2, 3, 32, 32), torch.arange(4).expand(2, -1))
    assert ran == [1, 1, 2, 2, 3, 3] and len(teacher.blocks) == 4 and hidden == []
    assert [x.shape for x in logits] == [(2, 5, 5, 5)] * 2 and not torch.equal(*logits)


def test_half_precision_is_autocasts_without_the_casting():
    """The result is bit-identical to autocast on float32 weights; norms and the residual stream stay in float32."""
    images, noise = batch()
    seen = images, visible_ids(student(), noise)
    with torch.autocast("cpu", torch.bfloat16):
        expected, _ = set_fused_attention(Teacher(larger(), (2, 5)), "cpu", torch.bfloat16)(*seen)
        teacher = Teacher(larger(), (2, 5)).prepare("cpu", torch.bfloat16)
        logits, _ = teacher(*seen)
    assert_same(logits, expected)
    assert teacher.blocks[0].mlp.fc1.weight.dtype == teacher.proj.weight.dtype == logits[0].dtype == torch.bfloat16
    assert teacher.blocks[0].norm1.weight.dtype == teacher.pos_embed.dtype == torch.float32
    assert_close(Teacher(larger(), (2, 5))(*seen)[0][0], logits[0], 0.05)


def test_a_teacher_of_other_channels_is_refused():
    with pytest.raises(UserError, match="the teacher reads 1 channels and the student 3: choose --in-chans 1"):
        check_channels(student(), MAE("large", num_heads=5, in_chans=1, **VIEW))


def test_blocks_that_are_not_there_or_not_paired_are_refused():
    with pytest.raises(UserError, match="--teacher-blocks 6: the teacher has 1 to 5"):
        Teacher(larger(), (6,))
    with pytest.raises(UserError, match="--distill-blocks 0 4: the student has 1 to 3"):
        DMAE(student(), Teacher(larger(), (1, 2)), (0, 4))
    for blocks, theirs in (((1, 2), (1,)), ((2, 2), (1, 2))):
        with pytest.raises(UserError, match="no pairs"):
            DMAE(student(), Teacher(larger(), theirs), blocks)
    with pytest.raises(UserError, match="nothing to distil"):
        DMAE(student(), Teacher(larger()))


@pytest.mark.parametrize(("settings", "message"), [
    ({"distill_blocks": [13]}, "--distill-blocks 13: the student has 1 to 12"),
    ({"hidden_layers": [3, 13]}, "--hidden-layers 13: the student has 0 to 12"),
    ({"teacher_blocks": [13]}, "--teacher-blocks 13: the teacher has 1 to 12"),
    ({"teacher_hidden_layers": [1]}, "no pairs"), ({"distill_blocks": []}, "nothing to distil"),
    ({"teacher_model": "none"}, "unknown model 'none'")])
def test_mistakes_are_found_before_a_teacher_is_pre_trained(monkeypatch, settings, message):
    monkeypatch.setattr(pretrain_dmae, "pretrain_teacher", None)  # whoever pre-trains now fails
    explicit = {"preset": "demo", "device": "cpu", **settings}
    args = settings_of(pretrain_dmae, explicit)
    assert args.teacher == "own"
    with pytest.raises(UserError, match=message):
        pretrain_dmae.main(args)


@pytest.mark.parametrize(("known", "asked", "identity", "left"), [
    (None, None, "f", None), (None, 12, "f", None), (None, 5, "f, 5 heads", 5), (5, 5, "f, 5 heads", None),
    (5, None, "f, 5 heads", None), (12, 12, "f", None)])
def test_a_teachers_identity_and_the_settings_of_its_run(known, asked, identity, left):
    """Identities of finished runs are kept: heads are in it unless 12, and in the settings if no file has them."""
    images = dict(in_chans=3, mean=None, std=None)
    args = SimpleNamespace(teacher="t", teacher_heads=asked, distill_blocks=[3], teacher_blocks=[3], hidden_layers=[],
                           teacher_hidden_layers=None, **images)
    weights = SimpleNamespace(config=known and {"num_heads": known}, fingerprint="f", statistics=None)
    assert pretrain_dmae.teacher_identity(args, weights) == identity
    assert vars(pretrain_dmae.without_defaults(args, weights)) == dict(
        teacher="t", teacher_model=None, teacher_epochs=None, teacher_heads=left, distill_blocks=[3],
        teacher_blocks=None, hidden_layers=None, teacher_hidden_layers=None, **images)


# Whole runs, 8 steps of 4 images

COMMON = dict(preset="demo", data="folder", img_size=[32], patch_size=8, num_heads=4, model="small", batch_size=4,
              epochs=2, warmup_epochs=1, base_lr=4e-3, clip_grad=0.5, precision="fp32", device="cpu", workers=0,
              log_every=1, save_minutes=60)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Make a folder of 16 images of noise."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.RandomState(0)
    for i in range(16):
        Image.fromarray(rng.randint(0, 256, (40, 40, 3), dtype=np.uint8)).save(root / f"{i:02d}.png")
    return root


@pytest.fixture
def teacher_file(tmp_path):
    return save_teacher(larger(), tmp_path / "teacher.pt")


def save_teacher(mae, path):
    torch.save({"model": mae.state_dict(), "config": mae.config}, path)
    return path


@pytest.fixture
def distil(pictures, teacher_file, tmp_path):
    """Return a function that runs pretrain_dmae.main and returns its result."""
    def run(**settings):
        settings = {**COMMON, "data_path": str(pictures), "output": str(tmp_path), "teacher": str(teacher_file),
                    "distill_blocks": [3], "teacher_blocks": [5], **settings}
        return stage("sec5_distill/pretrain_dmae.py", settings)
    return run


def weights(result):
    return torch.load(result["checkpoint"], weights_only=True)["model"]


def test_with_weight_zero_it_is_the_mae_bit_for_bit(distil, pictures, tmp_path):
    mae = stage("sec3_benchmark/pretrain_mae.py", {**COMMON, "data_path": str(pictures), "output": str(tmp_path)})
    dmae = distil(attention_weight=0.0, hidden_layers=[2], teacher_hidden_layers=[2], hidden_weight=0.0)
    ours = {name.removeprefix("model."): w for name, w in weights(dmae).items() if name.startswith("model.")}
    assert_same(ours, dict(weights(mae)))
    distilled = weights(distil())
    assert not torch.equal(distilled["model.blocks.2.attn.qkv.weight"], ours["blocks.2.attn.qkv.weight"])


def test_the_teacher_stays_as_it_is_and_out_of_every_file(distil, teacher_file, monkeypatch, tmp_path):
    """It is frozen and in eval mode in every step; only the student and M are saved, and they are read as an MAE."""
    teachers, modes = [], []

    def after_step(self, step):
        teachers.append(self.teacher)
        modes.append(any(module.training for module in self.teacher.modules()))
    monkeypatch.setattr(pretrain_dmae.DMAEMethod, "after_step", after_step)
    result = distil()
    teacher = teachers[0]
    assert modes == [False] * 8
    assert_same(teacher.state_dict(), Teacher(larger(), (5,)).state_dict())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())

    expected = {f"model.{name}" for name in student().state_dict()} | {"attn_adapter.adapter2.weight"}
    assert weights(result).keys() == expected
    assert weights(result)["attn_adapter.adapter2.weight"].shape == (5, 4, 1, 1)
    loaded = load_model(result["checkpoint"])
    assert isinstance(loaded, MAE) and loaded.config["num_heads"] == 4
    assert torch.equal(loaded.pos_embed, student().pos_embed)
    assert read_weights(result["checkpoint"]).left_out == ["attn_adapter.adapter2.weight"]


def stop_after(step, monkeypatch):
    monkeypatch.setattr(pretrain_dmae.DMAEMethod, "after_step",
                        lambda self, now: os.kill(os.getpid(), signal.SIGTERM) if now + 1 == step else None)


def test_stopped_and_continued_it_ends_in_the_same_bits(distil, monkeypatch, tmp_path):
    untouched = weights(distil(output=str(tmp_path / "untouched")))
    for step in (3, 6):
        stop_after(step, monkeypatch)
        with pytest.raises(SystemExit) as stopped:
            distil()
        assert stopped.value.code == 75
    [folder] = (tmp_path / "pretrain_dmae").iterdir()
    saved = load_newest(folder)
    assert saved["progress"]["step"] == 6 and saved["model"].keys() == untouched.keys() and saved["method"] == {}
    stop_after(None, monkeypatch)
    assert_same(weights(distil()), untouched)


def test_accumulation_gives_the_same_weights(distil, tmp_path):
    assert_nearly_the_same(weights(distil(micro_batch=2, output=str(tmp_path / "two"))), weights(distil()))


def test_another_teacher_is_another_run(distil, teacher_file, tmp_path):
    """A teacher is identified by content: a copy finds the finished run, other weights at the same path do not."""
    first = distil()
    copy = tmp_path / "elsewhere.pt"
    copy.write_bytes(teacher_file.read_bytes())
    again = distil(teacher=str(copy))
    assert again["run"] == first["run"] and again["teacher"] == str(copy)
    save_teacher(larger(seed=5), teacher_file)
    assert distil()["run"] != first["run"]


def test_heads_of_a_foreign_teacher_are_asked_for(distil, tmp_path, capsys):
    """A file in facebook's layout, an encoder alone, does not contain the number of heads."""
    state = {k: v for k, v in larger().state_dict().items() if not k.startswith(("decoder", "mask_token"))}
    torch.save({"model": state}, tmp_path / "mae_pretrain_vit.pth")
    result = distil(teacher=str(tmp_path / "mae_pretrain_vit.pth"), teacher_heads=5)
    assert_same(weights(result), weights(distil()))
    with pytest.raises(UserError, match="a width of 40 cannot be shared by 12 heads"):
        distil(teacher=str(tmp_path / "mae_pretrain_vit.pth"))


def test_the_same_teacher_as_a_timm_folder(distil, tmp_path):
    """It is timm's own ViT with the same weights; the folder contains its number of heads."""
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    export_timm(larger(), tmp_path / "vit", mean, std)
    assert_same(weights(distil(teacher=str(tmp_path / "vit"))), weights(distil()))


def test_the_student_sees_images_normalised_as_the_teachers_were(distil, tmp_path):
    export_timm(larger(), tmp_path / "vit", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    statistics = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    taken, said = distil(teacher=str(tmp_path / "vit")), distil(teacher=str(tmp_path / "vit"), **statistics)
    assert torch.load(taken["checkpoint"], weights_only=True)["statistics"] == statistics
    assert_same(weights(taken), weights(said))
    kept = distil(teacher=str(tmp_path / "vit"), mean=[0.4, 0.4, 0.4])  # the teacher converts the images
    statistics["mean"] = [0.4, 0.4, 0.4]
    assert torch.load(kept["checkpoint"], weights_only=True)["statistics"] == statistics


def test_its_own_teacher_is_an_mae_of_the_same_recipe(monkeypatch, distil, teacher_file):
    """It is larger, has seed 0, trains as long as the student or as given, and is never trained afresh."""
    asked, run = [], scripts.run

    def record(script, words=()):
        if script != "sec3_benchmark/pretrain_mae.py":
            return run(script, words)
        asked.append(scripts.settings_of(script, words))
        return {"checkpoint": str(teacher_file)}
    monkeypatch.setattr(scripts, "run", record)
    first = distil(teacher="own", teacher_model="large", teacher_heads=5, seed=3, fresh=True, decoder_dim=24)
    [args] = asked
    assert (args.model, args.num_heads, args.epochs, args.seed, args.fresh) == ("large", 5, 2, 0, False)
    assert args.decoder_dim is None and args.base_lr == COMMON["base_lr"] and args.data_path
    assert first["teacher"] == str(teacher_file)
    distil(teacher="own", teacher_model="large", teacher_heads=5, teacher_epochs=7)
    assert asked[1].epochs == 7


@pytest.mark.slow
def test_two_ranks_equal_one_process(pictures, tmp_path):
    """Uses models that the command line knows: the demo's student, and a teacher twice as wide."""
    torch.manual_seed(0)
    teacher = save_teacher(MAE("vit_tiny", **VIEW), tmp_path / "teacher.pt")
    settings = {**COMMON, "model": "vit_demo", "num_heads": 12, "data_path": str(pictures), "teacher": str(teacher)}
    words = [sys.executable, str(ROOT / "sec5_distill" / "pretrain_dmae.py"), *options.to_argv(settings)]
    for process in start_ranks([*words, "--output", str(tmp_path / "two")], tmp_path):
        assert process.wait(120) == 0, said(tmp_path)
    one = stage("sec5_distill/pretrain_dmae.py", {**settings, "output": str(tmp_path / "one")})
    [two] = (tmp_path / "two").glob("pretrain_dmae/*/weights.pt")
    assert_nearly_the_same(weights({"checkpoint": two}), weights(one))


def test_the_teacher_sees_the_patches_that_the_mae_encodes():
    mae, (images, noise) = student(), batch()
    ids = visible_ids(mae, noise)
    assert torch.equal(ids, noise.sort(dim=1).indices[:, :4])
    states, again = [], []
    latent = mae.forward_encoder(take(mae.patchify(images), ids), ids, states)
    mae(images, noise, again)
    assert_same(states, again)
    assert len(states) == 4 and torch.equal(mae.norm(states[-1]), latent)
