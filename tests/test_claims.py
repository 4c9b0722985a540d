"""appendix/claims.py: intervals against analytic cases and simulation, verdicts, the runs behind the claims."""
import json
import math

import numpy as np
import pytest

from appendix import answers, claim_runs, claims, evidence
from appendix.evidence import CONTRARY, OPEN, SEEN, Measured
from appendix.paper_claims import CLAIMS
from common import data, scripts, tables
from common.errors import UserError
from sec3_benchmark import table3_pretraining_data
from sec4_analysis import fig2_leading_blocks, fig4_leading_blocks_small_data
from sec5_distill import fig7_distilled_layer, table5_distillation

EVERY = {claim.key: claim for claim in CLAIMS}


def measured(**top1):
    return Measured({("top1", run): value for run, value in top1.items()})


def answered(**right):
    """A seed in which runs answered these images right."""
    return Measured({("top1", run): 100 * np.mean(answers) for run, answers in right.items()},
                    {("top1", run): {"all": np.array(answers, bool)} for run, answers in right.items()})


def difference(m):
    return m.top1("mae") - m.top1("scratch")


def test_quantiles_of_t_are_those_of_the_closed_forms():
    p = 0.95  # of 2 p - 1, the two-sided level
    assert evidence.T[0] == pytest.approx(math.tan(math.pi * p / 2), abs=1e-3)
    assert evidence.T[1] == pytest.approx(p * math.sqrt(2 / (1 - p * p)), abs=1e-3)
    q = math.cos(math.acos(math.sqrt(1 - p * p)) / 3) / math.sqrt(1 - p * p)
    assert evidence.T[3] == pytest.approx(2 * math.sqrt(q - 1), abs=1e-3)


def test_the_interval_over_seeds_is_paired():
    """Seeds move both sides by 10 points; their difference is 1, 2, 3."""
    effect = evidence.estimate(difference, [measured(mae=11, scratch=10), measured(mae=22, scratch=20),
                                            measured(mae=33, scratch=30)])
    assert effect.values == [1, 2, 3] and effect.mean == 2
    assert effect.high - effect.mean == pytest.approx(4.303 / math.sqrt(3)) == effect.mean - effect.low


def test_two_runs_errors_are_those_of_mcnemar():
    """Of 100 images 30 are answered right by both, 20 by one alone, 10 by the other alone."""
    mae, scratch = [1] * 30 + [1] * 20 + [0] * 10 + [0] * 40, [1] * 30 + [0] * 20 + [1] * 10 + [0] * 40
    effect = evidence.estimate(difference, [answered(mae=mae, scratch=scratch)] * 2)
    variance = (20 + 10 - (20 - 10) ** 2 / 100) / 100 / 99  # of the mean of +1, -1 and 0
    assert effect.mean == pytest.approx(10) and effect.by_seeds == 0
    assert effect.high - effect.mean == pytest.approx(1.96 * 100 * math.sqrt(variance)) == effect.by_images


def test_what_two_runs_fail_on_alike_does_not_count():
    right = np.arange(100) < 50
    assert evidence.estimate(difference, [answered(mae=right, scratch=right)]).by_images == 0


def drawn(rng, images):
    """Answers of three runs of two seeds to new images: each image has a difficulty that all share."""
    difficulty = rng.normal(size=images)
    return [answered(**{run: rng.normal(size=images) + level > difficulty
                        for run, level in (("mae", 0.5), ("scratch", -0.5), ("mae-6", 0.3))}) for _ in range(2)]


def test_standard_errors_are_those_of_simulated_validation_sets():
    """Of a claim that weighs its three accuracies unequally, averaged over two seeds."""
    rng, effect = np.random.default_rng(0), EVERY["C3a"].effect
    repeated = [drawn(rng, 300) for _ in range(2000)]
    simulated = np.std([np.mean([effect(measured) for measured in seeds]) for seeds in repeated])
    estimated = np.mean([evidence.images_error(effect, seeds) for seeds in repeated[:50]])
    assert estimated == pytest.approx(simulated, rel=0.05)


def test_small_sets_count_alike_however_many_images_they_have():
    large, small = np.arange(1000) < 500, np.arange(10) < 5
    seed = Measured({("small", "mae"): 50.0}, {("small", "mae"): {"large": large, "small": small}})
    error = 100 * math.sqrt(0.25 / 999 + 0.25 / 9) / 2
    assert evidence.images_error(lambda m: m.small("mae"), [seed]) == pytest.approx(error, rel=1e-6)


@pytest.mark.parametrize("kind", ["finetune", "transfer"])
def test_answers_are_those_that_the_run_counted(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "FRACTAL_TRAIN", 20)
    monkeypatch.setattr(data, "FRACTAL_VAL", 20)
    words = ["--epochs", "1", "--output", str(tmp_path), "--workers", "0", "--warmup-epochs", "0"]
    words += ["--dataset", "fractals-small"] if kind == "transfer" else []
    result = scripts.run(f"sec3_benchmark/{kind}.py", words)
    args = tables.parse(claims.build_parser(), words[2:6])
    right = answers.of_run(result, args)
    assert set(right) <= {0, 1} and len(right) == result["last"]["images"]
    assert 100 * right.mean() == pytest.approx(result["top1"]) and 0 < right.sum() < len(right)
    monkeypatch.setattr(answers, "evaluate", None)  # the second time they are read
    assert (answers.of_run(result, args) == right).all()
    with pytest.raises(UserError, match="other images"):
        answers.of_run({**result, "top1": result["top1"] + 1}, args)


def effect_of(low, high):
    return evidence.Effect([low, high], (low + high) / 2, low, high, 0, 0)


@pytest.mark.parametrize(("low", "high", "more", "expected"), [
    (0.1, 3, {}, SEEN), (-0.1, 3, {}, OPEN), (-3, -0.1, {}, CONTRARY),
    (-0.9, 0.9, {"within": 1.0}, SEEN), (-1.1, 0.5, {"within": 1.0}, OPEN), (1.2, 4, {"within": 1.0}, CONTRARY),
    (-4, -1.2, {"within": 1.0}, CONTRARY)])
def test_verdicts(low, high, more, expected):
    assert evidence.verdict(effect_of(low, high), **more) == expected


@pytest.mark.parametrize(("intervals", "expected", "decisive"), [
    ([(1, 3), (0.1, 9)], SEEN, 1), ([(1, 3), (-0.1, 9)], OPEN, 1), ([(-3, -1), (-9, 9)], CONTRARY, 0),
    ([(1, 3), (-3, -1)], CONTRARY, 1)])
def test_a_claim_of_two_effects_holds_if_both_do(intervals, expected, decisive):
    effects = [effect_of(*interval) for interval in intervals]
    assert evidence.decide(effects) == (expected, effects[decisive])


def test_where_two_effects_are_nil_contrary_is_no_more_frequent_than_two_tests_make_it():
    """Unlike the smaller effect of every seed, which is negative on average."""
    rng = np.random.default_rng(0)
    verdicts = []
    for values in rng.normal(size=(2000, 3, 2)):
        seeds = [Measured({("a", "x"): a, ("b", "x"): b}) for a, b in values]
        effects = [evidence.estimate(lambda m, kind=kind: m.get(kind, "x"), seeds) for kind in "ab"]
        verdicts.append(evidence.decide(effects)[0])
    assert verdicts.count(CONTRARY) / 2000 == pytest.approx(1 - 0.975 ** 2, abs=0.012)
    assert verdicts.count(SEEN) / 2000 < 0.005


def test_an_effect_on_each_small_set_averages_to_the_effect():
    right = {run: {"A": np.arange(10) < count, "B": np.arange(20) < count} for run, count in (("mae", 4), ("dmae", 6))}
    seed = Measured({("small", "mae"): 30.0, ("small", "dmae"): 45.0, ("top1", "mae"): 7.0},
                    {("small", run): sets for run, sets in right.items()})
    assert evidence.by_set(lambda m: m.small("dmae") - m.small("mae"), [seed, seed]) == {
        "A": [pytest.approx(20)] * 2, "B": [pytest.approx(10)] * 2}
    assert evidence.by_set(lambda m: m.top1("mae"), [seed]) == {}


def test_one_seed_gives_no_verdict():
    effect = evidence.estimate(difference, [measured(mae=90, scratch=10)])
    assert effect.low is None and evidence.verdict(effect) == OPEN


def test_a_number_that_is_not_finite_is_no_effect():
    with pytest.raises(FloatingPointError, match="not finite"):
        evidence.estimate(difference, [measured(mae=math.nan, scratch=10)])


def test_a_models_numbers_by_hand():
    """Similarity i / 12 in layer i; distances 1 in low layers and 3 in high ones, heads apart by 0.5 in the low ones;
    uniform attention has 4 and ln 36."""
    similarity = np.diag(np.arange(13) / 12)
    amplitudes = np.zeros((2, 13, 3))
    amplitudes[0, :, -1] = [-1.0, -1.5] + [-2.0] * 11
    attention = np.empty((2, 12, 3))
    attention[0, :, :2], attention[0, :, 2] = [[0.5, 1.5]] * 4 + [[2, 2]] * 4 + [[3, 3]] * 4, 4
    attention[1, :, :2], attention[1, :, 2] = math.log(18), math.log(36)
    found = claim_runs.numbers("MAE", similarity, amplitudes, attention, amplitudes - 1)
    assert found["high frequencies embedding without positions", "MAE"] == -2
    assert found["cka low", "MAE"] == pytest.approx(2.5 / 12) and found["cka high", "MAE"] == pytest.approx(10.5 / 12)
    assert found["high frequencies embedding", "MAE"] == -1 and found["high frequencies block 1", "MAE"] == -1.5
    assert (found["distance low", "MAE"], found["distance high", "MAE"]) == (0.25, 0.75)
    assert (found["diversity low", "MAE"], found["diversity high", "MAE"]) == (0.125, 0)
    assert found["entropy low", "MAE"] == pytest.approx(math.log(18) / math.log(36))


def commands(module, capsys, *words, parse=tables.parse):
    """The stages of a dry run, without where their weights go."""
    module.main(parse(module.build_parser(), ["--dry-run", *words]))
    lines = [line.split(" --save-to ")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("python")]
    return {" ".join(sorted(word for word in line.split(" --") if not word.startswith("init "))) for line in lines}


def test_the_runs_are_those_of_tables_and_figures(capsys, tmp_path):
    output = ["--output", str(tmp_path)]
    ours = commands(claims, capsys, *output)
    for module, words, parse in [
            (table3_pretraining_data, ["--rows", "mae-10", "mocov3-10"], tables.parse),
            (fig2_leading_blocks, ["--blocks", "0", "6", "12"], fig2_leading_blocks.leading_blocks.parse),
            (fig4_leading_blocks_small_data, ["--blocks", "6", "12"], fig2_leading_blocks.leading_blocks.parse),
            (fig7_distilled_layer, ["--layers", "4", "8", "all"], tables.parse),
            (table5_distillation, ["--rows", "supervised", "mae", "mocov3", "dmae"], tables.parse)]:
        theirs = commands(module, capsys, *output, *words, parse=parse)
        assert theirs and theirs <= ours, theirs - ours


@pytest.fixture
def run(monkeypatch, tmp_path):
    """claims.main with runs of given accuracies in place of trainings."""
    def run(accuracies, *words):
        def run_rows(rows, args, demo, script):
            def result(row, seed):
                return {"top1": accuracies[row.key] + seed, "run": f"finetune/{row.key}", "checkpoint": "",
                        "seconds": 60}
            return {row.key: [[result(row, seed)] * len(row.lines) for seed in args.seeds] for row in rows}, {}
        monkeypatch.setattr(tables, "run_rows", run_rows)
        monkeypatch.setattr(answers, "of_run", lambda result, args: np.arange(10**4) < 100 * result["top1"])
        return claims.main(tables.parse(claims.build_parser(), ["--output", str(tmp_path), *words]))
    return run


def test_from_runs_to_files(run, tmp_path):
    rows = run({"top1-mae": 40, "top1-scratch": 30}, "--claims", "C1", "--seeds", "0", "1", "2")
    assert rows[0]["verdict"] == SEEN and rows[0]["effect"]["mean"] == 10
    assert rows[0]["measured"][2] == {"top1: mae": 42, "top1: scratch": 32}
    written = json.loads((tmp_path / "claims" / "claims.json").read_text())
    assert written["rows"] == rows and (tmp_path / "claims" / "claims.png").stat().st_size > 10_000
    assert [about["seed"] for about in written["runs"]] == [0, 1, 2] * 2
    assert "+10.0 (+9.4 to +10.6) points" in (tmp_path / "claims" / "claims.md").read_text()


def test_a_contrary_claim_stands_as_that(run):
    [row] = run({"top1-mae": 20, "top1-scratch": 30}, "--claims", "C1", "--seeds", "0", "1")
    assert row["verdict"] == CONTRARY


def test_a_single_seed_is_said_to_decide_nothing(run, tmp_path):
    [row] = run({"top1-mae": 90, "top1-scratch": 10}, "--claims", "C1")
    assert row["verdict"] == OPEN and "(one seed)" in (tmp_path / "claims" / "claims.md").read_text()
