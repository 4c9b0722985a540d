"""Labels for the points of a scatter plot that overlap neither each other nor the points nor the axes' border."""
import math

# Candidate positions of a label: distances from its point in points (1/72 inch), and number of directions
DISTANCES, DIRECTIONS = (5, 9, 14, 20, 27, 35, 45, 60), 16


def label_points(axes, points, size=8):
    """Label `points`, each (x, y, name, colour) in data coordinates, and return the matplotlib texts.

    Each label is put at the nearest free position; a thin line connects distant ones to their points. If no position is
    free, the last one is used. Call it last: it fixes the axes' limits.
    """
    figure = axes.figure
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())
    figure.draw_without_rendering()  # performs the layout, so that positions are final
    pixel, frame = figure.dpi / 72, axes.get_window_extent()
    centres = [axes.transData.transform(point[:2]) for point in points]
    from matplotlib.transforms import Bbox
    taken = [Bbox.from_bounds(x - 3 * pixel, y - 3 * pixel, 6 * pixel, 6 * pixel) for x, y in centres]
    texts = []
    for x, y, name, colour in points:
        text = axes.annotate(name, (x, y), xytext=(0, 0), textcoords="offset points", fontsize=size, va="center",
                             color=colour)
        for dx, dy in candidate_offsets():
            text.set(position=(dx, dy), horizontalalignment="left" if dx > 1 else "right" if dx < -1 else "center")
            box = text.get_window_extent()
            if frame.fully_contains(*box.min) and frame.fully_contains(*box.max) and not box.count_overlaps(taken):
                break
        taken.append(box)
        texts.append(text)
        if math.hypot(dx, dy) > 8:
            axes.annotate("", (x, y), xytext=(dx, dy), textcoords="offset points",
                          arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": "0.5", "shrinkA": 1, "shrinkB": 3})
    return texts


def candidate_offsets():
    """List candidate offsets (dx, dy) in points, nearest first; at each distance right and left come first."""
    angles = sorted((2 * math.pi * i / DIRECTIONS for i in range(DIRECTIONS)), key=lambda a: abs(math.sin(a)))
    return [(d * math.cos(a), d * math.sin(a)) for d in DISTANCES for a in angles]
