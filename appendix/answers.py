"""Which validation images a finished classifier gets right; used for the standard error of accuracy differences.

Two models tend to fail on the same images, so their difference is known more precisely than either accuracy.
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

# Settings taken from this call rather than from the run: they do not change the answers
PLACES = ("data_path", "dataset_path", "output", "device", "workers", "micro_batch", "keep_decoded")


def of_run(result, args):
    """Return which validation images a run of finetune.py or transfer.py got right: (images,) of 1 and 0.

    result: the run's result. args: where the data are now, and the device. The answers are stored in the run's folder.
    Raises UserError if their mean is not the accuracy that the run reported.
    """
    kept = Path(result["run"]) / "answers.npy"
    known = distributed.broadcast_object(kept.exists())
    right = np.load(kept) if known else evaluate(result, args)
    if abs(100 * right.mean() - result["top1"]) > 0.5:  # half precision may change the answer for a few images
        raise UserError(f"{result['run']} found {result['top1']:.2f} % of the validation images right, and its weights "
                        f"find {100 * right.mean():.2f} % of those in {args.data_path or args.data}: other images?")
    if distributed.is_main() and not known:
        write_atomically(kept, lambda file: np.save(file, right))
    return right


def evaluate(result, args):
    """Evaluate the weights of a run on its validation images, with the settings of that run."""
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
