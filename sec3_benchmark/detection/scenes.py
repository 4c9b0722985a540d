"""Generated scenes for detection without data: one to four shapes with fractal textures on a fractal background.

The category is a shape's outline; size, rotation, colour and texture are independent of it. Later shapes may cover
earlier ones; masks are exactly the visible pixels, and boxes enclose them tightly. A scene depends on (seed, split,
index) and its size alone.
"""
from pathlib import Path

import numpy as np
from pycocotools import mask as run_lengths

from common.errors import DataError
from common.fractals import fractal_set
from common.vit import pair
from sec3_benchmark.detection.coco import coco_set, index_coco, load_coco

SHAPES = {  # category -> whether a point is inside; u, v: coordinates from the centre, rotated, in radii
    "disc": lambda u, v: u**2 + v**2 <= 1,
    "square": lambda u, v: np.maximum(abs(u), abs(v)) <= 0.8,
    "triangle": lambda u, v: (v <= 0.6) & (abs(u) <= (v + 1) * 0.62),
    "cross": lambda u, v: (np.maximum(abs(u), abs(v)) <= 1) & (np.minimum(abs(u), abs(v)) <= 0.3),
}
SPLITS = {"train": 800, "val": 100}  # number of scenes
TEXTURES = 10, 20  # number of fractal classes, images per class
OBJECTS = (1, 4)  # fewest and most shapes in a scene
RADIUS = (0.11, 0.24)  # smallest and largest, relative to the shorter side of the scene
VISIBLE = 0.4  # smallest visible share of a shape; scenes with a more hidden one are generated again


def draw_scene(rng, textures, height, width):
    """Generate a scene: image (height, width, 3) uint8, masks (n, height, width) bool, labels (n,) from 0.

    textures: (N, height, width, 3).
    """
    y, x = np.mgrid[:height, :width] + 0.5
    while True:
        image = 0.4 * textures[rng.integers(len(textures))]
        count = rng.integers(OBJECTS[0], OBJECTS[1] + 1)
        masks, labels = np.zeros((count, height, width), bool), rng.integers(len(SHAPES), size=count)
        full_area = np.zeros(count)
        for i, label in enumerate(labels):
            is_inside = list(SHAPES.values())[label]
            radius = rng.uniform(*RADIUS) * min(height, width)
            centre = rng.uniform(radius, np.array([height, width]) - radius)
            turn = rng.uniform(-np.pi / 6, np.pi / 6)
            down, right = (y - centre[0]) / radius, (x - centre[1]) / radius
            u, v = np.cos(turn) * right - np.sin(turn) * down, np.sin(turn) * right + np.cos(turn) * down
            shape = is_inside(u, v)
            masks[:i] &= ~shape
            masks[i], full_area[i] = shape, shape.sum()
            filling = 0.3 * textures[rng.integers(len(textures))] + rng.uniform(60, 178, 3)
            image = np.where(shape[..., None], filling, image)
        if (masks.sum((1, 2)) >= VISIBLE * full_area).all():
            return image.astype(np.uint8), masks, labels


def annotation(number, image_id, mask, label):
    """Make a COCO annotation with compressed run lengths."""
    lengths = run_lengths.encode(np.asfortranarray(mask.astype(np.uint8)))
    box = run_lengths.toBbox(lengths).tolist()
    return {"id": number, "image_id": image_id, "category_id": int(label) + 1, "bbox": box, "iscrowd": 0,
            "area": float(mask.sum()), "segmentation": {**lengths, "counts": lengths["counts"].decode()}}


def scene_set(split, textures, size, count, in_chans=3, seed=0):
    """Generate `count` scenes with annotations as a CocoSet; textures as in `draw_scene`."""
    height, width = pair(size)
    images, annotations = np.empty((count, height, width, 3), np.uint8), []
    for i in range(count):
        rng = np.random.default_rng((seed, list(SPLITS).index(split), i))
        images[i], masks, labels = draw_scene(rng, textures, height, width)
        annotations += [annotation(len(annotations) + j + 1, i, mask, label)
                        for j, (mask, label) in enumerate(zip(masks, labels))]
    coco = index_coco({"images": [{"id": i, "height": height, "width": width} for i in range(count)],
                      "annotations": annotations,
                      "categories": [{"id": i + 1, "name": name} for i, name in enumerate(SHAPES)]})
    return coco_set(f"scenes-{split}", images, coco, list(range(count)), in_chans, keep_index=True)


def load_scenes(args, splits=("train", "val")):
    """Generate scenes of size args.img_size, a CocoSet for each split; their textures are cached in args.output."""
    size, sets = pair(args.img_size), []
    for split in splits:
        textures, _ = fractal_set(Path(args.output) / "data", split, *TEXTURES, size)
        sets.append(scene_set(split, textures, size, SPLITS[split], args.in_chans))
    return sets


def load_detection_sets(args, splits=("train", "val")):
    """Load a CocoSet for each split: the COCO folder --dataset-path, or without one generated scenes (demo preset)."""
    if not args.dataset_path:
        if args.preset != "demo":
            raise DataError(f"--preset {args.preset} needs --dataset-path, a COCO folder; without data: --preset demo")
        return load_scenes(args, splits)
    inside = Path(args.dataset_path) / "coco"
    return load_coco(inside if inside.is_dir() else args.dataset_path, args.in_chans, splits)
