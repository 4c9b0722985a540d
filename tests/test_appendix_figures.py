"""Appendix A.6 and B.1: band-pass by hand, and both scripts from the command line to the picture on tiny models."""
import json

import numpy as np
import pytest
import torch

from appendix import a6_cka_settings, b1_stronger_references
from appendix.a6_cka_settings import band_pass
from tests.helpers import assert_close
from tests.test_figures import place, run  # noqa: F401  `place` is a fixture


def plane_wave(grid, rows, columns):
    """cos of so many periods over the grid, (1, L, 1)."""
    y, x = torch.meshgrid(torch.arange(grid[0]) / grid[0], torch.arange(grid[1]) / grid[1], indexing="ij")
    return torch.cos(2 * torch.pi * (rows * y + columns * x)).reshape(1, -1, 1)


@pytest.mark.parametrize(("rows", "columns", "band"), [
    (0, 0, "low"), (1, 1, "low"), (1, 3, "high"), (2, 0, "high"), (0, 3, "high"), (4, 0, "high")])
def test_a_wave_is_in_one_band_alone(rows, columns, band):
    """Grid 8 x 12, cut at half of the highest frequency: below 2 periods over the rows and 3 over the columns."""
    wave, other = plane_wave((8, 12), rows, columns), {"low": "high", "high": "low"}[band]
    assert_close(band_pass(wave, (8, 12), band, 0.5), wave, 1e-5)
    assert band_pass(wave, (8, 12), other, 0.5).abs().max() < 1e-5


def test_both_bands_add_up_and_an_open_cut_off_keeps_all():
    tokens = torch.randn(2, 35, 3)
    assert_close(band_pass(tokens, (5, 7), "low", 0.5) + band_pass(tokens, (5, 7), "high", 0.5), tokens, 1e-5)
    assert_close(band_pass(tokens, (5, 7), "low", 1.1), tokens, 1e-5)


def test_a6_from_the_command_line(place, tmp_path):  # noqa: F811
    words = ("--num-images", "16", "--batch-size", "8")
    arrays = run(a6_cka_settings, place, tmp_path, *words)
    assert list(arrays)[0] == "A: as in Figure 1" and len(arrays) == 2 * len(a6_cka_settings.VARIANTS)
    assert all(array.shape == (13, 13) and np.isfinite(array).all() for array in arrays.values())
    usual = arrays["B: as in Figure 1"]
    for name in a6_cka_settings.VARIANTS:
        assert_close(np.diagonal(arrays[f"A: {name}"]), np.ones(13), 1e-6)  # the reference with itself
        assert (name == "as in Figure 1") == np.array_equal(arrays[f"B: {name}"], usual)
    about = json.loads((tmp_path / "a6" / "a6.json").read_text())
    assert about["item"] == "a6" and about["variants"]["a quarter of the images"]["images"] == 4
    assert (tmp_path / "a6" / "a6.png").exists()
    again = run(a6_cka_settings, place, tmp_path, *words, "--from-numbers", str(tmp_path / "a6" / "a6.npz"))
    assert all(np.array_equal(again[name], arrays[name]) for name in arrays)


def test_b1_compares_with_the_first_model(place, tmp_path):  # noqa: F811
    arrays = run(b1_stronger_references, place, tmp_path, "--num-images", "12")
    assert list(arrays) == ["A", "B"] and arrays["B"].shape == (13, 13)
    assert (tmp_path / "b1" / "b1.png").exists()
