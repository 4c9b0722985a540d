"""What the processes of test_jobs.py do. Without PyTorch, whose import would take longer than the test."""
import json
import os
import signal
import sys
import time


def task(folder, name, seconds=1.0, leave=None):
    """Leaves a file of when it ran and with how many threads; `name`.saved at a SIGTERM, exit code `leave`."""
    signal.signal(signal.SIGTERM, lambda *_: ((folder / f"{name}.saved").touch(), sys.exit(75)))
    (folder / f"{name}.began").touch()
    began = time.time()
    print("training", name)
    time.sleep(seconds)
    if leave is not None:
        sys.exit(leave)
    (folder / f"{name}.json").write_text(json.dumps(
        {"began": began, "ended": time.time(), "threads": os.environ["OMP_NUM_THREADS"]}))
