"""Figure 7: which layer's attention should be distilled? Top-1 after fine-tuning, and what each choice costs.

    python sec5_distill/fig7_distilled_layer.py                                               # demo
    python sec5_distill/fig7_distilled_layer.py --preset small --data-path DIR --seeds 0 1 2
    python sec5_distill/fig7_distilled_layer.py --data-path IMAGENET --layers none 1 2 3 4 5 6 7 8 9 10 11 12 all
    python sec5_distill/fig7_distilled_layer.py --data-path IMAGENET --dry-run                # the commands alone

The paper's claim (Section 5): distilling the last layer alone is best. A lower layer is worse, and so are all layers
together, which also slows down pre-training. The paper fine-tunes for 100 epochs and gives no numbers but in its plot.
Writes fig7.json, .md, and draws fig7.png from the .json.
"""
import json
import statistics
from pathlib import Path

from common import entry, options, report, tables
from common.errors import UserError
from common.ranges import Int
from common.rows import Row
from sec5_distill import pretrain_dmae

DEPTH = 12  # that of every ViT in the paper
LAYERS = ("none", *map(str, range(1, DEPTH + 1)), "all")


def build_parser():
    parser = options.make_parser(__doc__)
    options.add_data(parser)
    parser.add_argument("--layers", nargs="+", default=["none", "4", "8", "12", "all"], metavar="LAYER",
                        help=f"1 to {DEPTH}, none (plain MAE) or all")
    parser.add_argument("--seeds", type=Int(0), nargs="+", default=[0], help="each layer is run once per seed")
    tables.add_rows(parser)
    report.add_pictures(parser, ".json")
    options.add_execution(parser)
    return parser


def row_of(layer, preset):
    """Return the row that pre-trains with this layer distilled (1 to 12, none or all), then fine-tunes."""
    if layer not in LAYERS:
        raise UserError(f"--layers {layer}: a layer is 1 to {DEPTH}, none or all")
    blocks = range(1, DEPTH + 1) if layer == "all" else [layer]
    pretraining = pretrain_dmae.mae_beside(preset) if layer == "none" else \
        f"sec5_distill/pretrain_dmae.py --distill-blocks {' '.join(map(str, blocks))}"
    epochs = " --epochs 100" if preset == "paper" else ""
    name = layer if layer in ("none", "all") else f"layer {layer}"
    return Row(f"layer-{layer}", name, None, [pretraining, "sec3_benchmark/finetune.py --init {previous}" + epochs])


def summary(row, results):
    """Return a row of the table. results: for each seed the results of pre-training and fine-tuning."""
    return {"name": row.name, "published": None, "measured": [tuned["top1"] for _, tuned in results],
            "seconds_per_step": [seconds_per_step(pretrained) for pretrained, _ in results], "seeds": len(results),
            "run": [Path(tuned["run"]).name for _, tuned in results]}


def seconds_per_step(result):
    """Return the measured time of one step of a pre-training, loading of the images included."""
    settings = json.loads((Path(result["run"]) / "settings.json").read_text())
    return settings["batch_size"] / result["images_per_second"]


COLUMNS = {
    "distilled": lambda row: row["name"],
    "top-1 after fine-tuning": lambda row: report.mean_std(row["measured"]),
    "seeds": lambda row: row["seeds"],
    "s per step of pre-training": lambda row: f"{statistics.mean(row['seconds_per_step']):.3f}",
}


def draw(rows):
    """Draw bars of top-1 and of the time of a step, low layers first, with a dot per seed.

    As differences of top-1 are small, its axis does not start at 0; its title says where it starts.
    """
    rows = sorted(rows, key=lambda row: LAYERS.index(row["name"].removeprefix("layer ")))
    names = [row["name"] for row in rows]
    figure, axes = report.subplots(1, 2, figsize=(2.4 + 0.75 * len(rows), 2.8))
    for axis, key, digits in ((axes[0], "measured", 1), (axes[1], "seconds_per_step", 2)):
        for x, row in enumerate(rows):
            mean = statistics.mean(row[key])
            axis.bar(x, mean, 0.7, color=report.COLOURS[5 if row["name"] == "none" else 0])
            axis.annotate(f"{mean:.{digits}f}", (x, max(row[key])), (0, 3), textcoords="offset points", ha="center",
                          fontsize=8)
            if len(row[key]) > 1:
                axis.plot([x] * len(row[key]), row[key], "o", color=report.COLOURS[6], markersize=3)
        axis.set_xticks(range(len(rows)), [name.removeprefix("layer ") for name in names])
        axis.set_xlabel("distilled layer")
    values = [value for row in rows for value in row["measured"]]
    margin = 0.3 * (max(values) - min(values)) + 0.2
    lowest = max(0, min(values) - margin)
    axes[0].set(title=f"this axis starts at {lowest:.1f}" if lowest else "", ylabel="top-1 after fine-tuning (%)",
                ylim=(lowest, max(values) + margin))
    axes[1].set(ylabel="pre-training (s per step)", ylim=(0, 1.15 * axes[1].get_ylim()[1]))
    return figure


def measure(args):
    """Run the chosen layers; write fig7.json and fig7.md; return the rows of the table, none after a dry run."""
    rows = [row_of(layer, args.preset) for layer in dict.fromkeys(args.layers)]
    every = [row_of(layer, args.preset) for layer in LAYERS]  # all, so that --set may name any of their scripts
    results, without = tables.run_rows(every, options.replaced(args, rows=[row.key for row in rows]), (), "fig7")
    if args.dry_run:
        return []
    tables.require_weights(without)
    rows = [summary(row, results[row.key]) for row in rows]
    report.write_table("fig7", args, COLUMNS, rows,
                       notes=["No source gives the numbers of the paper's plot.", tables.NOTES[args.preset]])
    return rows


def main(args):
    """Measure, write and draw; return the rows of the table."""
    rows = report.read_numbers(args.from_numbers, "fig7", "rows") if args.from_numbers else measure(args)
    report.draw_numbers(args, "fig7", draw, rows)
    return rows


if __name__ == "__main__":
    entry.run_script(main, build_parser(), parse=tables.parse)
