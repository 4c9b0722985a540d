"""What watches a training run: the log and progress bar, stop signals, non-finite values, unreadable images, memory."""
import math
import signal
import time
from contextlib import contextmanager

import torch
from tqdm import tqdm

from common import checkpoint, distributed
from common.distributed import print0
from common.errors import STOPPED
from common.images import DataError

BAD_LIMIT = 0.01  # --on-bad-image skip stops the run above this share of unreadable images


class StopSignals:
    """Turns the first signal into a flag that the loop reads at the end of a step. A second one interrupts at once,
    unless it follows so soon that it is the same one, sent to the launcher and to the ranks.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self, run, progress, total):
        self.run, self.progress, self.total = run, progress, total

    def __enter__(self):
        self.received, self.at, self.at_once = False, 0.0, False
        self.before = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def _handle(self, number, frame):
        if self.received and time.monotonic() > self.at + 3:
            raise KeyboardInterrupt
        if not self.received:
            self.received, self.at = True, time.monotonic()
            if self.at_once:
                raise SystemExit(STOPPED)

    @contextmanager
    def obeyed_at_once(self):
        """For an evaluation: it may take minutes, and what it has done so far need not be kept."""
        self.at_once = True
        if self.received:
            raise SystemExit(STOPPED)
        yield
        self.at_once = False  # not after an error, which ends the training and this watch with it

    def __exit__(self, kind, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if kind is SystemExit:
            how = "without --fresh" if self.run.settings.get("fresh") else "to continue"
            print0(f"stopped by a signal after step {self.progress['step']} of {self.total}; saved in "
                   f"{self.run.folder}. Repeat the command {how}.")


class Guard:
    """Skips every update from the first non-finite loss or gradient on, without asking the device during a step.

    The fused optimizers leave the weights alone where `found_inf` is 1. With fp16 the scaler owns that flag and skips
    overflowing gradients by itself, so there only the loss counts.
    """

    def __init__(self, run, optimizer, scaler, schedule, device):
        self.run, self.optimizer, self.schedule = run, optimizer, schedule
        self.owns_flag = not scaler.is_enabled()
        self.bad_step = torch.full((), -1.0, dtype=torch.float64, device=device)

    def check(self, step, loss, grad_norm):
        finite = torch.isfinite(loss)
        if self.owns_flag:
            finite = finite & torch.isfinite(grad_norm)
        self.bad_step = torch.where((self.bad_step < 0) & ~finite, float(step), self.bad_step)
        if self.owns_flag:
            self.optimizer.grad_scale, self.optimizer.found_inf = None, (self.bad_step >= 0).float()

    def raise_if_bad(self):
        """Reads the device (so it is called only to log or to save) and stops the run on every rank alike."""
        [step] = distributed.all_max(int(self.bad_step))
        if step < 0:
            return
        saved = checkpoint.steps_saved(self.run.folder)
        good = f"the last good checkpoint is step-{saved[0]:08d}.pt" if saved else "no checkpoint was saved before"
        raise FloatingPointError(
            f"non-finite loss or gradient in step {step + 1} (learning rate {self.schedule(step):.3g}): its update was "
            f"not made, nothing was saved since; {good} in {self.run.folder}. Try a lower --base-lr, --clip-grad 1 or "
            f"--precision fp32")


class Meter:
    """Sums kept on the device and read only when a row of log.jsonl is due; speed, waiting share, time left."""

    def __init__(self, run, total, batch_size):
        self.run, self.total, self.batch_size = run, total, batch_size
        self.sums, self.steps = {}, 0  # since the last row, also that of a run before it was resumed
        self.timed, self.waited, self.since = 0, 0.0, time.perf_counter()  # in this process

    @contextmanager
    def bar(self, start):
        """The progress bar, on rank 0; where there is no terminal, a line now and then instead."""
        self.start, self.began, self.report_at = start, time.perf_counter(), time.perf_counter() + 20
        disable = None if distributed.is_main() else True  # None: only where there is no terminal
        with tqdm(total=self.total, initial=start, unit="step", disable=disable) as self.line:
            yield

    def waiting_for(self, batches):
        """Yield the batches, and count the time spent waiting for them."""
        batches, asked = iter(batches), time.perf_counter()
        while (batch := next(batches, None)) is not None:
            self.waited += time.perf_counter() - asked
            yield batch
            asked = time.perf_counter()

    def add(self, **values):
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().double()

    def step(self, **values):
        self.add(**values)
        self.steps += 1
        self.timed += 1
        self.line.update()

    def state(self):
        """The sums, averaged over ranks: every rank can go on from them, as a row averages over ranks anyway."""
        sums = {name: distributed.all_sum(value.clone()) / distributed.world_size()
                for name, value in sorted(self.sums.items())}
        return {"sums": {name: value.cpu() for name, value in sums.items()}, "steps": self.steps}

    def restore(self, state, device):
        self.sums = {name: value.to(device) for name, value in state["sums"].items()}
        self.steps = state["steps"]

    def write(self, step, epoch, lr):
        """One row: means over the steps since the last row and over ranks."""
        names, now = sorted(self.sums), time.perf_counter()
        sums = distributed.all_sum(torch.stack([self.sums[name] for name in names])).tolist()
        means = {name: value / self.steps / distributed.world_size() for name, value in zip(names, sums)}
        speed, waiting = self.timed * self.batch_size / (now - self.since), self.waited / (now - self.since)
        kept = {name: value if math.isfinite(value) else None for name, value in means.items()}  # fp16's first steps
        self.run.log({"step": step, "epoch": round(epoch, 4), "lr": lr, **kept,
                      "images_per_second": round(speed, 1), "waiting": round(waiting, 3)})
        self.show(step, means["loss"], lr, speed, waiting, now)
        self.sums, self.steps, self.timed, self.waited, self.since = {}, 0, 0, 0.0, now

    def show(self, step, loss, lr, speed, waiting, now):
        self.line.set_postfix_str(f"loss {loss:.4f} lr {lr:.2e} {speed:.0f} img/s, {waiting:.0%} waiting for data")
        if self.line.disable and (now > self.report_at or step == self.total):
            left = (now - self.began) / (step - self.start) * (self.total - step)
            print0(f"step {step} of {self.total}: loss {loss:.4f}, {speed:.0f} images/s, "
                   f"{waiting:.0%} waiting for data, {left / 60:.1f} minutes left")
            self.report_at = now + 120


class BadImages:
    """The unreadable images that `--on-bad-image skip` replaced: listed in the run's folder; too many stop the run."""

    def __init__(self, run, images, known=()):
        self.run, self.images, self.known = run, images, set(known)

    def everywhere(self):
        """Those that any rank has met."""
        return sorted(set().union(*distributed.gather(self.known)))

    def note(self, indices):
        new = {index for index in indices.tolist() if index >= 0} - self.known
        if not new:
            return
        self.known |= new
        path = self.run.folder / f"bad_images-rank{distributed.rank()}.txt"
        path.write_text("\n".join(str(self.images.where(index)) for index in sorted(self.known)) + "\n")
        names = ", ".join(str(self.images.where(index)) for index in sorted(new))
        print(f"unreadable and replaced: {names}", flush=True)  # by every rank: each sees other images
        share = len(self.known) / len(self.images)  # of what this rank has met: after some epochs that is all of them
        if share > BAD_LIMIT:
            raise DataError(f"{share:.1%} of {len(self.images)} images are unreadable, more than {BAD_LIMIT:.0%}: "
                            f"see {path}")


def out_of_memory(error):
    """Whether a RuntimeError says so; on a CPU it has no class of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@contextmanager
def explain_memory(micro_batch):
    """Turns an out-of-memory error into one that says which argument to lower."""
    try:
        yield
    except RuntimeError as error:
        if out_of_memory(error):
            raise MemoryError(f"out of memory with {micro_batch} images at once: try --micro-batch "
                              f"{max(1, micro_batch // 2)}; the global batch stays the same "
                              f"({str(error).splitlines()[0]})") from error
        raise
