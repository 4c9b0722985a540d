"""appendix/claims.py: intervals against analytic cases and simulation, verdicts, the runs behind the claims."""
import json
import math

import numpy as np
import pytest

from appendix import claim_runs, claims, evidence
from appendix.evidence import CONTRARY, OPEN, SEEN, Measured
from common import tables
from sec3_benchmark import table3_pretraining_data
from sec4_analysis import fig2_leading_blocks, fig4_leading_blocks_small_data
from sec5_distill import fig7_distilled_layer, table5_distillation

EVERY = {claim.key: claim for claim in claims.CLAIMS}


def measured(errors=(), **top1):
    return Measured({("top1", run): value for run, value in top1.items()},
                    {("top1", run): error for run, error in dict(errors).items()})


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


def test_the_number_of_images_counts_where_it_says_less_than_the_seeds():
    """Two accuracies of 50 % on 100 images, equal in both seeds: a standard error of 5 each."""
    errors = {("mae"): 5.0, "scratch": 5.0}
    effect = evidence.estimate(difference, [measured(errors, mae=50, scratch=50)] * 2)
    assert effect.by_seeds == 0 and effect.high == pytest.approx(1.96 * math.sqrt(50), rel=1e-6)


def test_standard_errors_are_those_of_simulated_validation_sets():
    """Of a claim that weighs its accuracies unequally, three of them."""
    rng, images = np.random.default_rng(0), 2000
    true = {"mae": 0.6, "scratch": 0.3, "mae-6": 0.5}
    drawn = {run: 100 * rng.binomial(images, p, 20000) / images for run, p in true.items()}
    effect = EVERY["C3a"].effect
    simulated = np.std([effect(measured(**{run: values[i] for run, values in drawn.items()})) for i in range(20000)])
    errors = {run: 100 * math.sqrt(p * (1 - p) / images) for run, p in true.items()}
    means = {run: 100 * p for run, p in true.items()}
    assert measured(errors, **means).standard_error(effect) == pytest.approx(simulated, rel=0.03)


def effect_of(low, high):
    return evidence.Effect([low, high], (low + high) / 2, low, high, 0, 0)


@pytest.mark.parametrize(("low", "high", "more", "expected"), [
    (0.1, 3, {}, SEEN), (-0.1, 3, {}, OPEN), (-3, -0.1, {}, CONTRARY),
    (0.5, 3, {"beyond": 1.0}, OPEN), (1.1, 3, {"beyond": 1.0}, SEEN), (-1, 0.9, {"beyond": 1.0}, CONTRARY),
    (-0.9, 0.9, {"within": 1.0}, SEEN), (-1.1, 0.5, {"within": 1.0}, OPEN), (1.2, 4, {"within": 1.0}, CONTRARY),
    (-4, -1.2, {"within": 1.0}, CONTRARY)])
def test_verdicts(low, high, more, expected):
    assert evidence.verdict(effect_of(low, high), **more) == expected


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
    found = claim_runs.numbers("MAE", similarity, amplitudes, attention)
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
            (fig7_distilled_layer, ["--layers", "4", "8"], tables.parse),
            (table5_distillation, ["--rows", "supervised", "mae", "mocov3", "dmae"], tables.parse)]:
        theirs = commands(module, capsys, *output, *words, parse=parse)
        assert theirs and theirs <= ours, theirs - ours


@pytest.fixture
def run(monkeypatch, tmp_path):
    """claims.main with runs of given accuracies in place of trainings."""
    def run(accuracies, *words):
        def run_rows(rows, args, demo, script):
            def result(row, seed):
                return {"top1": accuracies[row.key] + seed, "last": {"images": 10**6}, "run": f"finetune/{row.key}",
                        "checkpoint": "", "seconds": 60}
            return {row.key: [[result(row, seed)] * len(row.lines) for seed in args.seeds] for row in rows}, {}
        monkeypatch.setattr(tables, "run_rows", run_rows)
        return claims.main(tables.parse(claims.build_parser(), ["--output", str(tmp_path), *words]))
    return run


def test_from_runs_to_files(run, tmp_path):
    rows = run({"top1-mae": 40, "top1-scratch": 30}, "--claims", "C1", "--seeds", "0", "1", "2")
    assert rows[0]["verdict"] == SEEN and rows[0]["effect"]["mean"] == 10
    assert rows[0]["measured"][2] == {"top1: mae": 42, "top1: scratch": 32}
    written = json.loads((tmp_path / "claims" / "claims.json").read_text())
    assert written["rows"] == rows and (tmp_path / "claims" / "claims.png").stat().st_size > 10_000
    assert [about["seed"] for about in written["runs"]] == [0, 1, 2] * 2
    assert "+10.0 (+9.9 to +10.1) points" in (tmp_path / "claims" / "claims.md").read_text()


def test_a_contrary_claim_stands_as_that(run):
    [row] = run({"top1-mae": 20, "top1-scratch": 30}, "--claims", "C1", "--seeds", "0", "1")
    assert row["verdict"] == CONTRARY


def test_a_single_seed_is_said_to_decide_nothing(run, tmp_path):
    [row] = run({"top1-mae": 90, "top1-scratch": 10}, "--claims", "C1")
    assert row["verdict"] == OPEN and "(one seed)" in (tmp_path / "claims" / "claims.md").read_text()
