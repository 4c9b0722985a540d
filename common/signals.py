"""Stop signals: a training that receives one saves a checkpoint and exits, and the same command continues it."""
import os
import signal
import sys
import time
from contextlib import contextmanager

from common.distributed import print0
from common.errors import STOPPED

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def stop_signals():
    """Return the signals that stop a run. SIGHUP (the terminal was closed) is left out if nohup ignores it."""
    return [number for number in STOP_SIGNALS
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN]


def hang_up():
    """Send stdout and stderr to /dev/null where they go to a closed terminal, because writing there fails."""
    for stream in (1, 2):
        try:
            os.write(stream, b"\n")  # fails if its terminal is closed
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


def exit_on_stop_signals():
    """Exit with STOPPED at a stop signal; the same command then continues. A training installs its own handlers."""
    def stop(number, frame):
        if number == signal.SIGHUP:
            hang_up()
        os.write(2, f"stopped by {signal.Signals(number).name}: the same command goes on\n".encode())
        sys.exit(STOPPED)
    for number in stop_signals():
        signal.signal(number, stop)


def ignore_stop_signals(worker):
    """Keep a worker alive when a stop signal reaches the whole job: the main process needs it to finish the step.

    SIGTERM is delayed by 30 seconds rather than ignored, because Python uses it to end workers that are left.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))


class StopSignals:
    """A context manager that notes the first stop signal in `received`, which the loop reads at the end of each step.

    A second signal interrupts at once, unless it comes within 3 seconds: torchrun's ranks may receive the same signal
    twice, once directly and once from the launcher.
    """

    def __init__(self, run, progress, total):
        self.run, self.progress, self.total = run, progress, total

    def __enter__(self):
        self.received, self.received_at, self.immediate = False, 0.0, False
        self.previous = {number: signal.signal(number, self._handle) for number in stop_signals()}
        return self

    def _handle(self, number, frame):
        if number == signal.SIGHUP:
            hang_up()
        if self.received and time.monotonic() > self.received_at + 3:
            raise KeyboardInterrupt
        if not self.received:
            self.received, self.received_at = True, time.monotonic()
            if self.immediate:
                raise SystemExit(STOPPED)

    @contextmanager
    def exit_immediately(self):
        """Exit as soon as a signal arrives within this block: for an evaluation, which the resumed run then repeats."""
        self.immediate = True
        if self.received:
            raise SystemExit(STOPPED)
        yield
        self.immediate = False  # needs no finally: after an error this object is not used again

    def __exit__(self, kind, *error):
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        if kind is SystemExit:
            how = "without --fresh" if self.run.settings.get("fresh") else "to continue"
            print0(f"stopped by a signal after step {self.progress['step']} of {self.total}; saved in "
                   f"{self.run.folder}. Repeat the command {how}.")
