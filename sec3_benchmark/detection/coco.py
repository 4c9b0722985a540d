"""COCO data for detect.py (Appendix A.5): images with annotated objects, large-scale jitter.

A data set is a folder with annotations/instances_{train,val}2017.json, train2017/ and val2017/; the annotation files
define the splits. Category ids are mapped to labels 1, 2, ... in ascending order. Segmentations are polygons or run
lengths. Objects marked as crowds are no training targets, and pycocotools ignores detections on them.
"""
import contextlib
import hashlib
import io
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from pycocotools import mask as run_lengths
from pycocotools.coco import COCO
from torch.utils.data import default_collate
from torchvision.ops import masks_to_boxes

from common.augment import resize
from common.images import DataError, ImageSet, Packed, UnreadableImage
from common.vit import pair

RAGGED = ("boxes", "labels", "masks")  # one row per object, of which images have different numbers


# Images and objects

def index_coco(dataset):
    """Index a COCO dictionary with pycocotools, silently."""
    coco = COCO()
    coco.dataset = dataset
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


@dataclass
class CocoSet(ImageSet):
    """An ImageSet with objects: `read` returns (image, its annotations without crowds)."""

    ids: list = field(default_factory=list)  # image ids, in the order of `images`
    entries: Packed = None  # for each image [image entry, annotations], as JSON
    categories: dict = field(default_factory=dict)  # category id -> name, in the order of the labels
    coco: COCO = None  # pycocotools' index, only of a set for evaluation

    def read(self, index):
        """Read (uint8 tensor (C, H, W), annotations). Raises UnreadableImage, also if the sizes do not agree."""
        image, (entry, annotations) = super().read(index), json.loads(self.entries[index])
        height, width = image.shape[1:]
        if (height, width) != (entry["height"], entry["width"]):
            raise UnreadableImage(f"{self.where(index)} is {height} x {width} px and the annotations say "
                                  f"{entry['height']} x {entry['width']}: they belong to another file")
        return image, training_objects(annotations)

    def fingerprint(self):
        """Hash the content of the images and the annotations."""
        return hashlib.sha256(super().fingerprint().encode() + self.entries.digest()).hexdigest()[:16]


def coco_set(name, images, coco, ids, in_chans, keep_index) -> CocoSet:
    """Build a CocoSet of the images `ids`; pycocotools' index is kept, for an evaluation, only with `keep_index`."""
    entries = Packed(json.dumps([coco.imgs[i], coco.imgToAnns[i]], sort_keys=True).encode() for i in ids)
    categories = {number: coco.cats[number]["name"] for number in sorted(coco.cats)}
    return CocoSet(name, images, None, list(categories.values()), in_chans, ids, entries, categories,
                   coco if keep_index else None)


def training_objects(annotations):
    """Return the annotations that are no crowds and have a segmentation."""
    return [one for one in annotations if not one.get("iscrowd") and has_segmentation(one)]


def has_segmentation(annotation):
    """Return whether an annotation has run lengths or a polygon."""
    return bool(annotation.get("segmentation"))


def object_mask(annotation, height, width):
    """Decode an object's polygons, run lengths or compressed run lengths to a mask (height, width) bool."""
    segmentation = annotation["segmentation"]
    if isinstance(segmentation, list):
        segmentation = run_lengths.merge(run_lengths.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        segmentation = run_lengths.frPyObjects(segmentation, height, width)
    return run_lengths.decode(segmentation).astype(bool)


def repair_annotations(content):
    """Repair a COCO dictionary in place, so that pycocotools evaluates it correctly, and return it.

    Annotation ids become unique and nonzero (pycocotools takes id 0 for "no match"), "iscrowd" defaults to 0, and
    polygons with fewer than three corners are removed.
    """
    annotations = content["annotations"]
    numbers = [one.get("id") for one in annotations]
    if {0, None} & set(numbers) or len(set(numbers)) < len(numbers):
        for number, one in enumerate(annotations, 1):
            one["id"] = number
    for one in annotations:
        one.setdefault("iscrowd", 0)
        if isinstance(one.get("segmentation"), list):
            one["segmentation"] = [polygon for polygon in one["segmentation"] if len(polygon) >= 6]
    return content


def check_ground_truth(coco, path):
    """Raise DataError before training if a validation set cannot be evaluated.

    Every object needs a box, an area and a segmentation, and there must be one that is no crowd.
    """
    annotated = [one for image in coco.imgs for one in coco.imgToAnns[image]]
    for one in annotated:
        lacking = [key for key in ("bbox", "area") if one.get(key) is None]
        lacking += [] if has_segmentation(one) else ["segmentation"]
        if lacking:
            raise DataError(f"{path}: object {one['id']} on image {one['image_id']} has no {' and no '.join(lacking)} "
                            f"(of three corners or more), so it cannot be measured: add it, or remove the object")
    if all(one["iscrowd"] for one in annotated):
        raise DataError(f"{path} has no object that is no crowd: there is nothing to measure")


def read_annotations(path):
    """Read an annotation file into pycocotools' index. Raises DataError if it is malformed or lacks a category."""
    try:
        coco = index_coco(repair_annotations(json.loads(path.read_text())))
        unknown = {one["category_id"] for one in coco.anns.values()} - coco.cats.keys()
        for needed, entries in ((("file_name", "height", "width"), coco.imgs), (("name",), coco.cats)):
            for entry in entries.values():
                [entry[key] for key in needed]  # LookupError if a field is missing
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not whole, or no COCO annotations ({type(error).__name__}: {error}): fetch it "
                        f"again") from None
    if unknown:
        raise DataError(f"{path} lists {len(coco.cats)} categories, and some objects are of others (first: "
                        f"{min(map(str, unknown))}): fetch it again, or add them to its \"categories\"")
    return coco


def load_coco(root, in_chans=3, splits=("train", "val")):
    """Load the sets of these splits of a COCO folder, a list of CocoSets. Raises DataError.

    Images without objects are left out of the training set and kept in the validation set.
    """
    if in_chans not in (1, 3):
        raise DataError(f"--in-chans {in_chans}: objects are detected on images of 1 or 3 channels")
    sets = []
    for split in splits:
        path = Path(root) / "annotations" / f"instances_{split}2017.json"
        if not path.is_file():
            raise DataError(f"{path} is not there: --dataset-path must hold annotations/instances_train2017.json and "
                            f"instances_val2017.json, train2017/ and val2017/, or a folder coco/ with them")
        coco = read_annotations(path)
        ids = [i for i in sorted(coco.imgs) if split == "val" or training_objects(coco.imgToAnns[i])]
        files = [str(Path(root) / f"{split}2017" / coco.imgs[i]["file_name"]) for i in ids]
        if not ids:
            raise DataError(f"{path} has no image with objects")
        if split == "val":
            check_ground_truth(coco, path)
        sets.append(coco_set(f"coco-{split}", files, coco, ids, in_chans, keep_index=split == "val"))
    if sets[0].classes != sets[-1].classes:
        raise DataError(f"{root}: train has {len(sets[0].classes)} categories, val {len(sets[-1].classes)}, or other "
                        f"names: both annotation files must list the same")
    return sets


# Views

class DetectionViews:
    """Transform (image, annotations) to a view: the image resized to fit the canvas and padded at right and bottom.

    With `jitter` (low, high), for training: a random flip, a resize to fit U(low, high) times the canvas, and a random
    crop to the canvas where that is larger. Masks are transformed too, by nearest neighbour, and boxes are recomputed
    from the visible part of the masks. labels: category id -> label.
    """

    def __init__(self, img_size, labels, jitter=None):
        self.canvas, self.labels, self.jitter = pair(img_size), labels, jitter

    def __call__(self, read):
        image, annotations = read
        original = tuple(image.shape[1:])
        flip, scale = False, 1.0
        if self.jitter:
            flip, scale = bool(torch.rand(()) < 0.5), float(torch.empty(()).uniform_(*self.jitter))
        scale *= min(side / length for side, length in zip(self.canvas, original))
        size = [max(1, round(length * scale)) for length in original]
        image = resize(image.flip(-1) if flip else image, size, "bilinear")
        first = [int(torch.randint(max(0, length - side) + 1, ())) if self.jitter else 0
                 for length, side in zip(size, self.canvas)]
        seen = [min(length, side) for length, side in zip(size, self.canvas)]
        padded = torch.zeros(len(image), *self.canvas, dtype=torch.uint8)
        padded[:, :seen[0], :seen[1]] = image[:, first[0]:first[0] + seen[0], first[1]:first[1] + seen[1]]
        view = {"image": padded, "host_size": torch.tensor(seen), "host_original": torch.tensor(original)}
        return {**view, **self.targets(annotations, original, size, first, seen, flip)} if self.jitter else view

    def targets(self, annotations, original, size, first, seen, flip):
        """Compute the visible objects' masks (n, H, W) bool on the canvas, boxes (n, 4), labels (n,) and count.

        original, size, seen: (height, width) of the original image, after resizing, and of the crop, which starts at
        `first` (row, column) of the resized image.
        """
        rows, columns = (((np.arange(start, start + shown) + 0.5) * length / new).astype(int).clip(max=length - 1)
                         for start, shown, length, new in zip(first, seen, original, size))
        columns = original[1] - 1 - columns if flip else columns
        masks = torch.zeros(len(annotations), *self.canvas, dtype=torch.bool)
        for mask, annotation in zip(masks, annotations):
            mask[:seen[0], :seen[1]] = torch.from_numpy(object_mask(annotation, *original)[np.ix_(rows, columns)])
        visible = masks.flatten(1).any(1)
        labels = torch.tensor([self.labels[one["category_id"]] for one in annotations], dtype=torch.int64)
        return {"masks": masks[visible], "boxes": tight_boxes(masks[visible]), "labels": labels[visible],
                "host_count": int(visible.sum())}

    @staticmethod
    def collate(samples):
        """Collate samples to a batch. Objects of all images are concatenated; "host_count" (B,): how many each has."""
        batch = default_collate([{k: v for k, v in sample.items() if k not in RAGGED} for sample in samples])
        return {**batch, **{k: torch.cat([sample[k] for sample in samples]) for k in RAGGED if k in samples[0]}}


def tight_boxes(masks):
    """Compute the bounding boxes of non-empty masks (n, H, W): (n, 4), x1, y1, x2, y2 at the pixels' outer edges."""
    if not len(masks):
        return torch.zeros(0, 4)
    return masks_to_boxes(masks).float() + torch.tensor([0.0, 0.0, 1.0, 1.0])


def image_targets(batch):
    """Split a training batch's targets by image: a list of {"boxes", "labels", "masks"}, the input of MaskRCNN."""
    count = batch["host_count"].tolist()
    return [dict(zip(RAGGED, one)) for one in zip(*(batch[name].split(count) for name in RAGGED))]
