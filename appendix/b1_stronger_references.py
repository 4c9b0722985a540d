"""Appendix B.1: Figure 1 with a stronger supervised reference than DeiT-Tiny.

    python appendix/b1_stronger_references.py                                               # demo: a wider reference
    python appendix/b1_stronger_references.py --preset small --data-path DIR                # ViT-Small, trained here
    python appendix/b1_stronger_references.py --data-path IMAGENET --models \\
        DeiT-Small=timm:deit_small_patch16_224.fb_in1k MAE-Tiny=mae.pt MoCov3-Tiny=moco.pt --num-heads-of DeiT-Small=6

The first model is the reference; CKA compares layers of different widths. The sources that we read do not say which
references the paper used, only that the structure of the similarities stays the same. Writes b1.npz, .json, .md and
b1.png.
"""
from common import entry, report
from common.rows import Row
from sec4_analysis import similarity, study

# The model of the reference, wider than the preset's student
WIDER = {"demo": "vit_tiny", "laptop": "vit_tiny", "small": "vit_small", "paper": "vit_small"}


def build_parser():
    return study.make_parser(__doc__)


def rows_of(args):
    """Return the rows of Figure 1, preceded by a wider supervised reference."""
    model = WIDER[args.preset]
    decay = " --layer-decay 0.75" if model == "vit_small" else ""  # as in the authors' training of ViT-Small
    reference = Row("stronger", f"supervised {model}", None, [f"sec3_benchmark/finetune.py --model {model}{decay}"])
    return (reference, study.SUPERVISED, study.MAE_ROW, study.MOCOV3)


def main(args):
    """Measure and draw; return {model: CKA (its layers, layers of the first)}, {} after a dry run or on ranks > 0."""
    if args.from_numbers:
        arrays = report.read_numbers(args.from_numbers, "b1")
    else:
        arrays = similarity.compare(args, "b1", study.checkpoints(args, rows_of(args), "b1"))
    report.draw_numbers(args, "b1", similarity.draw_heat_maps, arrays)
    return arrays


if __name__ == "__main__":
    entry.run_script(main, build_parser(), parse=study.parse)
