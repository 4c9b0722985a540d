"""common/memory.py and common/workers.py: kept images are the same pixels, and exhausted resources are reported."""
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from common import memory, workers
from common.augment import pretrain_transform
from common.errors import UserError
from common.images import ImageSet, UnreadableImage
from common.loader import Views, data_loader, step_batches
from common.memory import DecodedImages, free_memory, keep_decoded
from common.workers import explain_troubles

CPU = torch.device("cpu")


@pytest.fixture
def images(tmp_path):
    """Make thirty image files of different sizes, in colour and grey, of which number 4 cannot be read."""
    rng, paths = np.random.RandomState(0), []
    for number in range(30):
        shape = (*rng.randint(5, 40, 2), 3)[:2 if number % 7 == 0 else 3]
        paths.append(str(tmp_path / f"{number:02}.{'jpg' if number % 2 else 'png'}"))
        Image.fromarray(rng.randint(0, 256, shape, dtype=np.uint8)).save(paths[-1])
    (tmp_path / "04.png").write_bytes(b"no image")
    return ImageSet("folder", paths, None, [])


def readable(images):
    return [number for number in range(len(images)) if number != 4]


def test_kept_images_are_the_files_images(images, capsys):
    expected = {number: images.read(number) for number in readable(images)}
    keep_decoded(images, 0.25)
    for path in images.images:
        os.unlink(path)  # nothing is read again
    assert all(torch.equal(images.read(number), pixels) for number, pixels in expected.items())
    assert "30 decoded images kept in memory" in capsys.readouterr().out
    with pytest.raises(UnreadableImage, match=r"04\.png"):
        images.read(4)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_training_sees_the_same_pixels_with_and_without_them(images, workers):
    def batches():
        keys = step_batches(30, batch_size=10, accumulation=1, seed=3, start_step=0, total_steps=6)
        return list(data_loader(Views(images, pretrain_transform(8), 3, "skip"), keys, workers, CPU))
    before = batches()
    keep_decoded(images, 0.25)
    for one, other in zip(before, batches()):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_only_what_fits_is_kept(images, monkeypatch):
    total = sum(images.read(number).numel() for number in readable(images))
    for free, kept in ((4.2 * total, True), (3.8 * total, False)):
        images.kept = None
        monkeypatch.setattr(memory, "free_memory", lambda free=free: free)
        keep_decoded(images, 0.25)
        assert (images.kept is not None) == kept
    images.kept = None
    monkeypatch.setattr(memory, "free_memory", lambda: 4.2 * total)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # each rank of a node keeps a copy of its own
    keep_decoded(images, 0.25)
    assert images.kept is None
    keep_decoded(images, 0)
    assert images.kept is None


def test_pixels_of_any_size_and_absent_ones_come_back():
    tensors = [torch.randint(0, 256, shape, dtype=torch.uint8) for shape in ((3, 2, 5), (1, 1, 1), (5, 4, 3))]
    pixels = DecodedImages([tensors[0], None, *tensors[1:]])
    assert pixels[1] is None
    assert all(torch.equal(pixels[at], tensor) for at, tensor in zip((0, 2, 3), tensors))
    assert DecodedImages([None])[0] is None


def test_free_memory_is_the_least_of_machine_and_control_groups(tmp_path, monkeypatch):
    machine = free_memory()
    assert 0 < machine <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("2000000\n")
    pair = tmp_path / "memory.max", tmp_path / "memory.current"
    monkeypatch.setattr(memory, "cgroup_files", lambda: [pair])
    assert free_memory() == 3_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory() > 3_000_000


# Loading processes and their limits

def sample_views(side=8):
    array = np.zeros((40, side, side, 3), np.uint8)
    return Views(ImageSet("noise", array, None, []), pretrain_transform(side), 0)


def shared_memory(monkeypatch, mebibytes):
    monkeypatch.setattr(workers.shutil, "disk_usage", lambda path: SimpleNamespace(free=mebibytes * 2**20))


def test_what_waits_stays_below_half_of_the_shared_memory(monkeypatch):
    views, first = sample_views(64), [(0, index) for index in range(32)]  # 384 KiB a batch
    for mebibytes, expected in ((64, (4, 2)), (4.6, (4, 1)), (1.6, (2, 1))):
        shared_memory(monkeypatch, mebibytes)
        assert workers.limit_workers(views, first, 4) == expected
    shared_memory(monkeypatch, 0.5)
    with pytest.raises(UserError, match=r"/dev/shm has 0.5 MiB free.*--shm-size.*--workers 0"):
        workers.limit_workers(views, first, 4)


def test_a_long_tmpdir_is_said_before_a_socket_fails(monkeypatch):
    monkeypatch.setattr(workers.tempfile, "gettempdir", lambda: "/t" * 50)
    with pytest.raises(UserError, match="TMPDIR.*at most 75 characters.*--workers 0"):
        workers.limit_workers(sample_views(), [(0, 0)], 2)


def test_the_limit_of_open_files_is_raised_or_said(monkeypatch):
    limits = []
    monkeypatch.setattr(workers.resource, "setrlimit", lambda which, pair: limits.append(pair))
    monkeypatch.setattr(workers.resource, "getrlimit", lambda which: (64, 4096))
    workers.allow_open_files(500)
    assert limits == [(500, 4096)]
    monkeypatch.setattr(workers.resource, "getrlimit", lambda which: (64, 256))
    with pytest.raises(UserError, match=r"256 files.*ulimit -n 500.*--workers"):
        workers.allow_open_files(500)


@pytest.mark.parametrize(("said", "meant"), [
    ("DataLoader worker (pid 7) is killed by signal: Bus error. ", "shared memory ran full.*--workers 0"),
    ("unable to allocate shared memory(shm) for file </torch_1>: No space left on device", "shared memory ran full"),
    ("unable to write to file </torch_7_12>: No space left on device (28)", "shared memory ran full"),
    ("received 0 items of ancdata", "ulimit -n"),
    ("DataLoader worker (pid 7) is killed by signal: Killed. ", "was killed.*want of memory.*--keep-decoded 0"),
    ("DataLoader worker (pid(s) 7) exited unexpectedly", "was killed.*want of memory"),
    ("Caught RuntimeError in DataLoader worker process 0.\nx\nRuntimeError: can't allocate memory: you tried",
     "worker failed for want of memory"),
    ("DataLoader worker (pid 7) is killed by signal: Segmentation fault. ", "crashed: --workers 0"),
])
def test_troubles_of_loading_processes_are_explained(said, meant):
    with pytest.raises(UserError, match=meant), explain_troubles():
        raise RuntimeError(said)


@pytest.mark.parametrize("error", [RuntimeError("something else"), OSError(28, "No space left on device", "/data/x"),
                                   RuntimeError("out of resource: shared memory, Required: 100, Hardware limit: 64")])
def test_other_troubles_are_not_taken_for_them(error):
    """For example a full disk, or the shared memory of a GPU."""
    with pytest.raises(type(error)) as raised, explain_troubles():
        raise error
    assert raised.value is error


PRIVATE = """
import json, os, sys, numpy as np, torch
from common.images import ImageSet
class Names(torch.utils.data.Dataset):
    def __init__(self, images): self.images = images
    def __len__(self): return 8
    def __getitem__(self, part):
        for index in range(part, len(self.images), 8):
            self.images.images[index]
        text = open("/proc/self/smaps_rollup").read()
        return int(text.split("Private_Dirty:")[1].split()[0]) / 1024
count = int(sys.argv[1])
images = ImageSet("folder", [f"/data/imagenet/train/n{i // 1300:08}/n{i // 1300:08}_{i}.JPEG" for i in range(count)],
                  np.zeros(count, np.int64), [])
loader = torch.utils.data.DataLoader(Names(images), num_workers=1, batch_size=None)
print(json.dumps(max(float(value) for value in loader)))
"""


def test_reading_every_name_copies_no_list_into_a_loading_process():
    """Compare the private memory of a worker that reads 200,000 names and 10. A list of strings would add 20 MiB."""
    few, many = (json.loads(subprocess.run([sys.executable, "-c", PRIVATE, str(count)], text=True, check=True,
                                           capture_output=True).stdout) for count in (10, 200_000))
    assert many - few < 8
