"""Supervised training of a ViT, from pre-trained weights or from scratch (Section 3.1, recipes of Appendix A.1).

    python sec3_benchmark/finetune.py                                                   # demo, from scratch
    python sec3_benchmark/finetune.py --data-path IMAGENET --init outputs/pretrain_mae/RUN/weights.pt
    python sec3_benchmark/finetune.py --data-path IMAGENET --recipe ori --num-heads 3   # the original DeiT-Tiny
    python sec3_benchmark/finetune.py --data-path IMAGENET --init FILE --eval-only
    python sec3_benchmark/finetune.py --data-path IMAGENET --init FILE --model vit_tiny_rpe --epochs 1000

The paper's run is 300 epochs at batch 1024: 78.0 from MAE-Tiny, 75.8 from scratch. --init reads our weights and those
of mae-lite, facebook's MAE, DeiT, timm and `timm:NAME` (common/pretrained.py).
"""
import torch
import torch.nn.functional as F
from timm.data import Mixup

from common import distributed, entry, options
from common.data import load_sets
from common.distributed import print0
from common.errors import UserError
from common.filling import load_encoder
from common.loader import seed_everything
from common.optim import adamw, warmup_cosine
from common.pretrained import read_weights
from common.ranges import Float, Int
from common.runs import open_run
from common.shapes import tokens_of
from common.training import Method, train
from common.vit import MODELS, build_model
from sec3_benchmark.erasing import erase, erasing_box
from sec3_benchmark.evaluate import check_classes, check_readable, count_classes, evaluator
from sec3_benchmark.layer_decay import layer_groups
from sec3_benchmark.randaugment import train_transform

READS = "labels"
PRESETS = {
    "demo": dict(data="fractals", epochs=3, batch_size=64, base_lr=6e-3, warmup_epochs=1, crop_min=0.5, eval_every=1),
    # So short a training does best with little augmentation. From scratch on 22,500 images of 50 classes it reaches
    # 36.6 %; with the recipe's RandAugment and crops from 0.08 it reaches 31.2 %, even after 20 epochs.
    "laptop": dict(data="folder", epochs=15, batch_size=64, base_lr=4e-3, warmup_epochs=2, crop_min=0.35,
                   randaugment="none", eval_every=5),
    "small": dict(data="folder", epochs=100, batch_size=256),
}
RECIPES = {  # differences from the defaults below
    "impr": {},  # none
    "ori": dict(randaugment="rand-m9-mstd0.5-inc1", erasing=0.25, mixup=0.8, cutmix=1.0, smoothing=0.1, drop_path=0.1),
}


def build_parser():
    return add_arguments(options.make_parser(__doc__))


def add_arguments(parser, models=MODELS):
    """Add the arguments of every supervised training on ImageNet; return the parser."""
    options.add_data(parser)
    options.add_model(parser, models)
    group = parser.add_argument_group("start")
    group.add_argument("--init", metavar="CHECKPOINT", help="pre-trained weights, a file or timm:NAME; default: none")
    group.add_argument("--keep-blocks", type=Int(0), metavar="K",
                       help="keep blocks 1..K of --init (Figure 2); 0: nothing")
    group.add_argument("--eval-only", action="store_true", help="evaluate --init, head included, and exit")
    group = parser.add_argument_group("recipe (Appendix A.1)")
    group.add_argument("--recipe", choices=tuple(RECIPES), default="impr", help="ori: DeiT's stronger augmentation")
    group.add_argument("--epochs", type=Int(1), default=300)
    group.add_argument("--batch-size", type=Int(1), default=1024, help="global, over all ranks and accumulation steps")
    group.add_argument("--base-lr", type=Float(0), default=1e-3, help="per 256 images: the peak is base * batch / 256")
    group.add_argument("--min-lr", type=Float(0), default=1e-6, help="where the cosine ends")
    group.add_argument("--warmup-epochs", type=Int(0), default=5, help="linear from 0")
    group.add_argument("--weight-decay", type=Float(0), default=0.05, help="not on vectors, positions, class token")
    group.add_argument("--layer-decay", type=Float(0, 1), default=0.85,
                       help="of the learning rate, per layer from top to bottom; as the authors do, also from scratch, "
                            "and 0.75 from MoCo-v3's weights")
    group.add_argument("--crop-min", type=Float(0.001, 1), default=0.08, help="smallest area of a random crop")
    group.add_argument("--randaugment", default="rand-m10-mstd0.5-inc1", help="timm's notation; none: off")
    group.add_argument("--erasing", type=Float(0, 1), default=0.0, help="probability of random erasing; 0: off")
    group.add_argument("--mixup", type=Float(0), default=0.2, help="alpha of the Beta distribution; 0: off")
    group.add_argument("--cutmix", type=Float(0), default=0.0, help="alpha; 0: off")
    group.add_argument("--smoothing", type=Float(0, 0.9999), default=0.0, help="label smoothing; 0: off")
    group.add_argument("--drop-path", type=Float(0, 1), default=0.0, help="at the last block, linear from 0; 0: off")
    group.add_argument("--global-pool", choices=("avg", "token"), help="avg, the default: patch tokens, then fc_norm")
    group.add_argument("--clip-grad", type=Float(0), default=0.0, help="largest gradient norm; 0: off")
    group.add_argument("--eval-every", type=Int(0), default=10, help="epochs; 0: only at the end")
    group.add_argument("--seed", type=Int(0), default=0)
    options.add_execution(parser, pretraining=False)
    return parser


class TrainViews:
    """Transform an image to its augmented view; with random erasing also return the box and the seed of its noise."""

    def __init__(self, args):
        randaugment = None if args.randaugment == "none" else args.randaugment
        self.transform = train_transform(args.img_size, scale=(args.crop_min, 1.0), randaugment=randaugment)
        self.size, self.erasing = args.img_size, args.erasing

    def __call__(self, image):
        views = {"image": self.transform(image)}
        if self.erasing:
            views["host_erase_box"] = erasing_box(self.size, self.erasing)
            views["host_erase_seed"] = torch.randint(2**31, ())
        return views


class Supervised(Method):
    """Cross-entropy against labels mixed by mixup and cutmix or, if neither is used, against smoothed labels."""

    def __init__(self, model, args, num_classes):
        super().__init__(model)
        self.smoothing, self.mixup = args.smoothing, None
        if args.mixup or args.cutmix:  # Mixup then smooths the labels too
            self.smoothing = 0.0
            self.mixup = Mixup(mixup_alpha=args.mixup, cutmix_alpha=args.cutmix, label_smoothing=args.smoothing,
                               num_classes=num_classes)

    def mixed(self, batch):
        """Erase and mix a batch as the recipe says: images (B, C, H, W) and labels, (B,) or if mixed (B, classes)."""
        images, target = batch["image"], batch["label"]
        if "host_erase_box" in batch:
            erase(images, batch["host_erase_box"], batch["host_erase_seed"])
        if self.mixup is None:
            return images, target
        if len(images) % 2:
            raise UserError(f"mixup pairs images, and a micro-batch has {len(images)} (batch / ranks / accumulation): "
                            f"change --micro-batch or --batch-size so that it is even, or pass --mixup 0 --cutmix 0")
        return self.mixup(images, target)

    def cross_entropy(self, logits, target):
        return F.cross_entropy(logits.float(), target, label_smoothing=self.smoothing)

    def loss(self, batch, step):
        images, target = self.mixed(batch)
        return self.cross_entropy(self.forward(images), target), {}


def build_classifier(args, num_classes, weights, keep_head=False, drop_path=0.0, build=build_model):
    """Build the ViT of the command line; load `weights` (--init) into it, or their first --keep-blocks blocks."""
    if args.keep_blocks is not None and weights is None:
        raise UserError("--keep-blocks needs --init, the weights whose blocks to keep")
    vit = build(args.model, img_size=args.img_size, patch_size=args.patch_size, in_chans=args.in_chans,
                num_classes=num_classes, num_heads=args.num_heads, global_pool=args.global_pool, drop_path=drop_path,
                **tokens_of(weights, args.model, args.img_size, args.patch_size))
    if weights is not None:
        print0(load_encoder(vit, weights, keep_blocks=args.keep_blocks, keep_head=keep_head))
    return vit


def evaluate_only(args, device, build):
    """Measure the accuracy of --init on the validation images. Our own files say what model they hold."""
    weights = read_weights(args.init)
    args = options.resolve(args, weights, (*options.SHAPE, "global_pool"))
    [val_set] = load_sets(args, splits=("val",))
    check_classes(weights, val_set)
    vit = build(args, len(val_set.classes), weights, keep_head=True).to(device)
    result = evaluator(vit, val_set, args, device)()
    print0(f"{args.init}: top-1 {result['top1']:.3f}, top-5 {result['top5']:.3f} on {result['images']} images")
    return result


def in_words(result):
    """Format the accuracy of a run."""
    return f"top-1 {result['top1']:.2f} after the last epoch (best {result['best_top1']:.2f})"


def main(args):
    """Run or continue the training; return {"top1", "top5", "best_top1", "checkpoint", "seconds", ...}."""
    return train_classifier(args, "finetune", build_classifier, Supervised)


def train_classifier(args, script, build, method, fingerprints=None):
    """Run or continue a supervised training of `script`, and return its result as `main` does.

    build(args, num_classes, weights): makes the model. method(model, args, num_classes): makes its loss. fingerprints:
    of what the run reads besides images and --init; they are part of its identity.
    """
    device = distributed.start_process_group(args.device)
    if args.eval_only and not args.init:
        raise UserError("--eval-only needs --init, the weights to evaluate")
    if args.eval_only:
        return evaluate_only(args, device, build)
    weights = read_weights(args.init) if args.init else None
    args = options.resolve(args, weights)
    train_set, val_set = load_sets(args)
    num_classes = count_classes(train_set)
    start = "scratch" if weights is None else "init"
    fingerprints = {"train": train_set.fingerprint(), "val": val_set.fingerprint(),
                    "init": weights.fingerprint if weights else None, **(fingerprints or {})}
    name = f"{args.data}-{args.model}-{start}-{args.recipe}-{args.epochs}ep"
    with open_run(script, name, args, fingerprints, no_identity=("teacher",)) as run:
        if run.result:
            print0(in_words(run.result))
            return run.result
        check_readable(val_set, run, args, device)
        run.classes = train_set.classes
        seed_everything("weights", args.seed)
        vit = build(args, num_classes, weights, drop_path=args.drop_path).to(device)
        optimizer = adamw(layer_groups(vit, args.weight_decay, args.layer_decay), betas=(0.9, 0.999))
        schedule = warmup_cosine(args, train_set, args.min_lr)
        result = train(run, args, method(vit, args, num_classes), optimizer, schedule, train_set, TrainViews(args),
                       device, evaluate=evaluator(vit, val_set, args, device))
        result.update(top1=result["last"]["top1"], top5=result["last"]["top5"], best_top1=result["best"]["top1"])
        print0(in_words(result))
        return run.finish(result, vit)


if __name__ == "__main__":
    entry.run_script(main, build_parser(), PRESETS, RECIPES)
