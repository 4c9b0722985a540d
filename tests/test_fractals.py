"""The embedded data set: same bytes always, classes told apart by shape and not by colour, a cache that is never wrong.

Single thread, no download, about ten seconds.
"""
import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common import fractals
from common.fractals import class_system, draw_fractals, fractal_set
from common.vit import pair

ROOT = Path(__file__).resolve().parent.parent


def render(seed, cls, index, size):
    """One image alone."""
    return draw_fractals(seed, [cls], [index], *pair(size))[0]


def start_python(code, *args):
    """A fresh interpreter that knows this repository; its printed output is read with communicate()."""
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], cwd=ROOT, stdin=pipe, stdout=pipe, text=True)


# Same bytes


def test_an_image_does_not_depend_on_its_batch():
    classes, indices = [3, 0, 3, 2, 1] * 9, list(range(45))
    images = draw_fractals(0, classes, indices, 64, 64)
    assert images.shape == (45, 64, 64, 3) and images.dtype == np.uint8
    assert np.array_equal(images, draw_fractals(0, classes, indices, 64, 64))
    assert np.array_equal(images[::-1], draw_fractals(0, classes[::-1], indices[::-1], 64, 64))
    for i in (0, 7, 16, 44):
        assert np.array_equal(images[i], render(0, classes[i], indices[i], 64))


def test_an_image_does_not_depend_on_the_process_or_the_global_generator():
    np.random.seed(1)
    here = hashlib.sha256(render(5, 2, 7, 48).tobytes()).hexdigest()
    code = "import hashlib; from common.fractals import draw_fractals; "
    code += "print(hashlib.sha256(draw_fractals(5, [2], [7], 48, 48).tobytes()).hexdigest())"
    assert start_python(code).communicate()[0].strip() == here


def test_seed_class_and_index_each_change_the_image():
    images = [render(*key, 32) for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1))]
    assert len({image.tobytes() for image in images}) == 5


def test_version_guards_the_pixels():
    """If the grey levels of three images' quarters change, VERSION must be increased, else old cache files are used."""
    images = draw_fractals(0, [0, 1, 2], [0, 1, 2], 16, 16)
    quarters = images.reshape(3, 2, 8, 2, 8, 3).mean(axis=(2, 4, 5)).reshape(3, 4)
    expected = {
        2: [[118.7, 115.8, 134.6, 134.7], [52.9, 92.8, 101.4, 106.2], [96.9, 61.9, 104.8, 98.6]],
    }[fractals.VERSION]
    np.testing.assert_allclose(quarters, expected, atol=1.5)  # a point may land one pixel off on another processor


def test_sizes():
    tall, wide = render(0, 4, 0, (96, 32)), render(0, 4, 0, (32, 96))
    assert tall.shape == (96, 32, 3) and wide.shape == (32, 96, 3)
    large, small = (render(0, 4, 0, n).astype(float) for n in (128, 32))  # one instance, two sizes: the same picture
    assert np.abs(large.reshape(32, 4, 32, 4, 3).mean(axis=(1, 3)) - small).mean() < 15
    assert np.abs(large.reshape(32, 4, 32, 4, 3).mean(axis=(1, 3)) - render(0, 4, 1, 32)).mean() > 30


# Classes


def test_class_does_not_depend_on_which_was_made_first():
    before = class_system(3, 11).copy()
    class_system.cache_clear()
    for cls in range(5):
        class_system(3, cls)
    assert np.array_equal(class_system(3, 11), before)
    assert not np.array_equal(class_system(3, 11), class_system(4, 11))


def test_classes_contract_and_fill():
    """Check the filling rate by another chaos game: one point, and maps with their exact probabilities."""
    for cls in (*range(6), fractals.DOWNSTREAM):
        maps = class_system(0, cls).astype(float)
        used = maps[np.any(maps != 0, axis=1)]
        assert 2 <= len(used) <= 8 and np.abs(maps).max() <= 1
        linear = used[:, :4].reshape(-1, 2, 2)
        assert np.linalg.svd(linear, compute_uv=False).max() <= fractals.CONTRACTION + 1e-6
        area = np.abs(np.linalg.det(linear))
        rng = np.random.default_rng(0)
        point, points = np.zeros(2), np.empty((40_000, 2))
        for step, k in enumerate(rng.choice(len(used), len(points), p=area / area.sum())):
            point = points[step] = linear[k] @ point + used[k, 4:]
        points = points[50:] - points[50:].min(axis=0)
        pixels = np.unique((points / points.max() * 127.999).astype(int), axis=0)
        assert 0.18 <= len(pixels) / 128**2 <= 0.75, cls  # 0.2 to 0.7 with fewer points and other random numbers


def test_instances_stay_in_the_frame():
    pose = np.random.default_rng(0).random((50, 5), np.float32)
    x, y = np.random.default_rng(1).standard_normal((2, 50, 300)).astype(np.float32)
    pixel = fractals.points_to_pixels(x, y, pose, 40, 60)
    assert pixel.min() >= 0 and pixel.max() == 40 * 60  # some points fall outside,
    assert (pixel == 40 * 60).mean() < 0.05  # few of them


def split_features(features, num_classes, seed=0):
    """(train, val) features of 40 and 20 images a class, and the val labels; train's are arange % num_classes."""
    sets = []
    for count, parity in ((40, 0), (20, 1)):
        labels = np.tile(np.arange(num_classes), count)
        indices = 2 * np.repeat(np.arange(count), num_classes) + parity
        sets += [features(draw_fractals(seed, labels, indices, 32, 32)), labels]
    return sets


def nearest_centroid(features, num_classes=8):
    """Mean accuracy over three seeds, 480 validation images in all."""
    right = []
    for seed in range(3):
        train, train_labels, val, val_labels = split_features(features, num_classes, seed)
        centroids = np.stack([train[train_labels == c].mean(axis=0) for c in range(num_classes)])
        distance = ((val[:, None] - centroids) ** 2).sum(axis=2)
        right.append(distance.argmin(axis=1) == val_labels)
    return np.mean(right)


def spectrum(images):
    """Log amplitude of the grey image's Fourier transform, which a shift leaves unchanged, at unit length."""
    grey = images.mean(axis=3)
    amplitude = np.log1p(np.abs(np.fft.fft2(grey - grey.mean(axis=(1, 2), keepdims=True)))).reshape(len(images), -1)
    amplitude -= amplitude.mean(axis=1, keepdims=True)
    return amplitude / np.linalg.norm(amplitude, axis=1, keepdims=True)


def colours(images):
    """Histograms of red, green and blue, 16 bins each."""
    return np.stack([np.bincount((i // 16 + 16 * np.arange(3)).ravel(), minlength=48) for i in images]) / images[0].size


def test_shape_tells_the_class_but_not_easily():
    assert 0.3 < nearest_centroid(spectrum) < 0.9  # chance is 0.125


def test_colour_does_not_tell_the_class():
    assert nearest_centroid(colours) < 0.19  # chance is 0.125, and 480 images leave a deviation of 0.015


# The set on disk


def test_splits_share_no_image_and_downstream_no_class(tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr(
        fractals,
        "draw_fractals",
        lambda seed, classes, indices, height, width: (
            asked.setdefault(split, set()).update(zip(classes.tolist(), indices.tolist(), strict=True)),
            np.zeros((len(classes), height, width, 3), np.uint8),
        )[1],
    )
    for split, per_class in (("train", 70), ("val", 200), ("downstream-train", 5), ("downstream-val", 300)):
        fractal_set(tmp_path, split, 6, per_class, 8)
        assert len(asked[split]) == 6 * per_class
    assert {c for c, _ in asked["train"]} == {c for c, _ in asked["val"]} == set(range(6))
    assert {c for c, _ in asked["downstream-train"]} == {c for c, _ in asked["downstream-val"]}
    assert len(set().union(*asked.values())) == sum(map(len, asked.values()))
    assert not {c for c, _ in asked["train"]} & {c for c, _ in asked["downstream-train"]}


def test_set_is_what_render_draws_and_is_drawn_once(tmp_path, monkeypatch):
    images, labels = fractal_set(tmp_path / "new", "val", 3, 5, (8, 16), seed=2)
    assert images.shape == (15, 8, 16, 3) and isinstance(images, np.memmap) and not images.flags.writeable
    assert labels.dtype == np.int64 and labels.tolist() == [0, 1, 2] * 5
    assert np.array_equal(images[7], render(2, 1, 5, (8, 16)))  # class 1's third image: index 2 * 2 + 1
    (path,) = (tmp_path / "new").iterdir()  # one file, nothing temporary
    monkeypatch.setattr(fractals, "draw_fractals", None)  # calling it would raise
    again, _ = fractal_set(tmp_path / "new", "val", 3, 5, (8, 16), seed=2)
    assert np.array_equal(images, again)
    assert np.array_equal(np.load(path, mmap_mode="r"), images)


@pytest.mark.parametrize("change", ["truncate", "lengthen", "no header", "empty", "shape", "dtype"])
def test_damaged_file_is_drawn_again(tmp_path, capsys, change):
    images = np.array(fractal_set(tmp_path, "train", 2, 3, 8)[0])
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    if change == "shape":
        np.save(path, images[:-1])
    elif change == "dtype":
        np.save(path, images.astype(np.int8))
    else:
        changed = {"truncate": whole[:-1], "lengthen": whole + b"0", "no header": whole[200:], "empty": b""}
        path.write_bytes(changed[change])
    capsys.readouterr()
    again, _ = fractal_set(tmp_path, "train", 2, 3, 8)
    said = capsys.readouterr().out
    assert np.array_equal(again, images) and path.read_bytes() == whole
    assert said.count("\n") == 1 and str(path) in said and "damaged" in said


def test_interrupted_drawing_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(fractals, "draw_fractals", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fractal_set(tmp_path, "train", 2, 3, 8)
    assert list(tmp_path.iterdir()) == []


def test_two_processes_make_one_right_file(tmp_path):
    code = "import sys; from common.fractals import fractal_set; from hashlib import sha256; "
    code += "print('ready', flush=True); input(); "
    code += "print(sha256(fractal_set(sys.argv[1], 'train', 5, 200, 16)[0].tobytes()).hexdigest())"
    both = [start_python(code, tmp_path) for _ in range(2)]
    assert [process.stdout.readline() for process in both] == ["ready\n"] * 2  # so that they draw at the same time
    for process in both:
        process.stdin.write("\n")
        process.stdin.flush()
    hashes = {process.communicate(timeout=60)[0].strip() for process in both}
    expected = draw_fractals(0, list(range(5)) * 200, np.repeat(range(0, 400, 2), 5), 16, 16)
    assert hashes == {hashlib.sha256(expected.tobytes()).hexdigest()}
    assert len(list(tmp_path.iterdir())) == 1


def test_each_setting_has_its_own_file(tmp_path):
    arguments = [("train", 2, 3, 8, 0), ("val", 2, 3, 8, 0), ("train", 3, 2, 8, 0), ("train", 2, 3, 9, 0),
                 ("train", 2, 3, (8, 9), 0), ("train", 2, 3, (9, 8), 0), ("train", 2, 3, 8, 1)]  # fmt: skip
    for i, arg in enumerate(arguments, 1):
        fractal_set(tmp_path, *arg)
        assert len(list(tmp_path.iterdir())) == i


@pytest.mark.parametrize(
    "split, num_classes, per_class, size, named",
    [("test", 2, 2, 8, "'test'"), ("train", 0, 2, 8, "num_classes 0"), ("train", 2, 0, 8, "per_class 0"),
     ("train", 2, 2, 7, "size 7"), ("train", 2, 2, (8, 7), "7"), ("train", 2, 2, 0, "at least 8")],
)  # fmt: skip
def test_errors_name_the_value(tmp_path, split, num_classes, per_class, size, named):
    with pytest.raises(ValueError, match=named):
        fractal_set(tmp_path / "none", split, num_classes, per_class, size)
    assert not (tmp_path / "none").exists()
