"""common/options.py and common/runs.py: which setting wins, what identifies a run, what a user's mistake looks like."""
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from common import distributed, entry, options, report, runs, scripts, tables, workers
from common.errors import UserError
from common.runs import open_run, settings_hash
from sec3_benchmark import detect, finetune, pretrain_mae, pretrain_mocov3
from tests.helpers import settings_of, stage

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {"sec3_benchmark.pretrain_mae": pretrain_mae, "sec3_benchmark.pretrain_mocov3": pretrain_mocov3,
           "sec3_benchmark.finetune": finetune}


# Precedence

LEVELS = {"default": 1, "preset": 2, "recipe": 3, "words": 4}


def toy_parser():
    parser = options.make_parser("toy")
    parser.add_argument("--preset", choices=options.PRESET_NAMES)
    parser.add_argument("--data-path")
    parser.add_argument("--recipe", choices=("impr", "ori"), default="impr")
    for level in LEVELS:
        parser.add_argument(f"--from-{level}", type=int, default=1)
    return parser


def test_words_beat_recipe_beats_preset_beats_default():
    """Each level sets its own name and all those of the levels that win over it; of two equal flags the last counts."""
    def at(level):
        return {f"from_{name}": LEVELS[level] for name in LEVELS if LEVELS[name] >= LEVELS[level]}
    words = ["--recipe", "ori", "--from-words", "7", *options.to_argv(at("words"))]
    settings = options.parse(toy_parser(), {"demo": at("preset")}, {"ori": at("recipe"), "impr": {}}, words)
    assert {level: getattr(settings, f"from_{level}") for level in LEVELS} == LEVELS


def test_a_value_given_wins_even_where_it_is_the_default():
    assert options.given(toy_parser(), ["--from-preset", "1"]) == {"from_preset": 1}
    presets = {"demo": {"from_preset": 2}}
    assert options.parse(toy_parser(), presets, argv=["--from-preset", "1"]).from_preset == 1
    assert options.parse(toy_parser(), presets, argv=[]).from_preset == 2


def test_the_recipe_itself_comes_from_the_command_line():
    recipes = {"impr": {"from_recipe": 7}, "ori": {"from_recipe": 8}}
    assert options.parse(toy_parser(), {}, recipes, []).from_recipe == 7
    assert options.parse(toy_parser(), {}, recipes, ["--recipe", "ori"]).from_recipe == 8
    assert options.parse(toy_parser(), {}, recipes, ["--recipe", "ori", "--recipe", "impr"]).from_recipe == 7


def test_ori_is_deits_augmentation():
    """Appendix A.1: what the older recipe changes, and what explicit arguments change in turn."""
    def settings(**explicit):
        return settings_of(finetune, explicit)
    names = ("randaugment", "erasing", "mixup", "cutmix", "smoothing", "drop_path")
    assert [getattr(settings(), n) for n in names] == ["rand-m10-mstd0.5-inc1", 0, 0.2, 0, 0, 0]
    ori = settings(recipe="ori", cutmix=0.5)
    assert [getattr(ori, n) for n in names] == ["rand-m9-mstd0.5-inc1", 0.25, 0.8, 0.5, 0.1, 0.1]


@pytest.mark.parametrize("module", SCRIPTS.values(), ids=SCRIPTS)
def test_the_preset_follows_from_the_data_path(module):
    def preset(**explicit):
        settings = options.resolve(settings_of(module, explicit))
        return settings.preset, settings.data, settings.model
    assert preset() == ("demo", "fractals", "vit_demo")
    assert preset(data_path="somewhere") == ("paper", "imagenet", "vit_tiny")
    assert preset(data_path="somewhere", preset="small") == ("small", "folder", "vit_tiny")
    assert preset(preset="paper") == ("paper", "imagenet", "vit_tiny")
    assert preset(preset="demo", model="vit_tiny") == ("demo", "fractals", "vit_tiny")


@pytest.mark.parametrize(("module", "paper"), [
    (pretrain_mae, dict(epochs=400, batch_size=4096, base_lr=1.5e-4, warmup_epochs=40, weight_decay=0.05, beta2=0.95,
                        mask_ratio=0.75, crop_min=0.08, clip_grad=0)),
    (pretrain_mocov3, dict(epochs=400, batch_size=1024, base_lr=1.5e-4, warmup_epochs=40, warmup_lr=1e-6,
                           weight_decay=0.1, temperature=0.2, momentum=0.99, mlp_dim=4096, out_dim=256,
                           stop_grad_conv1=False, crop_min=0.08, blur_sigma=2.0, clip_grad=0)),
    (finetune, dict(epochs=300, batch_size=1024, base_lr=1e-3, min_lr=1e-6, warmup_epochs=5, weight_decay=0.05,
                    layer_decay=0.85, clip_grad=0, global_pool="avg", eval_every=10))])
def test_the_paper_preset_is_the_papers_recipe(module, paper):
    """Appendix A.2, A.3 and A.1."""
    settings = vars(options.resolve(settings_of(module, {"preset": "paper"})))
    expected = {**paper, "model": "vit_tiny", "num_heads": 12, "patch_size": 16, "img_size": [224], "in_chans": 3}
    assert {name: settings[name] for name in expected} == expected


def test_the_preset_and_what_differs_from_the_paper_is_printed(capsys):
    parser = pretrain_mae.build_parser()
    entry.announce(parser, options.parse(parser, pretrain_mae.PRESETS, argv=["--mask-ratio", "0.6"]))
    printed = capsys.readouterr().out
    assert printed.startswith("# preset demo: ") and "--model vit_demo" in printed and "--mask-ratio 0.6" in printed
    assert "beta2" not in printed
    entry.announce(parser, options.parse(parser, pretrain_mae.PRESETS, argv=["--data-path", "D"]))
    assert capsys.readouterr().out == "# preset paper: --data-path D (else the paper's values)\n"


@pytest.mark.parametrize("script", ["sec3_benchmark/table1_pretraining_methods.py", "appendix/claims.py",
                                    "sec4_analysis/fig1_layer_similarity.py"])
def test_a_table_announces_and_offers_only_what_is_its_own(script, capsys):
    """No image size, which belongs to its stages, and no --save-to, as it makes many weights."""
    module = scripts.module_of(script)
    parser = module.build_parser()
    parse = getattr(module, "study", tables).parse
    entry.announce(parser, parse(parser, ["--seed" + "s" * ("fig" not in script), "3"]))
    assert "--img-size" not in (said := capsys.readouterr().out) and "3" in said and "paper's values" not in said
    with pytest.raises(SystemExit):
        parse(module.build_parser(), ["--help"])
    assert "--save-to" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        parse(module.build_parser(), ["--save-to", "x.pt"])
    assert "--save-to names one file and a table makes many" in capsys.readouterr().err


def test_a_warm_up_that_is_all_of_the_training_is_refused():
    with pytest.raises(UserError, match="--warmup-epochs 5 leaves nothing of --epochs 5"):
        settings_of(pretrain_mae, {"epochs": 5, "warmup_epochs": 5})


def test_an_unknown_device_is_refused():
    with pytest.raises(UserError, match="--device gpu: choose auto, cpu, cuda"):
        distributed.start_process_group("gpu")


def test_a_gpu_that_cannot_be_used_is_said_unless_it_was_hidden_on_purpose(monkeypatch):
    """For example with a driver that is too old. Hours of training on the CPU would be a silent fallback."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(os.path, "exists", lambda path: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(UserError, match="PyTorch cannot use it.*--device cpu goes on without"):
        distributed.start_process_group("auto")
    assert distributed.start_process_group("cpu").type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert distributed.start_process_group("auto").type == "cpu"


def test_a_failed_start_leaves_no_folder(tmp_path):
    for wrote, left in ((False, 0), (True, 1)):
        with pytest.raises(UserError), open_run("script", "name", run_settings(tmp_path), {}) as run:
            if wrote:
                run.log({"step": 1})
            raise UserError("does not fit")
        assert len(list((tmp_path / "script").iterdir())) == left


def test_unknown_settings_are_named(capsys):
    for script, words, said in (("sec3_benchmark/finetune.py", {"epochz": 3}, "finetune.py: error: .*--epochz 3 .per"),
                                ("sec3_benchmark/pretrain_mae.py", {"epoch": 3}, "--epoch ")):  # no abbreviations
        with pytest.raises(SystemExit) as error:
            stage(script, words)
        assert error.value.code == 2 and re.search(said, capsys.readouterr().err)


@pytest.mark.parametrize(("name", "value"), [
    ("preset", "tiny"), ("recipe", "deit"), ("model", "vit_large"), ("data", "imagenet21k"), ("precision", "fp8")])
def test_a_row_cannot_choose_what_the_command_line_refuses(name, value, capsys):
    """An unknown preset or recipe must not silently be the defaults."""
    with pytest.raises(SystemExit) as error:
        settings_of(finetune, {name: value})
    assert value in f"{error.value} {capsys.readouterr().err}"


def test_help_says_each_default_once():
    text = finetune.build_parser().format_help()
    assert re.search(r"--epochs EPOCHS\s+default: 300", text)  # an argument without a text of its own
    assert "(default: None)" not in text and "(default: 0.85)" in text
    assert " ".join(text.split()).count("default: as the weights say, else 224") == 1


# Commands

def resolved(module, argv):
    """Return the settings that may enter the identity of a run with these arguments."""
    args = options.parse(module.build_parser(), module.PRESETS, getattr(module, "RECIPES", None), argv)
    args = detect.resolve_backbone(args, None) if module is detect else options.resolve(args)
    own = ("keep_activations", "draw") if module is detect else ("teacher",) if hasattr(args, "teacher") else ()
    outside = ("subset", "equal", "pretrain_path", *own)
    return {name: value for name, value in vars(args).items() if name not in outside}


@pytest.mark.parametrize(("name", "argv"), [
    ("sec3_benchmark/pretrain_mae.py", ""),
    ("sec3_benchmark/pretrain_mae.py", "--preset small --data-path d --img-size 64 96 --raw-pixels --base-lr 1e-3 "
                                    "--decoder-depth 2 --workers -1 --fresh --clip-grad 0.3333333333333333 --seed 3"),
    ("sec3_benchmark/finetune.py", "--data-path d --recipe ori --cutmix 0 --init timm:x --keep-blocks 0 --in-chans 2 "
                                "--mean 1e-3 0.3 --std 1 0.2 --eval-only --precision bf16")])
def test_settings_in_words_mean_the_same_settings(name, argv):
    settings = scripts.settings_of(name, argv.split())
    assert scripts.settings_of(name, options.to_argv(vars(settings))) == settings


def test_a_printed_command_survives_the_shell():
    script = "sec3_benchmark/pretrain_mae.py"
    settings = scripts.settings_of(script, ["--data-path", "my images/$(set 1)", "--output", "it's here"])
    words = shlex.split(shlex.join(options.to_argv(vars(settings))))
    assert scripts.settings_of(script, words) == settings


def test_workers_share_the_cores_of_a_node(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [workers.default_workers(n, cpu) for n in (-1, 0, 5)] == [2, 0, 5]
    assert workers.default_workers(-1, gpu) == 15
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert workers.default_workers(-1, gpu) == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert [workers.default_workers(-1, device) for device in (cpu, gpu)] == [0, 1]


# A run's identity

STORED = [  # settings, fingerprints, the hash they had when this was written
    ({"data": "folder", "data_path": "/a", "img_size": [64], "base_lr": 0.001, "init": None, "raw_pixels": False,
      "preset": "small", "workers": 4, "seed": 0}, {"data": "0123456789abcdef"}, "561c15a366"),
    ({"recipe": "ori", "epochs": 300, "mixup": 0.8, "keep_blocks": 0, "mean": [0.5, 0.25], "init": "/b/weights.pt",
      "output": "outputs", "compile": True}, {"train": "a", "val": "b", "init": "c"}, "3687f68644"),
]
STORED_DEFAULTS = {"sec3_benchmark.pretrain_mae": "8d3c8589da", "sec3_benchmark.finetune": "7226bda089",
                   "sec3_benchmark.pretrain_mocov3": "858cee44e0", "sec3_benchmark.detect": "c835209c55",
                   "sec5_distill.pretrain_dmae": "bca1104215", "appendix.pretrain_dino": "627771fc6b",
                   "appendix.pretrain_simmim": "2ae2b8dd25", "appendix.finetune_distilled": "18f49e2f3c"}


@pytest.mark.parametrize(("settings", "fingerprints", "stored"), STORED)
def test_the_rule_of_the_hash_has_not_changed(settings, fingerprints, stored):
    assert settings_hash(settings, fingerprints) == stored
    assert settings_hash(dict(reversed(settings.items())), fingerprints) == stored  # in any order


@pytest.mark.parametrize("name", STORED_DEFAULTS)
def test_new_arguments_leave_the_papers_runs_where_they_are(name):
    """Fails when an argument is added with a default that is not off, or a default changes. A new argument goes into
    ADDED_LATER; only a change that gives other results may change the hash here, and it loses every finished run.
    """
    where = "--dataset-path" if name.endswith("detect") else "--data-path"
    settings = resolved(importlib.import_module(name), ["--preset", "paper", where, "anywhere"])
    assert settings_hash(settings, {"data": "0123456789abcdef"}) == STORED_DEFAULTS[name]


def changed(value):
    return {bool: not value, int: 7777, float: 0.7777, str: "changed", list: [7777]}.get(type(value), "changed")


@pytest.mark.parametrize("module", SCRIPTS.values(), ids=SCRIPTS)
def test_what_changes_the_result_enters_and_nothing_else(module):
    """Arguments of execution, and files that are known by their content, stay out of the identity; all others enter."""
    settings = resolved(module, ["--data-path", "here"])
    outside = {name for name, value in settings.items()
               if settings_hash({**settings, name: changed(value)}, {}) == settings_hash(settings, {})}
    execution = {"output", "save_to", "fresh", "device", "precision", "micro_batch", "workers", "keep_decoded",
                 "compile", "deterministic", "allow_inexact", "save_minutes", "log_every", "on_bad_image",
                 "tensorboard", *({"probe_every"} & set(settings))}
    assert outside == execution | {"data_path", "download", "preset"} | ({"init"} & set(settings))
    assert settings_hash(settings, {"data": "x"}) != settings_hash(settings, {"data": "y"})


def test_an_argument_added_later_enters_only_where_it_differs(monkeypatch):
    old = {"epochs": 3, "mixup": 0.2}
    expected = settings_hash(old, {})
    for off in (None, False):
        assert settings_hash({**old, "new": off}, {}) == expected
    for on in (True, 0, 0.0, "", "x", []):
        assert settings_hash({**old, "new": on}, {}) != expected
    monkeypatch.setitem(runs.ADDED_LATER, "new", 1.5)
    assert settings_hash({**old, "new": 1.5}, {}) == expected
    assert settings_hash({**old, "new": 2.5}, {}) != expected
    assert settings_hash({**old, "new": False}, {}) == expected


def test_sizes_enter_as_they_were_stored():
    """The command line gives one number, a file of weights two. Runs with either exist, and keep their hashes."""
    assert settings_hash({"img_size": [48]}, {}) == "a99777dd7b"
    assert settings_hash({"img_size": [48, 48]}, {}) == "4592d375a7"


def test_a_row_and_a_command_line_that_say_the_same_find_the_same_run():
    """Tables share finished runs with scripts started by hand: 1 is 1.0, 64 is [64], (2, 3) is [2, 3]."""
    by_hand = resolved(finetune, "--clip-grad 1 --mixup 0 --img-size 64 --mean 0 0 0".split())
    row = {"clip_grad": 1, "mixup": 0, "img_size": 64, "mean": (0, 0, 0)}
    assert settings_hash(resolved(finetune, options.to_argv(row)), {}) == settings_hash(by_hand, {})


@pytest.mark.parametrize("given", [{"data_path": ""}, {"init": ""}])
def test_an_empty_value_is_not_taken_for_none(given):
    """Otherwise an unset shell variable would silently start from scratch, or start the demo."""
    with pytest.raises(UserError, match="is empty: is a shell variable in it not set"):
        settings_of(finetune, given)


# A run's folder

class Tiny(torch.nn.Linear):
    config = {"model": "tiny"}


def run_settings(tmp_path, **settings):
    return SimpleNamespace(**{"output": str(tmp_path), "fresh": False, "epochs": 3, "data_path": "/a", "in_chans": 3,
                              "mean": None, "std": None, "on_bad_image": "stop", **settings})


def test_data_and_weights_count_by_content_and_not_by_place(tmp_path):
    def folder(fingerprint, **settings):
        with open_run("script", "name", run_settings(tmp_path, **settings), {"data": fingerprint}) as run:
            return run.folder
    first = folder("x", init="/c/weights.pt")
    assert first.parent == tmp_path / "script" and first.name.startswith("name-")
    assert folder("x", data_path="/b", init="/d/other.pt") == first
    assert folder("y") != first and folder("x", epochs=4) != first
    stored = json.loads((first / "settings.json").read_text())
    assert stored["data_path"] == "/b" and stored["fingerprints"] == {"data": "x"} and stored["script"] == "script"


def test_a_finished_run_is_reused_wherever_it_was_moved(tmp_path, capsys):
    args, copy = run_settings(tmp_path / "here"), tmp_path / "there" / "copy.pt"
    with open_run("script", "name", args, {}) as run:
        assert run.result is None
        (run.folder / "step-00000001.pt").write_bytes(b"made to resume")
        returned = run.finish({"top1": 12.5}, Tiny(2, 2))
    assert sorted(p.name for p in run.folder.iterdir()) == ["lock", "result.json", "settings.json", "weights.pt"]
    shutil.move(tmp_path / "here", tmp_path / "moved")
    with open_run("script", "name", run_settings(tmp_path / "moved", save_to=str(copy)), {}) as again:
        assert again.folder == tmp_path / "moved" / "script" / run.folder.name
        assert again.result["top1"] == returned["top1"] == 12.5
        assert again.result["run"] == str(again.folder)
        weights = torch.load(again.result["checkpoint"], weights_only=True)
    assert weights["config"] == Tiny.config and weights["model"].keys() == {"weight", "bias"}
    assert copy.read_bytes() == Path(again.result["checkpoint"]).read_bytes()
    assert json.loads((again.folder / "result.json").read_text())["environment"]["torch"] == torch.__version__
    assert "finished: reused" in capsys.readouterr().out


@pytest.mark.parametrize("finished", [True, False])
def test_what_a_killed_process_left_is_removed_at_the_next_start(tmp_path, finished):
    """Half-written files always; checkpoints only of a finished run, since an unfinished one continues from them."""
    with open_run("script", "name", run_settings(tmp_path), {}) as run:
        run.log({"step": 1})
        if finished:
            run.finish({"top1": 1.0}, Tiny(2, 2))
    before = {path.name for path in run.folder.iterdir()}
    steps = {"step-00000001.pt", "step-00000002.pt"}
    for name in (".best.pt.12ab.tmp", ".weights.pt.12ab.tmp", ".step-00000003.pt.12ab.tmp", *steps):
        (run.folder / name).write_bytes(b"half")
    with open_run("script", "name", run_settings(tmp_path), {}):
        assert {path.name for path in run.folder.iterdir()} == before | (set() if finished else steps)


@pytest.mark.parametrize(("checkpoint", "content", "kept", "said"), [
    ("a\nb\n", "a\nb\nc\n", "a\nb\n", False),  # the checkpoint's rows, and one after it
    ("a\nb\n", "a\nb\nc", "a\nb\n", True),
    ("a\nbcd\n", "a\nbc", "a\n", True),  # of the checkpoint's own rows one was lost
    ("", "{half", "", True),
    ("a\n", "a\n", "a\n", False),
])
def test_a_log_that_was_cut_off_is_repaired_and_said(tmp_path, capsys, checkpoint, content, kept, said):
    run = runs.Run(tmp_path, {})
    run.log_path.write_text(content)
    run.cut_log(len(checkpoint))
    assert run.log_path.read_text() == kept
    assert (str(run.log_path) in capsys.readouterr().out) == said


@pytest.mark.parametrize("trouble", ["no rows", "matplotlib", "full disk"])
def test_a_picture_that_fails_costs_no_weights(tmp_path, capsys, monkeypatch, trouble):
    def failing(*_, **__):
        raise OSError(28, "No space left on device") if trouble == "full disk" else ValueError("Key backend: no such")
    with open_run("script", "name", run_settings(tmp_path), {}) as run:
        if trouble == "no rows":
            run.log_path.write_text("no row at all\n")
        else:
            run.log({"step": 1, "epoch": 1, "lr": 1.0, "loss": 1.0})
            monkeypatch.setattr(report, "subplots" if trouble == "matplotlib" else "write_atomically", failing)
        run.finish({"top1": 1.0}, Tiny(2, 2))
    assert runs.finished(run.folder)["top1"] == 1.0 and torch.load(run.folder / "weights.pt", weights_only=True)
    [line] = [line for line in capsys.readouterr().out.splitlines() if "curve.png" in line]
    assert line.startswith("warning: ")


def test_many_may_reuse_a_finished_run_at_once(tmp_path):
    """That takes no lock and writes nothing, so it works in a read-only folder too."""
    with open_run("script", "name", run_settings(tmp_path), {}) as run:
        run.finish({"top1": 1.0}, Tiny(2, 2))
    (run.folder / "lock").unlink()
    before = sorted(path.stat().st_mtime_ns for path in run.folder.iterdir())
    with open_run("script", "name", run_settings(tmp_path), {}) as one:
        with open_run("script", "name", run_settings(tmp_path), {}) as another:
            assert one.result["top1"] == another.result["top1"] == 1.0
    assert sorted(path.stat().st_mtime_ns for path in run.folder.iterdir()) == before


def test_weights_that_were_deleted_cannot_be_copied(tmp_path):
    with open_run("script", "name", run_settings(tmp_path), {}) as run:
        run.finish({"top1": 1.0}, Tiny(2, 2))
    (run.folder / "weights.pt").unlink()
    with open_run("script", "name", run_settings(tmp_path), {}) as again:
        assert again.result["top1"] == 1.0
    with pytest.raises(OSError, match="weights.pt is gone, so --save-to has nothing to copy: --fresh makes it again"):
        with open_run("script", "name", run_settings(tmp_path, save_to=str(tmp_path / "copy.pt")), {}):
            pass


@pytest.mark.parametrize(("file", "harm"), [
    ("result.json", lambda raw: raw[:len(raw) // 2]), ("result.json", lambda raw: b""),
    *(("result.json", lambda raw, text=text: text) for text in (b"{}", b"null", b"[]", b"3", b"\xff\xfe")),
    ("weights.pt", lambda raw: raw[:len(raw) // 2]), ("weights.pt", lambda raw: b""),
    ("weights.pt", lambda raw: raw.replace(b"weight", b"height", 1))])
def test_a_damaged_result_is_said_and_made_again(tmp_path, capsys, file, harm):
    with open_run("script", "name", run_settings(tmp_path), {}) as run:
        run.finish({"top1": 1.0}, Tiny(2, 2))
    path = run.folder / file
    path.write_bytes(harm(path.read_bytes()))
    with open_run("script", "name", run_settings(tmp_path), {}) as again:
        assert again.result is None and f"{path} is damaged" in capsys.readouterr().out
        again.finish({"top1": 2.0}, Tiny(2, 2))
    with open_run("script", "name", run_settings(tmp_path), {}) as third:
        assert third.result["top1"] == 2.0


def test_fresh_leaves_no_trace(tmp_path):
    with open_run("script", "name", run_settings(tmp_path), {}) as run:
        run.log({"step": 1})
        run.finish({"top1": 1.0}, Tiny(2, 2))
        (run.folder / "pictures").mkdir()
    with open_run("script", "name", run_settings(tmp_path, fresh=True), {}) as again:
        assert again.result is None and again.folder == run.folder
        assert sorted(p.name for p in run.folder.iterdir()) == ["lock", "settings.json"]


def test_a_copy_that_cannot_be_written_says_where_the_weights_are(tmp_path):
    (tmp_path / "file").touch()
    with open_run("script", "name", run_settings(tmp_path, save_to=str(tmp_path / "file" / "copy.pt")), {}) as run:
        with pytest.raises(OSError, match=f"--save-to .*copy.pt: .* The weights are in {run.folder}/weights.pt"):
            run.finish({"top1": 1.0}, Tiny(2, 2))


def test_a_run_with_replaced_images_is_reused_only_by_who_allows_it(tmp_path):
    with open_run("script", "name", run_settings(tmp_path, on_bad_image="skip"), {}) as run:
        run.finish({"top1": 1.0, "bad_images": 2}, Tiny(2, 2))
    with pytest.raises(UserError, match="finished with 2 unreadable images replaced: --on-bad-image skip"):
        with open_run("script", "name", run_settings(tmp_path), {}):
            pass
    with open_run("script", "name", run_settings(tmp_path, on_bad_image="skip"), {}) as again:
        assert again.result["top1"] == 1.0


def test_a_files_settings_give_way_to_what_was_asked_for(capsys):
    """But they win over those of the preset."""
    args = options.parse(finetune.build_parser(), finetune.PRESETS, argv=["--num-heads", "3", "--patch-size", "4"])
    config = {"num_heads": 12, "patch_size": 8, "img_size": [48, 48], "depth": 7}
    weights = SimpleNamespace(config=config, statistics=None)
    resolved = options.resolve(args, weights)
    assert (resolved.num_heads, resolved.patch_size, resolved.img_size, resolved.model) == (3, 4, [48, 48], "vit_demo")
    assert (args.img_size, args.model) == (None, None) and not hasattr(resolved, "depth")
    assert "as the weights say: --img-size 48 48" in capsys.readouterr().out


def test_a_folder_without_locks_is_not_called_in_use(tmp_path, monkeypatch):
    """For example on Lustre mounted without locks: there is no other process to wait for."""
    def flock(*args):
        raise OSError(38, "Function not implemented")
    monkeypatch.setattr(runs.fcntl, "flock", flock)
    with pytest.raises(UserError, match="cannot be locked .*not implemented.*choose an --output"):
        with open_run("script", "name", run_settings(tmp_path), {}):
            pass


def test_a_run_in_use_is_waited_for(tmp_path, capsys):
    """Both processes make the same run, so the second finds it finished."""
    weights = torch.nn.Linear(1, 1)
    weights.config = {}
    found = []

    def second():
        with open_run("script", "name", run_settings(tmp_path), {}) as run:
            found.append(run.result)
    with open_run("script", "name", run_settings(tmp_path), {}) as run:
        other = threading.Thread(target=second)
        other.start()
        other.join(1.5)
        assert other.is_alive() and not found
        run.finish({"top1": 1.0}, weights)
    other.join()
    assert found[0]["top1"] == 1.0
    assert f"{run.folder} is in use by process {os.getpid()} on " in capsys.readouterr().out


def test_a_run_in_use_of_which_nothing_came_is_begun_anew(tmp_path):
    """The first process has removed the folder, and with it the lock file that the second was waiting for."""
    entered = []

    def second():
        with open_run("script", "name", run_settings(tmp_path), {}) as run:
            entered.append(run.folder.joinpath("settings.json").exists())
            run.log({"step": 1})
    with pytest.raises(ZeroDivisionError):
        with open_run("script", "name", run_settings(tmp_path), {}):
            other = threading.Thread(target=second)
            other.start()
            other.join(0.5)
            raise ZeroDivisionError
    other.join()
    assert entered == [True]


def test_ranks_do_not_wait_for_a_run_in_use(tmp_path, monkeypatch):
    with open_run("script", "name", run_settings(tmp_path), {}) as run:
        run.log({"step": 1})
        monkeypatch.setattr(runs.distributed, "world_size", lambda: 2)
        for fresh in (False, True):
            with pytest.raises(OSError, match=f"{run.folder} is in use by process {os.getpid()} on .*stop it"):
                runs._prepare(run.folder, fresh, {})
        assert run.log_path.exists()


def test_an_error_frees_the_run_and_does_not_finish_it(tmp_path):
    with pytest.raises(ZeroDivisionError):
        with open_run("script", "name", run_settings(tmp_path), {}):
            raise ZeroDivisionError
    with open_run("script", "name", run_settings(tmp_path), {}) as run:
        assert run.result is None


def test_a_resumed_log_forgets_what_came_after_the_checkpoint(tmp_path):
    with open_run("script", "name", run_settings(tmp_path), {}) as run:
        assert run.log_size() == 0
        run.log({"step": 1})
        size = run.log_size()
        run.log({"step": 2})
        run.cut_log(size)
        run.log({"step": 3})
        assert [json.loads(line)["step"] for line in run.log_path.read_text().splitlines()] == [1, 3]
        size = run.log_size()
        os.truncate(run.log_path, size - 3)  # a power failure: the checkpoint is on the disk, half a row is not
        run.cut_log(size)
        run.log({"step": 4})
        assert [json.loads(line)["step"] for line in run.log_path.read_text().splitlines()] == [1, 4]


# What a user sees

MISTAKES = {  # arguments (DATA: 12 images) and what the last line of the error says
    "wrong data path": ("pretrain_mae --data folder --data-path no/where", "no/where is not a folder"),
    "no data path": ("pretrain_mae --data folder", "--data folder needs --data-path; without data, use --data fractal"),
    "batch too large": ("pretrain_mae --data folder --data-path DATA --model vit_demo", "12 images, fewer than one "
                        "batch of 4096: pass --preset small, which is made for such a set, or lower --batch-size, say "
                        "to 2, and raise a --base-lr"),
    "misspelt": ("pretrain_mae --epcohs 1", "unrecognized arguments: --epcohs 1 (perhaps --epochs? --help lists"),
    "a folder as file": ("pretrain_mae --save-to DATA", "is a folder: name a file in it"),
    "patches do not tile": ("finetune --data folder --data-path DATA --img-size 30 --model vit_demo",
                            "patches of 16 px do not tile an image of 30 x 30 px: choose --img-size as multiples of"),
    "unknown preset": ("pretrain_mae --preset tiny", "'tiny' (choose from 'demo', 'laptop', 'small', 'paper')"),
    "nothing to evaluate": ("finetune --data folder --data-path DATA --eval-only",
                            "--eval-only needs --init, the weights to evaluate"),
}


@pytest.mark.parametrize("name", ["\x1b[2Jgone", "a\rb", "bell\a", "\x9b31m", "\u202egnp.exe", "caf\udce9"])
def test_no_name_of_a_file_commands_the_terminal(name, capsys):
    """Control characters in it are printed as escapes, on both streams; letters of any language are not."""
    distributed.print0(f"image {name}, 猫 é")
    with pytest.raises(SystemExit) as left, entry.errors_in_one_line("script"):
        raise UserError(f"{name} is unreadable")
    shown = capsys.readouterr().out
    assert "\\" in shown and all(c.isprintable() or c == "\n" for c in shown + str(left.value))
    assert distributed.printable("猫 é\tß\n") == "猫 é\tß\n"


def execute(script, *words, clone=ROOT, cwd):
    """Start a script as a user would, with `common` imported from `clone`, and wait for its end."""
    env = {**os.environ, "PYTHONPATH": str(clone), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, str(script), *words], env=env, cwd=cwd, capture_output=True, text=True)


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Run all processes of the tests below in parallel, since most of their time goes into importing torch."""
    folder = tmp_path_factory.mktemp("mistakes")
    for place in ("train/a", "train/b", "val/a", "val/b"):
        (folder / "data" / place).mkdir(parents=True)
        for i in range(6):
            Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(folder / "data" / place / f"{i}.png")
    clones = [folder / "first clone", folder / "second clone"]
    for clone in clones:
        for part in ("common", "sec3_benchmark/__init__.py", "sec3_benchmark/pretrain_mae.py",
                     "sec3_benchmark/subsets.py"):
            if (ROOT / part).is_dir():
                shutil.copytree(ROOT / part, clone / part, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                (clone / part).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / part, clone / part)

    jobs = {}
    for case, (line, _) in MISTAKES.items():
        script, *words = line.replace("DATA", str(folder / "data")).split()
        words += ["--device", "cpu", "--workers", "0", "--output", str(folder / "outputs")]
        jobs[case] = (ROOT / f"sec3_benchmark/{script}.py", *words), ROOT
    for case, clone in (("right clone", clones[0]), ("wrong clone", clones[1])):
        jobs[case] = (clones[0] / "sec3_benchmark/pretrain_mae.py", "--help"), clone
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        started = {case: pool.submit(execute, *words, clone=clone, cwd=folder) for case, (words, clone) in jobs.items()}
        return SimpleNamespace(clones=clones, **{case.replace(" ", "_"): job.result() for case, job in started.items()})


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_ends_with_a_line_that_says_what_to_do(processes, case):
    done = getattr(processes, case.replace(" ", "_"))
    assert done.returncode != 0
    assert MISTAKES[case][1] in done.stderr.rstrip().splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_another_clones_common_is_refused_and_both_are_named(processes):
    """Otherwise a script would silently run the code of the clone that was installed last."""
    script_in, imported_from = processes.clones
    assert processes.wrong_clone.returncode != 0 and "Traceback" not in processes.wrong_clone.stderr
    assert f"belongs to {script_in}," in processes.wrong_clone.stderr
    assert f"imports `common` from {imported_from}." in processes.wrong_clone.stderr
    assert processes.wrong_clone.stdout == ""
    assert processes.right_clone.returncode == 0, processes.right_clone.stderr
    assert "--mask-ratio" in processes.right_clone.stdout
