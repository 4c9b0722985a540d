"""What only a GPU shows: every method's step in every precision, exact resume, the compiled model, nccl. All of it is
skipped where there is none.
"""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from appendix import pretrain_dino, pretrain_simmim
from common.mae import MAE
from sec3_benchmark import finetune, pretrain_mae, pretrain_mocov3
from sec5_distill import pretrain_dmae
from tests.helpers import assert_resumes_exactly, noisy, settings_of, stage, tiny_run
from tests.processes import free_port

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ROOT = Path(__file__).resolve().parents[1]
SMALL = dict(device="cuda", img_size=[24], patch_size=6, model="vit_demo")
METHODS = {"mae": (pretrain_mae, {}), "moco": (pretrain_mocov3, dict(mlp_dim=16, out_dim=8)),
           "dino": (pretrain_dino, dict(out_dim=16, drop_path=0)),  # its random numbers differ between devices
           "simmim": (pretrain_simmim, dict(model="vit_demo_simmim", drop_path=0)),
           "dmae": (pretrain_dmae, dict(teacher="teacher.pt"))}


@pytest.fixture
def teacher(tmp_path, monkeypatch):
    """In the working directory, for D-MAE."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    mae = noisy(MAE("vit_demo", img_size=24, patch_size=6))
    torch.save({"model": mae.state_dict(), "config": mae.config}, "teacher.pt")


def losses(run):
    return [row["loss"] for row in map(json.loads, open(f"{run['run']}/log.jsonl")) if "loss" in row]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_in_every_precision(method, precision, teacher, tmp_path, monkeypatch):
    """Close to the same run on the CPU in float32; the weights of a GPU run open on a machine without one."""
    module, more = METHODS[method]
    on_gpu = tiny_run(module, tmp_path / "gpu", monkeypatch, **{**SMALL, **more, "precision": precision})
    on_cpu = tiny_run(module, tmp_path / "cpu", monkeypatch, **{**SMALL, **more, "device": "cpu"})
    assert losses(on_gpu)[0] == pytest.approx(losses(on_cpu)[0], rel=1e-4 if precision == "fp32" else 0.05)
    state = torch.load(on_gpu["checkpoint"], weights_only=True)["model"]
    assert all(value.device.type == "cpu" and torch.isfinite(value).all() for value in state.values())


@pytest.mark.parametrize("method", METHODS)
def test_a_deterministic_run_resumes_exactly(method, teacher, tmp_path, monkeypatch):
    module, more = METHODS[method]
    assert_resumes_exactly(module, tmp_path, monkeypatch, **{**SMALL, **more, "precision": "bf16",
                                                             "deterministic": True})


@pytest.mark.parametrize("method", ["mae", "dmae"])
def test_a_compiled_model_learns_the_same(method, teacher, tmp_path, monkeypatch):
    module, more = METHODS[method]
    plain = tiny_run(module, tmp_path / "plain", monkeypatch, **SMALL, **more)
    compiled = tiny_run(module, tmp_path / "compiled", monkeypatch, compile=True, **SMALL, **more)
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-3)


def test_the_demo_pretrains_fine_tunes_and_evaluates(tmp_path):
    """Augmented batches, mixup, drop path and the evaluation's float32 on the device."""
    short = dict(output=str(tmp_path), device="cuda", epochs=1, warmup_epochs=0)
    mae = stage("sec3_benchmark/pretrain_mae.py", short)
    tuned = stage("sec3_benchmark/finetune.py", {**short, "recipe": "ori", "init": mae["checkpoint"]})
    again = finetune.main(settings_of(finetune, dict(
        output=str(tmp_path), device="cpu", init=tuned["checkpoint"], eval_only=True)))
    assert again["top1"] == pytest.approx(tuned["top1"], abs=0.5)  # a near tie may fall the other way


def launch(folder, *words):
    ranks = torch.cuda.device_count()
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}",
                             f"--master-port={free_port()}", str(ROOT / "sec3_benchmark" / "pretrain_mocov3.py"),
                             "--output", str(folder), "--epochs", "1", "--warmup-epochs", "0", *words],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env={**os.environ, "PYTHONPATH": str(ROOT)})


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_ranks_on_gpus_finish_and_stop_on_a_signal(tmp_path):
    whole = launch(tmp_path / "whole")
    said, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, said
    stopped = launch(tmp_path / "stopped", "--epochs", "1000")
    for line in stopped.stdout:
        if line.startswith("step "):
            stopped.send_signal(signal.SIGTERM)
            break
    said, _ = stopped.communicate(timeout=120)
    assert list((tmp_path / "stopped").glob("pretrain_mocov3/*/step-*.pt")), said
