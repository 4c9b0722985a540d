"""Accuracy of a classifier, each image counted once, in float32 (Tables 1-5)."""
import torch
import torch.nn.functional as F

from common import distributed
from common.augment import eval_transform
from common.data import statistics
from common.loader import default_workers, eval_loader, to_device


@torch.inference_mode()
def accuracy(model, loader, device, mean, std):
    """Sums over this rank's images, then over ranks, divided once: {"top1", "top5" (percent), "val_loss", "images"}.

    top5 counts the five best classes, or all of them where there are fewer.
    """
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    for batch in loader:
        batch = to_device(batch, device, mean, std)
        logits, label = model(batch["image"]).float(), batch["label"]
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices == label.unsqueeze(1)  # (B, 5)
        sums += torch.stack([best[:, 0].sum(), best.sum(), F.cross_entropy(logits, label, reduction="sum"),
                             torch.tensor(float(len(label)), device=device)]).double()
    top1, top5, loss, images = distributed.all_sum(sums).tolist()
    return {"top1": 100 * top1 / images, "top5": 100 * top5 / images, "val_loss": loss / images, "images": int(images)}


def evaluator(model, images, args, device):
    """The evaluation of the paper's recipes (resize so that the crop is 0.875 of it, centre crop) as a function of
    nothing, for the training loop. The loader starts anew each time, so nothing is kept between evaluations.
    """
    mean, std = (values.to(device) for values in statistics(args))

    def evaluate():
        loader = eval_loader(images, eval_transform(args.img_size), min(args.micro_batch, 256),
                             default_workers(args.workers, device), device,
                             distributed.rank(), distributed.world_size())
        return accuracy(model, loader, device, mean, std)

    return evaluate
