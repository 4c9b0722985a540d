"""Appendix A.5: detection with the two protocols that the sources name, as settings of detect.py.

    python appendix/a5_detection_settings.py                                              # demo: generated scenes
    python appendix/a5_detection_settings.py --dataset-path COCO --init FILE
    python appendix/a5_detection_settings.py --dataset-path COCO --init FILE --dry-run    # the commands

The paper's text says that the protocol follows Li et al. 2021. The code that the authors released, and with it the
published numbers (MAE-Tiny: box AP 39.9, mask AP 35.4), uses ViTDet's. The settings of Li et al. are those of a public
re-implementation (MIMDet) for ViT-B, because no source shows the paper's own table. Two of them are not adopted: the
relative position tables, shared and without weight decay there, decomposed and decayed here; and 25 and 50 epochs.
"""
from common import entry, options, report, tables
from common.rows import Row
from sec3_benchmark.accuracy_table import duration

DETECT = "sec3_benchmark/detect.py"
PUBLISHED = {"box_ap": 39.9, "mask_ap": 35.4}  # MAE-Tiny with ViTDet's settings (ICML slides, code page)
FORM = f"{DETECT} --pyramid topdown --schedule cosine --drop-path 0.1 --weight-decay 0.1"
ROWS = [
    Row("vitdet", "ViTDet (released code)", PUBLISHED, [DETECT]),
    Row("li2021", "Li et al. 2021", {},  # a quarter of an epoch of 118,000 images is 461 iterations
        [f"{FORM} --img-size 1024 --window 16 --base-lr 8e-5 --warmup-iterations 461"], presets=("paper",)),
    Row("li2021-form", "Li et al. 2021, at the preset's size and rate", {}, [FORM],
        presets=("demo", "laptop", "small")),
]
NOTES = {"demo": tables.NOTES["demo"], **dict.fromkeys(
    ("laptop", "small"), "Compare the rows with each other, not with the published numbers.")}
DEMO = ("vitdet", "li2021-form")


def build_parser():
    parser = options.make_parser(__doc__)
    group = parser.add_argument_group("data and start")
    group.add_argument("--dataset-path", metavar="DIR", help="COCO, or a folder that holds it as coco/")
    group.add_argument("--init", metavar="CHECKPOINT", help="pre-trained ViT, a file or timm:NAME; default: none")
    options.add_images(group, img_size=640)
    tables.add_rows(parser, ROWS, DEMO)
    options.add_execution(parser)
    return parser


def column(key):
    return lambda row: f"{row['published'].get(key, '-')} / {report.mean_std(row['measured'][key])}"


COLUMNS = {"protocol": lambda row: row["name"], "box AP": column("box_ap"), "mask AP": column("mask_ap"),
           "training": lambda row: duration([seconds / 3600 for seconds in row["seconds"]])}


def main(args):
    """Run the chosen rows, write a5_detection.json and .md, and return the rows."""
    canvas = [f"detect.img_size=[{','.join(map(str, args.img_size))}]"] if "img_size" in args.given else []
    data = "coco" if args.dataset_path else "scenes"  # for the table; detect.py takes its canvas from --set alone
    args = options.replaced(args, data=data, data_path=None, set=[*canvas, *args.set])
    results, without = tables.run_rows(ROWS, args, DEMO, "a5_detection")
    if args.dry_run:
        return []
    rows = []
    for row in ROWS:
        final = [stages[-1] for stages in results.get(row.key, [])]
        measured = {key: [result[key] for result in final] for key in ("box_ap", "mask_ap")} if final else {}
        published = row.published if final else ", ".join(f"{key} {value}" for key, value in row.published.items())
        rows.append({"name": row.name, "published": published, "measured": measured, "seeds": len(final),
                     "seconds": [result["seconds"] for result in final], "run": [result["run"] for result in final],
                     "status": "run" if final else without.get(row.key, "not chosen")})
    report.write_table("a5_detection", args, COLUMNS, rows,
                       notes=["Each cell: published (MAE-Tiny, COCO val2017) / measured.", NOTES.get(args.preset)])
    return rows


if __name__ == "__main__":
    entry.run_script(main, build_parser(), parse=tables.parse)
