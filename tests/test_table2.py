"""Table 2: ReaL and V2 scored by hand on small fakes, networks against published facts, the throughput protocol on a
stub, and the picture's labels."""
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from common import options, report
from common.augment import eval_transform
from common.data import labelled_folder
from common.errors import UserError
from common.images import ImageSet
from common.loader import eval_loader
from common.vit import build_vit
from sec3_benchmark import imagenet_variants as variants
from sec3_benchmark import light_networks
from sec3_benchmark import table2_sota_networks as table2
from sec3_benchmark.evaluate import accuracy
from sec3_benchmark.label_points import label_points
from tests.helpers import parameter_count

CPU = torch.device("cpu")
NETWORKS = {network.key: network for network in light_networks.NETWORKS}
QUICK = ("mobilenetv2_100", "efficientnet_b0", "resnet18", "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224",
         "pit_ti_224", "levit_128s", "xcit_tiny_12_p16_224.fb_dist_in1k", "mobilevit_xs", "convit_tiny", "coat_tiny",
         "edgenext_x_small")


# ReaL and V2

def grey_image(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(path)


class ReadsGrey(nn.Module):
    """A classifier that is right about images of grey value 10 * class."""

    def __init__(self, classes):
        super().__init__()
        self.config = {"img_size": [8, 8], "num_classes": classes}
        self.levels = 10 * torch.arange(classes)

    def forward(self, images):  # normalised (B, 3, 8, 8)
        grey = 255 * (images[:, 0].mean(dim=(1, 2)) * 0.229 + 0.485)
        return -(grey[:, None] - self.levels).abs()


@pytest.fixture
def imagenet(tmp_path):
    """Write validation images of 12 classes whose numbers are in another order than the files.

    Label and grey value agree for four images in five.
    """
    numbers = np.random.default_rng(0).permutation(36) + 1
    for place, number in enumerate(numbers):
        label = place // 3
        shown = (label + 1) % 12 if number % 5 == 0 else label
        grey_image(tmp_path / f"imagenet/val/n{label:08d}/ILSVRC2012_val_{number:08d}.png", 10 * shown)
    return tmp_path / "imagenet"


def test_real_counts_a_prediction_in_the_list_and_skips_empty_lists():
    rng = np.random.default_rng(1)
    lists = [sorted(rng.choice(10, size=rng.integers(0, 4), replace=False).tolist()) for _ in range(200)]
    best, numbers = rng.integers(0, 10, 150), rng.permutation(200)[:150] + 1
    right = scored = 0
    for guess, number in zip(best, numbers):
        if len(lists[number - 1]) > 0:
            scored += 1
            right += any(int(guess) == answer for answer in lists[number - 1])
    assert 0 < right < scored < 150
    assert variants.real_top1(best, numbers, lists) == (100 * right / scored, scored)


def test_real_goes_by_the_files_numbers_and_top1_by_the_folders(imagenet, tmp_path):
    """Only class 3's images have two ReaL labels, and one list in seven is empty. Expected: counted file by file."""
    val, lists, right = variants.imagenet_val(imagenet), [[]] * 36, []
    for file in val.images:
        number, label = int(Path(file).stem[-8:]), int(Path(file).parent.name[1:])
        answers = [] if number % 7 == 0 else [label, (label + 1) % 12] if label == 3 else [label]
        lists[number - 1] = answers
        shown = (label + 1) % 12 if number % 5 == 0 else label
        right += [shown in answers] if answers else []
    (tmp_path / "real.json").write_text(json.dumps(lists))
    result = variants.evaluate(ReadsGrey(12), CPU, val, variants.read_real(tmp_path / "real.json"), workers=0)
    assert result == {"top1": pytest.approx(100 * 29 / 36), "real": pytest.approx(100 * sum(right) / len(right)),
                      "real_images": len(right)}
    assert len(right) == 31


def test_v2_reads_its_folders_as_numbers(tmp_path):
    """Sorted as strings, 10 and 11 come before 2: torchvision's labels are right for the first two classes only."""
    for label in range(12):
        for i in range(2):
            grey_image(tmp_path / f"v2/{label}/{i}.png", 10 * label)
    images = variants.imagenet_v2(tmp_path / "v2")
    assert variants.evaluate(ReadsGrey(12), CPU, v2=images, workers=0) == {"v2": 100.0}
    naive = labelled_folder(tmp_path / "v2", 3, "naive")
    assert variants.top1(variants.predictions(ReadsGrey(12), naive, CPU, 0), naive.labels) == pytest.approx(100 / 6)
    assert images.classes == list(range(12))


def test_predictions_agree_with_the_evaluation_of_every_other_table():
    vit = build_vit("vit_demo", img_size=16, patch_size=8, num_classes=3).eval()
    images = ImageSet("noise", np.random.RandomState(0).randint(0, 256, (50, 20, 24, 3), dtype=np.uint8),
                      np.arange(50) % 3, [0, 1, 2])
    mean, std = (255 * torch.tensor(v) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = accuracy(vit, eval_loader(images, eval_transform(16), 50, 0, CPU), CPU, mean, std)["top1"]
    best = variants.predictions(vit, images, CPU, workers=0, batch_size=7)
    assert variants.top1(best, images.labels) == pytest.approx(expected)


def test_mistakes_about_the_variants_are_named(imagenet, tmp_path):
    val = variants.imagenet_val(imagenet)
    with pytest.raises(UserError, match="the model knows 7 classes, imagenet has 12"):
        variants.evaluate(ReadsGrey(7), CPU, val)
    with pytest.raises(UserError, match="ReaL has 35 lists, .* these have the numbers 1 to 36: give all of real.json"):
        variants.real_top1(np.zeros(36), variants.image_numbers(val), [[0]] * 35)
    with pytest.raises(UserError, match="no image has a ReaL label"):
        variants.real_top1(np.zeros(36), variants.image_numbers(val), [[]] * 36)
    for content in ("{}", "[1]", "[[1],"):
        (tmp_path / "real.json").write_text(content)
        with pytest.raises(UserError, match="give real.json"):
            variants.read_real(tmp_path / "real.json")
    grey_image(imagenet / "val/n00000000/mine.png", 0)
    with pytest.raises(UserError, match="mine.png: ReaL labels need the original file names"):
        variants.image_numbers(variants.imagenet_val(imagenet))
    with pytest.raises(UserError, match="folders are named 0 to 999, not 'n00000000'"):
        variants.imagenet_v2(imagenet / "val")
    for names, strange in (("123", "3"), (("0", "01"), "01"), (("0", "2"), "2"), (("1", "٣"), "٣")):
        for name in names:  # from 1; with zeros in front; not all; not in ASCII
            grey_image(tmp_path / strange / name / "0.png", 0)
        with pytest.raises(UserError, match=f"folders are named 0 to 999, not '{strange}'"):
            variants.imagenet_v2(tmp_path / strange)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_no_answer(imagenet, value):
    """Their argmax may be any class, and so count as right for some images."""
    model = ReadsGrey(12)
    model.levels = torch.cat([torch.tensor([value]), model.levels[1:]])
    val = variants.imagenet_val(imagenet)
    with pytest.raises(FloatingPointError, match="not finite on 36 of 36 images"):
        variants.evaluate(model, CPU, val, workers=0)


# The networks

@pytest.mark.parametrize("key", QUICK)
def test_parameters_are_the_published_ones(key):
    model, problem = light_networks.build_network(NETWORKS[key])
    assert problem is None and parameter_count(model) / 1e6 == pytest.approx(NETWORKS[key].params, abs=0.0051)


def test_ours_is_the_papers_vit_tiny():
    """Ours has 5,717,416 parameters and twelve heads in every row; DeiT-Tiny and its kin have three heads."""
    for key in ("scratch", "mae-300", "mae-1000"):
        vit, _ = light_networks.build_network(NETWORKS[key])
        assert parameter_count(vit) == 5_717_416 and vit.blocks[0].attn.num_heads == 12
        assert NETWORKS[key].marks == ""
    starred = {key for key, network in NETWORKS.items() if "⋆" in network.marks}
    assert starred == {"deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "vit_tiny_patch16_224"}
    for key in starred:
        assert light_networks.build_network(NETWORKS[key])[0].blocks[0].attn.num_heads == 3
    assert [NETWORKS[key].top1 for key in ("scratch", "mae-300", "mae-1000", "mae-rpe")] == [75.8, 78.0, 78.5, 79.0]


def test_daggers_are_where_timm_says_distilled():
    """EdgeNeXt-S's weights come from the recipe called USI, which uses distillation."""
    for key, network in NETWORKS.items():
        if timm.is_model(key) and not network.ours:
            tag = timm.get_pretrained_cfg(key).tag or ""
            assert ("†" in network.marks) == ("dist" in key + tag or "usi" in tag), key


def test_a_network_that_cannot_be_built_says_why():
    assert light_networks.build_network(NETWORKS["edgevit"]) == (None, f"not in timm {timm.__version__}")
    args = SimpleNamespace(batch_size=1)
    assert table2.measure(NETWORKS["mobile_former"], True, args, CPU)["status"].startswith("not in timm")


# The protocol

class Watched(nn.Module):
    """Notes under which conditions it is called."""

    def __init__(self):
        super().__init__()
        self.layer, self.calls = nn.Conv2d(3, 2, 1), []

    def forward(self, images):
        out = self.layer(images)
        self.calls.append((tuple(images.shape), images.is_contiguous(memory_format=torch.channels_last), out.dtype,
                           self.training, torch.is_inference_mode_enabled(), torch.backends.cudnn.allow_tf32))
        return out


def test_warm_up_does_not_count_and_the_median_batch_does(monkeypatch):
    durations = [9.0, 8.0, 2.0, 0.5, 4.0]  # two to warm up
    ticks = iter(np.cumsum([t for d in durations for t in (1.0, d)]))  # a second passes between two batches
    assert table2.batch_seconds(nn.Identity(), torch.zeros(1), None, 2, 3, lambda: next(ticks)) == [2.0, 0.5, 4.0]
    monkeypatch.setattr(table2, "batch_seconds", lambda *a: [2.0, 0.5, 4.0])
    args = SimpleNamespace(batch_size=6, warmup=2, repeats=3, channels_last=False, compile=False, precision="fp32")
    assert table2.throughput(Watched(), 8, args, CPU) == {"images_per_second": 3.0, "slowest": 1.5, "fastest": 12.0}


@pytest.mark.parametrize(("channels_last", "precision", "dtype"),
                         [(False, "fp32", torch.float32), (True, "bf16", torch.bfloat16)])
def test_networks_are_measured_as_the_table_says(channels_last, precision, dtype):
    args = SimpleNamespace(batch_size=4, warmup=2, repeats=3, channels_last=channels_last, compile=False,
                           precision=precision)
    model = Watched().train()
    result = table2.throughput(model, 32, args, CPU)
    assert model.calls == [((4, 3, 32, 32), channels_last, dtype, False, True, False)] * 5  # TF32: off
    assert 0 < result["slowest"] <= result["images_per_second"] <= result["fastest"]
    words = table2.protocol(args, CPU)
    assert "batch 4" in words and "median of 3 batches after 2" in words and "not compiled" in words
    assert ("channels last" in words) == channels_last
    assert ("mixed precision bfloat16" in words) == (precision == "bf16")


def test_a_network_too_large_for_the_device_does_not_end_the_table(monkeypatch):
    def too_large(*args):
        raise torch.OutOfMemoryError("no room")
    monkeypatch.setattr(table2, "throughput", too_large)
    result = table2.measure(NETWORKS["scratch"], True, SimpleNamespace(batch_size=1024), CPU)
    assert result == {"status": "out of memory at batch 1024", "params": 5_717_416}

    def broken(*args):
        raise RuntimeError("shapes")
    monkeypatch.setattr(table2, "throughput", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        table2.measure(NETWORKS["scratch"], True, SimpleNamespace(batch_size=1024), CPU)


# The picture and the whole table

def test_no_label_lies_over_another_or_over_a_point(tmp_path):
    figure, axes = report.subplots(figsize=(7, 5))
    rng = np.random.default_rng(0)
    points = [(10 ** rng.uniform(3, 4), rng.uniform(70, 82), f"Network-{i:02d}/16", "black") for i in range(30)]
    points += [(2000, 75 + 0.05 * i, f"Same place {i}", "black") for i in range(4)]
    axes.scatter([p[0] for p in points], [p[1] for p in points], s=22)
    axes.set_xscale("log")
    axes.margins(0.12)
    texts = label_points(axes, points)
    figure.savefig(tmp_path / "labels.png")
    boxes, frame = [text.get_window_extent() for text in texts], axes.get_window_extent()
    assert [text.get_text() for text in texts] == [p[2] for p in points]
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])
        assert not any(box.contains(*axes.transData.transform(p[:2])) for p in points)
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1


def run_table(*argv):
    return table2.main(options.parse(table2.build_parser(), table2.PRESETS, argv=list(map(str, argv))))


def test_the_table_from_command_line_to_picture(imagenet, tmp_path, monkeypatch, capsys):
    """Rows of one network share its measurement, checkpoints are evaluated, and the picture is drawn from the file."""
    kept = [NETWORKS[key] for key in ("resnet18", "deit_tiny_patch16_224", "edgevit", "scratch", "mae-300")]
    monkeypatch.setattr(table2, "NETWORKS", kept)
    for label in range(12):
        grey_image(tmp_path / f"v2/{label}/0.png", 10 * label)
    (tmp_path / "real.json").write_text(json.dumps([[number % 12] for number in range(36)]))
    for name, settings in (("vit", {}), ("three", {"num_heads": 3})):
        vit = build_vit("vit_tiny", img_size=16, patch_size=8, num_classes=12, **settings)
        torch.save({"model": vit.state_dict(), "config": vit.config}, tmp_path / f"{name}.pt")
    with pytest.raises(UserError, match="holds vit_tiny with 3 heads, the row is vit_tiny with 12 heads"):
        run_table("--rows", "mae-300", "--device", "cpu", "--workers", 0, "--output", tmp_path / "refused",
                  "--checkpoints", f"mae-300={tmp_path / 'three.pt'}", "--imagenet", imagenet)
    run_table("--rows", "scratch", "mae-300", "deit_tiny_patch16_224", "edgevit", "--batch-size", 1, "--repeats", 1,
              "--device", "cpu", "--precision", "fp32", "--workers", 0, "--output", tmp_path,
              "--checkpoints", f"mae-300={tmp_path / 'vit.pt'}", "--imagenet", imagenet,
              "--real-labels", tmp_path / "real.json", "--imagenet-v2", tmp_path / "v2")
    stored = json.loads((tmp_path / "table2/table2.json").read_text())
    rows = {row["key"]: row["measured"] for row in stored["rows"]}
    assert "batch 1, float32" in stored["protocol"]
    assert rows["resnet18"] == {"status": "not chosen", "params": 11_689_512}
    assert rows["edgevit"]["status"].startswith("not in timm")
    assert rows["scratch"]["images_per_second"] == rows["mae-300"]["images_per_second"] > 0
    assert rows["scratch"].keys() & {"top1", "real", "v2"} == set()
    assert rows["mae-300"]["real_images"] == 36 and {"top1", "real", "v2"} <= rows["mae-300"].keys()
    text = (tmp_path / "table2/table2.md").read_text()
    assert "77.7 -> 77.2" in text and "DeiT-Tiny⋆" in text and "6,855, 6,794" in text
    assert Image.open(tmp_path / "table2/table2.png").size[0] > 500


@pytest.mark.parametrize(("words", "message"), [
    (("--checkpoints", "resnet18=x"), "--checkpoints resnet18=x: name a row of scratch"),
    (("--checkpoints", "mae-300"), "--checkpoints mae-300: write NAME=VALUE, each name once"),
    (("--checkpoints", "mae-300=x", "mae-300=y"), "--checkpoints mae-300=x mae-300=y: write NAME=VALUE"),
    (("--checkpoints", "mae-300=x"), "give at least one of the two"),
    (("--real-labels", "real.json", "--checkpoints", "mae-300=x", "--imagenet-v2", "v2"), "give --imagenet too"),
    (("--imagenet", "x"), "are for --checkpoints ROW=FILE: give at least one")])
def test_mistakes_on_the_command_line_are_named(words, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run_table(*words, "--device", "cpu", "--output", tmp_path)


def test_without_a_preset_it_is_the_demo_and_the_papers_protocol_is_the_default():
    parsed = options.parse(table2.build_parser(), table2.PRESETS, argv=[])
    assert (parsed.preset, parsed.batch_size) == ("demo", 8)
    paper = options.parse(table2.build_parser(), table2.PRESETS, argv=["--preset", "paper"])
    assert (paper.batch_size, paper.warmup, paper.repeats, paper.precision) == (1024, 10, 40, "auto")
    assert set(table2.DEMO) <= set(NETWORKS)
