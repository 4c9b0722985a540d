"""The READMEs: every number of their tables stands in a file of results or in the code, every link leads somewhere.

A table with numbers has a comment before it that says where they are from (other people's: `numbers: quoted`):

    <!-- numbers: sec3_benchmark/results/table4_laptop.json, sec3_benchmark/downstream.py -->
"""
import ast
import json
import re
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(page for page in ROOT.glob("**/*.md") if not {"outputs", "results"} & set(page.parts))
COMMENT = re.compile(r"<!-- numbers: (.+) -->")
NUMBER = re.compile(r"(?<![\w.])[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?(?![\w])|(?<![\w.])[+-]?\d+(?:\.\d+)?(?![\w.]*\w)")


def numbers_in(path):
    """Every number of a .json file, and mean and deviation of each of its lists; every constant of a Python file; every
    number of a page of results."""
    if path.suffix == ".md":
        return {float(number.replace(",", "")) for number in NUMBER.findall(path.read_text())}
    if path.suffix == ".py":
        constants = (node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant))
        return {value for value in constants if type(value) in (int, float)}
    found = set()

    def walk(value):
        if isinstance(value, dict):
            [walk(part) for part in value.values()]
        elif isinstance(value, list):
            [walk(part) for part in value]
            alike = value and all(isinstance(part, dict) and part.keys() == value[0].keys() for part in value)
            for numbers in [value, *(zip(*(part.values() for part in value)) if alike else ())]:
                if len(numbers) > 1 and all(type(number) in (int, float) for number in numbers):
                    found.update([statistics.mean(numbers), statistics.stdev(numbers)])
        elif type(value) in (int, float):
            found.add(value)
    walk(json.loads(path.read_text()))
    return found


def tables(page):
    """Yield (sources or None, header, body rows) of each table of a page."""
    lines = page.read_text().splitlines()
    for start, line in enumerate(lines):
        if line.startswith("|") and not lines[start - 1].startswith("|"):
            end = next((n for n in range(start, len(lines)) if not lines[n].startswith("|")), len(lines))
            said = COMMENT.fullmatch(lines[start - 1])
            yield said and said[1].split(", "), lines[start], lines[start + 2:end]


def measurements(rows):
    """The numbers of a table's body but in code, links' addresses and first cells: every decimal, and whole cells."""
    found = []
    for row in rows:
        for cell in row.strip("|").split("|")[1:]:
            text = re.sub(r"`[^`]*`|\]\([^)]*\)|[*\[]", "", cell).strip()
            whole = re.fullmatch(r"[+-]?[\d,.]+(?: ± [\d.]+)?(?: / [\d,.]+)*", text)
            found += [number for number in NUMBER.findall(text) if whole or "." in number]
    return found


def stands_in(number, known):
    """Whether a number, as printed, is one of the known ones, rounded to its digits."""
    value = number.replace(",", "").lstrip("+")
    digits = len(value.partition(".")[2])
    return any(f"{one:.{digits}f}" == value for one in known)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_numbers_of_tables_stand_in_results(page):
    for sources, header, rows in tables(page):
        printed = measurements(rows)
        if sources is None:
            decimals = [number for number in printed if "." in number]
            assert not decimals, f"{page.name}: the table {header} has numbers and no source: {decimals}"
            continue
        if sources == ["quoted"]:
            continue
        known = set().union(*(numbers_in(ROOT / source) for source in sources))
        wrong = [number for number in printed if not stands_in(number, known)]
        assert printed and not wrong, f"{page.name}: {wrong} of {header} stand in none of {sources}"


def test_a_stale_number_is_found():
    assert stands_in("0.9", {0.870}) and stands_in("7,000", {7000}) and stands_in("+9.5", {9.45001})
    assert not stands_in("0.8", {0.870}) and not stands_in("0.6", {0.543}) and not stands_in("7,001", {7000})
    assert measurements(["| MAE 2 | **27.9 ± 0.6** | 1,765 | [34.5](x.md#1) | 3 min, `--k 7.5` |"]) == \
        ["27.9", "0.6", "1,765", "34.5"]


def anchors(page):
    """The anchors of a page's headings, as GitHub names them."""
    seen, found = {}, set()
    for heading in re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), flags=re.M):
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.add(f"{name}-{seen[name]}" if name in seen else name)
        seen[name] = seen.get(name, 0) + 1
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        file, _, anchor = target.partition("#")
        place = (page.parent / file).resolve() if file else page
        assert place.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(place), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_scripts_named_exist(page):
    for name in re.findall(r"(?:common|sec3_benchmark|sec4_analysis|sec5_distill|appendix|tests)/[\w/]+\.(?:py|sh|md)",
                           page.read_text()):
        assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text()) <= 9000
