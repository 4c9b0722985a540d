"""The runs and measurements that appendix/claims.py judges: those of Tables 1, 3 and 5 and of Figures 1 to 7."""
import shlex
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np

from appendix import answers
from appendix.evidence import Measured
from common import distributed, options, tables
from common.rows import PREVIOUS, Row
from sec3_benchmark import downstream
from sec3_benchmark import table1_pretraining_methods as table1
from sec3_benchmark import table3_pretraining_data as table3
from sec4_analysis import fig1_layer_similarity as fig1
from sec4_analysis import fig3_fourier as fig3
from sec4_analysis import fig5_attention as fig5
from sec4_analysis import leading_blocks, study
from sec5_distill import fig7_distilled_layer as fig7
from sec5_distill import table5_distillation as table5

# Run -> (method, line of its pre-training); only the first six pre-trained blocks are kept, as in Figures 2 and 4
SIX_BLOCKS = {"mae-6": ("MAE", study.PRETRAIN_MAE), "mocov3-6": ("MoCo-v3", study.PRETRAIN_MOCOV3)}
TENTH = ("mae-10", "mocov3-10")  # pre-trained on a tenth of the images, as in Table 3
DISTILLED = {"dmae-4": "4", "dmae-8": "8", "dmae-12": "12", "dmae-all": "all"}  # in this block, as in Figure 7
# The models of Figures 1, 3, 5 and 6; the first is the reference of the similarities
MODELS = (study.SUPERVISED, study.MAE_ROW, study.MAE_FT, study.MOCOV3,
          Row("dmae", "D-MAE", None, ["sec5_distill/pretrain_dmae.py"]))
FIGURES = {"": (fig1, fig3, fig5), "without-positions": (fig3,)}  # value of --first, if given -> figures to measure
THIRD = 4  # of the twelve layers
ALL = "the full data set"


def six_blocks_of(run, tuning):
    """Return the row that trains from the first six pre-trained blocks, as in Figures 2 and 4."""
    name, pretraining = SIX_BLOCKS[run]
    return leading_blocks.point_row(tuning, "", name, 6, [pretraining], PREVIOUS)


def fine_tuned(run, args):
    """Return the row of a run that is fine-tuned on the full data set."""
    if run in SIX_BLOCKS:
        return six_blocks_of(run, "sec3_benchmark/finetune.py")
    if run == "dmae-12" and args.preset != "paper":  # in preset paper, Figure 7 has 100 epochs, Table 1 has 300
        run = "dmae"
    if run in DISTILLED:
        return fig7.row_of(DISTILLED[run], args.preset)
    if run in TENTH:
        own = tables.parse(table3.build_parser(), ["--rows", *TENTH, *arguments_for(table3.build_parser(), args)])
        return next(row for row in table3.planned(own) if row.key == run)
    return next(row for row in table1.ROWS if row.key == run)


def transferred(run, dataset):
    """Return the row of a run that is transferred to a small data set."""
    if run in SIX_BLOCKS:
        return six_blocks_of(run, f"sec3_benchmark/transfer.py --dataset {shlex.quote(dataset)}")
    return downstream.cell(next(row for row in table5.ROWS if row.key == run), dataset)


def arguments_for(parser, args):
    """Return the given command-line arguments that the parser of another script also has, as a list of words."""
    known = options.defaults(parser)
    return options.to_argv({name: value for name, value in args.given.items() if name in known})


def rows_for(needed, args, sets):
    """Return the rows to train for the measurements `needed`, a list of (kind, run). sets: the small data sets."""
    rows = []
    for kind, run in needed:
        if kind == "top1":
            rows.append(replace(fine_tuned(run, args), key=f"top1-{run}"))
        elif kind == "small":
            rows += [replace(transferred(run, name), key=f"small-{run}-{name}", name=f"{run}, {downstream.title(name)}",
                             column="") for name in sets]
    return rows + [replace(row, key=f"look-{row.key}") for row in analysed(needed)]


def analysed(needed):
    """Return the rows of the models that Section 4's figures must analyse, the reference first; [] if none."""
    names = {run for kind, run in needed if kind not in ("top1", "small")}
    return [row for row in MODELS if row is study.SUPERVISED or row.name in names] if names else []


def measure(needed, args, sets):
    """Train whatever is missing and measure; return ([Measured of each seed], [provenance of each run]).

    Returns None after a dry run, and on ranks other than 0.
    """
    rows = rows_for(needed, args, sets)
    results, without = tables.run_rows(rows, args, (), "claims")
    if args.dry_run:
        return None
    tables.require_weights(without)
    seeds = []
    for number, seed in enumerate(args.seeds):
        final = {key: lines[number][-1] for key, lines in results.items()}
        values, right = accuracies(needed, final, sets, args)
        if models := analysed(needed):
            checkpoints = {row.name: final[f"look-{row.key}"]["checkpoint"] for row in models}
            values |= figure_statistics(checkpoints, args, seed)
        seeds.append(Measured(values, right))
    if not distributed.is_main():
        return None
    return seeds, [about for row in rows for about in provenance(row, results[row.key], args)]


def accuracies(needed, final, sets, args):
    """Return {(kind, run): accuracy in %} and {(kind, run): {data set: (images,) of 1 for right and 0 for wrong}}.

    final: {key of a row: result of its last stage}.
    """
    values, right = {}, {}
    for kind, run in needed:
        if kind == "top1":
            found = {ALL: final[f"top1-{run}"]}
        elif kind == "small":
            found = {name: final[f"small-{run}-{name}"] for name in sets}
        else:
            continue
        values[kind, run] = statistics.mean(result["top1"] for result in found.values())
        right[kind, run] = {name: answers.of_run(result, args) for name, result in found.items()}
    return values, right


def figure_statistics(checkpoints, args, seed):
    """Run Figures 1, 3 and 5 on the models of one seed; return {(measure and part, model): number}.

    checkpoints: {model: file}. The figures are written to claims/seed<seed>/ in the output folder.
    """
    arrays = []
    for first, figures in FIGURES.items():
        for figure in figures:
            parser = figure.build_parser()
            words = ["--models", *(f"{name}={file}" for name, file in checkpoints.items()),
                     *arguments_for(parser, args), "--seed", str(seed), *(["--first", first] if first else []),
                     "--output", str(Path(args.output) / "claims" / f"seed{seed}" / first)]
            arrays.append(figure.main(study.parse(parser, words)))
    if not distributed.is_main():
        return {}
    found = {}
    for name in checkpoints:
        found |= numbers(name, *(array[name] for array in arrays))
    return found


def numbers(name, similarity, amplitudes, attention, bare_amplitudes):
    """Summarise the figures of one model as {(measure and part, name): number}.

    CKA with the supervised model in equal layers; high frequencies after the first layers; distance and entropy of
    attention, relative to uniform attention; and how much the heads of a layer differ in distance ("diversity").
    bare_amplitudes: those of which point 0 is before positions are added.
    """
    equal_layers = np.diagonal(similarity)[1:]  # without index 0, the embedding
    heads, uniform = attention[:, :, :-1], attention[:, :1, -1:]  # the last column is uniform attention
    distance, entropy = heads / uniform  # each (layers, heads)
    found = {(f"high frequencies {part}", name): amplitudes[0, point, -1]
             for point, part in enumerate(("embedding", "block 1"))}
    found["high frequencies embedding without positions", name] = bare_amplitudes[0, 0, -1]
    for part, layers in (("low", slice(0, THIRD)), ("high", slice(-THIRD, None))):
        found |= {(f"cka {part}", name): equal_layers[layers].mean(),
                  (f"distance {part}", name): distance[layers].mean(),
                  (f"entropy {part}", name): entropy[layers].mean(),
                  (f"diversity {part}", name): distance[layers].std(axis=1).mean()}
    return {key: float(value) for key, value in found.items()}


def provenance(row, results, args):
    """Yield for each seed of a row its last command (which names the run it starts from), run, top-1 and minutes."""
    for seed, lines in zip(args.seeds, results):
        start = Path(lines[-2]["run"]).name if len(lines) > 1 else PREVIOUS
        command = f"python {row.lines[-1].replace(PREVIOUS, start)} --preset {args.preset} --seed {seed}"
        yield {"key": row.key, "seed": seed, "command": command, "run": "/".join(Path(lines[-1]["run"]).parts[-2:]),
               "top1": lines[-1].get("top1"), "minutes": lines[-1]["seconds"] / 60}
