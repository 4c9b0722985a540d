"""Rows of a table at the same time, each in a process of its own.

On a CPU two trainings with one thread each are faster than one after the other with two: the steps of small models are
short, and in each of them threads wait for each other many times, busily. So one busy neighbour slows them down four
times, where single threads just share the cores.
"""
import json
import os
import subprocess
import sys
import threading
from collections import Counter

from common.distributed import print0
from common.watch import STOPPED


def groups(rows):
    """Keys of rows in lists: those that begin with the same stage stay together, and train it once. The longest, which
    have most stages, come first, so that none of them is left for the end.
    """
    found = []  # [keys, first stages]
    for row in rows:
        first = json.dumps(row.stages[0], sort_keys=True, default=str)
        same = [group for group in found if row.key in group[0] or len(row.stages) > 1 and first in group[1]]
        home = same[0] if same else ([], set())
        if not same:
            found.append(home)
        home[0].append(row.key)
        home[1].add(first)
    stages = Counter()
    for row in rows:
        stages[row.key] += len(row.stages)
    found.sort(key=lambda group: -sum(stages[key] for key in dict.fromkeys(group[0])))
    return [list(dict.fromkeys(keys)) for keys, _ in found]


def run_ahead(rows, args):
    """Train the rows, for every seed, in processes of this script, so that the table then finds them finished; returns
    when all have ended. What fails in one is met again, and said, by the table itself.
    """
    waiting = [["--rows", *keys, "--seeds", str(seed)] for seed in args.seeds for keys in groups(rows)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    at_once = min(len(waiting), cores if args.jobs is None else args.jobs)
    if at_once < 2:
        return
    threads = str(max(1, cores // at_once))
    print0(f"{len(waiting)} trainings, {at_once} at once with {threads} threads each (--jobs 1: one after the other)")
    environment = {"OMP_NUM_THREADS": threads, **os.environ, "PYTHONUNBUFFERED": "1"}
    workers = [] if "--workers" in args.words else ["--workers", "0"]
    running, ended = [], threading.Semaphore(0)
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                words = waiting.pop(0)
                running.append(start([*args.words, *words, "--jobs", "0", *workers], words[1], environment, ended))
            ended.acquire()
            stopped = [process for process in running if process.poll() is not None]
            running = [process for process in running if process not in stopped]
            if any(process.returncode == STOPPED for process in stopped):
                raise SystemExit(STOPPED)
    finally:
        for process in running:
            process.terminate()  # it saves
        for process in running:
            process.wait()


def start(words, name, environment, ended):
    """A process of this script whose lines are printed with the row's name before them; `ended` hears of its end."""
    process = subprocess.Popen([sys.executable, sys.argv[0], *words], env=environment, text=True, errors="replace",
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def pass_on():
        for line in process.stdout:
            if line.strip():
                print0(f"[{name}] {line.rstrip()}")
        process.wait()
        ended.release()
    threading.Thread(target=pass_on, daemon=True).start()
    return process
