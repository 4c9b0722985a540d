"""What every test runs under, and stages that remember what they were asked and train nothing."""
import json
import signal
from pathlib import Path

import pytest
import torch

from common import options, scripts


@pytest.fixture(autouse=True, scope="session")
def signals_as_in_a_terminal():
    """Started by nohup or in the background of a script, the tests and their processes would ignore these two."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors on two threads crawl where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """[(stage, its settings)] in order; what a stage returns, weights, top-1, AP, is named after its number."""
    asked = []

    def run(script, words=()):
        settings = vars(options.resolve(scripts.settings_of(script, words)))
        asked.append((Path(script).stem, settings))
        folder = tmp_path / f"run{len(asked)}"
        folder.mkdir()
        (folder / "settings.json").write_text(json.dumps(settings))
        number = float(len(asked))
        return {"checkpoint": f"{folder}/weights.pt", "run": str(folder), "teacher": "teacher.pt", "top1": number,
                "best_top1": number, "box_ap": number, "mask_ap": number / 2, "seconds": 60.0,
                "images_per_second": 2.0 * number, "train_images": 7}
    monkeypatch.setattr(scripts, "run", run)
    return asked
