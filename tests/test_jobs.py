"""common/jobs.py: tasks at once in processes, rows each once, and a stop that reaches all of them."""
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from common import jobs
from common.options import ROOT
from common.rows import Row
from sec3_benchmark import table1_pretraining_methods as table1
from tests.task import task


@pytest.fixture(autouse=True)
def threads_unset(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "")  # so that it is restored
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(jobs, "CORES", 4)


def test_rows_that_begin_alike_stay_together():
    both = [Row("a", "", None, ["pretrain.py", "tune.py --init {previous}"]),
            Row("b", "", None, ["tune.py"]),
            Row("c", "", None, ["pretrain.py", "tune.py --init {previous} --epochs 3"]),
            Row("a", "", None, ["pretrain.py", "tune.py --init {previous} --epochs 9"], column="other")]
    a, b, c, other = both
    assert jobs.groups(both) == [[a, c, other], [b]]
    every = [row.key for group in jobs.groups([row for row in table1.ROWS if row.lines]) for row in group]
    assert sorted(every) == sorted(row.key for row in table1.ROWS if row.lines)


def test_tasks_run_at_once_each_with_its_share_of_the_cores(tmp_path, capsys):
    jobs.run_at_once([(name, task, (tmp_path, name, 4.0)) for name in "abcd"], 4)
    done = [json.loads(file.read_text()) for file in tmp_path.glob("*.json")]
    assert len(done) == 4 and max(one["began"] for one in done) < min(one["ended"] for one in done)
    assert {one["threads"] for one in done} == {"1"}
    out = capsys.readouterr().out
    assert "[a] training a" in out and "4 trainings, 4 at once with 1 threads each" in out


def test_no_more_than_asked_for_run_at_once(tmp_path):
    jobs.run_at_once([(name, task, (tmp_path, name)) for name in "abc"], 2)
    a, b, c = (json.loads((tmp_path / f"{key}.json").read_text()) for key in "abc")
    assert a["threads"] == "2" and c["began"] >= min(a["ended"], b["ended"])


def test_a_task_that_fails_is_left_to_the_caller(tmp_path):
    jobs.run_at_once([("fails", task, (tmp_path, "fails", 0.1, 1)), ("a", task, (tmp_path, "a"))], 2)
    assert (tmp_path / "a.json").exists()


def test_a_stopped_training_stops_all_and_each_saves(tmp_path):
    with pytest.raises(SystemExit) as stopped:
        jobs.run_at_once([("waits", task, (tmp_path, "waits", 60)), ("stops", task, (tmp_path, "stops", 5.0, 75))], 2)
    assert stopped.value.code == 75 and (tmp_path / "waits.saved").exists()


def test_a_signal_to_the_table_reaches_its_trainings(tmp_path):
    def interrupt():
        while len(list(tmp_path.glob("*.began"))) < 2:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        jobs.run_at_once([(name, task, (tmp_path, name, 60)) for name in ("waits", "waits2")], 2)
        time.sleep(5)
    assert (tmp_path / "waits.saved").exists() and (tmp_path / "waits2.saved").exists()


@pytest.mark.parametrize(("script", "stages"), [
    ("sec4_analysis/fig1_layer_similarity.py", "finetune pretrain_mae pretrain_mocov3"),
    ("sec3_benchmark/table1_pretraining_methods.py", "finetune pretrain_mae")])
def test_tables_and_figures_start_from_the_command_line(script, stages, tmp_path):
    """No training can run with this batch size: first the parallel processes fail, then the table, with the reason."""
    done = subprocess.run([sys.executable, script, "--preset", "demo", "--output", str(tmp_path), "--set",
                           *(f"{stage}.batch_size=100000" for stage in stages.split())], cwd=ROOT, text=True,
                          capture_output=True)
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    assert "100000" in done.stderr.splitlines()[-1]
