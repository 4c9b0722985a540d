"""common/tables.py: which stages run, in which order, with which settings, and what is refused before any of them."""
import json
import shlex
import sys
from types import ModuleType

import pytest

from common import options, report, scripts, tables
from common.errors import UserError
from common.pretrained import HubError
from common.rows import Row, remedy
from sec3_benchmark.accuracy_table import accuracy_table


@pytest.fixture
def ran(monkeypatch):
    """Make two scripts, toys/before.py and toys/after.py, that only record their calls; return the list of calls."""
    calls = []

    def toy(name, reads, **arguments):
        def build_parser():
            parser = options.make_parser(name)
            options.add_data(parser)
            for argument, default in arguments.items():
                parser.add_argument("--" + argument.replace("_", "-"), type=type(default) if default else str,
                                    default=default)
            parser.add_argument("--seed", type=int, default=0)
            options.add_execution(parser)
            return parser

        def main(args):
            calls.append((name, args))
            return {"checkpoint": f"{name}-{args.seed}.pt", "top1": 50.0 + args.seed, "seconds": 7200}

        module = ModuleType(f"toys.{name}")
        module.build_parser, module.main, module.PRESETS = build_parser, main, {"demo": {"data": "fractals"}}
        module.READS = reads
        monkeypatch.setitem(sys.modules, f"toys.{name}", module)

    toy("before", "images", epochs=4, warmup_epochs=1, teacher=None)
    toy("after", "labels", epochs=3, init=None, rate=0.5)
    return calls


ROWS = [Row("plain", "from nothing", 1.0, ["toys/after.py"]),
        Row("one", "one", 2.0, ["toys/before.py --epochs 5", "toys/after.py --init {previous}"]),
        Row("two", "two", None, ["toys/before.py --epochs 5", "toys/after.py --init {previous} --rate 0.1"]),
        Row("big", "only for the paper", 3.0, ["toys/after.py"], presets=("paper",)),
        Row("later", "nobody built it", 4.0)]
DEMO = ("plain", "one")


def run(*argv):
    parser = options.make_parser("a table")
    options.add_data(parser)
    tables.add_rows(parser, ROWS, DEMO)
    options.add_execution(parser)
    args = tables.parse(parser, argv)
    return tables.run_rows(ROWS, args, DEMO, "table")[0]


def test_stages_run_in_order_and_hand_on_their_weights(ran):
    results = run()
    assert [(name, args.epochs) for name, args in ran] == [("after", 3), ("before", 5), ("after", 3)]
    assert [args.init for name, args in ran if name == "after"] == [None, "before-0.pt"]
    assert {key: [len(stages) for stages in seeds] for key, seeds in results.items()} == {"plain": [1], "one": [2]}


def test_a_stage_that_rows_share_runs_once_for_each_seed(ran):
    results = run("--rows", "one", "two", "--seeds", "0", "3")
    assert [(name, args.seed) for name, args in ran].count(("before", 0)) == 1
    assert [name for name, _ in ran].count("before") == 2 and [name for name, _ in ran].count("after") == 4
    assert [stages[-1]["top1"] for stages in results["two"]] == [50.0, 53.0]
    assert [args.init for name, args in ran if name == "after"] == ["before-0.pt", "before-3.pt"] * 2


def test_a_stage_may_have_a_seed_of_its_own(ran):
    run("--rows", "one", "--seeds", "1", "2", "--set", "before.seed=7")
    assert [(name, args.seed) for name, args in ran] == [("before", 7), ("after", 1), ("after", 2)]


def test_the_command_line_beats_rows_and_set_reaches_one_stage(ran):
    run("--rows", "two", "--img-size", "48", "--set", "after.rate=0.25", "--set", "before.epochs=9")  # both count
    (_, before), (_, after) = ran
    assert (before.epochs, after.epochs, after.rate) == (9, 3, 0.25)
    assert before.img_size == after.img_size == [48] and before.data == "fractals" and before.preset == "demo"


def test_a_row_whose_own_setting_is_changed_says_so(ran, tmp_path, capsys, monkeypatch):
    """Otherwise the name "5 epochs" and its published number would stand beside a run of 9 epochs."""
    args = tables.parse(tables.make_parser("a table", ROWS, DEMO), ["--output", str(tmp_path), "--rows", "plain",
                                                                    "one", "--set", "before.epochs=9"])
    for name in ("before", "after"):
        monkeypatch.setattr(sys.modules[f"toys.{name}"], "main", lambda args: {
            "checkpoint": "a.pt", "run": "a", "top1": 50.0, "best_top1": 51.0, "seconds": 1})
    names = [row["name"] for row in accuracy_table("table8", ROWS[:2], DEMO, args)]
    assert names == ["from nothing", "one [--epochs 9]"]
    assert "one: --epochs 9 by the command line" in capsys.readouterr().out
    args = options.replaced(args, rows=["two"], set=["after.rate=0"])
    assert accuracy_table("table8", ROWS[2:3], DEMO, args)[0]["name"] == "two [--rate off]"


def test_data_that_were_not_given_are_missed_before_the_first_stage(ran):
    """With --preset paper the data are ImageNet, which needs a path."""
    with pytest.raises(UserError, match="--data imagenet needs --data-path"):
        run("--preset", "paper", "--rows", "plain", "one")
    assert ran == []


def test_all_leaves_out_what_cannot_run_and_asking_for_it_is_an_error(ran):
    assert set(run("--rows", "all")) == {"plain", "one", "two"}
    for key, why in (("later", "nobody built it has nothing to run"), ("big", "needs --preset paper")):
        with pytest.raises(UserError, match=why):
            run("--rows", key)


def test_a_dry_run_misses_a_path_that_no_command_would_have(ran):
    with pytest.raises(UserError, match="--data imagenet needs --data-path"):
        run("--preset", "paper", "--rows", "one", "--dry-run")
    run("--preset", "paper", "--rows", "one", "--dry-run", "--data-path", "not/here")
    assert ran == []


@pytest.mark.parametrize(("argv", "error", "message"), [
    (["--set", "between.rate=1"], UserError, "no script of this table: between; its scripts are after, before"),
    (["--set", "after.rat=1"], SystemExit, "2"),
    (["--rows", "plain", "one", "--set", "before.warmup-epochs=5"], UserError, "--warmup-epochs 5 leaves nothing"),
    (["--data-path", "/nowhere", "--data", "folder", "--rows", "one"], UserError, "/nowhere/train is not a folder"),
    (["--rows", "one", "plain", "--set", "after.init=typo.pt"], UserError, "from nothing: no weights at typo.pt"),
    (["--rows", "one", "--set", "after.init=any.pt"], UserError, "one starts from .*after.init has no place"),
    (["--rows", "all", "--dry-run", "--set", "after.init=any.pt"], UserError, "after.init has no place"),
    (["--rows", "plain", "two", "--set", "before.teacher=typo.pt"], UserError, "no weights at typo.pt"),
    (["--save-to", "x.pt"], SystemExit, "2"), (["--set", "rate"], SystemExit, "2"),
    (["--seeds", "0", "1", "0"], UserError, "--seeds 0 1 0: two are equal")])
def test_what_is_wrong_is_said_before_the_first_stage(ran, argv, error, message):
    with pytest.raises(error, match=message):
        run(*argv)
    assert ran == []


def test_one_seed_is_not_counted_as_several(ran):
    with pytest.raises(UserError, match="--seeds 0 1: .*--set has the last script.s"):
        run("--rows", "one", "--seeds", "0", "1", "--set", "after.seed=3")
    assert ran == []


def test_weights_out_of_reach_cost_one_row_and_the_table_says_how_to_get_them(ran, monkeypatch, tmp_path, capsys):
    def main(args):
        if args.init:
            raise HubError("timm cannot load timm:x. Give the folder", "timm:x")
        return {"checkpoint": "a.pt", "run": "a", "top1": 50.0, "best_top1": 51.0, "seconds": 1}
    monkeypatch.setattr(sys.modules["toys.after"], "main", main)
    rows = [Row("hub", "from the hub", 5.0, ["toys/after.py --init timm:x --rate 0.25"]), ROWS[0]]
    args = tables.parse(tables.make_parser("a table", rows, ()), ["--rows", "all", "--output", str(tmp_path),
                                                                   "--seeds", "0", "1"])
    hub, plain = accuracy_table("table8", rows, (), args)
    assert hub["measured"] == [] and plain["measured"] == [50.0, 50.0]
    text = (tmp_path / "table8" / "table8.md").read_text()
    assert "from the hub (5.0: needs weights: timm cannot load timm:x. Give the folder, in place of its name: " in text
    assert "`python toys/after.py --init timm:x --rate 0.25 " in text


def test_a_teacher_out_of_reach_is_given_to_the_table(tmp_path):
    args = tables.parse(tables.make_parser("a table", ROWS, ()), ["--data-path", str(tmp_path)])
    row = Row("dmae", "D-MAE", None, ["sec5_distill/pretrain_dmae.py", "sec3_benchmark/finetune.py"])
    assert remedy(row, "timm:vit_base_patch16_224.mae", args, 0) == "here as --set pretrain_dmae.teacher=FOLDER"


def test_a_dry_run_prints_commands_that_give_the_same_settings(ran, capsys):
    run("--rows", "two", "--seeds", "2", "--dry-run", "--set", "after.rate=0.3")
    assert ran == []
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("python")]
    paths, settings = zip(*[(line.split()[1], shlex.split(line)[2:]) for line in lines])
    assert paths == ("toys/before.py", "toys/after.py")
    assert "# before.py: as above" not in printed
    run("--rows", "one", "two", "--dry-run")
    assert "# row 2 of 2: two, seed 0\n# before.py: as above, in row one\n" in capsys.readouterr().out
    before, after = (scripts.settings_of(script, words) for script, words in zip(paths, settings))
    assert (before.epochs, before.seed, after.rate, after.seed) == (5, 2, 0.3, 2)
    assert before.save_to == after.init  # each command finds the weights of the one before


def test_a_dry_run_saves_the_weights_that_any_later_row_starts_from(ran, capsys, tmp_path):
    """Also if the line that writes them is the last of its own row."""
    rows = [Row("alone", "alone", None, ["toys/after.py"]),
            Row("onward", "onward", None, ["toys/after.py", "toys/after.py --init {previous} --rate 0.1"])]
    args = tables.parse(tables.make_parser("a table", rows, ()), ["--dry-run", "--rows", "all", "--seeds", "0", "1",
                                                                   "--output", str(tmp_path)])
    tables.run_rows(rows, args, (), "table")
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if line.startswith("python")]
    saved = [line[line.index("--save-to") + 1] for line in lines if "--save-to" in line]
    assert len(lines) == 4 and len(set(saved)) == 2
    assert [line[line.index("--init") + 1] for line in lines if "--init" in line] == saved


def test_rows_that_were_not_run_stand_below_the_table(tmp_path, capsys):
    args = options.argparse.Namespace(preset="demo", data="fractals", output=tmp_path)
    rows = [{"name": "a", "published": 78.0, "status": "run", "measured": [1.0, 2.0]},
            {"name": "b", "published": None, "status": "not chosen", "measured": []}]
    report.write_table("table9", args, {"row": lambda row: row["name"],
                                        "measured": lambda row: report.mean_std(row["measured"])}, rows)
    path = tmp_path / "table9" / "table9.json"
    assert len(json.loads(path.read_text())["rows"]) == 2
    text = path.with_suffix(".md").read_text()
    assert "| a   | 1.5 ± 0.7 |" in text and "| b" not in text
    assert "Not measured here (published: why): b (-: not chosen)" in text
