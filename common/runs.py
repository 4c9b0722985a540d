"""A run: one folder outputs/<script>/<name>-<hash>/ that knows its settings, its log and its result.

The hash covers the settings that change the result; data, teachers and initial weights enter by content. A finished run
is reused, an unfinished one continues with the same command, `--fresh` starts again.
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
from common.machine import environment
from common.options import EXECUTION
from common.tensorboard import add_row

WEIGHTS = "weights.pt"  # what a finished run leaves: Run.weights
# Not in the hash: what is read enters by content (its fingerprint), and `preset` names values that enter themselves
BY_CONTENT = ("data_path", "dataset_path", "init", "download", "preset")
# New arguments, and the default under which old runs stay valid: at that value they are left out of the hash.
ADDED_LATER = {}


def identity(settings):
    """The settings that change a run's result. None and False say "not used" and stay out, so that a new argument whose
    default is off leaves the identity of old runs as it was.
    """
    return {name: value for name, value in settings.items()
            if name not in EXECUTION + BY_CONTENT and value is not None and value is not False
            and (name not in ADDED_LATER or value != ADDED_LATER[name])}


def settings_hash(settings, fingerprints):
    """Ten hex digits for a run's identity and the content of what it reads."""
    text = json.dumps({**identity(settings), "fingerprints": fingerprints}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


class Run:
    """An open run. On ranks other than 0 writing does nothing."""

    def __init__(self, folder, settings):
        self.folder, self.settings, self.result = Path(folder), settings, None
        self.classes = None  # of a classifier: their names, in the order of its outputs
        self.board, self.drawn_at = None, time.perf_counter()  # TensorBoard's writer; when the picture was drawn
        self.log_path, self.save_to = self.folder / "log.jsonl", settings.get("save_to")

    def log(self, row):
        """Appends a row to log.jsonl."""
        if distributed.is_main():
            with explain_failed_write(self.log_path), open(self.log_path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            if self.board:
                add_row(self.board, row)

    def log_size(self):
        """Bytes."""
        return self.log_path.stat().st_size if self.log_path.exists() else 0

    def cut_log(self, size):
        """Forgets the rows after the first `size` bytes, which are those written after the checkpoint that a run
        resumes from, so that its log reads like an uninterrupted one.
        """
        if distributed.is_main() and self.log_size():
            rows = self.log_path.read_bytes()
            whole = rows[:size].rfind(b"\n") + 1
            if whole < size or not rows.endswith(b"\n"):
                print0(f"{self.log_path} was cut off, as by a power failure: its last row, not whole, is removed")
            os.truncate(self.log_path, whole)

    def weights(self, model):
        """The content of a file of weights: all that is needed to use them elsewhere."""
        return {"model": {name: value.cpu() for name, value in model.state_dict().items()}, "config": model.config,
                "classes": self.classes and [str(name) for name in self.classes],
                "statistics": channel_statistics(*(self.settings[name] for name in ("in_chans", "mean", "std")))}

    def finish(self, result, model):
        """Writes weights.pt, then result.json, which marks the run as finished; drops the checkpoints before. The
        picture comes last, so that it costs nothing where it cannot be drawn.
        """
        result = {**result, "run": str(self.folder), "checkpoint": str(self.folder / WEIGHTS)}
        if distributed.is_main():
            save_torch(self.folder / WEIGHTS, self.weights(model))
            save_json(self.folder / "result.json", {**result, "environment": environment()})
            remove_leftovers(self.folder, "step-*.pt")
        deliver(result, self.save_to)
        self.draw()
        distributed.barrier()
        return result

    def draw(self):
        """Draws curve.png from the log."""
        report.draw_curve(self.log_path, self.folder / "curve.png")
        self.drawn_at = time.perf_counter()

    def draw_now_and_then(self):
        """Draws curve.png, which takes about a second, unless it was drawn, or the run opened, in the last half minute.
        """
        if time.perf_counter() > self.drawn_at + 30:
            self.draw()


def deliver(result, save_to):
    """Copies a finished run's weights to --save-to."""
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
    """Yields the run of these settings; `run.result` is set if it is finished already. The settings of `no_identity`
    change no result, or are told by one of the `fingerprints` of what it reads.

    Rank 0 creates, locks and decides; the others are told. A folder that another process holds is waited for, since
    that process makes the same; with several ranks, who cannot wait for long, it is an error.
    """
    settings, save_to = vars(args), getattr(args, "save_to", None)
    if save_to and Path(save_to).is_dir():
        raise UserError(f"--save-to {save_to} is a folder: name a file in it")
    deciding = {name: value for name, value in settings.items() if name not in no_identity}
    digest = settings_hash(deciding, fingerprints)
    folder = Path(args.output) / script / f"{name}-{digest}"
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
        if lock and {path.name for path in folder.iterdir()} <= {"lock", "settings.json"}:  # nothing came of it
            shutil.rmtree(folder)
        raise
    finally:
        if lock:
            lock.close()


def remove_leftovers(folder, *patterns):
    """Removes files of these patterns, and what a process that was killed while it wrote a file left of it."""
    for pattern in (*patterns, ".*.tmp"):
        for path in folder.glob(pattern):
            with suppress(OSError):  # a finished run may lie where nothing can be written
                path.unlink()


def finished(folder):
    """The result of a finished run, else None, also where its result or its weights are damaged, which is said. The
    folder may have moved since, and the weights may be gone.
    """
    file = folder / "result.json"
    if not file.exists():
        return None
    try:
        result = json.loads(file.read_text())
        result["environment"]  # the last that is written
        file = folder / WEIGHTS
        if file.exists():
            verify(file)
    except Exception as error:  # damaged bytes can raise any exception
        print0(f"{file} is damaged ({type(error).__name__}): this run is continued or made again")
        return None
    return {**result, "run": str(folder), "checkpoint": str(file)}


def _lock(folder):
    """The folder's lock, held. It ends with the process that holds it, so that of a killed one is free."""
    told = False
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "a+", encoding="utf-8")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock.fileno()), os.stat(folder / "lock")):
                    return lock  # else the holder has removed the folder, as nothing came of its run
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
    """Makes and locks the folder; the lock, to be closed, and the result of a finished run, which needs no lock."""
    if not fresh and (result := finished(folder)):
        remove_leftovers(folder, "step-*.pt")
        return None, result
    lock = _lock(folder)
    os.register_at_fork(after_in_child=lock.close)  # else loading processes hold it for seconds after a kill -9
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}")
    lock.flush()
    if fresh:
        (folder / "result.json").unlink(missing_ok=True)  # first: without it nobody takes the run for finished
        for path in folder.iterdir():
            if path.name != "lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    if result := finished(folder):  # by another process, meanwhile
        return lock, result
    remove_leftovers(folder)
    save_json(folder / "settings.json", settings)
    return lock, None
