"""Figure 1: how alike are the layers of pre-trained models and of the supervised one? CKA heat maps and diagonals.

    python sec4_analysis/fig1_layer_similarity.py                                                 # demo: its own runs
    python sec4_analysis/fig1_layer_similarity.py --data-path IMAGENET --models DeiT-Tiny=deit.pt MAE-Tiny=mae.pt
    python sec4_analysis/fig1_layer_similarity.py --from-numbers outputs/fig1/fig1.npz

The paper's claim (Section 4.1): MAE-Tiny is similar to DeiT-Tiny in low layers and not in high ones; MoCov3-Tiny is
similar to it in nearly all. Layer 0, which the paper calls patch embedding, is the output of the first norm1, as in the
authors' script. Writes fig1.npz, .json, .md, and draws fig1.png from the .npz.
"""
from common import entry, report
from sec4_analysis import similarity, study

ROWS = (study.SUPERVISED, study.MAE_ROW, study.MOCOV3)


def build_parser():
    return study.make_parser(__doc__)


def main(args):
    """Measure, write and draw; return {model: CKA (its layers, layers of the first)}, {} if nothing was measured."""
    if args.from_numbers:
        arrays = report.read_numbers(args.from_numbers, "fig1")
    else:
        arrays = similarity.compare(args, "fig1", study.checkpoints(args, ROWS, "fig1"))
    report.draw_numbers(args, "fig1", similarity.draw_heat_maps, arrays)
    return arrays


if __name__ == "__main__":
    entry.run_script(main, build_parser(), parse=study.parse)
