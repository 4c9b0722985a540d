"""Transfer of a ViT to a downstream data set (Section 3, Table 4; recipe of Appendix A.4).

    python sec3_benchmark/transfer.py                                              # demo, random weights, fractals
    python sec3_benchmark/transfer.py --dataset cifar100 --dataset-path ROOT --init outputs/pretrain_mae/RUN/weights.pt
    python sec3_benchmark/transfer.py --dataset cifar100 --dataset-path ROOT       # from random weights
    python sec3_benchmark/transfer.py --preset small --dataset NAME --dataset-path ROOT --init FILE   # any folder

The defaults are the authors' class defaults. SETTINGS in sec3_benchmark/downstream.py has what differs for a data set;
the command line overrides both. Published on CIFAR-100: 78.9 from MAE-Tiny, 85.8 from a supervised DeiT-Tiny.
"""
import argparse

import torch
import torch.nn.functional as F

from common import distributed, entry, options
from common.augment import pretrain_transform
from common.distributed import print0
from common.loader import seed_everything
from common.optim import warmup_cosine
from common.pretrained import read_weights
from common.ranges import Float, Int
from common.runs import open_run
from common.training import Method, train
from common.vit import MODELS
from sec3_benchmark.downstream import SETTINGS
from sec3_benchmark.downstream_sets import FRACTALS, SETS, load_downstream
from sec3_benchmark.evaluate import check_readable, count_classes, evaluator
from sec3_benchmark.finetune import build_classifier, in_words
from sec3_benchmark.layer_decay import layer_groups

PRESETS = {
    "demo": dict(dataset="fractals-large", batch_size=64, crop_min=0.5),
    "laptop": dict(dataset="folder", epochs=30, warmup_epochs=3, batch_size=64, lr=0.1, crop_min=0.35),
    # for some 1,000 to 10,000 images, which are only a few steps at the paper's batch of 512
    "small": dict(dataset="folder", epochs=100, warmup_epochs=10, batch_size=128, lr=0.1),
}
RECIPES = SETTINGS  # by --dataset


class InsteadOfPeak(argparse.Action):
    """Argparse action of --base-lr: overrides the peak, --lr, of the preset or of the data set's recipe."""

    def __call__(self, parser, namespace, value, flag=None):
        namespace.base_lr, namespace.lr = value, None


def build_parser():
    parser = options.make_parser(__doc__)
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", default="cifar100", metavar="NAME",
                       help=f"{', '.join([*SETS, *FRACTALS])}; or a folder in --dataset-path; or `folder`, that itself")
    group.add_argument("--dataset-path", metavar="ROOT", help="folder with the data set, see sec3_benchmark/"
                       "downstream_sets.py")
    options.add_images(group)
    options.add_model(parser, MODELS)
    group = parser.add_argument_group("start")
    group.add_argument("--init", metavar="CHECKPOINT", help="pre-trained weights, a file or timm:NAME; default: none")
    group.add_argument("--keep-blocks", type=Int(0), metavar="K",
                       help="keep blocks 1..K of --init (Figure 4); 0: nothing")
    group = parser.add_argument_group("recipe (Appendix A.4)")
    group.add_argument("--epochs", type=Int(1), default=300)
    group.add_argument("--batch-size", type=Int(1), default=512, help="global, over all ranks and accumulation steps")
    group.add_argument("--base-lr", type=Float(0), default=0.03, action=InsteadOfPeak,
                       help="per 512 images: the peak is base * batch / 512")
    group.add_argument("--lr", type=Float(0), help="the peak itself, whatever the batch; default: from --base-lr")
    group.add_argument("--min-lr", type=Float(0), default=1e-6, help="where the cosine ends")
    group.add_argument("--warmup-epochs", type=Int(0), default=20, help="linear from 0")
    group.add_argument("--momentum", type=Float(0.001, 1), default=0.9, help="of SGD, Nesterov's")
    group.add_argument("--weight-decay", type=Float(0), default=0.0, help="not on vectors, positions, class token")
    group.add_argument("--layer-decay", type=Float(0, 1), default=0.75, help="of the learning rate, per layer from top "
                       "to bottom; also from random weights")
    group.add_argument("--clip-grad", type=Float(0), default=1.0, help="largest gradient norm; 0: off")
    group.add_argument("--crop-min", type=Float(0.001, 1), default=0.08, help="smallest area of a random crop")
    group.add_argument("--global-pool", choices=("avg", "token"), help="avg, the default: patch tokens, then fc_norm")
    group.add_argument("--eval-every", type=Int(0), default=10, help="epochs; 0: only at the end")
    group.add_argument("--seed", type=Int(0), default=0)
    options.add_execution(parser, pretraining=False)
    return parser


def schedule(args, images):
    """Return the learning rate as a function of the step; --base-lr is per 512 images."""
    return warmup_cosine(args, images, args.min_lr, per=512, peak=args.lr)


class CrossEntropy(Method):
    """Cross-entropy against plain labels: this recipe has neither mixup nor label smoothing."""

    def loss(self, batch, step):
        return F.cross_entropy(self.forward(batch["image"]).float(), batch["label"]), {}


def sgd(groups, momentum):
    """Build fused Nesterov SGD, the only variant that can skip an update without a device sync.

    Momentum buffers are created here, as zeros, which changes no update: torch would leave them uninitialised if fp16's
    scaler skipped the first one.
    """
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=momentum, nesterov=True, fused=True)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def main(args):
    """Run or continue the training; return {"top1", "best_top1", "train_images", "checkpoint", "seconds", ...}."""
    device = distributed.start_process_group(args.device)
    weights = read_weights(args.init) if args.init else None
    args = options.resolve(args, weights)
    train_set, test_set = load_downstream(args)
    fingerprints = {"train": train_set.fingerprint(), "test": test_set.fingerprint(),
                    "init": weights.fingerprint if weights else None}
    name = f"{args.dataset}-{args.model}-{'init' if weights else 'random'}-{args.epochs}ep"
    with open_run("transfer", name, args, fingerprints) as run:
        if run.result:
            print0(f"{args.dataset}: {in_words(run.result)}")
            return run.result
        check_readable(test_set, run, args, device)
        run.classes = train_set.classes
        seed_everything("weights", args.seed)
        vit = build_classifier(args, count_classes(train_set), weights).to(device)
        optimizer = sgd(layer_groups(vit, args.weight_decay, args.layer_decay), args.momentum)
        crop = pretrain_transform(args.img_size, (args.crop_min, 1.0), interpolation="bicubic")
        result = train(run, args, CrossEntropy(vit), optimizer, schedule(args, train_set), train_set, crop, device,
                       evaluate=evaluator(vit, test_set, args, device))
        result.update(top1=result["last"]["top1"], top5=result["last"]["top5"], best_top1=result["best"]["top1"],
                      train_images=len(train_set), classes=len(train_set.classes))
        print0(f"{args.dataset}: {in_words(result)}")
        return run.finish(result, vit)


if __name__ == "__main__":
    entry.run_script(main, build_parser(), PRESETS, RECIPES)
