"""Figure 4: how many leading pre-trained blocks are worth keeping on small data sets? Top-1 over k, MAE and MoCo-v3.

    python sec4_analysis/fig4_leading_blocks_small_data.py                                # demo: k = 0, 6, 12
    python sec4_analysis/fig4_leading_blocks_small_data.py --data-path IMAGENET --dataset-path ROOT --seeds 0 1 2
    python sec4_analysis/fig4_leading_blocks_small_data.py --preset small --datasets A B --dataset-path ROOT \\
           --models MAE=mae.pt MoCo-v3=moco.pt

--data-path: what the methods pre-train on; --datasets: what they are transferred to, see
sec3_benchmark/downstream_sets.py.
The paper's claim (Section 4.1): accuracy rises with k on every set, and more on smaller ones, so high layers matter
there; both methods are equal at small k, and MoCo-v3 is ahead at large k. Writes fig4.json, .md and draws fig4.png.
"""
import shlex

from common import entry, options, report
from common.errors import UserError
from sec3_benchmark import downstream
from sec4_analysis import leading_blocks, study


def build_parser():
    parser = options.make_parser(__doc__)
    options.add_data(parser)
    downstream.add_datasets(parser)
    leading_blocks.add_arguments(parser)
    options.add_execution(parser)
    return parser


def panels(args):
    """Return {title: line of the training}, a panel per data set."""
    if downstream.COCO in (args.datasets or ()):
        raise UserError(f"--datasets {downstream.COCO}: Figure 4 is about classification; leave it out "
                        f"(sec3_benchmark/detect.py trains on it)")
    return {downstream.title(name): f"sec3_benchmark/transfer.py --dataset {shlex.quote(name)}"
            for name in downstream.chosen_sets(args)}


def main(args):
    """Run, write and draw; return the points {"panel", "method", "k", "top1", ...}, [] after a dry run."""
    if args.from_numbers:
        points = report.read_numbers(args.from_numbers, "fig4", "points")
    else:
        study.prepare(args, "fig4")  # before chosen_sets, in which ranks wait for the one that downloads
        points = leading_blocks.run_points(args, panels(args), "fig4")
        if args.dry_run:
            return []
        leading_blocks.save(args, "fig4", points)
    report.draw_numbers(args, "fig4", leading_blocks.draw_accuracies, points)
    return points


if __name__ == "__main__":
    entry.run_script(main, build_parser(), parse=leading_blocks.parse)
