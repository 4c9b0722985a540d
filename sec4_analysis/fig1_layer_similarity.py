"""Figure 1: how alike are the layers of pre-trained models and of the supervised one? CKA heat maps and diagonals.

    python sec4_analysis/fig1_layer_similarity.py                                                 # demo: its own runs
    python sec4_analysis/fig1_layer_similarity.py --data-path IMAGENET --models DeiT-Tiny=deit.pt MAE-Tiny=mae.pt
    python sec4_analysis/fig1_layer_similarity.py --from-numbers outputs/fig1/fig1.npz

The paper's claim (Section 4.1): MAE-Tiny is like DeiT-Tiny in low layers and unlike it in high ones; MoCov3-Tiny is
like it nearly everywhere. Index 0, called the patch embedding, is the first norm1 output, as in the authors' script.
Writes fig1.npz, .json, .md, and draws fig1.png from the first.
"""
from common import options
from sec4_analysis import similarity, study

ROWS = (study.SUPERVISED, study.MAE_ROW, study.MOCOV3)


def build_parser():
    return similarity.make_parser(__doc__)


def main(args):
    """Measures, writes and draws; returns {model: CKA (its layers, layers of the first model)}."""
    return similarity.figure(args, "fig1", lambda: study.sources(args, ROWS, "fig1"))


if __name__ == "__main__":
    options.start(main, build_parser(), parse=similarity.parse)
