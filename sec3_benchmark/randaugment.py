"""The views of training and fine-tuning on ImageNet-1k (Appendix A.1): crop, flip, RandAugment on Pillow's images."""
import re

from PIL import Image
from timm.data import auto_augment
from torchvision.transforms import Compose

from common.augment import RandomFlip, RandomResizedCrop
from common.errors import UserError
from common.images import contiguous, from_pillow, to_pillow
from common.vit import pair

FILL = (124, 116, 104)  # round(255 * ImageNet mean): what geometric operations show outside the image
RANDAUGMENT = "rand-m10-mstd0.5-inc1"  # the improved recipe; the default recipe has m9


def train_transform(size, scale=(0.08, 1.0), randaugment=RANDAUGMENT):
    """Crop, flip, RandAugment (None: without), in timm's order. There is no colour jitter, since timm drops it
    wherever RandAugment is on: the jitter of 0.3 in the published recipe never had an effect."""
    steps = [RandomResizedCrop(size, scale), RandomFlip()]
    if randaugment is None:
        return Compose([*steps, contiguous])
    return Compose([require_colour, *steps, to_pillow, rand_augment(randaugment, size), from_pillow])


def rand_augment(config, size):
    """timm's RandAugment for PIL RGB images, such as "rand-m10-mstd0.5-inc1": 2 of 15 operations, drawn with
    replacement, each executed with probability 0.5 at a magnitude N(m, mstd) clipped to [0, 10].

    timm 1.0.31 held line by line against the authors' 0.4.12, for such a string: operations, levels and draws are the
    same, and so were the pixels of 8,800 images on equal seeds. (Color, Contrast, Brightness and Sharpness now stop at
    a factor of 0.1, where 1 - 0.9 was 2e-17 less; inc0 is no longer read as inc1.) What changed is Pillow, under
    Posterize: hence `posterize`. timm passes over a section that it cannot read ("mstd" without its number) in
    silence, so the whole string is checked here.
    """
    if not re.fullmatch(r"rand(-(m\d+|n\d+|mstd\d+(\.\d+)?|inc[01]))*", config):
        raise UserError(f"RandAugment is written like {RANDAUGMENT!r} (m, n, mstd, inc, each with its number), "
                        f"not {config!r}; to go without it: --randaugment none")
    # translate_const, in pixels, is set as timm's factory does; the Translate operations here are the relative ones.
    settings = {"translate_const": int(min(pair(size)) * 0.45), "img_mean": FILL,
                "interpolation": Image.Resampling.BICUBIC}
    transform = auto_augment.rand_augment_transform(config, settings)
    for op in transform.ops:
        if op.aug_fn is auto_augment.posterize:
            op.aug_fn = posterize  # of this object only: timm's table of operations stays as it is
    return transform


def posterize(image, bits_to_keep, **kwargs):
    """timm's posterize, with a black image for 0 bits, as the Pillow of the paper's day made it. Magnitude 10 asks for
    0 bits, and at m10 half of the draws are clipped to 10: about one training image in 30 is black. Pillow 13
    raises there."""
    if bits_to_keep == 0:
        return Image.new(image.mode, image.size)
    return auto_augment.posterize(image, bits_to_keep, **kwargs)


def require_colour(image):
    """The image itself, or an error: half of RandAugment's operations mean nothing outside RGB."""
    if len(image) != 3:
        raise UserError(f"RandAugment needs images of 3 channels, and this one has {len(image)}: pass --randaugment "
                        f"none")
    return image
