"""How alike are the layers of several models (Figures 1 and 6, Appendices A.6 and B.1)? CKA against the first model."""
import numpy as np
import torch

from common import report
from sec4_analysis import cka, study
from sec4_analysis.activations import Activations, final_norm, geometry


@torch.inference_mode()
def layer_grams(model, batches, authors_norm=False, band=None):
    """Return for each batch of n images the centred Gram matrices of the patch tokens of all layers (layers, n, n).

    Layers are what each norm1 gives, then the last block's output through the final norm. Index 0 is called patch
    embedding; positions are in it. `band(tokens, grid)`: the part of the tokens (n, L, D) to look at; default: all.
    """
    prefix, grid, _ = geometry(model)

    def gram(tokens):
        tokens = tokens[:, prefix:]
        return cka.centred_gram(tokens if band is None else band(tokens, grid))
    wanted = [*(f"blocks.{i}.norm1" for i in range(len(model.blocks))), "norm"]
    with Activations(model, wanted, gram, norm=final_norm(model, authors_norm)) as read:
        return [torch.stack(list(read(batch).values())) for batch in batches]


def similarities(args, models, images, band=None):
    """Compare all layers of every model with those of the first: {name: CKA (its layers, layers of the first)}."""
    grams = {name: layer_grams(model, batches, args.final_norm == "authors", band)
             for name, model, batches in study.each_model(args, models, images)}
    reference = next(iter(grams.values()))
    return {name: cka.minibatch_cka(zip(own, reference)).cpu().numpy() for name, own in grams.items()}


def compare(args, item, models):
    """Compare the models on the validation images, and save the similarities as <item>; return them, or None on a rank
    that is not needed and after a dry run.
    """
    images = study.images(args, models)
    if images is None:
        return None
    arrays = similarities(args, models, images)
    study.save(args, item, arrays, about(args, models, images), describe(arrays))
    return arrays


def about(args, models, images):
    """Return what a reader should know about the similarities."""
    return study.about(args, models, images, final_norm=args.final_norm, batch_size=args.batch_size)


def describe(arrays):
    """Return the similarity of equal layers as Markdown, one row a model."""
    depth = max(len(array) for array in arrays.values())
    return f"CKA of equal layers with {next(iter(arrays))}\n\n" + report.markdown(
        ["layer", *range(depth)],
        [[name, *(f"{value:.2f}" for value in np.diagonal(array))] for name, array in arrays.items()])


def draw_heat_maps(arrays):
    """Draw a heat map for each model (x: layers of the first), then the diagonals of all but the first, if any."""
    reference, *others = arrays
    maps = len(arrays)
    figure, axes = report.subplots(1, maps + bool(others), figsize=(2.4 * maps + (3.2 if others else 0.6), 2.6),
                                   squeeze=False, gridspec_kw={"width_ratios": [1] * maps + [1.25] * bool(others)})
    for panel, (name, array) in zip(axes[0], arrays.items()):
        image = panel.imshow(array, origin="lower", cmap="magma", vmin=0, vmax=1)
        panel.set(title=name, xlabel=f"layer of {reference}", ylabel=f"layer of {name}",
                  xticks=range(0, array.shape[1], 3), yticks=range(0, array.shape[0], 3))
    figure.get_layout_engine().set(w_pad=0.08)  # inches, so that a label is near its own panel only
    bar = figure.colorbar(image, ax=axes[0, maps - 1])
    bar.ax.set_title("CKA", fontsize=9)
    if others:
        draw_diagonals(axes[0, -1], {name: np.diagonal(arrays[name]) for name in others}, reference)
    return figure


def draw_diagonals(axis, curves, reference):
    """Draw the similarity of equal layers of each model with the reference."""
    for (name, values), (style, colour) in zip(curves.items(), study.line_styles()):
        axis.plot(values, style, color=colour, markersize=3.5, linewidth=1.2, label=name)
    axis.set(title="equal layers", xlabel="layer", ylabel=f"CKA with {reference}", ylim=(0, 1.02),
             xticks=range(0, max(map(len, curves.values())), 3))
    axis.legend(fontsize=8)
