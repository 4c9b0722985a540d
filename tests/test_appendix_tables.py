"""Every table's rows, of all sections: they resolve in each preset that they name, and share the runs they should."""
import importlib
import shlex
from pathlib import Path

import pytest

from appendix import a1_recipes, a2_mae_settings, a3_mocov3_settings, b5_dino_simmim
from common import options, scripts
from sec3_benchmark import finetune
from sec3_benchmark import table1_pretraining_methods as table1
from sec5_distill import table5_distillation

TABLE1 = {"supervised": "scratch"}  # Table 5's name for a row -> Table 1's
ROOT = Path(__file__).resolve().parents[1]
TABLES = [f"{path.parent.name}.{path.stem}" for path in sorted(ROOT.glob("*/*.py"))
          if path.parent.name != "tests" and "\nROWS = [" in path.read_text() and "\nDEMO = (" in path.read_text()]


@pytest.mark.parametrize("name", TABLES)
def test_rows_resolve_in_every_preset_they_name(name):
    """An unknown setting, an impossible value or a stage that does not exist would stop here."""
    table = importlib.import_module(name)
    assert len({row.key for row in table.ROWS}) == len(table.ROWS)
    assert set(table.DEMO) <= {row.key for row in table.ROWS if row.lines and "demo" in row.presets}
    for row in table.ROWS:
        for preset in row.presets:
            for line in row.lines:
                script, *words = shlex.split(line)
                known = options.defaults(scripts.parser_of(script))
                places = [] if preset == "demo" else ["data_path", "dataset_path"]
                given = options.to_argv({"preset": preset, **{name: "DIR" for name in places if name in known}})
                scripts.settings_of(script, [*words, *given])


def last_of(row, **given):
    """The settings of a row's last line."""
    script, *words = shlex.split(row.lines[-1])
    return vars(scripts.settings_of(script, [*words, *options.to_argv(given)]))


def by_key(table):
    return {row.key: row for row in table.ROWS}


def test_tables_found():
    assert len(TABLES) >= 4 and "sec3_benchmark.table1_pretraining_methods" in TABLES


@pytest.mark.parametrize("start", ["scratch", "mae"])
def test_a1_leads_from_one_recipe_to_the_other_in_single_steps(start):
    rows = [row for row in a1_recipes.ROWS if row.key in {f"{start}-{key}" for key, *_ in a1_recipes.CHANGES}]
    path = [last_of(row, preset="paper", data_path="DIR") for row in rows]
    for before, after, (_, _, words) in zip(path, path[1:], a1_recipes.CHANGES[1:]):
        changed = {name: value for name, value in after.items() if value != before[name] and name != "recipe"}
        assert options.given(finetune.build_parser(), words.split()) == changed


def test_rows_that_two_tables_share_are_the_same_run():
    shared = [("scratch-impr", "scratch"), ("scratch-ori", "scratch-ori"), ("mae-impr", "mae"), ("mae-ori", "mae-ori")]
    for ours, theirs in shared:
        assert last_of(by_key(a1_recipes)[ours]) == last_of(by_key(table1)[theirs])
    assert by_key(a2_mae_settings)["base"].lines == by_key(table1)["mae"].lines
    for row in table5_distillation.ROWS:
        assert table5_distillation.table1_row(row).lines == by_key(table1)[TABLE1.get(row.key, row.key)].lines
    for row in b5_dino_simmim.ROWS:  # probes lie between; fine-tuning starts from what they hand on
        assert [row.lines[0], row.lines[-1]] == by_key(table1)[row.key].lines
    assert by_key(a3_mocov3_settings)["base"].lines == by_key(table1)["mocov3"].lines
    assert options.PRESET_NAMES == by_key(table1)["mae"].presets


@pytest.mark.parametrize("path", sorted(path for room in ("common", "sec*", "appendix")
                                        for path in ROOT.glob(f"{room}/**/*.py") if "PRESETS = {" in path.read_text()),
                         ids=lambda path: path.stem)
def test_the_laptop_preset_is_the_same_network_in_every_script(path):
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    assert ("laptop" in module.PRESETS) == ("small" in module.PRESETS)
    if hasattr(module, "main") and "model" in options.defaults(module.build_parser()):
        settings = scripts.settings_of(str(path.relative_to(ROOT)), ["--preset", "laptop"])
        resolved = options.resolve(settings) if module.__name__ != "sec3_benchmark.detect" else settings
        assert getattr(resolved, "model", "vit_demo") in ("vit_demo", "vit_demo_simmim", None)
        assert getattr(resolved, "data", "folder") == "folder"
