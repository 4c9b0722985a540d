"""COCO's data for detect.py (Appendix A.5): images with their objects, large-scale jitter.

A data set is a folder with annotations/instances_{train,val}2017.json, train2017/ and val2017/; the split is taken from
the annotation files. Categories, whatever their numbers, become labels 1, 2, ... in order. Objects come as polygons or
as run lengths; those marked as crowds are no training targets, and pycocotools ignores what is found on them.
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

RAGGED = ("boxes", "labels", "masks")  # one row per object: the images of a batch have different numbers of them


# Images and objects

def in_memory(dataset):
    """pycocotools' index of a COCO dictionary, without its prints."""
    coco = COCO()
    coco.dataset = dataset
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


@dataclass
class CocoSet(ImageSet):
    """Images with objects: `read` gives the image and its annotations, crowds left out."""

    ids: list = field(default_factory=list)  # the image ids, in the order of `images`
    entries: Packed = None  # of each image [its entry, its annotations], as JSON
    categories: dict = field(default_factory=dict)  # category id -> name, in the order of the labels
    coco: COCO = None  # pycocotools' index, of a set to measure on

    def read(self, index):
        image, (entry, annotations) = super().read(index), json.loads(self.entries[index])
        height, width = image.shape[1:]
        if (height, width) != (entry["height"], entry["width"]):
            raise UnreadableImage(f"{self.where(index)} is {height} x {width} px and the annotations say "
                                  f"{entry['height']} x {entry['width']}: they belong to another file")
        return image, objects(annotations)

    def fingerprint(self):
        """Of the images and of the annotations."""
        return hashlib.sha256(super().fingerprint().encode() + self.entries.digest()).hexdigest()[:16]


def coco_set(name, images, coco, ids, in_chans, measured):
    """A CocoSet of the images `ids`; what pycocotools needs to measure on it is kept where it is `measured`."""
    entries = Packed(json.dumps([coco.imgs[i], coco.imgToAnns[i]], sort_keys=True).encode() for i in ids)
    categories = {number: coco.cats[number]["name"] for number in sorted(coco.cats)}
    return CocoSet(name, images, None, list(categories.values()), in_chans, ids, entries, categories,
                   coco if measured else None)


def objects(annotations):
    """Those that are no crowds and have an outline."""
    return [one for one in annotations if not one.get("iscrowd") and has_outline(one)]


def has_outline(annotation):
    """Whether it has run lengths or a polygon."""
    return bool(annotation.get("segmentation"))


def object_mask(annotation, height, width):
    """The pixels of an object, (height, width) bool: polygons, run lengths or compressed run lengths."""
    outline = annotation["segmentation"]
    if isinstance(outline, list):
        outline = run_lengths.merge(run_lengths.frPyObjects(outline, height, width))
    elif isinstance(outline["counts"], list):
        outline = run_lengths.frPyObjects(outline, height, width)
    return run_lengths.decode(outline).astype(bool)


def regular(content):
    """A COCO dictionary as pycocotools needs it, in place: no object is number 0, which it takes for "no match", each
    number stands once, each object says whether it is a crowd, and a polygon has three corners or more.
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
    """Average precision needs box, area and outline of every object, and an object at all: known before a training."""
    shown = [one for image in coco.imgs for one in coco.imgToAnns[image]]
    for one in shown:
        lacking = [key for key in ("bbox", "area") if one.get(key) is None] + ["segmentation"] * (not has_outline(one))
        if lacking:
            raise DataError(f"{path}: object {one['id']} on image {one['image_id']} has no {' and no '.join(lacking)} "
                            f"(of three corners or more), so it cannot be measured: add it, or remove the object")
    if all(one["iscrowd"] for one in shown):
        raise DataError(f"{path} has no object that is no crowd: there is nothing to measure")


def read_annotations(path):
    """pycocotools' index of an annotation file. Objects of categories that it does not list are an error."""
    try:
        coco = in_memory(regular(json.loads(path.read_text())))
        strange = {one["category_id"] for one in coco.anns.values()} - coco.cats.keys()
        for needed, entries in ((("file_name", "height", "width"), coco.imgs), (("name",), coco.cats)):
            for entry in entries.values():
                [entry[key] for key in needed]  # a LookupError if one is not there
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not whole, or no COCO annotations ({type(error).__name__}: {error}): fetch it "
                        f"again") from None
    if strange:
        raise DataError(f"{path} lists {len(coco.cats)} categories, and some objects are of others (first: "
                        f"{min(map(str, strange))}): fetch it again, or add them to its \"categories\"")
    return coco


def load_coco(root, in_chans=3, splits=("train", "val")):
    """Training and validation set of a COCO folder, or one of them. Images without objects are kept for validation."""
    if in_chans not in (1, 3):
        raise DataError(f"--in-chans {in_chans}: objects are detected on images of 1 or 3 channels")
    sets = []
    for split in splits:
        path = Path(root) / "annotations" / f"instances_{split}2017.json"
        if not path.is_file():
            raise DataError(f"{path} is not there: --dataset-path must hold annotations/instances_train2017.json and "
                            f"instances_val2017.json, train2017/ and val2017/, or a folder coco/ with them")
        coco = read_annotations(path)
        ids = [i for i in sorted(coco.imgs) if split == "val" or objects(coco.imgToAnns[i])]
        files = [str(Path(root) / f"{split}2017" / coco.imgs[i]["file_name"]) for i in ids]
        if not ids:
            raise DataError(f"{path} has no image with objects")
        if split == "val":
            check_ground_truth(coco, path)
        sets.append(coco_set(f"coco-{split}", files, coco, ids, in_chans, measured=split == "val"))
    if sets[0].classes != sets[-1].classes:
        raise DataError(f"{root}: train has {len(sets[0].classes)} categories, val {len(sets[-1].classes)}, or other "
                        f"names: both annotation files must list the same")
    return sets


# Views

class DetectionViews:
    """(image, annotations) -> the image, resized to fit into the canvas, padded at the right and bottom.

    With `jitter` (low, high), in training: a flip first, then resized to fit into U(low, high) times the canvas, and a
    random crop where that is larger than the canvas. The objects come along, by nearest neighbour, and their boxes are
    drawn anew around what is left of their masks.
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
        view = {"image": padded, "size": torch.tensor(seen), "original": torch.tensor(original)}
        return {**view, **self.targets(annotations, original, size, first, seen, flip)} if self.jitter else view

    def targets(self, annotations, original, size, first, seen, flip):
        """Masks (n, H, W) bool on the canvas, tight boxes (n, 4) and labels (n,); what was cut off is left out."""
        rows, columns = (((np.arange(start, start + shown) + 0.5) * length / new).astype(int).clip(max=length - 1)
                         for start, shown, length, new in zip(first, seen, original, size))
        columns = original[1] - 1 - columns if flip else columns
        masks = torch.zeros(len(annotations), *self.canvas, dtype=torch.bool)
        for mask, annotation in zip(masks, annotations):
            mask[:seen[0], :seen[1]] = torch.from_numpy(object_mask(annotation, *original)[np.ix_(rows, columns)])
        left = masks.flatten(1).any(1)
        labels = torch.tensor([self.labels[one["category_id"]] for one in annotations], dtype=torch.int64)
        return {"masks": masks[left], "boxes": tight_boxes(masks[left]), "labels": labels[left],
                "count": int(left.sum())}

    @staticmethod
    def collate(samples):
        """A batch; the objects of all its images follow each other, `count` of each."""
        batch = default_collate([{k: v for k, v in sample.items() if k not in RAGGED} for sample in samples])
        return {**batch, **{k: torch.cat([sample[k] for sample in samples]) for k in RAGGED if k in samples[0]}}


def tight_boxes(masks):
    """masks (n, H, W), none empty -> (n, 4): x1, y1 of the first pixels, x2, y2 behind the last ones."""
    if not len(masks):
        return torch.zeros(0, 4)
    return masks_to_boxes(masks).float() + torch.tensor([0.0, 0.0, 1.0, 1.0])


def targets_of(batch):
    """The targets of each image of a training batch, as MaskRCNN takes them."""
    count = batch["count"].tolist()
    return [dict(zip(RAGGED, one)) for one in zip(*(batch[name].split(count) for name in RAGGED))]
