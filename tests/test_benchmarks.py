"""The benchmarks run, at toy sizes: what they compare is what they say, and nothing of this machine is kept."""
import json

import pytest

from appendix.tools import benchmark_cka, benchmark_distillation, benchmark_throughput, benchmarking
from common import options


def run(script, *words):
    return script.main(options.parse(script.build_parser(), argv=[*words, "--device", "cpu"]))


@pytest.fixture
def here(monkeypatch):
    """Peak memory without a process of its own."""
    monkeypatch.setattr(benchmarking, "peak_memory", lambda script, version, words, device, function: function() or 1.0)


def test_in_turns_warms_up_and_alternates():
    calls = []
    times = benchmarking.in_turns({name: lambda name=name: calls.append(name) for name in "ab"}, 3)
    assert calls == list("ab" * 4) and {name: len(own) for name, own in times.items()} == {"a": 3, "b": 3}


def test_cka_against_the_loop_and_memory_of_a_process_of_its_own(tmp_path):
    results = run(benchmark_cka, "--num-images", "8", "--batch-size", "8", "--layers", "6", "--width", "1000000",
                  "--output", str(tmp_path))
    assert all(row["seconds"] > 0 for row in results.values())
    layer = 8 * 1_000_000 * 4 / 2**30  # GiB; the loop holds both models' six layers at once, ours one at a time
    assert results["loop"]["peak_gib"] > results["ours"]["peak_gib"] + 6 * layer
    text = (tmp_path / "benchmark_cka" / "benchmark_cka.json").read_text()
    assert str(tmp_path) not in text and json.loads(text)["settings"]["layers"] == 6


def test_steps_and_loader_against_the_straightforward_ones(tmp_path, here, capsys):
    words = ("--batch-size", "4", "--img-size", "32", "--patch-size", "8", "--pairs", "1", "--precisions", "fp32")
    run(benchmark_throughput, *words, "--parts", "step", "--output", str(tmp_path))
    about = json.loads((tmp_path / "benchmark_throughput" / "benchmark.json").read_text())
    (row,) = about["steps"]
    assert row["ratio"] == pytest.approx(row["ours_images_per_second"] / row["straightforward_images_per_second"])
    assert 0 < row["flops_per_second"] and str(tmp_path) not in json.dumps(about)
    run(benchmark_throughput, *words, "--memory-of", "ours", "fp32")
    assert 0.1 < float(capsys.readouterr().out.split()[-1]) < 100  # GiB


def test_distillation_against_the_straightforward_one(tmp_path, here):
    results = run(benchmark_distillation, "--batch-size", "2", "--img-size", "32", "--turns", "1",
                  "--precisions", "fp32", "--output", str(tmp_path))
    assert list(results["fp32"]) == ["D-MAE", "MAE", "straightforward", "all"]
    assert results["fp32"]["D-MAE"]["ratio"] == 1
