"""Mask R-CNN on the pyramid of vitdet.py (Appendix A.5): torchvision's parts with detectron2's constants and losses.

Ours are what torchvision has no setting for: exact anchors, ROIAlign with its half-pixel shift ("aligned"), plain L1
losses, norms in the heads, mask targets and pasted masks sampled where detectron2 samples them. Boxes are (x1, y1, x2,
y2) in pixels of the padded image; class 0 is the background. Predictions leave the heads in float32, as bf16 knows
pixel 639 only to within 2. Every remaining difference is listed in the section's README.
"""
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import roi_align

from sec3_benchmark.detection.vitdet import LEVELS

RATIOS = (0.5, 1.0, 2.0)  # height / width of the anchors
ANCHOR = 8  # their side in strides: 32 px at stride 4 to 512 px at stride 64, for patches of 16 px
CANONICAL = 14  # a box of 14 patches (224 px) is pooled from p4, one half as large from p3


class Anchors(nn.Module):
    """Three anchors around each position of each level; unlike torchvision's they are not rounded to whole pixels."""

    def num_anchors_per_location(self):
        return [len(RATIOS)]

    def forward(self, images, features):
        """Maps of the levels (B, C, h, w) -> for each image (sum of 3hw, 4), in the order level, row, column, ratio."""
        levels = []
        for level in features:
            rows, columns = level.shape[-2:]
            height, width = (side / n for side, n in zip(images.tensors.shape[-2:], (rows, columns)))
            ratios = torch.tensor(RATIOS, device=level.device)
            half = ANCHOR / 2 * torch.stack([width / ratios.sqrt(), height * ratios.sqrt()], dim=1)  # (3, 2)
            y, x = torch.meshgrid(torch.arange(rows, device=level.device) * height,
                                  torch.arange(columns, device=level.device) * width, indexing="ij")
            centres = torch.stack([x, y], dim=-1).view(-1, 1, 2)
            levels.append(torch.cat([centres - half, centres + half], dim=-1).view(-1, 4))
        return [torch.cat(levels)] * len(images.image_sizes)


class ProposalHead(RPNHead):
    def forward(self, features):
        """Objectness and box deltas of each level, in float32."""
        objectness, deltas = super().forward(features)
        return [level.float() for level in objectness], [level.float() for level in deltas]


class ProposalNetwork(RegionProposalNetwork):
    def compute_loss(self, objectness, deltas, labels, targets):
        """Binary cross-entropy and L1, both divided by the anchors asked for, as in detectron2, not those found."""
        positive, negative = (torch.where(torch.cat(chosen))[0] for chosen in self.fg_bg_sampler(labels))
        sampled, asked = torch.cat([positive, negative]), self.fg_bg_sampler.batch_size_per_image * len(labels)
        labels, targets = torch.cat(labels), torch.cat(targets)
        found = F.binary_cross_entropy_with_logits(objectness.flatten()[sampled], labels[sampled], reduction="sum")
        return found / asked, F.l1_loss(deltas[positive], targets[positive], reduction="sum") / asked


class AlignedPool(nn.Module):
    """Features of boxes (K, C, size, size), each from the pyramid level of its size, by ROIAlign's second version:
    pixel i lies at i + 0.5, and each bin averages as many samples as it has pixels of the level.
    """

    def __init__(self, size, patch_size):
        super().__init__()
        self.size, self.patch_size = size, patch_size

    def level(self, boxes):
        """boxes (K, 4) -> the level of each, 0 for p2 to 3 for p5."""
        side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
        return torch.floor(2 + torch.log2(side / (CANONICAL * self.patch_size) + 1e-8)).clamp(0, len(LEVELS) - 1)

    def forward(self, features, boxes, image_sizes=None):
        """features {"p2": (B, C, h, w), ...}, boxes: for each image (k, 4)."""
        rois = torch.cat([F.pad(one, (1, 0), value=image) for image, one in enumerate(boxes)])  # (K, 5)
        levels, pooled, order = self.level(rois[:, 1:]), [], []
        for i, name in enumerate(LEVELS):
            at = torch.where(levels == i)[0]
            scale = 4 / self.patch_size / 2**i
            pooled.append(roi_align(features[name].float(), rois[at], self.size, scale, sampling_ratio=0, aligned=True))
            order.append(at)
        return torch.cat(pooled)[torch.cat(order).argsort()]


def mask_targets(masks, boxes, matched, size):
    """masks (n, H, W) bool, boxes (k, 4), each one's mask `matched` (k,) -> (k, size, size), 1 inside the object."""
    if not len(boxes):
        return boxes.new_zeros(0, size, size)
    rois = torch.cat([matched[:, None].to(boxes), boxes], dim=1)
    cropped = roi_align(masks[:, None].to(boxes), rois, size, 1.0, sampling_ratio=0, aligned=True)[:, 0]
    return (cropped >= 0.5).to(boxes)


class ROIHeads(RoIHeads):
    def forward(self, features, proposals, image_sizes, targets=None):
        """In training ([], losses), else ([{"boxes", "scores", "labels", "masks" (k, 28, 28) in 0..1}], {})."""
        if self.training:
            proposals, matched, labels, box_targets = self.select_training_samples(proposals, targets)
            logits, deltas = self.classify(features, proposals)
            losses = box_losses(logits, deltas, torch.cat(labels), torch.cat(box_targets))
            inside = [torch.where(label > 0)[0] for label in labels]
            boxes, matched, labels = ([one[i] for one, i in zip(all_, inside)] for all_ in (proposals, matched, labels))
            masks = self.masks(features, boxes, torch.cat(labels))
            wanted = torch.cat([mask_targets(target["masks"], one, i, masks.shape[-1])
                                for target, one, i in zip(targets, boxes, matched)])
            loss = F.binary_cross_entropy_with_logits(masks, wanted) if len(masks) else masks.sum()
            return [], {**losses, "loss_mask": loss}
        logits, deltas = self.classify(features, proposals)
        boxes, scores, labels = self.postprocess_detections(logits, deltas, proposals, image_sizes)
        masks = self.masks(features, boxes, torch.cat(labels)).sigmoid().split([len(one) for one in boxes])
        names = ("boxes", "scores", "labels", "masks")
        return [dict(zip(names, found)) for found in zip(boxes, scores, labels, masks)], {}

    def classify(self, features, boxes):
        """Class logits (K, classes) and box deltas (K, 4 classes) of all images' boxes."""
        logits, deltas = self.box_predictor(self.box_head(self.box_roi_pool(features, boxes)))
        return logits.float(), deltas.float()

    def masks(self, features, boxes, labels):
        """Mask logits (K, 28, 28) of all images' boxes, each for its own class."""
        logits = self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes)))
        return logits[torch.arange(len(labels), device=labels.device), labels].float()


def box_losses(logits, deltas, labels, targets):
    """Cross-entropy over all sampled boxes; L1 of the positives' deltas for their own class, over all of them too."""
    positive = torch.where(labels > 0)[0]
    deltas = deltas.view(len(labels), -1, 4)[positive, labels[positive]]
    distance = F.l1_loss(deltas, targets[positive], reduction="sum") / max(1, len(labels))
    return {"loss_class": F.cross_entropy(logits, labels), "loss_box": distance}


class MaskRCNN(nn.Module):
    """Images and targets -> losses; in evaluation, images -> detections. `config` holds what built it."""

    def __init__(self, backbone, pyramid, num_classes, config, *, channels=256, hidden=1024, anchors=256, rois=512,
                 proposals=1000):
        super().__init__()
        self.config = config
        self.backbone, self.pyramid = backbone, pyramid
        head = ProposalHead(channels, len(RATIOS), conv_depth=2)
        self.rpn = ProposalNetwork(
            Anchors(), head, 0.7, 0.3, anchors, 0.5, dict(training=2 * proposals, testing=proposals),
            dict(training=proposals, testing=proposals), nms_thresh=0.7)
        patch_size = backbone.patch_embed.patch_size[0]
        self.roi_heads = ROIHeads(
            AlignedPool(7, patch_size), FastRCNNConvFCHead((channels, 7, 7), [channels] * 4, [hidden], LayerNorm2d),
            FastRCNNPredictor(hidden, num_classes), 0.5, 0.5, rois, 0.25, (10.0, 10.0, 5.0, 5.0),
            score_thresh=0.05, nms_thresh=0.5, detections_per_img=100, mask_roi_pool=AlignedPool(14, patch_size),
            mask_head=MaskRCNNHeads(channels, [channels] * 4, 1, LayerNorm2d),
            mask_predictor=MaskRCNNPredictor(channels, channels, num_classes))
        init_heads(self.roi_heads)

    def forward(self, images, sizes, targets=None):
        """images (B, 3, H, W) normalised and padded at the right and bottom; sizes: [(height, width)] without padding;
        targets: [{"boxes" (n, 4), "labels" (n,), "masks" (n, H, W) bool}].
        """
        features = self.pyramid(self.backbone(blank_padding(images, sizes)))
        proposals, losses = self.rpn(ImageList(images, sizes), features, targets)
        detections, more = self.roi_heads(features, proposals, sizes, targets)
        return {**losses, **more} if self.training else detections


def init_heads(heads):
    """detectron2's initial values, where torchvision's differ: fully connected, box and mask predictors."""
    for module in heads.box_head:
        if isinstance(module, nn.Linear):
            nn.init.kaiming_uniform_(module.weight, a=1)
            nn.init.zeros_(module.bias)
    for module, std in ((heads.box_predictor.cls_score, 0.01), (heads.box_predictor.bbox_pred, 0.001),
                        (heads.mask_predictor.mask_fcn_logits, 0.001)):
        nn.init.normal_(module.weight, std=std)
        nn.init.zeros_(module.bias)
    nn.init.zeros_(heads.mask_predictor.conv5_mask.bias)


def blank_padding(images, sizes):
    """images (B, 3, H, W) with zeros outside the sizes: padding is the mean colour, as the pixels are normalised."""
    rows, columns = (torch.arange(side, device=images.device) for side in images.shape[-2:])
    height, width = torch.tensor(sizes, device=images.device).T[..., None]
    inside = (rows < height)[:, None, :, None] & (columns < width)[:, None, None, :]
    return images * inside


def paste(masks, boxes, height, width):
    """masks (k, 28, 28) in 0..1 and their boxes (k, 4) -> (k, height, width) bool on the image, threshold 0.5.

    A pixel's centre is looked up in the mask bilinearly, with zeros around it.
    """
    pasted = torch.zeros(len(masks), height, width, dtype=torch.bool, device=masks.device)
    for out, mask, box in zip(pasted, masks, boxes.tolist()):
        x1, y1, x2, y2 = box
        left, top = max(0, int(x1) - 1), max(0, int(y1) - 1)
        right, bottom = min(width, int(x2) + 2), min(height, int(y2) + 2)
        x = (torch.arange(left, right, device=mask.device) + 0.5 - x1) / (x2 - x1) * 2 - 1
        y = (torch.arange(top, bottom, device=mask.device) + 0.5 - y1) / (y2 - y1) * 2 - 1
        if len(x) and len(y):
            grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1)
            out[top:bottom, left:right] = F.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0] >= 0.5
    return pasted
