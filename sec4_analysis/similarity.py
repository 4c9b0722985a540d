"""Similarity of layers (Figures 1 and 6, Appendices A.6 and B.1): CKA of several models with the first of them."""
import numpy as np
import torch

from common import report
from sec4_analysis import cka, study
from sec4_analysis.activations import Activations, final_norm, geometry


@torch.inference_mode()
def layer_grams(model, batches, authors_norm=False, band=None):
    """Compute the centred Gram matrices of all layers: for each batch of n images a tensor (layers, n, n).

    A layer's features are its patch tokens. The layers are the outputs of each block's norm1, then the last block's
    output after the final norm. Layer 0, which the paper calls patch embedding, has the positions in it.
    band: a function of the tokens (n, L, D) and the grid that returns the part to compare; default: all.
    """
    prefix, grid, _ = geometry(model)

    def gram(tokens):
        tokens = tokens[:, prefix:]
        return cka.centred_gram(tokens if band is None else band(tokens, grid))
    wanted = [*(f"blocks.{i}.norm1" for i in range(len(model.blocks))), "norm"]
    with Activations(model, wanted, gram, norm=final_norm(model, authors_norm)) as read:
        return [torch.stack(list(read(batch).values())) for batch in batches]


def similarities(args, models, images, band=None):
    """Compute the CKA of every model with the first one: {name: (its layers, layers of the first)}."""
    grams = {name: layer_grams(model, batches, args.final_norm == "authors", band)
             for name, model, batches in study.each_model(args, models, images)}
    reference = next(iter(grams.values()))
    return {name: cka.minibatch_cka(zip(own, reference)).cpu().numpy() for name, own in grams.items()}


def compare(args, item, checkpoints, heads=None):
    """Compare the models {name: checkpoint}, save the similarities as <item>, return them; {} if this rank has none.

    heads: {name: number of heads} of files that cannot say.
    """
    models = study.load_all(args, checkpoints, heads)
    images = study.images(args, models)
    if images is None:
        return {}
    arrays = similarities(args, models, images)
    study.save(args, item, arrays, about(args, models, images), describe(arrays))
    return arrays


def about(args, models, images):
    """Return the settings and origins of the similarities, for the .json beside them."""
    return study.about(args, models, images, final_norm=args.final_norm, batch_size=args.batch_size)


def describe(arrays):
    """Format the similarity of equal layers as Markdown, one row per model."""
    depth = max(len(array) for array in arrays.values())
    return f"CKA of equal layers with {next(iter(arrays))}\n\n" + report.markdown(
        ["layer", *range(depth)],
        [[name, *(f"{value:.2f}" for value in np.diagonal(array))] for name, array in arrays.items()])


def draw_heat_maps(arrays):
    """Draw a heat map per model (x: layers of the first model), then the diagonals of all models but the first."""
    reference, *others = arrays
    maps = len(arrays)
    figure, axes = report.subplots(1, maps + bool(others), figsize=(2.4 * maps + (3.2 if others else 0.6), 2.6),
                                   squeeze=False, gridspec_kw={"width_ratios": [1] * maps + [1.25] * bool(others)})
    for panel, (name, array) in zip(axes[0], arrays.items()):
        image = panel.imshow(array, origin="lower", cmap="magma", vmin=0, vmax=1)
        panel.set(title=name, xlabel=f"layer of {reference}", ylabel=f"layer of {name}",
                  xticks=range(0, array.shape[1], 3), yticks=range(0, array.shape[0], 3))
    figure.get_layout_engine().set(w_pad=0.08)  # inches: keeps a label away from the neighbouring panel
    bar = figure.colorbar(image, ax=axes[0, maps - 1])
    bar.ax.set_title("CKA", fontsize=9)
    if others:
        draw_diagonals(axes[0, -1], {name: np.diagonal(arrays[name]) for name in others}, reference)
    return figure


def draw_diagonals(axis, curves, reference):
    """Draw a curve per model: the similarity of each layer with the same layer of the reference."""
    for (name, values), (style, colour) in zip(curves.items(), study.line_styles()):
        axis.plot(values, style, color=colour, markersize=3.5, linewidth=1.2, label=name)
    axis.set(title="equal layers", xlabel="layer", ylabel=f"CKA with {reference}", ylim=(0, 1.02),
             xticks=range(0, max(map(len, curves.values())), 3))
    axis.legend(fontsize=8)
