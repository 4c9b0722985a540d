"""The machine: what results record about it, and what obscure errors of the loader's workers mean."""
import os
import platform
import re
import shlex
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from common.errors import UserError
from common.options import ROOT

SHARED_MEMORY = "/dev/shm"  # where workers leave their batches
STARVED = "for want of memory: pass a smaller --workers, or --keep-decoded 0"
TROUBLES = {  # {pattern in the message of PyTorch or the system: what it means}; the first pattern that matches counts
    r"killed by signal: Bus error|shared memory\(shm\)|</torch_.*No space left":
        f"shared memory ran full: free some of {SHARED_MEMORY}, give the container more (docker run --shm-size=16g), "
        f"or pass --workers 0",
    r"ancdata|Too many open files":
        "too many files are open: raise the limit (ulimit -n 4096), or pass a smaller --workers",
    r"killed by signal: Killed|DataLoader worker.*exited unexpectedly":
        f"a worker was killed, most likely {STARVED}",
    r"Caught MemoryError in DataLoader|DataLoader worker.*can't allocate memory": f"a worker failed {STARVED}",
    r"\[Errno 12\]": f"a worker could not be started {STARVED}",
    r"killed by signal: ": "a worker crashed: --workers 0 shows where",
}


def environment():
    """Return what a result records about where it was made: versions, hardware, date and command."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    script = Path(sys.argv[0]).resolve()
    script = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script.name  # without folders of this machine
    versions = {name: getattr(sys.modules.get(name), "__version__", None)
                for name in ("torch", "torchvision", "timm", "numpy")}
    return {"python": platform.python_version(), **versions, "gpu": gpu,
            "cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(),
            "date": time.strftime("%Y-%m-%d"), "command": shlex.join(["python", str(script), *sys.argv[1:]])}


@contextmanager
def explain_troubles():
    """Turn an error of the loader's workers into one that says what to do.

    To be put around a whole program: a worker's death is reported by a signal, which may interrupt it anywhere.
    """
    try:
        yield
    except (RuntimeError, OSError, MemoryError) as error:
        for sign, meaning in TROUBLES.items():
            if re.search(sign, str(error), re.DOTALL):
                raise UserError(f"{meaning} ({str(error).strip().splitlines()[-1]})") from error
        raise
