"""Figure 4: how many leading pre-trained blocks are worth keeping on small data sets? Top-1 over k, MAE and MoCo-v3.

    python sec4_analysis/fig4_leading_blocks_small_data.py                                # demo: k = 0, 6, 12
    python sec4_analysis/fig4_leading_blocks_small_data.py --data-path IMAGENET --dataset-path ROOT --seeds 0 1 2
    python sec4_analysis/fig4_leading_blocks_small_data.py --preset small --datasets A B --dataset-path ROOT \\
           --models MAE=mae.pt MoCo-v3=moco.pt

--data-path is what the methods pre-train on; --datasets names what is transferred to, see
sec3_benchmark/downstream_sets.py.
The paper's claim (Section 4.1): accuracy rises with k everywhere, more so the smaller the set, so high layers matter
there; both methods are equal at small k and MoCo-v3 is ahead at large k. Writes fig4.json, .md and draws fig4.png.
"""
from common import options
from common.errors import UserError
from sec3_benchmark import downstream
from sec4_analysis import leading_blocks

TRANSFER = "sec3_benchmark.transfer"


def build_parser():
    parser = options.make_parser(__doc__)
    options.add_data(parser)
    downstream.add_datasets(parser)
    leading_blocks.add_arguments(parser)
    options.add_execution(parser)
    return parser


def panels(args):
    """A panel for each data set."""
    if downstream.COCO in (args.datasets or ()):
        raise UserError(f"--datasets {downstream.COCO}: Figure 4 is about classification; leave it out "
                        f"(sec3_benchmark/detect.py trains on it)")
    return {downstream.title(name): {"dataset": name, "dataset_path": args.dataset_path}
            for name in downstream.chosen_sets(args)}


def main(args):
    """Runs, writes and draws; returns the points {"panel", "method", "k", "top1" for each seed, ...}."""
    return leading_blocks.figure(args, "fig4", TRANSFER, panels)


if __name__ == "__main__":
    options.start(main, build_parser(), parse=leading_blocks.parse)
