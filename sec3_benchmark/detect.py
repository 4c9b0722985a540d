"""Object detection and instance segmentation on COCO with a plain ViT (Tables 4 and 5, recipe of Appendix A.5).

    python sec3_benchmark/detect.py                                                          # demo: generated scenes
    torchrun --nproc-per-node=8 sec3_benchmark/detect.py --dataset-path COCO --init FILE     # the paper: 100 epochs
    python sec3_benchmark/detect.py --preset small --dataset-path COCO --init FILE           # a few hundred images
    python sec3_benchmark/detect.py --dataset-path COCO --init RUN/weights.pt --eval-only    # evaluate and draw

Mask R-CNN on ViTDet's pyramid, 184,375 iterations at batch 64 and 640 px. Published box / mask AP: from MAE-Tiny 39.9
/ 35.4, from random weights 32.7 / 28.9. COCO is a folder with annotations/, train2017/ and val2017/, or a folder with
these in coco/. --init reads any plain ViT that finetune.py reads. predictions.png is drawn in the run's folder.
"""
from pathlib import Path

from torch import nn

from common import distributed, entry, options
from common.distributed import print0
from common.errors import FormatError, UserError
from common.filling import load_encoder
from common.loader import seed_everything
from common.optim import adamw, learning_rate, steps_per_epoch
from common.pretrained import Weights, own_config, read_file, read_weights
from common.ranges import Float, Int
from common.runs import open_run
from common.shapes import fill, tokens_of
from common.training import Method, compile_and_distribute, train
from common.vit import SIZES, build_vit
from sec3_benchmark.detection.average_precision import evaluator
from sec3_benchmark.detection.coco import DetectionViews, image_targets
from sec3_benchmark.detection.draw_detections import detect_and_draw
from sec3_benchmark.detection.mask_rcnn import MaskRCNN
from sec3_benchmark.detection.recipe import detector_groups, step_rate
from sec3_benchmark.detection.scenes import load_detection_sets
from sec3_benchmark.detection.vitdet import SimplePyramid, TopDownPyramid, ViTBackbone
from sec3_benchmark.evaluate import check_classes, check_readable

# A table's --img-size is that of the ViT, here it is the canvas: only --set detect.img_size changes it from a table
NOT_OF_TABLES = ("img_size",)
PRESETS = {
    "demo": dict(img_size=[96], window=4, channels=64, hidden=256,
                 anchors=64, rois=64, proposals=100, jitter=[0.75, 1.25], iterations=240, batch_size=8, base_lr=8e-3,
                 warmup_iterations=20, micro_batch=8, eval_every=0, keep_activations=True),
    # laptop and small take weights that were pre-trained with the same preset
    "laptop": dict(img_size=[192], window=6, channels=64, hidden=256, anchors=64, rois=64, proposals=100,
                   iterations=2000, batch_size=8, base_lr=4e-3, jitter=[0.5, 1.5], warmup_iterations=100),
    "small": dict(img_size=[256], iterations=3000, batch_size=16, base_lr=4e-4, jitter=[0.5, 1.5]),
}
PYRAMIDS = {"simple": SimplePyramid, "topdown": TopDownPyramid}
BUILT_FROM = ("model", "patch_size", "num_heads", "in_chans", "img_size", "position_size", "window", "global_blocks",
              "pyramid", "channels", "hidden", "anchors", "rois", "proposals")  # saved with the weights, to rebuild it


def build_parser():
    parser = options.make_parser(__doc__)
    group = parser.add_argument_group("data")
    group.add_argument("--dataset-path", metavar="DIR", help="COCO, or a folder that holds it as coco/")
    options.add_images(group, img_size=640)
    options.add_model(parser)
    group = parser.add_argument_group("start")
    group.add_argument("--init", metavar="CHECKPOINT", help="pre-trained ViT, a file or timm:NAME; default: none")
    group.add_argument("--eval-only", action="store_true", help="evaluate --init, a detector's weights.pt, and exit")
    group = parser.add_argument_group("detector (Appendix A.5)")
    group.add_argument("--position-size", type=Int(1), nargs="+", metavar="PX", help="image size of the position "
                       "embedding, which is resized in each forward pass; default: as the weights say, else 224")
    group.add_argument("--window", type=Int(1), default=14, help="side of the attention windows, in patches")
    group.add_argument("--global-blocks", type=Int(0), nargs="+", default=[2, 5, 8, 11],
                       help="blocks without windows, counted from 0")
    group.add_argument("--pyramid", choices=tuple(PYRAMIDS), default="simple",
                       help="topdown: Li et al. 2021, with batch norm over a micro-batch (of all GPUs)")
    group.add_argument("--channels", type=Int(1), default=256, help="of the pyramid and of the heads")
    group.add_argument("--hidden", type=Int(1), default=1024, help="width of the box head's fully connected layer")
    group.add_argument("--anchors", type=Int(2), default=256, help="sampled per image for the proposal loss")
    group.add_argument("--rois", type=Int(4), default=512, help="sampled per image for the heads' losses")
    group.add_argument("--proposals", type=Int(1), default=1000, help="kept per image")
    group.add_argument("--keep-activations", action="store_true", help="compute no block twice: faster, more memory")
    group = parser.add_argument_group("recipe (Appendix A.5)")
    group.add_argument("--iterations", type=Int(1), default=184_375, help="the paper's 100 epochs of 118,000 images")
    group.add_argument("--batch-size", type=Int(1), default=64, help="global, over all ranks and accumulation steps")
    group.add_argument("--base-lr", type=Float(0), default=1e-4, help="per 64 images: the peak is base * batch / 64")
    group.add_argument("--schedule", choices=("step", "cosine"), default="step", help="step: x0.1 after 24/27, 26/27")
    group.add_argument("--warmup-iterations", type=Int(0), default=250, help="linear, from a thousandth of the rate")
    group.add_argument("--weight-decay", type=Float(0), default=0.05, help="not on norms and positions; on biases too")
    group.add_argument("--drop-path", type=Float(0, 1), default=0.0, help="at the last block, linear from 0; 0: off")
    group.add_argument("--jitter", type=Float(0.01), nargs=2, default=[0.1, 2.0], metavar=("MIN", "MAX"),
                       help="range of a training image's scale; at 1 the image just fits into --img-size")
    group.add_argument("--clip-grad", type=Float(0), default=0.0, help="largest gradient norm; 0: off")
    group.add_argument("--eval-every", type=Int(0), default=10, help="epochs; 0: only at the end")
    group.add_argument("--draw", type=Int(0), default=8, help="validation images in predictions.png; 0: none")
    group.add_argument("--seed", type=Int(0), default=0)
    options.add_execution(parser, pretraining=False)
    return parser


def parse(parser, presets, argv=None):
    """Parse a command line. With --eval-only `typed` holds the settings typed there, for comparison with the file's."""
    args = options.parse(parser, presets, argv=argv)
    return options.replaced(args, typed=options.given(parser, argv)) if args.eval_only else args


def build_detector(args, num_classes, weights=None):
    """Build the detector of the command line. Its ViT is initialised from `weights`, if there are any."""
    vit = build_vit(args.model, img_size=args.position_size, patch_size=args.patch_size, in_chans=args.in_chans,
                    num_classes=0, num_heads=args.num_heads, drop_path=args.drop_path,
                    **tokens_of(weights, args.model, args.position_size, args.patch_size))
    if weights is not None:
        print0(load_encoder(vit, weights))
    returned = args.global_blocks if args.pyramid == "topdown" else (-1,)
    if args.pyramid == "topdown" and len(set(returned)) != 4:
        raise UserError(f"--global-blocks {' '.join(map(str, returned))}: --pyramid topdown is made of four of them")
    backbone = ViTBackbone(vit, args.img_size, args.window, args.global_blocks, returned, not args.keep_activations)
    config = {**{name: getattr(args, name) for name in BUILT_FROM}, "detector_classes": num_classes}
    return MaskRCNN(backbone, PYRAMIDS[args.pyramid](vit.embed_dim, args.channels), 1 + num_classes, config,
                    channels=args.channels, hidden=args.hidden, anchors=args.anchors, rois=args.rois,
                    proposals=args.proposals)


def schedule(args, images):
    """Return the learning rate as a function of the step, and print how its peak is computed."""
    peak, per_epoch = args.base_lr * args.batch_size / 64, steps_per_epoch(images, args.batch_size)
    print0(f"{len(images)} images, {args.iterations} iterations are {args.iterations / per_epoch:.1f} epochs; "
           f"peak lr {peak:.3g} = {args.base_lr:g} x {args.batch_size} / 64")
    numbers = dict(peak=peak, total_steps=args.iterations, warmup_steps=args.warmup_iterations)
    if args.schedule == "cosine":
        return lambda step: learning_rate(step, warmup_lr=0.001 * peak, **numbers)
    return lambda step: step_rate(step, **numbers)


class Detection(Method):
    """The sum of the five losses: objectness and boxes of the proposals; classes, boxes and masks of the heads."""

    def prepare(self, device, dtype, compiled):
        if distributed.world_size() > 1 and device.type == "cuda":
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)  # only `topdown` has batch norm
        if compiled:
            self.model.backbone.compile()  # only this part: tensor shapes in the others change from step to step
        self.forward = compile_and_distribute(self.model, device, dtype, compiled=False)

    def loss(self, batch, step):
        sizes = [tuple(size) for size in batch["host_size"].tolist()]
        losses = self.forward(batch["image"], sizes, image_targets(batch))
        return sum(losses.values()), losses


def read_detector(source):
    """Read the weights.pt of a run of this script as Weights whose `config` has BUILT_FROM and "detector_classes".

    Raises FormatError for any other file.
    """
    content = read_file(Path(source))
    config, state = own_config(content) or {}, content.get("model") or {}
    if "detector_classes" not in config:
        raise FormatError(f"{source} is no detector: --eval-only takes the weights.pt of a run of detect.py")
    return Weights(state, config, str(source), "detector", [], None, content.get("statistics"), content.get("classes"))


def as_built(args, weights):
    """Return settings that rebuild the detector of the file. Raises UserError if the command line contradicts them.

    Only --proposals may differ, as no weight's shape depends on it.
    """
    own = {name: value for name, value in weights.config.items()
           if name in args and (name != "proposals" or name not in args.typed)}
    for name, theirs in own.items():
        ours = getattr(args, name)
        if name in args.typed and not options.same_value(name, ours, theirs):
            raise UserError(f"{weights.source} was built with {name} {theirs}, not {ours}: leave "
                            f"--{name.replace('_', '-')} out")
    return options.with_statistics(options.replaced(args, **own), weights)


def resolve_backbone(args, weights):
    """Return settings in which those of the ViT that were not given are filled in from the weights.

    The ViT's image size becomes --position-size; --img-size stays the canvas. Raises UserError for relative positions.
    """
    config = weights and weights.config
    if config and config["model"] not in (None, *SIZES):
        raise UserError(f"--init {args.init} has relative positions ({config['model']}): detect.py takes a plain ViT, "
                        f"pre-trained by --model vit_tiny")
    vit = options.resolve(options.replaced(args, img_size=args.position_size), weights)
    return options.replaced(vit, img_size=args.img_size, position_size=vit.img_size)


def evaluate_only(args, device):
    """Measure the AP of a trained detector, rebuilt from its file, and draw into detect/eval-<weights>-<data>/."""
    weights = read_detector(args.init)
    args = as_built(args, weights)
    num_classes = weights.config["detector_classes"]
    [val_set] = load_detection_sets(args, splits=("val",))
    if num_classes != len(val_set.classes):
        raise UserError(f"{args.init} knows {num_classes} categories and {val_set.name} has {len(val_set.classes)}")
    check_classes(weights, val_set)
    model = build_detector(args, num_classes)
    fill(model, weights.state, args.init)
    model = model.to(device)
    result = evaluator(model, val_set, args, device)()
    print_ap(result)
    place = f"eval-{weights.fingerprint[:10]}-{val_set.fingerprint()[:6]}"
    detect_and_draw(model, val_set, args, device, Path(args.output) / "detect" / place)
    return result


def print_ap(result):
    print0(f"box AP {result['box_ap']:.2f}, mask AP {result['mask_ap']:.2f} "
           f"(at IoU 0.5: {result['box_ap50']:.2f}, {result['mask_ap50']:.2f})")


def main(args):
    """Run or continue the training; return {"box_ap", "mask_ap", "best_box_ap", "checkpoint", "seconds", ...}."""
    device = distributed.start_process_group(args.device)
    if args.jitter[0] > args.jitter[1]:
        raise UserError(f"--jitter {args.jitter[0]} {args.jitter[1]}: the smallest scale, then the largest")
    if args.eval_only and not args.init:
        raise UserError("--eval-only needs --init, the detector to evaluate")
    if args.eval_only:
        return evaluate_only(args, device)
    if args.deterministic and device.type == "cuda":
        raise UserError("--deterministic: on a GPU the backward pass of ROIAlign adds in no fixed order; leave it out")
    weights = read_weights(args.init) if args.init else None
    args = resolve_backbone(args, weights)
    train_set, val_set = load_detection_sets(args)
    fingerprints = {"train": train_set.fingerprint(), "val": val_set.fingerprint(),
                    "init": weights.fingerprint if weights else None}
    name = f"{train_set.name.split('-')[0]}-{args.model}-{'init' if weights else 'scratch'}-{args.iterations}it"
    with open_run("detect", name, args, fingerprints, no_identity=("keep_activations", "draw")) as run:
        if run.result:
            print_ap(run.result)
            return run.result
        for images in [val_set] if args.on_bad_image == "skip" else [val_set, train_set]:
            check_readable(images, run, args, device)  # also compares each image's size with its annotations'
        run.classes = train_set.classes
        seed_everything("weights", args.seed)
        model = build_detector(args, len(train_set.classes), weights).to(device)
        optimizer = adamw(detector_groups(model, args.weight_decay), betas=(0.9, 0.999))
        labels = {category: 1 + i for i, category in enumerate(train_set.categories)}
        result = train(run, args, Detection(model), optimizer, schedule(args, train_set), train_set,
                       DetectionViews(args.img_size, labels, args.jitter), device,
                       evaluate=evaluator(model, val_set, args, device))
        result.update({k: v for k, v in result["last"].items() if k != "epoch"}, best_box_ap=result["best"]["box_ap"])
        print_ap(result)
        result = run.finish(result, model)
        detect_and_draw(model, val_set, args, device, run.folder)
        return result


if __name__ == "__main__":
    entry.run_script(main, build_parser(), PRESETS, parse=parse)
