"""vitdet.py and mask_rcnn.py by brute force: attention, pyramid, anchors, pooling, losses, masks."""
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.models.detection.image_list import ImageList

from common.filling import load_encoder
from common.pretrained import read_weights
from common.vit import build_vit
from sec3_benchmark.detection.mask_rcnn import (
    AlignedPool,
    Anchors,
    MaskRCNN,
    ProposalHead,
    ProposalNetwork,
    box_losses,
    mask_targets,
    paste_masks,
    zero_padding,
)
from sec3_benchmark.detection.vitdet import (
    GridAttention,
    SimplePyramid,
    TopDownPyramid,
    ViTBackbone,
    window_partition,
    window_unpartition,
)
from tests.helpers import assert_close


def small_vit(img_size=(40, 56), **settings):
    """Build vit_demo with patches of 8 px and, for speed, only four blocks."""
    torch.manual_seed(0)
    vit = build_vit("vit_demo", img_size=img_size, patch_size=8, num_classes=0, **settings)
    vit.blocks = vit.blocks[:4]
    return vit


def random_tables(module):
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "rel_pos" in name:
                parameter.normal_(std=0.5)
    return module


# Backbone

def slow_attention(attention, tokens, grid, window):
    """Compute GridAttention query by query: (B, H * W, D)."""
    (H, W), (h, w), d = grid, window, attention.head_dim
    out = torch.zeros_like(tokens)
    for b, top, left in itertools.product(range(len(tokens)), range(0, H, h), range(0, W, w)):
        places = list(itertools.product(range(h), range(w)))
        inputs = [tokens[b, (top + y) * W + left + x] if top + y < H and left + x < W else torch.zeros(tokens.shape[2])
                  for y, x in places]
        qkv = [attention.qkv(one.to(tokens.dtype)).view(3, attention.num_heads, d) for one in inputs]
        for (yq, xq), (q, _, _) in zip(places, qkv):
            if top + yq >= H or left + xq >= W:
                continue
            heads = []
            for head in range(attention.num_heads):
                logits = torch.stack([
                    q[head] @ k[head] / math.sqrt(d) + q[head] @ attention.rel_pos_h[yq - yk + h - 1]
                    + q[head] @ attention.rel_pos_w[xq - xk + w - 1] for (yk, xk), (_, k, _) in zip(places, qkv)])
                heads.append(sum(p * v[head] for p, (_, _, v) in zip(logits.softmax(0), qkv)))
            out[b, (top + yq) * W + left + xq] = attention.proj(torch.cat(heads))
    return out


@pytest.mark.parametrize(("window", "used"), [(3, (3, 3)), (None, (4, 5)), (5, (4, 5))])
@pytest.mark.parametrize("fused", [True, False])
def test_attention_with_decomposed_positions_is_the_loop_over_windows_and_queries(window, used, fused):
    """A grid of 4 x 5 does not fill the 3 x 3 windows at its edges: zeros take part there."""
    attention = random_tables(GridAttention(small_vit().blocks[0].attn, (4, 5), window).double())
    attention.fused_attn = fused
    assert attention.window == used
    tokens = torch.randn(2, 20, 96, dtype=torch.float64)
    with torch.no_grad():
        assert_close(attention(tokens), slow_attention(attention, tokens, (4, 5), used), 1e-10)


def test_windows_come_back_where_they_were():
    maps = torch.randn(2, 7, 5, 3)
    windows = window_partition(maps, (4, 3))
    assert windows.shape == (2 * 2 * 2, 4, 3, 3)
    assert torch.equal(windows[1], F.pad(maps[0, :4, 3:], (0, 0, 0, 1)))
    assert torch.equal(window_unpartition(windows, (7, 5)), maps)


def test_a_window_as_large_as_the_grid_with_zero_tables_is_the_plain_block():
    block, tokens = small_vit().blocks[0], torch.randn(2, 35, 96)
    with torch.no_grad():
        plain = block(tokens)
        block.attn = GridAttention(block.attn, (5, 7), 7)
        assert_close(block(tokens), plain, 1e-5)
        assert block.attn.rel_pos_h.shape == (9, 8) and block.attn.rel_pos_w.shape == (13, 8)


def test_the_backbone_gives_a_checkpoints_own_features_at_its_own_size(tmp_path):
    """The reference is timm's model without class token and without the class token's position."""
    source = build_vit("vit_demo", img_size=(40, 56), patch_size=8, num_classes=3)
    torch.save({"model": source.state_dict(), "config": source.config}, tmp_path / "vit.pt")
    vit = build_vit("vit_demo", img_size=(40, 56), patch_size=8, num_classes=0)
    load_encoder(vit, read_weights(tmp_path / "vit.pt"))
    plain = build_vit("vit_demo", img_size=(40, 56), patch_size=8, num_classes=0, class_token=False)
    state = {**source.state_dict(), "pos_embed": source.pos_embed[:, 1:]}
    plain.load_state_dict({name: state[name] for name in plain.state_dict()})
    images = torch.randn(2, 3, 40, 56)
    with torch.no_grad():
        expected = plain.forward_intermediates(images, indices=[2, 11], norm=False, intermediates_only=True)
        found = ViTBackbone(vit, (40, 56), window=7, returned=(2, -1)).eval()(images)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == (2, 96, 5, 7)
        assert_close(ours, theirs, 1e-5)


def test_positions_are_resized_to_the_image_at_hand():
    vit = small_vit((40, 56))
    backbone = ViTBackbone(vit, (80, 64), global_blocks=(1, 3))
    table = backbone.pos_embed.detach().transpose(1, 2).unflatten(2, (5, 7))
    with torch.no_grad():
        assert backbone.positions().shape == (1, 96, 10, 8)
        assert_close(backbone.positions().mean(), table.mean(), 0.2)
        backbone.grid = (5, 7)
        assert torch.equal(backbone.positions(), table)


def test_blocks_that_are_recomputed_give_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        backbone = ViTBackbone(small_vit(), (40, 56), window=3, global_blocks=(1, 3), checkpointing=checkpointing)
        backbone.train()(torch.ones(1, 3, 40, 56))[0].square().mean().backward()
        grads.append([p.grad for p in backbone.parameters()])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("pyramid", [SimplePyramid, TopDownPyramid])
def test_pyramid_shapes_and_strides(pyramid):
    """The strides are 4 to 64 for patches of 16 px, on an image of 256 x 192."""
    levels = pyramid(24, 8)([torch.randn(2, 24, 16, 12)] * (4 if pyramid is TopDownPyramid else 1))
    assert {name: tuple(level.shape) for name, level in levels.items()} == {
        "p2": (2, 8, 64, 48), "p3": (2, 8, 32, 24), "p4": (2, 8, 16, 12), "p5": (2, 8, 8, 6), "p6": (2, 8, 4, 3)}


# Anchors, pooling, losses

def test_anchors_are_detectron2s():
    """They have 32 px at stride 4 to 512 px at stride 64 and ratios 1/2, 1, 2; centres are multiples of the stride."""
    images = ImageList(torch.zeros(2, 3, 128, 192), [(128, 192)] * 2)
    features = [torch.zeros(2, 1, 128 // s, 192 // s) for s in (4, 8, 16, 32, 64)]
    anchors = Anchors()(images, features)
    assert len(anchors) == 2 and torch.equal(*anchors)
    expected = []
    for stride in (4, 8, 16, 32, 64):
        for y, x, ratio in itertools.product(range(128 // stride), range(192 // stride), (0.5, 1, 2)):
            w, h = 8 * stride / math.sqrt(ratio), 8 * stride * math.sqrt(ratio)
            cx, cy = x * stride, y * stride
            expected.append((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2))
    assert_close(anchors[0], torch.tensor(expected), 1e-6)


def slow_pool(feature, box, scale, size):
    """Compute aligned ROIAlign of one box (4,) in a map (C, h, w), sample by sample."""
    x1, y1, x2, y2 = (v * scale - 0.5 for v in box)
    out = np.zeros((feature.shape[0], size, size))
    steps = [max(1, math.ceil((b - a) / size)) for a, b in ((y1, y2), (x1, x2))]
    for i, j in itertools.product(range(size), range(size)):
        for p, q in itertools.product(range(steps[0]), range(steps[1])):
            y = y1 + (i + (p + 0.5) / steps[0]) * (y2 - y1) / size
            x = x1 + (j + (q + 0.5) / steps[1]) * (x2 - x1) / size
            out[:, i, j] += bilinear(feature, y, x) / (steps[0] * steps[1])
    return out


def bilinear(feature, y, x):
    """Interpolate the map (C, h, w); beyond the outermost centres it is constant for a pixel, then 0."""
    h, w = feature.shape[1:]
    if not (-1 <= y <= h and -1 <= x <= w):
        return np.zeros(feature.shape[0])
    y, x = min(max(y, 0), h - 1), min(max(x, 0), w - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, h - 1), min(left + 1, w - 1)
    a, b = y - top, x - left
    return ((1 - a) * (1 - b) * feature[:, top, left] + (1 - a) * b * feature[:, top, right]
            + a * (1 - b) * feature[:, bottom, left] + a * b * feature[:, bottom, right])


def test_pooling_is_aligned_and_each_box_comes_from_the_level_of_its_size():
    features = {f"p{k}": torch.randn(2, 3, 512 // 2**k, 512 // 2**k) for k in (2, 3, 4, 5, 6)}
    boxes = [torch.tensor([[3.3, 5.1, 40.2, 31.9], [0, 0, 500, 480]]),
             torch.tensor([[10, 20, 150.5, 160], [100, 90, 330, 340], [-3, -2, 6, 9.0]])]
    pool = AlignedPool(7, 16)
    assert pool.level(torch.cat(boxes)).tolist() == [0, 3, 1, 2, 0]
    pooled = pool(features, boxes)
    each = [(0, box) for box in boxes[0]] + [(1, box) for box in boxes[1]]
    for found, (image, box), level in zip(pooled, each, (0, 3, 1, 2, 0), strict=True):
        feature = features[f"p{level + 2}"][image].numpy().astype(np.float64)
        assert_close(found, slow_pool(feature, box.double().numpy(), 1 / 2 ** (level + 2), 7), 1e-4)


@pytest.mark.parametrize(("side", "level"), [(111, 0), (113, 1), (223, 1), (225, 2), (447, 2), (449, 3), (2000, 3)])
def test_the_level_of_a_box(side, level):
    assert AlignedPool(7, 16).level(torch.tensor([[5.0, 5.0, 5.0 + side, 5.0 + side]])).item() == level


def test_the_proposals_losses_are_l1_over_the_anchors_asked_for():
    network = ProposalNetwork(Anchors(), ProposalHead(4, 3, 2), 0.7, 0.3, 256, 0.5, {}, {}, 0.7)
    objectness, labels = torch.randn(2, 10), torch.tensor([[1.0, 0, 0, -1, 1, 0, 0, 0, -1, 0], [0.0] * 9 + [1]])
    deltas, targets = torch.randn(20, 4), torch.randn(20, 4)
    found, boxes = network.compute_loss(objectness, deltas, list(labels), list(targets.split(10)))
    flat, used = labels.flatten(), labels.flatten() >= 0  # all anchors fit into the 256 of each image
    expected = -(flat * objectness.flatten().sigmoid().log() + (1 - flat) * (1 - objectness.flatten().sigmoid()).log())
    assert_close(found, expected[used].sum() / 512, 1e-5)
    assert_close(boxes, (deltas - targets).abs()[flat == 1].sum() / 512, 1e-5)


def test_the_box_loss_is_that_of_the_labels_own_class():
    logits, deltas, targets = torch.randn(3, 3), torch.randn(3, 12), torch.randn(3, 4)
    losses = box_losses(logits, deltas, torch.tensor([0, 2, 1]), targets)
    expected = (deltas[1, 8:12] - targets[1]).abs().sum() + (deltas[2, 4:8] - targets[2]).abs().sum()
    assert_close(losses["loss_box"], expected / 3, 1e-6)
    assert_close(losses["loss_class"], -logits.log_softmax(1)[[0, 1, 2], [0, 2, 1]].mean(), 1e-6)


# Masks

def test_pasting_looks_each_pixel_up_in_the_mask():
    masks, boxes = torch.rand(2, 28, 28), torch.tensor([[3.2, -4.0, 25.7, 21.3], [10.0, 12.0, 11.5, 40.0]])
    pasted = paste_masks(masks, boxes, 30, 26)
    for mask, (x1, y1, x2, y2), found in zip(masks.numpy(), boxes.tolist(), pasted.numpy()):
        expected = np.zeros((30, 26), bool)
        padded = np.pad(mask, 1)[None]  # zeros around the mask
        for i, j in itertools.product(range(30), range(26)):
            y, x = (i + 0.5 - y1) / (y2 - y1) * 28 - 0.5, (j + 0.5 - x1) / (x2 - x1) * 28 - 0.5
            if -1 < y < 28 and -1 < x < 28:
                expected[i, j] = bilinear(padded, y + 1, x + 1)[0] >= 0.5
        assert (expected != found).sum() == 0


def test_a_mask_target_pasted_back_is_the_mask():
    y, x = torch.meshgrid(torch.arange(60), torch.arange(80), indexing="ij")
    disc = ((y - 30) ** 2 + (x - 41) ** 2 < 22**2)[None]
    other = ((y < 20) & (x < 30))[None]
    boxes = torch.tensor([[19.5, 8.5, 62.5, 51.5], [0.0, 0.0, 60.0, 40.0]])
    targets = mask_targets(torch.cat([other, disc]), boxes, torch.tensor([1, 0]), 28)
    assert set(targets.unique().tolist()) == {0.0, 1.0}
    assert targets[1, :14, :14].all() and targets[1].sum() == 14 * 14
    back = paste_masks(targets[:1], boxes[:1], 60, 80)
    assert (back & disc).sum() / (back | disc).sum() > 0.95
    assert mask_targets(disc, boxes[:0], torch.zeros(0, dtype=torch.int64), 28).shape == (0, 28, 28)


# The whole detector

def small_detector(num_classes=3):
    vit = small_vit((64, 64))
    torch.manual_seed(0)
    backbone = ViTBackbone(vit, (64, 64), window=3, global_blocks=(1, 3))
    return MaskRCNN(backbone, SimplePyramid(96, 8), num_classes, {}, channels=8, hidden=16, anchors=16, rois=16,
                    proposals=20)


def target(*boxes):
    masks = torch.zeros(len(boxes), 64, 64, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes):
        mask[y1:y2, x1:x2] = True
    return {"boxes": torch.tensor(boxes).float().view(-1, 4), "masks": masks,
            "labels": torch.ones(len(boxes), dtype=torch.int64)}


@pytest.mark.parametrize("targets", [(target((5, 5, 30, 40)), target()), (target(), target())],
                         ids=["one image empty", "both empty"])
def test_images_without_objects_have_finite_losses_and_reach_every_parameter(targets):
    """Without a gradient for every parameter, ranks would wait for each other."""
    model = small_detector().train()
    losses = model(torch.randn(2, 3, 64, 64), [(64, 64), (50, 64)], list(targets))
    assert set(losses) == {"loss_objectness", "loss_rpn_box_reg", "loss_class", "loss_box", "loss_mask"}
    assert all(loss.isfinite() for loss in losses.values())
    if not any(len(one["boxes"]) for one in targets):
        assert losses["loss_box"] == losses["loss_mask"] == losses["loss_rpn_box_reg"] == 0
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_what_lies_in_the_padding_does_not_matter():
    model, images = small_detector().eval(), torch.randn(2, 3, 64, 64)
    spoilt = images.clone()
    spoilt[1, :, 50:] = spoilt[1, :, :, 40:] = 99.0
    sizes = [(64, 64), (50, 40)]
    assert torch.equal(zero_padding(spoilt, sizes), zero_padding(images, sizes))
    assert zero_padding(images, sizes)[1, :, :50, :40].equal(images[1, :, :50, :40])
    with torch.no_grad():
        for ours, theirs in zip(model(images, sizes), model(spoilt, sizes), strict=True):
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)
            assert ours["masks"].shape[1:] == (28, 28)
