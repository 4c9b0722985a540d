"""Appendix B.5: DINO and SimMIM beside MAE and MoCo-v3: accuracy of fine-tuning, linear probe and nearest neighbours.

    python appendix/b5_dino_simmim.py                                                     # demo: 3 rows, 7 minutes
    python appendix/b5_dino_simmim.py --preset small --data-path DIR --set pretrain_dino.epochs=40 finetune.epochs=15
    torchrun --nproc-per-node=8 appendix/b5_dino_simmim.py --data-path IMAGENET
    python appendix/b5_dino_simmim.py --preset small --data-path DIR --set pretrain_mae.model=vit_small \\
        pretrain_dino.model=vit_small pretrain_simmim.model=vit_small_simmim pretrain_mocov3.model=vit_small \\
        finetune.layer_decay=0.75                                                         # ViT-Small

Published are the fine-tuned accuracies, and 23.4 for MAE's linear probe. The sources that we read do not give the
recipes of the paper's DINO-Tiny and SimMIM-Tiny: pretrain_dino.py and pretrain_simmim.py say which settings are ours.
The cost of an epoch differs between the rows: "crops" tells how many crops of an image the encoder processes in an
epoch. MAE and MoCo-v3 are the runs of Table 1. Writes b5.json and b5.md.
"""
from common import entry, report, tables
from common.rows import Row
from sec3_benchmark.accuracy_table import duration, summary, with_changes
from sec3_benchmark.downstream import MOCO_FINETUNING

DEMO = ("mae", "simmim", "dino")


def row(key, name, published, pretraining, crops, pooling="token", linear=None, tuning=""):
    """Return a row of four stages: pre-training, kNN probe, linear probe, fine-tuning.

    Both probes pass the pre-trained weights on, so that the fine-tuning starts from them.
    """
    probe = "--init {previous} --pooling " + pooling
    return Row(key, name, published, [pretraining, f"appendix/knn_probe.py {probe}",
                                      f"appendix/linear_probe.py {probe}",
                                      f"sec3_benchmark/finetune.py --init {{previous}} {tuning}".rstrip()],
               extra={"crops": crops, "published_linear": linear})


ROWS = [
    row("mae", "MAE", 78.0, "sec3_benchmark/pretrain_mae.py", "1, a quarter of it", linear=23.4),
    row("mocov3", "MoCo-v3", 76.8, "sec3_benchmark/pretrain_mocov3.py", "2, and 2 by the momentum encoder",
        tuning=MOCO_FINETUNING),
    row("simmim", "SimMIM", 77.9, "appendix/pretrain_simmim.py", "1", pooling="avg"),
    row("dino", "DINO", 77.2, "appendix/pretrain_dino.py", "2 and 8 small (demo, laptop: 4), and 2 by the teacher"),
]
COLUMNS = {
    "pre-training": lambda row: row["name"],
    "crops": lambda row: row["crops"],
    "published": lambda row: row["published"],
    "fine-tuned": lambda row: report.mean_std(row["measured"]),
    "published, linear": lambda row: row["published_linear"] or "",
    "linear": lambda row: report.mean_std(row["linear"]),
    "kNN": lambda row: report.mean_std(row["knn"]),
    "seeds": lambda row: row["seeds"] or "",
    "pre-training time": lambda row: duration(row["pretrain_hours"]),
}


def build_parser():
    return tables.make_parser(__doc__, ROWS, DEMO)


def main(args):
    """Run the chosen rows, write b5.json and b5.md, and return the rows."""
    results, _ = tables.run_rows(ROWS, args, DEMO, script="b5")
    if args.dry_run:
        return []
    rows = []
    for row in ROWS:
        seeds = results.get(row.key, [])  # the results of the four stages for each seed
        rows.append({**summary(with_changes(row, args), seeds), "knn": [stages[1]["top1"] for stages in seeds],
                     "linear": [stages[2]["top1"] for stages in seeds]})
    report.write_table("b5", args, COLUMNS, rows, notes=[
        "Probes read the class token after the last norm; of SimMIM, whose loss leaves it idle, the mean of the "
        "patches. MoCo-v3 is fine-tuned with layer decay 0.75, as the authors did.", tables.NOTES[args.preset]])
    return rows


if __name__ == "__main__":
    entry.run_script(main, build_parser(), parse=tables.parse)
