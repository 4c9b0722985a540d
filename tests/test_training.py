"""The training loop in this process, with a tiny model: its arithmetic, stopping after every step, damaged checkpoints,
non-finite values, a full disk, refusals, reuse. tests/test_resume.py tests resuming with real processes.
"""
import math
import os
import random
import resource
import signal
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from common import checkpoint, distributed, report, training
from common.augment import contiguous
from common.checkpoint import load_newest, steps_saved
from common.errors import UserError
from common.images import ImageSet
from common.mae import DECODERS
from common.optim import adamw, learning_rate, parameter_groups
from common.runs import Run
from common.training import Method, train
from common.vit import SIZES
from sec3_benchmark import finetune, pretrain_mae
from tests.helpers import assert_same, log_rows, settings_of

IMAGES, BATCH, PER_EPOCH, EPOCHS = 13, 4, 3, 3  # one image of 13 is left out of every epoch
TOTAL, PEAK, WARMUP = PER_EPOCH * EPOCHS, 0.02, 2


class Net(nn.Module):
    """A small network with dropout: the twelve pixel values of an image -> two numbers."""

    def __init__(self, dropout):
        super().__init__()
        self.config = {"dropout": dropout}
        self.layers = nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 5), nn.GELU(),
                                    nn.Dropout(dropout), nn.Linear(5, 2))

    def forward(self, images):
        return self.layers(images.flatten(1))


class Toy(Method):
    """A method that regresses an image's index from its pixels and keeps a moving average of its weights.

    stop_at: sends this process a stop signal after this many steps. fault(step, loss): replaces the loss.
    """

    def __init__(self, dropout=0.3, stop_at=None, fault=None):
        torch.manual_seed(1)
        super().__init__(Net(dropout))
        self.average = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.optimizer = adamw(parameter_groups(self.model, 0.05), betas=(0.9, 0.95))
        self.stop_at, self.fault = stop_at, fault

    def loss(self, batch, step):
        target = torch.stack([batch["index"], batch["index"] % 3], dim=1).float()
        loss = (self.forward(batch["image"]) - target).square().mean()
        return self.fault(step, loss) if self.fault else loss, {"target": target.mean()}

    def after_step(self, step):
        for name, value in self.model.state_dict().items():
            self.average[name].lerp_(value, 0.1)
        if step + 1 == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    def state_dict(self):
        return {"average": self.average}

    def load_state_dict(self, state):
        self.average = state["average"]


def settings(**changes):
    """Make the settings of a run of nine steps, with a log row after each and a checkpoint only when stopped."""
    row = dict(data="folder", device="cpu", precision="fp32", workers=0, epochs=EPOCHS, warmup_epochs=0,
               batch_size=BATCH, log_every=1, save_minutes=60, eval_every=0)
    return settings_of(finetune, {**row, **changes}, {})


def toy_images():
    pixels = np.random.RandomState(0).randint(0, 256, (IMAGES, 2, 2, 3), dtype=np.uint8)
    return ImageSet("toy", pixels, None, [])


def schedule(step):
    return learning_rate(step, peak=PEAK, total_steps=TOTAL, warmup_steps=WARMUP)


def fit(folder, args, toy=None, evaluate=None):
    """Train a Toy in a run's folder, or continue the run in it. Return the Toy, with the run's `result` set on it."""
    Path(folder).mkdir(exist_ok=True)
    toy = toy or Toy()
    toy.result = train(Run(folder, vars(args)), args, toy, toy.optimizer, schedule, toy_images(), contiguous,
                       torch.device("cpu"), evaluate and (lambda: evaluate(toy)))
    return toy


def fit_until(step, folder, args, evaluate=None):
    """Train a Toy as `fit` does until a signal stops it after `step` steps."""
    with pytest.raises(SystemExit) as stopped:
        fit(folder, args, Toy(stop_at=step), evaluate)
    assert stopped.value.code == 75 and steps_saved(folder)[0] == step


def state(toy):
    return {"model": toy.model.state_dict(), "average": toy.average, "optimizer": toy.optimizer.state_dict()}


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    monkeypatch.setattr(report, "draw_curve", lambda *paths: None)


# The arithmetic

def hand_written_loop(accumulation, clip):
    """Train as the loop should, in plain PyTorch. Return the weights, and the learning rate and norm of each step."""
    pixels, mean, std = toy_images().images, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    torch.manual_seed(1)
    net, rates, norms = Net(0.0), [], []
    decay, plain = [p for p in net.parameters() if p.ndim == 2], [p for p in net.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
                                  betas=(0.9, 0.95), foreach=False, fused=False)
    for step in range(TOTAL):
        order = np.random.default_rng((0, step // PER_EPOCH)).permutation(IMAGES)
        index = order[step % PER_EPOCH * BATCH:][:BATCH]
        x = torch.tensor((pixels[index] / 255 - mean) / std, dtype=torch.float32).permute(0, 3, 1, 2)
        target = torch.tensor(np.stack([index, index % 3], axis=1), dtype=torch.float32)
        rates.append(PEAK * (step / WARMUP if step < WARMUP
                             else (1 + math.cos(math.pi * (step - WARMUP) / (TOTAL - WARMUP))) / 2))
        optimizer.zero_grad()
        for part in range(accumulation):
            rows = slice(part * BATCH // accumulation, (part + 1) * BATCH // accumulation)
            ((net(x[rows]) - target[rows]) ** 2).mean().div(accumulation).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(net.parameters(), clip or math.inf)))
        for group in optimizer.param_groups:
            group["lr"] = rates[-1]
        optimizer.step()
    return net.state_dict(), rates, norms


@pytest.mark.parametrize(("accumulation", "clip"), [(1, 0.0), (2, 0.0), (4, 3.0)])
def test_loop_equals_a_hand_written_one(tmp_path, accumulation, clip):
    toy = fit(tmp_path, settings(micro_batch=BATCH // accumulation, clip_grad=clip), Toy(dropout=0.0))
    weights, rates, norms = hand_written_loop(accumulation, clip)
    rows = log_rows(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, TOTAL + 1))
    assert [row["lr"] for row in rows] == pytest.approx(rates, rel=1e-12)
    assert [row["grad_norm"] for row in rows] == pytest.approx(norms, rel=1e-4)  # before clipping
    assert not clip or min(norms) > clip  # so clipping did something in every step
    for name, value in weights.items():
        torch.testing.assert_close(toy.model.state_dict()[name], value, rtol=0, atol=1e-6)


def test_log_rows_are_means_over_their_steps(tmp_path):
    fit(tmp_path / "each", settings())
    fit(tmp_path / "four", settings(log_every=4))
    each, four = log_rows(tmp_path / "each"), log_rows(tmp_path / "four")
    assert [row["step"] for row in four] == [4, 8, 9]
    for row, steps in zip(four, (each[:4], each[4:8], each[8:])):
        assert row["lr"] == steps[-1]["lr"]
        for name in ("loss", "grad_norm", "target"):
            assert row[name] == pytest.approx(np.mean([step[name] for step in steps]))


def test_what_is_random_in_a_step_depends_on_seed_step_and_micro_step(tmp_path):
    """It does not depend on the random numbers drawn for samples, in this process or in workers."""
    def drawn(name, **changes):
        numbers = []
        toy = Toy(dropout=0.0, fault=lambda step, loss: numbers.append(
            (random.random(), np.random.rand(), torch.rand(()).item())) or loss)
        fit(tmp_path / name, settings(micro_batch=2, **changes), toy)
        return numbers

    here = drawn("here")
    assert here == drawn("workers", workers=2)
    assert all(len(set(numbers)) == 2 * TOTAL for numbers in zip(*here))  # two micro-batches a step, none alike
    assert not set(here) & set(drawn("seed", seed=1))


# Stopping and continuing

@pytest.mark.parametrize("stop", range(1, TOTAL + 1))  # the last too: a table must not go on to its next stage
def test_stopped_after_any_step_it_ends_in_the_same_bits(tmp_path, stop):
    """With dropout, two micro-batches, a state of the method's own, evaluations, and log rows of two steps."""
    def evaluate(toy):
        return {"top1": 50 - toy.model.layers[0].weight.detach().square().sum().item()}  # falls: the first is best
    args = settings(micro_batch=2, log_every=2, eval_every=1)
    whole = fit(tmp_path / "whole", args, evaluate=evaluate)
    fit_until(stop, tmp_path / "parts", args, evaluate)
    parts = fit(tmp_path / "parts", args, evaluate=evaluate)
    assert_same(state(parts), state(whole))
    assert log_rows(tmp_path / "parts") == log_rows(tmp_path / "whole")
    assert whole.result["best"]["epoch"] == 1 and whole.result["last"]["epoch"] == 3
    assert (parts.result["last"], parts.result["best"]) == (whole.result["last"], whole.result["best"])
    best = [torch.load(tmp_path / name / "best.pt", weights_only=True) for name in ("parts", "whole")]
    assert_same(*best)


def test_a_checkpoint_holds_plain_values_only(tmp_path):
    """So it loads with weights_only=True, by which PyTorch refuses to run code from a file."""
    def walk(value):
        assert isinstance(value, (torch.Tensor, int, float, str, list, tuple, dict, type(None))), type(value)
        for part in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
            walk(part)
    fit_until(5, tmp_path, settings(save_minutes=0))
    assert steps_saved(tmp_path) == [5, 4]
    for step in (4, 5):
        saved = torch.load(tmp_path / f"step-{step:08d}.pt", weights_only=True)
        walk(saved)
        assert {"model", "method", "optimizer", "scaler", "progress", "execution"} <= set(saved)


def flip(raw):
    middle = len(raw) // 2
    return raw[:middle] + bytes(byte ^ 0xFF for byte in raw[middle:middle + 8]) + raw[middle + 8:]


@pytest.mark.parametrize("harm", [flip, lambda raw: raw[:len(raw) // 2], lambda raw: raw[:-1], lambda raw: b""],
                         ids=["flipped", "half", "last byte", "empty"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, capsys, harm):
    args = settings(save_minutes=0)
    whole = fit(tmp_path / "whole", args)
    fit_until(5, tmp_path / "run", args)
    newest = tmp_path / "run" / "step-00000005.pt"
    newest.write_bytes(harm(newest.read_bytes()))
    capsys.readouterr()
    assert_same(state(fit(tmp_path / "run", args)), state(whole))
    said = capsys.readouterr().out
    assert f"{newest} is damaged" in said and "continuing after step 4" in said and "weights_only" not in said
    assert log_rows(tmp_path / "run") == log_rows(tmp_path / "whole")  # row 5 was taken back and written again


def test_no_flipped_bit_is_loaded_or_stops_the_search(tmp_path):
    """Wherever the bit is, above all in the zip directory, the checkpoint is skipped or loads unchanged."""
    saved = {"model": nn.Linear(3, 2).state_dict(), "step": 7}
    checkpoint.save_step(tmp_path, 7, saved)
    path = tmp_path / "step-00000007.pt"
    raw = path.read_bytes()
    directory = raw.index(b"PK\x01\x02")
    for place in [*range(0, directory, 16), *range(directory, len(raw))]:
        for bit in (0x01, 0x10):
            path.write_bytes(raw[:place] + bytes([raw[place] ^ bit]) + raw[place + 1:])
            try:
                assert_same(load_newest(tmp_path), saved)
            except UserError as error:  # the only checkpoint there is: the run does not silently start again
                assert f"{tmp_path} is damaged" in str(error) and "delete it" in str(error)


@contextmanager
def full_disk(free=500):
    """Let no file grow beyond `free` bytes in this block: writes fail as on a full disk, those of C++ code as well."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path):
    path, saved = tmp_path / "best.pt", {"model": torch.arange(3)}
    checkpoint.save_torch(path, saved)
    with full_disk(), pytest.raises(OSError, match="could not write .*best.pt.*Free some space"):
        checkpoint.save_torch(path, {"model": torch.arange(1000)})
    assert_same(torch.load(path, weights_only=True), saved)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
                                   PermissionError(13, "Permission denied")])
def test_only_a_full_disk_is_called_full(tmp_path, monkeypatch, error):
    """PyTorch reports a killed worker by an error that may arise anywhere in the main process, also while it saves."""
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(type(error).__mro__[-3]) as raised:
        checkpoint.save_torch(tmp_path / "best.pt", {})
    assert "space" not in str(raised.value) and str(error.args[-1]) in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_previous_checkpoint_whole(tmp_path, monkeypatch):
    def save_step(folder, step, content, save=checkpoint.save_step):
        if step < 5:
            return save(folder, step, content)
        with full_disk():
            save(folder, step, content)
    args, run = settings(save_minutes=0), tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(OSError) as error:
        patch.setattr(checkpoint, "save_step", save_step)
        fit(run, args)
    assert str(run / "step-00000005.pt") in str(error.value) and "Free some space" in str(error.value)
    assert steps_saved(run) == [4, 3] and not list(run.glob(".*"))
    assert checkpoint.load_verified(run / "step-00000004.pt")
    assert_same(state(fit(run, args)), state(fit(tmp_path / "whole", args)))


# Non-finite values

def spoil(what):
    """Make a fault that spoils the sixth step alone (index 5): the loss is not finite, or its gradient, or both."""
    def fault(step, loss):
        if step != 5:
            return loss
        if what == "gradient":
            loss.register_hook(lambda gradient: gradient * math.nan)
            return loss * 1
        return loss + math.inf if what == "loss" else loss * math.nan
    return fault


@pytest.mark.parametrize("save_minutes", [0, 60])
@pytest.mark.parametrize("what", ["loss", "gradient", "both"])
def test_nothing_is_updated_or_saved_after_a_non_finite_value(tmp_path, what, save_minutes):
    """It is noticed at once if every step is saved, otherwise with the next log row, here two steps later."""
    args, bad = settings(log_every=4, save_minutes=save_minutes, micro_batch=2), Toy(fault=spoil(what))
    fit_until(5, tmp_path / "good", args)
    with pytest.raises(FloatingPointError, match=f"in step 6 .learning rate {schedule(5):.3g}."):
        fit(tmp_path / "bad", args, bad)
    five = load_newest(tmp_path / "good")
    assert_same(dict(bad.model.state_dict()), five["model"])
    assert_same(bad.optimizer.state_dict()["state"], five["optimizer"]["state"])
    assert steps_saved(tmp_path / "bad") == ([5, 4] if save_minutes == 0 else [])
    assert [row["step"] for row in log_rows(tmp_path / "bad")] == [4]


def test_a_non_finite_loss_of_the_first_micro_batch_is_noticed(tmp_path):
    losses = []

    def fault(step, loss):
        losses.append(loss)
        return loss + math.inf if len(losses) == 11 else loss  # the first of two in the sixth step
    with pytest.raises(FloatingPointError, match="in step 6 "):
        fit(tmp_path, settings(micro_batch=2), Toy(fault=fault))


@pytest.fixture
def fp16(monkeypatch):
    """Let the CPU train in fp16, with a gradient scaler."""
    monkeypatch.setattr(training, "choose_precision", lambda precision, device: torch.float16)


def without_gradient(steps):
    """Make a fault: in these steps the loss is finite, but its gradient is NaN."""
    def fault(step, loss):
        if step in steps:
            loss.register_hook(lambda gradient: gradient * math.nan)
        return loss * 1
    return fault


@pytest.mark.parametrize(("epochs", "spoilt", "message"), [
    (EPOCHS, range(9), "in step 9 .learning rate .*the last 9 updates were not made; no checkpoint was saved before"),
    (100, range(300), "in step 30 .*the last 30 updates"),  # the scale, 2^16, is below 1e-3 after 26 halvings
    (100, range(100, 300), "in step 130 .*; the last good checkpoint is step-00000100.pt in .*Try a lower --base-lr")])
def test_fp16_that_learns_nothing_stops(tmp_path, fp16, epochs, spoilt, message):
    args = settings(epochs=epochs, log_every=10)
    if spoilt[0]:
        fit_until(100, tmp_path, args)
    with pytest.raises(FloatingPointError, match=message):
        fit(tmp_path, args, Toy(fault=without_gradient(spoilt)))


def test_fp16_that_skips_fifty_updates_at_a_scale_that_stays_stops(tmp_path, fp16, monkeypatch):
    monkeypatch.setattr(torch.amp.GradScaler, "get_scale", lambda scaler: 1.0)  # as with a factor close to 1
    with pytest.raises(FloatingPointError, match="in step 60 .*the last 51 updates"):
        fit(tmp_path, settings(epochs=100, log_every=20), Toy(fault=without_gradient(range(9, 300))))


def test_fp16_may_skip_some_updates(tmp_path, fp16):
    """It skips the first updates, until the scale fits, and later one now and then."""
    toy = fit(tmp_path, settings(epochs=10), Toy(fault=without_gradient([*range(8), *range(10, 30, 2)])))
    assert toy.result["images_per_second"] > 0
    assert all(torch.isfinite(value).all() for value in toy.model.state_dict().values())


@pytest.mark.parametrize("save_minutes", [0, 60])
def test_weights_that_the_last_update_makes_infinite_are_not_saved(tmp_path, save_minutes):
    def explode(step):
        return 1e39 if step == TOTAL - 1 else schedule(step)
    toy, args = Toy(), settings(save_minutes=save_minutes, log_every=100)
    with pytest.raises(FloatingPointError, match="non-finite weights in step 9 .learning rate 1e.39.*not saved"):
        train(Run(tmp_path, vars(args)), args, toy, toy.optimizer, explode, toy_images(), contiguous,
              torch.device("cpu"))
    assert steps_saved(tmp_path) == ([8, 7] if save_minutes == 0 else [])


# Refusals and reuse

CHANGES = {  # what differs in the continued run -> its settings, and the message
    "accumulation": (dict(micro_batch=2), "accumulation 1 before, 2 now"),
    "precision": (dict(precision="bf16"), "precision torch.float32 before, torch.bfloat16 now"),
    "threads": ({}, "threads 1 before, 2 now"),
    "ranks": ({}, "ranks 8 before, 1 now"),
    "device": ({}, "device cuda before, cpu now"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_inexact_continuation_is_refused_unless_allowed(tmp_path, change):
    changes, message = CHANGES[change]
    fit_until(5, tmp_path, settings())
    if change == "threads":
        torch.set_num_threads(2)
    elif change in ("ranks", "device"):  # as if the first part had run so
        saved = load_newest(tmp_path)
        saved["execution"][change] = {"ranks": 8, "device": "cuda"}[change]
        checkpoint.save_step(tmp_path, 5, saved)
    with pytest.raises(UserError, match=message):
        fit(tmp_path, settings(**changes))
    fit(tmp_path, settings(**changes, allow_inexact=True))
    assert [row["step"] for row in log_rows(tmp_path)] == list(range(1, TOTAL + 1))


@pytest.mark.parametrize("epoch", range(1, EPOCHS + 1))  # the last too: a table must not go on to its next stage
def test_a_signal_during_an_evaluation_is_obeyed_at_once(tmp_path, epoch):
    """Because an evaluation may take minutes. The same command evaluates again, and the result is the same."""
    evaluations = []

    def evaluate(toy):
        evaluations.append(toy)
        if len(evaluations) == epoch:
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("the evaluation went on")
        return {"top1": toy.model.layers[0].weight.detach().square().sum().item()}
    args = settings(eval_every=1, log_every=2)
    with pytest.raises(SystemExit) as stopped:
        fit(tmp_path / "parts", args, evaluate=evaluate)
    assert stopped.value.code == 75 and steps_saved(tmp_path / "parts")[0] == epoch * TOTAL // EPOCHS
    parts, whole = (fit(tmp_path / name, args, evaluate=evaluate) for name in ("parts", "whole"))
    assert len(evaluations) == 2 * EPOCHS + 1
    assert_same(state(parts), state(whole))
    assert log_rows(tmp_path / "parts") == log_rows(tmp_path / "whole")
    assert (parts.result["last"], parts.result["best"]) == (whole.result["last"], whole.result["best"])


def test_a_signal_just_before_an_evaluation_is_obeyed(tmp_path, monkeypatch):
    save = checkpoint.save_step

    def save_and_signal(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return save(*args)
    monkeypatch.setattr(checkpoint, "save_step", save_and_signal)
    with pytest.raises(SystemExit) as stopped:
        fit(tmp_path, settings(), evaluate=lambda toy: pytest.fail("evaluated"))
    assert stopped.value.code == 75 and steps_saved(tmp_path) == [TOTAL]


def test_a_signal_while_the_last_evaluation_is_noted_is_obeyed(tmp_path, monkeypatch):
    """A table must not go on to its next stage; the same command evaluates again and ends."""
    save = checkpoint.save_torch

    def save_and_signal(path, content):
        save(path, content)
        if path.name == "best.pt":
            os.kill(os.getpid(), signal.SIGTERM)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(training, "save_torch", save_and_signal)
        fit(tmp_path, settings(), evaluate=lambda toy: {"top1": 1.0})
    assert stopped.value.code == 75
    assert fit(tmp_path, settings(), evaluate=lambda toy: {"top1": 1.0}).result["last"]["top1"] == 1.0


@pytest.mark.parametrize(("fresh", "how"), [(False, "Repeat the command to continue."),
                                            (True, "Repeat the command without --fresh.")])
def test_a_stopped_run_says_how_to_go_on(tmp_path, capsys, fresh, how):
    """With --fresh again it would lose what was just saved."""
    fit_until(3, tmp_path, settings(fresh=fresh))
    assert how in capsys.readouterr().out


def test_ranks_with_different_checkpoints_do_not_go_on(tmp_path, monkeypatch):
    fit_until(3, tmp_path, settings())
    monkeypatch.setattr(distributed, "all_max", lambda step, negative: [step, -1])  # another rank fell back to step 1
    with pytest.raises(UserError, match=r"ranks read different checkpoints in .*steps 1 and 3"):
        fit(tmp_path, settings())


def test_impossible_batches_are_refused(tmp_path):
    with pytest.raises(ValueError, match="13 images, fewer than one batch of 16: lower .* say to 2, .*--base-lr"):
        fit(tmp_path, settings(batch_size=16))
    with pytest.raises(UserError, match="4 cannot be shared equally by 3 ranks"):
        training.split_batch(4, 512, 3)
    cases = {(12, 512, 1): (1, 12), (12, 5, 1): (3, 4), (12, 4, 2): (2, 3), (12, 1, 3): (4, 1)}  # steps, images
    assert {numbers: training.split_batch(*numbers) for numbers in cases} == cases


@pytest.fixture
def small_mae(tmp_path, monkeypatch):
    """Return a function settings -> result that runs pretrain_mae.main on this file's images with one narrow block."""
    monkeypatch.setitem(SIZES, "vit_demo", {"embed_dim": 8, "depth": 1})
    monkeypatch.setitem(DECODERS, "vit_demo", (8, 1, 2))
    monkeypatch.setattr(pretrain_mae.subsets, "pretraining_images", lambda args: (args, toy_images()))
    row = dict(preset="demo", img_size=[4], patch_size=2, num_heads=2, batch_size=BATCH, epochs=2, warmup_epochs=1,
               device="cpu", workers=0, output=str(tmp_path))

    def run(**explicit):
        return pretrain_mae.main(settings_of(pretrain_mae, {**row, **explicit}, {}))
    return run


def test_a_finished_run_is_reused_and_fresh_starts_again(small_mae, monkeypatch):
    first = small_mae()
    folder, weights = Path(first["run"]), torch.load(first["checkpoint"], weights_only=True)
    assert not steps_saved(folder)
    (folder / "trace").touch()
    trained = []
    monkeypatch.setattr(pretrain_mae, "train", lambda *args: trained.append(1) or train(*args))
    again = small_mae(workers=3, precision="bf16", log_every=7)  # none of these makes it another run
    assert not trained and {name: again[name] for name in first} == first
    fresh = small_mae(fresh=True)
    assert trained and fresh["run"] == first["run"] and not (folder / "trace").exists()
    assert_same(torch.load(fresh["checkpoint"], weights_only=True), weights)
    assert small_mae(seed=1)["run"] != first["run"]
