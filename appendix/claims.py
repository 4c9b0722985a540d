"""The paper's claims, one by one: is each seen in trainings of this repository, over several seeds?

    python appendix/claims.py                                               # demo: shows that it works, proves nothing
    python appendix/claims.py --preset laptop --data-path DIR --dataset-path ROOT --datasets A B C --seeds 0 1 2
    python appendix/claims.py ... --claims C1 C2         # some of them; --dry-run: the commands of all trainings
    python appendix/claims.py --from-numbers outputs/claims/claims.json     # draw the picture anew

DIR holds train/<class>/ and val/<class>/; ROOT holds the small sets, see sec3_benchmark/downstream_sets.py. Runs are
shared with the tables and figures; finished ones are reused. Each claim is stated as an effect that is positive if
the claim holds. appendix/evidence.py explains the interval and the verdict; a single seed never gives a verdict.
Writes claims.json, claims.md and claims.png, and beside them the figures of Section 4 for each seed.
"""
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from appendix import claim_runs, evidence
from appendix.evidence import CONTRARY, OPEN, SEEN
from common import entry, options, report, tables
from common.ranges import Int
from sec3_benchmark import downstream

POINTS = "points"  # percentage points of top-1


@dataclass
class Claim:
    key: str
    where: str  # in the paper
    statement: str
    effect: Callable  # evidence.Measured -> number
    unit: str = POINTS
    beyond: float = 0.0  # seen if the whole interval is larger
    within: float | None = None  # equivalence instead: seen if the interval is inside ± this


def smaller_of_both(effect):
    """Return the effect of a claim about two models: the smaller one, so that the claim must hold for both."""
    return lambda m: min(effect(m, "supervised"), effect(m, "MAE, fine-tuned"))


def low_to_high(measure):
    """Return the effect "this measure of a model is larger in high layers than in low ones"."""
    return lambda m, model: m.stat(measure, model, "high") - m.stat(measure, model, "low")


def extra_loss_on_small_sets(measured, run):
    """Return the accuracy lost without pre-trained blocks 7 to 12 on small sets, minus that lost on the full data."""
    return (measured.small(run) - measured.small(f"{run}-6")) - (measured.top1(run) - measured.top1(f"{run}-6"))


def gap_to_supervised(measured, model, part):
    """Return the absolute difference in attention distance between a model and the supervised one."""
    return abs(measured.stat("distance", model, part) - measured.stat("distance", "supervised", part))


CLAIMS = [
    Claim("C1", "Section 3.1, Table 1", "With enough labels, MAE pre-training is better than training from scratch",
          lambda m: m.top1("mae") - m.top1("scratch")),
    Claim("C1b", "Section 3.1, Table 1", "With enough labels, MAE is better than MoCo-v3",
          lambda m: m.top1("mae") - m.top1("mocov3")),
    Claim("C2", "Section 3.2, Table 4", "On small sets, a supervised start is better than MAE",
          lambda m: m.small("supervised") - m.small("mae")),
    Claim("C2b", "Section 3.2, Table 4", "On small sets, MoCo-v3 is better than MAE",
          lambda m: m.small("mocov3") - m.small("mae")),
    Claim("C3a", "Section 4.1, Figure 2", "With enough labels, MAE's first six blocks bring more than half of its gain",
          lambda m: m.top1("mae-6") - (m.top1("mae") + m.top1("scratch")) / 2),
    Claim("C3b", "Section 4.1, Figure 2", "With enough labels, MoCo-v3's blocks 7 to 12 do harm",
          lambda m: m.top1("mocov3-6") - m.top1("mocov3")),
    Claim("C3c", "Section 4.1, Figure 4", "MAE's blocks 7 to 12 matter more on small sets than with enough labels",
          lambda m: extra_loss_on_small_sets(m, "mae")),
    Claim("C3d", "Section 4.1, Figure 4", "MoCo-v3's blocks 7 to 12 matter more on small sets than with enough labels",
          lambda m: extra_loss_on_small_sets(m, "mocov3")),
    Claim("C4", "Section 4.1, Figure 1", "In the last four layers, MoCo-v3 is more like the supervised model than MAE",
          lambda m: m.stat("cka", "MoCo-v3", "high") - m.stat("cka", "MAE", "high"), "CKA"),
    Claim("C4b", "Section 4.1, Figure 1", "MAE is more like the supervised model in its first four layers than in its "
          "last", lambda m: m.stat("cka", "MAE", "low") - m.stat("cka", "MAE", "high"), "CKA"),
    Claim("C5", "Section 4.1, Figure 3", "After the patch embedding, MoCo-v3 has less of the high frequencies than "
          "MAE",
          lambda m: m.stat("high frequencies", "MAE", "embedding") - m.stat("high frequencies", "MoCo-v3", "embedding"),
          "log amplitude"),
    Claim("C5b", "Section 4.1, Figure 3", "After the first block, MoCo-v3 has less of the high frequencies than MAE",
          lambda m: m.stat("high frequencies", "MAE", "block 1") - m.stat("high frequencies", "MoCo-v3", "block 1"),
          "log amplitude"),
    Claim("C6", "Section 4.2, Figure 5", "Attention in MAE's last four layers is more local than in the supervised "
          "model's", lambda m: m.stat("distance", "supervised", "high") - m.stat("distance", "MAE", "high"),
          "of uniform distance"),
    Claim("C6b", "Section 4.2, Figure 5", "Attention in MAE's last four layers is more concentrated than in the "
          "supervised model's", lambda m: m.stat("entropy", "supervised", "high") - m.stat("entropy", "MAE", "high"),
          "of uniform entropy"),
    Claim("C6c", "Section 4.2, Figure 5", "In the supervised model and in the fine-tuned MAE, heads differ more in low "
          "layers than in high ones", smaller_of_both(lambda m, model: -low_to_high("diversity")(m, model)),
          "of uniform distance"),
    Claim("C6d", "Section 4.2, Figure 5", "In these two models, high layers attend more globally than low ones",
          smaller_of_both(low_to_high("distance")), "of uniform distance"),
    Claim("C6e", "Section 4.2, Figure 5", "In these two models, high layers attend more broadly than low ones",
          smaller_of_both(low_to_high("entropy")), "of uniform entropy"),
    Claim("C6f", "Section 4.2, Figure 5", "MAE attends like the supervised model in low layers more than in high ones",
          lambda m: gap_to_supervised(m, "MAE", "high") - gap_to_supervised(m, "MAE", "low"), "of uniform distance"),
    Claim("C7", "Section 5, Figure 7", "Of single layers, the last is the best to distil (here of 4, 8 and 12)",
          lambda m: m.top1("dmae-12") - max(m.top1("dmae-4"), m.top1("dmae-8"))),
    Claim("C8", "Section 5, Table 5", "With enough labels, distilling attention (D-MAE) improves MAE",
          lambda m: m.top1("dmae") - m.top1("mae")),
    Claim("C8b", "Section 5, Table 5", "On small sets, D-MAE improves MAE",
          lambda m: m.small("dmae") - m.small("mae")),
    Claim("C8c", "Section 5, Table 5", "D-MAE improves MAE more on small sets than with enough labels",
          lambda m: (m.small("dmae") - m.small("mae")) - (m.top1("dmae") - m.top1("mae"))),
    Claim("C9", "Section 3.1, Table 3", "MAE from a tenth of the images is as good as from all, within a point",
          lambda m: m.top1("mae-10") - m.top1("mae"), within=1.0),
    Claim("C9b", "Section 3.1, Table 3", "MoCo-v3 from a tenth of the images is worse than from all by more "
          "than a point", lambda m: m.top1("mocov3") - m.top1("mocov3-10"), beyond=1.0),
]


def build_parser():
    parser = options.make_parser(__doc__)
    parser.epilog = "\n".join(["claims:", *(f"  {claim.key:4} {claim.statement} ({claim.where})" for claim in CLAIMS)])
    options.add_data(parser)
    downstream.add_datasets(parser)
    parser.add_argument("--claims", nargs="+", choices=[claim.key for claim in CLAIMS], metavar="C",
                        default=[claim.key for claim in CLAIMS], help="to test; they are listed below; default: all")
    parser.add_argument("--seeds", type=Int(0), nargs="+", default=[0], help="every run is made once per seed")
    tables.add_rows(parser)
    report.add_pictures(parser, ".json")
    options.add_execution(parser)
    return parser


def judge(claim, seeds):
    """Return a row of the table: the claim, its effect, its verdict and the numbers of each seed."""
    effect, inputs = evidence.estimate(claim.effect, seeds), evidence.required([claim.effect])
    return {"claim": claim.key, "where": claim.where, "statement": claim.statement, "unit": claim.unit,
            "beyond": claim.beyond, "within": claim.within, "effect": vars(effect),
            "verdict": evidence.verdict(effect, claim.beyond, claim.within),
            "measured": [{f"{kind}: {run}": measured.get(kind, run) for kind, run in inputs} for measured in seeds]}


def in_words(row):
    """Format the effect of a row with its interval and unit."""
    effect, unit = row["effect"], row["unit"]
    digits = 1 if unit == POINTS else 3
    if effect["low"] is None:
        return f"{effect['mean']:+.{digits}f} {unit} (one seed)"
    return f"{effect['mean']:+.{digits}f} ({effect['low']:+.{digits}f} to {effect['high']:+.{digits}f}) {unit}"


def table(rows):
    return report.markdown(["", "claim", "paper", "effect (95 % interval)", "verdict"],
                           [[row["claim"], row["statement"], row["where"], in_words(row), row["verdict"]]
                            for row in rows])


STYLES = {SEEN: (report.COLOURS[2], "o"), OPEN: ("#666666", "s"), CONTRARY: (report.COLOURS[1], "X")}


def draw_forest_plot(rows):
    """Draw one line per claim: its effect and interval, right of zero if the claim holds.

    Claims in points of top-1 share an axis. Each other claim is drawn to its own scale, with its numbers at the right.
    """
    groups = [[row for row in rows if (row["unit"] == POINTS) is points] for points in (True, False)]
    groups = [group for group in groups if group]
    figure, axes = report.subplots(len(groups), 1, figsize=(10, len(groups) + 0.42 * len(rows)), squeeze=False,
                                   gridspec_kw={"height_ratios": [len(group) + 0.5 for group in groups]})
    for axis, group in zip(axes[:, 0], groups):
        draw_panel(axis, group)
    return figure


def draw_panel(axis, rows):
    """Draw one panel of the forest plot; its rows are all in points of top-1, or none is."""
    points = rows[0]["unit"] == POINTS
    for place, row in enumerate(rows):
        effect, (colour, marker) = row["effect"], STYLES[row["verdict"]]
        low, mean, high = (effect["mean"] if effect[key] is None else effect[key] for key in ("low", "mean", "high"))
        scale = 1.0 if points else 1 / (max(abs(low), abs(high)) or 1)
        axis.plot([low * scale, high * scale], [place, place], color=colour, linewidth=2.5, solid_capstyle="butt")
        axis.plot(mean * scale, place, marker, color=colour, markersize=7)
        axis.plot([value * scale for value in effect["values"]], [place + 0.25] * len(effect["values"]), "|",
                  color=colour, markersize=5)
        bounds = [-row["within"], row["within"]] if row["within"] else [row["beyond"]]
        for bound in filter(None, bounds):  # a line for 0 follows below
            axis.plot([bound, bound], [place - 0.4, place + 0.4], color="black", linewidth=1, linestyle=":")
        axis.annotate(f"{in_words(row)}   {row['verdict']}", (1.01, place), xycoords=("axes fraction", "data"),
                      va="center", fontsize=8, color=colour, annotation_clip=False)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(rows)), [textwrap.fill(f"{row['statement']} ({row['claim']})", 62) for row in rows],
                    fontsize=8)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    explained = "right of 0: as the paper says; small ticks: single seeds"
    if points:
        dotted = "; dotted: the claim's bound" if any(row["within"] or row["beyond"] for row in rows) else ""
        axis.set_title("Accuracy")
        axis.set_xlabel(f"effect in points of top-1; {explained}{dotted}")
    else:
        axis.set_title("Layers and attention")
        axis.set_xlim(-1.1, 1.1)
        axis.set_xticks([0])
        axis.set_xlabel(f"effect, each claim on its own scale; {explained}")


def conclusion(args, rows, sets):
    """Return the text below the table: counts of verdicts, seeds, small sets, and how to read an interval."""
    count = {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in (SEEN, OPEN, CONTRARY)}
    small = ", ".join(map(downstream.title, sets)) or "none"
    return "\n\n".join([
        f"{len(rows)} claims: {', '.join(f'{number} {verdict}' for verdict, number in count.items())}. Seeds: "
        f"{', '.join(map(str, args.seeds))}; small sets: {small}. An effect is positive if the claim holds; its "
        f"interval is that over seeds or, for accuracies, over validation images, whichever is wider.",
        tables.NOTES["demo"] if args.preset == "demo" else ""]).rstrip()


def measure(args):
    """Train what is missing, judge the claims, write claims.json and claims.md; return the rows.

    There are none after a dry run and on ranks other than 0.
    """
    tables.start_ranks(args)
    claims = [claim for claim in CLAIMS if claim.key in args.claims]
    required = evidence.required(claim.effect for claim in claims)
    sets = downstream.chosen_sets(args) if any(kind == "small" for kind, _ in required) else []
    measured = claim_runs.measure(required, args, sets)
    if measured is None:
        return []
    seeds, runs = measured
    rows = [judge(claim, seeds) for claim in claims]
    report.write_text(Path(args.output) / "claims", "claims", {
        "item": "claims", "preset": args.preset, "data": args.data, "seeds": args.seeds,
        "small_sets": sets, "rows": rows, "runs": runs},
        f"claims, {report.origin(args.preset, args.data)}\n\n{table(rows)}\n\n{conclusion(args, rows, sets)}")
    return rows


def main(args):
    """Measure, write and draw; return the rows."""
    rows = report.read_numbers(args.from_numbers, "claims", "rows") if args.from_numbers else measure(args)
    report.draw_numbers(args, "claims", draw_forest_plot, rows)
    return rows


if __name__ == "__main__":
    entry.run_script(main, build_parser(), parse=tables.parse)
