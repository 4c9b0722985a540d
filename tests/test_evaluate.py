"""sec3_benchmark/evaluate.py against counts by hand; then Section 3's two scripts from images to accuracy."""
import itertools
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from common import options
from common.errors import UserError
from common.images import ImageSet, UnreadableImage
from common.loader import eval_loader
from common.measures import hits
from common.pretrained import read_weights
from common.vit import build_model
from sec3_benchmark import evaluate, finetune, pretrain_mae
from sec3_benchmark.evaluate import accuracy, evaluator
from tests.helpers import near, settings_of, stage

CPU = torch.device("cpu")
PRETRAIN, FINETUNE = "sec3_benchmark/pretrain_mae.py", "sec3_benchmark/finetune.py"


# Accuracy

class Known(torch.nn.Module):
    """Image number i, all of whose bytes are i, has the logits table[i]."""

    def __init__(self, table, dtype=torch.float32):
        super().__init__()
        self.table, self.dtype, self.batches = table, dtype, []

    def forward(self, images):
        assert not self.training
        self.batches.append(len(images))
        return self.table[images[:, 0, 0, 0].round().long()].to(self.dtype)


def case(count, classes, seed=0):
    """Return a model, its images, and the expected top1, top5 and loss, counted in NumPy."""
    rng = np.random.RandomState(seed)
    logits, labels = rng.standard_normal((count, classes)).astype(np.float32), rng.randint(0, classes, count)
    logits[np.arange(count), labels] += 1
    array = np.repeat(np.arange(count, dtype=np.uint8), 4 * 4 * 3).reshape(count, 4, 4, 3)
    better = (logits > logits[np.arange(count), labels][:, None]).sum(axis=1)  # classes ranked above the true one
    exact = logits.astype(np.float64)
    loss = np.log(np.exp(exact).sum(axis=1)) - exact[np.arange(count), labels]
    expected = {"top1": 100 * np.mean(better < 1), "top5": 100 * np.mean(better < 5), "val_loss": loss.mean(),
                "images": count}
    return Known(torch.from_numpy(logits)), ImageSet("fake", array, labels, list(range(classes))), expected


def measure(model, images, batch_size=4, rank=0, world=1):
    loader = eval_loader(images, lambda image: image, batch_size, 0, CPU, rank, world)
    return accuracy(model, loader, CPU, torch.zeros(3), torch.ones(3))


@pytest.mark.parametrize(("count", "classes", "batch_size"), [(26, 9, 4), (26, 9, 26), (26, 9, 100), (12, 5, 4),
                                                              (11, 3, 4), (7, 2, 1), (3, 1, 2)])
def test_accuracy_is_the_count_by_hand(count, classes, batch_size):
    """Also if the last batch is smaller, and if there are fewer than five classes."""
    model, images, expected = case(count, classes)
    found = measure(model.train(), images, batch_size)
    assert found == pytest.approx(expected, rel=1e-6)
    assert isinstance(found["images"], int) and model.batches[0] == min(count, batch_size)
    if classes <= 5:
        assert found["top5"] == 100
    if classes == 9:
        assert 0 < found["top1"] < found["top5"] < 100  # otherwise the test could not tell them apart


@pytest.mark.parametrize(("classes", "levels"), [(1, 1), (3, 1), (7, 1), (7, 2), (7, 3), (4, 2), (6, 100)])
@pytest.mark.parametrize("k", [1, 5])
def test_ties_are_worth_their_chance(classes, levels, k):
    """The reference is all orders in which tied classes can be ranked; few levels of scores make many ties."""
    rng = np.random.RandomState(0)
    scores, labels = rng.randint(0, levels, (9, classes)).astype(np.float32), rng.randint(0, classes, 9)
    orders = list(itertools.islice(itertools.permutations(range(classes)), 5040))
    expected = [np.mean([label in sorted(order, key=lambda c, row=row: -row[c])[:k] for order in orders])
                for row, label in zip(scores, labels)]
    found = hits(torch.from_numpy(scores), torch.from_numpy(labels), k)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("label", [0, 2, 8])
def test_a_classifier_that_says_nothing_has_the_accuracy_of_chance(label):
    """Even if all images are of one class, also the first."""
    model, images, _ = case(26, 9)
    model.table[:], images.labels[:] = 3.0, label
    assert measure(model, images) == pytest.approx(
        {"top1": 100 / 9, "top5": 500 / 9, "val_loss": math.log(9), "images": 26})


@pytest.mark.parametrize(("value", "at"), [(math.nan, 0), (math.nan, 4), (math.inf, 0), (math.inf, 4), (-math.inf, 4)])
def test_scores_that_are_not_finite_have_no_accuracy(value, at):
    """One image of 26, of class 4, has such a score: its rank would be arbitrary, and the loss not a number."""
    model, images, _ = case(26, 9)
    model.table[25, at], images.labels[25] = value, 4
    with pytest.raises(FloatingPointError, match="not finite on some of 26 images"):
        measure(model, images)


def test_losses_are_summed_in_float32_whatever_the_model_gives():
    model, images, expected = case(200, 9)
    model.table = model.table.bfloat16().float()
    exact = measure(model, images)
    model.dtype = torch.bfloat16
    assert measure(model, images) == exact


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_add_up_to_the_whole(world, monkeypatch):
    """The ranks' sums, caught before they are added, give one process's result; 11 images do not divide evenly."""
    model, images, expected = case(11, 9)
    sums = []
    monkeypatch.setattr(evaluate.distributed, "all_sum", lambda tensor: sums.append(tensor.clone()) or tensor)
    for rank in range(world):
        measure(model, images, rank=rank, world=world)
    assert [int(s[-1]) for s in sums] == [len(range(rank, 11, world)) for rank in range(world)]
    monkeypatch.setattr(evaluate.distributed, "all_sum", lambda tensor: torch.stack(sums).sum(dim=0))
    assert measure(model, images, rank=0, world=world) == pytest.approx(expected, rel=1e-6)


def test_the_evaluators_view_is_the_centre_of_the_resized_image():
    """For 32 px, images of 48 x 64 are resized (bicubic) to 36 x 48, cropped to the centre, and normalised."""
    rng = np.random.RandomState(0)
    array, seen = rng.randint(0, 256, (5, 48, 64, 3), dtype=np.uint8), []

    class Watcher(torch.nn.Module):
        def forward(self, images):
            seen.append(images)
            return images.mean(dim=(2, 3))

    args = SimpleNamespace(img_size=[32], in_chans=3, mean=None, std=None, micro_batch=2, workers=0)
    evaluation = evaluator(Watcher(), ImageSet("fake", array, np.arange(5) % 3, [0, 1, 2]), args, CPU)
    assert evaluation() == evaluation()
    assert [len(images) for images in seen] == 2 * [2, 2, 1]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    for image, found in zip(array, torch.cat(seen[:3])):
        resized = Image.fromarray(image).resize((48, 36), Image.Resampling.BICUBIC).crop((8, 2, 40, 34))
        values = 255 * (found * std + mean)
        assert (values - values.round()).abs().max() < 1e-3  # bytes, normalised
        assert near(values.round(), resized)


# From images to accuracy

def make_folder(root, channels=3, size=(40, 36), count=6):
    """Write train/ and val/ with two classes of noise, bright and dark, so that a class can be learned."""
    rng = np.random.RandomState(0)
    for split in ("train", "val"):
        for cls, level in (("bright", 120), ("dark", 0)):
            (root / split / cls).mkdir(parents=True)
            for i in range(count):
                array = rng.randint(level, level + 130, (*size, channels)).astype(np.uint8)
                if channels in (1, 3):
                    Image.fromarray(array.squeeze()).save(root / split / cls / f"{i}.png")
                else:
                    np.save(root / split / cls / f"{i}.npy", array)
    return root


def only_val(tmp_path, data):
    shutil.copytree(data / "val", tmp_path / "elsewhere" / "val")
    return tmp_path / "elsewhere"


def settings(tmp_path, data, **more):
    """Return the settings of one epoch of the narrow model: three steps of four images."""
    return {"preset": "demo", "data": "folder", "data_path": str(data), "output": str(tmp_path / "outputs"),
            "epochs": 1, "warmup_epochs": 0, "batch_size": 4, "device": "cpu", "precision": "fp32", "workers": 0,
            "base_lr": 1e-2, "log_every": 1, **more}


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "data")


@pytest.mark.parametrize(("channels", "img_size", "patch"), [
    (3, [32], 4), (3, [64], 8), (3, [96], 16), (3, [224, 160], 32), (1, [32], 8), (5, [32], 8)],
    ids=["32", "64", "96", "224x160", "greyscale", "5 channels"])
def test_pretrain_finetune_evaluate(tmp_path, channels, img_size, patch):
    """Each stage takes the weights of the one before; evaluating the last gives the fine-tuning's accuracy again."""
    data = make_folder(tmp_path / "data", channels)
    common = settings(tmp_path, data, img_size=img_size, patch_size=patch, in_chans=channels)
    pretrained = stage(PRETRAIN, {**common, "mean": [0.3] * channels})  # the file says it
    common["randaugment"] = "rand-m9-mstd0.5-inc1" if channels == 3 else "none"  # its operations are for colour images
    for told_by_the_file in ("img_size", "patch_size", "in_chans"):
        del common[told_by_the_file]
    tuned = stage(FINETUNE, common, row={"init": pretrained["checkpoint"]})
    common["data_path"] = str(only_val(tmp_path, data))
    again = stage(FINETUNE, {**common, "init": tuned["checkpoint"], "eval_only": True})
    assert tuned["last"]["images"] == again["images"] == 12
    assert tuned["top1"] == tuned["last"]["top1"] == again["top1"] <= tuned["best_top1"]
    assert tuned["top5"] == again["top5"] == 100
    assert again["val_loss"] == pytest.approx(tuned["last"]["val_loss"], rel=1e-5)

    log = [json.loads(line) for line in open(f"{pretrained['run']}/log.jsonl")]
    assert [row["step"] for row in log] == [1, 2, 3] and all(np.isfinite(row["loss"]) for row in log)
    weights = read_weights(tuned["checkpoint"])
    assert weights.statistics["mean"] == [0.3] * channels
    assert weights.state["patch_embed.proj.weight"].shape == (96, channels, patch, patch)
    assert weights.state["head.weight"].shape == (2, 96)
    height, width = img_size * 2 if len(img_size) == 1 else img_size
    assert weights.state["pos_embed"].shape == (1, 1 + height * width // patch**2, 96)


def test_other_classes_are_not_evaluated_as_if_they_were_the_same(tmp_path, folder):
    """A renamed class can move in the order, and the accuracy would be of other labels."""
    trained = stage(FINETUNE, settings(tmp_path, folder, img_size=[32], patch_size=8))
    (folder / "val" / "bright").rename(folder / "val" / "light")
    with pytest.raises(UserError, match="other classes .*: bright there is dark here"):
        stage(FINETUNE, settings(tmp_path, folder, init=trained["checkpoint"], eval_only=True))


def test_an_unreadable_validation_image_is_found_before_the_training(tmp_path, folder, monkeypatch):
    """Otherwise it would be found at the first evaluation, and a corrected folder is another set, hence another run."""
    (folder / "val" / "dark" / "3.png").write_bytes(b"no image")
    monkeypatch.setattr(finetune, "train", lambda *args, **more: pytest.fail("it was trained"))
    with pytest.raises(UnreadableImage, match="val/dark/3.png could not be read"):
        stage(FINETUNE, settings(tmp_path, folder, img_size=[32], patch_size=8, on_bad_image="skip"))


def test_bright_and_dark_can_be_learned(tmp_path, folder):
    """The whole chain learns: a few epochs tell the two classes apart on unseen images."""
    result = stage(FINETUNE, settings(tmp_path, folder, img_size=[16], patch_size=8, epochs=8,
                                                       base_lr=0.1, layer_decay=1.0, mixup=0.0, randaugment="none"))
    assert result["top1"] == 100 and result["last"]["val_loss"] < 0.5


def test_keep_blocks_keeps_what_it_says(tmp_path, folder):
    """Embedding, positions and blocks 1..k are the pre-trained ones, everything else is as from scratch."""
    common = settings(tmp_path, folder, img_size=[32], patch_size=8)
    pretrained = stage(PRETRAIN, common)
    weights = read_weights(pretrained["checkpoint"])

    def build(**more):
        args = options.resolve(settings_of(finetune, {**common, **more}))
        torch.manual_seed(1)
        return finetune.build_classifier(args, 2, weights if "init" in more else None).state_dict()
    scratch = build()
    for k in (0, 1, 7, 12):
        kept = build(init="file", keep_blocks=k)
        for name, value in kept.items():
            first = 0 if name.startswith(("patch_embed.", "pos_embed", "cls_token")) else 12  # block that it goes with
            block = int(name.split(".")[1]) if name.startswith("blocks.") else first
            source = weights.state if block < k else scratch
            assert torch.equal(value, source[name]), (k, name)
    whole = build(init="file")  # as Figure 2 has it for k = 12 of an encoder
    assert whole.keys() == kept.keys() and all(torch.equal(value, whole[name]) for name, value in kept.items())
    assert not torch.equal(scratch["blocks.0.attn.qkv.weight"], weights.state["blocks.0.attn.qkv.weight"])

    runs = [stage(FINETUNE, common, row={"init": pretrained["checkpoint"], "keep_blocks": k})
            for k in (0, 3)] + [stage(FINETUNE, common, row={"init": pretrained["checkpoint"]})]
    assert len({result["run"] for result in runs}) == 3
    assert len({result["last"]["val_loss"] for result in runs}) == 3


def test_the_same_data_elsewhere_find_the_finished_run(tmp_path, folder, monkeypatch, capsys):
    """A copy of images and weights has the same content and is the same run; other weights are another run."""
    def stages(data, init=None):
        common = settings(tmp_path, data, img_size=[16], patch_size=8)
        first = stage(PRETRAIN, common)
        return first, stage(FINETUNE, common, row={"init": init or first["checkpoint"]})
    expected = stages(folder)
    shutil.copytree(folder, tmp_path / "elsewhere" / "data")
    shutil.copy(expected[0]["checkpoint"], tmp_path / "copied.pt")
    with monkeypatch.context() as patch:
        for module in (pretrain_mae, finetune):
            patch.setattr(module, "train", None)  # whoever trains now fails
        found = stages(tmp_path / "elsewhere" / "data", str(tmp_path / "copied.pt"))
    assert [result["run"] for result in found] == [result["run"] for result in expected]
    assert found[1]["top1"] == expected[1]["top1"]
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"top-1 {found[1]['top1']:.2f} after the last epoch")

    content = torch.load(tmp_path / "copied.pt", weights_only=True)
    content["model"]["cls_token"] += 1
    torch.save(content, tmp_path / "copied.pt")
    assert stages(folder, str(tmp_path / "copied.pt"))[1]["run"] != expected[1]["run"]


def test_the_worker_count_changes_no_weight(tmp_path, folder):
    """Two runs of the original recipe through the whole loop, with 0 and 2 workers, end in the same bytes."""
    states = []
    for workers in (0, 2):
        common = settings(tmp_path / str(workers), folder, img_size=[16], patch_size=8, workers=workers, epochs=2)
        result = stage(FINETUNE, {**common, "recipe": "ori"})
        states.append(torch.load(result["checkpoint"], weights_only=True)["model"])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_skipped_image_is_reported_by_the_run(tmp_path):
    """One unreadable file in 100 is replaced, counted in the result and listed in a file. By default the run stops."""
    data = make_folder(tmp_path / "data", size=(8, 8), count=50)
    (data / "train" / "dark" / "7.png").write_bytes(b"no image")
    common = settings(tmp_path, data, img_size=[16], patch_size=8, batch_size=50)
    with pytest.raises(ValueError, match="dark/7.png"):
        stage(PRETRAIN, common)
    result = stage(PRETRAIN, {**common, "on_bad_image": "skip"})
    assert result["bad_images"] == 1
    [listing] = list((tmp_path / "outputs").glob("pretrain_mae/*/bad_images*.txt"))
    assert listing.read_text() == f"{data}/train/dark/7.png\n"


@pytest.mark.parametrize(("more", "error", "named"), [
    ({"eval_only": True}, ValueError, "--eval-only needs --init"),
    ({"keep_blocks": 3}, ValueError, "--keep-blocks needs --init"),
    ({"in_chans": 1}, ValueError, "--randaugment none"),
    ({"batch_size": 3}, ValueError, "micro-batch has 3.*even"),
    ({"batch_size": 6, "micro_batch": 3}, ValueError, "micro-batch has 3.*even"),
    ({"batch_size": 13}, ValueError, "12 images, fewer than one batch of 13"),
    ({"init": "no/where.pt"}, FileNotFoundError, "no/where.pt"),
])
def test_what_cannot_be_trained_is_named(tmp_path, folder, more, error, named):
    with pytest.raises(error, match=named):
        stage(FINETUNE, {**settings(tmp_path, folder, img_size=[16], patch_size=8), **more})


@pytest.mark.parametrize("script", ["sec3_benchmark/finetune.py", "sec3_benchmark/transfer.py",
                                    "appendix/linear_probe.py", "appendix/knn_probe.py"])
def test_one_class_alone_teaches_nothing(tmp_path, folder, script):
    """The loss would be 0 and the accuracy 100 from the first step on."""
    for split in ("train", "val"):
        shutil.rmtree(folder / split / "dark")
    vit = build_model("vit_demo", img_size=16, patch_size=8, num_heads=4, num_classes=0)
    torch.save({"model": vit.state_dict(), "config": vit.config}, tmp_path / "vit.pt")
    sets = "dataset" if "transfer" in script else "data"
    where = {sets: "folder", f"{sets}_path": str(folder), "output": str(tmp_path / "out")}
    with pytest.raises(UserError, match="has one class, bright, .* at least two"):
        stage(script, dict(**where, init=str(tmp_path / "vit.pt"), device="cpu", workers=0))
