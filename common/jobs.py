"""Trainings at the same time, each in a process of its own.

On a CPU two trainings with one thread each are faster than one after the other with two: the steps of small models are
short, and in each of them threads wait for each other many times, busily. So one busy neighbour slows them down four
times, where single threads just share the cores.
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
    """Rows of a table in lists: those that begin with the same line stay together, and train it once. The longest,
    which have most lines, come first, so that none of them is left for the end.
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
    """Call the functions of `tasks`, a list of (name, function, arguments), each in a new process, at most `limit` at
    the same time; return when all have ended. Cores are shared out as threads; lines are printed with the name before
    them. What fails in one is for the caller to meet again. One that was stopped by a signal stops all.
    """
    waiting, at_once = list(tasks), min(len(tasks), limit)
    threads = max(1, CORES // at_once)
    print(f"{len(waiting)} trainings, {at_once} at once with {threads} threads each (--jobs 1: one after the other)",
          flush=True)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # read when a process imports torch; this one has
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
            process.terminate()  # it saves
        for process in running:
            process.join()


def start(name, function, arguments, ended):
    """The process of one task; `ended` hears of its end."""
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
    """In the new process: what it prints goes to the one that started it."""
    for number in (1, 2):
        os.dup2(pipe.fileno(), number)
    sys.stdout = sys.stderr = open(1, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
    function(*arguments)
