"""Learning-rate schedule and parameter groups: functions of a step, a name (Appendix A.1, A.2)."""
import math

import torch

from common.distributed import print0
from common.errors import UserError


def learning_rate(step, *, peak, total_steps, warmup_steps, warmup_lr=0.0, min_lr=0.0):
    """The rate of 0-based step `step`: linear from `warmup_lr` to `peak`, then half a cosine down to `min_lr`.

    Set per step, as in the authors' engine, so the very first step of a warm-up from 0 has rate 0.
    """
    if step < warmup_steps:
        return warmup_lr + (peak - warmup_lr) * step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return min_lr + 0.5 * (peak - min_lr) * (1 + math.cos(math.pi * min(1.0, progress)))


def steps_per_epoch(images, batch_size):
    """Whole batches in an epoch; none is an error."""
    if len(images) < batch_size:
        small = ", or pass --preset small, which is made for such a set" if batch_size > 512 else ""
        raise UserError(f"{images.name} has {len(images)} images, fewer than one batch of {batch_size}: lower "
                        f"--batch-size, say to {len(images) // 8 * 2 or 1}{small}")
    return len(images) // batch_size


def epoch_in_words(images, batch_size):
    left = len(images) % batch_size
    hint = f" ({left} images sit out each epoch: lower --batch-size)" if left > 0.1 * len(images) else ""
    return f"{len(images)} images, {steps_per_epoch(images, batch_size)} steps per epoch{hint}"


def warmup_cosine(args, images, min_lr=0.0, warmup_lr=0.0, per=256, peak=None):
    """The schedule of a recipe as a function of the step: peak = base lr * batch / `per`, where it is not given. Prints
    the arithmetic.
    """
    per_epoch = steps_per_epoch(images, args.batch_size)
    why = f"{args.base_lr:g} x {args.batch_size} / {per}" if peak is None else "lr, whatever the batch"
    peak = args.base_lr * args.batch_size / per if peak is None else peak
    print0(f"{epoch_in_words(images, args.batch_size)}; peak lr {peak:.3g} = {why}")
    return lambda step: learning_rate(step, peak=peak, total_steps=args.epochs * per_epoch,
                                      warmup_steps=args.warmup_epochs * per_epoch, warmup_lr=warmup_lr, min_lr=min_lr)


def parameter_groups(model, weight_decay, *, exempt=(), scale_of=lambda name: 1.0):
    """Groups of the trainable parameters for an optimizer, each with the `lr_scale` of its names.

    Weight decay acts on matrices: not on vectors and biases, nor on the names in `exempt`. The scale multiplies the
    whole rate, minimum included.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = scale_of(name)
        decay = weight_decay if parameter.ndim > 1 and not name.endswith(".bias") and name not in exempt else 0.0
        group = groups.setdefault((scale, decay), {"params": [], "names": [], "lr_scale": scale, "weight_decay": decay})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def adamw(groups, betas):
    """AdamW in its fused form: one kernel, and the only one that can skip an update without asking the device."""
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=1e-8, fused=True)


def set_learning_rate(optimizer, lr):
    """Gives every group its share `lr * lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
