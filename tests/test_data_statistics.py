"""appendix/tools/data_statistics.py against NumPy on all pixels at once."""
import re

import numpy as np
import pytest
from PIL import Image

from appendix.tools import data_statistics
from common.data import channel_statistics
from common.errors import UserError
from tests.helpers import settings_of


def run(folder, tmp_path, **given):
    args = settings_of(data_statistics, presets={}, given={"data_path": str(folder), "workers": 0,
                                                                 "output": str(tmp_path / "out"), **given})
    return data_statistics.main(args)


@pytest.mark.parametrize(("channels", "workers"), [(1, 0), (3, 2), (5, 0)])
def test_mean_and_deviation_over_all_pixels(tmp_path, channels, workers):
    """Images of different sizes: a large one weighs more."""
    rng, pixels = np.random.default_rng(0), []
    (tmp_path / "a").mkdir()
    for i, size in enumerate([(4, 6), (9, 3), (16, 16)]):
        array = rng.integers(0, 256, (*size, channels), dtype=np.uint8)
        pixels.append(array.reshape(-1, channels) / 255)
        if channels in (1, 3):
            Image.fromarray(array.squeeze()).save(tmp_path / "a" / f"{i}.png")
        else:
            np.save(tmp_path / "a" / f"{i}.npy", array)
    result = run(tmp_path / "a", tmp_path, in_chans=channels, workers=workers)
    assert result["mean"] == pytest.approx(np.concatenate(pixels).mean(axis=0))
    assert result["std"] == pytest.approx(np.concatenate(pixels).std(axis=0))
    assert result["images"] == 3 and result["unreadable"] == []


def test_unreadable_images_are_listed_and_left_out(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (8, 8), (51, 102, 255)).save(tmp_path / "a" / "1.png")
    (tmp_path / "a" / "2.png").write_bytes(b"not an image")
    result = run(tmp_path / "a", tmp_path)
    assert result["mean"] == pytest.approx([0.2, 0.4, 1.0])
    assert result["unreadable"] == [str(tmp_path / "a" / "2.png")]
    unreadable = tmp_path / "out" / "data_statistics" / "unreadable.txt"
    [line] = unreadable.read_text().splitlines()
    assert line.startswith(f"{tmp_path / 'a' / '2.png'}\tUnidentifiedImageError: cannot identify")
    assert "--mean 0.2000 0.4000 1.0000" in capsys.readouterr().out
    for place in ("absent", "b"):  # a call that fails leaves no other folder's list
        unreadable.write_text("old\n")
        with pytest.raises(UserError):
            run(tmp_path / place, tmp_path)
        assert not unreadable.exists()


@pytest.mark.parametrize("levels", [[7, 7], [0, 0], [255, 255], [7, 9]])
def test_what_is_printed_is_accepted_when_pasted_back(tmp_path, capsys, levels):
    """Also of channels that are the same everywhere, by whose deviation nothing can be divided."""
    (tmp_path / "a").mkdir()
    for i, level in enumerate(levels):
        Image.new("RGB", (8, 8), (level, 30 * i, 255)).save(tmp_path / "a" / f"{i}.png")
    run(tmp_path / "a", tmp_path)
    out = capsys.readouterr().out
    words = re.search(r"--mean .*--std [\d. ]+", out)[0].split()
    mean, std = [float(word) for word in words[1:4]], [float(word) for word in words[5:]]
    assert channel_statistics(3, mean, std) == {"mean": mean, "std": std} and min(std) > 0
    assert out.count("everywhere") == 2 - (levels[0] != levels[1]) and std[2] == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_where_none_can_be_read_the_first_says_why(tmp_path, workers):
    """Four channels without --in-chans, in this process and from another."""
    for i in range(2):
        np.save(tmp_path / f"{i}.npy", np.zeros((5, 6, 4), np.uint8))
    message = r"none of 2 images could be read; the first, .*\d\.npy: ValueError: uint8 array of shape \(5, 6, 4\); "
    with pytest.raises(UserError, match=message + "--in-chans 3 reads"):
        run(tmp_path, tmp_path, workers=workers)


def test_of_val_beside_train_the_unreadable_alone(tmp_path, capsys):
    """A class may be called train, too; the statistics are those of train/."""
    for place, colour in (("train/x/1", 51), ("val/x/1", 255), ("val/train/1", 255)):
        (tmp_path / "a" / place).parent.mkdir(parents=True)
        Image.new("RGB", (8, 8), (colour,) * 3).save(tmp_path / "a" / f"{place}.png")
    broken = [tmp_path / "a" / place / "2.png" for place in ("train/x", "val/train", "val/x")]
    for path in broken:
        path.write_bytes(b"not an image")
    result = run(tmp_path / "a", tmp_path)
    assert result["mean"] == pytest.approx([0.2] * 3) and result["images"] == 1
    assert sorted(result["unreadable"]) == [str(path) for path in broken]
    assert "of train/ alone; 4 images of val/ were read too, 2 are unreadable" in capsys.readouterr().out


def test_train_alone_needs_no_val_beside_it(tmp_path):
    (tmp_path / "data" / "train" / "a").mkdir(parents=True)
    Image.new("RGB", (8, 8), (51, 102, 255)).save(tmp_path / "data" / "train" / "a" / "1.png")
    result = run(tmp_path / "data", tmp_path)
    assert result["images"] == 1 and result["unreadable"] == []
