"""From measured numbers, one set of them for each seed, to a verdict on a claim.

The effect of a claim is a difference that is positive if the claim holds. It is computed for each seed from the runs of
that seed, so that what a seed does to both sides falls out (paired). Its 95 % interval is the wider of two:

    mean ± t(0.975, seeds - 1) * standard deviation over seeds / sqrt(seeds)
    mean ± 1.96 * standard error from the number of validation images

The second does not shrink with seeds, which are all evaluated on the same images. It takes accuracies as independent,
although models err on the same images: it is rather too wide.
"""
import math
import statistics
from dataclasses import dataclass

T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # t(0.975) for 1 to 9 degrees of freedom
SEEN, OPEN, CONTRARY = "seen", "not decided", "contrary"
STEP = 1e-4  # of the numerical derivative


class Measured:
    """The numbers of one seed. A claim's effect is a function of it: lambda m: m.top1("mae") - m.top1("scratch").

    values {(kind, run): number or array}, errors {(kind, run): standard error of an accuracy}.
    """

    def __init__(self, values, errors=()):
        self.values, self.errors = values, dict(errors)

    def get(self, kind, run):
        return self.values[kind, run]

    def top1(self, run):
        """Accuracy on all of the data after fine-tuning, %."""
        return self.get("top1", run)

    def small(self, run):
        """Accuracy after transfer, the mean over the small data sets, %."""
        return self.get("small", run)

    def look(self, measure, run, part="all"):
        """What a figure of Section 4 measures: "cka", "kept", "distance", "entropy", "diversity"; in "low" or "high"
        layers, a third of them each.
        """
        return self.get(f"{measure} {part}", run)

    def standard_error(self, effect):
        """Of effect(self), from those of the accuracies, by its derivative with respect to each of them."""
        def derivative(key):
            moved = Measured({**self.values, key: self.values[key] + STEP})
            return (effect(moved) - effect(self)) / STEP
        return math.sqrt(sum((derivative(key) * error) ** 2 for key, error in self.errors.items()))


class Asked(Measured):
    """Notes what an effect asks for, in place of numbers."""

    def __init__(self):
        super().__init__({})

    def get(self, kind, run):
        return self.values.setdefault((kind, run), float(len(self.values)))


def needs(effects):
    """{(kind, run)} that these functions of a Measured ask for, in their order."""
    asked = Asked()
    for effect in effects:
        effect(asked)
    return list(asked.values)


@dataclass
class Effect:
    """Mean over seeds with its 95 % interval, which one seed does not have (None)."""

    values: list  # one for each seed
    mean: float
    low: float | None
    high: float | None
    by_seeds: float | None  # half widths, of which the larger one counts
    by_images: float


def estimate(effect, seeds):
    """The Effect of a function of a Measured over a list of these."""
    values = [float(effect(measured)) for measured in seeds]
    if not all(map(math.isfinite, values)):
        raise FloatingPointError(f"an effect is not finite: {values}")
    mean = statistics.mean(values)
    by_images = 1.96 * statistics.mean(measured.standard_error(effect) for measured in seeds)
    if len(values) < 2:
        return Effect(values, mean, None, None, None, by_images)
    by_seeds = T[min(len(values) - 1, len(T)) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    half = max(by_seeds, by_images)
    return Effect(values, mean, mean - half, mean + half, by_seeds, by_images)


def verdict(effect, beyond=0.0, within=None):
    """Is the effect larger than `beyond`? Or, for an equivalence, inside ± `within`? Where the whole interval says so,
    the claim is seen, where it says the opposite, contrary.
    """
    if effect.low is None:
        return OPEN
    if within is not None:
        inside, outside = -within < effect.low and effect.high < within, effect.low > within or effect.high < -within
        return SEEN if inside else CONTRARY if outside else OPEN
    return SEEN if effect.low > beyond else CONTRARY if effect.high < beyond else OPEN
