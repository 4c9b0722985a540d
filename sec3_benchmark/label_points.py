"""Names beside the points of a scatter plot, none over another, over a point or outside the axes."""
import math

from matplotlib.transforms import Bbox

DISTANCES, DIRECTIONS = (5, 9, 14, 20, 27, 35, 45, 60), 16  # points away from the centre of a marker, and around it


def label_points(axes, points, size=6.5):
    """Writes the names of `points`, (x, y, name, colour) in data coordinates, each at the nearest place that is still
    free; a thin line leads to those that had to go far. The axes' limits are fixed from here on. Returns the texts.
    """
    figure = axes.figure
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())
    figure.draw_without_rendering()  # lays out the axes, so that places are final
    pixel, frame = figure.dpi / 72, axes.get_window_extent()
    centres = [axes.transData.transform(point[:2]) for point in points]
    taken = [Bbox.from_bounds(x - 3 * pixel, y - 3 * pixel, 6 * pixel, 6 * pixel) for x, y in centres]
    texts = []
    for x, y, name, colour in points:
        text = axes.annotate(name, (x, y), xytext=(0, 0), textcoords="offset points", fontsize=size, va="center",
                             color=colour)
        for dx, dy in places():
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


def places():
    """Offsets in points, the nearest first; at each distance right and left come first."""
    angles = sorted((2 * math.pi * i / DIRECTIONS for i in range(DIRECTIONS)), key=lambda a: abs(math.sin(a)))
    return [(d * math.cos(a), d * math.sin(a)) for d in DISTANCES for a in angles]
