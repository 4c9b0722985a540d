"""SimMIM pre-training of ViT-Tiny (Appendix B.5).

    python appendix/pretrain_simmim.py                                             # demo: generated images, a minute
    python appendix/pretrain_simmim.py --preset small --data-path DIR              # any folder of images, 64 px
    torchrun --nproc-per-node=8 appendix/pretrain_simmim.py --data-path IMAGENET   # 400 epochs
    python sec3_benchmark/finetune.py --data-path IMAGENET --init FILE    # published: 77.9

No source gives the recipe of the paper's SimMIM-Tiny. The defaults are the official ones for ViT-B, except where the
help says "ours". `--model vit_tiny` is the plain ViT, without SimMIM's relative positions; ViT-Small is
`--model vit_small_simmim`. The checkpoint holds the name of the model, so finetune.py needs no --model.
"""
from appendix.simmim import SimMIM, random_mask, unit_grid
from common import distributed, entry, options
from common.augment import pretrain_transform
from common.data import load_images
from common.distributed import print0
from common.errors import UserError
from common.loader import seed_everything
from common.optim import adamw, describe_epoch, parameter_groups, steps_per_epoch
from common.ranges import Float, Int
from common.runs import open_run
from common.training import Method, train
from common.vit import MODELS

READS = "images"
PRESETS = {
    "demo": dict(data="fractals", model="vit_demo_simmim", epochs=5, batch_size=32, base_lr=8e-3, warmup_epochs=1),
    "laptop": dict(data="folder", model="vit_demo_simmim", epochs=30, batch_size=64, base_lr=4e-3, warmup_epochs=3),
    "small": dict(data="folder", batch_size=256, base_lr=5e-4, warmup_epochs=20),
}


def build_parser():
    parser = options.make_parser(__doc__)
    options.add_data(parser)
    options.add_model(parser, tuple(name for name in MODELS if not name.endswith("_rpe")))
    parser.set_defaults(model="vit_tiny_simmim")
    group = parser.add_argument_group("masking")
    group.add_argument("--mask-ratio", type=Float(0, 1), default=0.6, help="share of mask units masked, rounded up")
    group.add_argument("--mask-unit", type=Int(1), default=2,
                       help="side in patches; the official 32 px at patch size 16")
    group = parser.add_argument_group("recipe (official SimMIM for ViT-B)")
    group.add_argument("--epochs", type=Int(1), default=400, help="ours, as MAE's; official 800")
    group.add_argument("--batch-size", type=Int(1), default=2048, help="global, over all ranks and accumulation steps")
    group.add_argument("--base-lr", type=Float(0), default=5e-5, help="per 256 images; the official 1e-4 is per 512")
    group.add_argument("--warmup-epochs", type=Int(0), default=10, help="linear from --warmup-lr")
    group.add_argument("--warmup-lr", type=Float(0), default=5e-7, help="of the first step, at any batch size (ours)")
    group.add_argument("--drop-at", type=Float(0, 1), default=0.875,
                       help="share of the epochs after which the rate drops to a tenth; official: 700 of 800")
    group.add_argument("--weight-decay", type=Float(0), default=0.05, help="not on vectors, positions, class token")
    group.add_argument("--drop-path", type=Float(0, 1), default=0.1, help="at the last block, linear from 0; 0: off")
    group.add_argument("--crop-min", type=Float(0.001, 1), default=0.67, help="smallest area of a crop")
    group.add_argument("--clip-grad", type=Float(0), default=5.0, help="largest gradient norm; 0: off")
    group.add_argument("--seed", type=Int(0), default=0)
    options.add_execution(parser)
    return parser


class SimMIMViews:
    """The transform of SimMIM: an image -> {"image": its random crop, "mask": (h, w) bool, True for masked patches}."""

    def __init__(self, args, grid):
        self.crop = pretrain_transform(args.img_size, scale=(args.crop_min, 1.0), interpolation="bilinear")
        self.grid, self.unit, self.ratio = grid, args.mask_unit, args.mask_ratio

    def __call__(self, image):
        return {"image": self.crop(image), "mask": random_mask(self.grid, self.unit, self.ratio)}


class SimMIMMethod(Method):
    def loss(self, batch, step):
        return self.forward(batch["image"], batch["mask"]), {}


def step_decay(step, *, peak, warmup_lr, warmup_steps, drop_step):
    """Return the learning rate of a 0-based step: linear warm-up from `warmup_lr`, then `peak`, then a tenth of it."""
    if step < warmup_steps:
        return warmup_lr + (peak - warmup_lr) * step / warmup_steps
    return peak if step < drop_step else 0.1 * peak


def schedule_of(args, images):
    """Return the learning rate as a function of the step, and print how its peak is computed."""
    peak, per_epoch = args.base_lr * args.batch_size / 256, steps_per_epoch(images, args.batch_size)
    drop_step = round(args.drop_at * args.epochs * per_epoch)
    print0(f"{describe_epoch(images, args.batch_size)}; peak lr {peak:.3g} = {args.base_lr:g} x "
           f"{args.batch_size} / 256, a tenth of it from step {drop_step}")
    return lambda step: step_decay(step, peak=peak, warmup_lr=args.warmup_lr, drop_step=drop_step,
                                   warmup_steps=args.warmup_epochs * per_epoch)


def check_masking(args, grid):
    """Print how many mask units are masked. Raises UserError if none are, or all."""
    rows, columns = unit_grid(grid, args.mask_unit)
    hidden = int(random_mask((rows, columns), 1, args.mask_ratio).sum())
    if not 0 < hidden < rows * columns:
        raise UserError(f"--mask-ratio {args.mask_ratio} hides {hidden} of {rows * columns} mask units")
    print0(f"mask units of {args.mask_unit * args.patch_size} px: {hidden} of {rows * columns} hidden")


def main(args):
    """Run or continue the pre-training; return {"checkpoint": weights file, "seconds", ...}."""
    device = distributed.start_process_group(args.device)
    args = options.resolve(args)
    images = load_images(args)
    name = f"{args.data}-{args.model}-{args.epochs}ep"
    with open_run("pretrain_simmim", name, args, {"data": images.fingerprint()}) as run:
        if run.result:
            return run.result
        seed_everything("weights", args.seed)
        model = SimMIM(args.model, img_size=args.img_size, patch_size=args.patch_size, in_chans=args.in_chans,
                       num_heads=args.num_heads, drop_path=args.drop_path).to(device)
        check_masking(args, model.grid)
        groups = parameter_groups(model, args.weight_decay, exempt=("encoder.pos_embed", "encoder.cls_token"))
        result = train(run, args, SimMIMMethod(model), adamw(groups, betas=(0.9, 0.999)), schedule_of(args, images),
                       images, SimMIMViews(args, model.grid), device)
        return run.finish(result, model)


if __name__ == "__main__":
    entry.run_script(main, build_parser(), PRESETS)
