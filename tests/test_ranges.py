"""Numbers on command lines: every numeric argument of every script has a range, and nothing outside of it is taken."""
import importlib
import math
from pathlib import Path

import pytest

from common import options
from common.ranges import Float, Int

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [".".join(path.relative_to(ROOT).with_suffix("").parts) for room in ("sec*", "appendix")
           for folder in ROOT.glob(room) for path in sorted(folder.rglob("*.py"))
           if '__name__ == "__main__"' in path.read_text()]
NUMBERS = ("nan", "inf", "1e999", "-1", "0", "x", "", "1.5", str(10**30))


def elements(value):
    """Return the numbers in the value of a setting, which may be a number, a list or anything else."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return [one for one in values if isinstance(one, (int, float)) and not isinstance(one, bool)]


def arguments(script):
    """Return a script's module, its parser with no argument required, and {name: argument}."""
    module = importlib.import_module(script)
    parser = module.build_parser()
    for action in parser._actions:
        action.required = False
    return module, parser, {action.dest: action for action in parser._actions}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_number_is_in_its_range_or_refused_in_one_line(script, capsys):
    _, parser, known = arguments(script)
    for name, action in known.items():
        assert action.type is None or isinstance(action.type, Float), f"{name} has no range"
        for text in NUMBERS if action.type else ():
            line = [action.option_strings[0], *[text] * (action.nargs if isinstance(action.nargs, int) else 1)]
            try:
                values = elements(getattr(parser.parse_args(line), name))
            except SystemExit:
                said = capsys.readouterr().err
                assert said.count("\n") == 1 and line[0] in said and str(action.type) in said
            else:
                assert values and all(value in action.type and math.isfinite(value) for value in values), line
                assert {type(value) for value in values} == {action.type.kind}


@pytest.mark.parametrize("script", SCRIPTS)
def test_defaults_presets_and_recipes_are_in_the_ranges(script):
    module, _, known = arguments(script)
    sources = [{name: action.default for name, action in known.items()},
               *getattr(module, "PRESETS", {}).values(), *getattr(module, "RECIPES", {}).values()]
    for name, value in ((name, value) for settings in sources for name, value in settings.items()):
        if numbers := elements(value):
            assert known[name].type and all(one in known[name].type for one in numbers), f"{name} {value}"


@pytest.mark.parametrize(("kind", "inside", "outside"), [
    (Int(1), ["1", "1000000", "007"], ["0", "-3", "1.0", "1e3", "nan", "x", "", str(2**63)]),
    (Int(-1, 256), ["-1", "0", "256"], ["-2", "257", "5000"]),
    (Float(0, 1), ["0", "1", "0.75", "1e-9"], ["-1e-9", "1.0000001", "75", "nan", "inf", "-inf", "x"]),
    (Float(1e-6), ["1e-6", "3", "1e300"], ["0", "-1", "nan", "inf", "1e999"])])
def test_both_ends_are_inside(kind, inside, outside):
    parser = options.make_parser("")
    parser.add_argument("--number", type=kind)
    for text in inside:
        assert parser.parse_args([f"--number={text}"]).number == float(text)
    for text in outside:
        with pytest.raises(SystemExit):
            parser.parse_args([f"--number={text}"])


def test_a_list_is_checked_element_by_element():
    parser = options.make_parser("")
    parser.add_argument("--mean", type=Float(0, 1), nargs="+")
    assert parser.parse_args("--mean 0 0.5 1".split()).mean == [0, 0.5, 1]
    with pytest.raises(SystemExit):
        parser.parse_args("--mean 0.5 nan 0.5".split())
