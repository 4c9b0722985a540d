"""The house rules that a reader relies on: who may import whom, what a script shows, how files are opened, how long."""
import ast
import importlib
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = ("sec3_benchmark", "sec4_analysis", "sec5_distill", "appendix")
ROOMS = ("common", *SECTIONS)
MAY_IMPORT = {  # besides itself and common: a section's whole folder, or modules of it. Stages are run by name instead
    "common": (),
    "sec3_benchmark": (),
    "sec4_analysis": ("sec3_benchmark.downstream",),
    "sec5_distill": ("sec3_benchmark.downstream", "sec4_analysis.cka", "sec4_analysis.fourier",
                     "sec4_analysis.attention", "sec4_analysis.similarity", "sec4_analysis.study"),
    "appendix": ("sec3_benchmark", "sec4_analysis", "sec5_distill"),
}
FILES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
ALL = FILES + sorted((ROOT / "tests").glob("*.py"))


def name(path):
    return str(path.relative_to(ROOT))


def findings(check, files=FILES):
    """{file: what the check found}, without the files that are in order."""
    found = {name(path): list(check(path)) for path in files}
    return {file: what for file, what in found.items() if what}


def imports(tree, package):
    """Dotted names of all that is imported, wherever in the file: `from a.b import c` gives a.b.c."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = [[], [package], []][min(node.level, 2)]  # relative: of this folder, or of the root
            module = ".".join([*start, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}".lstrip(".") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            if node.args and isinstance(node.args[0], ast.Constant):
                yield node.args[0].value


def floor_broken(room, source):
    """What a file of this room imports and may not."""
    allowed = {"common", room, *MAY_IMPORT[room]}
    inside = [module for module in imports(ast.parse(source), room) if module.split(".")[0] in (*ROOMS, "tests")]
    return [m for m in inside if not any(m == a or m.startswith(f"{a}.") for a in allowed)]


def unsafe(source):
    """Ways of reading a file that let it run code."""
    tree = ast.parse(source)
    given = [(node.arg, ast.unparse(node.value)) for node in ast.walk(tree) if isinstance(node, ast.keyword)]
    found = ["weights_only=False"] * given.count(("weights_only", "False"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "np.load", "numpy.load"):
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            safe = keywords.get("weights_only") == "True" if "torch" in ast.unparse(node.func) else \
                keywords.get("allow_pickle", "False") == "False"
            found += [] if safe else [ast.unparse(node)]
    return found


def docstring_lacks(path):
    """A module docstring; and in a script, the command that runs it, path and all."""
    tree = ast.parse(path.read_text())
    docstring = ast.get_docstring(tree)
    if not docstring and path.name != "__init__.py":
        yield "docstring"
    if any(isinstance(node, ast.If) and "__name__" in ast.unparse(node.test) for node in tree.body):
        if f"python {name(path)}" not in (docstring or ""):
            yield f"python {name(path)}"


def stage_lacks(path):
    """Tables run a section's scripts through build_parser() and main(args)."""
    source = path.read_text()
    if '__name__ == "__main__"' in source:
        wanted = {"build_parser": [], "main": ["args"]}
        functions = {node.name: [arg.arg for arg in node.args.args] for node in ast.parse(source).body
                     if isinstance(node, ast.FunctionDef)}
        yield from (function for function in wanted if functions.get(function) != wanted[function])


def flags_renamed(path):
    """common/options.py writes settings as a command line, where every flag is its setting's name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and re.search(r"(parser|group)\.add_argument$", ast.unparse(node.func)):
            if "dest" in (keyword.arg for keyword in node.keywords) or not node.args[0].value.startswith("--"):
                yield ast.unparse(node)


def search_path_edits(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.path", "site.addsitedir"):
            yield ast.unparse(node)
        if isinstance(node, ast.ImportFrom) and node.module == "sys" and "path" in (alias.name for alias in node.names):
            yield "from sys import path"


def test_imports_keep_to_their_floor():
    assert findings(lambda path: floor_broken(path.relative_to(ROOT).parts[0], path.read_text())) == {}


@pytest.mark.parametrize(("room", "source"), [
    ("common", "import sec3_benchmark.downstream"),
    ("common", "def f():\n    from sec4_analysis import cka"),
    ("common", "from appendix.dino import DINO"),
    ("sec3_benchmark", "from sec4_analysis.cka import cka"),
    ("sec4_analysis", "from sec3_benchmark.pretrain_mae import main"),
    ("sec4_analysis", "from sec3_benchmark import finetune"),
    ("sec4_analysis", "import sec3_benchmark"),
    ("sec4_analysis", "if True:\n    from ..sec3_benchmark import finetune"),
    ("sec5_distill", "import importlib\nimportlib.import_module('sec3_benchmark.pretrain_mae')"),
    ("sec5_distill", "from sec4_analysis.fig5_attention import rows"),
    ("sec5_distill", "from appendix import dino"),
    ("appendix", "from tests.helpers import golden"),
])
def test_a_broken_floor_is_noticed(room, source):
    assert floor_broken(room, source)


@pytest.mark.parametrize(("room", "source"), [
    ("common", "from common import vit\nimport torch, timm.data"),
    ("sec3_benchmark", "from sec3_benchmark import moco\nfrom . import coco\nfrom .downstream import SETS"),
    ("sec4_analysis", "from sec3_benchmark.downstream import SETS\nfrom sec3_benchmark import downstream"),
    ("sec5_distill", "from sec4_analysis import similarity, cka\nimport sec3_benchmark.downstream"),
    ("sec5_distill", "from common.tables import stage\nstage('appendix.pretrain_dino')"),
    ("appendix", "from sec5_distill.distillation import loss\nfrom sec4_analysis.cka import cka"),
])
def test_what_the_floors_allow_passes(room, source):
    assert floor_broken(room, source) == []


def test_what_is_named_of_our_modules_exists():
    """`module.name`, where module is one of ours: a file that no test runs would else keep the names of yesterday."""
    absent = []
    for path in ALL:
        tree = ast.parse(path.read_text())
        ours = {alias.asname or alias.name: f"{node.module}.{alias.name}" for node in ast.walk(tree)
                if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ROOMS
                for alias in node.names if (ROOT / node.module.replace(".", "/") / f"{alias.name}.py").is_file()}
        for node in ast.walk(tree):  # a variable or an argument of that name is something else
            for other in ([node.arg] if isinstance(node, ast.arg) else
                          [node.id] if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else []):
                ours.pop(other, None)
        named = {(ours[node.value.id], node.attr) for node in ast.walk(tree) if isinstance(node, ast.Attribute)
                 and isinstance(node.value, ast.Name) and node.value.id in ours}
        absent += [f"{name(path)}: {module}.{what}" for module, what in named
                   if not hasattr(importlib.import_module(module), what)]
    assert absent == []


def test_every_file_has_a_docstring_and_every_script_shows_its_command():
    assert findings(docstring_lacks) == {}


def test_every_script_is_a_parser_and_a_main():
    assert findings(stage_lacks, [path for path in FILES if path.parent.name != "common"]) == {}


def test_every_flag_is_its_settings_name(tmp_path):
    assert findings(flags_renamed) == {}
    (tmp_path / "a.py").write_text("parser.add_argument('--a', dest='b')\ngroup.add_argument('c')\n")
    assert len(list(flags_renamed(tmp_path / "a.py"))) == 2


def commands(text):
    """Scripts that a text starts by `python` or torchrun, as paths."""
    return set(re.findall(r"(?:python|torchrun|nproc-per-node=\d+|HOST:\d+)\s+((?:\w+/)+\w+\.py)", text))


def test_every_command_in_the_documentation_exists_and_every_script_is_documented():
    pages = [page for page in ROOT.glob("**/*.md") if not {"outputs", "results"} & set(page.parts)]
    shown = {command for path in [*pages, *FILES] for command in commands(path.read_text())}
    assert {command for command in shown if not (ROOT / command).is_file()} == set()
    scripts = [path for path in FILES if '__name__ == "__main__"' in path.read_text()]
    assert len(scripts) > 30
    rooms = {room: (ROOT / room / "README.md").read_text() for room in SECTIONS}
    assert [path for path in map(name, scripts) if Path(path).name not in rooms[Path(path).parts[0]]] == []


def test_the_reader_s_map_names_what_there_is():
    """`file.py`: `name`, `Class.method` in the table of appendix/reading.md."""
    text = (ROOT / "appendix" / "reading.md").read_text()
    named = [(file, name) for file, names in re.findall(r"`((?:\w+/)+\w+\.py)`: ((?:`[\w.]+`(?:, )?)+)", text)
             for name in re.findall(r"`(?:\w+\.)?(\w+)`", names)]
    assert len(named) > 15
    assert [one for one in named if not re.search(rf"\b(def|class) {one[1]}\b", (ROOT / one[0]).read_text())] == []


def test_no_file_is_read_unsafely():
    """Checkpoints with weights_only=True, arrays without pickle."""
    assert findings(lambda path: unsafe(path.read_text()), ALL) == {}


@pytest.mark.parametrize("source", [
    "torch.load(p)", "torch.load(p, weights_only=False)", "torch.load(p, weights_only=flag)",
    "np.load(p, allow_pickle=True)", "f(**dict(weights_only=False))"])
def test_unsafe_reading_is_noticed(source):
    assert unsafe(source) and not unsafe("torch.load(p, weights_only=True), np.load(q), json.load(r)")


def unfit_for_odd_machines(source):
    """A module-level import of matplotlib, which fails under a backend that is not installed; text written in whatever
    encoding the machine has.
    """
    tree = ast.parse(source)
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom) and "matplotlib" in ast.unparse(node):
            yield ast.unparse(node)
    for node in ast.walk(tree):
        called = ast.unparse(node.func).split(".")[-1] if isinstance(node, ast.Call) else ""
        mode = ast.unparse(node.args[1]).strip("'") if called == "open" and len(node.args) > 1 else ""
        writes = mode and "b" not in mode and mode[0] in "aw" or called == "write_text" and node.args[:1] == node.args
        if writes and "encoding" not in [keyword.arg for keyword in node.keywords]:
            yield ast.unparse(node)


def test_any_backend_and_any_encoding_will_do():
    assert findings(lambda path: unfit_for_odd_machines(path.read_text())) == {}
    for source in ("import matplotlib.cm", "from matplotlib import cm", "p.write_text('x')", "open(p, 'a+')"):
        assert list(unfit_for_odd_machines(source))
    for source in ("def f():\n    import matplotlib", "p.write_text('x', encoding='u8')", "open(p, 'wb')", "open(p)"):
        assert not list(unfit_for_odd_machines(source))


def test_nothing_touches_the_search_path(tmp_path):
    """Scripts find `common` because the clone is installed, or because PYTHONPATH says so."""
    assert findings(search_path_edits, ALL) == {}
    (tmp_path / "a.py").write_text("import sys\ndef f():\n    sys.path.insert(0, '..')\n")
    assert list(search_path_edits(tmp_path / "a.py"))


@pytest.mark.parametrize("section", SECTIONS)
def test_the_pipelines_run_every_table_and_figure(section, tmp_path):
    """The demo runs all; elsewhere what needs data of its own is left out with a word, or told where they are."""
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho "$@"\n')
    fake.chmod(0o755)

    def ran(*argv, **variables):
        done = subprocess.run(["bash", str(ROOT / section / "reproduce.sh"), *argv], text=True, capture_output=True,
                              check=True, env={"PATH": f"{tmp_path}:/usr/bin:/bin", **variables})
        lines = dict(line.partition(" ")[::2] for line in done.stdout.splitlines())
        return {name.split("/")[1]: words.split() for name, words in lines.items()}, done.stderr

    done = subprocess.run(["bash", str(ROOT / section / "reproduce.sh"), "--help"], text=True, capture_output=True,
                          timeout=5, check=True, cwd=tmp_path, env={"PATH": "/usr/bin:/bin"})
    assert f"bash {section}/reproduce.sh" in done.stdout and "LAUNCH=" in done.stdout and "set -e" not in done.stdout
    items = {path.name for path in (ROOT / section).glob("*.py") if re.match(r"(table|fig|a|b)\d", path.name)}
    scripts, left_out = ran()
    assert items - {"a5_detection_settings.py"} <= set(scripts) and not left_out
    assert set(ran("--output", "X")[0]) == set(scripts) - {"detect.py"}  # a demo still; detect.py takes no such word
    some, left_out = ran("--preset", "small", SEEDS="--seeds 0 1", IMAGES="--num-images 9")
    assert {"table4", "detect", "fig4", "table5", "a4"} & {re.match(r"[a-z]+\d*", name)[0] for name in some} == set()
    assert len(left_out.splitlines()) == len(scripts) - len(some) > 0
    assert all(words[:2] == ["--preset", "small"] for name, words in some.items() if "table2" not in name)
    every, left_out = ran("--preset", "small", TRANSFER="--datasets X", SWEEP="--dataset X", DETECT="--init X")
    assert set(every) == set(scripts) and not left_out
    assert sum("X" in words for words in every.values()) == len(scripts) - len(some)
