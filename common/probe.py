"""Measuring the features of a network every few epochs of its pre-training (--probe-every).

If the images have labels, the accuracy of nearest neighbours shows whether the features separate the classes. Spread
and effective rank need no labels and reveal a collapse: all images have the same feature, or the features span a few
dimensions only. Each is measured on the class token and on the mean of the patch tokens, after the final norm, in
float32.

Probes use a network of their own, built from the weights as a checkpoint holds them and filled as `--init` fills it in
a fine-tuning, whatever the method. So the model in training is not touched. Nor does its training change in a single
bit, because every sample and every step seeds the random generators anew.
"""
from dataclasses import replace

import numpy as np
import torch

from common import distributed
from common.augment import eval_transform
from common.data import load_sets, statistics
from common.distributed import print0, remark
from common.errors import DataError
from common.filling import load_encoder
from common.loader import eval_loader, on_device
from common.measures import effective_rank, knn_accuracy, spread
from common.options import SHAPE
from common.pretrained import interpret
from common.vit import build_model, eval_mode
from common.watch import progress

TRAIN, VAL, UNLABELLED = 2000, 1000, 1000  # how many images are measured, at most


def draw_images(images, count):
    """Draw up to `count` images of an ImageSet at random, but always the same ones."""
    chosen = np.sort(np.random.default_rng(0).permutation(len(images))[:count])
    labels = None if images.labels is None else images.labels[chosen]
    return replace(images, images=images.images[chosen], labels=labels)


def labelled_images(args):
    """Return some labelled training and validation images. If there are none, print why and return None."""
    try:
        train, val = load_sets(args)
        if len(train.classes) > 1:
            return draw_images(train, TRAIN), draw_images(val, VAL)
        why = f"{train.name} has one class"
    except DataError as error:
        why = str(error)
    print0(f"--probe-every measures spread and rank alone, on up to {UNLABELLED} images, as nearest neighbours need "
           f"labels: {why}")
    return None


def build_encoder(content):
    """Build the ViT that a checkpoint of this content describes, with its weights and without a head."""
    weights = interpret(content, "the model in training")
    vit = build_model(**{name: weights.config[name] for name in SHAPE}, num_classes=0, global_pool="token")
    load_encoder(vit, weights)
    return vit


class Probe:
    """Measurements of the features of a network in training, on images that are chosen once."""

    def __init__(self, args, images, device):
        self.args, self.device = args, device
        self.train, self.val = labelled_images(args) or (draw_images(images, UNLABELLED), None)

    def __call__(self, content):
        """Measure the features that a checkpoint of this content gives. All ranks call it and get the same.

        Returns {"knn_token", "spread_token", "rank_token", "knn_patches", ...}. The first is a top-1 in percent, and
        absent if there are no labels.
        """
        vit = eval_mode(build_encoder(content), self.device)
        train, labels = self.features(vit, self.train)
        val, targets = self.features(vit, self.val) if self.val else (None, ())
        measured = {}
        for place, name in enumerate(("token", "patches")):
            if len(targets):  # 0 also if no image can be read
                accuracy = knn_accuracy(train[place], labels, val[place], targets, len(self.train.classes))
                measured[f"knn_{name}"] = accuracy["top1"]
            measured[f"spread_{name}"] = spread(train[place])
            measured[f"rank_{name}"] = effective_rank(train[place])
        return measured

    @torch.inference_mode()
    def features(self, vit, images):
        """Compute the features of the N images that can be read: ((class tokens, means of patch tokens), labels).

        The features are (N, D) each and the labels (N,), zeros if there are none. Each rank computes its share; all get
        the whole, on the CPU. Raises FloatingPointError for features that are not finite.
        """
        loader = eval_loader(images, eval_transform(self.args.img_size), min(self.args.micro_batch, 256),
                             self.args.workers, self.device, distributed.rank(), distributed.world_size(),
                             on_bad_image="skip")
        rows = torch.zeros(len(images), 2 * vit.embed_dim + 1)
        for batch in on_device(progress(loader, "probing"), self.device, *statistics(self.args)):
            tokens = vit.forward_features(batch["image"])
            pooled = torch.cat([tokens[:, 0], tokens[:, vit.num_prefix_tokens:].mean(dim=1)], dim=1)
            rows[batch["index"]] = torch.cat([pooled.cpu(), (batch["bad"] < 0).unsqueeze(1)], dim=1)
        rows = distributed.all_sum(rows)  # exact: each value is added to zeros
        readable = rows[:, -1] > 0
        if unread := int((~readable).sum()):
            remark(f"--probe-every leaves out {unread} of {len(images)} images of {images.name}, which cannot be read")
        if not rows.isfinite().all():
            raise FloatingPointError("the features of the model in training are not finite: try a lower --base-lr, "
                                     "--clip-grad 1 or --precision fp32")
        labels = torch.zeros(len(images)) if images.labels is None else torch.as_tensor(images.labels)
        return rows[readable, :-1].chunk(2, dim=1), labels[readable].long()
