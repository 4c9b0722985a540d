"""Shared by Figures 2 and 4: how many of the leading pre-trained blocks does a model need?

The first k blocks are kept, with patch embedding, class token and positions. Everything behind them is initialised
anew, and the whole model is trained. k = 0 keeps nothing: it is training from scratch, the same for every method. No
source that we read has the authors' code or numbers for these figures, so there is nothing to compare ours with.
"""
import shlex
from pathlib import Path

import numpy as np

from common import options, report, tables
from common.distributed import print0
from common.errors import UserError
from common.pretrained import read_weights
from common.ranges import Int
from common.rows import PREVIOUS, Row
from common.vit import SIZES
from sec3_benchmark.downstream import MOCO_FINETUNING, scratch_settings, settings_told
from sec4_analysis.study import PRETRAIN_MAE, PRETRAIN_MOCOV3, given_models, line_styles

PRESETS = {"demo": {"data": "fractals", "blocks": [0, 6, 12]}, "laptop": {"data": "folder", "blocks": [0, 6, 12]},
           "small": {"data": "folder"}}
METHODS = {"MAE": PRETRAIN_MAE, "MoCo-v3": PRETRAIN_MOCOV3}
DEPTH = SIZES["vit_tiny"]["depth"]  # that of every size


def add_arguments(parser):
    group = parser.add_argument_group("leading blocks")
    group.add_argument("--models", nargs="+", action="extend", metavar="NAME=CHECKPOINT",
                       help="pre-trained weights; default: the preset's own MAE and MoCo-v3, one of each per seed. "
                            "Figure 2 fine-tunes those with moco in their NAME as Table 1 does, with layer decay 0.75")
    group.add_argument("--blocks", type=Int(0), nargs="+", default=[0, 3, 6, 9, 12], metavar="K",
                       help="how many to keep")
    group.add_argument("--seeds", type=Int(0), nargs="+", default=[0], help="each point is run once per seed")
    tables.add_rows(parser)
    report.add_pictures(parser, ".json")


def parse(parser, argv=None):
    return tables.parse(parser, argv, presets=PRESETS)


def starts(args):
    """Return {name: (lines that pre-train the weights, the weights)}: files of --models, or own pre-trainings."""
    if args.models:
        return {name: ([], shlex.quote(checkpoint)) for name, checkpoint in given_models(args).items()}
    return {name: ([pretraining], PREVIOUS) for name, pretraining in METHODS.items()}


def moco_arguments(tuning, name):
    """Return the arguments that Table 1 adds to fine-tune MoCo-v3, if the method's name contains moco; else nothing."""
    by_finetune = "finetune.py" in tuning  # for transfer.py, layer decay is the default
    return MOCO_FINETUNING if by_finetune and "moco" in name.lower() else ""


def given_weights(args):
    """Read the files of --models: {name: Weights}. A dry run may name files that do not exist yet."""
    models = given_models(args) if args.models else {}
    return {name: read_weights(file) for name, file in models.items() if not args.dry_run or Path(file).exists()}


def whole_encoders(methods, loaded, told):
    """Return the methods for which keeping k = 12 blocks equals loading everything, as Tables 1 and 4 do.

    Their runs are then reused. A classifier that averages tokens takes only blocks and embeddings from a pre-trained
    encoder, so both are equal. From another such classifier it would also take fc_norm, and then they are not.
    """
    if "global_pool" in told:
        return ()
    ours = [name for name, (before, _) in methods.items() if before]  # the preset's own pre-trainings
    return (*ours, *(name for name, weights in loaded.items() if "fc_norm.weight" not in weights.state))


def point_row(tuning, title, name, k, before, checkpoint, scratch=(), whole=False):
    """Return the row that trains and measures one point of a figure.

    tuning: the line of its training, without what it starts from. before: lines that make the checkpoint.
    scratch: further words for k = 0, whose row is the same for every method. whole: for k = 12, load everything.
    """
    key, where = (f"-{title}", f", {title}") if title else ("", "")
    if k == 0:
        return Row(f"scratch{key}", f"from scratch, k = 0{where}", None, [f"{tuning} {shlex.join(scratch)}".rstrip()])
    keep = "" if whole and k == DEPTH else f"--keep-blocks {k}"
    line = " ".join(filter(None, [tuning, moco_arguments(tuning, name), f"--init {checkpoint}", keep]))
    return Row(f"{name}-{k}{key}", f"{name}, {k} blocks kept{where}", None, [*before, line])


def run_points(args, panels, script):
    """Run all points of a figure. Return a list of {"panel", "method", "k", "top1", "run"}; None after a dry run.

    panels: {title: line of the training}. "top1" and "run" are lists over seeds.
    """
    if wrong := [k for k in args.blocks if not 0 <= k <= DEPTH]:
        raise UserError(f"--blocks {' '.join(map(str, wrong))}: the models have {DEPTH} blocks, so 0 to {DEPTH}")
    methods, tuning = starts(args), next(iter(panels.values()))
    for name in methods:
        if own := moco_arguments(tuning, name):
            print0(f"{name}: fine-tuned with {own}, for its name has moco in it")
    loaded, told = given_weights(args), settings_told(args, tuning.split()[0])
    scratch, whole = options.to_argv(scratch_settings(loaded, told)), whole_encoders(methods, loaded, told)
    rows = {(title, name, k): point_row(line, title, name, k, *methods[name], scratch, name in whole)
            for title, line in panels.items() for name in methods for k in range(DEPTH + 1)}
    points = {point: row for point, row in rows.items() if point[-1] in args.blocks}
    every = list({row.key: row for row in rows.values()}.values())  # all k, so that --set may name any of their scripts
    chosen = options.replaced(args, rows=[row.key for row in points.values()])
    results, without = tables.run_rows(every, chosen, (), script)
    if args.dry_run:
        return None
    tables.require_weights(without)
    last = {key: [lines[-1] for lines in seeds] for key, seeds in results.items()}
    return [{"panel": title, "method": name, "k": k, "top1": [result["top1"] for result in last[row.key]],
             "run": [Path(result["run"]).name for result in last[row.key]]}
            for (title, name, k), row in points.items()]


def table(points):
    """Format top-1, mean and spread over seeds, as Markdown: a row per panel and method, a column per k."""
    ks = sorted({point["k"] for point in points})
    cells = {(p["panel"], p["method"], p["k"]): report.mean_std(p["top1"]) for p in points}
    curves = dict.fromkeys((p["panel"], p["method"]) for p in points)
    first = 0 if any(panel for panel, _ in curves) else 1  # Figure 2 has one panel, without a name
    return report.markdown([*["data", "method"][first:], *(f"k = {k}" for k in ks)],
                           [[*curve[first:], *(cells[(*curve, k)] for k in ks)] for curve in curves])


def draw_accuracies(points):
    """Draw top-1 over k: a panel per data set, a curve per method, error bars of one standard deviation over seeds."""
    panels = list(dict.fromkeys(point["panel"] for point in points))
    figure, axes = report.subplots(1, len(panels), figsize=(2.7 * len(panels) + 0.6, 2.7), squeeze=False)
    methods = dict.fromkeys(point["method"] for point in points)
    for panel, title in zip(axes[0], panels):
        for method, (style, colour) in zip(methods, line_styles()):
            curve = [p for p in points if (p["panel"], p["method"]) == (title, method)]
            spread = [np.std(p["top1"], ddof=1) if len(p["top1"]) > 1 else np.nan for p in curve]
            panel.errorbar([p["k"] for p in curve], [np.mean(p["top1"]) for p in curve], spread, fmt=style,
                           color=colour, markersize=4, linewidth=1.2, capsize=2, label=method)
        panel.set(title=title, xlabel="leading blocks kept, k", xticks=sorted({p["k"] for p in points}))
    axes[0, 0].set_ylabel("top-1 (%)")
    axes[0, 0].legend(fontsize=8)
    return figure


def save(args, item, points):
    """Write the points as <output>/<item>/<item>.json, and their table as .md."""
    text = f"{item}, {report.origin(args.preset, args.data)}: top-1 (%) over the number k of leading blocks kept"
    text = "\n\n".join([text, table(points), tables.NOTES["demo"] if args.preset == "demo" else ""]).rstrip()
    report.write_text(Path(args.output) / item, item, {"item": item, "preset": args.preset, "data": args.data,
                                                       "seeds": args.seeds, "points": points}, text)
