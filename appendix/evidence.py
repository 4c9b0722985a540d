"""Statistics of the claims: from measurements with several seeds to an effect, its 95 % interval and a verdict.

A claim's effect is a difference that is positive if the claim holds. It is computed for each seed from that seed's runs
(paired), so that influences of a seed on both sides cancel. Its 95 % interval is the wider of two:

    mean ± t(0.975, seeds - 1) * standard deviation over seeds / sqrt(seeds)
    mean ± 1.96 * standard error from the number of validation images

The second exists for accuracies alone. Each accuracy is a mean over images, so an effect is, up to a constant, a mean
over images too: an image contributes the derivatives of the effect by the accuracies of those runs that answer it
right. The spread of these contributions gives the standard error, paired by image: where two runs answer alike, their
contributions to a difference cancel.

An interval speaks of new seeds and new validation images. With every seed the same are the training images, the small
sets, the tenth of the images (C9) and D-MAE's teacher (C7, C8).
"""
import math
import statistics
from dataclasses import dataclass

import numpy as np

T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # t(0.975) for 1 to 9 degrees of freedom
SEEN, OPEN, CONTRARY = "seen", "not decided", "contrary"  # verdicts
STEP = 1e-4  # step of the finite difference in Measured.influence


class Measured:
    """The measurements of one seed; an effect is a function of it: lambda m: m.top1("mae") - m.top1("scratch").

    values: {(kind, run): number}. answers: {(kind, run): {data set: (images,) of 1 for right and 0 for wrong}}, for the
    values that are accuracies; each is the mean over its data sets, in percent.
    """

    def __init__(self, values, answers=()):
        self.values, self.answers = values, dict(answers)

    def get(self, kind, run):
        """Return one measurement."""
        return self.values[kind, run]

    def top1(self, run):
        """Return the accuracy after fine-tuning on the full data set, %."""
        return self.get("top1", run)

    def small(self, run):
        """Return the accuracy after transfer, averaged over the small data sets, %."""
        return self.get("small", run)

    def stat(self, measure, run, part):
        """Return a statistic of Section 4's figures: "cka", "distance", "entropy" and so on.

        part: "low" or "high" for the lowest or highest third of the layers; of "high frequencies", a layer.
        """
        return self.get(f"{measure} {part}", run)

    def influence(self, effect):
        """Return the contributions of the images to an effect, {data set: (images,)}, by numerical derivatives.

        Up to a constant, the effect is the sum over data sets of their means.
        """
        influence = {}
        for key, answers in self.answers.items():
            moved = Measured({**self.values, key: self.values[key] + STEP})
            derivative = (effect(moved) - effect(self)) / STEP
            for name, right in answers.items():
                influence[name] = influence.get(name, 0) + 100 * derivative / len(answers) * right
        return influence


def images_error(effect, seeds):
    """Return the standard error, due to the limited number of validation images, of an effect averaged over seeds."""
    by_seed = [measured.influence(effect) for measured in seeds]
    means = [np.mean([influence[name] for influence in by_seed], axis=0) for name in by_seed[0]]
    return math.sqrt(sum(mean.var(ddof=1) / len(mean) for mean in means))


class RecordingMeasured(Measured):
    """A Measured that records which measurements an effect reads, and returns placeholder numbers for them."""

    def __init__(self):
        super().__init__({})

    def get(self, kind, run):
        return self.values.setdefault((kind, run), float(len(self.values)))


def required(effects):
    """List the (kind, run) that these effects read, in order of first use."""
    recorded = RecordingMeasured()
    for effect in effects:
        effect(recorded)
    return list(recorded.values)


@dataclass
class Effect:
    """Mean of an effect over seeds with its 95 % interval (None with a single seed)."""

    values: list  # one per seed
    mean: float
    low: float | None
    high: float | None
    by_seeds: float | None  # half width of the interval from the spread over seeds
    by_images: float | None  # half width of the interval from the number of validation images; None: no accuracies


def estimate(effect, seeds) -> Effect:
    """Compute the Effect of a function of Measured over a list of Measured, one per seed.

    Raises FloatingPointError if a value is not finite.
    """
    values = [float(effect(measured)) for measured in seeds]
    if not all(map(math.isfinite, values)):
        raise FloatingPointError(f"an effect is not finite: {values}")
    mean = statistics.mean(values)
    accuracies = any(kind in ("top1", "small") for kind, _ in required([effect]))
    by_images = 1.96 * images_error(effect, seeds) if accuracies and seeds[0].answers else None
    if len(values) < 2:
        return Effect(values, mean, None, None, None, by_images)
    by_seeds = T[min(len(values) - 1, len(T)) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    half = max(by_seeds, by_images or 0.0)
    return Effect(values, mean, mean - half, mean + half, by_seeds, by_images)


def verdict(effect: Effect, within=None) -> str:
    """Decide about one effect: is it positive, or, for an equivalence, inside ± `within`?

    SEEN if the whole interval says yes, CONTRARY if the whole interval says no; otherwise OPEN, as with a single seed.
    """
    if effect.low is None:
        return OPEN
    if within is not None:
        inside = -within < effect.low and effect.high < within
        outside = effect.low > within or effect.high < -within
        return SEEN if inside else CONTRARY if outside else OPEN
    return SEEN if effect.low > 0 else CONTRARY if effect.high < 0 else OPEN


def decide(effects, within=None):
    """Decide a claim that holds if each of its effects is positive; return the verdict and the Effect that decides.

    SEEN if each is seen, CONTRARY if one is contrary (an intersection-union test). To take the smallest effect of every
    seed instead would give a number that is too low on average and varies too little.
    """
    verdicts = [verdict(effect, within) for effect in effects]
    if CONTRARY in verdicts:
        return CONTRARY, next(effect for effect, found in zip(effects, verdicts) if found == CONTRARY)
    weakest = min(effects, key=lambda effect: effect.mean if effect.low is None else effect.low)
    return SEEN if set(verdicts) == {SEEN} else OPEN, weakest


def by_set(effect, seeds):
    """Compute an effect on each small set alone: {data set: [number of each seed]}; {} if it reads none."""
    runs = [run for kind, run in required([effect]) if kind == "small"]
    found = {}
    for measured in seeds if runs else ():
        for name in measured.answers["small", runs[0]]:
            alone = {("small", run): 100 * float(np.mean(measured.answers["small", run][name])) for run in runs}
            found.setdefault(name, []).append(float(effect(Measured({**measured.values, **alone}))))
    return found
