"""MoCo-v3 pre-training of ViT-Tiny (Section 3.1, recipe of Appendix A.3).

    python sec3_benchmark/pretrain_mocov3.py                                            # demo: a minute
    python sec3_benchmark/pretrain_mocov3.py --preset small --data-path DIR             # any folder of images, 64 px
    torchrun --nproc-per-node=8 sec3_benchmark/pretrain_mocov3.py --data-path IMAGENET  # the paper: 400 epochs

Both encoders, their heads and the predictor end up in outputs/pretrain_mocov3/<run>/weights.pt, under the official
names; finetune.py --init takes the base encoder from it. The loss starts near 4 T ln(batch), that of random guesses.
"""
from functools import partial

import torch

from common import distributed, entry, options
from common.errors import UserError
from common.loader import seed_everything
from common.optim import adamw, steps_per_epoch, warmup_cosine
from common.ranges import Float, Int
from common.runs import open_run
from common.training import Method, train
from common.vit import set_fused_attention
from sec3_benchmark import subsets
from sec3_benchmark.moco import MoCo, class_tokens, half_cosine, symmetric_loss, view_transform

READS = "images"
PRESETS = {
    "demo": dict(data="fractals", epochs=2, batch_size=128, base_lr=2e-3, warmup_epochs=1, mlp_dim=256, out_dim=64,
                 blur_sigma=0.5),
    # for some 20,000 images, on a CPU; the heads are half as wide as the paper's, like the encoder
    "laptop": dict(data="folder", epochs=8, batch_size=128, base_lr=1e-3, warmup_epochs=1, mlp_dim=2048, out_dim=128,
                   blur_sigma=0.45),
    # batch and number of keys are a quarter of the paper's; the blur shrinks with the image
    "small": dict(data="folder", epochs=400, batch_size=256, base_lr=5e-4, warmup_epochs=20, blur_sigma=0.6),
}


def build_parser():
    parser = options.make_parser(__doc__)
    options.add_data(parser)
    subsets.add_argument(parser)
    options.add_model(parser)
    # --batch-size and --out-dim are at least 2: one image has no negatives; one number, normalised, is only a sign
    group = parser.add_argument_group("momentum contrast")
    group.add_argument("--temperature", type=Float(1e-6), default=0.2, help="T of the contrastive loss")
    group.add_argument("--momentum", type=Float(0, 1), default=0.99,
                       help="of the key encoder, a half cosine from here to 1")
    group.add_argument("--mlp-dim", type=Int(1), default=4096, help="hidden width of projector and predictor")
    group.add_argument("--out-dim", type=Int(2), default=256, help="width of queries and keys")
    group.add_argument("--stop-grad-conv1", action="store_true", help="freeze the patch embedding, as the official "
                       "MoCo-v3 does for ViTs and the paper's code does not")
    group = parser.add_argument_group("recipe (Appendix A.3)")
    group.add_argument("--epochs", type=Int(1), default=400)
    group.add_argument("--batch-size", type=Int(2), default=1024, help="global, over all ranks and accumulation steps")
    group.add_argument("--base-lr", type=Float(0), default=1.5e-4,
                       help="per 256 images: the peak is base * batch / 256")
    group.add_argument("--warmup-epochs", type=Int(0), default=40, help="linear from --warmup-lr")
    group.add_argument("--warmup-lr", type=Float(0), default=1e-6, help="of the first step")
    group.add_argument("--weight-decay", type=Float(0), default=0.1, help="on every parameter")
    group.add_argument("--crop-min", type=Float(0.001, 1), default=0.08, help="smallest area of a crop")
    group.add_argument("--blur-sigma", type=Float(0), default=2.0, help="strongest blur, pixels")
    group.add_argument("--clip-grad", type=Float(0), default=0.0, help="largest gradient norm; 0: off")
    group.add_argument("--seed", type=Int(0), default=0)
    options.add_execution(parser)
    return parser


class MoCoViews:
    """Transform an image to two views: the first is always blurred, the second rarely blurred, sometimes solarised."""

    def __init__(self, args):
        if args.in_chans not in (1, 3):
            raise UserError(f"--in-chans {args.in_chans}: MoCo-v3's colour jitter and blur need 1 or 3")
        view = partial(view_transform, args.img_size, (args.crop_min, 1.0), sigma=args.blur_sigma)
        self.view1, self.view2 = view(blur=1.0, solarize=0.0), view(blur=0.1, solarize=0.2)

    def __call__(self, image):
        return {"view1": self.view1(image), "view2": self.view2(image)}


class MoCoMethod(Method):
    """MoCo-v3's loss. Batch norm and keys couple all images of a step, so it is not a sum over micro-batches."""

    def __init__(self, model, args, total_steps):
        super().__init__(model)
        self.temperature = args.temperature
        self.momentum = partial(half_cosine, total_steps=total_steps, start=args.momentum)

    def prepare(self, device, dtype, compiled):
        """Prepare the encoders without DistributedDataParallel, which averages in each of a step's backward passes."""
        set_fused_attention(self.model, device, dtype)
        self.encode = torch.compile(class_tokens) if compiled else class_tokens

    def accumulate(self, step, engine):
        """Compute the gradients of this rank's whole batch, as if it were one micro-batch; return the loss.

        With several micro-batches, the encoder's activations of only one are in memory at a time: a first pass computes
        all class tokens without gradient, heads and loss then give the gradient of each token, and a second pass
        encodes each micro-batch again to backpropagate it.
        """
        several, base = engine.accumulation > 1, self.model.base_encoder
        self.model.update_momentum_encoder(self.momentum(step))  # before the keys
        batches = (engine.batch(step, micro) for micro in range(engine.accumulation))
        images = [torch.cat([batch["view1"], batch["view2"]]) for batch in batches]

        # First pass: class tokens one micro-batch at a time, then heads and loss on all of them at once.
        with engine.autocast(), torch.no_grad():
            key_tokens = [self.encode(self.model.momentum_encoder, views) for views in images]
        # Autocast caches the weights that it casts; those cast without gradient must not be reused: new contexts below.
        with engine.autocast(), torch.set_grad_enabled(not several):
            tokens = [self.encode(base, views) for views in images]
        if several:
            for token in tokens:
                token.requires_grad_()
        with engine.autocast():
            queries = [self.model.queries(view) for view in by_view(tokens)]
            keys = [self.model.keys(view) for view in by_view(key_tokens)]
        loss = symmetric_loss(*queries, *keys, self.temperature)
        engine.backward(loss)

        if several:  # second pass, with gradient, one micro-batch at a time
            for views, token in zip(images, tokens):
                with engine.autocast():
                    encoded = self.encode(base, views)
                encoded.backward(token.grad)

        average_gradients(self.model)
        engine.log(loss=loss * engine.accumulation)  # log() expects one micro-batch's loss and divides
        return loss.detach()


def by_view(tokens):
    """Separate the views: micro-batches (2b, D), each with its first view's rows first -> two tensors (N, D)."""
    return torch.cat([token.unflatten(0, (2, -1)) for token in tokens], dim=1).unbind()


def average_gradients(model):
    """Average the gradients over ranks in one message, before the scaler checks for overflow: so all ranks agree."""
    if distributed.world_size() == 1:
        return
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    mean = distributed.all_sum(torch.cat([gradient.flatten() for gradient in gradients])) / distributed.world_size()
    for gradient, part in zip(gradients, mean.split([gradient.numel() for gradient in gradients])):
        gradient.copy_(part.view_as(gradient))


def build_moco(args):
    return MoCo(args.model, img_size=args.img_size, patch_size=args.patch_size, in_chans=args.in_chans,
                num_heads=args.num_heads, mlp_dim=args.mlp_dim, out_dim=args.out_dim,
                stop_grad_conv1=args.stop_grad_conv1)


def decay_everything(model, weight_decay):
    """Put all trainable parameters in one group: the paper's code exempts none from decay, not even biases."""
    names, parameters = zip(*[(name, p) for name, p in model.named_parameters() if p.requires_grad])
    return [{"params": list(parameters), "names": list(names), "lr_scale": 1.0, "weight_decay": weight_decay}]


def main(args):
    """Run or continue the pre-training; return {"checkpoint": weights file, "seconds", ...}."""
    device = distributed.start_process_group(args.device)
    args, images = subsets.pretraining_images(options.resolve(args))
    views = MoCoViews(args)
    name = f"{args.data}-{args.model}-{args.epochs}ep"
    with open_run("pretrain_mocov3", name, args, {"data": images.fingerprint()}, no_identity=("subset",)) as run:
        if run.result:
            return run.result
        seed_everything("weights", args.seed)
        model = build_moco(args).to(device)
        method = MoCoMethod(model, args, args.epochs * steps_per_epoch(images, args.batch_size))
        optimizer = adamw(decay_everything(model, args.weight_decay), betas=(0.9, 0.999))
        schedule = warmup_cosine(args, images, warmup_lr=args.warmup_lr)
        result = train(run, args, method, optimizer, schedule, images, views, device)
        return run.finish(result, model)


if __name__ == "__main__":
    entry.run_script(main, build_parser(), PRESETS)
