"""appendix/tools/compare_runs.py: which reference belongs to a run, and how far the two are apart."""
import json

import pytest

from appendix.tools import compare_runs
from common import options, scripts
from common.errors import UserError
from common.runs import identity
from sec3_benchmark import detect


def make_run(folder, losses, **settings):
    """A finished run with a log of ten steps a row."""
    folder.mkdir(parents=True)
    stored = {"script": "toy", "epochs": 3, "output": str(folder), "fingerprints": {"data": "x"}, **settings}
    (folder / "settings.json").write_text(json.dumps(stored))
    rows = [{"step": 10 * i, "epoch": i, "loss": loss} for i, loss in enumerate(losses, 1)]
    rows += [{"step": 10 * len(losses), name: {"top1": 12.5}} for name in ("probe", "eval")]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "result.json").write_text(json.dumps({"environment": {"date": "today"}}))
    return folder


def run(*argv):
    return compare_runs.main(options.parse(compare_runs.build_parser(), argv=[str(word) for word in argv]))


def test_a_run_is_compared_with_the_reference_of_its_settings(tmp_path):
    losses = [2 / i for i in range(1, 101)]
    for epochs in (3, 4):
        source = make_run(tmp_path / f"first-{epochs}", losses if epochs == 3 else [1.0] * 100, epochs=epochs)
        run("--runs", source, "--write", tmp_path / f"reference_{epochs}.jsonl")
    references = [tmp_path / "reference_4.jsonl", tmp_path / "reference_3.jsonl"]
    about, *rows = compare_runs.read_lines(references[1])
    assert about["settings"] == {"epochs": 3} and about["environment"] == {"date": "today"}
    assert 20 <= len(rows) <= 32 and rows[-1] == {"step": 1000, "eval": {"top1": 12.5}} and rows[-2]["step"] == 1000
    assert all("loss" in row or "eval" in row for row in rows)  # what a probe measured is no part of a reference

    losses[68] *= 1.03  # step 690, which the thinned reference has
    again = make_run(tmp_path / "outputs" / "toy" / "again", losses)
    make_run(tmp_path / "outputs" / "toy" / "unknown", losses, epochs=9)  # no reference: left out
    result = run("--references", *references, "--output", tmp_path / "outputs")
    assert list(result) == ["toy/again"]
    steps = {row["step"] for row in rows if "loss" in row}
    assert 690 in steps and result["toy/again"]["steps"] == len(steps)
    assert result["toy/again"]["largest"] == pytest.approx(0.03) and result["toy/again"]["at"] == 690
    assert (tmp_path / "outputs" / "compare_runs" / "compare_runs.png").stat().st_size > 1000
    losses = [loss * 1.2 for loss in losses]
    (again / "log.jsonl").write_text("".join(json.dumps({"step": 10 * i, "loss": x}) + "\n"
                                             for i, x in enumerate(losses, 1)))
    with pytest.raises(UserError, match="further away than --tolerance 0.05: toy/again"):
        run("--references", *references, "--output", tmp_path / "outputs")


def test_runs_from_other_weights_are_shown_and_judged_only_where_named(tmp_path):
    """Fine-tunings from all methods have the settings of MAE's, whose curve is the reference."""
    run("--runs", make_run(tmp_path / "mae", [2.0, 1.0]), "--write", tmp_path / "reference_mae.jsonl")
    other = make_run(tmp_path / "outputs" / "toy" / "dino", [2.0, 1.9], fingerprints={"data": "x", "init": "y"})
    words = ("--references", tmp_path / "reference_mae.jsonl", "--output", tmp_path / "outputs")
    assert run(*words)["toy/dino"]["largest"] == pytest.approx(0.9)
    run("--runs", other, "--write", tmp_path / "reference_own.jsonl")  # of the same weights: taken instead
    both = (*words[:2], tmp_path / "reference_own.jsonl", *words[2:])
    assert run(*both)["toy/dino"]["largest"] == 0
    with pytest.raises(UserError, match="further away than --tolerance 0.05: toy/dino"):
        run(*words, "--runs", other)


@pytest.mark.parametrize("path", sorted(options.ROOT.glob("*/results/reference_*.jsonl")), ids=lambda path: path.stem)
def test_the_references_are_of_the_demos_of_today(path):
    """Else compare_runs.py would pass over the demo's runs in silence."""
    about = compare_runs.read_lines(path)[0]
    [script] = options.ROOT.glob(f"*/{about['script']}.py")
    today = scripts.settings_of(f"{script.parent.name}/{script.name}")
    today = detect.resolve_backbone(today, None) if script.stem == "detect" else options.resolve(today)
    apart = {*compare_runs.ABOUT, "teacher_model", "equal"}  # D-MAE's identity holds its teacher's weights
    assert identity({name: value for name, value in vars(today).items() if name not in apart}) == about["settings"]


def test_what_cannot_be_compared_says_why(tmp_path, monkeypatch):
    source = make_run(tmp_path / "a", [1.0, 0.5])
    monkeypatch.setattr(compare_runs.options, "ROOT", tmp_path)
    for words in (("--runs", source), ()):
        with pytest.raises(UserError, match=r"no reference_\*.jsonl in any results/: --write makes one"):
            run(*words, "--output", tmp_path)
    (tmp_path / "section" / "results").mkdir(parents=True)
    run("--runs", make_run(tmp_path / "b", [1.0], epochs=9), "--write",
        tmp_path / "section" / "results" / "reference_b.jsonl")
    with pytest.raises(UserError, match=r"a: none of \d+ references has its settings"):
        run("--runs", source, "--output", tmp_path)
    with pytest.raises(UserError, match="not a run's folder, as it has no settings.json and no log.jsonl: give"):
        run("--runs", tmp_path / "nope", "--output", tmp_path)
    with pytest.raises(UserError, match=r"nope is not a run's folder"):
        run("--runs", tmp_path / "nope", "--write", tmp_path / "r.jsonl")
    for content in ("", '{"step": 1}\n'):
        (tmp_path / "log.jsonl").write_text(content)
        with pytest.raises(UserError, match="log.jsonl is not a reference"):
            run("--runs", source, "--references", tmp_path / "log.jsonl", "--output", tmp_path)
    (source / "result.json").unlink()
    with pytest.raises(UserError, match="is not finished"):
        run("--runs", source, "--write", tmp_path / "r.jsonl")
    with pytest.raises(UserError, match="--write keeps one run"):
        run("--write", tmp_path / "r.jsonl")
    with pytest.raises(UserError, match="no run in .* has a reference"):
        run("--output", tmp_path)
