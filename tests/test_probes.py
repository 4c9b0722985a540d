"""appendix/features.py, linear_probe.py, knn_probe.py: which features, kept how, and what is read from them."""
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from appendix import features, knn_probe, linear_probe
from appendix.features import extract
from appendix.linear_probe import build_probe, fit_probe, probe_accuracy
from common import distributed
from common.augment import eval_transform
from common.errors import UserError
from common.images import ImageSet
from common.mae import MAE
from common.measures import knn_accuracy, vote
from common.optim import set_learning_rate
from common.vit import build_model
from tests.helpers import noisy, settings_of

CPU = torch.device("cpu")


# Nearest neighbours

def brute_force_vote(train, labels, query, num_classes, k, temperature):
    """Scores of one query, by sorting every training image; the best one's vote is 1."""
    similarity = [(float(row @ query), int(label)) for row, label in zip(train, labels)]
    scores = [0.0] * num_classes
    for value, label in sorted(similarity, reverse=True)[:k]:
        scores[label] += math.exp((value - max(similarity)[0]) / temperature)
    return scores


@pytest.mark.parametrize(("chunk", "temperature"), [(1, 0.07), (7, 0.07), (10, 0.07), (1000, 0.07), (7, 0.005)])
def test_knn_equals_a_brute_force_loop(chunk, temperature):
    """Also where exp(similarity / temperature) is more than float32 holds."""
    torch.manual_seed(0)
    train, queries = (F.normalize(torch.randn(n, 5), dim=1) for n in (50, 8))
    labels = torch.randint(0, 4, (50,))
    ours = vote(train, labels, queries, 4, k=20, temperature=temperature, chunk=chunk)
    for scores, query in zip(ours, queries):
        expected = brute_force_vote(train, labels, query, 4, 20, temperature)
        torch.testing.assert_close(scores, torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_knn_accuracy_counts_each_query_once():
    torch.manual_seed(0)
    train, queries = torch.randn(40, 5) * 3, torch.randn(11, 5)  # of any length
    labels, targets = torch.arange(40) % 7, torch.arange(11) % 7  # with all 40 voting, no class is without votes
    scores = [brute_force_vote(F.normalize(train, dim=1), labels, query, 7, 40, 0.1) for query in F.normalize(queries)]
    ranks = [sorted(range(7), key=lambda c, s=s: -s[c]).index(int(t)) for s, t in zip(scores, targets)]
    for batch in (1, 4, 100):
        ours = knn_accuracy(train, labels, queries, targets, 7, k=40, temperature=0.1, batch=batch)
        assert ours["top1"] == pytest.approx(100 * sum(r == 0 for r in ranks) / 11)
        assert ours["top5"] == pytest.approx(100 * sum(r < 5 for r in ranks) / 11)
    assert 0 < sum(r == 0 for r in ranks) < sum(r < 5 for r in ranks) < 11


@pytest.mark.parametrize(("k", "classes"), [(1, 12), (1, 3), (2, 12), (4, 12), (4, 4), (20, 12)])
@pytest.mark.parametrize("temperature", [0.07, 0.001])
def test_only_classes_with_a_vote_are_answers(k, classes, temperature):
    """Fewer than five classes have one where k is small: with k = 1 top-5 is top-1. At a low temperature most votes are
    too small for float32, and are votes all the same.
    """
    torch.manual_seed(0)
    train, queries = torch.randn(60, 5), torch.randn(200, 5)
    labels, targets = torch.arange(60) % classes, torch.arange(200) % classes
    similarity = (F.normalize(queries).double() @ F.normalize(train).double().T)
    found = {1: 0, 5: 0}
    for row, target in zip(similarity, targets.tolist()):
        votes = {}
        for i in row.argsort(descending=True)[:k].tolist():
            votes[labels[i].item()] = votes.get(labels[i].item(), 0.0) + math.exp((row[i] - 1) / temperature)
        ranked = sorted(votes, key=lambda c: -votes[c])
        for rank in found:
            found[rank] += target in ranked[:rank]
    ours = knn_accuracy(train, labels, queries, targets, classes, k=k, temperature=temperature)
    assert ours["top1"] == pytest.approx(found[1] / 2)
    if temperature > 0.01 or k < 6:  # else votes too small to be told apart decide who is fifth
        assert ours["top5"] == pytest.approx(found[5] / 2)
    assert k > 1 or ours["top1"] == ours["top5"] < 100


# The linear probe

def probe_settings(**changes):
    return settings_of(linear_probe, {"init": "x", "preset": "demo", **changes})


@pytest.mark.parametrize("recipe", ["official", "quick"])
def test_it_recovers_a_linear_task(recipe):
    """Classes that are linear in the features, which have very different scales: batch norm takes care of them."""
    torch.manual_seed(0)
    x = torch.randn(3000, 12)
    target = (x @ torch.randn(12, 5)).argmax(dim=1)
    x = x * torch.logspace(-2, 2, 12) + 7
    longer = {"epochs": 60, "base_lr": 0.02} if recipe == "quick" else {}
    args = probe_settings(recipe=recipe, batch_size=256, **longer)
    probe = build_probe(12, 5)
    fit_probe(probe, lambda epoch: x[:2500], target[:2500], args)
    result = probe_accuracy(probe, x[2500:], target[2500:])
    assert result["top1"] > 93 and result["top5"] == 100


def test_an_epoch_is_one_view_in_a_random_order():
    """Three epochs of two batches: each image once an epoch, another order each time, the views by number."""
    asked, seen = [], []

    class Probe(torch.nn.Linear):
        def forward(self, x):
            seen.append(x[:, 0].int().tolist())
            return super().forward(x)

    def view_of(epoch):
        asked.append(epoch)
        return torch.arange(6.0).view(6, 1) + 10 * epoch
    fit_probe(Probe(1, 2), view_of, torch.zeros(6, dtype=torch.int64),
              probe_settings(recipe="quick", batch_size=3, epochs=3))
    epochs = [seen[i] + seen[i + 1] for i in (0, 2, 4)]
    assert asked == [0, 1, 2] and [sorted(images) for images in epochs] == [
        [10 * epoch + i for i in range(6)] for epoch in range(3)]
    assert len({tuple(i % 10 for i in images) for images in epochs}) == 3


def test_initial_values_and_batch_norm():
    torch.manual_seed(0)
    probe = build_probe(192, 1000)
    assert probe[1].weight.std().item() == pytest.approx(0.01, rel=0.01) and not probe[1].bias.any()
    assert not probe[0].affine and probe[0].eps == 1e-6


def test_lars_by_hand():
    """PAPER 2.1 names it: trust 0.001 for matrices, none for biases, momentum 0.9, no weight decay."""
    torch.manual_seed(0)
    weight, bias = torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.zeros(3))
    w, b, v_w, v_b = weight.detach().clone(), bias.detach().clone(), 0.0, 0.0
    optimizer = linear_probe.make_optimizer([weight, bias], "official")
    set_learning_rate(optimizer, 0.5)
    for _ in range(3):
        g_w, g_b = torch.randn(3, 2), torch.randn(3)
        weight.grad, bias.grad = g_w.clone(), g_b.clone()
        optimizer.step()
        v_w = 0.9 * v_w + g_w * 0.001 * w.norm() / g_w.norm()
        v_b = 0.9 * v_b + g_b
        w, b = w - 0.5 * v_w, b - 0.5 * v_b
        torch.testing.assert_close(weight.detach(), w)
        torch.testing.assert_close(bias.detach(), b)
    weight.grad = torch.zeros(3, 2)
    optimizer.step()
    assert torch.isfinite(weight).all()


# Features

def toy_images(n=6, classes=2):
    pixels = np.random.RandomState(0).randint(0, 256, (n, 20, 20, 3), dtype=np.uint8)
    return ImageSet("toy", pixels, np.arange(n) % classes, list(range(classes)))


@pytest.fixture
def mae_file(tmp_path):
    torch.manual_seed(0)
    mae = noisy(MAE("vit_demo", img_size=12, patch_size=4, num_heads=4))
    torch.save({"model": mae.state_dict(), "config": mae.config}, tmp_path / "mae.pt")
    return mae, tmp_path / "mae.pt"


def knn_settings(file, folder, **changes):
    return settings_of(knn_probe, dict(
        init=str(file), device="cpu", workers=0, output=str(folder), **changes))


@pytest.mark.parametrize("layer", [0, 12, 3])
@pytest.mark.parametrize("pooling", ["token", "avg"])
def test_layer_and_pooling(mae_file, tmp_path, layer, pooling):
    """Against the MAE's own encoder with every patch visible; 0 is the last block and the norm, 12 goes without it."""
    mae, file = mae_file
    args = knn_settings(file, tmp_path, layer=layer, pooling=pooling)
    vit, _, args = features.build_encoder(args, CPU)
    assert args.img_size == [12, 12] and args.num_heads == 4  # the file says so
    images, ids = torch.randn(2, 3, 12, 12), torch.arange(9).expand(2, -1)
    outputs = []
    hooks = [block.register_forward_hook(lambda module, x, y: outputs.append(y)) for block in mae.blocks]
    last = mae.forward_encoder(mae.patchify(images), ids)
    for hook in hooks:
        hook.remove()
    tokens = last if layer == 0 else outputs[layer - 1]
    expected = tokens[:, 0] if pooling == "token" else tokens[:, 1:].mean(dim=1)
    torch.testing.assert_close(features.features(vit, images, layer, pooling), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", [0, 3])
def test_a_classifier_says_its_pooling_unless_it_is_given(mae_file, tmp_path, layer):
    """On the command line or by a table's row. An MAE says none, and a classifier of the class token the default."""
    def pooling(global_pool, config=True, **given):
        vit = build_model("vit_demo", img_size=12, patch_size=4, num_heads=4, num_classes=2, global_pool=global_pool)
        torch.save({"model": vit.state_dict(), **({"config": vit.config} if config else {})}, tmp_path / "vit.pt")
        row = dict(init=str(tmp_path / "vit.pt"), device="cpu", workers=0, layer=layer, img_size=[12], patch_size=4,
                   num_heads=4, model="vit_demo", **given)
        return features.build_encoder(settings_of(knn_probe, row), CPU)[2].pooling
    assert [pooling(kind) for kind in ("avg", "token")] == ["avg", "token"]
    assert pooling("avg", config=False) == "avg" and pooling("token", pooling="avg") == "avg"
    if layer:
        assert pooling("avg", pooling="token") == "token"
    else:
        with pytest.raises(UserError, match="was fine-tuned on the mean"):
            pooling("avg", pooling="token")
    args = knn_settings(mae_file[1], tmp_path, layer=layer)
    assert features.build_encoder(args, CPU)[2].pooling == "token"


def test_the_relative_model_has_features_too():
    vit = noisy(build_model("vit_demo_rpe", img_size=12, patch_size=4, num_heads=4, num_classes=0, global_pool="token"))
    images = torch.randn(2, 3, 12, 12)
    torch.testing.assert_close(features.features(vit, images), vit(images))
    assert not torch.equal(features.features(vit, images, 12), vit(images))


def test_ranks_share_the_images(mae_file, tmp_path, monkeypatch):
    """Each rank computes every second image, the sum over ranks puts them together."""
    args = knn_settings(mae_file[1], tmp_path)
    vit, _, args = features.build_encoder(args, CPU)
    images, transform = toy_images(7), eval_transform(12)
    alone = extract(vit, images, transform, args, CPU)
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(features, "distributed", SimpleNamespace(
            rank=lambda r=rank: r, world_size=lambda: 2, all_sum=lambda x: parts.append(x) or x))
        extract(vit, images, transform, args, CPU)
    torch.testing.assert_close(parts[0] + parts[1], alone)
    assert not parts[0][1::2].any() and not parts[1][::2].any()


def test_features_are_computed_once(mae_file, tmp_path, monkeypatch):
    args = knn_settings(mae_file[1], tmp_path)
    vit, fingerprint, args = features.build_encoder(args, CPU)
    calls = []
    monkeypatch.setattr(features, "extract", lambda *a, **k: calls.append(a) or extract(*a, **k))
    first = features.cached_features(vit, fingerprint, toy_images(), args, CPU)
    again = features.cached_features(vit, fingerprint, toy_images(), args, CPU)
    assert len(calls) == 1 and torch.equal(first, again)
    for changes in (dict(layer=3), dict(pooling="avg")):
        changed = SimpleNamespace(**{**vars(args), **changes})
        features.cached_features(vit, fingerprint, toy_images(), changed, CPU)
    features.cached_features(vit, fingerprint, toy_images(), args, CPU, fresh=True)
    features.cached_features(vit, "other weights", toy_images(), args, CPU)
    features.cached_features(vit, fingerprint, toy_images(5), args, CPU)
    assert len(calls) == 6
    for path in (tmp_path / "features").iterdir():
        path.write_bytes(path.read_bytes()[:-9])
    assert torch.equal(features.cached_features(vit, fingerprint, toy_images(), args, CPU), first) and len(calls) == 7


@pytest.mark.parametrize("script", [knn_probe, linear_probe])
def test_the_scripts(mae_file, tmp_path, monkeypatch, script):
    """A set that is its own training set is recognised; the result names the weights that were probed."""
    monkeypatch.setattr(script, "load_sets", lambda args: (toy_images(), toy_images()))
    changes = dict(k=1) if script is knn_probe else dict(recipe="quick", epochs=300, batch_size=6, base_lr=1.0)
    args = settings_of(script, dict(
        init=str(mae_file[1]), device="cpu", workers=0, output=str(tmp_path), **changes))
    result = script.main(args)
    assert result["top1"] == 100 and result["checkpoint"] == str(mae_file[1])
    assert json.loads(Path(result["run"]).read_text())["top1"] == 100
    assert distributed.world_size() == 1


def test_few_labels(mae_file, tmp_path, monkeypatch):
    """Of a set that is its own training set: with all images of a class everything is right, with one hardly."""
    monkeypatch.setattr(linear_probe, "load_sets", lambda args: (toy_images(), toy_images()))
    args = settings_of(linear_probe, dict(init=str(mae_file[1]), device="cpu", workers=0, output=str(tmp_path),
                                          shots=[1, 3], draws=4))
    found = json.loads(Path(linear_probe.main(args)["run"]).read_text())["shots"]
    assert found["3"] == [100] * 4 and len(found["1"]) == 4 and min(found["1"]) >= 100 / 3 and max(found["1"]) <= 100


def test_views_take_turns_and_fresh_ones_are_computed_once(mae_file, tmp_path, monkeypatch):
    """Two views over four epochs: with --fresh each is computed anew in its first epoch, other runs find all."""
    extracted, seen = [], []

    def see(probe, view_of, labels, args):
        seen.extend(view_of(epoch) for epoch in range(4))
        return 0.0
    monkeypatch.setattr(linear_probe, "load_sets", lambda args: (toy_images(6), toy_images(4)))
    monkeypatch.setattr(features, "extract", lambda *a, **k: extracted.append(a) or extract(*a, **k))
    monkeypatch.setattr(linear_probe, "fit_probe", see)

    def probe(**more):
        extracted.clear()
        linear_probe.main(settings_of(linear_probe, dict(init=str(mae_file[1]), device="cpu", workers=0, views=2,
                                                        output=str(tmp_path), **more)))
        return len(extracted)
    assert probe() == 3 and probe() == 0 and probe(fresh=True) == 3  # two views, and the validation images
    assert len(seen) == 12 and not torch.equal(seen[0], seen[1])
    for epoch, view in enumerate(seen):
        assert torch.equal(view, seen[epoch % 2])


@pytest.mark.parametrize("script", [knn_probe, linear_probe])
def test_only_a_file_of_weights_can_be_handed_on(mae_file, tmp_path, monkeypatch, script):
    """Known before any work; what holds for training alone is not offered."""
    monkeypatch.setattr(script, "build_encoder", lambda *args: pytest.fail("work was begun"))
    for source in ("timm:vit_tiny_patch16_224", str(tmp_path)):
        args = settings_of(script, presets={}, given=dict(init=source, save_to=str(tmp_path / "w.pt")))
        with pytest.raises(UserError, match="is not a file: leave --save-to out"):
            script.main(args)
    with pytest.raises(SystemExit):
        settings_of(script, presets={}, given=dict(init="x", on_bad_image="skip"))


def test_mistakes(mae_file, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--init is missing"):
        features.build_encoder(settings_of(knn_probe), CPU)
    with pytest.raises(UserError, match="--layer 13: from 1 to 12"):
        features.build_encoder(knn_settings(mae_file[1], tmp_path, layer=13), CPU)
    monkeypatch.setattr(knn_probe, "load_sets", lambda args: (toy_images(), toy_images()))
    with pytest.raises(UserError, match="--k 20: the training set has 6 images"):
        knn_probe.main(knn_settings(mae_file[1], tmp_path))
    with pytest.raises(FloatingPointError, match="loss is nan after 20 epochs: lower --base-lr"):
        endless = torch.full((6, 2), math.inf)
        fit_probe(build_probe(2, 2), lambda epoch: endless, torch.zeros(6, dtype=torch.int64),
                  probe_settings(recipe="quick", batch_size=6))
    with pytest.raises(UserError, match="3000 training images, fewer than one batch of 4096"):
        fit_probe(build_probe(2, 2), None, torch.zeros(3000), probe_settings(batch_size=4096))
