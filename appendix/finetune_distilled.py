"""Fine-tuning with DeiT-style distillation from a supervised network (Appendix A.1; rows of Table 1).

    python appendix/finetune_distilled.py --teacher FOLDER                          # demo, from scratch
    python appendix/finetune_distilled.py --data-path IMAGENET --init FILE          # teacher timm:regnety_160.deit_in1k
    torchrun --nproc-per-node=8 appendix/finetune_distilled.py --data-path IMAGENET --init FILE --epochs 1000
    python appendix/finetune_distilled.py --data-path IMAGENET --init FILE --eval-only    # without a teacher

Published, all with the "ori" recipe: from scratch 75.9 (300 epochs) and 77.8 (1000), from MAE-Tiny 76.9 and 78.4. One
head reads the mean of the patch tokens and learns the labels; a second one reads the class token and learns the class
that the teacher predicts. Evaluation uses the mean of both logits. ViT-Small: `--model vit_small --layer-decay 0.75`.
Everything else is as in sec3_benchmark/finetune.py.
"""
from functools import partial

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from common import distributed, entry, options
from common.data import load_sets
from common.distributed import print0
from common.errors import UserError
from common.pretrained import read_weights
from common.ranges import Float
from common.vit import SIZES, build_vit, eval_mode, pair
from sec3_benchmark import finetune
from sec3_benchmark.evaluate import check_classes

READS, PRESETS, RECIPES = finetune.READS, finetune.PRESETS, finetune.RECIPES


def build_parser():
    parser = finetune.add_arguments(options.make_parser(__doc__), models=SIZES)
    parser.set_defaults(recipe="ori")
    group = parser.add_argument_group("teacher")
    group.add_argument("--teacher", default="timm:regnety_160.deit_in1k", metavar="SOURCE",
                       help="timm:NAME or timm's folder: a classifier of the same classes and inputs")
    group.add_argument("--alpha", type=Float(0, 1), default=0.5, help="share of the teacher in the loss")
    return parser


class DistilledViT(VisionTransformer):
    """A ViT with two heads: mean of the patch tokens -> fc_norm -> head, and class token -> dist_norm -> head_dist.

    Returns both logits in training and their mean in evaluation.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.dist_norm = nn.LayerNorm(self.embed_dim, eps=1e-6)
        self.head_dist = nn.Linear(self.embed_dim, self.num_classes)

    def forward(self, images):
        tokens = self.forward_features(images)
        logits = self.forward_head(tokens), self.head_dist(self.dist_norm(tokens[:, 0]))
        return logits if self.training else (logits[0] + logits[1]) / 2


def build_distilled(args, num_classes, weights, keep_head=False, drop_path=0.0):
    if args.global_pool == "token":
        raise UserError("--global-pool token: the class token serves the teacher's head, so the other head reads the "
                        "mean of the patches; leave --global-pool out")
    return finetune.build_classifier(args, num_classes, weights, keep_head, drop_path,
                                     partial(build_vit, architecture=DistilledViT))


class Distilled(finetune.Supervised):
    """Hard distillation: (1 - alpha) * CE(head, labels) + alpha * CE(head_dist, class predicted by the teacher)."""

    def __init__(self, model, args, num_classes, *, teacher):
        super().__init__(model, args, num_classes)
        self.teacher, self.alpha = teacher, args.alpha
        if teacher.num_classes != num_classes:
            raise UserError(f"--teacher {args.teacher} knows {teacher.num_classes} classes, the data "
                            f"{num_classes}: give another teacher")

    def loss(self, batch, step):
        images, target = self.mixed(batch)
        with torch.no_grad():
            choice = self.teacher(images).argmax(dim=1)
        logits, from_class_token = self.forward(images)
        from_labels = self.cross_entropy(logits, target)
        from_teacher = F.cross_entropy(from_class_token.float(), choice)
        return (1 - self.alpha) * from_labels + self.alpha * from_teacher, {"loss_teacher": from_teacher}


def read_teacher(args, device):
    """Read the teacher; return it in evaluation mode, its Weights, and args with its mean and deviation of the images.

    Raises UserError if it is not a timm model or cannot read images of the student's size and channels.
    """
    args = options.resolve(args, read_weights(args.init) if args.init else None)  # weights may fix the image size
    weights = read_weights(args.teacher)
    args = options.with_statistics(args, weights)
    if weights.model is None:
        raise UserError(f"--teacher {args.teacher}: give timm:NAME or a timm folder (appendix/tools/"
                        f"convert_checkpoint.py makes one from a checkpoint)")
    teacher = eval_mode(weights.model, device).requires_grad_(False)
    try:
        teacher(torch.zeros(1, args.in_chans, *pair(args.img_size), device=device))
    except (AssertionError, RuntimeError) as error:  # a ViT of another size, other channels
        raise UserError(f"--teacher {args.teacher} cannot read images of {args.in_chans} x "
                        f"{' x '.join(map(str, pair(args.img_size)))}: {error}") from error
    return teacher, weights, args


def main(args):
    """Run or continue the training; return the result of finetune.py."""
    if args.eval_only:  # no training: do not fetch the teacher, nor take over its mean and deviation
        return finetune.train_classifier(args, "finetune_distilled", build_distilled, Distilled)
    teacher, weights, args = read_teacher(args, distributed.start_process_group(args.device))
    if not args.teacher.startswith("timm:"):  # models of the hub name classes in words, data sets by folders
        check_classes(weights, load_sets(args)[0])
    print0(f"teacher {args.teacher}, {sum(p.numel() for p in teacher.parameters()):,} parameters")
    return finetune.train_classifier(args, "finetune_distilled", build_distilled, partial(Distilled, teacher=teacher),
                                     {"teacher": weights.fingerprint})


if __name__ == "__main__":
    entry.run_script(main, build_parser(), PRESETS, RECIPES)
