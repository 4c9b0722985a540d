"""Appendix A.2: MAE's decoder, mask ratio and target for ViT-Tiny, changed one at a time; fine-tuned accuracy.

    python appendix/a2_mae_settings.py                                            # demo: 3 rows, 5 minutes
    python appendix/a2_mae_settings.py --preset small --data-path DIR --rows base depth-2 depth-8 ratio-0.9
    torchrun --nproc-per-node=8 appendix/a2_mae_settings.py --data-path IMAGENET --set finetune.epochs=100

The paper chose a decoder of one block of width 96 and a mask ratio of 75 % (the official MAE: 8 blocks of width 512).
The sources that we read do not give its accuracies for the other settings.
"""
from common import entry, tables
from common.rows import Row
from sec3_benchmark.accuracy_table import accuracy_table

DEMO = ("base", "depth-2", "ratio-0.9")
# Width of the decoder -> number of heads. The choice is ours: the paper's decoder has 32 channels per head, and 48 is
# the width of vit_demo's own decoder.
HEADS = {48: 3, 192: 6, 384: 12}


def row(key, name, words="", published=None):
    lines = [f"sec3_benchmark/pretrain_mae.py {words}".rstrip(), "sec3_benchmark/finetune.py --init {previous}"]
    return Row(key, name, published, lines)


ROWS = [
    row("base", "chosen: depth 1, width 96 (vit_demo: 48), 75 %, normalised target", published=78.0),
    *(row(f"depth-{depth}", f"decoder of {depth} blocks", f"--decoder-depth {depth}") for depth in (2, 4, 8)),
    *(row(f"width-{width}", f"decoder {width} wide", f"--decoder-dim {width} --decoder-heads {heads}")
      for width, heads in HEADS.items()),
    *(row(f"ratio-{ratio}", f"{ratio:.0%} of the patches masked", f"--mask-ratio {ratio}")
      for ratio in (0.5, 0.6, 0.9)),
    row("raw", "raw pixels as target", "--raw-pixels"),
]


def build_parser():
    return tables.make_parser(__doc__, ROWS, DEMO)


def main(args):
    """Run the chosen rows, write a2.json and a2.md, and return the rows."""
    return accuracy_table("a2", ROWS, DEMO, args)


if __name__ == "__main__":
    entry.run_script(main, build_parser(), parse=tables.parse)
