"""What the tests share: reference values, the weights they were computed with, and the measure of closeness.

The arrays in tests/golden/ came from the public reference implementations, once, in float32. Ours must agree to
1e-5, gradients and CKA to 1e-4, both relative to the largest reference value of each array (`assert_close`).
"""
import json
import math
import os
import random
import shlex
import signal
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from common import options, report, scripts, tables, training
from common.images import ImageSet

GOLDEN = Path(__file__).resolve().parent / "golden"
FIXED_POSITIONS = ("pos_embed", "decoder_pos_embed")  # sin-cos tables in MAE, ordinary parameters in fine-tuning


def settings_of(module, given=None, presets=None):
    """The settings of a script with these words, {name: value}; `presets` {}: without those of the script. They are
    resolved, as they are within it, unless weights have still to say something.
    """
    presets = module.PRESETS if presets is None and hasattr(module, "PRESETS") else presets
    args = options.parse(module.build_parser(), presets, getattr(module, "RECIPES", None), options.to_argv(given or {}))
    weights_speak = getattr(args, "init", None) or hasattr(args, "checkpoint") or getattr(args, "preset", None) is None
    resolve = getattr(module, "resolve_backbone", options.resolve)  # detect.py's image size is no ViT's
    return args if weights_speak else resolve(args, None)


def stage(script, given=None, row=None):
    """Run a script of a row with these settings, {name: value}."""
    return scripts.run(script, options.to_argv({**(row or {}), **(given or {})}))


def parameter_count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def golden(name):
    """Reference values "mae" -> {key: array}; `config`, where there is one, comes as a dict."""
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
        values = dict(arrays)
    if "config" in values:
        values["config"] = json.loads(str(values["config"]))
    return values


def weights_by_name(name, shape):
    """The reference weights: noise seeded by the parameter's name, and norm weights around 1. float32 array."""
    noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype("float32") * 0.05
    return noise + 1 if len(shape) == 1 and name.endswith("weight") else noise


@torch.no_grad()
def fill_by_name(module, fill_positions=False):
    """Give every parameter its reference weights, in place. MAE's position tables stay as they are unless asked."""
    for name, parameter in module.named_parameters():
        if fill_positions or name not in FIXED_POSITIONS:
            parameter.copy_(torch.from_numpy(weights_by_name(name, tuple(parameter.shape))))
    return module


def assert_close(a, b, tol):
    """max|a - b| <= tol * max|b|, b the reference; shapes equal; NaN is never close. Tensors, arrays or numbers."""
    a, b = (torch.as_tensor(np.array(x) if isinstance(x, np.ndarray) else x).detach().cpu().double() for x in (a, b))
    assert a.shape == b.shape, f"shape {tuple(a.shape)}, reference {tuple(b.shape)}"
    difference, scale = (a - b).abs().max().item(), b.abs().max().item()
    assert difference <= tol * scale, f"max|a-b| = {difference:.3g} > {tol:g} * max|b| = {tol:g} * {scale:.3g}"


def ks_uniform(values, low, high):
    """Kolmogorov-Smirnov distance of values to U(low, high); 1.95 / sqrt(n) is passed once in a thousand."""
    values = (np.sort(values) - low) / (high - low)
    steps = np.arange(len(values) + 1) / len(values)
    return max(np.abs(values - steps[1:]).max(), np.abs(values - steps[:-1]).max())


def tiny_run(module, folder, monkeypatch, **explicit):
    """A pre-training script on eight 8 px images of noise, four to a step, two epochs; returns its result."""
    pixels = np.random.RandomState(0).randint(0, 256, (8, 12, 12, 3), dtype=np.uint8)
    reader = getattr(module, "subsets", module)  # the module that reads the images for it
    monkeypatch.setattr(reader, "load_images", lambda args: ImageSet("noise", pixels, None, []))
    monkeypatch.setattr(report, "draw_curve", lambda *paths: None)
    row = dict(preset="demo", data="fractals", img_size=[8], batch_size=4, epochs=2, warmup_epochs=1, base_lr=0.1,
               device="cpu", workers=0, precision="fp32", save_minutes=60, log_every=1, output=str(folder))
    return module.main(settings_of(module, {**row, **explicit}))


def assert_resumes_exactly(module, folder, monkeypatch, stop=3, **explicit):
    """A run of four steps, stopped by a signal in its third and continued, ends in the bits of an untouched one."""
    whole = tiny_run(module, folder / "whole", monkeypatch, **explicit)
    save, calls = training.Meter.step, []

    def step_and_signal(meter, **values):
        calls.append(None)
        if len(calls) == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return save(meter, **values)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(training.Meter, "step", step_and_signal)
        tiny_run(module, folder / "parts", monkeypatch, **explicit)
    assert stopped.value.code == training.STOPPED and len(calls) == stop
    parts = tiny_run(module, folder / "parts", monkeypatch, **explicit)
    ours, theirs = (torch.load(run["checkpoint"], weights_only=True)["model"] for run in (parts, whole))
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    return whole


# Images

def tensor(image):
    """What the transforms take: a PIL image or an array as uint8 (C, H, W), lying in memory as a decoder leaves it."""
    array = np.array(image)
    return torch.from_numpy(array[..., None] if array.ndim == 2 else array).permute(2, 0, 1)


def chw(image):
    """PIL RGB or L -> (C, H, W), pixel by pixel."""
    return torch.stack([torch.tensor(list(band.tobytes()), dtype=torch.uint8).view(band.height, band.width)
                        for band in image.split()])


def near(ours, pillows):
    """Torch's resize against Pillow's: both round between their two passes, whose order differs."""
    difference = (ours.int() - chw(pillows).int()).abs()
    return ours.shape == chw(pillows).shape and difference.max() <= 4 and difference.float().mean() < 0.35


def crop_by_hand(image, size, area, mode):
    """A random part of a PIL image, which no try of ten may miss, drawn from Python's generator: its area, its aspect,
    its place. Cut by Pillow, resized by torch to a square, as a PIL image.
    """
    for _ in range(10):
        pixels = image.width * image.height * random.uniform(*area)
        aspect = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        width, height = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if width <= image.width and height <= image.height:
            top, left = random.randint(0, image.height - height), random.randint(0, image.width - width)
            part = tensor(image.crop((left, top, left + width, top + height)))
            resized = F.interpolate(part[None].contiguous(), (size, size), mode=mode, antialias=True)[0]
            return Image.fromarray(resized.permute(1, 2, 0).numpy())
    raise AssertionError("ten tries missed")


# Tables, runs and models

def run(script, tmp_path, *words, parse=tables.parse):
    return script.main(parse(script.build_parser(), [*words, "--output", str(tmp_path), "--device", "cpu"]))


def commands(script, capsys, *words, parse=tables.parse):
    """The stages of a dry run: {script: [its words]}."""
    script.main(parse(script.build_parser(), [*words, "--dry-run", "--output", "out"]))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("python ")]
    return [shlex.split(line)[1:] for line in lines]


TIMING = ("images_per_second", "waiting")  # of a log's rows: what the clock says


def assert_same(a, b):
    """Equal down to the last bit, in nested dicts and lists of tensors and plain values."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        a, b = list(a.values()), list(b.values())
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    else:
        assert a == b


def log_rows(folder):
    """log.jsonl without what the clock says."""
    rows = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMING} for row in rows]


def noisy(model, seed=0):
    """Every parameter moved, so that no table, bias or scale is at a value that hides it."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def table_row(query, key, rows, columns):
    """Row of the table for two tokens, 0 the class token, by the rule of BEiT."""
    if query == key == 0:
        return (2 * rows - 1) * (2 * columns - 1) + 2
    if key == 0:
        return (2 * rows - 1) * (2 * columns - 1) + 1
    if query == 0:
        return (2 * rows - 1) * (2 * columns - 1)
    (yq, xq), (yk, xk) = divmod(query - 1, columns), divmod(key - 1, columns)
    return (yq - yk + rows - 1) * (2 * columns - 1) + (xq - xk + columns - 1)


def brute_force_bias(table, rows, columns):
    """(heads, 1 + L, 1 + L) from a table (places, heads), entry by entry."""
    tokens = range(1 + rows * columns)
    bias = torch.stack([torch.stack([table[table_row(q, k, rows, columns)] for k in tokens]) for q in tokens])
    return bias.permute(2, 0, 1)
