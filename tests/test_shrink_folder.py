"""appendix/tools/shrink_folder.py against Pillow by hand; stopped anywhere, it ends in the same bytes."""
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image, ImageOps

from appendix.tools import shrink_folder
from common.data import labelled_folder, load_sets
from common.errors import UserError
from sec3_benchmark import finetune
from tests.helpers import settings_of
from tests.processes import ENVIRONMENT, ROOT, WAIT

SIDE = 32


def picture(width, height, mode="RGB"):
    """Smooth, so that JPEG and ways of resizing hardly show, and nowhere symmetric."""
    y, x = np.mgrid[:height, :width] / max(width, height)
    channels = [60 + 150 * x, 40 + 180 * y, 200 - 90 * x - 90 * y]
    return Image.fromarray(np.stack(channels, axis=2).astype(np.uint8)).convert(mode)


def save(image, path, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **how)


@pytest.fixture
def photos(tmp_path):
    """train/ and val/ of two classes with files of every kind."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    folder = tmp_path / "photos"
    save(picture(90, 61), folder / "train/a/large.jpg", comment="by hand", dpi=(300, 300))
    save(picture(41, 97), folder / "train/a/deep/tall.png")
    save(picture(80, 60, "L"), folder / "train/a/grey.JPEG", quality=90)
    save(picture(80, 60), folder / "train/a/turned.jpg", exif=exif)
    save(picture(30, 20), folder / "train/b/turned small.jpg", exif=exif)
    save(picture(70, 50, "CMYK"), folder / "train/b/ink.jpg", quality=95)
    save(picture(30, 20, "CMYK"), folder / "train/b/small ink.jpg", quality=95)
    save(picture(70, 50, "RGBA"), folder / "train/b/clear.webp", lossless=True)
    save(picture(30, 20), folder / "train/b/small.bmp")
    save(picture(32, 50), folder / "train/b/small.jpeg", quality=50, comment="kept", progressive=True)
    save(picture(20, 30, "L"), folder / "val/a/small grey.JPG", quality=50)
    save(picture(64, 64, "P"), folder / "val/a/palette.png")
    save(Image.fromarray(np.asarray(picture(60, 90, "L")).astype(np.uint16) * 257), folder / "val/b/deep.tif")
    np.save(folder / "val/b/five.npy", np.zeros((50, 60, 5), np.uint8))
    (folder / "val/b/notes.txt").write_text("no image")
    (folder / "val/b/.hidden.png").write_text("no image")
    return folder


def run(folder, small, **given):
    explicit = {"data_path": str(folder), "output": str(small), "short_side": SIDE, "workers": 0, **given}
    return shrink_folder.main(settings_of(shrink_folder, presets={}, given=explicit))


def contents(folder):
    """{name: bytes}, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def images(folder):
    return {name: content for name, content in contents(folder).items() if not os.path.basename(name).startswith(".")}


def by_hand(path):
    """What Pillow makes of an image."""
    image = ImageOps.exif_transpose(Image.open(path))
    grey = image.mode in ("L", "I;16")
    if image.mode == "I;16":
        image = Image.fromarray((np.asarray(image) / 257).astype(np.uint8))
    zoom = min(1, SIDE / min(image.size))
    size = tuple(round(side * zoom) for side in image.size)
    return image.convert("L" if grey else "RGB").resize(size, Image.Resampling.BICUBIC)


@pytest.mark.parametrize("how", ["jpeg", "keep"])
def test_every_kind_of_image_against_pillow(photos, tmp_path, how):
    before = contents(photos)
    result = run(photos, tmp_path / "small", format=how)
    made, other = images(tmp_path / "small"), ".jpg" if how == "jpeg" else ".png"
    endings = {".bmp": other, ".png": other, ".tif": other, ".webp": other}
    given = [name for name in images(photos) if not name.endswith(".txt")]
    names = {name: os.path.splitext(name)[0] + endings.get(os.path.splitext(name)[1], name[name.rindex("."):])
             for name in given}
    assert sorted(names.values()) == sorted(made) and len(made) == 14
    for name in ("train/b/small.jpeg", "val/a/small grey.JPG", "val/b/five.npy"):
        assert made[name] == before[name]
    for name, target in names.items():
        if name.endswith(".npy"):
            continue
        ours, expected = Image.open(tmp_path / "small" / target), by_hand(photos / name)
        assert (ours.size, ours.mode) == (expected.size, expected.mode)
        assert ours.format == ("PNG" if target.endswith(".png") else "JPEG") and not ours.getexif()
        difference = np.abs(np.asarray(ours, float) - np.asarray(expected, float))
        assert difference.mean() < (1 if ours.format == "PNG" else 2.5) and difference.max() < 16, name
        if ours.format == "PNG" and name.endswith("small.bmp"):
            assert difference.max() == 0
    assert b"by hand" not in made["train/a/large.jpg"]
    assert Image.open(tmp_path / "small/train/a/large.jpg").size == (47, 32)  # of 90 x 61: 47.2
    sizes = [sum(map(len, files)) for files in ([before[name] for name in given], made.values())]
    assert result == {"images": 14, "made": 14, "before": sizes[0], "after": sizes[1], "unreadable": []}
    assert contents(photos) == before


def test_resizing_is_bicubic_and_antialiased(tmp_path):
    noise = Image.fromarray(np.random.RandomState(0).randint(0, 256, (75, 50, 3), dtype=np.uint8))
    save(noise, tmp_path / "photos/noise.png")
    run(tmp_path / "photos", tmp_path / "small", format="keep")
    ours, expected = (np.asarray(image, float) for image in (
        Image.open(tmp_path / "small/noise.png"), noise.resize((32, 48), Image.Resampling.BICUBIC)))
    assert ours.shape == (48, 32, 3) and np.abs(ours - expected).max() <= 2


def test_quality_and_colours_are_those_of_most_photographs(photos, tmp_path):
    def tables(small, **given):
        run(photos, tmp_path / small, **given)
        image = Image.open(tmp_path / small / "train/a/large.jpg")
        assert [layer[1:3] for layer in image.layer] == [(2, 2), (1, 1), (1, 1)]  # colours at half the resolution
        return image.quantization
    picture(8, 8).save(tmp_path / "a.jpg", quality=95)
    assert tables("one") == Image.open(tmp_path / "a.jpg").quantization != tables("two", quality=80)


def test_the_copy_takes_the_place_of_the_folder(photos, tmp_path, capsys):
    (photos / "val/b/five.npy").unlink()
    (photos / "train/c").symlink_to("a")  # a class of its own, though its images are those of another
    save(picture(70, 70), photos / "val/c/1.jpg")
    run(photos, tmp_path / "small")
    assert f"use the smaller ones by --data-path {tmp_path / 'small'}" in capsys.readouterr().out
    args = settings_of(finetune, presets={}, given={"data": "folder", "data_path": str(tmp_path / "small")})
    for ours, theirs in zip(load_sets(args), (labelled_folder(photos / split, 3, "") for split in ("train", "val"))):
        assert ours.classes == theirs.classes == ["a", "b", "c"] and ours.labels.tolist() == theirs.labels.tolist()
        stems = [[os.path.splitext(os.path.basename(images.images[i]))[0] for i in range(len(images))]
                 for images in (ours, theirs)]
        assert stems[0] == stems[1] and all(min(ours.read(i).shape[1:]) <= SIDE for i in range(len(ours)))


def test_processes_make_the_same_bytes(photos, tmp_path):
    for workers in (0, 2):
        run(photos, tmp_path / str(workers), workers=workers)
    assert contents(tmp_path / "0") == contents(tmp_path / "2")


def test_killed_anywhere_and_repeated_it_ends_in_the_same_folder(tmp_path):
    save(picture(800, 500), tmp_path / "photos/0/0.jpg")
    for i in range(1, 400):
        (tmp_path / f"photos/{i % 7}").mkdir(exist_ok=True)
        os.link(tmp_path / "photos/0/0.jpg", tmp_path / f"photos/{i % 7}/{i}.jpg")
    (tmp_path / "photos/3/broken.png").write_bytes(b"no image")
    small, whole = tmp_path / "small", tmp_path / "whole"
    command = [sys.executable, str(ROOT / "appendix/tools/shrink_folder.py"), "--data-path", str(tmp_path / "photos"),
               "--output", str(small), "--short-side", str(SIDE), "--workers", "2"]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        end = time.monotonic() + WAIT
        while len(list(small.rglob("*.jpg"))) < 20 and time.monotonic() < end:
            time.sleep(0.005)
        process.kill()  # the main process alone
        process.communicate(timeout=WAIT)  # until its processes have ended, too: they write to the same pipe
    run(tmp_path / "photos", whole)
    some, every = images(small), images(whole)
    assert 20 <= len(some) < len(every) == 400 and some.items() <= every.items()
    (small / "3" / shrink_folder.TEMPORARY.format("left")).write_bytes(b"half")
    (small / "5/5.jpg").write_bytes(b"")  # as a loss of power leaves it
    result = run(tmp_path / "photos", small, workers=2)
    assert contents(small) == contents(whole) and result["made"] == 400 - len(some) + ("5/5.jpg" in some)


def test_what_is_there_is_not_made_again(photos, tmp_path):
    run(photos, tmp_path / "small")
    times = {name: os.stat(tmp_path / "small" / name).st_mtime_ns for name in images(tmp_path / "small")}
    (tmp_path / "small/train/a/large.jpg").unlink()
    save(picture(40, 40), photos / "train/a/new.jpg")
    result = run(str(photos) + "/", tmp_path / "small")
    assert result["made"] == 2 and result["images"] == 15
    assert result["after"] == sum(map(len, images(tmp_path / "small").values()))
    again = {name: os.stat(tmp_path / "small" / name).st_mtime_ns for name in images(tmp_path / "small")}
    assert {name for name in again if again[name] != times.get(name)} == {"train/a/large.jpg", "train/a/new.jpg"}


def test_unreadable_images_are_listed_and_their_classes_kept(photos, tmp_path, capsys):
    (photos / "train/z").mkdir()
    (photos / "train/z/broken.png").write_bytes(b"no image")
    cut = (photos / "train/b/small.jpeg").read_bytes()[:300]  # it would have been copied
    (photos / "train/b/cut.jpeg").write_bytes(cut)
    (photos / "val/b/five.npy").write_bytes((photos / "val/b/five.npy").read_bytes()[:900])
    names = [str(photos / name) for name in ("train/b/cut.jpeg", "train/z/broken.png", "val/b/five.npy")]
    for workers in (0, 1):
        result = run(photos, tmp_path / "small", workers=workers)
        assert result["unreadable"] == names and result["images"] == 13
        lines = (tmp_path / "small/.unreadable.txt").read_text().splitlines()
        assert [line.split("\t")[0] for line in lines] == names and "\tUnidentifiedImageError: cannot" in lines[1]
        assert f"3 unreadable ones are left out: see {tmp_path}/small/.unreadable.txt" in capsys.readouterr().out
    assert os.listdir(tmp_path / "small/train/z") == []
    with pytest.raises(UserError, match=r"none of 1 images could be read; the first, .*z/broken.png: Unidentified"):
        run(photos / "train/z", tmp_path / "none")


def test_a_full_disk_is_no_unreadable_image(photos, tmp_path, monkeypatch):
    def full(*paths):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(shrink_folder.os, "replace", full)
    monkeypatch.setattr(shrink_folder, "save_json", lambda *given: None)
    with pytest.raises(OSError, match=r"could not write .*\.jpg \(.*No space left on device\): free some space there"):
        run(photos, tmp_path / "small")
    assert contents(tmp_path / "small") == {}


def test_a_process_that_is_killed_is_said():
    with pytest.raises(UserError, match="a process was killed, perhaps for lack of memory: the same command goes on"):
        list(shrink_folder.in_processes(os._exit, [1], 1))


def test_without_a_terminal_a_line_each_minute(monkeypatch, capsys):
    seconds = iter(range(0, 1000, 25))  # one image each
    monkeypatch.setattr(shrink_folder.time, "monotonic", lambda: next(seconds))
    assert list(shrink_folder.followed("abcdefg", 7)) == list("abcdefg")
    assert capsys.readouterr().out == "3 of 7 images, 0 a second\n6 of 7 images, 0 a second\n"


@pytest.mark.parametrize(("given", "message"), [
    ({"short_side": 64, "quality": 90},
     f"small was begun with --short-side {SIDE} --quality 95, this call has --short-side 64 --quality 90: repeat it"),
    ({"format": "keep"}, "begun with --format jpeg, this call has --format keep"),
    ({"folder": "photos/train"}, r"begun with --data-path .*/photos, this call has --data-path .*/photos/train"),
    ({"small": "photos/small"}, "--output photos/small and --data-path photos: one lies in the other"),
    ({"small": "photos"}, "one lies in the other"),
    ({"small": "link/../photos/x"}, "one lies in the other"),
    ({"small": "."}, "one lies in the other"),
    ({"small": "foreign"}, "--output foreign exists and was not begun by this script: name a new folder"),
    ({"small": "foreign/file"}, "--output foreign/file exists"),
    ({"folder": "no/where"}, "--data-path no/where is not a folder"),
    ({"folder": "empty"}, "no image below --data-path empty"),
])
def test_what_cannot_be_shrunk_is_said(photos, tmp_path, monkeypatch, given, message):
    monkeypatch.chdir(tmp_path)
    run("photos", "small")
    for folder in ("empty", "foreign"):
        os.mkdir(folder)
    open("foreign/file", "w").close()
    os.symlink("photos", "link")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=message):
        run(**{"folder": "photos", "small": "small", **given})
    assert contents(tmp_path) == before


def test_two_images_of_one_name_are_said_before_any_is_made(photos, tmp_path):
    save(picture(9, 9), photos / "val/a/palette.jpg")
    with pytest.raises(UserError, match=r"val/a/palette.jpg and val/a/palette.png would both become val/a/palette.jpg: "
                                        "rename one of them, or try --format keep"):
        run(photos, tmp_path / "small")
    assert not (tmp_path / "small").exists()
    run(photos, tmp_path / "small", format="keep")
    save(picture(9, 9), photos / "val/a/palette.bmp")
    with pytest.raises(UserError, match=r"palette.bmp and val/a/palette.png would both become .*: rename one of them$"):
        run(photos, tmp_path / "other", format="keep")
