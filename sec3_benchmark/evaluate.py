"""Accuracy of a classifier, each image counted once, in float32 (Tables 1-5)."""
import math

import torch
import torch.nn.functional as F

from common import distributed
from common.augment import eval_transform
from common.checkpoint import steps_saved
from common.data import statistics
from common.distributed import print0
from common.errors import DataError, UserError
from common.images import UnreadableImage
from common.loader import eval_loader, on_device
from common.measures import hits
from common.memory import keep_decoded
from common.watch import progress

READABLE = set()  # fingerprints of the sets that this process has found readable


def say_unreadable(images, indices):
    """Print how many images were left out as unreadable, and the names of the first 20. Raises DataError if all were.

    indices: of the unreadable images.
    """
    names = ", ".join(images.where(int(index)) for index in indices[:20]) + ", ..." * (len(indices) > 20)
    if len(indices) == len(images):
        raise DataError(f"none of {len(images)} images could be read: {names}")
    if len(indices):
        print0(f"{len(indices)} of {len(images)} images are unreadable and left out: {names}")


@torch.inference_mode()
def accuracy(model, loader, device, mean, std) -> dict:
    """Compute {"top1", "top5" (percent), "val_loss", "images"} over all ranks' images.

    Sums over all images are divided once, so that every image has the same weight. With fewer than five classes, top5
    counts all of them. Raises FloatingPointError for scores that are not finite.
    """
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    for batch in on_device(progress(loader, "evaluating"), device, mean, std):
        logits, label = model(batch["image"]).float(), batch["label"]
        loss = F.cross_entropy(logits, label, reduction="sum")
        sums += torch.stack([hits(logits, label, 1).sum(), hits(logits, label, 5).sum(), loss,
                             torch.full((), float(len(label)), device=device)]).double()
    # On the CPU: there a rank that waits for others is told if one leaves at a stop signal. On the GPU it would hang
    top1, top5, loss, images = distributed.all_sum(sums.cpu()).tolist()
    if not math.isfinite(loss):
        raise FloatingPointError(f"the classifier's scores are not finite on some of {int(images)} images, so it has "
                                 f"no accuracy: train it again with a lower learning rate or --precision fp32")
    return {"top1": 100 * top1 / images, "top5": 100 * top5 / images, "val_loss": loss / images, "images": int(images)}


def count_classes(images) -> int:
    """Return the number of classes of the training images. Raises UserError for one class: nothing could be learnt."""
    if len(images.classes) < 2:
        raise UserError(f"{images.name} has one class, {images.classes[0]}, so that there is nothing to tell apart: a "
                        f"training needs at least two")
    return len(images.classes)


def check_classes(weights, images):
    """Raise UserError if the weights name as many classes as the images have, but not the same, or in another order."""
    theirs, ours = weights.classes, [str(name) for name in images.classes]
    if theirs and len(theirs) == len(ours) and theirs != ours:
        first = next(pair for pair in zip(theirs, ours) if pair[0] != pair[1])
        raise UserError(f"{weights.source} was trained on other classes than {images.name} has, or in another order: "
                        f"{first[0]} there is {first[1]} here. Call the classes as in the training, in its order")


def decode_only(image):
    """Discard the image: the transform of a loader that only checks whether images can be decoded."""
    return {}


def check_readable(images, run, args, device):
    """Raise UnreadableImage on every rank if an image cannot be read, before training rather than hours into it.

    Each rank reads its share. Nothing is read for a resumed run, which did it at its start, or for a set in READABLE.
    """
    if distributed.world_size() == 1:  # one of several ranks would keep all of the images and use its share
        keep_decoded(images, args.keep_decoded)
    [resumed] = distributed.all_max(bool(steps_saved(run.folder)))  # agreed upon: nodes may see the folder differently
    if not images.from_files or resumed:
        return
    fingerprint = images.fingerprint()
    if fingerprint in READABLE:
        return
    loader = eval_loader(images, decode_only, 256, args.workers, device, distributed.rank(), distributed.world_size())
    problem = None
    try:
        for _ in progress(loader, f"reading {images.name}"):
            pass
    except UnreadableImage as error:
        problem = str(error)
    if problems := list(filter(None, distributed.gather(problem))):
        raise UnreadableImage(problems[0])
    READABLE.add(fingerprint)


def evaluator(model, images, args, device):
    """Make the evaluation of a classifier, a zero-argument callable that returns the dict of `accuracy`.

    Preprocessing is that of all the paper's recipes: resize so that the crop is 0.875 of the side, then centre crop.
    Each call starts a new loader, so no worker processes stay between evaluations.
    """
    mean, std = statistics(args)

    def evaluate():
        return accuracy(model, share_of_rank(images, args, device), device, mean, std)

    return evaluate


def share_of_rank(images, args, device):
    """Load this rank's share of the validation images, preprocessed."""
    return eval_loader(images, eval_transform(args.img_size), min(args.micro_batch, 256), args.workers, device,
                       distributed.rank(), distributed.world_size())


@torch.inference_mode()
def answered_right(model, images, args, device):
    """Compute which images are classified correctly: (images,), 1 or 0, on every rank.

    Where scores are tied it is the chance of a correct answer (common.measures.hits).
    """
    model.eval()
    right = torch.zeros(len(images), device=device)
    for batch in on_device(share_of_rank(images, args, device), device, *statistics(args)):
        right[batch["index"]] = hits(model(batch["image"]).float(), batch["label"], 1)
    return distributed.all_sum(right.cpu()).numpy()  # entries of the other ranks' images are 0
