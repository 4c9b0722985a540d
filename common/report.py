"""Tables as json and Markdown with the published number beside ours, and the style of the figures."""
import json
import statistics
from pathlib import Path

from common.checkpoint import save_json, write_atomically
from common.distributed import is_main, print0
from common.runs import environment

# Okabe and Ito: safe for colour-blind readers
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def subplots(rows=1, columns=1, *, figsize, **settings):
    """A figure, with type that stays legible in print, and its axes. pyplot does not know it: nothing to close."""
    import matplotlib
    from matplotlib.figure import Figure
    matplotlib.rcParams.update({
        "figure.dpi": 150, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
        "axes.prop_cycle": matplotlib.cycler(color=COLOURS), "savefig.bbox": "tight", "legend.frameon": False})
    figure = Figure(figsize, layout="constrained")
    return figure, figure.subplots(rows, columns, **settings)


def draw_curve(log_path, path):
    """Training loss and learning rate of a log.jsonl over epochs, with the evaluations if there are any."""
    rows = [json.loads(line) for line in Path(log_path).read_text().splitlines()]
    steps, evals = [r for r in rows if "loss" in r], [r for r in rows if "eval" in r]
    if not steps:
        return
    figure, axes = subplots(1, 3 if evals else 2, figsize=(9 if evals else 6, 2.6))
    for axis, key, name in zip(axes, ("loss", "lr"), ("training loss", "learning rate")):
        axis.plot([r["epoch"] for r in steps], [r[key] for r in steps], linewidth=1,
                  marker="." if len(steps) < 10 else None)  # a line of one point is not seen
        axis.set(xlabel="epoch", ylabel=name)
    if evals:
        measure = next(iter(evals[0]["eval"]))  # the main one comes first
        axes[2].plot([r["epoch"] for r in evals], [r["eval"][measure] for r in evals], marker="o", markersize=3)
        axes[2].set(xlabel="epoch", ylabel={"top1": "top-1", "box_ap": "box AP"}.get(measure, measure) + " on val (%)")
    figure.savefig(path)


def spread(values):
    """Mean and sample standard deviation over seeds as text: "78.0 ± 0.1", "78.0", or "-" for nothing."""
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def markdown(header, rows):
    """A Markdown table, columns aligned so that it reads in a terminal too; short rows end in empty cells."""
    cells = [[str(c) for c in row] + [""] * (len(header) - len(row)) for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def write_text(folder, item, content, text):
    """Prints a text and writes it as <item>.md, with `content` and the environment beside it as <item>.json."""
    if not is_main():
        return
    folder.mkdir(parents=True, exist_ok=True)
    save_json(folder / f"{item}.json", {**content, "environment": environment()})
    write_atomically(folder / f"{item}.md", lambda file: file.write(f"{text}\n".encode()))
    print0(f"\n{text}\n\nwritten to {folder / item}.json and .md")


def write_table(item, args, columns, rows, notes=()):
    """A table as <item>.json and <item>.md in <output>/<item>/, printed too; returns the path of the json.

    `rows` are dicts {"name", "published", "measured", "seeds", "run", ...}; `columns` maps a heading to a function of
    a row. Rows without a measurement are named below the table.
    """
    text = markdown(list(columns), [[cell(row) for cell in columns.values()] for row in rows if row["measured"]])
    absent = "; ".join(f"{row['name']} ({row['published'] or '-'}: {row['status']})"
                       for row in rows if not row["measured"])
    notes = list(filter(None, [f"Not measured here (published: why): {absent}" if absent else "", *notes,
                               f"For all rows: --set {' '.join(args.set)}" if getattr(args, "set", ()) else ""]))
    text = "\n\n".join([f"{item}, preset {args.preset}, data {args.data}", text, *notes])
    folder = Path(args.output) / item
    write_text(folder, item, {"item": item, "preset": args.preset, "data": args.data, "rows": rows,
                              "notes": notes}, text)
    return folder / f"{item}.json"
