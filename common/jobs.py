"""Several trainings at the same time, each in a process of its own.

On a CPU, two trainings with one thread each are faster together than one after the other with two threads. The steps of
small models are short, and within a step the threads of a training often wait for each other, in busy loops. Another
busy process on the machine then makes them four times slower, whereas single threads just share the cores with it.
"""
import multiprocessing
import os
import signal
import sys
import threading
from contextlib import suppress

from common.errors import STOPPED

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def groups(rows):
    """Divide rows into lists that can be trained in parallel, the longest first.

    Rows with the same first line stay together, so that it is trained once; so do rows with the same key.
    """
    found = []
    for row in rows:
        for group in found:
            if any(row.key == other.key or row.lines[0] == other.lines[0] for other in group):
                group.append(row)
                break
        else:
            found.append([row])
    return sorted(found, key=lambda group: -sum(len(row.lines) for row in group))


def run_at_once(tasks, limit):
    """Run tasks in new processes, at most `limit` at once, and return when all have ended.

    tasks: [(name, function, arguments)]. Each has its share of the cores as threads, and its output is printed line by
    line after its name. Failures are not returned: the caller repeats what failed. If a task is stopped by a signal,
    all are, and this process exits with STOPPED.
    """
    waiting, at_once = list(tasks), min(len(tasks), limit)
    threads = max(1, CORES // at_once)
    print(f"{len(waiting)} trainings, {at_once} at once with {threads} threads each (--jobs 1: one after the other)",
          flush=True)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # for the new processes: torch reads it on import
    running, ended = [], threading.Semaphore(0)
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append(start(*waiting.pop(0), ended))
            ended.acquire()
            stopped = [process for process in running if not process.is_alive()]
            running = [process for process in running if process not in stopped]
            if any(process.exitcode == STOPPED for process in stopped):
                raise SystemExit(STOPPED)
    finally:
        for process in running:
            process.terminate()  # a training then saves a checkpoint
        for process in running:
            process.join()


def start(name, function, arguments, ended):
    """Start a task and return its process. A thread prints its output, then releases the semaphore `ended`."""
    here, there = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=call, args=(there, function, arguments), name=name)
    process.start()
    there.close()

    def pass_on():
        with suppress(BrokenPipeError), os.fdopen(os.dup(here.fileno()), encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.strip():
                    print(f"[{name}] {line.rstrip()}", flush=True)
            process.join()
            if process.exitcode == -signal.SIGKILL:
                print(f"[{name}] was killed, most likely for want of memory: pass a smaller --jobs", flush=True)
        here.close()
        process.join()
        ended.release()
    threading.Thread(target=pass_on, daemon=True).start()
    return process


def call(pipe, function, arguments):
    """Call the function, in the new process, with stdout and stderr sent through the pipe to the process before."""
    for number in (1, 2):
        os.dup2(pipe.fileno(), number)
    sys.stdout = sys.stderr = open(1, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
    function(*arguments)
