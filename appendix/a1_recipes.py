"""Appendix A.1: the "ori." recipe turned into the improved one, change by change; layer decay; longer fine-tuning.

    python appendix/a1_recipes.py                                            # demo: 3 rows from scratch, 2 minutes
    python appendix/a1_recipes.py --preset small --data-path DIR --rows scratch-ori scratch-mixup scratch-impr
    torchrun --nproc-per-node=8 appendix/a1_recipes.py --data-path IMAGENET  # every row, from scratch and from MAE-Tiny

Each row keeps the changes of the rows above it: weaker augmentation and regularisation suit a small network. The
sources that we read publish only the first and the last recipe (74.5 and 75.8 from scratch, 76.1 and 78.0 from MAE) and
the longest fine-tuning. They do not give the accuracies of the steps between.
"""
from common import entry, tables
from common.rows import Row
from sec3_benchmark.accuracy_table import accuracy_table

MAE = "sec3_benchmark/pretrain_mae.py"
SCRATCH, FINETUNE = "sec3_benchmark/finetune.py", "sec3_benchmark/finetune.py --init {previous}"
CHANGES = [  # (key, name, arguments of the change); cumulative, so that the last is the improved recipe
    ("ori", "ori. recipe", "--recipe ori"),
    ("randaugment", "+ RandAugment m9 -> m10", "--randaugment rand-m10-mstd0.5-inc1"),
    ("erasing", "+ no random erasing", "--erasing 0"),
    ("mixup", "+ mixup 0.8 -> 0.2, no CutMix", "--mixup 0.2 --cutmix 0"),
    ("smoothing", "+ no label smoothing", "--smoothing 0"),
    ("impr", "+ no drop path = impr. recipe", "--drop-path 0"),
]
PUBLISHED = {"scratch-ori": 74.5, "scratch-impr": 75.8, "mae-ori": 76.1, "mae-impr": 78.0}
DEMO = ("scratch-ori", "scratch-mixup", "scratch-impr")


def rows_from(start, *lines):
    """Return a row for each of CHANGES. lines: the command lines of the stages; the last one is the fine-tuning."""
    *before, tuning = lines
    rows, arguments = [], ""
    for key, name, change in CHANGES:
        arguments += f" {change}"
        last = tuning if key == "impr" else tuning + arguments  # "impr" is the default: the same run as in Table 1
        rows.append(Row(f"{start}-{key}", f"{start}: {name}", PUBLISHED.get(f"{start}-{key}"), [*before, last]))
    return rows


ROWS = [
    *rows_from("scratch", SCRATCH),
    Row("scratch-no-layer-decay", "scratch: impr. recipe, no layer decay", None, [f"{SCRATCH} --layer-decay 1"],
        note="which layer decay the paper's runs from scratch had is not stated; 0.85 is the default of its code"),
    *rows_from("mae", MAE, FINETUNE),
    *(Row(f"mae-{epochs}", f"mae: impr. recipe, {epochs} epochs of fine-tuning", published,
          [MAE, f"{FINETUNE} --epochs {epochs}"], presets=("paper",))
      for epochs, published in ((100, None), (1000, 78.5))),
]


def build_parser():
    return tables.make_parser(__doc__, ROWS, DEMO)


def main(args):
    """Run the chosen rows, write a1.json and a1.md, and return the rows."""
    return accuracy_table("a1", ROWS, DEMO, args)


if __name__ == "__main__":
    entry.run_script(main, build_parser(), parse=tables.parse)
