"""The networks of Table 2 and their published numbers.

The paper's own list of networks was not available; these belong to the families that its text cites. Their numbers are
those of timm's result tables of v0.6.12, with throughput on one RTX 3090, batch 1024, automatic mixed precision, torch
1.12, CUDA 11.3. The numbers of ViT-Tiny with 12 heads and MAE-Tiny-FT are the paper's.
"""
import warnings
from typing import NamedTuple

import timm

from common.vit import build_model

DISTILLED, THREE_HEADS = "†", "⋆"


class Network(NamedTuple):
    """A row of Table 2; numbers that no source gives are None."""

    key: str  # timm's model name, or the name of a row for our models
    name: str
    marks: str = ""  # †: supervised training with distillation, ⋆: original ViT-Tiny with 3 heads
    px: int = 224  # side of the input image
    params: float | None = None  # published, millions
    top1: float | None = None  # published accuracy on ImageNet, %
    real: float | None = None  # with ReaL labels, %
    v2: float | None = None  # on ImageNetV2, %
    nhwc: int | None = None  # published throughput, images per second, channels-last memory format
    nchw: int | None = None  # the same, contiguous memory format
    ours: str = ""  # name in common/vit.py, for a model that is not timm's
    note: str = ""

    @property
    def model(self):
        """The name of the row's model; rows of ours may share one."""
        return self.ours or self.key


NETWORKS = [
    Network("mobilenetv2_100", "MobileNetV2 1.0", "", 224, 3.50, 72.956, 80.236, 60.190, 9591, 8361),
    Network("mobilenetv2_140", "MobileNetV2 1.4", "", 224, 6.11, 76.512, 83.180, 64.040, 6258, 5399),
    Network("mobilenetv3_large_100", "MobileNetV3-L", "", 224, 5.48, 75.776, 82.170, 63.360, 12956, 10295),
    Network("efficientnet_b0", "EfficientNet-B0", "", 224, 5.29, 77.700, 84.032, 66.290, 8015, 6576),
    Network("efficientnet_b1", "EfficientNet-B1", "", 256, 7.79, 78.788, 84.604, 67.470, 4273, 3743),
    Network("resnet18", "ResNet-18", "", 224, 11.69, 69.748, 77.279, 57.170, 11024, 9171),
    Network("deit_tiny_patch16_224", "DeiT-Tiny", "⋆", 224, 5.72, 72.174, 80.018, 59.850, 6855, 6794),
    Network("deit_tiny_distilled_patch16_224", "DeiT-Tiny", "†⋆", 224, 5.91, 74.512, 81.993, 62.800, 6721, 6647),
    Network("vit_tiny_patch16_224", "ViT-Tiny, IN21K labels", "⋆", 224, 5.72, 75.464, 82.076, 63.100, 6845, 6770),
    Network("pit_ti_224", "PiT-Ti", "", 224, 4.85, 72.912, 80.614, 60.970, 5764, 5988),
    Network("pit_ti_distilled_224", "PiT-Ti", "†", 224, 5.10, 74.534, 81.969, 63.140, 5792, 6026),
    Network("pit_xs_224", "PiT-XS", "", 224, 10.62, 78.190, 84.794, 66.920, 4791, 4767),
    Network("pit_xs_distilled_224", "PiT-XS", "†", 224, 11.00, 79.308, 85.659, 68.000, 4741, 4722),
    Network("levit_128s", "LeViT-128S", "†", 224, 7.78, 76.514, 83.058, 64.590, 22003, 19459),
    Network("levit_128", "LeViT-128", "†", 224, 9.21, 78.482, 84.839, 66.570, 14929, 13349),
    Network("levit_192", "LeViT-192", "†", 224, 10.95, 79.836, 85.578, 67.900, 13174, 10100),
    Network("xcit_tiny_12_p16_224.fb_in1k", "XCiT-T12/16", "", 224, 6.72, 77.124, 84.094, 65.770, 5104, 4592),
    Network("xcit_tiny_12_p16_224.fb_dist_in1k", "XCiT-T12/16", "†", 224, 6.72, 78.578, 85.215, 67.010, 5108, 4593),
    Network("xcit_tiny_24_p16_224.fb_in1k", "XCiT-T24/16", "", 224, 12.12, 79.444, 85.736, 68.440, 2731, 2457),
    Network("xcit_tiny_24_p16_224.fb_dist_in1k", "XCiT-T24/16", "†", 224, 12.12, 80.448, 86.534, 69.700, 2733, 2463),
    Network("cait_xxs24_224", "CaiT-XXS24", "†", 224, 11.96, 78.386, 85.225, 67.350, 1707, 1642),
    Network("mobilevit_xs", "MobileViT-XS", "", 256, 2.32, 74.634, 81.574, 62.930, 3095, 2982),
    Network("mobilevit_s", "MobileViT-S", "", 256, 5.58, 78.310, 84.269, 66.860, 2450, 2280),
    Network("mobilevitv2_100", "MobileViTv2-1.0", "", 256, 4.90, 78.086, 84.905, 66.590, 3028, 2711),
    Network("convit_tiny", "ConViT-Tiny", "", 224, 5.71, 73.114, 81.126, 61.560, 3290, 3179),
    Network("coat_lite_tiny", "CoaT-Lite-Tiny", "", 224, 5.72, 77.516, 84.459, 66.310, 2958, 2932),
    Network("coat_tiny", "CoaT-Tiny", "", 224, 5.50, 78.436, 84.980, 67.240, 1040, 1037),
    Network("edgenext_x_small", "EdgeNeXt-XS", "", 256, 2.34, 74.864, 81.897, 62.160, 4458, 4437),
    Network("edgenext_small", "EdgeNeXt-S", "†", 320, 5.59, 81.574, 87.504, 70.990, 2120, 2107),
    Network("mobile_former", "Mobile-Former"),
    Network("edgevit", "EdgeViT"),
    Network("scratch", "ViT-Tiny, 12 heads", "", 224, 5.7, 75.8, ours="vit_tiny",
            note="from scratch, 300 epochs, improved recipe: the paper's DeiT-Tiny"),
    Network("mae-300", "MAE-Tiny-FT, 300 ep.", "", 224, 5.7, 78.0, ours="vit_tiny",
            note="slides and code page; 77.978 when the authors' weights are evaluated"),
    Network("mae-1000", "MAE-Tiny-FT", "", 224, 5.7, 78.5, ours="vit_tiny",
            note="1000 epochs of fine-tuning, the text's number; the table in the paper has this length"),
    Network("mae-rpe", "MAE-Tiny-FT, rel. pos.", "", 224, None, 79.0, ours="vit_tiny_rpe",
            note="1000 epochs, code page: 79.002 when evaluated"),
]


def build_network(network):
    """Build a network without pre-trained weights: (model, None), or (None, reason) if timm does not have it."""
    if network.ours:
        return build_model(network.ours), None
    if not timm.is_model(network.key):
        return None, f"not in timm {timm.__version__}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecation warnings about timm's own code
        return timm.create_model(network.key, pretrained=False), None
