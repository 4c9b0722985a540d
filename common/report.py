"""Tables as JSON and Markdown, with published numbers beside ours, and the common style of the figures."""
import json
import statistics
from pathlib import Path

from common.checkpoint import save_json, write_atomically
from common.distributed import is_main, print0
from common.runs import environment

# The palette of Okabe and Ito, distinguishable for colour-blind readers
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def subplots(rows=1, columns=1, *, figsize, **settings):
    """Create a figure and its axes in the common style. pyplot does not register it, so it need not be closed."""
    import matplotlib
    from matplotlib.figure import Figure
    matplotlib.rcParams.update({
        "figure.dpi": 150, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
        "axes.prop_cycle": matplotlib.cycler(color=COLOURS), "savefig.bbox": "tight", "legend.frameon": False})
    figure = Figure(figsize, layout="constrained")
    return figure, figure.subplots(rows, columns, **settings)


def draw_curve(log_path, path):
    """Plot training loss, learning rate and evaluations (if any) of a log.jsonl over epochs; saves the image."""
    rows = [json.loads(line) for line in Path(log_path).read_text().splitlines()]
    steps, evals = [r for r in rows if "loss" in r], [r for r in rows if "eval" in r]
    if not steps:
        return
    figure, axes = subplots(1, 3 if evals else 2, figsize=(9 if evals else 6, 2.6))
    for axis, key, name in zip(axes, ("loss", "lr"), ("training loss", "learning rate")):
        axis.plot([r["epoch"] for r in steps], [r[key] for r in steps], linewidth=1,
                  marker="." if len(steps) < 10 else None)  # few points need markers to be visible
        axis.set(xlabel="epoch", ylabel=name)
    if evals:
        measure = next(iter(evals[0]["eval"]))  # the first is the main one
        axes[2].plot([r["epoch"] for r in evals], [r["eval"][measure] for r in evals], marker="o", markersize=3)
        axes[2].set(xlabel="epoch", ylabel={"top1": "top-1", "box_ap": "box AP"}.get(measure, measure) + " on val (%)")
    figure.savefig(path)


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
    """Say by which settings and on which data numbers were made: what is not ImageNet is never the preset "paper"."""
    if preset == "paper" and data != "imagenet":
        return f"the paper's settings on other images (data {data})"
    return f"preset {preset}, data {data}"


def write_text(folder, item, content, text):
    """Print a text and write it to <item>.md; write the dict `content` and the environment to <item>.json (rank 0)."""
    if not is_main():
        return
    folder.mkdir(parents=True, exist_ok=True)
    save_json(folder / f"{item}.json", {**content, "environment": environment()})
    write_atomically(folder / f"{item}.md", lambda file: file.write(f"{text}\n".encode()))
    print0(f"\n{text}\n\nwritten to {folder / item}.json and .md")


def write_table(item, args, columns, rows, notes=()) -> Path:
    """Print a table and write it as <output>/<item>/<item>.json and .md. Returns the path of the JSON file.

    rows: dicts {"name", "published", "measured", "seeds", "run", ...}. columns: heading -> function of a row.
    Rows without a measurement are listed below the table.
    """
    text = markdown(list(columns), [[cell(row) for cell in columns.values()] for row in rows if row["measured"]])
    absent = "; ".join(f"{row['name']} ({row['published'] or '-'}: {row['status']})"
                       for row in rows if not row["measured"])
    notes = list(filter(None, [f"Not measured here (published: why): {absent}" if absent else "", *notes,
                               f"For all rows: --set {' '.join(args.set)}" if getattr(args, "set", ()) else ""]))
    text = "\n\n".join([f"{item}, {origin(args.preset, args.data)}", text, *notes])
    folder = Path(args.output) / item
    write_text(folder, item, {"item": item, "preset": args.preset, "data": args.data, "rows": rows,
                              "notes": notes}, text)
    return folder / f"{item}.json"
