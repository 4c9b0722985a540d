"""A run: one folder outputs/<script>/<name>-<hash>/ with its settings, log, checkpoints and result.

The hash covers the settings that change the result, and the content of data, teacher and initial weights. The same
command reuses a finished run and continues an unfinished one; with `--fresh` it starts again.
"""
import fcntl
import hashlib
import json
import os
import shutil
import socket
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from common import distributed, report
from common.checkpoint import explain_failed_write, save_json, save_torch, verify, write_atomically
from common.data import channel_statistics
from common.distributed import print0
from common.errors import UserError
from common.options import EXECUTION
from common.tensorboard import add_row

WEIGHTS = "weights.pt"  # the final weights of a finished run, see Run.weights
# Not in the hash: files that are read enter by a fingerprint of their content, and a preset by the values that it sets
BY_CONTENT = ("data_path", "dataset_path", "init", "download", "preset")
# {new argument: the value that means what the code did before it existed}: at this value it is left out of the hash, so
# that runs made before keep their identity. None and False are left out in any case.
ADDED_LATER = {}


def identity(settings):
    """Return those of the settings that change a run's result."""
    return {name: value for name, value in settings.items()
            if name not in EXECUTION + BY_CONTENT and value is not None and value is not False
            and (name not in ADDED_LATER or value != ADDED_LATER[name])}


def settings_hash(settings, fingerprints):
    """Return ten hex digits that identify a run by its settings and by the {name: fingerprint} of what it reads."""
    text = json.dumps({**identity(settings), "fingerprints": fingerprints}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


class Run:
    """An open run. Its methods write on rank 0 only."""

    def __init__(self, folder, settings):
        self.folder, self.settings, self.result = Path(folder), settings, None
        self.classes = None  # of a classifier: the names of the classes, in the order of its outputs
        self.board, self.drawn_at = None, time.perf_counter()  # TensorBoard's writer; when curve.png was drawn
        self.log_path, self.save_to = self.folder / "log.jsonl", settings.get("save_to")

    def log(self, row):
        """Append a row, a dict, to log.jsonl."""
        if distributed.is_main():
            with explain_failed_write(self.log_path), open(self.log_path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            if self.board:
                add_row(self.board, row)

    def log_size(self):
        """Return the size of log.jsonl in bytes."""
        return self.log_path.stat().st_size if self.log_path.exists() else 0

    def cut_log(self, size):
        """Cut log.jsonl back to its first `size` bytes, and to whole rows: a run that resumes from a checkpoint repeats
        the steps after it, whose rows would else be there twice.
        """
        if distributed.is_main() and self.log_size():
            rows = self.log_path.read_bytes()
            whole = rows[:size].rfind(b"\n") + 1
            if whole < size or not rows.endswith(b"\n"):
                print0(f"{self.log_path} was cut off, as by a power failure: its last row, not whole, is removed")
            os.truncate(self.log_path, whole)

    def weights(self, model):
        """Return the content of a file of weights: the state dict and what is needed to use it elsewhere."""
        return {"model": {name: value.cpu() for name, value in model.state_dict().items()}, "config": model.config,
                "classes": self.classes and [str(name) for name in self.classes],
                "statistics": channel_statistics(*(self.settings[name] for name in ("in_chans", "mean", "std")))}

    def finish(self, result, model):
        """Write weights.pt, then result.json, which marks the run as finished, and return the result."""
        result = {**result, "run": str(self.folder), "checkpoint": str(self.folder / WEIGHTS)}
        if distributed.is_main():
            save_torch(self.folder / WEIGHTS, self.weights(model))
            save_json(self.folder / "result.json", {**result, "environment": report.environment()})
            remove_leftovers(self.folder, "step-*.pt")
        deliver(result, self.save_to)
        self.draw()  # last: nothing is lost where it fails
        distributed.barrier()
        return result

    def draw(self):
        """Draw curve.png from the log, if it has begun."""
        if self.log_size():
            report.draw_curve(self.log_path, self.folder / "curve.png")
        self.drawn_at = time.perf_counter()

    def draw_now_and_then(self):
        """Draw curve.png, which takes about a second, if the last time, or the start, is half a minute ago."""
        if time.perf_counter() > self.drawn_at + 30:
            self.draw()


def deliver(result, save_to):
    """Copy the weights of a finished run to the file `save_to`, if one was given."""
    if save_to and distributed.is_main():
        if not Path(result["checkpoint"]).exists():
            raise OSError(f"{result['checkpoint']} is gone, so --save-to has nothing to copy: --fresh makes it again")
        try:
            Path(save_to).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(save_to, lambda file: file.write(Path(result["checkpoint"]).read_bytes()))
        except OSError as error:
            raise OSError(f"--save-to {save_to}: {error}. The weights are in {result['checkpoint']}") from error
        print0(f"weights copied to {save_to}")


@contextmanager
def open_run(script, name, args, fingerprints, no_identity=()):
    """Yield the run with these settings; if it is finished already, `run.result` holds its result.

    fingerprints: {name: hash of the content} of what the run reads. no_identity: names of settings that change no
    result, or that a fingerprint covers. Rank 0 creates and locks the folder and tells the other ranks. If another
    process holds the lock, it is making the same run, so this one waits. Several ranks cannot wait for long (their
    collectives would time out): for them it is a UserError.
    """
    settings, save_to = vars(args), getattr(args, "save_to", None)
    if save_to and Path(save_to).is_dir():
        raise UserError(f"--save-to {save_to} is a folder: name a file in it")
    deciding = {key: value for key, value in settings.items() if key not in no_identity}
    folder = Path(args.output) / script / f"{name}-{settings_hash(deciding, fingerprints)}"
    names = set(distributed.gather(folder.name))
    if len(names) > 1:
        raise UserError(f"the ranks would make different runs ({', '.join(sorted(names))}): give all nodes the same "
                        f"images, weights and arguments")
    lock, problem, result = None, None, None
    if distributed.is_main():
        try:
            lock, result = _prepare(folder, args.fresh, {"script": script, **settings, "fingerprints": fingerprints})
        except OSError as error:
            problem = str(error)
    problem, result = distributed.broadcast_object((problem, result))
    if problem:
        raise UserError(problem)
    run = Run(folder, settings)
    run.result = result
    print0(f"run {folder}" + (" (finished: reused)" if result else ""))
    try:
        if result and result.get("bad_images") and args.on_bad_image == "stop":
            raise UserError(f"{folder} was finished with {result['bad_images']} unreadable images replaced: "
                            f"--on-bad-image skip takes it as it is, --fresh repeats it")
        if result:
            deliver(result, run.save_to)
        yield run
    except BaseException:
        if lock and {path.name for path in folder.iterdir()} <= {"lock", "settings.json"}:  # the run has not begun
            shutil.rmtree(folder)
        raise
    finally:
        if lock:
            lock.close()


def remove_leftovers(folder, *patterns):
    """Remove files of these patterns, and temporary files of a process that was killed while it wrote."""
    for pattern in (*patterns, ".*.tmp"):
        for path in folder.glob(pattern):
            with suppress(OSError):  # a finished run may lie in a folder that is read-only
                path.unlink()


def finished(folder):
    """Return the result of a finished run, else None; also None, with a message, if its result or weights are damaged.

    The folder may have been moved, so the paths in the result are set anew. The weights may have been deleted.
    """
    file = folder / "result.json"
    if not file.exists():
        return None
    try:
        result = json.loads(file.read_text())
        result["environment"]  # an error if this is no result
        file = folder / WEIGHTS
        if file.exists():
            verify(file)
    except Exception as error:  # damaged bytes can raise any exception
        print0(f"{file} is damaged ({type(error).__name__}): this run is continued or made again")
        return None
    return {**result, "run": str(folder), "checkpoint": str(file)}


def _lock(folder):
    """Lock the folder and return the open lock file. If the process is killed, the system frees the lock."""
    told = False
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "a+", encoding="utf-8")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock.fileno()), os.stat(folder / "lock")):
                    return lock  # otherwise its former holder has removed the folder, and this file with it
        except BlockingIOError:
            lock.seek(0)
            in_use = f"{folder} is in use by {lock.read().strip() or 'another process'}"
            if distributed.world_size() > 1:
                raise OSError(f"{in_use}: wait for it or stop it") from None
            if not told:
                told = True
                print0(f"{in_use}, which trains the same: waiting for it")
            time.sleep(1)
        except OSError as error:  # Lustre without its flock option, some NFS
            raise OSError(f"{folder} cannot be locked ({error}): choose an --output on a file system with locks"
                          ) from None
        lock.close()


def _prepare(folder, fresh, settings):
    """Make and lock a run's folder. Return the lock, to be closed at the end, and the result of a finished run or None.

    A run that was finished before needs no lock: None. With lock and result, another process has just finished it.
    """
    if not fresh and (result := finished(folder)):
        remove_leftovers(folder, "step-*.pt")
        return None, result
    lock = _lock(folder)
    os.register_at_fork(after_in_child=lock.close)  # or workers would hold it for seconds after a kill -9
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}")
    lock.flush()
    if fresh:
        (folder / "result.json").unlink(missing_ok=True)  # first: no other process may take the run for finished
        for path in folder.iterdir():
            if path.name != "lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    if result := finished(folder):  # by the process that was waited for
        return lock, result
    remove_leftovers(folder)
    save_json(folder / "settings.json", settings)
    return lock, None
