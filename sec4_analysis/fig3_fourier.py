"""Figure 3: how much of the high spatial frequencies remains after each layer? Fourier delta log amplitude.

    python sec4_analysis/fig3_fourier.py                                              # demo: the preset's own runs
    python sec4_analysis/fig3_fourier.py --data-path IMAGENET --models MAE-Tiny=mae.pt MoCov3-Tiny=moco.pt
    python sec4_analysis/fig3_fourier.py --from-numbers outputs/fig3/fig3.npz

13 points per model: the patch tokens after patch embedding, then those of the residual stream after each block;
--sub-blocks adds points between attention and MLP. The paper's claim (Section 4.1): MoCov3-Tiny loses much of the high
frequencies in its first layer, MAE-Tiny does not. No source says which activations the authors took. --first chooses
whether the first point includes the positions, which are rich in high frequencies and part of all later points. The
last frequency is below pi, see sec4_analysis/fourier.py. Writes fig3.npz, .json, .md and draws fig3.png from the .npz.
"""
import numpy as np

from common import entry, report
from sec4_analysis import fourier, study
from sec4_analysis.activations import geometry, mean_over_images

ROWS = (study.SUPERVISED, study.MAE_ROW, study.MOCOV3)


def build_parser():
    parser = study.make_parser(__doc__, norm=False)
    group = parser.add_argument_group("points")
    group.add_argument("--first", choices=("with-positions", "without-positions"), default="with-positions",
                       help="the first point, after patch embedding: with or without positions added")
    group.add_argument("--sub-blocks", action="store_true", help="also a point between attention and MLP")
    return parser


def amplitudes(model, batches, first, sub_blocks):
    """Measure the delta log amplitude of every point at every frequency of the diagonal, mean over images.

    Returns (2, points, half diagonal), float64: the amplitudes, and their frequencies in units of pi.
    """
    _, grid, _ = geometry(model)
    parts = (".attn", "") if sub_blocks else ("",)
    wanted = ["embedded" if first == "with-positions" else "patch_embed",
              *(f"blocks.{i}{part}" for i in range(len(model.blocks)) for part in parts)]

    def of_patches(tokens):
        return fourier.log_amplitude(tokens[:, -grid[0] * grid[1]:], grid)  # prefix tokens come before the patches
    delta = fourier.delta_log_amplitude(mean_over_images(model, batches, wanted, of_patches))  # (points, half diagonal)
    return np.stack([delta.numpy(), np.tile(fourier.diagonal_frequencies(grid), (len(delta), 1))])


def table(arrays):
    """Format the delta log amplitude at the last frequency as Markdown."""
    points = max(array.shape[1] for array in arrays.values())
    return report.markdown(["point", *range(points)],
                           [[name, *(f"{value:.2f}" for value in array[0, :, -1])] for name, array in arrays.items()])


def draw_amplitudes(arrays):
    """Draw a panel with the last frequency over depth, then a panel per model with a curve per point."""
    figure, axes = report.subplots(1, len(arrays) + 1, figsize=(2.3 * len(arrays) + 3.4, 2.7),
                                   sharey=True, gridspec_kw={"width_ratios": [1.5] + [1] * len(arrays)})
    for (name, array), (style, colour) in zip(arrays.items(), study.line_styles()):
        axes[0].plot(array[0, :, -1], style, color=colour, markersize=3.5, linewidth=1.2, label=name)
    from matplotlib import cm, colormaps, colors
    last = next(iter(arrays.values()))[1, 0, -1]
    axes[0].set(xlabel="point (0: patch embedding)", ylabel="Δ log amplitude", title=f"last frequency, {last:.2f} π")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=len(arrays), fontsize=8)
    for panel, (name, array) in zip(axes[1:], arrays.items()):
        for point, (values, frequencies) in enumerate(zip(*array)):
            shade = 0.9 * point / (array.shape[1] - 1)  # without viridis's last tenth, which is too pale on white
            panel.plot(frequencies, values, color=colormaps["viridis"](shade), linewidth=1)
        panel.set(title=name, xlabel="frequency (π)")
    scale = cm.ScalarMappable(colors.Normalize(0, 1 / 0.9), "viridis")
    bar = figure.colorbar(scale, ax=axes[-1], boundaries=np.linspace(0, 1, 50), ticks=[0, 1])
    bar.set_ticklabels(["first\npoint", "last\npoint"])
    return figure


def main(args):
    """Measure, write and draw; return {model: what `amplitudes` gives}, {} if nothing was measured."""
    if args.from_numbers:
        arrays = report.read_numbers(args.from_numbers, "fig3")
    else:
        models = study.load_all(args, study.checkpoints(args, ROWS, "fig3"))
        images = study.images(args, models)
        if images is None:
            return {}
        arrays = {name: amplitudes(model, batches, args.first, args.sub_blocks)
                  for name, model, batches in study.each_model(args, models, images)}
        about = study.about(args, models, images, first=args.first, sub_blocks=args.sub_blocks)
        study.save(args, "fig3", arrays, about, f"delta log amplitude at the last frequency of the diagonal; point 0 "
                   f"is after patch embedding, {args.first.replace('-', ' ')}\n\n{table(arrays)}")
    report.draw_numbers(args, "fig3", draw_amplitudes, arrays)
    return arrays


if __name__ == "__main__":
    entry.run_script(main, build_parser(), parse=study.parse)
