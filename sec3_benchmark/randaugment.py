"""Training views of supervised training and fine-tuning on ImageNet-1k (Appendix A.1): crop, flip, RandAugment."""
import re

from PIL import Image
from timm.data import auto_augment
from torchvision.transforms import Compose

from common.augment import RandomFlip, RandomResizedCrop
from common.errors import UserError
from common.images import contiguous, from_pillow, to_pillow
from common.vit import pair

FILL = (124, 116, 104)  # round(255 * ImageNet mean): colour that geometric operations show outside the image
RANDAUGMENT = "rand-m10-mstd0.5-inc1"  # of the improved recipe; the original recipe has m9


def train_transform(size, scale=(0.08, 1.0), randaugment=RANDAUGMENT):
    """Build the training transform: crop, flip, RandAugment (None: without), in timm's order.

    There is no colour jitter: timm disables it when RandAugment is on, so the jitter of 0.3 in the published recipe
    never had an effect.
    """
    steps = [RandomResizedCrop(size, scale), RandomFlip()]
    if randaugment is None:
        return Compose([*steps, contiguous])
    return Compose([require_colour, *steps, to_pillow, rand_augment(randaugment, size), from_pillow])


def rand_augment(config, size):
    """Build timm's RandAugment for PIL RGB images from a string such as "rand-m10-mstd0.5-inc1".

    It samples 2 of 15 operations with replacement and applies each with probability 0.5 at a magnitude N(m, mstd)
    clipped to [0, 10]. Raises UserError for a malformed string; timm would silently ignore the part it cannot parse.

    timm 1.0.31 was compared line by line with the authors' 0.4.12: for such strings, operations, magnitudes and random
    numbers are the same, and 8,800 images with equal seeds had equal pixels. Two differences have no effect here:
    Color, Contrast, Brightness and Sharpness are limited to a factor of 0.1 (before: 2e-17 less), and inc0 is no longer
    read as inc1. Pillow's Posterize did change, see `posterize`.
    """
    if not re.fullmatch(r"rand(-(m\d+|n\d+|mstd\d+(\.\d+)?|inc[01]))*", config):
        raise UserError(f"RandAugment is written like {RANDAUGMENT!r} (m, n, mstd, inc, each with its number), "
                        f"not {config!r}; to go without it: --randaugment none")
    # translate_const (pixels) is set as in timm's create_transform, but these operations translate by a relative amount
    settings = {"translate_const": int(min(pair(size)) * 0.45), "img_mean": FILL,
                "interpolation": Image.Resampling.BICUBIC}
    transform = auto_augment.rand_augment_transform(config, settings)
    for op in transform.ops:
        if op.aug_fn is auto_augment.posterize:
            op.aug_fn = posterize  # in this object only: timm's own table is not changed
    return transform


def posterize(image, bits_to_keep, **kwargs):
    """Posterize as timm does, but return a black image for 0 bits, as Pillow did when the paper was written.

    Magnitude 10 means 0 bits, and at m10 half of the sampled magnitudes are clipped to 10, so about one training image
    in 30 is black. Pillow 13 raises an error for 0 bits.
    """
    if bits_to_keep == 0:
        return Image.new(image.mode, image.size)
    return auto_augment.posterize(image, bits_to_keep, **kwargs)


def require_colour(image):
    """Return the image (C, H, W). Raises UserError unless C is 3: half of the operations need RGB."""
    if len(image) != 3:
        raise UserError(f"RandAugment needs images of 3 channels, and this one has {len(image)}: pass --randaugment "
                        f"none")
    return image
