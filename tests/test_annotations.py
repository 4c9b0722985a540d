"""detection/annotations.py: what an annotation file may hold; one line, before the first step, for all else."""
import itertools
import json
import math

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as run_lengths

from common.errors import UserError
from common.images import DataError, UnreadableImage
from sec3_benchmark import detect
from sec3_benchmark.detection.annotations import decode_counts, read_annotations
from sec3_benchmark.detection.average_precision import average_precision
from sec3_benchmark.detection.coco import load_coco, object_mask
from sec3_benchmark.detection.scenes import annotation
from tests.helpers import settings_of

HEIGHT, WIDTH = 40, 50
SQUARE = [10, 5, 30, 5, 30, 20, 10, 20]


def compressed(mask):
    return annotation(1, 0, mask, 0)["segmentation"]


def left_half():
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[:, :25] = True
    return mask


def coco():
    """Return two images, two categories, two objects an image: polygons, compressed and plain run lengths."""
    outlines = [[SQUARE], compressed(left_half()), {"size": [HEIGHT, WIDTH], "counts": [2, 3, 1995]}, [SQUARE, SQUARE]]
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH} for i in (8, 2)],
        "categories": [{"id": 3, "name": "car"}, {"id": 90, "name": "kite"}],
        "annotations": [{"id": 11 + i, "image_id": (8, 2)[i % 2], "category_id": (3, 90)[i // 2], "iscrowd": 0,
                         "bbox": [10, 5, 20, 15], "area": 300, "segmentation": outline}
                        for i, outline in enumerate(outlines)]}


def read(tmp_path, content, evaluated=True):
    file = tmp_path / "instances_val2017.json"
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return read_annotations(file, evaluated)


def outline(value):
    return "annotations", 0, "segmentation", value


def runs(counts, size=(HEIGHT, WIDTH)):
    return outline({"size": list(size), "counts": counts})


whole = compressed(left_half())["counts"]
WRONG = [  # kind, number, field, value; of the message what comes after the entry's name
    ("images", 1, "id", 8, "the id 8 of an earlier one"), ("images", 1, "id", "2", "id '2', and others are like 8"),
    ("images", 1, "id", None, "id None"), ("images", 1, "id", [2], "id .2."), ("images", 1, "id", True, "id True"),
    ("images", 1, "id", math.nan, "id nan"), ("images", 0, "height", 0, "height 0"),
    ("images", 0, "height", "40", "height '40'"), ("images", 0, "width", 50.0, "width 50.0"),
    ("images", 0, "width", None, "width None"),
    ("images", 1, "file_name", "8.png", "the file_name '8.png' of an earlier one"),
    ("categories", 1, "id", 3, "the id 3 of an earlier one"), ("categories", 0, "name", 5, "name 5"),
    *(("images", 0, "file_name", value, "file_name .*a file inside the folder") for value in (
        "../8.png", "a/../../8.png", "/etc/passwd", "", ".", 8, None, "8\0.png", "\ud8008.png")),
    ("annotations", 0, "image_id", "8", "image_id '8', and others are like 8"),
    ("annotations", 0, "image_id", None, "image_id None"), ("annotations", 0, "image_id", [8], "image_id .8."),
    ("annotations", 0, "category_id", "3", "category_id '3', and the file's 2 categories are .3, 90."),
    ("annotations", 0, "category_id", 4, "category_id 4"), ("annotations", 0, "category_id", {}, "category_id {}"),
    *(("annotations", 0, "iscrowd", value, "iscrowd .*not 0 or 1") for value in ("0", 2, -1, [0], math.nan)),
    *(("annotations", 0, "bbox", value, "bbox .*not .x, y, width, height") for value in (
        [1, 2, 3], [1, 2, 3, 4, 5], "1 2 3 4", [1, 2, math.nan, 4], [math.inf, 2, 3, 4], [1, 2, 3, 2e8], [1, 2, 3, "4"],
        [1, 2, -3, 4], [1, 2, None, 4], [[1, 2], [3, 4]], [1, 2, 3, 10**400])),
    *(("annotations", 0, "area", value, "area .*not a number from 0") for value in (
        "12.5", -1, math.nan, math.inf, 2e10, [1], 10**400)),
    *((*outline(value), "segmentation .*not polygons or run lengths") for value in ("x", 5, True)),
    *((*outline(value), "as a polygon of its segmentation, not .x1, y1, x2, y2") for value in (
        [[10, 5], [30, 5], [30, 20]], SQUARE, [[1, 2, 3, 4, 5, 6, 7]], [SQUARE, None], [SQUARE, "1 2 3 4 5 6"],
        [SQUARE, {}])),
    *((*outline([SQUARE, [1, 2, 3, value, 5, 6]]), "a polygon .*not all of it numbers up to 100,000") for value in (
        math.nan, math.inf, -math.inf, 2e8, -2e8, "4", None, [4], True, 10**400)),
    (*outline([[math.nan, 2, 10**400, 4, 5, 6]]), "not all of it numbers"),
    (*outline([[[10, 5], [30, 5], [30, 20], [10, 20]]]), "not all of it numbers"),
    *((*runs(*how), message) for how, message in (
        (([2, 3, 1994],), "run lengths of 1999 pixels, on an image of 40 x 50 = 2000"),
        (([2, 3, 1996],), "run lengths of 2001 pixels"), (([],), "run lengths of 0 pixels"), (("",), "of 0 pixels"),
        (([2001, -1],), "not all of them whole numbers"), (([2, 3, 1995.0],), "not all of them whole numbers"),
        (([2, "3", 1995],), "not all of them whole numbers"), ((None,), "run lengths None"), ((7,), "run lengths 7"),
        (([2, 3, 1995], (WIDTH, HEIGHT)), r"size \[50, 40\], on one of \[40, 50\]"),
        (([2, 3, 1995], ()), r"size \[\], on one of"), (([2, 3, 1995], (40.0, 50)), "size"),
        ((whole[:-3],), "run lengths of 1000 pixels"), ((whole + "o",), "break off"),
        ((whole + "1",), "run lengths of 3001 pixels"),  # 0, 1000, 1000 and 1 more than the last but one
        ((whole + " ",), "the character ' '"), ((whole + "é",), "the character 'é'"))),
]


@pytest.mark.parametrize(("kind", "number", "field", "value", "message"), WRONG)
def test_a_field_that_cannot_be_right_is_named(tmp_path, kind, number, field, value, message):
    """The error names file, entry, field, value and remedy, in a file for training and in one for evaluation."""
    content = coco()
    name = repr(content[kind][number]["id"]) if field != "id" else ".*"
    content[kind][number][field] = value
    said = rf"val2017.json: {kind}\[{number}\] \(id {name}\) has .*{message}.*\. Correct or remove it"
    for evaluated in (True, False):
        with pytest.raises(DataError, match=said):
            read(tmp_path, content, evaluated)


@pytest.mark.parametrize("kind", ["images", "categories", "annotations"])
@pytest.mark.parametrize("entry", [None, 5, "x", [], [1]])
def test_an_entry_that_is_no_mapping_is_named(tmp_path, kind, entry):
    content = coco()
    content[kind].insert(1, entry)
    with pytest.raises(DataError, match=rf"{kind}\[1\] .no id. is .*, not a mapping"):
        read(tmp_path, content)


@pytest.mark.parametrize("field", ["bbox", "area", "segmentation"])
@pytest.mark.parametrize("value", [None, [], "absent"])
def test_what_is_absent_can_be_trained_on_but_not_measured(tmp_path, capsys, field, value):
    content = coco()
    content["annotations"][0].pop(field) if value == "absent" else content["annotations"][0].update({field: value})
    read(tmp_path, content, evaluated=False)
    said = capsys.readouterr().out
    assert ("1 without an outline" in said) if field == "segmentation" else said == ""
    with pytest.raises(DataError, match=rf"annotations\[0\] .id 11. has no {field} .*cannot be measured"):
        read(tmp_path, content)


def usual(content):
    """Yield changes that other people's files have; all of these can be trained on and measured."""
    first, *others = content["annotations"]
    yield "as it is", lambda: None
    yield "numbers as floats", lambda: first.update(image_id=8.0, category_id=3.0, id=11.0, iscrowd=0.0)
    yield "crowd as bool or null", lambda: (first.update(iscrowd=False), others[0].update(iscrowd=None))
    yield "corners a little outside", lambda: first.update(segmentation=[[-3, -0.5, 53.2, -1, 60, 41]])
    yield "a box without height", lambda: first.update(bbox=[10, 5, 20, 0], area=0.0)
    yield "a file in a folder", lambda: content["images"][0].update(file_name="a/b/..8..png")
    yield "ids of text", lambda: [entry.update({key: f"id {entry[key]}"}) for kind in coco() for entry in content[kind]
                                  for key in ("id", "image_id", "category_id") if key in entry]
    yield "more fields", lambda: (content.update(info={"year": 2017}, licenses=[]), first.update(keypoints=[]),
                                  content["categories"][0].update(file_name=[]))


@pytest.mark.parametrize("name", [name for name, _ in usual(coco())])
def test_perfect_answers_to_a_usual_file_are_perfect(tmp_path, name):
    content = coco()
    dict(usual(content))[name]()
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    [val] = load_coco(tmp_path, splits=("val",))
    found = [{"image_id": one["image_id"], "category_id": one["category_id"], "bbox": one["bbox"], "score": 0.9,
              "segmentation": compressed(object_mask(one, HEIGHT, WIDTH))} for one in val.coco.anns.values()]
    result = average_precision(val.coco, val.ids, found)
    assert len(found) == 4 and result["mask_ap"] > 99.9
    assert name == "a box without height" or result["box_ap"] > 99.9  # such a box overlaps nothing
    assert average_precision(val.coco, val.ids, []) == dict.fromkeys(result, 0.0)  # sizes without objects absent too


def test_compressed_run_lengths_are_those_of_the_mask():
    """The reference is runs counted in the mask: blobs, noise, and long runs, whose numbers need several characters."""
    rng = np.random.RandomState(0)
    for share in (0.0, 0.001, 0.02, 0.5, 0.98, 1.0):
        for shape in ((1, 1), (7, 5), (40, 50), (300, 400)):
            mask = rng.random_sample(shape) < share
            mask = mask if share in (0.0, 0.5, 1.0) else np.repeat(mask, 3, axis=0)
            runs = [(pixel, len(list(run))) for pixel, run in itertools.groupby(mask.flatten(order="F"))]
            counts = [0] * int(runs[0][0]) + [length for _, length in runs]  # the first run is background
            text = run_lengths.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
            assert decode_counts(text) == counts


# Files

TEXT = json.dumps(coco() | {"info": "Zürich, 東京"}, ensure_ascii=False)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_the_encodings_of_json_are_read(tmp_path, encoding):
    assert read(tmp_path, TEXT.encode(encoding))["info"] == "Zürich, 東京"


@pytest.mark.parametrize(("content", "message"), [
    (TEXT.replace("東京", "").encode("latin-1"), "neither UTF-8 nor UTF-16 .*: save it as UTF-8"),
    (TEXT.encode()[:-9], "is not whole"), (b"", "is not whole"), (b"\x89PNG\r\n", "neither|not whole"),
    (b"[" * 200_000, "is not whole"), (b'{"images": 1' + b"0" * 5000 + b"}", "is not whole"), (b"[]", "holds a list"),
    (b"null", "holds a NoneType"), (b"3", "holds a int"), (b"{}", "has no list of images and of categories and of ann"),
    (b'{"images": {}, "categories": [], "annotations": []}', "has no list of images: give"),
    (b'{"images": [], "categories": []}', "has no list of annotations"),
    (b'{"images": [], "categories": [], "annotations": []}', "nothing to measure")])
def test_a_file_that_holds_no_annotations_is_named(tmp_path, content, message):
    with pytest.raises(DataError, match=f"instances_val2017.json .*{message}"):
        read(tmp_path, content)


# Objects that are no targets

def test_they_are_counted_aloud(tmp_path, capsys):
    content = coco()
    one, more = content["annotations"][0], content["annotations"]
    empty = {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}
    more += [{**one, "iscrowd": 1}] * 2 + [{**one, "image_id": 7}] * 3
    more += [{**one, "segmentation": outline} for outline in ([[60, 5, 70, 5, 70, 9]], empty, [[1, 1, 2, 2]])]
    read(tmp_path, content, evaluated=False)
    assert capsys.readouterr().out == (
        "instances_val2017.json: 12 objects; no training targets: 2 crowds, 1 without an outline (background to the "
        "training), 2 without a pixel in their image, 3 on images that are not listed\n")
    read(tmp_path, {**content, "annotations": more[:-1]})
    assert capsys.readouterr().out == (
        "instances_val2017.json: 11 objects; not to be found: 2 without a pixel in their image, 3 on images that are "
        "not listed\n")


def test_objects_outside_are_those_without_a_pixel(tmp_path, capsys):
    """The reference is drawn: rectangles anywhere around the image, with edges on whole pixels."""
    rng, content, drawn = np.random.RandomState(0), coco(), 0
    one = content["annotations"][0]
    content["annotations"] = []
    for _ in range(300):
        x, y = rng.randint(-70, 120), rng.randint(-60, 90)
        width, height = rng.randint(3, 60, 2).tolist()
        polygon = [x, y, x + width, y, x + width, y + height, x, y + height]
        content["annotations"].append({**one, "segmentation": [polygon]})
        drawn += object_mask(content["annotations"][-1], HEIGHT, WIDTH).any()
    read(tmp_path, content)
    assert 50 < drawn < 250 and f"not to be found: {300 - drawn} without a pixel" in capsys.readouterr().out


# Before the first step

@pytest.fixture
def folder(tmp_path):
    (tmp_path / "annotations").mkdir()
    for split in ("train2017", "val2017"):
        (tmp_path / split).mkdir()
        for image in coco()["images"]:
            Image.new("RGB", (WIDTH, HEIGHT), (image["id"], 0, 0)).save(tmp_path / split / image["file_name"])
        (tmp_path / "annotations" / f"instances_{split}.json").write_text(json.dumps(coco()))
    return tmp_path


def start(folder, **more):
    return detect.main(settings_of(detect, {
        "preset": "demo", "dataset_path": str(folder), "output": str(folder / "out"), "img_size": [48], "batch_size": 2,
        "micro_batch": 2, "iterations": 2, "warmup_iterations": 1, "device": "cpu", "workers": 0, "draw": 0, **more}))


def test_objects_with_boxes_alone_are_not_enough(folder):
    content = coco()
    for one in content["annotations"]:
        one["segmentation"] = []
    (folder / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="no object to train on: .*has an outline .*From boxes alone"):
        load_coco(folder)


@pytest.mark.parametrize("split", ["train2017", "val2017"])
@pytest.mark.parametrize(("orientation", "size", "message"), [
    (6, (WIDTH, HEIGHT), "50 x 40 px and the annotations say 40 x 50: if the file has an EXIF orientation"),
    (1, (HEIGHT, WIDTH), "50 x 40 px and the annotations say 40 x 50: if the file has an EXIF orientation"),
    (1, (WIDTH, 41), "41 x 50 px and the annotations say 40 x 50: they belong to another file")])
def test_an_image_of_another_size_is_found_before_the_training(folder, monkeypatch, split, orientation, size, message):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", size).save(folder / split / "8.png", exif=exif)
    monkeypatch.setattr(detect, "train", lambda *args, **more: pytest.fail("it was trained"))
    with pytest.raises(UnreadableImage, match=f"{split}/8.png is {message}"):
        start(folder)


def test_a_training_image_may_be_skipped_but_no_other(folder, monkeypatch):
    class Trained(Exception):
        pass

    def train(*args, **more):
        raise Trained
    monkeypatch.setattr(detect, "train", train)
    (folder / "train2017" / "8.png").write_bytes(b"no image")
    with pytest.raises(UnreadableImage, match="train2017/8.png"):
        start(folder)
    with pytest.raises(Trained):
        start(folder, on_bad_image="skip")
    (folder / "val2017" / "2.png").write_bytes(b"no image")
    with pytest.raises(UnreadableImage, match="val2017/2.png"):
        start(folder, on_bad_image="skip")
