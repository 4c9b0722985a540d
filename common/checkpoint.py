"""Crash-safe files, and the checkpoints from which a run resumes.

A file is written completely or not at all, and a checkpoint is deleted only once newer ones are complete. Checkpoints
hold only tensors, numbers, strings, lists and dicts, so that all of them load with `weights_only=True`.
"""
import errno
import json
import os
import time
import uuid
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from common import distributed
from common.distributed import print0
from common.errors import UserError

KEEP = 2  # checkpoints per run: the newest, and the previous one in case the newest is damaged


@contextmanager
def explain_failed_write(path):
    """Turn an OSError of this block into one that names the file and the remedy."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "Free some space there, or choose another folder" if full else "Choose another folder"
        raise OSError(f"could not write {path}: {error.strerror or error}. {remedy}; a training continues from its "
                      f"last whole checkpoint by the same command") from error


def write_atomically(path, write):
    """Call write(file) on a temporary file in the same folder, flush it to disk, and rename it to path.

    An error removes the temporary file and leaves an existing file at path untouched. Raises OSError with a remedy if
    the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    with explain_failed_write(path):
        try:
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def save_torch(path, content):
    """Write a torch file atomically (`write_atomically`)."""
    def write(file):
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch raises its own error, which hides the system's (a full disk)
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
    write_atomically(path, write)


def save_json(path, content):
    """Write a JSON file atomically. Raises UserError for numbers that are not finite."""
    require_finite(path, content)
    write_atomically(path, lambda file: file.write(f"{json.dumps(content, indent=1)}\n".encode()))


def save_arrays(path, arrays):
    """Write {name: array} as a compressed .npz file, atomically. Raises UserError for numbers that are not finite."""
    require_finite(path, arrays)
    write_atomically(path, lambda file: np.savez_compressed(file, **arrays))


def require_finite(path, content, name=""):
    """Raise UserError if a number in nested dicts, lists and arrays is not finite.

    path: the file that would hold it, for the message. name: where `content` is in the whole, as in "rows.0.measured".
    """
    if isinstance(content, (dict, list, tuple)):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            require_finite(path, value, f"{name}.{key}" if name else key)
    elif isinstance(content, (float, np.floating)) or (isinstance(content, np.ndarray) and content.dtype.kind == "f"):
        if not np.isfinite(content).all():
            raise UserError(f"{path} is not written: {name} is not finite. The weights or the images give no number "
                            f"there: look at both")


def step_file(step):
    """Return the name of the checkpoint after `step` steps."""
    return f"step-{step:08d}.pt"


def steps_saved(folder):
    """Return the steps of which a run's folder has a checkpoint, newest first."""
    return sorted((int(path.stem[5:]) for path in Path(folder).glob(f"step-{'[0-9]' * 8}.pt")), reverse=True)


def save_step(folder, step, state):
    """Write the checkpoint of a step, then delete all but the newest `KEEP`."""
    folder = Path(folder)
    save_torch(folder / step_file(step), state)
    for old in steps_saved(folder)[KEEP:]:
        (folder / step_file(old)).unlink(missing_ok=True)


def verify(path):
    """Raise BadZipFile if a record of a torch (zip) file does not match its checksum, which torch.load ignores.

    The checksum (CRC) does not cover a record's attributes, and for a record whose directory flag was flipped,
    torch.load would return uninitialised memory. Files written under torch.serialization.set_crc32_options(False) have
    no checksums. Damage elsewhere in the file may raise any other exception.
    """
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        damaged = next((record.filename for record in records if record.external_attr & 0x10), None)
        if damaged is None and any(record.CRC for record in records):
            damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"record {damaged} is not as it was written")


def load_verified(path):
    """Verify a torch (zip) file, then load it onto the CPU. A damaged file raises BadZipFile or any other exception."""
    verify(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def load_newest(folder):
    """Load and return the newest intact checkpoint in a run's folder, or None if there is no checkpoint.

    Damaged ones are reported and skipped. Raises UserError if all are damaged.
    """
    steps = steps_saved(folder)
    for step in steps:
        path = Path(folder) / step_file(step)
        try:
            return load_verified(path)
        except Exception as error:  # damaged bytes can raise any exception
            print0(f"{path} is damaged ({type(error).__name__}): falling back to the checkpoint before it")
    if steps:
        raise UserError(f"every checkpoint in {folder} is damaged (steps {steps}): delete it to start this run again")
    return None


class Snapshot:
    """The complete state of a training run, saved to checkpoints and restored from them.

    `progress` is the loop's own part of that state.
    """

    def __init__(self, run, method, optimizer, engine):
        self.run, self.method, self.optimizer, self.engine = run, method, optimizer, engine
        self.progress = {"step": 0, "evaluate": False, "seconds": 0.0, "best": {}, "last": {}, "bad_images": []}
        self.saved_at = time.perf_counter()

    def restore(self):
        """Restore the newest intact checkpoint, and cut the log to its step. Return the number of steps done, or 0.

        Raises UserError if the ranks read different checkpoints. Without --allow-inexact, raises it also if the run
        cannot end in the same bits here, because the device, the number of ranks or threads, or the precision differs.
        """
        saved = load_newest(self.run.folder)
        step = saved["progress"]["step"] if saved else 0
        newest, oldest = distributed.all_max(step, -step)
        if newest != -oldest:
            raise UserError(f"ranks read different checkpoints in {self.run.folder} (steps {-oldest} and {newest}): "
                            f"start again, and see that all nodes share this folder")
        self.run.cut_log(saved["log_size"] if saved else 0)
        if saved is None:
            return 0
        engine = self.engine
        before, now = saved["execution"], engine.execution()
        changed = [f"{key} {before.get(key)} before, {now[key]} now" for key in now if before.get(key) != now[key]]
        if changed and not engine.args.allow_inexact:
            raise UserError(f"this run cannot be continued exactly: {'; '.join(changed)}. Start it as before "
                            f"(OMP_NUM_THREADS sets the threads), or pass --allow-inexact, or delete "
                            f"{self.run.folder}")
        self.method.model.load_state_dict(saved["model"])
        self.method.load_state_dict(saved["method"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if saved["scaler"]:  # empty unless fp16
            engine.scaler.load_state_dict(saved["scaler"])
        engine.meter.restore(saved["meter"], engine.device)
        self.progress.update(saved["progress"])
        print0(f"continuing after step {self.progress['step']}")
        return self.progress["step"]

    def save(self, step):
        """Save a checkpoint after `step` steps. All ranks call it, and rank 0 writes."""
        self.progress.update(step=step, seconds=self.seconds())
        self.saved_at = time.perf_counter()
        meter = self.engine.meter.state()  # collective: every rank takes part
        if distributed.is_main():
            save_step(self.run.folder, step, {
                **self.run.weights(self.method.model),
                "method": self.method.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.engine.scaler.state_dict(),
                "meter": meter,
                "progress": self.progress,
                "execution": self.engine.execution(),
                "log_size": self.run.log_size()})
        distributed.barrier()  # if a rank exited now, torchrun would kill rank 0 while it writes

    def seconds(self):
        """Return the seconds spent so far, including evaluations and the time before a resume."""
        return self.progress["seconds"] + time.perf_counter() - self.saved_at

    def is_due(self):
        """Return whether the last checkpoint is older than --save-minutes."""
        return time.perf_counter() - self.saved_at > 60 * self.engine.args.save_minutes
