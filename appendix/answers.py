"""Which validation images a finished classifier answers right: what the error of a difference of two accuracies needs.

Two models tend to fail on the same images, so that their difference is known better than each accuracy alone.
"""
import argparse
import json
from pathlib import Path

import numpy as np

from common import distributed, options
from common.checkpoint import write_atomically
from common.data import load_sets
from common.distributed import print0
from common.errors import UserError
from common.memory import keep_decoded
from common.pretrained import read_weights
from sec3_benchmark.downstream_sets import load_downstream
from sec3_benchmark.evaluate import answered_right
from sec3_benchmark.finetune import build_classifier

PLACES = ("data_path", "dataset_path", "output", "device", "workers", "micro_batch", "keep_decoded")  # may have changed


def of_run(result, args):
    """Return `answered_right` for the result of a run of finetune.py or transfer.py; it is kept in the run's folder.

    args: where the data lie now, and the device. Raises UserError if the answers are not those that the run counted.
    """
    kept = Path(result["run"]) / "answers.npy"
    known = distributed.broadcast_object(kept.exists())
    right = np.load(kept) if known else evaluate(result, args)
    if abs(100 * right.mean() - result["top1"]) > 0.5:  # in half precision a few images may fall otherwise
        raise UserError(f"{result['run']} found {result['top1']:.2f} % of the validation images right, and its weights "
                        f"find {100 * right.mean():.2f} % of those in {args.data_path or args.data}: other images?")
    if distributed.is_main() and not known:
        write_atomically(kept, lambda file: np.save(file, right))
    return right


def evaluate(result, args):
    """Evaluate the weights of a run on its validation images, as it did itself."""
    weights = read_weights(result["checkpoint"])
    settings = json.loads((Path(result["run"]) / "settings.json").read_text())
    now = {name: getattr(args, name) for name in PLACES}
    settings = options.replaced(argparse.Namespace(**settings), **now, keep_blocks=None)
    images = load_downstream(settings)[1] if hasattr(settings, "dataset") else load_sets(settings, ("val",))[0]
    device = distributed.start_process_group(args.device)
    keep_decoded(images, args.keep_decoded)
    print0(f"which images {'/'.join(Path(result['run']).parts[-2:])} answers right")
    vit = build_classifier(settings, len(images.classes), weights, keep_head=True).to(device)
    return answered_right(vit, images, settings, device)
