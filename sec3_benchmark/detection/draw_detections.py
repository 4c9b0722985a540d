"""Pictures of detections: each image with its annotations, below it the same image with the detected objects."""
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from common import distributed, report
from common.checkpoint import save_json
from common.distributed import print0
from common.images import to_pillow
from sec3_benchmark.detection.average_precision import detect_all
from sec3_benchmark.detection.coco import object_mask

SHOWN = 0.4  # lowest score of the detections drawn
PER_ROW = 4  # images


def detect_and_draw(model, images, args, device, folder):
    """Detect objects on the first args.draw images: write predictions.json and, from it, predictions.png (rank 0)."""
    if not args.draw or not distributed.is_main():
        return
    few = replace(images, images=images.images[:args.draw], ids=images.ids[:args.draw])
    numbers, picture = Path(folder) / "predictions.json", Path(folder) / "predictions.png"
    numbers.parent.mkdir(parents=True, exist_ok=True)
    save_json(numbers, detect_all(model, few, args, device))
    with report.only_a_picture(picture):
        draw_detections(few, numbers, picture)
        print0(f"drawn: {picture}")


def draw_detections(images, found, path):
    """Draw all images of a small CocoSet: annotations above, the detections in the JSON file `found` below."""
    found, count = json.loads(Path(found).read_text()), len(images)
    columns, blocks = min(PER_ROW, count), -(-count // PER_ROW)
    figure, axes = report.subplots(2 * blocks, columns, figsize=(2.4 * columns, 4.8 * blocks), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for i in range(count):
        image, annotations = images.read(i)
        predicted = [one for one in found if one["image_id"] == images.ids[i] and one["score"] >= SHOWN]
        predicted.sort(key=lambda one: one["score"])  # highest scores are drawn last, on top
        row, column = 2 * (i // PER_ROW), i % PER_ROW
        for axis, entries, title in ((axes[row, column], annotations, "annotated"),
                                     (axes[row + 1, column], predicted, f"found, score >= {SHOWN:g}")):
            overlay(axis, to_pillow(image), entries, images.categories)
            axis.set_title(title, fontsize=8)
    report.save_figure(figure, path)


def overlay(axis, image, entries, categories):
    """Draw an image with each object's mask, box, category and, for detections, score."""
    pixels = np.asarray(image.convert("RGB")).astype(float)
    for i, one in enumerate(entries):
        colour = report.COLOURS[i % (len(report.COLOURS) - 1)]  # without the last, black
        tint = np.array([int(colour[k:k + 2], 16) for k in (1, 3, 5)])
        mask = object_mask(one, image.height, image.width)
        pixels[mask] = 0.5 * pixels[mask] + 0.5 * tint
    axis.imshow(pixels.astype(np.uint8))
    for i, one in enumerate(entries):
        colour = report.COLOURS[i % (len(report.COLOURS) - 1)]
        left, top, width, height = one["bbox"]
        axis.plot([left, left + width, left + width, left, left], [top, top, top + height, top + height, top],
                  color=colour, linewidth=1.2)
        score = f" {one['score']:.2f}" if "score" in one else ""
        axis.text(left, top, categories[one["category_id"]] + score, fontsize=5.5, color="white", va="bottom",
                  bbox=dict(facecolor=colour, edgecolor="none", pad=0.8))
