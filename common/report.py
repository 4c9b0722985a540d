"""Results: tables as JSON and Markdown with the published numbers beside ours, and the figures' common style."""
import json
import os
import platform
import shlex
import statistics
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from common.checkpoint import save_json, write_atomically
from common.distributed import is_main, print0
from common.errors import UserError
from common.options import ROOT

# The palette of Okabe and Ito, distinguishable for colour-blind readers
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
TOKENS = {"token": "class token", "patches": "mean of patches"}  # the features that a probe measures


def subplots(rows=1, columns=1, *, figsize, **settings):
    """Create a figure and its axes in the common style. pyplot does not register it, so it need not be closed.

    matplotlib is imported here, after the backend is set, and nowhere at the top of a file. A shell that was started
    from a notebook inherits the notebook's backend, and the import would fail where that is not installed.
    """
    os.environ["MPLBACKEND"] = "agg"  # pictures are only written to files
    import matplotlib
    from matplotlib.figure import Figure
    matplotlib.rcParams.update({
        "figure.dpi": 150, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
        "axes.prop_cycle": matplotlib.cycler(color=COLOURS), "savefig.bbox": "tight", "legend.frameon": False,
        "pdf.fonttype": 42})  # TrueType, which journals ask for and editors can change
    figure = Figure(figsize, layout="constrained")
    return figure, figure.subplots(rows, columns, **settings)


def save_figure(figure, path):
    """Write a figure to a file, .png or .pdf, completely or not at all."""
    kind, about = Path(path).suffix[1:], None
    if kind == "pdf":
        about = {"CreationDate": None}  # the same figure gives the same bytes
        for axis in figure.axes:
            for image in axis.images:
                image.set_interpolation("none")  # its own pixels, not resampled
    write_atomically(path, lambda file: figure.savefig(file, format=kind, metadata=about))


def add_pictures(parser, numbers):
    """Add the arguments of a script that draws a figure from a file; `numbers` is that file's suffix."""
    group = parser.add_argument_group("picture")
    group.add_argument("--from-numbers", metavar="FILE", help=f"draw the picture anew from this {numbers} and leave")
    group.add_argument("--figure-format", nargs="+", choices=("png", "pdf"), default=["png"],
                       help="pdf: also a vector picture, fonts embedded; the .png is written in any case")


@contextmanager
def only_a_picture(path, numbers=None):
    """Draw in this block. If that fails, print a warning and go on, since the results do not depend on the picture.

    numbers: the file of --from-numbers, if given: then the picture is all that was asked for, and a failure an error.
    """
    try:
        yield
    except Exception as error:  # matplotlib may raise any
        why = f"({type(error).__name__}: {' '.join(str(error).split())})"
        if not numbers:
            print0(f"warning: {path} was not drawn {why}")
        elif isinstance(error, (OSError, UserError)):
            raise
        else:
            raise UserError(f"--from-numbers {numbers}: this figure cannot be drawn from it {why}") from None


def draw_numbers(args, item, draw, content):
    """Draw the figure `draw(content)` as <item>.png, and in the other --figure-format, beside the file of its numbers.

    Only rank 0 draws, and nothing is drawn of no numbers (after a dry run). A failure is a UserError with
    --from-numbers, else a warning: the numbers are written already.
    """
    if not content or not is_main():
        return
    path = Path(args.from_numbers or Path(args.output) / item / f"{item}.json").with_suffix(".png")
    with only_a_picture(path, args.from_numbers):
        figure = draw(content)
        for kind in dict.fromkeys(("png", *args.figure_format)):
            save_figure(figure, path.with_suffix(f".{kind}"))
            print0(f"drawn: {path.with_suffix(f'.{kind}')}")


def read_numbers(path, item, key=None):
    """Read the numbers of a figure: {name: array} of an .npz or, if a key is given, the value of `key` in a .json.

    Raises UserError unless the file was written by the script of this `item`.
    """
    kind = ".json" if key else ".npz"
    unfit = f"--from-numbers {path}: give the {kind} that this script wrote"
    if Path(path).suffix != kind:
        raise UserError(unfit)
    try:
        content = json.loads(Path(path).read_bytes()) if key else read_arrays(path)
    except FileNotFoundError:
        raise UserError(f"--from-numbers {path}: no such file") from None
    except Exception as error:  # damaged bytes can raise any exception
        raise UserError(f"{unfit}; it cannot be read ({type(error).__name__}: {error})") from None
    content = content if isinstance(content, dict) else {}
    owner = str(content.pop("item", item))
    numbers = content.get(key) if key else content
    if owner != item or not numbers:
        raise UserError(f"{unfit}; this one holds {'nothing of the kind' if owner == item else owner}")
    return numbers


def read_arrays(path):
    """Read {name: array} of an .npz, and as "item" the figure's name, if that or the .json beside it holds it."""
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    about = Path(path).with_suffix(".json")
    if "item" not in arrays and about.is_file():
        arrays["item"] = json.loads(about.read_bytes())["item"]
    return arrays


def draw_curve(log_path, path):
    """Draw the curves of a run's log.jsonl on rank 0; print a warning if that fails."""
    if is_main():
        with only_a_picture(path):
            curve(log_path, path)


def curve(log_path, path):
    """Plot loss, learning rate, evaluations and probes (if any) of a log.jsonl over epochs, and save the picture."""
    rows = [json.loads(line) for line in Path(log_path).read_text().splitlines()]

    def points(name, part=None):
        """Return [(epoch, value)] of the rows that have a value of this name, directly or in their dict `part`."""
        found = [(row["epoch"], row.get(part, {}) if part else row) for row in rows]
        return [(epoch, values[name]) for epoch, values in found if values.get(name) is not None]

    metric = next((next(iter(row["eval"])) for row in rows if "eval" in row), None)  # the main metric comes first
    metric_name = {"top1": "top-1", "box_ap": "box AP"}.get(metric, metric)
    panels = {
        "training loss": {"": points("loss")},
        "learning rate": {"": points("lr")},
        f"{metric_name} on val (%)": {"": points(metric, "eval")},
        "top-1 of neighbours (%)": {what: points(f"knn_{name}", "probe") for name, what in TOKENS.items()},
        "effective rank": {what: points(f"rank_{name}", "probe") for name, what in TOKENS.items()},
    }
    panels = {name: lines for name, lines in panels.items() if any(lines.values())}
    if "training loss" not in panels:
        return
    figure, axes = subplots(1, len(panels), figsize=(3 * len(panels), 2.6))
    for axis, (name, lines) in zip(axes, panels.items()):
        for what, line in lines.items():
            axis.plot(*zip(*line), linewidth=1, label=what,
                      marker="." if len(line) < 50 else None)  # a few points are hard to see without markers
        axis.set(xlabel="epoch", ylabel=name)
        if len(lines) > 1:
            axis.legend()
    save_figure(figure, path)


def mean_std(values) -> str:
    """Format mean and sample standard deviation: "78.0 ± 0.1"; "78.0" for one value, "-" for none."""
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def markdown(header, rows) -> str:
    """Format a Markdown table with aligned columns, so that it is readable in a terminal; short rows are padded."""
    cells = [[str(c) for c in row] + [""] * (len(header) - len(row)) for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def origin(preset, data) -> str:
    """Say in words by which preset and on which data numbers were made. Only ImageNet's are called "preset paper"."""
    if preset == "paper" and data != "imagenet":
        return f"the paper's settings on other images (data {data})"
    return f"preset {preset}, data {data}"


def environment():
    """Return what a result records about where it was made: versions, hardware, date and command."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    script = Path(sys.argv[0]).resolve()
    script = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script.name  # without folders of this machine
    versions = {name: getattr(sys.modules.get(name), "__version__", None)
                for name in ("torch", "torchvision", "timm", "numpy")}
    return {"python": platform.python_version(), **versions, "gpu": gpu,
            "cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(),
            "date": time.strftime("%Y-%m-%d"), "command": shlex.join(["python", str(script), *sys.argv[1:]])}


def write_text(folder, item, content, text):
    """Print a text and write it to <item>.md; write the dict `content` and the environment to <item>.json (rank 0)."""
    if not is_main():
        return
    folder.mkdir(parents=True, exist_ok=True)
    save_json(folder / f"{item}.json", {**content, "environment": environment()})
    write_atomically(folder / f"{item}.md", lambda file: file.write(f"{text}\n".encode()))
    print0(f"\n{text}\n\nwritten to {folder / item}.json and .md")


def write_table(item, args, columns, rows, notes=()):
    """Print a table and write it as <output>/<item>/<item>.json and .md.

    rows: dicts {"name", "published", "measured", "seeds", "run", ...}. columns: {heading: function of a row that
    returns the cell}. Rows without a measurement are listed below the table.
    """
    text = markdown(list(columns), [[cell(row) for cell in columns.values()] for row in rows if row["measured"]])
    absent = [f"{row['name']} ({row['published'] or '-'}: {row['status']})" for row in rows if not row["measured"]]
    if absent:
        notes = [f"Not measured here (published: why): {'; '.join(absent)}", *notes]
    if getattr(args, "set", ()):
        notes = [*notes, f"For all rows: --set {' '.join(args.set)}"]
    notes = [note for note in notes if note]
    text = "\n\n".join([f"{item}, {origin(args.preset, args.data)}", text, *notes])
    content = {"item": item, "preset": args.preset, "data": args.data, "rows": rows, "notes": notes}
    write_text(Path(args.output) / item, item, content, text)
