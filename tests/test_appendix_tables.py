"""Every table's rows, of all sections: they resolve in each preset that they name, and share the runs they should."""
import importlib
from pathlib import Path

import pytest

from appendix import a1_recipes, a2_mae_settings, a3_mocov3_settings, b5_dino_simmim
from common import options
from common.tables import stage_settings
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
    assert set(table.DEMO) <= {row.key for row in table.ROWS if row.stages and "demo" in row.presets}
    for row in table.ROWS:
        for preset in row.presets:
            for module, settings in row.stages:
                places = {} if preset == "demo" else {"data_path": "DIR", "dataset_path": "DIR"}
                known = vars(stage_settings(module))
                given = {"preset": preset, **{name: value for name, value in places.items() if name in known}}
                stage_settings(module, given, settings)


def settings_of(row, **given):
    """The resolved settings of a row's last stage."""
    module, settings = row.stages[-1]
    return vars(stage_settings(module, given, settings))


def by_key(table):
    return {row.key: row for row in table.ROWS}


def test_tables_found():
    assert len(TABLES) >= 4 and "sec3_benchmark.table1_pretraining_methods" in TABLES


@pytest.mark.parametrize("start", ["scratch", "mae"])
def test_a1_leads_from_one_recipe_to_the_other_in_single_steps(start):
    rows = [row for row in a1_recipes.ROWS if row.key in {f"{start}-{key}" for key, *_ in a1_recipes.CHANGES}]
    path = [settings_of(row, preset="paper", data_path="DIR") for row in rows]
    for before, after, (_, _, change) in zip(path, path[1:], a1_recipes.CHANGES[1:]):
        assert {name for name in after if after[name] != before[name]} - {"recipe"} == set(change)
    one_by_one = {**path[-2], **a1_recipes.CHANGES[-1][2], "recipe": "impr"}
    assert one_by_one == path[-1]


def test_rows_that_two_tables_share_are_the_same_run():
    shared = [("scratch-impr", "scratch"), ("scratch-ori", "scratch-ori"), ("mae-impr", "mae"), ("mae-ori", "mae-ori")]
    for ours, theirs in shared:
        assert settings_of(by_key(a1_recipes)[ours]) == settings_of(by_key(table1)[theirs])
    assert by_key(a2_mae_settings)["base"].stages == by_key(table1)["mae"].stages
    for row in table5_distillation.ROWS:
        assert table5_distillation.table1_row(row).stages == by_key(table1)[TABLE1.get(row.key, row.key)].stages
    for row in b5_dino_simmim.ROWS:  # probes lie between; fine-tuning starts from what they hand on
        assert (row.stages[0], row.stages[-1]) == by_key(table1)[row.key].stages
    assert by_key(a3_mocov3_settings)["base"].stages == by_key(table1)["mocov3"].stages
    assert options.PRESET_NAMES == by_key(table1)["mae"].presets


@pytest.mark.parametrize("path", sorted(path for room in ("common", "sec*", "appendix")
                                        for path in ROOT.glob(f"{room}/**/*.py") if "PRESETS = {" in path.read_text()),
                         ids=lambda path: path.stem)
def test_the_laptop_preset_is_the_same_network_in_every_script(path):
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    assert ("laptop" in module.PRESETS) == ("small" in module.PRESETS)
    laptop = module.PRESETS["laptop"]
    if "model" in laptop:
        assert laptop["model"] in ("vit_demo", "vit_demo_simmim") and laptop["patch_size"] == 8
        assert laptop.get("position_size", laptop["img_size"]) == [48]  # detect.py's image size is the canvas
    if hasattr(module, "build_parser") and "model" in laptop:
        resolved = vars(stage_settings(module.__name__, {"preset": "laptop"}))
        assert resolved["model"] == laptop["model"] and resolved.get("data", "folder") == "folder"
