"""Stopping and continuing with real processes: kill -9, signals, two ranks. Every run here is one command, started
again as often as it takes, and its weights must be those of a run that nobody touched.

The models are the demo preset's, on 48 images of noise; a checkpoint follows each of 24 steps, 12 to an epoch.
"""
import fcntl
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.run
from PIL import Image

from common import options
from common.checkpoint import load_newest
from common.errors import UserError
from sec3_benchmark import pretrain_mae
from tests.helpers import assert_same, log_rows
from tests.processes import ENVIRONMENT, ROOT, WAIT, assert_nearly_the_same, said, start, start_ranks

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
            "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1")  # as in the job script of appendix/runs.md
TOTAL = 24

RUNS = {  # script, and what is added to `command`
    "mae": ("pretrain_mae",),
    "mae accumulated": ("pretrain_mae", "--micro-batch", "2", "--log-every", "5"),
    "finetune": ("finetune", "--recipe", "ori", "--eval-every", "1"),  # mixup, drop path, RandAugment, erasing
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of noise: train and val, two classes."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.RandomState(0)
    for split, count in (("train", 24), ("val", 4)):
        for label in ("a", "b"):
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(rng.randint(0, 256, (40, 40, 3), dtype=np.uint8))
                image.save(root / split / label / f"{i}.png")
    return root


def command(data, output, script, *more, launcher=()):
    """The words of a command; of options given twice the last one counts."""
    return [sys.executable, *launcher, str(ROOT / "sec3_benchmark" / f"{script}.py"), "--preset", "demo",
            "--data", "folder", "--data-path", str(data), "--img-size", "32", "--patch-size", "8", "--batch-size", "4",
            "--epochs", "2", "--warmup-epochs", "1", "--base-lr", "4e-3", "--clip-grad", "0.5", "--precision", "fp32",
            "--device", "cpu",
            "--workers", "0", "--output", str(output), "--save-minutes", "0", "--log-every", "1", *more]


def run_to_the_end(words, output):
    assert start(words, output).wait(WAIT) == 0, said(output)


def run_here(words):
    """A command of pretrain_mae in this process."""
    return pretrain_mae.main(options.parse(pretrain_mae.build_parser(), pretrain_mae.PRESETS, argv=words[2:]))


def newest(output):
    """The step of the newest checkpoint, 0 if there is none."""
    return max((int(path.stem[5:]) for path in Path(output).glob("*/*/step-*.pt")), default=0)


def wait_for_step(step, process, output):
    end = time.monotonic() + WAIT
    while newest(output) < step:
        assert process.poll() is None and time.monotonic() < end, said(output)
        time.sleep(0.002)


def folder(output):
    [path] = Path(output).glob("*/*/settings.json")
    return path.parent


def weights(output, name="weights.pt"):
    return torch.load(folder(output) / name, weights_only=True)["model"]


@pytest.fixture(scope="module")
def untouched(data, tmp_path_factory):
    """Outputs of the runs that nobody stops, made two at a time."""
    outputs = {name: tmp_path_factory.mktemp("untouched") for name in RUNS}
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: run_to_the_end(command(data, outputs[name], *RUNS[name]), outputs[name]), outputs))
    return outputs


def assert_same_run(output, reference):
    assert_same(weights(output), weights(reference))
    assert log_rows(folder(output)) == log_rows(folder(reference))


# kill -9

def kill_at_random(words, output):
    """Starts a command and kills it, no more than a few steps on and anywhere within one, saving included."""
    process = start(words, output)
    wait_for_step(newest(output) + random.randint(1, 4), process, output)
    time.sleep(random.uniform(0, 0.05))
    process.kill()
    assert process.wait() == -signal.SIGKILL, said(output)
    print(f"killed after step {newest(output)}")


@pytest.mark.parametrize(("name", "workers", "kills"), [("mae", 0, 3), ("mae", 2, 2), ("mae accumulated", 0, 2),
                                                        ("finetune", 2, 2)])
def test_killed_again_and_again_it_ends_in_the_same_bits(data, untouched, tmp_path, name, workers, kills):
    """Whatever the number of workers: the untouched runs have none."""
    words = command(data, tmp_path, *RUNS[name], "--workers", str(workers))
    for _ in range(kills):
        kill_at_random(words, tmp_path)
    run_to_the_end(words, tmp_path)
    assert said(tmp_path).count("continuing after step ") == kills
    assert_same_run(tmp_path, untouched[name])
    if name == "finetune":
        assert_same(weights(tmp_path, "best.pt"), weights(untouched[name], "best.pt"))


def test_a_folder_in_use_names_its_process_and_is_free_once_that_is_killed(data, tmp_path):
    """The workers outlive a kill -9 by some seconds; they must not hold the folder."""
    words = command(data, tmp_path, "pretrain_mae", "--workers", "2", "--epochs", "1000")
    process = start(words, tmp_path)
    wait_for_step(1, process, tmp_path)
    said = (folder(tmp_path) / "lock").read_text()
    assert said == f"process {process.pid} on {socket.gethostname()}"
    process.kill()
    process.wait()
    with open(folder(tmp_path) / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises if anyone holds it


# Signals

def signalled(data, output, number, send, *more):
    """Starts a run with two workers, sends it a signal after its first checkpoint; returns the exit code."""
    process = start(command(data, output, "pretrain_mae", "--workers", "2", *more), output)
    wait_for_step(1, process, output)
    send(process.pid, number)
    return process.wait(30)


def assert_stopped_and_saved(code, output):
    assert code == 75, said(output)
    assert f"stopped by a signal after step {newest(output)} of" in said(output)
    assert load_newest(folder(output))["progress"]["step"] == newest(output)


def test_each_signal_saves_and_leaves_with_75(data, untouched, tmp_path):
    with ThreadPoolExecutor(2) as pool:
        stops = {number: pool.submit(signalled, data, tmp_path / number.name, number, os.kill)
                 for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)}
    for number, stop in stops.items():
        assert_stopped_and_saved(stop.result(), tmp_path / number.name)
    output = tmp_path / "SIGUSR1"
    run_to_the_end(command(data, output, "pretrain_mae", "--workers", "2"), output)
    assert_same_run(output, untouched["mae"])


def test_a_signal_before_the_training_leaves_with_75_too(data, tmp_path):
    process = start(command(data, tmp_path, "pretrain_mae"), tmp_path)
    while "# preset" not in said(tmp_path):
        assert process.poll() is None, said(tmp_path)
        time.sleep(0.001)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(30) == 75, said(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_does_the_same(data, tmp_path, number):
    """As a scheduler sends it, or a terminal: the workers get it too."""
    assert_stopped_and_saved(signalled(data, tmp_path, number, os.killpg), tmp_path)


FAKE = {  # what stands in for a cluster's commands: srun hands signals on, as the real one does
    "srun": """trap 'kill -USR1 $task' USR1
"$@" & task=$!
while kill -0 $task 2>/dev/null; do wait $task; done
""",
    "torchrun": """trap 'echo saved >> said; exit 1' USR1
echo "$@" > words
while true; do sleep 0.05; done
""",
    "scontrol": "[ $1 = show ] && echo node1 || echo $1 >> said\n"}


def test_the_job_script_signals_its_own_torchrun_and_queues_itself_again(tmp_path):
    """A process of another job, with the same words, is left alone."""
    [script] = re.findall(r"(?ms)^#!/bin/bash\n.*?(?=^```)", (ROOT / "appendix" / "runs.md").read_text())
    (tmp_path / "job.sh").write_text(script)
    for name, body in FAKE.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}")
        (tmp_path / name).chmod(0o755)
    other = subprocess.Popen([sys.executable, "-c", "input()", "-u", "sec3_benchmark/pretrain_mae.py"],
                             stdin=subprocess.PIPE)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "IMAGENET": "i", "SCRATCH": "s", "SLURM_JOB_ID": "1"}
    job = subprocess.Popen(["bash", "job.sh"], cwd=tmp_path, env={**os.environ, **environment})
    end = time.monotonic() + 30
    while not (tmp_path / "words").exists() and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.2)
    job.send_signal(signal.SIGUSR1)
    job.wait(30)
    assert (tmp_path / "said").read_text().split() == ["saved", "requeue"] and other.poll() is None
    other.kill()
    known = torch.distributed.run.get_args_parser().parse_args((tmp_path / "words").read_text().split())
    assert known.signals_to_handle.split(",") == ["SIGTERM", "SIGINT", "SIGUSR1"] and known.nnodes == "2"


TALKS = r"""
import argparse, sys, time
from common import entry, options, report
def main(args):
    report.save_figure(report.subplots(figsize=(1, 1))[0], "picture.png")
    print("78.0 \u00b1 0.1 of \u732b", flush=True)
    while True:
        time.sleep(0.01)
        print("more" if sys.argv[1] == "talk" else "", end="", flush=True)
entry.run_script(main, options.make_parser("toy"), {}, parse=lambda parser, presets: argparse.Namespace())
"""


def test_odd_terminals_cost_no_traceback(tmp_path):
    """Output in ASCII, a notebook's backend for pictures; then `| head` closes the pipe, or Ctrl-C comes, or both."""
    odd = {**ENVIRONMENT, "LANG": "C", "PYTHONIOENCODING": "ascii", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0",
           "MPLBACKEND": "module://no_such_backend"}
    pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path, env=odd)
    talks, waits = (subprocess.Popen([sys.executable, "-c", TALKS, word], **pipe) for word in ("talk", "wait"))
    for process in (talks, waits):
        assert process.stdout.readline().startswith(b"78.0 \\xb1 0.1 of \\u732b"), process.stderr.read()
    talks.stdout.close()
    assert talks.wait(30) == 1 and talks.stderr.read() == b""
    waits.send_signal(signal.SIGINT)
    assert waits.wait(30) == 75 and len(waits.stderr.read().splitlines()) == 1
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


# Two ranks

def test_a_barrier_waits_for_every_rank(tmp_path):
    """Not only for rank 0: the last of three arrives a second after the others."""
    ranks = start_ranks([sys.executable, "-c", """
import time
from common import distributed
distributed.start_process_group("cpu")
distributed.barrier()
time.sleep(distributed.rank() == 2)
began = time.time()
distributed.barrier()
print(f"rank {distributed.rank()} waited {time.time() - began:.2f}\\n", end="", flush=True)
distributed.stop_process_group()
"""], tmp_path, world=3)
    assert [rank.wait(WAIT) for rank in ranks] == [0, 0, 0], said(tmp_path)
    waited = dict(line.split()[1::2] for line in said(tmp_path).splitlines() if line.startswith("rank"))
    assert float(waited["0"]) > 0.8 and float(waited["1"]) > 0.8


def test_the_first_step_sums_over_ranks_as_every_other(tmp_path):
    """A resumed run's first step is another's fifth: with four ranks the order of a sum shows in its last bits."""
    ranks = start_ranks([sys.executable, "-c", """
import torch
from common import distributed, training
from common.mae import MAE
device = distributed.start_process_group("cpu")
torch.manual_seed(0)
model = MAE("vit_demo", img_size=24, patch_size=6)
forward = training.compile_and_distribute(model, device, None, False)
torch.manual_seed(distributed.rank())
images, noise, gradients = torch.randn(2, 3, 24, 24), torch.rand(2, 16), []
for step in range(3):
    model.zero_grad()
    forward(images, noise).backward()
    gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
assert all(torch.equal(a, b) for other in gradients[1:] for a, b in zip(gradients[0], other))
distributed.stop_process_group()
"""], tmp_path, world=4)
    assert [rank.wait(WAIT) for rank in ranks] == [0] * 4, said(tmp_path)


def test_a_rank_that_fails_alone_leaves_at_once_with_its_message(tmp_path):
    """The other one waits for it, and does not learn of it by a time limit."""
    ranks = start_ranks([sys.executable, "-c", """
import argparse
from common import distributed, entry, options
from common.errors import UserError
def main(args):
    distributed.start_process_group("cpu")
    distributed.barrier()
    if distributed.rank() == 1:
        raise UserError("no such thing on this node")
    distributed.barrier()
entry.run_script(main, options.make_parser("toy"), {}, parse=lambda parser, presets: argparse.Namespace())
"""], tmp_path, world=2)
    assert ranks[1].wait(30) == 1 and ranks[0].wait(30) != 0, said(tmp_path)
    assert "rank 1: -c: error: no such thing on this node" in said(tmp_path)


def test_a_rank_that_stops_within_an_evaluation_does_not_wait_for_the_others(tmp_path):
    """Rank 1 has done its share and waits for rank 0."""
    ranks = start_ranks([sys.executable, "-c", """
import argparse, time
from types import SimpleNamespace
from common import distributed, entry, options, signals
def main(args):
    distributed.start_process_group("cpu")
    run = SimpleNamespace(settings={}, folder="here")
    with signals.StopSignals(run, {"step": 3}, 5) as stop, stop.exit_immediately():
        print("evaluating\\n", end="", flush=True)
        time.sleep(0 if distributed.rank() else 100)
        distributed.barrier()
entry.run_script(main, options.make_parser("toy"), {}, parse=lambda parser, presets: argparse.Namespace())
"""], tmp_path)
    deadline = time.time() + WAIT
    while said(tmp_path).count("evaluating") < 2 and time.time() < deadline:
        time.sleep(0.1)
    for rank in ranks:
        rank.send_signal(signal.SIGTERM)
    assert ranks[0].wait(30) == 75 and ranks[1].wait(30) != 0, said(tmp_path)


def test_ranks_agree_whether_images_are_read_though_they_see_other_checkpoints(tmp_path):
    """Rank 0 alone sees that the run is resumed, as with an --output that is not shared. One alone must not wait."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "step-00000001.pt").touch()
    ranks = start_ranks([sys.executable, "-c", """
from pathlib import Path
from types import SimpleNamespace
from common import distributed
from common.images import ImageSet
from sec3_benchmark import evaluate
device = distributed.start_process_group("cpu")
images = ImageSet("one", ["a.png"], None, [], 3)
args = SimpleNamespace(keep_decoded=0, workers=0)
evaluate.check_readable(images, SimpleNamespace(folder=Path(str(distributed.rank()))), args, device)
assert distributed.all_max(1, distributed.rank()) == [1, 1]
distributed.stop_process_group()
"""], tmp_path)
    assert [rank.wait(WAIT) for rank in ranks] == [0, 0], said(tmp_path)


def test_ranks_that_see_other_images_are_told_before_anything_is_made(tmp_path):
    ranks = start_ranks([sys.executable, "-c", """
from types import SimpleNamespace
from common import distributed, runs
from common.errors import UserError
distributed.start_process_group("cpu")
try:
    args = SimpleNamespace(output="out", fresh=False)
    with runs.open_run("toy", "name", args, {"data": f"of rank {distributed.rank()}"}):
        pass
except UserError as error:
    print(f"{error}\\n", end="", flush=True)
distributed.stop_process_group()
"""], tmp_path)
    assert [rank.wait(WAIT) for rank in ranks] == [0, 0], said(tmp_path)
    assert said(tmp_path).count("give all nodes the same images, weights and arguments") == 2
    assert not (tmp_path / "out").exists()


def test_two_ranks_stop_together_and_equal_one_process(data, untouched, tmp_path):
    """A signal to rank 1 alone, then one to torchrun, then to the end; the same global batch in one or two pieces."""
    run = (*RUNS["mae"], "--log-every", "5")  # a row sums over steps before and after a stop
    words = command(data, tmp_path, *run)
    ranks = start_ranks(words, tmp_path)
    wait_for_step(1, ranks[0], tmp_path)
    ranks[1].send_signal(signal.SIGTERM)
    for rank in ranks:
        assert_stopped_and_saved(rank.wait(30), tmp_path)

    launched = command(data, tmp_path, *run, launcher=TORCHRUN)
    launcher, first = start(launched, tmp_path), newest(tmp_path)
    wait_for_step(first + 1, launcher, tmp_path)
    launcher.send_signal(signal.SIGUSR1)
    assert launcher.wait(30) != 0 and first < newest(tmp_path) < TOTAL
    assert said(tmp_path).count("stopped by a signal") == 2 and f"after step {newest(tmp_path)} of" in said(tmp_path)

    with pytest.raises(UserError, match="ranks 2 before, 1 now"):
        run_here(words)
    run_to_the_end(launched, tmp_path)
    for name in ("mae", "mae accumulated"):
        assert_nearly_the_same(weights(tmp_path), weights(untouched[name]))
    one = log_rows(folder(untouched["mae accumulated"]))
    for ours, one_process in zip(log_rows(folder(tmp_path)), one, strict=True):
        assert ours == pytest.approx(one_process, rel=1e-5)


