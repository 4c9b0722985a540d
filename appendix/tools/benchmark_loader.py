"""Benchmark of the loader, from files to batches, for appendix/tools/benchmark_throughput.py.

The baseline is torchvision's ImageFolder, which decodes with Pillow and applies the same transforms to Pillow images;
both take turns in the same run. Each produces what it copies to the device: ours uint8 pixels, which the device
normalises, ImageFolder normalised floats. Both read the original files. Rows "small" read copies made by
shrink_folder.py with our loader, and compare with ImageFolder on the originals.
"""
import statistics
import tempfile
from pathlib import Path

from PIL import Image
from torch.utils.data import DataLoader, RandomSampler
from torchvision import datasets, transforms
from torchvision.transforms import InterpolationMode

from appendix import pretrain_dino
from appendix.tools import shrink_folder
from appendix.tools.benchmarking import in_turns, median_ratio
from common import options
from common.augment import eval_transform, pretrain_transform
from common.data import labelled_folder
from common.distributed import print0
from common.fractals import draw_fractals
from common.loader import Views, data_loader, step_batches
from common.optim import steps_per_epoch
from sec3_benchmark import pretrain_mocov3
from sec3_benchmark.moco import GaussianBlur, colour_jitter
from sec3_benchmark.randaugment import RANDAUGMENT, rand_augment, train_transform

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMALL_CROPS = 8  # of DINO
VIEWS = ("MAE", "evaluation", "fine-tuning impr.", "MoCo-v3", "DINO")


def defaults(script, size):
    """Return the paper's settings of a pre-training script, with another image size."""
    words = ["--preset", "paper", "--data-path", "here", "--img-size", str(size)]
    return options.resolve(options.parse(script.build_parser(), argv=words))


def small_crop(size):
    """Return the side of DINO's small crops: 96 px of 224, in proportion to the image and a multiple of 16."""
    return 96 * size // 224 // 16 * 16 or 16


def our_views(size):
    """Return {view: our transform}."""
    dino = defaults(pretrain_dino, size)
    dino.local_size = small_crop(size)
    return {"MAE": pretrain_transform(size, interpolation="bicubic"),
            "evaluation": eval_transform(size),
            "fine-tuning impr.": train_transform(size),
            "MoCo-v3": pretrain_mocov3.MoCoViews(defaults(pretrain_mocov3, size)),
            "DINO": pretrain_dino.crops_of(dino)}


class Several:
    """A transform from an image to a tuple of views, picklable for the workers."""

    def __init__(self, transforms_):
        self.transforms = transforms_

    def __call__(self, image):
        return tuple(transform(image) for transform in self.transforms)


def pillow_views(size):
    """Return {view: the same transform by torchvision on Pillow images, as in the authors' code}."""
    finish = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    flip, grey = transforms.RandomHorizontalFlip(), transforms.RandomGrayscale(0.2)

    def crop(size, scale=(0.08, 1.0), mode="bicubic"):
        return transforms.RandomResizedCrop(size, scale, interpolation=InterpolationMode(mode))

    def moco(blur, solarize):
        return transforms.Compose([crop(size, mode="bilinear"), colour_jitter(), GaussianBlur(blur), grey, flip,
                                   transforms.RandomSolarize(128, solarize), *finish])

    def dino(size, scale, blur, solarize):
        return transforms.Compose([crop(size, scale), flip, colour_jitter(), grey, GaussianBlur(blur),
                                   transforms.RandomSolarize(128, solarize), *finish])

    resize = transforms.Resize(round(size / 0.875), InterpolationMode.BICUBIC)
    large = [dino(size, (0.4, 1.0), 1.0, 0.0), dino(size, (0.4, 1.0), 0.1, 0.2)]
    small = [dino(small_crop(size), (0.05, 0.4), 0.5, 0.0)] * SMALL_CROPS
    return {"MAE": transforms.Compose([crop(size), flip, *finish]),
            "evaluation": transforms.Compose([resize, transforms.CenterCrop(size), *finish]),
            "fine-tuning impr.": transforms.Compose([crop(size), flip, rand_augment(RANDAUGMENT, size), *finish]),
            "MoCo-v3": Several([moco(1.0, 0.0), moco(0.1, 0.2)]),
            "DINO": Several(large + small)}


def ours(folder, transform, steps, args, device):
    """Return a function that reads `steps` batches of a class folder as training does, in several epochs if needed."""
    views = Views(labelled_folder(folder, 3, "folder"), transform, seed=0)
    steps_per_epoch(views.images, args.batch_size)  # raises UserError if there is no whole batch

    def read():
        keys = step_batches(len(views.images), batch_size=args.batch_size, accumulation=1, seed=0, start_step=0,
                            total_steps=steps)
        for _ in data_loader(views, keys, args.workers, device):
            pass
    return read


def image_folders(folder, transform, steps, args):
    """Return a function that does the same with torchvision, whose worker processes also start once per call."""
    images = datasets.ImageFolder(folder, transform)

    def read():
        order = RandomSampler(images, num_samples=steps * args.batch_size)  # several epochs if needed
        for _ in DataLoader(images, args.batch_size, sampler=order, num_workers=args.workers):
            pass
    return read


def generated_folder(folder, count=1000, size=256):
    """Write `count` fractals as JPEGs into class folders; return the folder."""
    for first in range(0, count, 50):
        target = Path(folder) / f"class{first // 50:02d}"
        target.mkdir(parents=True)
        for index, image in enumerate(draw_fractals(0, [first // 50] * 50, list(range(50)), size, size)):
            Image.fromarray(image).save(target / f"{index}.jpg", quality=90)
    return folder


def measure(args, device):
    """Measure every view on original and shrunk files; return one row per view and source.

    A row has "view", "source", "images", "ours_images_per_second", "imagefolder_images_per_second" and "ratio".
    """
    with tempfile.TemporaryDirectory() as scratch:
        full = args.data_path or generated_folder(f"{scratch}/full")
        small = f"{scratch}/small"
        shrink_folder.main(options.parse(shrink_folder.build_parser(),
                                         argv=["--data-path", str(full), "--output", small]))
        steps = -(-args.num_images // args.batch_size)
        rows, mine, theirs = [], our_views(args.img_size), pillow_views(args.img_size)
        for view in args.views or VIEWS:
            times = in_turns({"full": ours(full, mine[view], steps, args, device),
                              "small": ours(small, mine[view], steps, args, device),
                              "ImageFolder": image_folders(full, theirs[view], steps, args)}, args.pairs)
            count = steps * args.batch_size
            for source in ("full", "small"):
                ratio = median_ratio(times["ImageFolder"], times[source])
                rows.append({"view": view, "source": source, "ratio": ratio, "images": count,
                             "ours_images_per_second": count / statistics.median(times[source]),
                             "imagefolder_images_per_second": count / statistics.median(times["ImageFolder"])})
                print0(rows[-1])
    return rows
