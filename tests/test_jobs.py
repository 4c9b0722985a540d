"""common/jobs.py: rows at once in processes, each row once, and a stop that reaches all of them."""
import json
import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from common import jobs
from common.options import ROOT
from common.tables import PREVIOUS, Row
from sec3_benchmark import table1_pretraining_methods as table1

PRETRAIN, FINETUNE = "sec3_benchmark.pretrain_mae", "sec3_benchmark.finetune"

SCRIPT = '''
import json, os, signal, sys, time
from pathlib import Path
folder, words = Path(sys.argv[0]).parent, sys.argv[1:]
row, seed = (words[len(words) - words[::-1].index(flag)] for flag in ("--rows", "--seeds"))
began = time.time()
print("training", row, seed, flush=True)
signal.signal(signal.SIGTERM, lambda *_: ((folder / f"{row}-{seed}.saved").touch(), sys.exit(75)))
if row == "stops":
    time.sleep(0.5)
    sys.exit(75)
time.sleep(1.0 if row != "waits" else 60)
(folder / f"{row}-{seed}.json").write_text(json.dumps(
    {"words": words, "began": began, "ended": time.time(), "threads": os.environ["OMP_NUM_THREADS"]}))
sys.exit(1 if row == "fails" else 0)
'''


@pytest.fixture
def script(tmp_path, monkeypatch):
    (tmp_path / "table.py").write_text(SCRIPT)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "table.py")])
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(jobs.os, "sched_getaffinity", lambda process: set(range(4)), raising=False)
    return tmp_path


def rows(*keys):
    return [Row(key, key, None, ((FINETUNE, {"recipe": key}),)) for key in keys]


def arguments(**given):
    return SimpleNamespace(**{"seeds": [0], "jobs": None, "words": ["--preset", "small"], **given})


def test_rows_that_begin_alike_stay_together():
    both = [Row("a", "", None, ((PRETRAIN, {}), (FINETUNE, {"init": PREVIOUS}))),
            Row("b", "", None, ((FINETUNE, {}),)),
            Row("c", "", None, ((PRETRAIN, {}), (FINETUNE, {"init": PREVIOUS, "epochs": 3}))),
            Row("a", "", None, ((PRETRAIN, {}), (FINETUNE, {"init": PREVIOUS, "epochs": 9})), column="other")]
    assert jobs.groups(both) == [["a", "c"], ["b"]]
    every = [key for group in jobs.groups([row for row in table1.ROWS if row.stages]) for key in group]
    assert sorted(every) == sorted(row.key for row in table1.ROWS if row.stages)


def test_rows_run_at_once_each_with_its_share_of_the_cores(script, capsys):
    jobs.run_ahead(rows("a", "b"), arguments(seeds=[0, 1]))
    done = [json.loads(file.read_text()) for file in sorted(script.glob("*.json"))]
    assert [file.name for file in sorted(script.glob("*.json"))] == ["a-0.json", "a-1.json", "b-0.json", "b-1.json"]
    assert max(one["began"] for one in done) < min(one["ended"] for one in done)
    assert {one["threads"] for one in done} == {"1"}
    assert done[0]["words"] == ["--preset", "small", "--rows", "a", "--seeds", "0", "--jobs", "0", "--workers", "0"]
    out = capsys.readouterr().out
    assert "[a] training a 1" in out and "4 trainings, 4 at once with 1 threads each" in out


def test_no_more_than_asked_for_run_at_once(script):
    jobs.run_ahead(rows("a", "b", "c"), arguments(jobs=2))
    a, b, c = (json.loads((script / f"{key}-0.json").read_text()) for key in "abc")
    assert a["threads"] == "2" and c["began"] >= min(a["ended"], b["ended"])


@pytest.mark.parametrize("given", [dict(jobs=1), dict(seeds=[0], only="a")])
def test_one_training_needs_no_process(script, given):
    jobs.run_ahead(rows(*given.pop("only", "ab")), arguments(**given))
    assert not list(script.glob("*.json"))


def test_a_row_that_fails_is_left_to_the_table(script):
    jobs.run_ahead(rows("fails", "a"), arguments())
    assert (script / "a-0.json").exists()


def test_a_stopped_training_stops_all_and_each_saves(script):
    with pytest.raises(SystemExit) as stopped:
        jobs.run_ahead(rows("stops", "waits"), arguments())
    assert stopped.value.code == 75 and (script / "waits-0.saved").exists()


def test_a_signal_to_the_table_reaches_its_trainings(script):
    def interrupt():
        time.sleep(1.0)
        os.kill(os.getpid(), 2)
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        jobs.run_ahead(rows("waits", "waits2"), arguments(jobs=2))
        time.sleep(5)
    assert (script / "waits-0.saved").exists()


@pytest.mark.parametrize("script", ["sec4_analysis/fig1_layer_similarity.py",
                                    "sec3_benchmark/table1_pretraining_methods.py"])
def test_tables_and_figures_start_from_the_command_line(script, tmp_path):
    """As far as the first training that cannot run: a figure trains its rows itself, a table begins them at once."""
    done = subprocess.run([sys.executable, script, "--preset", "demo", "--output", str(tmp_path), "--set",
                           "finetune.batch_size=100000", "pretrain_mae.batch_size=100000"], cwd=ROOT, text=True,
                          capture_output=True)
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    assert "100000" in done.stderr.splitlines()[-1]
