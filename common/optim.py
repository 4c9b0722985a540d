"""Steps and micro-batches, the learning-rate schedule, parameter groups and the optimizer step (Appendix A)."""
import math

import torch

from common.distributed import print0
from common.errors import UserError


def learning_rate(step, *, peak, total_steps, warmup_steps, warmup_lr=0.0, min_lr=0.0) -> float:
    """Compute the learning rate of a 0-based step: linear from `warmup_lr` to `peak`, then half a cosine to `min_lr`.

    It changes at every step, as in the authors' code. So the first step of a warm-up from 0 has the rate 0.
    """
    if step < warmup_steps:
        return warmup_lr + (peak - warmup_lr) * step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return min_lr + 0.5 * (peak - min_lr) * (1 + math.cos(math.pi * min(1.0, progress)))


def steps_per_epoch(images, batch_size) -> int:
    """Return the number of full batches in an epoch. Raises UserError if there is none."""
    if len(images) < batch_size:
        small = "pass --preset small, which is made for such a set, or " if batch_size > 512 else ""
        batch = len(images) // 8 * 2 or 1
        raise UserError(f"{images.name} has {len(images)} images, fewer than one batch of {batch_size}: {small}lower "
                        f"--batch-size, say to {batch}, and raise a --base-lr, which is multiplied by the batch size: "
                        f"left as it is, it gives a peak rate of {batch / batch_size:.2g} times what it was")
    return len(images) // batch_size


def describe_epoch(images, batch_size) -> str:
    """Describe an epoch in words: its images and steps, and how many images it leaves out if they are many."""
    left_out = len(images) % batch_size
    text = f"{len(images)} images, {steps_per_epoch(images, batch_size)} steps per epoch"
    if left_out > 0.1 * len(images):
        text += f" ({left_out} images sit out each epoch: lower --batch-size, raise --base-lr)"
    return text


def split_batch(batch_size: int, micro_batch: int, world: int) -> tuple[int, int]:
    """Split the global batch among ranks and accumulation steps. Return (accumulation steps, images of a micro-batch).

    The accumulation steps are the fewest that divide a rank's share into equal parts of at most `micro_batch` images.
    Raises UserError if the ranks cannot share the batch equally.
    """
    if batch_size % world:
        raise UserError(f"--batch-size {batch_size} cannot be shared equally by {world} ranks")
    per_rank = batch_size // world
    accumulation = next(n for n in range(1, per_rank + 1) if per_rank % n == 0 and per_rank // n <= micro_batch)
    images = per_rank // accumulation
    print0(f"global batch {batch_size} = {world} ranks x {accumulation} accumulation x {images}")
    return accumulation, images


def warmup_cosine(args, images, min_lr=0.0, warmup_lr=0.0, per=256, peak=None):
    """Make a recipe's schedule, a function step -> learning rate, and print how its peak is computed.

    The peak is base lr * batch size / `per` unless it is given.
    """
    per_epoch = steps_per_epoch(images, args.batch_size)
    if peak is None:
        peak = args.base_lr * args.batch_size / per
        formula = f"{args.base_lr:g} x {args.batch_size} / {per}"
    else:
        formula = "--lr, whatever the batch size"
    print0(f"{describe_epoch(images, args.batch_size)}; peak lr {peak:.3g} = {formula}")
    return lambda step: learning_rate(step, peak=peak, total_steps=args.epochs * per_epoch,
                                      warmup_steps=args.warmup_epochs * per_epoch, warmup_lr=warmup_lr, min_lr=min_lr)


def parameter_groups(model, weight_decay, *, exempt=(), scale_of=lambda name: 1.0) -> list[dict]:
    """Group the trainable parameters by weight decay and by the scale of their learning rate, for an optimizer.

    Weight decay applies to all but vectors, biases and the names in `exempt`. scale_of(name) multiplies the learning
    rate at every step, including the schedule's minimum. Returns a list of dicts with "params", "names", "lr_scale" and
    "weight_decay".
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
    """Build AdamW, fused: this variant alone can skip an update (see Guard) without synchronising the device."""
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=1e-8, fused=True)


def set_learning_rate(optimizer, lr):
    """Set every group's learning rate to `lr * lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def optimizer_step(optimizer, scaler, guard, step, loss, clip_grad):
    """Clip the gradients and update the weights, unless the guard blocks it. Return the norm before clipping."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    if clip_grad:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_grad, grad_norm)
    guard.check(step, loss, grad_norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return grad_norm
