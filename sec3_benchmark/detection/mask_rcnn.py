"""Mask R-CNN on the pyramid of vitdet.py (Appendix A.5): torchvision modules, detectron2's constants and losses.

Implemented here is what torchvision cannot be configured to do: exact anchors, ROIAlign with half-pixel offset
("aligned"), plain L1 losses, norms in the heads, and detectron2's sampling points for mask targets and pasted masks.
Boxes are (x1, y1, x2, y2) in pixels of the padded image; class 0 is the background. The heads' predictions are
converted to float32, because bf16 resolves a coordinate near pixel 639 only to within 2 pixels. The section's README
lists every remaining difference from detectron2.
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
ANCHOR = 8  # side of an anchor in strides of its level: 32 px at stride 4 to 512 px at stride 64, for 16 px patches
CANONICAL = 14  # side in patches of a box pooled from p4 (224 px at 16 px patches); each halving is one level lower


class Anchors(nn.Module):
    """Three anchors at each position of each level; unlike torchvision's they are not rounded to whole pixels."""

    def num_anchors_per_location(self):
        return [len(RATIOS)]

    def forward(self, images, features):
        """Compute the anchors of each image from the levels' maps (B, C, h, w): a list of (sum of 3hw, 4).

        The order is level, row, column, ratio.
        """
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
    """torchvision's RPN head with outputs in float32."""

    def forward(self, features):
        """Predict objectness and box deltas of each level: two lists of float32 tensors."""
        objectness, deltas = super().forward(features)
        return [level.float() for level in objectness], [level.float() for level in deltas]


class ProposalNetwork(RegionProposalNetwork):
    """torchvision's region proposal network with detectron2's losses."""

    def compute_loss(self, objectness, deltas, labels, targets):
        """Compute binary cross-entropy and L1 loss of the sampled anchors.

        As in detectron2 both are divided by the number of anchors to sample, even if fewer were available.
        """
        positive, negative = (torch.where(torch.cat(chosen))[0] for chosen in self.fg_bg_sampler(labels))
        sampled, count = torch.cat([positive, negative]), self.fg_bg_sampler.batch_size_per_image * len(labels)
        labels, targets = torch.cat(labels), torch.cat(targets)
        entropy = F.binary_cross_entropy_with_logits(objectness.flatten()[sampled], labels[sampled], reduction="sum")
        distance = F.l1_loss(deltas[positive], targets[positive], reduction="sum")
        return entropy / count, distance / count


class AlignedPool(nn.Module):
    """Pool box features from the pyramid level that fits each box's size, by aligned ROIAlign.

    Aligned: the centre of pixel i is at i + 0.5. Each bin averages as many samples as it covers pixels of the level.
    """

    def __init__(self, size, patch_size):
        super().__init__()
        self.size, self.patch_size = size, patch_size

    def level(self, boxes):
        """Choose the level of each box: (K, 4) -> (K,), 0 for p2 to 3 for p5."""
        side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
        return torch.floor(2 + torch.log2(side / (CANONICAL * self.patch_size) + 1e-8)).clamp(0, len(LEVELS) - 1)

    def forward(self, features, boxes, image_sizes=None):
        """Pool features {"p2": (B, C, h, w), ...} at each image's boxes (k, 4): (K, C, size, size) for all boxes."""
        rois = torch.cat([F.pad(one, (1, 0), value=image) for image, one in enumerate(boxes)])  # (K, 5)
        levels, pooled, order = self.level(rois[:, 1:]), [], []
        for i, name in enumerate(LEVELS):
            at = torch.where(levels == i)[0]
            scale = 4 / self.patch_size / 2**i
            pooled.append(roi_align(features[name].float(), rois[at], self.size, scale, sampling_ratio=0, aligned=True))
            order.append(at)
        return torch.cat(pooled)[torch.cat(order).argsort()]


def mask_targets(masks, boxes, matched, size):
    """Crop the ground-truth masks to the boxes: masks (n, H, W) bool, boxes (k, 4) -> (k, size, size), 1 inside.

    matched: (k,), the index of each box's mask.
    """
    if not len(boxes):
        return boxes.new_zeros(0, size, size)
    rois = torch.cat([matched[:, None].to(boxes), boxes], dim=1)
    cropped = roi_align(masks[:, None].to(boxes), rois, size, 1.0, sampling_ratio=0, aligned=True)[:, 0]
    return (cropped >= 0.5).to(boxes)


class ROIHeads(RoIHeads):
    """torchvision's box and mask heads with detectron2's losses and mask sampling."""

    def forward(self, features, proposals, image_sizes, targets=None):
        """Return ([], losses) in training, else (detections, {}).

        detections: for each image {"boxes" (k, 4), "scores" (k,), "labels" (k,), "masks" (k, 28, 28) in 0..1}.
        """
        if self.training:
            proposals, matched, labels, box_targets = self.select_training_samples(proposals, targets)
            logits, deltas = self.classify(features, proposals)
            losses = box_losses(logits, deltas, torch.cat(labels), torch.cat(box_targets))
            positive = [torch.where(label > 0)[0] for label in labels]
            boxes, matched, labels = ([values[i] for values, i in zip(by_image, positive)]
                                      for by_image in (proposals, matched, labels))
            masks = self.masks(features, boxes, torch.cat(labels))
            wanted = torch.cat([mask_targets(target["masks"], own_boxes, indices, masks.shape[-1])
                                for target, own_boxes, indices in zip(targets, boxes, matched)])
            # without boxes the sum, 0, keeps the mask head in the graph: every parameter gets a gradient
            loss = F.binary_cross_entropy_with_logits(masks, wanted) if len(masks) else masks.sum()
            return [], {**losses, "loss_mask": loss}
        logits, deltas = self.classify(features, proposals)
        boxes, scores, labels = self.postprocess_detections(logits, deltas, proposals, image_sizes)
        masks = self.masks(features, boxes, torch.cat(labels)).sigmoid().split([len(one) for one in boxes])
        names = ("boxes", "scores", "labels", "masks")
        return [dict(zip(names, found)) for found in zip(boxes, scores, labels, masks)], {}

    def classify(self, features, boxes):
        """Predict class logits (K, classes) and box deltas (K, 4 * classes) of all images' boxes."""
        logits, deltas = self.box_predictor(self.box_head(self.box_roi_pool(features, boxes)))
        return logits.float(), deltas.float()

    def masks(self, features, boxes, labels):
        """Predict mask logits (K, 28, 28) of all images' boxes, for the class in `labels` (K,)."""
        logits = self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes)))
        return logits[torch.arange(len(labels), device=labels.device), labels].float()


def box_losses(logits, deltas, labels, targets):
    """Compute {"loss_class", "loss_box"}: cross-entropy of all sampled boxes, and L1 of the positive boxes' deltas.

    logits (K, classes), deltas (K, 4 * classes), labels (K,), targets (K, 4). The L1 loss uses the deltas of the true
    class and, as in detectron2, is divided by the number of all sampled boxes.
    """
    positive = torch.where(labels > 0)[0]
    deltas = deltas.view(len(labels), -1, 4)[positive, labels[positive]]
    distance = F.l1_loss(deltas, targets[positive], reduction="sum") / max(1, len(labels))
    return {"loss_class": F.cross_entropy(logits, labels), "loss_box": distance}


class MaskRCNN(nn.Module):
    """Mask R-CNN: returns a dict of losses in training, detections in evaluation.

    config: the settings that rebuild the model. anchors, rois: samples per image for the losses of the proposal network
    and of the heads. proposals: per image, after non-maximum suppression.
    """

    def __init__(self, backbone, pyramid, num_classes, config, *, channels=256, hidden=1024, anchors=256, rois=512,
                 proposals=1000):
        super().__init__()
        self.config = config
        self.backbone, self.pyramid = backbone, pyramid
        head = ProposalHead(channels, len(RATIOS), conv_depth=2)
        self.rpn = ProposalNetwork(
            Anchors(), head, fg_iou_thresh=0.7, bg_iou_thresh=0.3, batch_size_per_image=anchors, positive_fraction=0.5,
            pre_nms_top_n=dict(training=2 * proposals, testing=proposals),
            post_nms_top_n=dict(training=proposals, testing=proposals), nms_thresh=0.7)
        patch_size = backbone.patch_embed.patch_size[0]
        self.roi_heads = ROIHeads(
            AlignedPool(7, patch_size), FastRCNNConvFCHead((channels, 7, 7), [channels] * 4, [hidden], LayerNorm2d),
            FastRCNNPredictor(hidden, num_classes), fg_iou_thresh=0.5, bg_iou_thresh=0.5, batch_size_per_image=rois,
            positive_fraction=0.25, bbox_reg_weights=(10.0, 10.0, 5.0, 5.0), score_thresh=0.05, nms_thresh=0.5,
            detections_per_img=100, mask_roi_pool=AlignedPool(14, patch_size),
            mask_head=MaskRCNNHeads(channels, [channels] * 4, 1, LayerNorm2d),
            mask_predictor=MaskRCNNPredictor(channels, channels, num_classes))
        init_heads(self.roi_heads)

    def forward(self, images, sizes, targets=None):
        """Compute the losses (training) or the detections as in ROIHeads.forward (evaluation).

        images: (B, 3, H, W), normalised, padded at right and bottom; sizes: [(height, width)] without padding;
        targets, in training: [{"boxes" (n, 4), "labels" (n,), "masks" (n, H, W) bool}].
        """
        features = self.pyramid(self.backbone(zero_padding(images, sizes)))
        proposals, losses = self.rpn(ImageList(images, sizes), features, targets)
        detections, more = self.roi_heads(features, proposals, sizes, targets)
        return {**losses, **more} if self.training else detections


def init_heads(heads):
    """Initialise fully connected layers, box and mask predictors as detectron2 does, where torchvision differs."""
    for module in heads.box_head:
        if isinstance(module, nn.Linear):
            nn.init.kaiming_uniform_(module.weight, a=1)
            nn.init.zeros_(module.bias)
    for module, std in ((heads.box_predictor.cls_score, 0.01), (heads.box_predictor.bbox_pred, 0.001),
                        (heads.mask_predictor.mask_fcn_logits, 0.001)):
        nn.init.normal_(module.weight, std=std)
        nn.init.zeros_(module.bias)
    nn.init.zeros_(heads.mask_predictor.conv5_mask.bias)


def zero_padding(images, sizes):
    """Set the padding of normalised images (B, 3, H, W) to 0, the mean colour; sizes: [(height, width)] without it."""
    rows, columns = (torch.arange(side, device=images.device) for side in images.shape[-2:])
    height, width = torch.tensor(sizes, device=images.device).T[..., None]
    inside = (rows < height)[:, None, :, None] & (columns < width)[:, None, None, :]
    return images * inside


def paste_masks(masks, boxes, height, width):
    """Paste masks into the image: masks (k, 28, 28) in 0..1, boxes (k, 4) -> (k, height, width) bool, threshold 0.5.

    The mask is interpolated bilinearly at each pixel's centre, with zeros outside its box.
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
