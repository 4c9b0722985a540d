"""Figure 5: how far and how broadly does each head attend? Attention distance and entropy of every head and layer.

    python sec4_analysis/fig5_attention.py                                                # demo: the preset's own runs
    python sec4_analysis/fig5_attention.py --data-path IMAGENET --models DeiT-Tiny=deit.pt MAE-Tiny=mae.pt Init=random
    python sec4_analysis/fig5_attention.py --from-numbers outputs/fig5/fig5.npz

The paper's claims (Section 4.2): MAE-Tiny's high layers are local and concentrated; MoCov3-Tiny is global, with little
diversity between the heads of low layers. Text and slides disagree on whether MAE's locality survives fine-tuning.
Distances are in pixels of each model's input; the dashed line is uniform attention. Definitions: attention.py beside
this file; maps of single heads: attention_maps.py. Writes fig5.npz, .json, .md and draws fig5.png from the .npz.
"""
from functools import partial

import numpy as np
import torch

from common import entry, report
from sec4_analysis import attention, study
from sec4_analysis.activations import geometry, mean_over_images

ROWS = (study.SUPERVISED, study.MAE_ROW, study.MAE_FT, study.MOCOV3, study.UNTRAINED)
UNITS = {"pixels": "px", "authors": "1/14 patch"}  # --distance-unit -> how the unit is written


def build_parser():
    parser = study.make_parser(__doc__, norm=False)
    group = parser.add_argument_group("measures")
    group.add_argument("--distance-unit", choices=tuple(UNITS), default="pixels",
                       help="authors: 14 per patch, whatever the patch size, as in their code")
    group.add_argument("--keep-prefix", action="store_true", help="softmax with the class token, whose weight then "
                       "counts as distance 0; default: without it, as the authors")
    return parser


def distance_and_entropy(model, batches, distance_unit, keep_prefix):
    """Measure every head's attention distance and entropy, mean over images and query patches.

    Returns (2, layers, heads + 1), float64: distances, then entropies; the last column is uniform attention.
    """
    prefix, grid, patch_size = geometry(model)
    patch_size = attention.AUTHORS_PATCH_SIZE if distance_unit == "authors" else patch_size
    G = attention.patch_distances(grid, patch_size).to(next(model.parameters()).device)

    def of_heads(A):
        P = attention.attention_weights(A, prefix, keep_prefix)
        return torch.stack([attention.attention_distance(P, G), attention.attention_entropy(P)], dim=1)  # (B, 2, heads)
    logits = [f"blocks.{i}.logits" for i in range(len(model.blocks))]
    heads = mean_over_images(model, batches, logits, of_heads).transpose(0, 1)  # (2, layers, heads)
    keys = len(G) + (prefix if keep_prefix else 0)
    uniform = torch.stack([G.double().sum().cpu() / len(G) / keys, torch.tensor(np.log(keys))])
    return torch.cat([heads, uniform.view(2, 1, 1).expand(2, len(logits), 1)], dim=2).numpy()


def table(arrays):
    """Format distance and entropy of each block as Markdown: mean and standard deviation over heads."""
    layers = max(array.shape[1] for array in arrays.values())
    return "\n\n".join(f"{title}, mean ± standard deviation over heads\n\n" + report.markdown(
        ["block", *range(1, layers + 1)],
        [[name, *(f"{heads.mean():.{digits}f} ± {heads.std():.{digits}f}" for heads in array[which, :, :-1])]
         for name, array in arrays.items()])
        for which, (title, digits) in enumerate((("distance", 1), ("entropy (nats)", 2))))


def describe(arrays, unit):
    """Format the unit, the values of uniform attention and the tables as Markdown."""
    uniform = ", ".join(f"{name} {array[0, 0, -1]:.1f}, {array[1, 0, -1]:.2f} nats" for name, array in arrays.items())
    return f"distances in {unit}; uniform attention: {uniform}\n\n{table(arrays)}"


def draw_box_plots(arrays, unit):
    """Draw a column per model: distance above entropy, a box plot over heads per block.

    A dashed line marks uniform attention. unit: that of the distances.
    """
    figure, axes = report.subplots(2, len(arrays), figsize=(2.4 * len(arrays) + 0.5, 4.4),
                                   sharex="col", sharey="row", squeeze=False)
    for column, (name, array) in enumerate(arrays.items()):
        for row, label in enumerate((f"distance ({unit})", "entropy (nats)")):
            panel, layers = axes[row, column], array.shape[1]
            panel.boxplot(list(array[row, :, :-1]), widths=0.65, patch_artist=True, medianprops={"color": "black"},
                          boxprops={"facecolor": report.COLOURS[5], "linewidth": 0.7},
                          flierprops={"marker": ".", "markersize": 4}, whiskerprops={"linewidth": 0.7})
            panel.axhline(array[row, 0, -1], color=report.COLOURS[1], linestyle="--", linewidth=1)
            panel.set_xticks([1, *range(3, layers + 1, 3)], [1, *range(3, layers + 1, 3)])
            panel.set_ylim(0, 1.15 * max(values[row].max() for values in arrays.values()))  # one axis for the row
            if column == 0:
                panel.set_ylabel(f"attention {label}")
                panel.annotate("uniform attention", (0, 1), xytext=(3, 0), textcoords="offset points", va="top",
                               xycoords="axes fraction", color=report.COLOURS[1], fontsize=8)
        axes[0, column].set_title(name)
        axes[1, column].set_xlabel("block")
    return figure


def main(args):
    """Measure, write and draw; return {model: what `distance_and_entropy` gives}, {} if nothing was measured."""
    if args.from_numbers:
        arrays = report.read_numbers(args.from_numbers, "fig5")
        unit = str(arrays.pop("distance_unit", "px"))  # older files do not name it
    else:
        models = study.load_all(args, study.checkpoints(args, ROWS, "fig5"))
        images = study.images(args, models)
        if images is None:
            return {}
        arrays = {name: distance_and_entropy(model, batches, args.distance_unit, args.keep_prefix)
                  for name, model, batches in study.each_model(args, models, images)}
        about = study.about(args, models, images, distance_unit=args.distance_unit, keep_prefix=args.keep_prefix)
        unit = UNITS[args.distance_unit]
        study.save(args, "fig5", {**arrays, "distance_unit": np.array(unit)}, about, describe(arrays, unit))
    report.draw_numbers(args, "fig5", partial(draw_box_plots, unit=unit), arrays)
    return arrays


if __name__ == "__main__":
    entry.run_script(main, build_parser(), parse=study.parse)
