"""Figure 6: does distillation make the student's high layers similar to a supervised model's? CKA with DeiT-Tiny.

    python sec5_distill/fig6_distilled_similarity.py                                          # demo: its own runs
    python sec5_distill/fig6_distilled_similarity.py --preset small --data-path DIR
    python sec5_distill/fig6_distilled_similarity.py --data-path IMAGENET --models DeiT-Tiny=deit.pt \\
        MAE-Base=timm:vit_base_patch16_224.mae MAE-Tiny=mae.pt D-MAE-Tiny=dmae.pt
    python sec5_distill/fig6_distilled_similarity.py --from-numbers outputs/fig6/fig6.npz

The paper's claim (Section 5): the teacher is similar to the supervised model in all layers, MAE-Tiny only in low ones,
and distilling the last block's attention raises the similarity of its high ones. Images, layers and measure are those
of Figure 1. Writes fig6.npz, .json, .md, and draws fig6.png from the .npz.
"""
from common import entry, report
from common.rows import Row, settings_set
from sec4_analysis import similarity, study
from sec5_distill import pretrain_dmae


def build_parser():
    return study.make_parser(__doc__)


def own_models(args):
    """Return {name: checkpoint} of the preset's own runs, D-MAE's teacher among them; {} after a dry run."""
    rows = [study.SUPERVISED,
            Row("mae", "MAE", None, [pretrain_dmae.mae_beside(args.preset)]),
            Row("dmae", "D-MAE", None, ["sec5_distill/pretrain_dmae.py"])]
    found = study.own_runs(args, rows, "fig6")
    return {} if args.dry_run else {
        "supervised": found["supervised"]["checkpoint"], "teacher": found["dmae"]["teacher"],
        "MAE": found["mae"]["checkpoint"], "D-MAE": found["dmae"]["checkpoint"]}


def teacher_heads(args):
    """Return {"teacher": number of heads} if --set gives it to D-MAE, as the teacher's file may not contain it."""
    told = settings_set("sec5_distill/pretrain_dmae.py", args).get("teacher_heads")
    return {"teacher": int(told[0])} if told and not args.models else {}


def main(args):
    """Measure, write and draw; return {model: CKA (its layers, layers of the first)}, {} if nothing was measured."""
    if args.from_numbers:
        arrays = report.read_numbers(args.from_numbers, "fig6")
    else:
        checkpoints = study.checkpoints(args, (), "fig6") if args.models else own_models(args)
        arrays = similarity.compare(args, "fig6", checkpoints, teacher_heads(args))
    report.draw_numbers(args, "fig6", similarity.draw_heat_maps, arrays)
    return arrays


if __name__ == "__main__":
    entry.run_script(main, build_parser(), parse=study.parse)
