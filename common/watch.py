"""Monitoring: progress bars, and in a training the log, non-finite values, unreadable images and memory."""
import math
import os
import time
from contextlib import contextmanager

import torch
from tqdm import tqdm

from common import distributed
from common.checkpoint import step_file, steps_saved
from common.distributed import print0, printable
from common.errors import DataError

BAD_LIMIT = 0.01  # largest share of unreadable images that --on-bad-image skip replaces
MOST_SKIPPED = 50  # in fp16, a run stops after so many skipped updates in a row,
SMALLEST_SCALE = 1e-3  # or when the loss scale has become smaller than this


def progress_bar(total, unit="image", leave=False, **how):
    """Make a progress bar with count, rate and time left. Only rank 0 shows it, and only on a terminal."""
    disable = None if distributed.is_main() else True  # None lets tqdm look for a terminal
    return tqdm(total=total, unit=unit, leave=leave, disable=disable, **how)


def progress(items, what, total=None, **how):
    """Yield the items while a progress bar labelled `what` counts them, or of a loader's batches the images.

    items: a loader over a list of batches, a sequence, or any iterable whose length is given as `total`.
    """
    batches = getattr(items, "batch_sampler", None)  # of a loader: lists of sample keys
    if batches is not None:
        total = sum(map(len, batches))
    elif total is None:
        total = len(items)
    with progress_bar(total, desc=what, **how) as bar:
        for item in items:
            yield item
            bar.update(1 if batches is None else len(item["index"]))


def mention_busy_cores(device):
    """Print the advice to use a single thread if other processes keep the cores busy.

    The threads of an operation spin while they wait for each other, so all are slow if one has no core. Measured beside
    six other processes on two cores: one thread was 6 times as fast as two.
    """
    threads, cores = torch.get_num_threads(), os.cpu_count()
    if device.type == "cpu" and threads > 1 and hasattr(os, "getloadavg") and os.getloadavg()[0] > cores / 2:
        print0(f"other processes keep this machine busy (load {os.getloadavg()[0]:.1f} on {cores} cores): "
               f"OMP_NUM_THREADS=1 before the command may be several times faster than {threads} threads (and "
               f"--allow-inexact behind it, if the run has begun)")


class Guard:
    """A guard that blocks all updates from the first non-finite loss or gradient on, without synchronising the device.

    PyTorch's fused optimizers skip an update if their attribute `found_inf` is 1. In fp16 the gradient scaler sets that
    attribute itself: it skips an update whose gradients overflow, and halves the loss scale. So in fp16 a non-finite
    gradient is an error only if halving does not help: after MOST_SKIPPED in a row, or all the steps of a shorter run.
    """

    def __init__(self, run, optimizer, engine, schedule, total):
        self.run, self.optimizer, self.scaler, self.schedule = run, optimizer, engine.scaler, schedule
        self.step, self.most_skipped = 0, min(MOST_SKIPPED, total)
        self.bad_step = torch.full((), -1.0, dtype=torch.float64, device=engine.device)
        self.skipped = torch.zeros_like(self.bad_step)  # number of consecutive skipped updates, up to the last step

    def check(self, step, loss, grad_norm):
        """Record the first bad step, on the device, and tell the optimizer whether to skip this update."""
        self.step = step
        finite = torch.isfinite(grad_norm)
        self.skipped = torch.where(finite, 0.0, self.skipped + 1)
        good = torch.isfinite(loss) & (finite | self.scaler.is_enabled())
        self.bad_step = torch.where((self.bad_step < 0) & ~good, float(step), self.bad_step)
        if not self.scaler.is_enabled():
            self.optimizer.grad_scale = None
            self.optimizer.found_inf = (self.bad_step >= 0).float()

    def raise_if_bad(self):
        """Raise FloatingPointError on every rank if a step was bad, fp16 skips all updates, or weights are not finite.

        Synchronises the device, so it is called only before logging, saving or probing.
        """
        weights = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        largest = torch.nn.utils.get_total_norm(weights, math.inf)
        bad, skipped, tiny, broken = distributed.all_max(
            int(self.bad_step), int(self.skipped), self.scaler.get_scale() < SMALLEST_SCALE,
            not torch.isfinite(largest))
        if bad >= 0:
            self._raise(bad, "non-finite loss or gradient", "its update was not made, nothing was saved since")
        if skipped >= self.most_skipped or tiny:
            self._raise(self.step, "non-finite gradients again", f"the last {skipped} updates were not made")
        if broken:
            self._raise(self.step, "non-finite weights", "its update made them, they were not saved")

    def _raise(self, step, what, effect):
        saved = steps_saved(self.run.folder)
        good = f"the last good checkpoint is {step_file(saved[0])}" if saved else "no checkpoint was saved before"
        raise FloatingPointError(
            f"{what} in step {step + 1} (learning rate {self.schedule(step):.3g}): {effect}; {good} in "
            f"{self.run.folder}. Try a lower --base-lr, --clip-grad 1 or --precision fp32")


class Meter:
    """The log of a training and its progress bar: means of values, speed, share of time spent waiting for data.

    The sums stay on the device and are read only when a row of log.jsonl is due.
    """

    def __init__(self, run, total, batch_size):
        self.run, self.total, self.batch_size = run, total, batch_size
        self.sums, self.steps = {}, 0  # since the last row, also across a resume
        self.timed, self.waited, self.since = 0, 0.0, time.perf_counter()  # since the last row, in this process

    @contextmanager
    def bar(self, start):
        """Show a progress bar on rank 0 in this block, or without a terminal print a line now and then."""
        self.start, self.began, self.report_at = start, time.perf_counter(), time.perf_counter() + 20
        with progress_bar(self.total, initial=start, unit="step", leave=True) as self.line:
            yield

    def waiting_for(self, batches):
        """Yield the batches and measure the time spent waiting for them."""
        batches, asked = iter(batches), time.perf_counter()
        while (batch := next(batches, None)) is not None:
            self.waited += time.perf_counter() - asked
            yield batch
            asked = time.perf_counter()

    def add(self, **values):
        """Add scalar tensors to the sums of their names."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().double()

    def step(self, **values):
        """Add values, count the step and advance the progress bar."""
        self.add(**values)
        self.steps += 1
        self.timed += 1
        self.line.update()

    def state(self):
        """Return the sums and their number of steps, for a checkpoint. All ranks call it.

        The sums are averaged over the ranks, as a row is in any case.
        """
        sums = {name: distributed.all_sum(value.clone()) / distributed.world_size()
                for name, value in sorted(self.sums.items())}
        return {"sums": {name: value.cpu() for name, value in sums.items()}, "steps": self.steps}

    def restore(self, state, device):
        """Restore what `state` returned, onto the device."""
        self.sums = {name: value.to(device) for name, value in state["sums"].items()}
        self.steps = state["steps"]

    def log_row(self, step, epoch, lr):
        """Write one row to log.jsonl: means over the steps since the last row and over ranks."""
        now = time.perf_counter()
        elapsed, names = now - self.since, sorted(self.sums)
        sums = distributed.all_sum(torch.stack([self.sums[name] for name in names])).tolist()
        means = {name: value / self.steps / distributed.world_size() for name, value in zip(names, sums)}
        speed, waiting = self.timed * self.batch_size / elapsed, self.waited / elapsed
        # JSON has no infinity, which gradient norms may reach in the first steps of fp16
        finite = {name: value if math.isfinite(value) else None for name, value in means.items()}
        self.run.log({"step": step, "epoch": round(epoch, 4), "lr": lr, **finite,
                      "images_per_second": round(speed, 1), "waiting": round(waiting, 3)})
        self.show_progress(step, means["loss"], lr, speed, waiting, now)
        self.sums, self.steps, self.timed, self.waited, self.since = {}, 0, 0, 0.0, now

    def show_progress(self, step, loss, lr, speed, waiting, now):
        """Update the progress bar, or print a line where there is none."""
        self.line.set_postfix_str(f"loss {loss:.4f} lr {lr:.2e} {speed:.0f} img/s, {waiting:.0%} waiting for data")
        if self.line.disable and (now > self.report_at or step == self.total):
            left = (now - self.began) / (step - self.start) * (self.total - step)
            print0(f"step {step} of {self.total}: loss {loss:.4f}, {speed:.0f} images/s, "
                   f"{waiting:.0%} waiting for data, {left / 60:.1f} minutes left")
            self.report_at = now + max(30, 0.02 * (now - self.began))  # half a minute at first, later more rarely


class BadImages:
    """The unreadable images that --on-bad-image skip replaced by others, also listed in a file in the run's folder."""

    def __init__(self, run, images, known=()):
        self.run, self.images, self.known = run, images, set(known)

    def all_ranks(self):
        """Return the sorted indices of the unreadable images of all ranks. All ranks call it."""
        return sorted(set().union(*distributed.gather(self.known)))

    def record(self, indices):
        """Record the "bad" indices of a batch (-1: readable). Raises DataError above a share of BAD_LIMIT."""
        new = {index for index in indices.tolist() if index >= 0} - self.known
        if not new:
            return
        self.known |= new
        path = self.run.folder / f"bad_images-rank{distributed.rank()}.txt"
        path.write_text("\n".join(str(self.images.where(index)) for index in sorted(self.known)) + "\n",
                        encoding="utf-8", errors="surrogateescape")  # file names need not be UTF-8
        names = ", ".join(str(self.images.where(index)) for index in sorted(new))
        print(printable(f"unreadable and replaced: {names}"), flush=True)  # on every rank: each reads other images
        share = len(self.known) / len(self.images)  # of this rank, which after some epochs has read all
        if share > BAD_LIMIT:
            raise DataError(f"{share:.1%} of {len(self.images)} images are unreadable, more than {BAD_LIMIT:.0%}: "
                            f"see {path}")


def out_of_memory(error):
    """Return whether an error means that this process, and not one of its workers, ran out of memory.

    On a CPU, torch has no error class for it, only a message.
    """
    message = str(error)
    return isinstance(error, torch.OutOfMemoryError) or ("can't allocate" in message and "DataLoader" not in message)


@contextmanager
def explain_out_of_memory(micro_batch):
    """Turn an out-of-memory error of this block into a MemoryError that says which argument to lower."""
    try:
        yield
    except RuntimeError as error:
        if out_of_memory(error):
            raise MemoryError(f"out of memory with {micro_batch} images at once: try --micro-batch "
                              f"{max(1, micro_batch // 2)}; the global batch stays the same "
                              f"({str(error).splitlines()[0]})") from error
        raise
