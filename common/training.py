"""The training loop that all methods share. It counts optimizer steps, not epochs."""
import warnings
from contextlib import closing, nullcontext

import torch
from torch.nn.parallel import DistributedDataParallel

from common import distributed
from common.checkpoint import Snapshot, save_torch
from common.data import statistics
from common.distributed import print0
from common.errors import STOPPED, UserError
from common.loader import Views, data_loader, on_device, seed_everything, step_batches
from common.memory import keep_decoded
from common.optim import optimizer_step, set_learning_rate, split_batch, steps_per_epoch
from common.probe import Probe
from common.signals import StopSignals
from common.tensorboard import board
from common.vit import set_fused_attention
from common.watch import BadImages, Guard, Meter, explain_out_of_memory, mention_busy_cores


class Method:
    """Base class of the training methods: model, loss, and hooks around each step (for a momentum encoder, say)."""

    def __init__(self, model):
        self.model = model  # has an attribute `config`, which goes into its checkpoints
        self.forward = model

    def prepare(self, device, dtype, compiled):
        """Set `self.forward` to the compiled, distributed model. Called once, before the first step."""
        self.forward = compile_and_distribute(self.model, device, dtype, compiled)

    def loss(self, batch, step):
        """Return a micro-batch's loss, a scalar computed through `self.forward`, and {name: scalar tensor} to log."""
        raise NotImplementedError

    def accumulate(self, step, engine):
        """Accumulate the gradients of a step over its micro-batches. Return the sum of their losses, detached.

        A method whose loss couples the images of a batch (contrastive loss, batch norm) overrides this.
        """
        losses = 0.0
        for micro in range(engine.accumulation):
            batch = engine.batch(step, micro)
            # DDP averages the gradients over ranks in the last backward pass only
            defer = micro < engine.accumulation - 1 and hasattr(self.forward, "no_sync")
            with self.forward.no_sync() if defer else nullcontext():
                with engine.autocast():
                    loss, logs = self.loss(batch, step)
                engine.backward(loss / engine.accumulation)
            losses = losses + loss.detach()
            engine.log(loss=loss, **logs)
        return losses

    def before_step(self, step):
        """Do what must precede the gradients of a step. Its learning rate is already set."""

    def before_update(self, step):
        """Change the gradients before the update: clip, or zero some. They are averaged over ranks and unscaled."""

    def after_step(self, step):
        """Do what follows the update of the weights: momentum encoders, moving averages."""

    def state_dict(self):
        """Return what a checkpoint must hold of the method besides the model's weights."""
        return {}

    def load_state_dict(self, state):
        """Restore what `state_dict` returned."""


def choose_precision(precision, device):
    """Return the dtype of autocast for --precision (auto, fp32, bf16, fp16), or None for float32.

    "auto" is bf16 where the hardware supports it natively, and otherwise fp16 on a GPU, float32 on a CPU. Raises
    UserError for fp16 on a CPU.
    """
    if precision == "auto" and device.type == "cuda":
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif precision == "auto":
        flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        precision = "bf16" if flags.get("avx512_bf16") or flags.get("amx_bf16") else "fp32"
    if precision == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16 needs a GPU; on a CPU choose bf16 or fp32")
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def compile_and_distribute(model, device, dtype, compiled):
    """Choose the attention kernel, compile the model if asked, and wrap it in DDP if there are several ranks."""
    set_fused_attention(model, device, dtype)
    if compiled:
        model = torch.compile(model)
    if distributed.world_size() > 1:
        # find_unused_parameters keeps DDP from rebuilding its buckets after the first step. A resumed run would do so
        # at a later step, add the gradients of three or more ranks in another order, and differ in the last bits.
        warnings.filterwarnings("ignore", message="find_unused_param|`broadcast_buffers` is deprec")
        model = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None,
                                        gradient_as_bucket_view=True, broadcast_buffers=False,
                                        find_unused_parameters=True)
    return model


class Engine:
    """What a method needs to compute its gradients: micro-batches, autocast, backward, logging."""

    def __init__(self, args, device, meter):
        self.args, self.device, self.meter = args, device, meter
        self.batches = iter(())  # set by `train`
        self.accumulation, self.micro_batch = split_batch(args.batch_size, args.micro_batch, distributed.world_size())
        self.dtype = choose_precision(args.precision, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype is torch.float16)

    def execution(self):
        """Return what besides the settings must be the same in a resumed run for the same bits: {name: value}."""
        if self.device.type == "cuda":
            hardware = {"device": torch.cuda.get_device_name(self.device)}
        else:
            hardware = {"device": "cpu", "threads": torch.get_num_threads()}
        return {**hardware, "ranks": distributed.world_size(), "accumulation": self.accumulation,
                "precision": str(self.dtype or torch.float32), "compile": self.args.compile}

    def announce(self):
        """Print where and how the run is executed, and make torch deterministic if the settings say so."""
        torch.use_deterministic_algorithms(self.args.deterministic)
        print0(", ".join(f"{name} {value}" for name, value in self.execution().items()))
        mention_busy_cores(self.device)

    def micro_batches(self, images, transform, start, total, bad_images):
        """Yield this rank's micro-batches from step `start` up to `total`, normalised and on the device."""
        args, world = self.args, distributed.world_size()
        keys = step_batches(len(images), batch_size=args.batch_size, accumulation=self.accumulation, seed=args.seed,
                            start_step=start, total_steps=total, rank=distributed.rank(), world=world)
        views = Views(images, transform, args.seed, args.on_bad_image)
        loader = self.meter.waiting_for(data_loader(views, keys, args.workers, self.device))
        for batch in on_device(loader, self.device, *statistics(args)):
            bad_images.record(batch.pop("bad"))
            yield batch

    def batch(self, step, micro):
        """Return the next micro-batch, and seed the generators for what is random in the model (mixup, drop path)."""
        batch = next(self.batches)
        seed_everything("step", self.args.seed, step, distributed.rank(), micro)
        return batch

    def autocast(self):
        """Return the autocast context of the run's precision."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def backward(self, loss):
        """Backpropagate the loss, which is scaled first if the precision is fp16."""
        self.scaler.scale(loss).backward()

    def log(self, **values):
        """Log scalar tensors of one micro-batch: a row of the log has their means over micro-batches and steps."""
        self.meter.add(**{name: value / self.accumulation for name, value in values.items()})


def train(run, args, method, optimizer, schedule, images, transform, device, evaluate=None):
    """Train `method.model` on `images` for args.epochs, or for args.iterations steps where a recipe has that setting.

    schedule(step): the learning rate. transform(image): a training view, a dict of tensors. evaluate(): {"top1": ...},
    whose first number decides which weights are the best; it runs every args.eval_every epochs and at the end. Training
    continues from the newest intact checkpoint; after a stop signal it saves one and exits with code STOPPED.

    Returns {"seconds", "images_per_second", "bad_images", "last", "best"}; the last two are results of evaluate().
    Raises FloatingPointError for a non-finite loss, gradient or weight, and if fp16 skips every update.
    """
    per_epoch = steps_per_epoch(images, args.batch_size)
    total = getattr(args, "iterations", None) or per_epoch * args.epochs
    every = (per_epoch * args.eval_every or total) if evaluate else None  # steps; eval_every 0: at the end
    meter = Meter(run, total, args.batch_size)
    engine = Engine(args, device, meter)
    engine.announce()
    guard = Guard(run, optimizer, engine, schedule, total)
    snapshot = Snapshot(run, method, optimizer, engine)
    start, progress = snapshot.restore(), snapshot.progress
    bad_images = BadImages(run, images, progress["bad_images"])
    method.prepare(device, engine.dtype, args.compile)
    keep_decoded(images, args.keep_decoded)
    probe = Probe(args, images, device) if getattr(args, "probe_every", 0) else None
    engine.batches = engine.micro_batches(images, transform, start, total, bad_images)
    with (StopSignals(run, progress, total) as stop, meter.bar(start), explain_out_of_memory(engine.micro_batch),
          closing(engine.batches), board(run, start)):
        if progress["evaluate"]:  # the run was stopped during this evaluation
            evaluate_and_log(snapshot, stop, evaluate, start / per_epoch)
        method.model.train()
        for step in range(start, total):
            set_learning_rate(optimizer, schedule(step))
            method.before_step(step)
            losses = method.accumulate(step, engine)
            engine.scaler.unscale_(optimizer)
            method.before_update(step)
            grad_norm = optimizer_step(optimizer, engine.scaler, guard, step, losses, args.clip_grad)
            method.after_step(step)
            meter.step(grad_norm=grad_norm)

            done, epoch = step + 1, (step + 1) / per_epoch
            progress["evaluate"] = every is not None and (done % every == 0 or done == total)
            if done % args.log_every == 0 or done == total:
                guard.raise_if_bad()
                meter.log_row(done, epoch, schedule(step))
            if probe and (done % (args.probe_every * per_epoch) == 0 or done == total):
                guard.raise_if_bad()
                log_measured(run, done, epoch, "probe", probe(run.weights(method.model)))
            stopping, due = distributed.all_max(stop.received, snapshot.is_due())
            if stopping or progress["evaluate"] or (due and done < total):
                guard.raise_if_bad()
                progress["bad_images"] = bad_images.all_ranks()
                snapshot.save(done)
                run.draw_now_and_then()
            if stopping:  # also after the last step: a table must not go on to its next stage
                raise SystemExit(STOPPED)
            if progress["evaluate"]:
                evaluate_and_log(snapshot, stop, evaluate, epoch)
                method.model.train()
    guard.raise_if_bad()
    return summary(snapshot, total * args.batch_size, bad_images.all_ranks())


def summary(snapshot, images, bad_images):
    """Return the result of a training that saw this many images; bad_images: those it could not read."""
    seconds, progress = snapshot.seconds(), snapshot.progress
    return {"seconds": round(seconds, 1), "images_per_second": round(images / seconds, 1),
            "bad_images": len(bad_images), "last": progress["last"], "best": progress["best"]}


def log_measured(run, step, epoch, what, result):
    """Log and print the result of an evaluation or a probe after a step, {name: value}."""
    run.log({"step": step, "epoch": epoch, what: result})
    print0(f"epoch {epoch:g}: " + ", ".join(f"{name} {value:.4g}" for name, value in result.items()))


def evaluate_and_log(snapshot, stop, evaluate, epoch):
    """Evaluate, log the result, and save the weights as best.pt if its first number is the best so far."""
    run, progress = snapshot.run, snapshot.progress
    with stop.exit_immediately():  # a resumed run repeats the evaluation
        result = evaluate()
        log_measured(run, progress["step"], epoch, "eval", result)
        measure = next(iter(result))  # the first is the main measure: top1, or box_ap
        better = result[measure] > progress["best"].get(measure, -1.0)
        if better and distributed.is_main():
            save_torch(run.folder / "best.pt", run.weights(snapshot.method.model))
    progress["evaluate"] = False
    progress["last"] = {"epoch": epoch, **result}
    if better:
        progress["best"] = dict(progress["last"])
