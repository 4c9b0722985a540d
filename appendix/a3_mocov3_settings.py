"""Appendix A.3: MoCo-v3's settings for ViT-Tiny, changed one at a time; fine-tuned accuracy.

    python appendix/a3_mocov3_settings.py                                         # demo: 3 rows
    python appendix/a3_mocov3_settings.py --preset small --data-path DIR --rows base stop-grad token
    torchrun --nproc-per-node=8 appendix/a3_mocov3_settings.py --data-path IMAGENET

The paper's code leaves the patch embedding trainable (the official MoCo-v3 freezes it, for stability), fine-tunes with
layer decay 0.75 and averages the patch tokens; the code of arXiv v1 used the class token. The sources that we read give
the accuracy of the chosen setting only.
"""
from common import entry, tables
from common.rows import Row
from sec3_benchmark.accuracy_table import accuracy_table
from sec3_benchmark.downstream import MOCO_FINETUNING

DEMO = ("base", "stop-grad", "token")


def row(key, name, pretraining="", tuning="", published=None, **more):
    """Return a row with extra arguments for pre-training and for fine-tuning; the latter follow MOCO_FINETUNING."""
    lines = [f"sec3_benchmark/pretrain_mocov3.py {pretraining}".rstrip(),
             f"sec3_benchmark/finetune.py --init {{previous}} {MOCO_FINETUNING} {tuning}".rstrip()]
    return Row(key, name, published, lines, **more)


ROWS = [
    row("base", "chosen: trainable patch embedding, layer decay 0.75, average pooling", published=76.8),
    row("stop-grad", "patch embedding frozen", "--stop-grad-conv1"),
    row("decay-0.65", "layer decay 0.65 in fine-tuning", tuning="--layer-decay 0.65"),
    row("decay-0.85", "layer decay 0.85 in fine-tuning", tuning="--layer-decay 0.85"),
    row("token", "class token instead of average pooling", tuning="--global-pool token"),
    row("100ep", "100 epochs of pre-training", "--epochs 100", presets=("small", "paper")),
]


def build_parser():
    return tables.make_parser(__doc__, ROWS, DEMO)


def main(args):
    """Run the chosen rows, write a3.json and a3.md, and return the rows."""
    return accuracy_table("a3", ROWS, DEMO, args)


if __name__ == "__main__":
    entry.run_script(main, build_parser(), parse=tables.parse)
