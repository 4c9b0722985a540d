"""How alike are the layers of several models (Figures 1 and 6, Appendices A.6 and B.1)? CKA against the first model."""
import numpy as np
import torch

from common import report
from sec4_analysis import cka, study
from sec4_analysis.features import final_norm, geometry, intermediates
from sec4_analysis.study import make_parser, own_runs, parse, sources  # noqa: F401  for Section 5 too


def figure(args, item, checkpoints):
    """Measures, writes and draws the models {name: checkpoint} that `checkpoints()` gives; returns {model: CKA (its
    layers, layers of the first model)}, {} where it leaves.
    """
    return study.figure(args, item, lambda: similarities(args, checkpoints()), describe, draw_similarities)


def layer_grams(model, images, authors_norm=False, view=None):
    """Centred Gram matrices of the patch tokens of all layers, per batch (layers, n, n): what each norm1 gives, then
    the last block's output through the final norm. Index 0 is called patch embedding; positions are in it.
    `view(tokens, grid)` is what to look at of the patch tokens (B, L, D), by default all.
    """
    prefix, grid, _ = geometry(model)
    view = view or (lambda tokens, grid: tokens)
    wanted = [*(f"blocks.{i}.norm1" for i in range(len(model.blocks))), "norm"]
    norm = final_norm(model, authors_norm)
    return [torch.stack([cka.centred_gram(view(tokens[:, prefix:], grid))
                         for _, tokens in intermediates(model, batch, wanted, norm)]) for batch in images]


def similarities(args, checkpoints, view=None):
    """{name: CKA (its layers, layers of the first model)} and what to know about it, or None: see study.analyse."""
    done = study.analyse(args, checkpoints,
                         lambda model, images: layer_grams(model, images, args.final_norm == "authors", view),
                         final_norm=args.final_norm, batch_size=args.batch_size)
    if done is None:
        return None
    grams, about = done
    reference = next(iter(grams.values()))
    return {name: cka.minibatch_cka(zip(own, reference)).cpu().numpy() for name, own in grams.items()}, about


def describe(arrays):
    """Similarity of equal layers as Markdown, one row a model."""
    depth = max(len(array) for array in arrays.values())
    return f"CKA of equal layers with {next(iter(arrays))}\n\n" + report.markdown(
        ["layer", *range(depth)],
        [[name, *(f"{value:.2f}" for value in np.diagonal(array))] for name, array in arrays.items()])


def draw_similarities(arrays, path):
    """A heat map for each model (x: layers of the first), then the diagonals."""
    reference, *others = arrays
    figure, axes = report.subplots(1, len(arrays) + 1, figsize=(2.4 * len(arrays) + 3.2, 2.6),
                                   gridspec_kw={"width_ratios": [1] * len(arrays) + [1.25]})
    for panel, (name, array) in zip(axes, arrays.items()):
        image = panel.imshow(array, origin="lower", cmap="magma", vmin=0, vmax=1)
        panel.set(title=name, xlabel=f"layer of {reference}", ylabel=f"layer of {name}",
                  xticks=range(0, array.shape[1], 3), yticks=range(0, array.shape[0], 3))
    figure.colorbar(image, ax=axes[len(arrays) - 1], label="CKA")
    for name, (style, colour) in zip(others, study.line_styles()):
        axes[-1].plot(np.diagonal(arrays[name]), style, color=colour, markersize=3.5, linewidth=1.2, label=name)
    axes[-1].set(title=f"equal layers, against {reference}", xlabel="layer", ylabel="CKA", ylim=(0, 1),
                 xticks=range(0, len(arrays[reference]), 3))
    if others:
        axes[-1].legend(fontsize=8)
    figure.savefig(path)
