"""All that a run is continued from: what a checkpoint holds, and whether it may be continued here."""
import time

from common import checkpoint, distributed
from common.distributed import print0
from common.errors import UserError


class Snapshot:
    """All that a checkpoint holds, saved and restored together; `progress` is what the loop itself remembers."""

    def __init__(self, run, method, optimizer, engine):
        self.run, self.method, self.optimizer, self.engine = run, method, optimizer, engine
        self.progress = {"step": 0, "evaluate": False, "seconds": 0.0, "best": {}, "last": {}, "bad_images": []}
        self.saved_at = self.resumed_at = time.perf_counter()

    def restore(self):
        """Puts everything back as the newest whole checkpoint has it, the log included. Returns the step to do next."""
        saved = checkpoint.load_newest(self.run.folder)
        step = saved["progress"]["step"] if saved else 0
        newest, oldest = distributed.all_max(step, -step)
        if newest != -oldest:
            raise UserError(f"ranks read different checkpoints in {self.run.folder} (steps {-oldest} and {newest}): "
                            f"start again, and see that all nodes share this folder")
        self.run.cut_log(saved["log_size"] if saved else 0)
        if saved is None:
            return 0
        engine = self.engine
        check_execution(saved["execution"], engine.execution(), engine.args.allow_inexact)
        self.method.model.load_state_dict(saved["model"])
        self.method.load_state_dict(saved["method"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if saved["scaler"]:  # empty where it was not used, as in float32
            engine.scaler.load_state_dict(saved["scaler"])
        engine.meter.restore(saved["meter"], engine.device)
        self.progress.update(saved["progress"])
        print0(f"continuing after step {self.progress['step']}")
        return self.progress["step"]

    def save(self, step):
        self.progress.update(step=step, seconds=self.seconds())
        self.resumed_at = self.saved_at = time.perf_counter()
        meter = self.engine.meter.state()  # of all ranks
        if distributed.is_main():
            checkpoint.save_step(self.run.folder, step, {
                **self.run.weights(self.method.model), "method": self.method.state_dict(),
                "optimizer": self.optimizer.state_dict(), "scaler": self.engine.scaler.state_dict(),
                "meter": meter, "progress": self.progress,
                "execution": self.engine.execution(), "log_size": self.run.log_size()})
        distributed.barrier()  # a rank that left now would have torchrun stop the one that writes

    def seconds(self):
        """Seconds spent training so far, those before a resume included."""
        return self.progress["seconds"] + time.perf_counter() - self.resumed_at

    def due(self):
        return time.perf_counter() - self.saved_at > 60 * self.engine.args.save_minutes


def check_execution(stored, now, allow_inexact):
    """Refuses to resume where the arithmetic would differ, unless --allow-inexact."""
    changed = [f"{name} {stored.get(name)} before, {value} now" for name, value in now.items()
               if stored.get(name) != value]
    if changed and not allow_inexact:
        raise UserError(f"this run cannot be continued exactly: {'; '.join(changed)}. Start it as before "
                         f"(OMP_NUM_THREADS sets the threads), or pass --allow-inexact, or --fresh to start again")
