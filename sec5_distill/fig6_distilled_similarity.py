"""Figure 6: does distillation make the student's high layers like the supervised ones? CKA with DeiT-Tiny.

    python sec5_distill/fig6_distilled_similarity.py                                          # demo: its own runs
    python sec5_distill/fig6_distilled_similarity.py --preset small --data-path DIR
    python sec5_distill/fig6_distilled_similarity.py --data-path IMAGENET --models DeiT-Tiny=deit.pt \\
        MAE-Base=timm:vit_base_patch16_224.mae MAE-Tiny=mae.pt D-MAE-Tiny=dmae.pt
    python sec5_distill/fig6_distilled_similarity.py --from-numbers outputs/fig6/fig6.npz

The paper's claim (Section 5): the teacher's layers are alike to the supervised ones all the way up, MAE-Tiny's only in
the low layers, and distilling the last block's attention mends the high ones. Images, layers and measure are those of
Figure 1. Writes fig6.npz, .json, .md, and draws fig6.png from the first.
"""
from common import options
from common.tables import Row
from sec4_analysis import similarity
from sec5_distill import pretrain_dmae


def build_parser():
    return similarity.make_parser(__doc__)


def models(args):
    """{name: checkpoint} of --models or of the preset's own runs, the teacher is D-MAE's; None after a dry run."""
    if args.models:
        return similarity.sources(args, (), "fig6")
    rows = [Row("supervised", "supervised", None, (("sec3_benchmark.finetune", {}),)),
            Row("mae", "MAE", None, (("sec3_benchmark.pretrain_mae", pretrain_dmae.MAE_BESIDE.get(args.preset, {})),)),
            Row("dmae", "D-MAE", None, (("sec5_distill.pretrain_dmae", {}),))]
    found = similarity.own_runs(args, rows, "fig6")
    if args.dry_run:
        return None
    heads = args.per_stage.get("pretrain_dmae", {}).get("teacher_heads")
    args.num_heads_of += [f"teacher={heads}"] if heads else []
    return {"supervised": found["supervised"]["checkpoint"], "teacher": found["dmae"]["teacher"],
            "MAE": found["mae"]["checkpoint"], "D-MAE": found["dmae"]["checkpoint"]}


def main(args):
    """Measures, writes and draws; returns {model: CKA (its layers, layers of the first model)}."""
    return similarity.figure(args, "fig6", lambda: models(args))


if __name__ == "__main__":
    options.start(main, build_parser(), parse=similarity.parse)
