"""The one training loop. Steps, not epochs, drive it; every method of the paper goes through it."""
import warnings
from contextlib import closing, nullcontext

import torch
from torch.nn.parallel import DistributedDataParallel

from common import distributed, report
from common.checkpoint import Snapshot, save_torch
from common.data import statistics
from common.distributed import print0
from common.errors import STOPPED, UserError
from common.loader import Views, data_loader, on_device, seed_everything, step_batches
from common.memory import keep_decoded
from common.optim import set_learning_rate, steps_per_epoch
from common.vit import choose_attention
from common.watch import BadImages, Guard, Meter, StopSignals, explain_memory


class Method:
    """What the loop asks of a method: a loss. The hooks are for momentum encoders, moving averages and centres."""

    def __init__(self, model):
        self.model = model  # carries `config`
        self.forward = model

    def prepare(self, device, dtype, compiled):
        """Before the first step: `self.forward` becomes the compiled, distributed model."""
        self.forward = wrap(self.model, device, dtype, compiled)

    def loss(self, batch, step):
        """The scalar loss of a micro-batch, computed through `self.forward`, and a dict of tensors to log."""
        raise NotImplementedError

    def accumulate(self, step, engine):
        """Adds up the gradients of a step and returns its loss, summed over micro-batches. A method whose loss couples
        the micro-batches (contrastive, batch norm) has its own way.
        """
        losses = 0.0
        for micro in range(engine.accumulation):
            batch = engine.batch(step, micro)
            last = micro == engine.accumulation - 1  # ranks average their gradients once a step, in its last pass
            with nullcontext() if last or not hasattr(self.forward, "no_sync") else self.forward.no_sync():
                with engine.autocast():
                    loss, logs = self.loss(batch, step)
                engine.backward(loss / engine.accumulation)
            losses = losses + loss.detach()
            engine.log(loss=loss, **logs)
        return losses

    def before_step(self, step):
        pass

    def before_update(self, step):
        """Once the step's gradients are there, averaged and unscaled: own clipping, frozen layers."""

    def after_step(self, step):
        pass

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def choose_precision(precision, device):
    """The autocast type, or None for float32. Emulated bf16 does not count as having it."""
    if precision == "auto" and device.type == "cuda":
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif precision == "auto":
        flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        precision = "bf16" if flags.get("avx512_bf16") or flags.get("amx_bf16") else "fp32"
    if precision == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16 needs a GPU; on a CPU choose bf16 or fp32")
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def split_batch(batch_size, micro_batch, world):
    """(steps, images) of accumulation: with them `world` ranks make up the global batch exactly, and no rank has more
    than `micro_batch` images at once.
    """
    if batch_size % world:
        raise UserError(f"--batch-size {batch_size} cannot be shared equally by {world} ranks")
    per_rank = batch_size // world
    accumulation = next(n for n in range(1, per_rank + 1) if per_rank % n == 0 and per_rank // n <= micro_batch)
    at_once = per_rank // accumulation
    print0(f"global batch {batch_size} = {world} ranks x {accumulation} accumulation x {at_once}")
    return accumulation, at_once


def wrap(model, device, dtype, compiled):
    """The module that the loss is computed through: compiled and averaging its gradients over ranks, as asked."""
    choose_attention(model, device, dtype)
    if compiled:
        model = torch.compile(model)
    if distributed.world_size() > 1:
        # Else DDP sorts its buckets anew after its first step. Sums over more than two ranks then have another order,
        # and a resumed run, whose first step comes later, would not end in the same bits.
        warnings.filterwarnings("ignore", message="find_unused_param|`broadcast_buffers` is deprec")
        model = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None,
                                        gradient_as_bucket_view=True, broadcast_buffers=False,
                                        find_unused_parameters=True)
    return model


class Engine:
    """What a method needs to compute the gradients of a step: micro-batches, autocast, backward passes, log entries."""

    def __init__(self, args, device, meter):
        self.args, self.device, self.meter, self.batches = args, device, meter, iter(())
        self.accumulation, self.at_once = split_batch(args.batch_size, args.micro_batch, distributed.world_size())
        self.dtype = choose_precision(args.precision, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype is torch.float16)

    def execution(self):
        """What a run must be continued with, to be continued exactly: what decides on the last bit, settings aside."""
        place = {"device": torch.cuda.get_device_name(self.device)} if self.device.type == "cuda" else \
            {"device": "cpu", "threads": torch.get_num_threads()}
        return {**place, "ranks": distributed.world_size(), "accumulation": self.accumulation,
                "precision": str(self.dtype or torch.float32), "compile": self.args.compile}

    def read(self, images, transform, start, total, bad_images):
        """Yield every micro-batch of this rank from step `start` on, on the device."""
        args, world = self.args, distributed.world_size()
        keys = step_batches(len(images), batch_size=args.batch_size, accumulation=self.accumulation, seed=args.seed,
                            start_step=start, total_steps=total, rank=distributed.rank(), world=world)
        views = Views(images, transform, args.seed, args.on_bad_image)
        loader = self.meter.waiting_for(data_loader(views, keys, args.workers, self.device))
        mean, std = (values.to(self.device) for values in statistics(args))
        for batch in on_device(loader, self.device, mean, std):
            bad_images.note(batch.pop("bad"))
            yield batch

    def batch(self, step, micro):
        """The next micro-batch; the generators are seeded for it (mixup, drop path)."""
        batch = next(self.batches)
        seed_everything("step", self.args.seed, step, distributed.rank(), micro)
        return batch

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def backward(self, loss):
        self.scaler.scale(loss).backward()

    def log(self, **values):
        """Values of one micro-batch; the log has their means."""
        self.meter.add(**{name: value / self.accumulation for name, value in values.items()})


def train(run, args, method, optimizer, schedule, images, transform, device, evaluate=None):
    """Trains `method.model` for args.epochs on `images`. Returns {seconds, images_per_second, last, best}.

    `schedule(step)` is the learning rate. `evaluate()` -> {"top1": ...} runs every args.eval_every epochs and at the
    end; the first number is the main one. Continues from the run's newest whole checkpoint; after a signal it saves and
    leaves with exit code 75. args.iterations, where a recipe counts in them, takes the place of args.epochs.
    """
    per_epoch = steps_per_epoch(images, args.batch_size)
    total = getattr(args, "iterations", None) or per_epoch * args.epochs
    every = (per_epoch * args.eval_every or total) if evaluate else None  # steps; 0: only at the end
    torch.use_deterministic_algorithms(args.deterministic)
    meter = Meter(run, total, args.batch_size)
    engine = Engine(args, device, meter)
    print0(", ".join(f"{name} {value}" for name, value in engine.execution().items()))

    guard, snapshot = Guard(run, optimizer, engine.scaler, schedule, device), Snapshot(run, method, optimizer, engine)
    start, progress = snapshot.restore(), snapshot.progress
    bad_images = BadImages(run, images, progress["bad_images"])
    method.prepare(device, engine.dtype, args.compile)
    keep_decoded(images, args.keep_decoded)
    engine.batches = engine.read(images, transform, start, total, bad_images)

    with (StopSignals(run, progress, total) as stop, meter.bar(start), explain_memory(engine.at_once),
          closing(engine.batches)):
        if progress["evaluate"]:  # it was stopped there
            note_evaluation(snapshot, stop, evaluate, per_epoch)
        method.model.train()
        for step in range(start, total):
            set_learning_rate(optimizer, schedule(step))
            method.before_step(step)
            losses = method.accumulate(step, engine)
            engine.scaler.unscale_(optimizer)
            method.before_update(step)
            grad_norm = update(optimizer, engine.scaler, guard, step, losses, args.clip_grad)
            method.after_step(step)
            meter.step(grad_norm=grad_norm)

            done = step + 1
            progress["evaluate"] = every is not None and (done % every == 0 or done == total)
            if done % args.log_every == 0 or done == total:
                guard.raise_if_bad()
                meter.write(done, done / per_epoch, schedule(step))
            stopping, due = distributed.all_max(stop.received, snapshot.due())
            if stopping or progress["evaluate"] or due and done < total:
                guard.raise_if_bad()
                progress["bad_images"] = bad_images.everywhere()
                snapshot.save(done)
            if stopping:  # after the last step too: a table must not go on to its next stage
                raise SystemExit(STOPPED)
            if progress["evaluate"]:
                note_evaluation(snapshot, stop, evaluate, per_epoch)
                method.model.train()
    guard.raise_if_bad()
    if distributed.is_main():
        report.draw_curve(run.log_path, run.folder / "curve.png")
    seconds = snapshot.seconds()
    return {"seconds": round(seconds, 1), "images_per_second": round(total * args.batch_size / seconds, 1),
            "bad_images": len(bad_images.everywhere()), "last": progress["last"], "best": progress["best"]}


def update(optimizer, scaler, guard, step, loss, clip_grad):
    """One optimizer step, unless something is not finite. Returns the gradient norm before clipping."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    if clip_grad:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_grad, grad_norm)
    guard.check(step, loss, grad_norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return grad_norm


def note_evaluation(snapshot, stop, evaluate, per_epoch):
    """Evaluates and logs; the best weights so far, by the first number, are kept beside the last."""
    run, progress = snapshot.run, snapshot.progress
    epoch = progress["step"] / per_epoch
    with stop.obeyed_at_once():  # it is all done again then
        result = evaluate()
        run.log({"step": progress["step"], "epoch": epoch, "eval": result})
        print0(f"epoch {epoch:g}: " + ", ".join(f"{name} {value:.4g}" for name, value in result.items()))
        measure = next(iter(result))  # top1, or box_ap
        better = result[measure] > progress["best"].get(measure, -1.0)
        if better and distributed.is_main():
            save_torch(run.folder / "best.pt", run.weights(snapshot.method.model))
    progress["evaluate"], progress["last"] = False, {"epoch": epoch, **result}
    if better:
        progress["best"] = dict(progress["last"])
