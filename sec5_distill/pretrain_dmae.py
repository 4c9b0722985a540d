"""D-MAE-Tiny: MAE pre-training while the attention is distilled from a larger MAE (Section 5; the recipe is A.2's).

    python sec5_distill/pretrain_dmae.py                                              # demo, its own teacher first
    python sec5_distill/pretrain_dmae.py --preset small --data-path DIR               # likewise on any folder, 64 px
    python sec5_distill/pretrain_dmae.py --preset small --data-path DIR --teacher outputs/pretrain_mae/RUN/weights.pt
    torchrun --nproc-per-node=8 sec5_distill/pretrain_dmae.py --data-path IMAGENET    # the paper: teacher MAE-Base

The teacher may be any MAE or ViT on the same patches, of other width, depth and heads: our weights, facebook's MAE,
mae-lite's, `timm:NAME`; `own` pre-trains --teacher-model with sec3_benchmark/pretrain_mae.py first, or finds it done.
weights.pt holds the student and the map M, not the teacher; pass it to finetune.py as --init. The authors' code page
gives about 44 hours for the paper's run on 8 GPUs, against 40 without distillation.
"""
from common import distributed, entry, options, scripts
from common.data import load_images, with_statistics
from common.errors import UserError
from common.filling import load_model
from common.loader import seed_everything
from common.mae import MAEViews, add_arguments, build_mae
from common.optim import adamw, parameter_groups, warmup_cosine
from common.pretrained import read_weights
from common.ranges import Float, Int
from common.runs import open_run
from common.training import Method, train
from common.vit import model_size
from sec5_distill.distillation import (
    DMAE,
    Teacher,
    check_pairs,
    check_same_patches,
    check_teacher_blocks,
    visible_patches,
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
DISTILLATION = ("teacher", "teacher_model", "teacher_epochs", "teacher_heads", "distill_blocks", "teacher_blocks",
                "attention_weight", "hidden_layers", "teacher_hidden_layers", "hidden_weight")


def mae_beside(preset):
    """Return the line of the MAE beside D-MAE in Figures 6 and 7; in the demo it is trained no longer than D-MAE."""
    epochs = f" --epochs {PRESETS['demo']['epochs']}" if preset == "demo" else ""
    return f"sec3_benchmark/pretrain_mae.py{epochs}"


def build_parser():
    parser = options.make_parser(__doc__)
    options.add_data(parser)
    options.add_model(parser)
    group = parser.add_argument_group("distillation (Section 5)")
    group.add_argument("--teacher", metavar="CHECKPOINT", default="timm:vit_base_patch16_224.mae",
                       help="an MAE or ViT; own: pre-train --teacher-model first, on the same data")
    group.add_argument("--teacher-model", default="vit_base", help="of --teacher own")
    group.add_argument("--teacher-epochs", type=Int(1), help="of --teacher own; default: as many as the student's")
    group.add_argument("--teacher-heads", type=Int(1), help="where the teacher's file does not say (12 is assumed)")
    group.add_argument("--distill-blocks", type=Int(1), nargs="*", default=[12], metavar="B",
                       help="the student's blocks, from 1, whose attention is distilled")
    group.add_argument("--teacher-blocks", type=Int(1), nargs="*", metavar="B",
                       help="the teacher's blocks that go with them; default: the same numbers")
    group.add_argument("--attention-weight", type=Float(0), default=1.0, help="of the sum over the chosen blocks")
    group.add_argument("--hidden-layers", type=Int(0), nargs="*", metavar="L",
                       help="hidden states to distil, 0 to depth; the paper: none")
    group.add_argument("--teacher-hidden-layers", type=Int(0), nargs="*", metavar="L", help="default: the same numbers")
    group.add_argument("--hidden-weight", type=Float(0), default=1.0, help="likewise")
    add_arguments(parser)
    options.add_execution(parser)
    return parser


class DMAEMethod(Method):
    """The teacher stands beside the model: it is in no checkpoint, and no optimizer knows it."""

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
        return self.forward(images, noise, *self.teacher(*visible_patches(self.model.model, images, noise)))


def places(args):
    """The student's and the teacher's blocks, the student's and the teacher's hidden layers."""
    blocks, layers = args.distill_blocks, args.hidden_layers or []
    return (blocks, blocks if args.teacher_blocks is None else args.teacher_blocks,
            layers, layers if args.teacher_hidden_layers is None else args.teacher_hidden_layers)


def check_distillation(args):
    """Finds what cannot be distilled now rather than after the long pre-training of an own teacher."""
    blocks, their_blocks, layers, their_layers = places(args)
    check_pairs(model_size(args.model)["depth"], blocks, their_blocks, layers, their_layers)
    if args.teacher == "own":
        check_teacher_blocks(model_size(args.teacher_model)["depth"], their_blocks, their_layers)


def pretrain_teacher(args):
    """The weights file of the teacher that `--teacher own` asks for: seed 0 whatever the student's seed, so that all
    students share it; reused by --fresh runs too.
    """
    settings = {name: value for name, value in vars(args).items() if name not in DISTILLATION}
    settings.update(model=args.teacher_model, num_heads=args.teacher_heads or 12, decoder_dim=None, decoder_depth=None,
                    decoder_heads=None, epochs=args.teacher_epochs or args.epochs, seed=0, fresh=False, save_to=None)
    return scripts.run("sec3_benchmark/pretrain_mae.py", options.words(settings))["checkpoint"]


def teacher_identity(args, weights):
    """The teacher's tensors and, where it is not 12, its number of heads, which the tensors do not show."""
    known = (weights.config or {}).get("num_heads")
    heads = args.teacher_heads or known or 12
    if known and heads != known:
        raise UserError(f"{args.teacher} has {known} heads, not --teacher-heads {heads}: leave that out")
    return weights.fingerprint if heads == 12 else f"{weights.fingerprint}, {heads} heads"


def without_defaults(args, weights):
    """Return settings in which what says the default in other words is the default, so that the run is the same."""
    heads_known = (weights.config or {}).get("num_heads") or args.teacher_heads == 12
    layers = args.hidden_layers or None
    return options.replaced(
        args, teacher_model=None, teacher_epochs=None,  # once trained, only the teacher's content counts
        teacher_heads=None if heads_known else args.teacher_heads, hidden_layers=layers,
        teacher_blocks=None if args.teacher_blocks == args.distill_blocks else args.teacher_blocks,
        teacher_hidden_layers=None if args.teacher_hidden_layers == layers else args.teacher_hidden_layers)


def build(args, weights):
    """The student with its maps, and the teacher. The student is drawn first and M from a generator of its own, so that
    the student starts as an MAE of the same seed does.
    """
    seed_everything("weights", args.seed)
    student = build_mae(args)
    encoder = load_model(weights, num_heads=args.teacher_heads)
    check_same_patches(student, encoder)
    blocks, their_blocks, layers, their_layers = places(args)
    teacher = Teacher(encoder, their_blocks, their_layers)
    seed_everything("adapters", args.seed)
    return DMAE(student, teacher, blocks, layers, args.attention_weight, args.hidden_weight), teacher


def main(args):
    """Runs or continues the pre-training; returns {"checkpoint": weights file, "teacher", "seconds", ...}."""
    device = distributed.start_process_group(args.device)
    args = options.settle(args)
    check_distillation(args)
    if args.teacher == "own":
        args = options.replaced(args, teacher=pretrain_teacher(args))
    images = load_images(args)
    weights = read_weights(args.teacher)
    args = with_statistics(args, weights)  # the teacher sees the student's images
    identity = teacher_identity(args, weights)
    args = without_defaults(args, weights)
    name = f"{args.data}-{args.model}-{args.epochs}ep"
    with open_run("pretrain_dmae", name, args, {"data": images.fingerprint(), "teacher": identity},
                  no_identity=("teacher",)) as run:
        if run.result:
            return {**run.result, "teacher": args.teacher}
        model, teacher = build(args, weights)
        # M decays like any other matrix
        optimizer = adamw(parameter_groups(model.to(device), args.weight_decay), betas=(0.9, args.beta2))
        result = train(run, args, DMAEMethod(model, teacher), optimizer, warmup_cosine(args, images), images,
                       MAEViews(args, model.model.num_patches), device)
        return run.finish({**result, "teacher": args.teacher}, model)


if __name__ == "__main__":
    entry.run_script(main, build_parser(), PRESETS)
