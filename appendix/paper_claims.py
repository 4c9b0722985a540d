"""The paper's claims as data: each is one or more differences of measurements that are positive if the claim holds.

`m` is an evidence.Measured, the measurements of one seed. `m.top1(run)`: accuracy after fine-tuning on the full data
set; `m.small(run)`: after transfer, averaged over the small sets; `m.stat(measure, model, part)`: a statistic of
Section 4's figures. appendix/claim_runs.py says which trainings the runs are.
"""
from collections.abc import Callable
from dataclasses import dataclass

POINTS = "points"  # percentage points of top-1
DISTANCE, ENTROPY = "× uniform distance", "× uniform entropy"  # 1 is that of uniform attention


@dataclass
class Claim:
    key: str
    where: str  # in the paper
    statement: str
    effect: Callable | list  # evidence.Measured -> number; of a list, each must be positive
    unit: str = POINTS
    within: float | None = None  # equivalence instead: seen if the interval is inside ± this

    @property
    def effects(self):
        """The effects as a list."""
        return self.effect if isinstance(self.effect, list) else [self.effect]


def of_both(effect):
    """Return the effects of a claim about two models."""
    return [lambda m: effect(m, "supervised"), lambda m: effect(m, "MAE, fine-tuned")]


def low_to_high(measure):
    """Return the effect "this measure of a model is larger in high layers than in low ones"."""
    return lambda m, model: m.stat(measure, model, "high") - m.stat(measure, model, "low")


def below_supervised(measure, model, part):
    """Return the effect "this measure of a model is smaller than the supervised model's"."""
    return lambda m: m.stat(measure, "supervised", part) - m.stat(measure, model, part)


def nearer_in_low_layers(measure):
    """Return the effect "MAE differs from the supervised model more in high layers than in low ones", by a measure."""
    def gap(m, part):
        return abs(m.stat(measure, "MAE", part) - m.stat(measure, "supervised", part))
    return lambda m: gap(m, "high") - gap(m, "low")


def extra_loss_on_small_sets(run):
    """Return the effect "without pre-trained blocks 7 to 12, a run loses more on small sets than on the full data"."""
    return lambda m: (m.small(run) - m.small(f"{run}-6")) - (m.top1(run) - m.top1(f"{run}-6"))


def fewer_high_frequencies(part):
    """Return the effect "MoCo-v3 has less of the high frequencies than MAE" after the embedding or a block."""
    return lambda m: m.stat("high frequencies", "MAE", part) - m.stat("high frequencies", "MoCo-v3", part)


def loss_from_a_tenth(m, run):
    """Compute the points that a pre-training loses with a tenth of the images."""
    return m.top1(run) - m.top1(f"{run}-10")


CLAIMS = [
    Claim("C1", "Section 3.1, Table 1", "With all labels, MAE pre-training is better than training from scratch",
          lambda m: m.top1("mae") - m.top1("scratch")),
    Claim("C1b", "Section 3.1, Table 1", "With all labels, MAE is better than MoCo-v3",
          lambda m: m.top1("mae") - m.top1("mocov3")),
    Claim("C1c", "Section 3.1, Table 1", "With all labels, MoCo-v3 is better than training from scratch",
          lambda m: m.top1("mocov3") - m.top1("scratch")),
    Claim("C2", "Section 3.2, Table 4", "On small sets, a supervised start is better than MAE",
          lambda m: m.small("supervised") - m.small("mae")),
    Claim("C2b", "Section 3.2, Table 4", "On small sets, MoCo-v3 is better than MAE",
          lambda m: m.small("mocov3") - m.small("mae")),
    Claim("C3a", "Section 4.1, Figure 2", "With all labels, MAE's first six blocks bring more than half of its gain",
          lambda m: m.top1("mae-6") - (m.top1("mae") + m.top1("scratch")) / 2),
    Claim("C3b", "Section 4.1, Figure 2", "With all labels, MoCo-v3's blocks 7 to 12 do harm",
          lambda m: m.top1("mocov3-6") - m.top1("mocov3")),
    Claim("C3c", "Section 4.1, Figure 4", "MAE's blocks 7 to 12 matter more on small sets than with all labels",
          extra_loss_on_small_sets("mae")),
    Claim("C3d", "Section 4.1, Figure 4", "MoCo-v3's blocks 7 to 12 matter more on small sets than with all labels",
          extra_loss_on_small_sets("mocov3")),
    Claim("C4", "Section 4.1, Figure 1", "In the last four layers, MoCo-v3 is more like the supervised model than MAE",
          lambda m: m.stat("cka", "MoCo-v3", "high") - m.stat("cka", "MAE", "high"), "CKA"),
    Claim("C4b", "Section 4.1, Figure 1", "MAE is more like the supervised model in its first four layers than in its "
          "last", lambda m: m.stat("cka", "MAE", "low") - m.stat("cka", "MAE", "high"), "CKA"),
    Claim("C5", "Section 4.1, Figure 3", "After the patch embedding, positions added, MoCo-v3 has less of the high "
          "frequencies than MAE", fewer_high_frequencies("embedding"), "log amplitude"),
    Claim("C5b", "Section 4.1, Figure 3", "After the patch embedding, positions not added (the paper does not say), "
          "MoCo-v3 has less of the high frequencies than MAE", fewer_high_frequencies("embedding without positions"),
          "log amplitude"),
    Claim("C5c", "Section 4.1, Figure 3", "After the first block, MoCo-v3 has less of the high frequencies than MAE",
          fewer_high_frequencies("block 1"), "log amplitude"),
    Claim("C6", "Section 4.2, Figure 5", "Attention in MAE's last four layers is more local than in the supervised "
          "model's", below_supervised("distance", "MAE", "high"), DISTANCE),
    Claim("C6b", "Section 4.2, Figure 5", "Attention in MAE's last four layers is more concentrated than in the "
          "supervised model's", below_supervised("entropy", "MAE", "high"), ENTROPY),
    Claim("C6c", "Section 4.2, Figure 5", "In the supervised model and in the fine-tuned MAE, heads differ more in low "
          "layers than in high ones", of_both(lambda m, model: -low_to_high("diversity")(m, model)), DISTANCE),
    Claim("C6d", "Section 4.2, Figure 5", "In both these models, high layers attend more globally than low ones",
          of_both(low_to_high("distance")), DISTANCE),
    Claim("C6e", "Section 4.2, Figure 5", "In both these models, high layers attend more broadly than low ones",
          of_both(low_to_high("entropy")), ENTROPY),
    Claim("C6f", "Section 4.2, Figure 5", "In the distance of attention, MAE is nearer to the supervised model in low "
          "layers than in high ones", nearer_in_low_layers("distance"), DISTANCE),
    Claim("C6g", "Section 4.2, Figure 5", "In the entropy of attention, MAE is nearer to the supervised model in low "
          "layers than in high ones", nearer_in_low_layers("entropy"), ENTROPY),
    Claim("C6h", "Section 4.2, Figure 5", "In low layers, MoCo-v3's heads differ less than the supervised model's",
          below_supervised("diversity", "MoCo-v3", "low"), DISTANCE),
    Claim("C6i", "talk's slides; the text says alike", "Fine-tuned, MAE's attention in the last four layers is still "
          "more local than the supervised model's", below_supervised("distance", "MAE, fine-tuned", "high"), DISTANCE),
    Claim("C6j", "talk's slides; the text says alike", "Fine-tuned, MAE's attention in the last four layers is still "
          "more concentrated than the supervised model's", below_supervised("entropy", "MAE, fine-tuned", "high"),
          ENTROPY),
    Claim("C7", "Section 5, Figure 7", "Of single layers, the last is the best to distil (here of 4, 8 and 12)",
          [lambda m: m.top1("dmae-12") - m.top1("dmae-8"), lambda m: m.top1("dmae-12") - m.top1("dmae-4")]),
    Claim("C7b", "Section 5, Figure 7", "Distilling the last layer alone is better than distilling all layers",
          lambda m: m.top1("dmae-12") - m.top1("dmae-all")),
    Claim("C8", "Section 5, Table 5", "With all labels, distilling attention (D-MAE) improves MAE",
          lambda m: m.top1("dmae") - m.top1("mae")),
    Claim("C8b", "Section 5, Table 5", "On small sets, D-MAE improves MAE",
          lambda m: m.small("dmae") - m.small("mae")),
    Claim("C8c", "Section 5, Table 5", "D-MAE improves MAE more on small sets than with all labels",
          lambda m: (m.small("dmae") - m.small("mae")) - (m.top1("dmae") - m.top1("mae"))),
    Claim("C8d", "Section 5, Figure 6", "In the last four layers, D-MAE is more like the supervised model than MAE",
          lambda m: m.stat("cka", "D-MAE", "high") - m.stat("cka", "MAE", "high"), "CKA"),
    Claim("C9", "Section 3.1, Table 3", "MAE from a tenth of the images is as good as from all, within a point",
          lambda m: -loss_from_a_tenth(m, "mae"), within=1.0),
    Claim("C9b", "Section 3.1, Table 3", "MAE from a tenth of the images keeps at least four fifths of its gain over "
          "training from scratch",
          lambda m: m.top1("mae-10") - m.top1("scratch") - 0.8 * (m.top1("mae") - m.top1("scratch"))),
    Claim("C9c", "Section 3.1, Table 3", "MoCo-v3 loses more than MAE if pre-trained on a tenth of the images",
          lambda m: loss_from_a_tenth(m, "mocov3") - loss_from_a_tenth(m, "mae")),
]
