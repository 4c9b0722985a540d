"""coco.py, average_precision.py, scenes.py: annotations of every kind, jitter, AP of known answers."""
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from common.images import DataError, UnreadableImage
from common.loader import Views, data_loader, seed_everything, step_batches
from sec3_benchmark.detection import scenes
from sec3_benchmark.detection.average_precision import average_precision, to_coco
from sec3_benchmark.detection.coco import (
    DetectionViews,
    image_targets,
    index_coco,
    load_coco,
    object_mask,
    training_objects,
)
from sec3_benchmark.detection.mask_rcnn import mask_targets
from tests.helpers import assert_close, tensor

RECTANGLE = [[10, 5, 30, 5, 30, 20, 10, 20]]  # x from 10 to 30, y from 5 to 20
LENGTHS = {"size": [40, 50], "counts": [2, 3, 1995]}  # column by column: rows 2 to 4 of the first one


def one(number, image, category, outline, crowd=0):
    return {"id": number, "image_id": image, "category_id": category, "segmentation": outline, "iscrowd": crowd,
            "bbox": [10, 5, 20, 15], "area": 300}


@pytest.fixture
def folder(tmp_path):
    """Write four images of 40 x 50 px: two objects and a crowd; nothing; only a crowd; an object without outline."""
    (tmp_path / "annotations").mkdir()
    images = [{"id": i, "file_name": f"{i}.png", "height": 40, "width": 50} for i in (8, 2, 5, 6)]
    annotations = [one(1, 8, 90, RECTANGLE), one(2, 8, 3, LENGTHS), one(3, 8, 3, LENGTHS, crowd=1),
                   one(4, 5, 7, LENGTHS, crowd=1), one(5, 6, 7, [[1, 1, 2, 2]])]
    categories = [{"id": 90, "name": "kite"}, {"id": 3, "name": "car"}, {"id": 7, "name": "bus"}]
    for split in ("train", "val"):
        if split == "val":
            annotations.pop()  # what has no outline cannot be measured
        (tmp_path / f"{split}2017").mkdir()
        for image in images:
            Image.fromarray(np.full((40, 50, 3), image["id"], np.uint8)).save(
                tmp_path / f"{split}2017" / image["file_name"])
        text = json.dumps({"images": images, "annotations": annotations, "categories": categories})
        (tmp_path / "annotations" / f"instances_{split}2017.json").write_text(text)
    return tmp_path


# Annotations

def test_crowds_and_empty_images_are_no_training_targets_but_are_evaluated(folder):
    train, val = load_coco(folder)
    assert train.ids == [8] and val.ids == [2, 5, 6, 8]
    assert train.classes == ["car", "bus", "kite"]  # by category number: labels 1, 2, 3
    assert list(train.categories.items()) == [(3, "car"), (7, "bus"), (90, "kite")]
    image, annotations = train.read(0)
    assert image.shape == (3, 40, 50) and (image == 8).all() and [one["id"] for one in annotations] == [1, 2]
    assert [val.read(i)[1] for i in range(3)] == [[], [], []] and val.read(3)[1] == annotations
    assert [training_objects(val.coco.imgToAnns[i]) for i in (2, 5, 6)] == [[], [], []]


def test_the_fingerprint_sees_the_annotations(folder):
    before = load_coco(folder)[0].fingerprint()
    assert load_coco(folder)[0].fingerprint() == before
    path = folder / "annotations" / "instances_train2017.json"
    path.write_text(path.read_text().replace("[10, 5, 30, 5, 30, 20, 10, 20]", "[10, 5, 31, 5, 31, 20, 10, 20]"))
    assert load_coco(folder)[0].fingerprint() != before


def test_a_folder_that_is_not_coco_and_an_image_of_another_size_are_named(folder):
    with pytest.raises(DataError, match="instances_train2017.json is not there: --dataset-path must hold"):
        load_coco(folder / "train2017")
    Image.new("RGB", (50, 41)).save(folder / "train2017" / "8.png")
    with pytest.raises(UnreadableImage, match="8.png is 41 x 50 px and the annotations say 40 x 50"):
        load_coco(folder)[0].read(0)


@pytest.mark.parametrize(("old", "new", "message"), [
    ('"categories"', '"kinds"', "has no list of categories"),
    ('"category_id": 90', '"category_id": 91', r"annotations\[0\] .id 1. has category_id 91, .* are .90, 3, 7."),
    ('"category_id": 90', '"kind": 90', r"annotations\[0\] .id 1. has no category_id"),
    ('"file_name"', '"coco_url"', r"images\[0\] .id 8. has no file_name"),
    ('"height"', '"rows"', r"images\[0\] .id 8. has no height"),
    ('"name"', '"title"', r"categories\[0\] .id 90. has no name"),
    ('"annotations": [', '"annotations": ["x", ', r"annotations\[0\] .no id. is 'x', not a mapping"),
    ("{", "", "is not whole, or no json")])
def test_annotations_that_cannot_be_right_are_named(folder, old, new, message):
    path = folder / "annotations" / "instances_train2017.json"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(DataError, match=f"instances_train2017.json.*{message}"):
        load_coco(folder)


def rewritten(folder, split, change):
    """Apply change(annotations) to the annotation file of a split; return the folder."""
    path = folder / "annotations" / f"instances_{split}2017.json"
    content = json.loads(path.read_text())
    change(content["annotations"])
    path.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("numbers", [[0, 1, 2, 3], [1, 1, 2, 1], [None] * 4, ["a", "b", "c", "d"], [[1], 2, 3, 4],
                                     [10**400, 1, 2, 3]])
def test_perfect_answers_are_perfect_however_objects_are_numbered(folder, numbers):
    """pycocotools reads number 0 as "no match", and keeps only the last of several objects with one number."""
    def renumber(annotations):
        annotations[1] |= {"image_id": 2, "segmentation": [[10, 25, 30, 25, 30, 38, 10, 38]], "bbox": [10, 25, 20, 13]}
        for one, number in zip(annotations, numbers):
            one.pop("id")
            one.pop("iscrowd") if not one["iscrowd"] else None
            one |= {} if number is None else {"id": number}
    val = load_coco(rewritten(folder, "val", renumber), splits=("val",))[0]
    found = []
    for one in val.coco.anns.values():
        if not one["iscrowd"]:
            exact = scenes.annotation(0, one["image_id"], object_mask(one, 40, 50), 0)
            found.append({**exact, "category_id": one["category_id"], "bbox": one["bbox"], "score": 0.9})
    result = average_precision(val.coco, val.ids, found)
    assert len(found) == 2 and result["box_ap"] > 99.9 and result["mask_ap"] > 99.9


@pytest.mark.parametrize(("change", "message"), [
    (lambda annotations: annotations[0].pop("area"), ".id 1. has no area"),
    (lambda annotations: annotations[0].pop("bbox"), ".id 1. has no bbox"),
    (lambda annotations: annotations[0].update(segmentation=[]), ".id 1. has no segmentation"),
    (lambda annotations: annotations[0].update(segmentation=[[1, 1, 2, 2]]), "no segmentation .of three corners"),
    (lambda annotations: [one.update(iscrowd=1) for one in annotations], "nothing to measure")])
def test_what_cannot_be_measured_is_said_before_a_training(folder, change, message):
    with pytest.raises(DataError, match=f"instances_val2017.json.*{message}"):
        load_coco(rewritten(folder, "val", change))


def test_a_flat_polygon_beside_a_good_one_is_passed_over(folder):
    def flatten(annotations):
        annotations[0]["segmentation"].append([1, 1, 2, 2])
    [val] = load_coco(rewritten(folder, "val", flatten), splits=("val",))
    assert val.coco.anns[1]["segmentation"] == RECTANGLE


def test_what_pycocotools_can_measure_is_not_refused(folder):
    """That is an area of 0, and objects on images that the file does not list."""
    def change(annotations):
        annotations[0]["area"] = 0.0
        annotations.append({"id": 77, "image_id": 999, "category_id": 3})
    assert len(load_coco(rewritten(folder, "val", change), splits=("val",))) == 1


def test_other_channels_are_refused(folder):
    with pytest.raises(DataError, match="--in-chans 4: objects are detected on images of 1 or 3"):
        load_coco(folder, 4)


def test_masks_of_polygons_and_run_lengths():
    expected = np.zeros((40, 50), bool)
    expected[5:20, 10:30] = True
    assert (object_mask(one(1, 8, 90, RECTANGLE), 40, 50) == expected).all()
    expected = np.zeros((40, 50), bool)
    expected[2:5, 0] = True
    assert (object_mask(one(1, 8, 3, LENGTHS), 40, 50) == expected).all()


# Jitter

def rectangle_scene(height, width, top, left, bottom, right):
    """Return a white rectangle on black, as an image and its annotation."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[top:bottom, left:right] = 255
    return tensor(pixels), [scenes.annotation(1, 0, pixels[..., 0] > 0, 4)]


@pytest.mark.parametrize("size", [(60, 90), (90, 60), (64, 64)])
def test_jitter_moves_objects_with_their_pixels_and_draws_their_boxes_anew(size):
    """After flip, scale and crop the mask is where the image is white, and the box just encloses it."""
    views, seen, kept, flipped = DetectionViews(64, {5: 7}, (0.3, 2.0)), [], 0, 0
    for seed in range(60):
        seed_everything("sample", seed)
        view = views(rectangle_scene(*size, 12, 6, 40, 33))
        assert view["image"].shape == (3, 64, 64) and view["image"].dtype == torch.uint8
        height, width = view["host_size"].tolist()
        assert not view["image"][:, height:].any() and not view["image"][:, :, width:].any()
        seen.append(max(height, width))
        white = view["image"][0] > 127
        if not view["host_count"]:
            assert white.sum() < 30  # a thin rest at the edge at most
            continue
        kept += 1
        [mask], [box] = view["masks"], view["boxes"].tolist()
        assert (mask & white).sum() / (mask | white).sum() > 0.8
        y, x = torch.where(mask)
        assert box == [x.min(), y.min(), x.max() + 1, y.max() + 1]
        assert view["labels"].tolist() == [7]
        flipped += (x.float().mean() > width / 2).item()
    assert min(seen) < 32 and max(seen) == 64 and kept > 45 and 10 < flipped < 50


def test_objects_that_the_crop_cuts_off_are_left_out():
    views, counts = DetectionViews(32, {5: 1}, (2.0, 2.0)), set()
    for seed in range(20):
        seed_everything("sample", seed)
        view = views(rectangle_scene(64, 64, 0, 0, 20, 20))
        counts.add(view["host_count"])
        assert len(view["masks"]) == len(view["boxes"]) == len(view["labels"]) == view["host_count"]
        assert view["masks"].flatten(1).any(1).all()
    assert counts == {0, 1}


def test_evaluation_fits_the_longer_side_and_draws_nothing_at_random():
    view = DetectionViews(64, None)(rectangle_scene(50, 100, 0, 0, 25, 50))
    assert view["host_size"].tolist() == [32, 64] and view["host_original"].tolist() == [50, 100]
    assert set(view) == {"image", "host_size", "host_original"}
    assert (view["image"][:, :15, :31] == 255).all() and not view["image"][:, 17:].any()
    assert DetectionViews((64, 32), None)(rectangle_scene(50, 100, 0, 0, 1, 1))["host_size"].tolist() == [16, 32]


def test_a_batch_keeps_each_images_objects_apart():
    [textures] = [np.zeros((1, 40, 40, 3), np.uint8)]
    images = scenes.scene_set("train", textures, 40, 6)
    views = Views(images, DetectionViews(40, {c: c for c in images.coco.cats}, (1.0, 1.0)), 0)
    keys = step_batches(6, batch_size=6, accumulation=2, seed=0, start_step=0, total_steps=1)
    for batch in data_loader(views, keys, 0, torch.device("cpu")):
        for index, target in zip(batch["index"].tolist(), image_targets(batch), strict=True):
            annotations = images.coco.imgToAnns[index]
            assert target["labels"].tolist() == [one["category_id"] for one in annotations]
            assert [mask.sum().item() for mask in target["masks"]] == [one["area"] for one in annotations]


# Scenes

def test_scenes_have_exact_masks_and_boxes():
    textures = np.random.RandomState(0).randint(0, 255, (3, 96, 96, 3), dtype=np.uint8)
    images = scenes.scene_set("val", textures, 96, 20)
    again = scenes.scene_set("val", textures, 96, 20)
    other = scenes.scene_set("train", textures, 96, 20)
    assert (images.images == again.images).all() and images.fingerprint() == again.fingerprint() != other.fingerprint()
    counts = set()
    for i in range(20):
        image, annotations = images.read(i)
        masks = [object_mask(one, 96, 96) for one in annotations]
        assert sum(mask.astype(int) for mask in masks).max() == 1  # visible pixels belong to one object
        counts.add(len(masks))
        for mask, entry in zip(masks, annotations):
            y, x = np.where(mask)
            assert entry["bbox"] == [x.min(), y.min(), x.max() + 1 - x.min(), y.max() + 1 - y.min()]
            assert entry["area"] == mask.sum() > 0
            # 0.4 of the background's grey is at most 102, an object's colour is at least 60 and it differs in texture
            assert image[:, torch.from_numpy(mask)].min() >= 60
    assert counts == {1, 2, 3, 4}


@pytest.mark.parametrize(("name", "area"), [("disc", math.pi), ("square", 1.6**2), ("triangle", 0.5 * 1.6 * 2 * 0.992),
                                            ("cross", 2 * 1.2 - 0.36)])
def test_shapes(name, area):
    v, u = np.mgrid[-1.5:1.5:600j, -1.5:1.5:600j]
    assert_close(scenes.SHAPES[name](u, v).mean() * 9, area, 0.02)


# Average precision

def ground_truth(size=(100, 120)):
    """Index two images with squares of 20 px in two categories; the second image also has a crowd."""
    squares = [(0, 1, 10, 10), (0, 2, 60, 30), (1, 1, 40, 50), (1, 2, 70, 10)]
    annotations = []
    for number, (image, category, left, top) in enumerate(squares, 1):
        mask = np.zeros(size, bool)
        mask[top:top + 20, left:left + 20] = True
        annotations.append(scenes.annotation(number, image, mask, category - 1))
    crowd = np.zeros(size, bool)
    crowd[70:, :40] = True
    annotations.append({**scenes.annotation(9, 1, crowd, 0), "iscrowd": 1})
    return index_coco({"images": [{"id": i, "height": size[0], "width": size[1]} for i in range(2)],
                      "annotations": annotations, "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]})


def answers(coco, shift=0):
    found = []
    for entry in coco.anns.values():
        if not entry["iscrowd"]:
            mask = np.roll(object_mask(entry, 100, 120), shift, axis=1)
            moved = scenes.annotation(0, entry["image_id"], mask, entry["category_id"] - 1)
            found.append({k: moved[k] for k in ("image_id", "category_id", "bbox", "segmentation")} | {"score": 0.9})
    return found


@pytest.mark.parametrize(("shift", "ap", "ap75"), [(0, 100, 100), (2, 70, 100), (4, 40, 0), (12, 0, 0)])
def test_average_precision_of_known_answers(shift, ap, ap75):
    """A shift of 2 in 20 pixels gives IoU 18/22, right at thresholds 0.5, 0.55, ..., 0.8, which are 7 of 10.

    A shift of 4 gives 16/24, right at 4 thresholds; a shift of 12 gives 8/32, right at none.
    """
    coco = ground_truth()
    result = average_precision(coco, [0, 1], answers(coco, shift))
    for kind in ("box", "mask"):
        assert_close(result[f"{kind}_ap"], float(ap), 1e-6) if ap else result[f"{kind}_ap"] == 0
        assert abs(result[f"{kind}_ap75"] - ap75) < 1e-4
        assert f"{kind}_apl" not in result  # there are no large objects
    assert next(iter(result)) == "box_ap"  # by which the best weights are kept


def test_no_answers_wrong_categories_and_crowds():
    coco = ground_truth()
    assert average_precision(coco, [0, 1], [])["mask_ap"] == 0
    wrong = [{**entry, "category_id": 3 - entry["category_id"]} for entry in answers(coco)]
    assert average_precision(coco, [0, 1], wrong)["box_ap"] == 0
    in_crowd = {**answers(coco)[0], "image_id": 1, "bbox": [5, 75, 20, 20], "score": 0.99}
    assert average_precision(coco, [0, 1], [*answers(coco), in_crowd])["box_ap"] > 99.9
    elsewhere = {**in_crowd, "bbox": [90, 75, 20, 20]}
    assert average_precision(coco, [0, 1], [*answers(coco), elsewhere])["box_ap"] < 90


def test_detections_go_back_to_the_original_image():
    """A perfect detection on the resized view is a perfect answer on the original."""
    coco, found = ground_truth((100, 120)), []
    for image_id in (0, 1):
        pixels, annotations = torch.zeros(3, 100, 120, dtype=torch.uint8), training_objects(coco.imgToAnns[image_id])
        views = DetectionViews(60, {1: 1, 2: 2}, (1.0, 1.0))
        torch.manual_seed(image_id)
        while True:  # until it is not flipped
            view = views((pixels, annotations))
            if abs(view["boxes"][0, 0] - annotations[0]["bbox"][0] / 2) < 1:
                break
        assert view["host_size"].tolist() == [50, 60]
        matched = torch.arange(len(view["boxes"]))
        detection = {"boxes": view["boxes"], "labels": view["labels"], "scores": torch.ones(len(matched)),
                     "masks": mask_targets(view["masks"], view["boxes"], matched, 28)}
        found += to_coco(detection, image_id, (50, 60), (100, 120), sorted(coco.cats))
    result = average_precision(coco, [0, 1], found)
    assert result["box_ap"] > 99 and result["mask_ap"] > 90


def test_scenes_are_drawn_for_the_size_and_place_given(tmp_path, monkeypatch):
    monkeypatch.setattr(scenes, "SPLITS", {"train": 3, "val": 2})
    monkeypatch.setattr(scenes, "TEXTURES", (2, 2))
    train, val = scenes.load_scenes(SimpleNamespace(img_size=[32, 48], output=tmp_path, in_chans=3))
    assert train.images.shape == (3, 32, 48, 3) and val.images.shape == (2, 32, 48, 3)
    assert train.classes == val.classes == ["disc", "square", "triangle", "cross"]
    assert len(list((tmp_path / "data").iterdir())) == 2
