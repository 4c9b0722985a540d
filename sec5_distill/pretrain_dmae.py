"""D-MAE-Tiny: MAE pre-training with attention distilled from a larger MAE (Section 5; recipe: Appendix A.2).

    python sec5_distill/pretrain_dmae.py                                              # demo: trains its teacher first
    python sec5_distill/pretrain_dmae.py --preset small --data-path DIR               # likewise on any folder, 64 px
    python sec5_distill/pretrain_dmae.py --preset small --data-path DIR --teacher outputs/pretrain_mae/RUN/weights.pt
    torchrun --nproc-per-node=8 sec5_distill/pretrain_dmae.py --data-path IMAGENET    # the paper: teacher MAE-Base
    torchrun ... sec5_distill/pretrain_dmae.py --data-path IMAGENET --decoupled       # D2-MAE, the authors' follow-up

The teacher may be any MAE or plain ViT (teachers.py): our weights, facebook's MAE, mae-lite's, a timm folder,
`timm:NAME`; `own` first pre-trains --teacher-model with sec3_benchmark/pretrain_mae.py, unless that run is finished.
weights.pt holds the student and the map M, not the teacher; pass it to finetune.py as --init. For the paper's run on
8 GPUs the authors' code page gives about 44 hours, against 40 without distillation.
"""
from common import distributed, entry, options, scripts
from common.data import channel_statistics, load_images
from common.errors import UserError
from common.loader import seed_everything
from common.mae import MAEViews, add_arguments, build_mae
from common.optim import adamw, parameter_groups, warmup_cosine
from common.pretrained import read_weights
from common.ranges import Float, Int
from common.runs import open_run
from common.training import Method, train
from common.vit import model_size, patch_grid
from sec5_distill.decoupled import DecoupledMAE
from sec5_distill.distillation import DMAE, check_pairs, check_range, visible_ids
from sec5_distill.teachers import (
    Teacher,
    at_relative_depth,
    check_channels,
    check_teacher_blocks,
    conversion,
    load_teacher,
)

READS = "images"
PRESETS = {
    "demo": dict(data="fractals", epochs=6, batch_size=32, base_lr=8e-3, warmup_epochs=1, teacher="own",
                 teacher_model="vit_tiny"),
    "laptop": dict(data="folder", epochs=30, batch_size=64, base_lr=4e-3, warmup_epochs=3, teacher="own",
                   teacher_model="vit_tiny"),
    "small": dict(data="folder", epochs=400, batch_size=256, base_lr=1e-3, warmup_epochs=20, teacher="own",
                  teacher_model="vit_small"),
}
DISTILLATION = ("decoupled", "teacher", "teacher_model", "teacher_epochs", "teacher_heads", "distill_blocks",
                "teacher_blocks", "attention_weight", "hidden_layers", "teacher_hidden_layers", "hidden_weight")


def mae_beside(preset):
    """Return the line that pre-trains the MAE beside D-MAE in Figures 6 and 7, with as many epochs in the demo too."""
    epochs = f" --epochs {PRESETS['demo']['epochs']}" if preset == "demo" else ""
    return f"sec3_benchmark/pretrain_mae.py{epochs}"


def build_parser():
    parser = options.make_parser(__doc__)
    options.add_data(parser)
    options.add_model(parser)
    group = parser.add_argument_group("distillation (Section 5)")
    group.add_argument("--teacher", metavar="CHECKPOINT", default="timm:vit_base_patch16_224.mae",
                       help="an MAE or plain ViT; own: pre-train --teacher-model first, on the same data")
    group.add_argument("--teacher-model", default="vit_base", help="of --teacher own")
    group.add_argument("--teacher-epochs", type=Int(1), help="of --teacher own; default: as many as the student's")
    group.add_argument("--teacher-heads", type=Int(1), help="where the teacher's file does not say (12 is assumed)")
    group.add_argument("--decoupled", type=Int(1), nargs="?", const=8, metavar="B",
                       help="D2-MAE: the decoder reads block B (default 8), half a block behind the last is distilled")
    group.add_argument("--distill-blocks", type=Int(1), nargs="*", default=[12], metavar="B",
                       help="the student's blocks, from 1, whose attention is distilled")
    group.add_argument("--teacher-blocks", type=Int(1), nargs="*", metavar="B",
                       help="the teacher's blocks to match; default: at the same relative depth, 12 of 24 for 6 of 12")
    group.add_argument("--attention-weight", type=Float(0), default=1.0, help="of the sum over the chosen blocks")
    group.add_argument("--hidden-layers", type=Int(0), nargs="*", metavar="L",
                       help="hidden states to distil, 0 to depth; the paper: none")
    group.add_argument("--teacher-hidden-layers", type=Int(0), nargs="*", metavar="L", help="default: likewise")
    group.add_argument("--hidden-weight", type=Float(0), default=1.0, help="of the sum over the hidden states")
    add_arguments(parser)
    options.add_execution(parser)
    return parser


class DMAEMethod(Method):
    """D-MAE for the training loop. The teacher is not part of the model: neither saved nor optimised."""

    def __init__(self, model, teacher):
        super().__init__(model)
        self.teacher = teacher

    def prepare(self, device, dtype, compiled):
        super().prepare(device, dtype, compiled)
        self.teacher.prepare(device, dtype)
        if compiled:
            self.teacher.compile()

    def loss(self, batch, step):
        images, noise = batch["image"], batch["noise"]
        return self.forward(images, noise, *self.teacher(images, visible_ids(self.model.model, noise)))


def with_pairs(args, teacher_depth):
    """Return the settings with all blocks and layers to match filled in, for a teacher of this depth.

    Where the teacher's are not given, they are at the same relative depth as the student's. Raises UserError if that is
    impossible, and for blocks or layers that do not exist or do not form pairs.
    """
    depth = model_size(args.model)["depth"]
    if args.decoupled is not None:
        check_range("--decoupled", [args.decoupled], 1, depth, "student")
        depth += 1  # the half block counts as the student's last, so that it matches the teacher's last
        if args.distill_blocks not in ([12], [depth]) or args.hidden_layers:
            raise UserError(f"--decoupled distils the attention of block {depth}, half a block behind the last, alone: "
                            f"leave --distill-blocks and --hidden-layers out")
        args = options.replaced(args, distill_blocks=[depth])
    blocks, layers = args.distill_blocks, args.hidden_layers or []
    their_blocks, their_layers = args.teacher_blocks, args.teacher_hidden_layers
    if their_blocks is None:
        their_blocks = at_relative_depth(blocks, depth, teacher_depth, "--teacher-blocks")
    if their_layers is None:
        their_layers = at_relative_depth(layers, depth, teacher_depth, "--teacher-hidden-layers")
    check_pairs(depth, blocks, their_blocks, layers, their_layers)
    check_teacher_blocks(teacher_depth, their_blocks, their_layers)
    return options.replaced(args, hidden_layers=layers, teacher_blocks=their_blocks, teacher_hidden_layers=their_layers)


def pretrain_teacher(args):
    """Pre-train the teacher of `--teacher own`, or find it finished. Return its weights file.

    Its seed is 0 whatever the student's, so that all students share it. --fresh does not train it again.
    """
    settings = {name: value for name, value in vars(args).items() if name not in DISTILLATION}
    settings.update(model=args.teacher_model, num_heads=args.teacher_heads or 12, decoder_dim=None, decoder_depth=None,
                    decoder_heads=None, epochs=args.teacher_epochs or args.epochs, seed=0, fresh=False, save_to=None)
    return scripts.run("sec3_benchmark/pretrain_mae.py", options.to_argv(settings))["checkpoint"]


def teacher_identity(args, weights):
    """Return what stands for the teacher in a run's identity: the fingerprint of its tensors and what they do not show.

    That is its number of heads, unless 12, and the mean and std of its images, unless they are the student's. Raises
    UserError if --teacher-heads contradicts its file.
    """
    known = (weights.config or {}).get("num_heads")
    heads = args.teacher_heads or known or 12
    if known and heads != known:
        raise UserError(f"{args.teacher} has {known} heads, not --teacher-heads {heads}: leave that out")
    parts, theirs = [weights.fingerprint], weights.statistics
    if heads != 12:
        parts.append(f"{heads} heads")
    if conversion(student_statistics(args), theirs):
        parts.append(f"mean {theirs['mean']}, std {theirs['std']}")
    return ", ".join(parts)


def student_statistics(args):
    """Return {"mean", "std"} of the student's images."""
    return channel_statistics(args.in_chans, args.mean, args.std)


def without_defaults(args, weights):
    """Return the settings with None for each that only repeats a default, so that the run's identity is the same."""
    heads_known = (weights.config or {}).get("num_heads") or args.teacher_heads == 12
    layers = args.hidden_layers or None
    return options.replaced(
        args, teacher_model=None, teacher_epochs=None,  # the teacher's fingerprint is in the identity instead
        teacher_heads=None if heads_known else args.teacher_heads, hidden_layers=layers,
        teacher_blocks=None if args.teacher_blocks == args.distill_blocks else args.teacher_blocks,
        teacher_hidden_layers=None if (args.teacher_hidden_layers or None) == layers else args.teacher_hidden_layers)


def build(args, encoder):
    """Build the student with its maps M, and the teacher: (DMAE, Teacher). args: result of `with_pairs`."""
    seed_everything("weights", args.seed)  # as in pretrain_mae.py, for the same initial weights
    student = build_mae(args) if args.decoupled is None else build_mae(args, DecoupledMAE, decoder_block=args.decoupled)
    check_channels(student, encoder)
    teacher = Teacher(encoder, args.teacher_blocks, args.teacher_hidden_layers, student.grid, student_statistics(args))
    seed_everything("adapters", args.seed)
    return DMAE(student, teacher, args.distill_blocks, args.hidden_layers, args.attention_weight,
                args.hidden_weight), teacher


def main(args):
    """Run or continue the pre-training. Return {"checkpoint": weights file, "teacher", "seconds", ...}."""
    device = distributed.start_process_group(args.device)
    args = options.resolve(args)
    if args.teacher == "own":  # wrong pairs are an error before the teacher's long pre-training
        with_pairs(args, model_size(args.teacher_model)["depth"])
        args = options.replaced(args, teacher=pretrain_teacher(args))
    images = load_images(args)
    weights = read_weights(args.teacher)
    args = options.with_statistics(args, weights, keep_given=True)  # where they differ, Teacher converts the images
    identity = teacher_identity(args, weights)
    encoder = load_teacher(weights, args.teacher_heads, patch_grid(args.img_size, args.patch_size))
    matched = with_pairs(args, len(encoder.blocks))
    args = without_defaults(matched, weights)
    name = f"{args.data}-{args.model}-{args.epochs}ep"
    with open_run("pretrain_dmae", name, args, {"data": images.fingerprint(), "teacher": identity},
                  no_identity=("teacher",)) as run:
        if run.result:
            return {**run.result, "teacher": args.teacher}
        model, teacher = build(matched, encoder)
        # M has weight decay, as any other matrix
        optimizer = adamw(parameter_groups(model.to(device), args.weight_decay), betas=(0.9, args.beta2))
        result = train(run, args, DMAEMethod(model, teacher), optimizer, warmup_cosine(args, images), images,
                       MAEViews(args, model.model.num_patches), device)
        return run.finish({**result, "teacher": args.teacher}, model)


if __name__ == "__main__":
    entry.run_script(main, build_parser(), PRESETS)
