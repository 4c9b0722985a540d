"""Figure 2: how many leading pre-trained blocks are worth keeping for ImageNet? Top-1 over k, MAE and MoCo-v3.

    python sec4_analysis/fig2_leading_blocks.py                                            # demo: k = 0, 6, 12
    python sec4_analysis/fig2_leading_blocks.py --data-path IMAGENET --seeds 0 1 2         # the paper: 100 epochs
    python sec4_analysis/fig2_leading_blocks.py --preset small --data-path DIR --models MAE=mae.pt MoCo-v3=moco.pt
    python sec4_analysis/fig2_leading_blocks.py --data-path IMAGENET --dry-run             # the commands alone

The paper's claim (Section 4.1): a few leading blocks already give the gain; further ones add little for MAE and harm
MoCo-v3. Writes fig2.json, .md and draws fig2.png from the .json.
"""
from common import entry, options, report
from sec4_analysis import leading_blocks, study


def build_parser():
    parser = options.make_parser(__doc__)
    options.add_data(parser)
    leading_blocks.add_arguments(parser)
    options.add_execution(parser)
    return parser


def panels(args):
    """Return {title: line of the training}: one panel, fine-tuning on all images, for 100 epochs in the paper."""
    return {"": "sec3_benchmark/finetune.py" + (" --epochs 100" if args.preset == "paper" else "")}


def main(args):
    """Run, write and draw; return the points {"method", "k", "top1" of each seed, ...}, [] after a dry run."""
    if args.from_numbers:
        points = report.read_numbers(args.from_numbers, "fig2", "points")
    else:
        study.prepare(args, "fig2")
        points = leading_blocks.run_points(args, panels(args), "fig2")
        if args.dry_run:
            return []
        leading_blocks.save(args, "fig2", points)
    report.draw_numbers(args, "fig2", leading_blocks.draw_accuracies, points)
    return points


if __name__ == "__main__":
    entry.run_script(main, build_parser(), parse=leading_blocks.parse)
