"""Compare runs with stored reference runs: the loss step by step, the last evaluation, and a plot of both.

    python appendix/tools/compare_runs.py                                  # every run in outputs/ that has a reference
    python appendix/tools/compare_runs.py --runs outputs/pretrain_mae/RUN --tolerance 0.01
    python appendix/tools/compare_runs.py --runs outputs/pretrain_mae/RUN --write appendix/results/reference_NAME.jsonl

A reference is the log of a run, reduced to some 30 rows, below a first line with its settings and environment. It is
compared with every run of the same settings. On the same kind of processor, with the same precision and number of
threads, the curves are equal; otherwise rounding lets them drift apart, the more so the longer the run. Writes
compare_runs.json, .md and .png. The exit code is 1 if a loss differs by more than --tolerance. Runs on other data or
from other weights than their reference are shown, but judged only if --runs names them.
"""
import json
import math
from pathlib import Path

from common import entry, options, report
from common.checkpoint import write_atomically
from common.distributed import print0
from common.errors import UserError
from common.ranges import Float
from common.runs import finished, identity

ROWS = 30  # rows of a reference, about
# Entries of settings.json that are not part of a run's identity
ABOUT = ("script", "fingerprints", "subset", "teacher", "keep_activations", "draw")


def build_parser():
    parser = options.make_parser(__doc__)
    parser.add_argument("--runs", nargs="+", metavar="RUN", help="folders of runs; default: all in outputs/")
    parser.add_argument("--references", nargs="+", metavar="FILE", help="default: reference_*.jsonl of every section")
    parser.add_argument("--tolerance", type=Float(0), default=0.05, help="largest relative difference of a logged loss")
    parser.add_argument("--write", metavar="FILE", help="write the one run of --runs to FILE as a reference, and stop")
    parser.add_argument("--output", default=str(options.ROOT / "outputs"), metavar="DIR")
    return parser


def read_lines(path):
    try:
        return [json.loads(line) for line in Path(path).read_text().splitlines()]
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not a log ({error}): give a run's folder or a reference_*.jsonl") from None


def read_reference(path):
    """Read a reference; return the description in its first line, and the rows of its log."""
    lines = read_lines(path)
    if not lines or "script" not in lines[0]:
        raise UserError(f"{path} is not a reference: --write makes one of a finished run")
    return lines[0], lines[1:]


def read_run(folder):
    """Read a run; return {"script", "settings" (of its identity), "data" (fingerprints)} and the rows of its log."""
    absent = [name for name in ("settings.json", "log.jsonl") if not (Path(folder) / name).is_file()]
    if absent:
        raise UserError(f"{folder} is not a run's folder, as it has no {' and no '.join(absent)}: give one as outputs/"
                        f"SCRIPT/NAME/, which a training made")
    stored = json.loads((Path(folder) / "settings.json").read_text())
    settings = identity({name: value for name, value in stored.items() if name not in ABOUT})
    about = {"script": stored["script"], "settings": settings, "data": stored["fingerprints"]}
    return about, read_lines(Path(folder) / "log.jsonl")


def write_reference(folder, path):
    """Write a finished run as a reference: about ROWS losses of its log, the last one included, and all evaluations."""
    about, rows = read_run(folder)
    result = finished(Path(folder))
    if result is None:
        raise UserError(f"{folder} is not finished: the same command continues it")
    steps = list(losses_of(rows))
    steps = {*steps[::math.ceil(len(steps) / ROWS)], steps[-1]}
    kept = [{name: row[name] for name in ("step", "loss", "eval") if name in row} for row in rows
            if "eval" in row or "loss" in row and row["step"] in steps]
    lines = [json.dumps(line) for line in ({**about, "environment": result["environment"]}, *kept)]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(("\n".join(lines) + "\n").encode()))
    print0(f"{len(lines) - 1} rows written to {path}")


def losses_of(rows):
    """Return {step: loss} of a log, where each loss is the mean since the previous row."""
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def compare(rows, reference):
    """Return the largest relative difference of the losses at shared steps, its step, and the last evaluations."""
    ours, theirs = losses_of(rows), losses_of(reference)
    shared = sorted(ours.keys() & theirs.keys())
    if not shared:
        raise UserError("no step of the reference is in the run's log: log with --log-every 10, as the reference was")
    apart = {step: abs(ours[step] - theirs[step]) / abs(theirs[step]) for step in shared}
    worst = max(shared, key=apart.get)
    evaluations = [next((row["eval"] for row in reversed(log) if "eval" in row), {}) for log in (rows, reference)]
    return {"steps": len(shared), "largest": apart[worst], "at": worst, "loss": [ours[shared[-1]], theirs[shared[-1]]],
            "evaluation": evaluations}


def draw(curves, path):
    """Draw the losses of {run: (rows, rows of its reference)}, one panel per run."""
    columns = min(3, len(curves))
    figure, axes = report.subplots(math.ceil(len(curves) / columns), columns, squeeze=False,
                                   figsize=(3.2 * columns, 2.4 * math.ceil(len(curves) / columns)))
    for axis in axes.flat[len(curves):]:
        axis.axis("off")
    for axis, (name, logs) in zip(axes.flat, curves.items()):
        for rows, label, style in zip(logs, ("run", "reference"), ("-", "o")):
            loss = losses_of(rows)
            axis.plot(list(loss), list(loss.values()), style, markersize=3, linewidth=1, label=label)
        axis.set_title(name, fontsize=7)
        axis.set(xlabel="step", ylabel="training loss")
    axes.flat[0].legend()
    report.save_figure(figure, path)


def matching(args):
    """Yield (folder, run, reference) of every run that has a reference, the last two as (description, rows).

    A run that --runs names must have one.
    """
    folders = args.runs or sorted(path.parent for path in Path(args.output).glob("*/*/result.json"))
    files = args.references or sorted(options.ROOT.glob("*/results/reference_*.jsonl"))
    if not files:
        raise UserError("no reference_*.jsonl in any results/: --write makes one")
    references = [read_reference(file) for file in files]
    for folder in map(Path, folders):
        about, rows = read_run(folder)
        found = [reference for reference in references
                 if all(reference[0][key] == about[key] for key in ("script", "settings"))]
        if found:  # prefer one with the same data and weights
            yield folder, (about, rows), min(found, key=lambda reference: reference[0]["data"] != about["data"])
        elif args.runs:
            raise UserError(f"{folder}: none of {len(references)} references has its settings; --write makes one")


def main(args):
    """Compare the runs, write the results and return {run: result of `compare`}."""
    if args.write:
        if len(args.runs or ()) != 1:
            raise UserError("--write keeps one run: name it by --runs")
        return write_reference(args.runs[0], args.write)
    results, curves, lines = {}, {}, []
    for folder, (about, rows), (reference, expected) in matching(args):
        name, alike = f"{about['script']}/{folder.name}", about["data"] == reference["data"]
        result = {**compare(rows, expected), "judged": alike or bool(args.runs)}
        top1 = [f"{found['top1']:.1f}" if "top1" in found else "-" for found in result["evaluation"]]
        lines.append([name, f"{result['largest']:.2%}", result["at"], "{:.4f} / {:.4f}".format(*result["loss"]),
                      " / ".join(top1), "" if alike else "other data or weights"])
        results[name], curves[name] = result, (rows, expected)
    if not results:
        raise UserError(f"no run in {args.output} has a reference: run a demo first, or --write one")
    header = ["run", "largest difference of the loss", "at step", "last loss / reference", "top-1 / reference", ""]
    folder = Path(args.output) / "compare_runs"
    report.write_text(folder, "compare_runs", {"item": "compare_runs", "runs": results}, report.markdown(header, lines))
    draw(curves, folder / "compare_runs.png")
    judged = {name: result["largest"] for name, result in results.items() if result["judged"]}
    if far := [name for name, largest in judged.items() if not largest <= args.tolerance]:
        raise UserError(f"further away than --tolerance {args.tolerance}: {', '.join(far)}")
    return results


if __name__ == "__main__":
    entry.run_script(main, build_parser())
