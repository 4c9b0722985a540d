"""Appendix A.3: MoCo-v3's settings for ViT-Tiny, one changed at a time, accuracy after fine-tuning.

    python appendix/a3_mocov3_settings.py                                         # demo: 3 rows
    python appendix/a3_mocov3_settings.py --preset small --data-path DIR --rows base stop-grad token
    torchrun --nproc-per-node=8 appendix/a3_mocov3_settings.py --data-path IMAGENET

The paper's code leaves the patch embedding trainable (the official MoCo-v3 freezes it, for stability), fine-tunes with
layer decay 0.75 and averages the patch tokens; arXiv v1's code read the class token. Only the chosen setting's accuracy
is in a source that we read.
"""
from common import options, tables
from common.tables import PREVIOUS, Row
from sec3_benchmark.accuracy_table import accuracy_table
from sec3_benchmark.downstream import MOCO_FINETUNING

PRETRAIN, FINETUNE = "sec3_benchmark.pretrain_mocov3", "sec3_benchmark.finetune"
DEMO = ("base", "stop-grad", "token")


def row(key, name, published=None, pretrain=None, presets=options.PRESET_NAMES, **finetune):
    stages = ((PRETRAIN, pretrain or {}), (FINETUNE, {"init": PREVIOUS, **MOCO_FINETUNING, **finetune}))
    return Row(key, name, published, stages, presets=presets)


ROWS = [
    row("base", "chosen: trainable patch embedding, layer decay 0.75, average pooling", 76.8),
    row("stop-grad", "patch embedding frozen", pretrain={"stop_grad_conv1": True}),
    row("decay-0.65", "layer decay 0.65 in fine-tuning", layer_decay=0.65),
    row("decay-0.85", "layer decay 0.85 in fine-tuning", layer_decay=0.85),
    row("token", "class token instead of average pooling", global_pool="token"),
    row("100ep", "100 epochs of pre-training", pretrain={"epochs": 100}, presets=("small", "paper")),
]


def build_parser():
    return tables.make_parser(__doc__, ROWS, DEMO)


def main(args):
    """Writes a3.json and a3.md; returns the rows."""
    return accuracy_table("a3", ROWS, DEMO, args)


if __name__ == "__main__":
    options.start(main, build_parser(), parse=tables.parse)
