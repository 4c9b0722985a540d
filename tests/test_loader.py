"""common/loader.py: what a run sees is a function of seed, epoch and index, and of nothing else."""
import io
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from common import distributed
from common.augment import pretrain_transform
from common.images import DataError, ImageSet, UnreadableImage
from common.loader import (
    Views,
    data_loader,
    epoch_order,
    eval_loader,
    seed_everything,
    step_batches,
    to_device,
)
from common.watch import BadImages, progress

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
CPU = torch.device("cpu")
N = 26


class Draws:
    """A transform that draws from every random generator."""

    crop = staticmethod(pretrain_transform(8))

    def __call__(self, image):
        return {"image": self.crop(image), "noise": torch.rand(3), "python": random.random(), "numpy": np.random.rand()}


def image_set(count=N):
    array = np.random.RandomState(0).randint(0, 256, (count, 12, 12, 3), dtype=np.uint8)
    return ImageSet("fake", array, np.arange(count) * 10, list(range(10 * count)))


def batches(steps=10, workers=0, batch_size=6, accumulation=1, seed=3, start=0, rank=0, world=1, images=None,
            bad="stop"):
    """Return all micro-batches of a rank, as the training loop gets them."""
    images = images or image_set()
    keys = step_batches(len(images), batch_size=batch_size, accumulation=accumulation, seed=seed, start_step=start,
                        total_steps=steps, rank=rank, world=world)
    found = list(data_loader(Views(images, Draws(), seed, bad), keys, workers, CPU))
    assert len(found) == (steps - start) * accumulation
    return found


def same(a, b):
    """Return whether two lists of batches have the same names and the same bytes."""
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x) for x, y in zip(a, b))


def joined(parts):
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def indices(found):
    return [index for batch in found for index in batch["index"].tolist()]


# Order

def test_worker_count_changes_nothing():
    """In no tensor of ten steps over three epochs, whatever the state of the generators was before."""
    expected = batches(workers=0)
    assert expected[0]["image"].shape == (6, 3, 8, 8) and expected[0]["image"].dtype == torch.uint8
    for workers in (0, 1, 3):
        seed_everything("any", workers)
        assert same(batches(workers=workers), expected)
    assert not same(batches(seed=4), expected)


def test_each_epoch_is_another_permutation():
    per_epoch = 13  # batches of 2 use up the 26 images
    found = indices(batches(steps=3 * per_epoch, batch_size=2))
    epochs = [found[N * e : N * (e + 1)] for e in range(3)]
    assert all(sorted(epoch) == list(range(N)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0] and epochs[0] != sorted(epochs[0])
    assert epochs == [epoch_order(N, 3, e).tolist() for e in range(3)]
    assert epoch_order(N, 4, 0).tolist() != epochs[0]


def test_the_remainder_of_an_epoch_is_dropped():
    """26 images in batches of 6: four steps an epoch, as in the authors' loader; then the next order begins."""
    found = batches(steps=8, batch_size=6)
    for epoch in (0, 1):
        assert indices(found[4 * epoch : 4 * epoch + 4]) == epoch_order(N, 3, epoch)[:24].tolist()


def test_labels_belong_to_the_images():
    for batch in batches(steps=2):
        assert torch.equal(batch["label"], 10 * batch["index"])
        assert (batch["bad"] == -1).all()


# Sharding and resume

@pytest.mark.parametrize(("world", "accumulation"), [(1, 3), (2, 1), (2, 3), (3, 2), (6, 1), (1, 6)])
def test_ranks_and_accumulation_share_out_the_same_batch(world, accumulation):
    """The tensors of a step, concatenated rank by rank, are the batch of a single process."""
    steps, expected = 6, batches(steps=6)
    shares = [batches(steps=steps, world=world, rank=rank, accumulation=accumulation) for rank in range(world)]
    for step in range(steps):
        parts = [part for share in shares for part in share[step * accumulation : (step + 1) * accumulation]]
        assert {len(part["index"]) for part in parts} == {6 // world // accumulation}
        assert same([joined(parts)], [expected[step]])


@pytest.mark.parametrize(("start", "accumulation", "workers"), [(1, 1, 0), (4, 1, 2), (6, 2, 0), (9, 3, 0), (10, 1, 0)])
def test_a_resumed_loader_gives_the_batches_that_remain(start, accumulation, workers):
    """Resumed in the middle of an epoch, at its end (4 steps), and after the last step."""
    whole = batches(accumulation=accumulation)
    assert same(batches(accumulation=accumulation, start=start, workers=workers), whole[start * accumulation :])


def test_a_sample_looks_the_same_in_any_batch():
    def first_epoch(batch_size):
        found = joined(batches(steps=24 // batch_size, batch_size=batch_size))
        return {int(index): {name: value[i] for name, value in found.items()} for i, index in enumerate(found["index"])}
    small, large = first_epoch(2), first_epoch(12)
    assert small.keys() == large.keys() and len(small) == 24
    for index, sample in small.items():
        assert all(torch.equal(sample[name], large[index][name]) for name in sample)


def test_epoch_index_and_seed_each_change_the_view():
    views = Views(image_set(), Draws(), 3)
    keys = [(0, 5), (1, 5), (0, 6)]
    samples = [views[key] for key in keys] + [Views(image_set(), Draws(), 4)[0, 5]]
    for name in ("python", "numpy"):
        assert len({sample[name] for sample in samples}) == 4
    assert len({tuple(sample["noise"].tolist()) for sample in samples}) == 4
    assert len({sample["image"].numpy().tobytes() for sample in samples}) == 4


def test_a_transform_may_give_a_tensor_and_a_set_no_labels():
    images = image_set()
    images.labels = None
    sample = Views(images, pretrain_transform(8), 0)[0, 2]
    assert sample["image"].shape == (3, 8, 8) and sample["label"] == -1 and sample["index"] == 2


# Seeds

def draw():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_seeding_reaches_python_numpy_and_torch_alike():
    keys = [(0,), (1,), (0, 1), (1, 0, 2), (0, 1, 2), (2, 1, 0), (2**40, 3)]
    seen = []
    for key in keys:
        seed_everything("any", *key)
        first = draw()
        for _ in range(3):
            draw()
        seed_everything("any", *key)
        assert draw() == first
        seen.append(first)
    for values in zip(*seen):  # every generator by itself draws other numbers for each key
        assert len(set(values)) == len(keys)


# Unreadable images

@pytest.fixture
def damaged(tmp_path):
    """Make 200 image files, of which numbers 7 and 11 cannot be read."""
    paths = []
    for i, array in enumerate(image_set(200).images):
        paths.append(str(tmp_path / f"{i:03}.png"))
        Image.fromarray(array).save(paths[-1])
    for i in (7, 11):
        (tmp_path / f"{i:03}.png").write_bytes(b"this is not a png")
    return ImageSet("folder", paths, np.arange(200), list(range(200)))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_stops_and_is_named(damaged, workers):
    with pytest.raises(UnreadableImage, match=r"(007|011)\.png could not be read"):
        batches(steps=20, batch_size=10, images=damaged, workers=workers)


def test_a_skipped_image_is_replaced_alike_by_any_number_of_workers(damaged):
    expected = batches(steps=20, batch_size=10, images=damaged, bad="skip")
    for workers in (1, 3):
        assert same(batches(steps=20, batch_size=10, images=damaged, bad="skip", workers=workers), expected)
    everything = joined(expected)
    assert sorted(everything["index"].tolist()) == list(range(200))
    bad = everything["bad"] >= 0
    assert sorted(everything["bad"][bad].tolist()) == sorted(everything["index"][bad].tolist()) == [7, 11]
    assert torch.equal(everything["label"][~bad], everything["index"][~bad])
    substitutes = everything["label"][bad].tolist()  # labels of the replacements
    assert not set(substitutes) & {7, 11}
    next_epoch = joined(batches(steps=40, start=20, batch_size=10, images=damaged, bad="skip"))
    assert next_epoch["label"][next_epoch["bad"] >= 0].tolist() != substitutes  # drawn anew in every epoch


def test_a_replacement_gets_the_view_of_the_sample_it_stands_for(damaged):
    views = Views(damaged, Draws(), 3, "skip")
    sample, used = views[0, 7], views.read(0, 7)[1]
    assert used == sample["label"] != 7 and sample["bad"] == 7
    seed_everything("sample", 3, 0, 7)
    expected = Draws()(damaged.read(used))
    assert all(torch.equal(torch.as_tensor(sample[name]), torch.as_tensor(expected[name])) for name in expected)


def test_nothing_but_unreadable_images_is_an_error(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"in place of .*a\.png"):
        Views(ImageSet("folder", [str(tmp_path / "a.png")] * 3, None, []), Draws(), 0, "skip")[0, 0]


def test_bad_images_are_counted_once_and_listed(damaged, tmp_path, capsys):
    run = SimpleNamespace(folder=tmp_path)
    watch = BadImages(run, damaged)
    for batch in batches(steps=40, batch_size=10, images=damaged, bad="skip"):  # two epochs: each image is read twice
        watch.record(batch["bad"])
    assert watch.known == {7, 11}
    [listing] = tmp_path.glob("bad_images*.txt")
    assert listing.read_text().splitlines() == [damaged.where(7), damaged.where(11)]
    assert capsys.readouterr().out.count("007.png") == 1
    BadImages(run, damaged, known=[7, 11]).record(torch.tensor([7, -1]))  # a resumed run has not forgotten
    assert capsys.readouterr().out == ""


def test_more_than_one_percent_of_bad_images_stops(damaged, tmp_path):
    """Two of 200 images are exactly 1 %, which is allowed; a third is too many."""
    watch = BadImages(SimpleNamespace(folder=tmp_path), damaged)
    watch.record(torch.tensor([7, -1, 11]))
    with pytest.raises(DataError, match=r"1\.5% of 200 images are unreadable, more than 1%.*bad_images") as error:
        watch.record(torch.tensor([20]))
    assert str(error.value).rsplit(" ", 1)[1] in map(str, tmp_path.iterdir())  # the list it points to is there
    BadImages(SimpleNamespace(folder=tmp_path), damaged).record(torch.tensor([-1, -1]))


def test_one_percent_is_of_the_images_whatever_the_number_of_ranks(damaged, tmp_path, monkeypatch):
    """Because after some epochs a rank has read all images, including all unreadable ones."""
    monkeypatch.setattr(distributed, "world_size", lambda: 8)
    BadImages(SimpleNamespace(folder=tmp_path), damaged).record(torch.tensor([7, 11]))


# Evaluation

@pytest.mark.parametrize(("count", "workers"), [(26, 0), (26, 2), (8, 0), (2, 0)])
def test_ranks_together_evaluate_each_image_once(count, workers):
    """No image is repeated, also if their number is no multiple of the batch or the ranks, or less than the ranks."""
    def share_of(rank, world, workers=workers):
        return list(eval_loader(image_set(count), pretrain_transform(8), 5, workers, CPU, rank, world))
    whole = joined(share_of(0, 1, workers=0))
    assert whole["index"].tolist() == list(range(count))
    for world in (1, 2, 3):
        shares = [share_of(rank, world) for rank in range(world)]
        assert all(1 <= len(batch["index"]) <= 5 for share in shares for batch in share)
        assert sorted(index for share in shares for index in indices(share)) == list(range(count))
        assert max(map(len, map(indices, shares))) - min(map(len, map(indices, shares))) <= 1
        together = joined([batch for share in shares for batch in share])
        order = together["index"].argsort()
        assert same([{name: value[order] for name, value in together.items()}], [whole])


def test_an_unreadable_image_stops_an_evaluation(damaged):
    """A replaced image would make it another validation set."""
    with pytest.raises(UnreadableImage, match=r"007\.png"):
        list(eval_loader(damaged, pretrain_transform(8), 5, 0, CPU))


# To the device

def test_bytes_are_normalised_as_torchvision_does_it():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    array = image_set(2).images
    reference = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])
    rest = {"noise": torch.rand(2, 4), "label": torch.tensor([1, 2]), "host_box": torch.arange(8).view(2, 4)}
    moved = to_device({"image": torch.from_numpy(array).permute(0, 3, 1, 2), **rest}, CPU, torch.tensor(mean) * 255,
                      torch.tensor(std) * 255)
    assert moved["image"].dtype == torch.float32
    assert torch.allclose(moved["image"], torch.stack([reference(Image.fromarray(a)) for a in array]), atol=2e-6)
    assert all(torch.equal(moved[name], rest[name]) for name in rest)


# Progress

class Terminal(io.StringIO):
    def isatty(self):
        return True


def batches_of(sizes):
    images = ImageSet("noise", np.zeros((sum(sizes), 4, 4, 3), np.uint8), None, [])
    ends = np.cumsum(sizes)
    keys = [[(0, int(i)) for i in range(end - size, end)] for size, end in zip(sizes, ends)]
    return data_loader(Views(images, lambda image: image, 0), keys, 0, torch.device("cpu"))


@pytest.mark.parametrize(("items", "given", "count"), [
    (lambda: batches_of([3, 3, 2]), {}, "8/8"), (lambda: range(5), {}, "5/5"),
    (lambda: iter("abc"), {"total": 3}, "3/3")])
def test_progress_counts_on_a_terminal_of_rank_0_and_is_silent_elsewhere(monkeypatch, items, given, count):
    """Of a loader the images are counted, not the batches."""
    for rank, terminal in (("0", Terminal()), ("1", Terminal()), ("0", io.StringIO())):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setattr("sys.stderr", terminal)
        seen = list(progress(items(), "reading", leave=True, **given))
        assert len(seen) == len(list(items()))
        shows = rank == "0" and terminal.isatty()
        assert (count in terminal.getvalue() and "reading" in terminal.getvalue()) if shows else not terminal.getvalue()
