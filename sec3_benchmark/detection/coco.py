"""COCO data for detect.py (Appendix A.5): images with annotated objects, augmented by large-scale jitter.

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
from common.errors import DataError
from common.files import Packed
from common.images import ImageSet, UnreadableImage
from common.vit import pair
from sec3_benchmark.detection.annotations import read_annotations

RAGGED = ("boxes", "labels", "masks")  # these have one row per object, and the number of objects differs by image


# Images and objects

def index_coco(dataset):
    """Index a COCO dictionary with pycocotools, silently."""
    coco = COCO()
    coco.dataset = {"info": {}, **dataset}  # some versions of pycocotools need "info"
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
        """Read (uint8 tensor (C, H, W), annotations). Raises UnreadableImage, also for a size other than annotated."""
        image, (entry, annotations) = super().read(index), json.loads(self.entries[index])
        height, width = image.shape[1:]
        if (height, width) != (entry["height"], entry["width"]):
            why = "they belong to another file"
            if (width, height) == (entry["height"], entry["width"]):
                why = ("if the file has an EXIF orientation, by which images are turned here, store it turned or "
                       "remove that, whichever fits its outlines")
            raise UnreadableImage(f"{self.where(index)} is {height} x {width} px and the annotations say "
                                  f"{entry['height']} x {entry['width']}: {why}")
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
    """Return the annotations that are not crowds and have an outline, either polygons or run lengths."""
    return [one for one in annotations if not one.get("iscrowd") and one.get("segmentation")]


def object_mask(annotation, height, width):
    """Decode an object's polygons, run lengths or compressed run lengths to a mask (height, width) bool."""
    segmentation = annotation["segmentation"]
    if isinstance(segmentation, list):
        segmentation = run_lengths.merge(run_lengths.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        segmentation = run_lengths.frPyObjects(segmentation, height, width)
    return run_lengths.decode(segmentation).astype(bool)


def load_coco(root, in_chans=3, splits=("train", "val")):
    """Load these splits of a COCO folder: a list of CocoSets. Raises DataError.

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
        coco = index_coco(read_annotations(path, evaluated=split == "val"))
        ids = [i for i in sorted(coco.imgs) if split == "val" or training_objects(coco.imgToAnns[i])]
        files = [str(Path(root) / f"{split}2017" / coco.imgs[i]["file_name"]) for i in ids]
        if not ids:
            raise DataError(f"{path} has no image" if split == "val" else
                            f"{path} has no object to train on: one that is no crowd and has an outline (segmentation) "
                            f"of three corners or more, or run lengths. From boxes alone no masks are learnt")
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
        resized = [max(1, round(length * scale)) for length in original]
        image = resize(image.flip(-1) if flip else image, resized, "bilinear")
        height, width = crop = [min(length, side) for length, side in zip(resized, self.canvas)]
        top, left = [int(torch.randint(length - shown + 1, ())) if self.jitter else 0
                     for length, shown in zip(resized, crop)]
        padded = torch.zeros(len(image), *self.canvas, dtype=torch.uint8)
        padded[:, :height, :width] = image[:, top:top + height, left:left + width]
        view = {"image": padded, "host_size": torch.tensor(crop), "host_original": torch.tensor(original)}
        if self.jitter:
            view.update(self.targets(annotations, original, resized, (top, left), crop, flip))
        return view

    def targets(self, annotations, original, resized, corner, crop, flip):
        """Compute the visible objects' masks (n, H, W) bool on the canvas, boxes (n, 4), labels (n,) and count.

        original, resized, crop: (height, width) of the original image, of the resized one, and of the crop from it,
        whose first pixel is at `corner` (row, column).
        """
        rows, columns = (((np.arange(first, first + shown) + 0.5) * length / new).astype(int).clip(max=length - 1)
                         for first, shown, length, new in zip(corner, crop, original, resized))
        columns = original[1] - 1 - columns if flip else columns
        masks = torch.zeros(len(annotations), *self.canvas, dtype=torch.bool)
        for mask, annotation in zip(masks, annotations):
            mask[:crop[0], :crop[1]] = torch.from_numpy(object_mask(annotation, *original)[np.ix_(rows, columns)])
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
