"""Reads a COCO annotation file and checks everything in it that training and evaluation use, before the first step.

pycocotools, which draws the outlines and measures AP, checks nothing: a corner far outside the image crashes the
process, and run lengths that do not fill the image crash it or never end. `FIELDS` lists what each field must be; the
first entry that differs raises a DataError that names it. Objects that cannot be targets are counted, and printed.
"""
import json
import math
import os
import reprlib
import sys
from collections import Counter
from pathlib import PurePosixPath

from common.distributed import print0
from common.errors import DataError

FARTHEST = 100_000  # px, of a corner from the origin: drawing an outline takes memory in proportion to its length
LARGEST = 1e10  # px, of an object: pycocotools ignores what is larger
CROWD, NO_OUTLINE, OUTSIDE, UNLISTED = (
    "crowds", "without an outline (background to the training)", "without a pixel in their image",
    "on images that are not listed")


# Fields

def is_number(value):
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # False for NaN too


def are_coordinates(values):
    """Return whether a list holds only numbers, none NaN or far away. It must be fast: COCO has 80 million of them."""
    return (set(map(type, values)) <= {int, float} and -FARTHEST <= min(values) and max(values) <= FARTHEST
            and math.isfinite(sum(values)))  # min and max can pass over a NaN


def is_inside(value):
    """Return whether a value is a file's name or path that stays inside the folder of the images."""
    try:
        path = PurePosixPath(os.fsdecode(os.fsencode(value)))
    except (TypeError, UnicodeEncodeError):  # no text; a lone surrogate
        return False
    return "\0" not in value and path.parts != () and not path.is_absolute() and ".." not in path.parts


ID = (lambda value: isinstance(value, str) or is_number(value)), "a number or text"
SIDE = (lambda value: type(value) is int and value > 0), "a whole number of pixels above 0"
FIELDS = {  # of each kind of entry: field -> (test, what it must be)
    "images": {"id": ID, "file_name": (is_inside, "a file inside the folder of the images"), "height": SIDE,
               "width": SIDE},
    "categories": {"id": ID, "name": (lambda value: isinstance(value, str), "text")},
    "annotations": {
        "image_id": ID, "category_id": ID, "iscrowd": (lambda value: value in (0, 1), "0 or 1"),
        "bbox": (lambda value: isinstance(value, list) and len(value) == 4 and are_coordinates(value)
                 and min(value[2:]) >= 0, f"[x, y, width, height], numbers up to {FARTHEST:,}"),
        "area": (lambda value: is_number(value) and 0 <= value <= LARGEST, f"a number from 0 to {LARGEST:g}"),
        "segmentation": (lambda value: isinstance(value, (list, dict)), "polygons or run lengths")},
}
UNIQUE = ("id", "file_name")
MEASURED = ("bbox", "area", "segmentation")  # an object needs all to be evaluated, only an outline to be trained on


def is_absent(value):
    return value is None or value == [] or value == {}


def check_fields(entry, kind):
    """Raise ValueError for a field of an image, category or annotation that is not what FIELDS says."""
    if not isinstance(entry, dict):
        raise ValueError(f"is {reprlib.repr(entry)}, not a mapping")
    for field, (fits, wanted) in FIELDS[kind].items():
        value = entry.get(field)
        if not fits(value) and not (field in ("iscrowd", *MEASURED) and is_absent(value)):
            raise ValueError(f"has no {field}" if field not in entry else
                             f"has {field} {reprlib.repr(value)}, not {wanted}")


# Outlines

def check_polygons(polygons, height, width):
    """Return whether one of an object's polygons reaches into the image. Raises ValueError if one cannot be drawn."""
    inside = False
    for polygon in polygons:
        if not isinstance(polygon, list) or len(polygon) % 2 or len(polygon) == 2:
            raise ValueError(f"has {reprlib.repr(polygon)} as a polygon of its segmentation, not [x1, y1, x2, y2, ...]")
        if polygon and not are_coordinates(polygon):
            raise ValueError(f"has a polygon {reprlib.repr(polygon)}, not all of it numbers up to {FARTHEST:,}")
        x, y = polygon[::2], polygon[1::2]
        inside = inside or (len(polygon) >= 6 and max(x) > 0 and min(x) < width and max(y) > 0 and min(y) < height)
    return inside


def check_run_lengths(segmentation, height, width):
    """Return whether run lengths, compressed or not, cover a pixel. Raises ValueError if they do not fit the image."""
    counts, size = segmentation.get("counts"), segmentation.get("size")
    if size != [height, width] or set(map(type, size)) != {int}:
        raise ValueError(f"has run lengths for an image of size {reprlib.repr(size)}, on one of {[height, width]}")
    counts = decode_counts(counts) if isinstance(counts, str) else counts
    if not isinstance(counts, list) or set(map(type, counts)) - {int} or min(counts, default=0) < 0:
        raise ValueError(f"has run lengths {reprlib.repr(counts)}, not all of them whole numbers from 0")
    if sum(counts) != height * width:
        raise ValueError(f"has run lengths of {sum(counts)} pixels, on an image of {height} x {width} = "
                         f"{height * width}")
    return any(counts[1::2])


def decode_counts(text):
    """Decode compressed run lengths to a list. Raises ValueError for text that pycocotools would read beyond its end.

    Each character holds 5 bits of a number, lowest first, and a bit that says whether more follow. Numbers are signed;
    from the fourth on, each is the difference to the last but one.
    """
    counts, value, shift = [], 0, 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"has compressed run lengths with the character {character!r}")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (1 << shift) if bits & 16 else 0
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("has compressed run lengths that break off")
    return counts


# Files

def read_json(path):
    """Read a file's COCO dictionary, in any of json's encodings. Raises DataError for anything else."""
    try:
        content = json.loads(path.read_bytes())
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is neither UTF-8 nor UTF-16 ({error.reason} at byte {error.start}): save it as UTF-8"
                        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not whole, or no json ({error}): fetch it again") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}, and COCO annotations are a mapping: give COCO's "
                        f"instances_*.json, or a file like it")
    if lacking := [kind for kind in FIELDS if not isinstance(content.get(kind), list)]:
        raise DataError(f"{path} has no list of {' and of '.join(lacking)}: give COCO's instances_*.json, or a file "
                        f"like it")
    return content


def check_each(path, kind, entries, check):
    """Call `check` on each of a file's images, categories or annotations, and list the results.

    check: raises ValueError for a faulty entry; the first becomes a DataError that names it. kind: key in FIELDS.
    """
    results = []
    for number, entry in enumerate(entries):
        try:
            results.append(check(entry))
        except ValueError as error:
            name = f"id {reprlib.repr(entry.get('id'))}" if isinstance(entry, dict) else "no id"
            raise DataError(f"{path}: {kind}[{number}] ({name}) {error}. Correct or remove it") from None
    return results


def by_id(path, kind, entries):
    """Check a file's images or categories, whose ids must be all numbers or all text; return {id: entry}."""
    found, taken = {}, set()

    def add(entry):
        check_fields(entry, kind)
        for field in [field for field in UNIQUE if field in FIELDS[kind]]:
            if (field, entry[field]) in taken:
                raise ValueError(f"has the {field} {reprlib.repr(entry[field])} of an earlier one")
            taken.add((field, entry[field]))
        check_type(entry["id"], found, "id")
        found[entry["id"]] = entry
    check_each(path, kind, entries, add)
    return found


def check_type(number, known, field):
    """Raise ValueError if an id is text and the known ones are numbers, or the other way round."""
    other = next(iter(known), number)
    if isinstance(number, str) != isinstance(other, str):
        raise ValueError(f"has {field} {reprlib.repr(number)}, and others are like {reprlib.repr(other)}: write all as "
                         f"numbers, or all as text")


def check_object(one, images, categories, evaluated):
    """Check an annotation; return CROWD, NO_OUTLINE, OUTSIDE or UNLISTED if it is no target, else "".

    Sets a missing "iscrowd" to 0 and removes polygons with fewer than three corners. Raises ValueError.
    """
    check_fields(one, "annotations")
    if one["category_id"] not in categories:
        raise ValueError(f"has category_id {reprlib.repr(one['category_id'])}, and the file's {len(categories)} "
                         f"categories are {reprlib.repr(list(categories))}")
    if is_absent(one.get("iscrowd")):
        one["iscrowd"] = 0
    outline, inside = one.get("segmentation"), False
    image = images.get(one["image_id"])
    if image is None:
        check_type(one["image_id"], images, "image_id")
        return UNLISTED
    if not is_absent(outline):
        check_outline = check_polygons if isinstance(outline, list) else check_run_lengths
        inside = check_outline(outline, image["height"], image["width"])
    if isinstance(outline, list):
        outline = one["segmentation"] = [polygon for polygon in outline if len(polygon) >= 6]
    if evaluated and (lacking := [field for field in MEASURED if is_absent(one.get(field))]):
        raise ValueError(f"has no {' and no '.join(lacking)} (of three corners or more), so it cannot be measured")
    if one["iscrowd"]:
        return CROWD
    if not outline:
        return NO_OUTLINE
    return "" if inside else OUTSIDE


def number_objects(annotations):
    """Renumber all objects unless their ids are unique numbers other than 0, which pycocotools reads as "none"."""
    numbers = [one.get("id") for one in annotations]
    if not all(map(is_number, numbers)) or 0 in numbers or len(set(numbers)) < len(numbers):
        for number, one in enumerate(annotations, 1):
            one["id"] = number


def read_annotations(path, evaluated):
    """Read an annotation file: a COCO dictionary in which pycocotools can draw and measure every object.

    Objects get unique ids and an "iscrowd", and polygons with fewer than three corners are removed. evaluated: every
    object must have a box, an area and an outline, and at least one must not be a crowd. Prints how many objects are no
    targets. Raises DataError.
    """
    content = read_json(path)
    annotations = content["annotations"]
    images, categories = (by_id(path, kind, content[kind]) for kind in ("images", "categories"))
    kinds = Counter(check_each(path, "annotations", annotations,
                               lambda one: check_object(one, images, categories, evaluated)))
    number_objects(annotations)
    if evaluated and not kinds[""] + kinds[OUTSIDE]:
        raise DataError(f"{path} has no object that is no crowd: there is nothing to measure")
    reported = (OUTSIDE, UNLISTED) if evaluated else (CROWD, NO_OUTLINE, OUTSIDE, UNLISTED)
    counts = ", ".join(f"{kinds[kind]:,} {kind}" for kind in reported if kinds[kind])
    if counts:
        what = "not to be found" if evaluated else "no training targets"
        print0(f"{path.name}: {len(annotations):,} objects; {what}: {counts}")
    return content
