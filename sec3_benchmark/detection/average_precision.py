"""COCO average precision of a detector, computed by pycocotools on the original images."""
import contextlib
import io

import numpy as np
import torch
from pycocotools import mask as run_lengths
from pycocotools.cocoeval import COCOeval

from common import distributed
from common.data import statistics
from common.loader import eval_loader, on_device
from common.watch import progress
from sec3_benchmark.detection.coco import DetectionViews, index_coco
from sec3_benchmark.detection.mask_rcnn import paste_masks

MEASURES = {"AP": 0, "AP50": 1, "AP75": 2, "APs": 3, "APm": 4, "APl": 5}  # measure -> index in COCOeval.stats


@torch.inference_mode()
def detect_all(model, images, args, device, rank=0, world=1):
    """Detect objects on every `world`-th image, from number `rank` on: a list of COCO result entries.

    Boxes and masks are in pixels of the original image.
    """
    model.eval()
    views = DetectionViews(args.img_size, None)
    batch_size = min(args.micro_batch, 8)  # an image of 640 px takes about 0.4 GB
    loader = eval_loader(images, views, batch_size, args.workers, device, rank, world)
    categories, found = list(images.categories), []
    for batch in on_device(progress(loader, "detecting"), device, *statistics(args)):
        sizes, originals = [tuple(size) for size in batch["host_size"].tolist()], batch["host_original"].tolist()
        with torch.compiler.set_stance("force_eager"):  # a backbone compiled for training is not compiled anew for this
            detections = model(batch["image"], sizes)
        for index, detection, size, original in zip(batch["index"].tolist(), detections, sizes, originals):
            found += to_coco(detection, images.ids[index], size, original, categories)
    return found


def evaluator(model, images, args, device):
    """Make the evaluation of a detector: a zero-argument callable that returns the dict of `average_precision`.

    All ranks call it; each evaluates its share of the images.
    """
    rank, world = distributed.rank(), distributed.world_size()

    def evaluate():
        parts = [detect_all(model, images, args, device, rank, world)]
        if world > 1:  # gather on rank 0 only: the masks of 5,000 images are large
            mine, parts = parts[0], [None] * world
            torch.distributed.gather_object(mine, parts if rank == 0 else None)
        result = average_precision(images.coco, images.ids, sum(parts, [])) if rank == 0 else None
        return distributed.broadcast_object(result)

    return evaluate


def to_coco(detection, image_id, size, original, categories):
    """Convert one image's detections to COCO result entries.

    size: (height, width) of the resized image that the model saw; original: of the original image. categories: COCO
    category ids in the order of the labels 1, 2, ...
    """
    (height, width), (seen_height, seen_width) = original, size
    zoom = torch.tensor([width / seen_width, height / seen_height] * 2, device=detection["boxes"].device)
    boxes = detection["boxes"] * zoom
    masks = paste_masks(detection["masks"], boxes, height, width).cpu().numpy()
    entries, scores, labels = [], detection["scores"].tolist(), detection["labels"].tolist()
    for box, score, label, mask in zip(boxes.tolist(), scores, labels, masks):
        lengths = run_lengths.encode(np.asfortranarray(mask.astype(np.uint8)))
        entries.append({"image_id": image_id, "category_id": categories[label - 1], "score": score,
                        "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                        "segmentation": {**lengths, "counts": lengths["counts"].decode()}})
    return entries


def average_precision(coco, ids, found) -> dict[str, float]:
    """Compute {"box_ap", "mask_ap", "box_ap50", ...} in percent from COCO result entries on the images `ids`.

    A measure without any ground-truth object (no small objects, say) is left out.
    """
    result = {}
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        # without "bbox", pycocotools takes a mask's own area as its size (small, medium, large), as detectron2 does
        entries = [{k: v for k, v in one.items() if kind == "bbox" or k != "bbox"} for one in found]
        with contextlib.redirect_stdout(io.StringIO()):
            answers = coco.loadRes(entries) if entries else index_coco({**coco.dataset, "annotations": []})
            evaluation = COCOeval(coco, answers, kind)
            evaluation.params.imgIds = list(ids)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        for measure, place in MEASURES.items():
            if (value := float(evaluation.stats[place])) >= 0:  # -1: no ground-truth object of this size
                result[f"{name}_{measure.lower()}"] = 100 * value
    return result
