"""MAE pre-training of ViT-Tiny (Section 3.1, recipe of Appendix A.2).

    python sec3_benchmark/pretrain_mae.py                                             # demo: 2 minutes
    python sec3_benchmark/pretrain_mae.py --preset small --data-path DIR              # any folder of images, 64 px
    torchrun --nproc-per-node=8 sec3_benchmark/pretrain_mae.py --data-path IMAGENET   # the paper: 400 epochs

The authors' code page gives about 40 hours for the paper's run on 8 GPUs. The weights, decoder included, end up in
outputs/pretrain_mae/<run>/weights.pt; pass them to finetune.py as --init. Killed, the same command continues.
"""
from common import distributed, entry, options
from common.loader import seed_everything
from common.mae import MAEViews, add_arguments, build_mae
from common.optim import adamw, parameter_groups, warmup_cosine
from common.runs import open_run
from common.training import Method, train
from sec3_benchmark import subsets

READS = "images"
PRESETS = {
    "demo": dict(data="fractals", epochs=10, batch_size=32, base_lr=8e-3, warmup_epochs=1),
    # for some 20,000 images, on a CPU; here and below, small batches need a higher base rate than the paper's 1.5e-4
    "laptop": dict(data="folder", epochs=30, batch_size=64, base_lr=4e-3, warmup_epochs=3),
    # for some 10,000 to 100,000 images
    "small": dict(data="folder", epochs=400, batch_size=256, base_lr=1e-3, warmup_epochs=20),
}


def build_parser():
    parser = options.make_parser(__doc__)
    options.add_data(parser)
    subsets.add_argument(parser)
    options.add_model(parser)
    add_arguments(parser)
    options.add_execution(parser)
    return parser


class MAEMethod(Method):
    def loss(self, batch, step):
        return self.forward(batch["image"], batch["noise"]), {}


def main(args):
    """Run or continue the pre-training; return {"checkpoint": weights file, "seconds", ...}."""
    device = distributed.start_process_group(args.device)
    args, images = subsets.pretraining_images(options.resolve(args))
    name = f"{args.data}-{args.model}-{args.epochs}ep"
    with open_run("pretrain_mae", name, args, {"data": images.fingerprint()}, no_identity=("subset",)) as run:
        if run.result:
            return run.result
        seed_everything("weights", args.seed)
        model = build_mae(args).to(device)
        optimizer = adamw(parameter_groups(model, args.weight_decay), betas=(0.9, args.beta2))
        result = train(run, args, MAEMethod(model), optimizer, warmup_cosine(args, images), images,
                       MAEViews(args, model.num_patches), device)
        return run.finish(result, model)


if __name__ == "__main__":
    entry.run_script(main, build_parser(), PRESETS)
