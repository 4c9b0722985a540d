"""The paper's claims, one by one: is each seen in trainings of this repository, over several seeds?

    python appendix/claims.py                                               # demo: shows that it works, proves nothing
    python appendix/claims.py --preset laptop --data-path DIR --dataset-path ROOT --datasets A B C --seeds 0 1 2
    python appendix/claims.py ... --claims C1 C2         # some of them; --dry-run: the commands of all trainings
    python appendix/claims.py --from-numbers outputs/claims/claims.json     # draw the picture anew, or --claims of it

DIR holds train/<class>/ and val/<class>/; ROOT holds the small sets, see sec3_benchmark/downstream_sets.py. Runs are
shared with the tables and figures; finished ones are reused. Each claim is stated as an effect that is positive if
the claim holds. appendix/evidence.py explains the interval and the verdict; a single seed never gives a verdict.
Writes claims.json, claims.md and claims.png, and beside them the figures of Section 4 for each seed.
"""
import statistics
import textwrap
from functools import partial
from pathlib import Path

from appendix import claim_runs, evidence
from appendix.evidence import CONTRARY, OPEN, SEEN
from appendix.paper_claims import CLAIMS, POINTS
from common import entry, options, report, tables
from common.errors import UserError
from common.ranges import Int
from sec3_benchmark import downstream

SHORT = ("demo", "laptop")  # presets that pre-train MoCo-v3 too briefly for a verdict on the paper


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


def judge(claim, seeds, preset):
    """Return a row of the table: the claim, its effect, its verdict and the numbers of each seed."""
    effects = [evidence.estimate(effect, seeds) for effect in claim.effects]
    verdict, decisive = evidence.decide(effects, claim.within)
    inputs = evidence.required(claim.effects)
    about_moco = any("moco" in run.lower() for _, run in inputs)
    return {"claim": claim.key, "where": claim.where, "statement": claim.statement, "unit": claim.unit,
            "within": claim.within, "mark": "†" if about_moco and preset in SHORT else "", "verdict": verdict,
            "effect": vars(decisive), "parts": [vars(effect) for effect in effects],
            "small_sets": evidence.by_set(claim.effects[0], seeds),
            "measured": [{f"{kind}: {run}": measured.get(kind, run) for kind, run in inputs} for measured in seeds]}


def in_words(row):
    """Format the effect of a row with its interval and unit."""
    effect, unit = row["effect"], row["unit"]
    digits = 1 if unit == POINTS else 3
    if effect["low"] is None:
        return f"{effect['mean']:+.{digits}f} {unit} (one seed)"
    return f"{effect['mean']:+.{digits}f} ({effect['low']:+.{digits}f} to {effect['high']:+.{digits}f}) {unit}"


def means(row):
    """Format the measured numbers of a row, averaged over seeds, and for small sets the effect on each."""
    digits = 1 if row["unit"] == POINTS else 3
    texts = [f"{name} {statistics.mean(seed[name] for seed in row['measured']):.{digits}f}"
             for name in row["measured"][0]]
    texts += [f"effect on {downstream.title(name)} {statistics.mean(values):+.1f}"
              for name, values in row["small_sets"].items()]
    return "; ".join(texts)


def table(rows):
    return report.markdown(
        ["", "claim", "paper", "effect (95 % interval)", "verdict", "means"],
        [[row["claim"] + row["mark"], row["statement"], row["where"], in_words(row), row["verdict"], means(row)]
         for row in rows])


STYLES = {SEEN: (report.COLOURS[2], "o"), OPEN: ("#666666", "s"), CONTRARY: (report.COLOURS[1], "X")}


def draw_forest_plot(rows):
    """Draw one line per claim: its effect and interval, right of zero if the claim holds."""
    groups = [[row for row in rows if (row["unit"] == POINTS) is points] for points in (True, False)]
    groups = [group for group in groups if group]
    figure, axes = report.subplots(len(groups), 1, figsize=(10, len(groups) + 0.42 * len(rows)), squeeze=False,
                                   gridspec_kw={"height_ratios": [len(group) + 0.5 for group in groups]})
    for axis, group in zip(axes[:, 0], groups):
        draw_panel(axis, group)
    if any(row["mark"] for row in rows):
        figure.supxlabel("† about MoCo-v3, which is pre-trained only briefly here", fontsize=8)
    return figure


def draw_panel(axis, rows):
    """Draw one panel of the forest plot; its rows are all in points of top-1, or none is."""
    for place, row in enumerate(rows):
        effect, (colour, marker) = row["effect"], STYLES[row["verdict"]]
        low, mean, high = (effect["mean"] if effect[key] is None else effect[key] for key in ("low", "mean", "high"))
        axis.plot([low, high], [place, place], color=colour, linewidth=2.5, solid_capstyle="butt")
        axis.plot(mean, place, marker, color=colour, markersize=7)
        axis.plot(effect["values"], [place + 0.25] * len(effect["values"]), "|", color=colour, markersize=5)
        for bound in (-row["within"], row["within"]) if row["within"] else ():
            axis.plot([bound, bound], [place - 0.4, place + 0.4], color="black", linewidth=1, linestyle=":")
        axis.annotate(f"{in_words(row)}   {row['verdict']}{row['mark']}", (1.01, place), fontsize=8, color=colour,
                      xycoords=("axes fraction", "data"), va="center", annotation_clip=False)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(rows)), [textwrap.fill(f"{row['statement']} ({row['claim']})", 62) for row in rows],
                    fontsize=8)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    points = rows[0]["unit"] == POINTS
    dotted = "; dotted: the claim's bounds" if any(row["within"] for row in rows) else ""
    axis.set_title("Accuracy" if points else "Layers and attention")
    axis.set_xlabel(f"effect in {'points of top-1' if points else 'the unit at the right'}; right of 0: as the paper "
                    f"says; small ticks: single seeds{dotted}")


def conclusion(args, rows, sets):
    """Return the text below the table: counts of verdicts, seeds, small sets, and how to read an interval."""
    count = {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in (SEEN, OPEN, CONTRARY)}
    small = ", ".join(map(downstream.title, sets)) or "none"
    return "\n\n".join(filter(None, [
        f"{len(rows)} claims: {', '.join(f'{number} {verdict}' for verdict, number in count.items())}. Seeds: "
        f"{', '.join(map(str, args.seeds))}; small sets: {small}. An effect is positive if the claim holds; its "
        f"interval is that over seeds or, for accuracies, over validation images, whichever is wider. Of a claim about "
        f"two models or layers the weaker effect is shown.",
        "† About MoCo-v3, which this preset pre-trains only briefly." if any(row["mark"] for row in rows) else "",
        tables.NOTES["demo"] if args.preset == "demo" else ""]))


def measure(args):
    """Train what is missing, judge the claims, write claims.json and claims.md; return the rows.

    There are none after a dry run and on ranks other than 0.
    """
    tables.start_ranks(args)
    claims = [claim for claim in CLAIMS if claim.key in args.claims]
    required = evidence.required(effect for claim in claims for effect in claim.effects)
    sets = downstream.chosen_sets(args) if any(kind == "small" for kind, _ in required) else []
    measured = claim_runs.measure(required, args, sets)
    if measured is None:
        return []
    seeds, runs = measured
    rows = [judge(claim, seeds, args.preset) for claim in claims]
    report.write_text(Path(args.output) / "claims", "claims", {
        "item": "claims", "preset": args.preset, "data": args.data, "seeds": args.seeds,
        "small_sets": sets, "rows": rows, "runs": runs},
        f"claims, {report.origin(args.preset, args.data)}\n\n{table(rows)}\n\n{conclusion(args, rows, sets)}")
    return rows


def draw_chosen(args, rows):
    """Draw the rows that --claims names: all that were measured, or with --from-numbers some of those in the file."""
    chosen = [row for row in rows if row["claim"] in args.claims]
    if not chosen:
        raise UserError(f"--claims {' '.join(args.claims)}: {args.from_numbers} holds only "
                        f"{' '.join(row['claim'] for row in rows)}")
    return draw_forest_plot(chosen)


def main(args):
    """Measure, write and draw; return the rows."""
    rows = report.read_numbers(args.from_numbers, "claims", "rows") if args.from_numbers else measure(args)
    report.draw_numbers(args, "claims", partial(draw_chosen, args), rows)
    return rows


if __name__ == "__main__":
    entry.run_script(main, build_parser(), parse=tables.parse)
