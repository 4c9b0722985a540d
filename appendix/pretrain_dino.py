"""DINO pre-training of ViT-Tiny (Appendix B.5).

    python appendix/pretrain_dino.py                                             # demo: generated images, 2 minutes
    python appendix/pretrain_dino.py --preset small --data-path DIR              # any folder of images, 64 px
    torchrun --nproc-per-node=8 appendix/pretrain_dino.py --data-path IMAGENET   # 400 epochs
    python sec3_benchmark/finetune.py --data-path IMAGENET --init FILE           # published: 77.2

No source gives the recipe of the paper's DINO-Tiny. The defaults are the official ones, except where the help says
"ours"; ViT-Small is `--model vit_small`. Per epoch, the student processes ten crops of each image and the teacher two.
weights.pt holds both networks; --init of other scripts loads the teacher.
"""
import torch

from appendix.dino import DINO, MultiCrop, clip_each, dino_loss, teacher_temperature, update_center
from common import distributed, entry, options
from common.data import load_images
from common.errors import UserError
from common.loader import seed_everything
from common.optim import adamw, parameter_groups, steps_per_epoch, warmup_cosine
from common.ranges import Float, Int
from common.runs import open_run
from common.training import Method, train
from sec3_benchmark.moco import half_cosine

READS = "images"
PRESETS = {
    "demo": dict(data="fractals", local_size=18, epochs=2, batch_size=128, base_lr=1e-3, warmup_epochs=1,
                 local_crops=4, out_dim=1024, hidden_dim=256, bottleneck_dim=64, blur_sigma=0.5),
    "laptop": dict(data="folder", local_size=24, epochs=6, batch_size=128, base_lr=1e-3, warmup_epochs=1,
                   local_crops=4, out_dim=2048, hidden_dim=1024, bottleneck_dim=128, blur_sigma=0.45),
    # a quarter of the batch and fewer outputs; the blur is reduced in proportion to the image
    "small": dict(data="folder", local_size=32, batch_size=256, out_dim=4096, blur_sigma=0.6),
}


def build_parser():
    parser = options.make_parser(__doc__)
    options.add_data(parser)
    options.add_model(parser)
    group = parser.add_argument_group("crops")
    group.add_argument("--local-size", type=Int(1), default=96, help="side of the small crops, pixels")
    group.add_argument("--local-crops", type=Int(0), default=8,
                       help="small crops of an image; 0: only the two large ones")
    group.add_argument("--global-min", type=Float(0.001, 1), default=0.4,
                       help="smallest area of a large crop, largest of a small one")
    group.add_argument("--local-min", type=Float(0.001, 1), default=0.05, help="smallest area of a small crop")
    group.add_argument("--blur-sigma", type=Float(0), default=2.0, help="strongest blur, pixels")
    # At least 2: the softmax of one output is always 1, and the L2 norm of one bottleneck unit keeps only its sign
    group = parser.add_argument_group("self-distillation")
    group.add_argument("--out-dim", type=Int(2), default=65536, help="K, outputs of the head")
    group.add_argument("--hidden-dim", type=Int(1), default=2048, help="width of the head")
    group.add_argument("--bottleneck-dim", type=Int(2), default=256, help="width before the last layer")
    group.add_argument("--teacher-temp", type=Float(1e-6), default=0.04)
    group.add_argument("--teacher-temp-start", type=Float(1e-6), default=0.04, help="of the first epoch, if warmed up")
    group.add_argument("--teacher-temp-epochs", type=Int(0), default=0,
                       help="warm-up; the longer official run: 30, from 0.04 to 0.07")
    group.add_argument("--momentum", type=Float(0, 1), default=0.996,
                       help="of the teacher at the start; a half cosine leads to 1")
    group.add_argument("--freeze-last-layer", type=Int(0), default=1,
                       help="first epochs in which the last layer is not trained")
    group = parser.add_argument_group("recipe (official DINO)")
    group.add_argument("--epochs", type=Int(1), default=400, help="ours, as MAE's and MoCo-v3's")
    group.add_argument("--batch-size", type=Int(1), default=1024, help="global; ours, as MoCo-v3's")
    group.add_argument("--base-lr", type=Float(0), default=5e-4, help="per 256 images: the peak is base * batch / 256")
    group.add_argument("--min-lr", type=Float(0), default=1e-6, help="where the cosine ends")
    group.add_argument("--warmup-epochs", type=Int(0), default=10, help="linear from 0")
    group.add_argument("--weight-decay", type=Float(0), default=0.04, help="at the start; not on vectors and biases")
    group.add_argument("--weight-decay-end", type=Float(0), default=0.4, help="at the end, by a half cosine")
    group.add_argument("--drop-path", type=Float(0, 1), default=0.1, help="of the student, at the last block; 0: off")
    group.add_argument("--clip-each", type=Float(0), default=3.0, help="largest gradient norm of one tensor; 0: off")
    group.add_argument("--clip-grad", type=Float(0), default=0.0, help="largest gradient norm of all together; 0: off")
    group.add_argument("--seed", type=Int(0), default=0)
    options.add_execution(parser)
    return parser


class DINOMethod(Method):
    """DINO in the training loop: schedules, loss, clipping of each gradient, updates of the teacher and the centre."""

    def __init__(self, model, args, optimizer, per_epoch):
        super().__init__(model)
        self.args, self.optimizer, self.per_epoch = args, optimizer, per_epoch
        self.total_steps = args.epochs * per_epoch
        self.center, self.teacher_sum, self.rows = torch.zeros(1, args.out_dim), 0.0, 0

    def prepare(self, device, dtype, compiled):
        super().prepare(device, dtype, compiled)
        self.center = self.center.to(device)

    def before_step(self, step):
        """Set the weight decay of this step, which is always 0 for vectors and biases."""
        decay = half_cosine(step, self.total_steps, self.args.weight_decay, self.args.weight_decay_end)
        for group in self.optimizer.param_groups:
            group["weight_decay"] = decay if group["regularised"] else 0.0

    def loss(self, batch, step):
        student, teacher = self.forward(batch["large"], batch.get("small"))
        self.teacher_sum, self.rows = self.teacher_sum + teacher.float().sum(dim=0), self.rows + len(teacher)
        temperature = teacher_temperature(step // self.per_epoch, self.args.teacher_temp_start, self.args.teacher_temp,
                                          self.args.teacher_temp_epochs)
        return dino_loss(student, teacher, self.center, temperature), {}

    def before_update(self, step):
        if self.args.clip_each:
            clip_each(self.model.student.parameters(), self.args.clip_each)
        if step < self.args.freeze_last_layer * self.per_epoch:  # without a gradient AdamW skips the weight decay too
            self.model.student["head"].last_layer.weight_v.grad = None

    def after_step(self, step):
        """Update the teacher and, from the outputs of all micro-batches and ranks, the centre."""
        self.model.update_teacher(half_cosine(step, self.total_steps, self.args.momentum, 1.0))
        rows = self.rows * distributed.world_size()
        self.center = update_center(self.center, distributed.all_sum(self.teacher_sum), rows)
        self.teacher_sum, self.rows = 0.0, 0

    def state_dict(self):
        return {"center": self.center}

    def load_state_dict(self, state):
        self.center = state["center"]


def crops_of(args):
    """Return the MultiCrop transform of the command line. Raises UserError for values that contradict each other."""
    if args.in_chans not in (1, 3):
        raise UserError(f"--in-chans {args.in_chans}: DINO's colour jitter and blur need 1 or 3")
    if args.local_min >= args.global_min:
        raise UserError(f"--local-min {args.local_min}: must be smaller than --global-min {args.global_min}")
    if args.local_size % args.patch_size:
        raise UserError(f"--local-size {args.local_size}: must be a multiple of --patch-size {args.patch_size}")
    return MultiCrop(args.img_size, args.local_size, args.local_crops, args.global_min,
                     (args.local_min, args.global_min), args.blur_sigma)


def regularised_groups(model):
    """Return parameter groups with a flag "regularised", by which DINOMethod.before_step sets their weight decay."""
    return [{**group, "regularised": group["weight_decay"] > 0} for group in parameter_groups(model, weight_decay=1.0)]


def main(args):
    """Run or continue the pre-training; return {"checkpoint": weights file, "seconds", ...}."""
    device = distributed.start_process_group(args.device)
    args = options.resolve(args)
    images = load_images(args)
    crops = crops_of(args)
    name = f"{args.data}-{args.model}-{args.epochs}ep"
    with open_run("pretrain_dino", name, args, {"data": images.fingerprint()}) as run:
        if run.result:
            return run.result
        seed_everything("weights", args.seed)
        model = DINO(args.model, img_size=args.img_size, local_size=args.local_size, patch_size=args.patch_size,
                     in_chans=args.in_chans, num_heads=args.num_heads, out_dim=args.out_dim,
                     hidden_dim=args.hidden_dim, bottleneck_dim=args.bottleneck_dim, drop_path=args.drop_path)
        model = model.to(device)
        optimizer = adamw(regularised_groups(model), betas=(0.9, 0.999))
        method = DINOMethod(model, args, optimizer, steps_per_epoch(images, args.batch_size))
        result = train(run, args, method, optimizer, warmup_cosine(args, images, args.min_lr), images, crops, device)
        return run.finish(result, model)


if __name__ == "__main__":
    entry.run_script(main, build_parser(), PRESETS)
