"""Predict the class of every image in a folder with a fine-tuned classifier, and measure its accuracy.

    python appendix/tools/predict.py --init classifier.pt --data-path FOLDER  # any tree of images, or one image
    python appendix/tools/predict.py --init classifier.pt --data-path DIR/val # DIR/val/<class>/: accuracy per class

Images are read as in training: upright, grey or colour as the classifier needs, also with 16 bits. If the checkpoint
names its classes and --data-path has folders of these names, accuracy is printed overall and for each class. Writes
predictions.csv with the columns file, class, probability and, if there are such folders, folder. An unreadable image is
listed with empty class and probability (an error with --on-bad-image stop). A name that begins with = + - or @, which a
spreadsheet would take for a formula, is preceded by a single quote.
"""
import csv
import io
from pathlib import Path

import torch

from appendix.tools.convert_checkpoint import add_unrecorded
from common import distributed, entry, options
from common.augment import eval_transform
from common.checkpoint import require_finite, write_atomically
from common.distributed import print0
from common.errors import UserError
from common.files import list_images
from common.images import ImageSet
from common.loader import eval_loader, on_device
from common.pretrained import read_weights
from common.ranges import Int
from common.rebuilding import load_model
from common.vit import eval_mode
from common.watch import progress
from sec3_benchmark.evaluate import say_unreadable
from sec4_analysis.activations import check_plain
from sec4_analysis.images import preprocessing


def build_parser():
    parser = options.make_parser(__doc__)
    parser.add_argument("--init", "--checkpoint", required=True, help="a classifier, in any format")
    parser.add_argument("--data-path", required=True, help="a folder, with all its subfolders, or one image")
    add_unrecorded(parser)
    parser.add_argument("--batch-size", type=Int(1), default=128, help="images at once")
    parser.add_argument("--on-bad-image", choices=("skip", "stop"), default="skip", help="skip: list it, no class")
    parser.add_argument("--workers", type=Int(-1, 256), default=-1, help="processes that load; -1: by the cores")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", default=str(options.ROOT / "outputs"), metavar="DIR")
    return parser


def find_images(path):
    """List the image itself, or all images below a folder sorted by name. Raises UserError if there are none."""
    path = Path(path)
    found = [path] if path.is_file() else [Path(file) for file in list_images(path)]
    if not found:
        raise UserError(f"--data-path {path}: " + ("no image in it" if path.is_dir() else "no such file or folder"))
    return found


@torch.inference_mode()
def predict(model, files, args, device):
    """Return the most likely class of each image and its probability, (N,) and (N,); None if an image is unreadable."""
    images = ImageSet("images", [str(file) for file in files], None, [], model.patch_embed.proj.in_channels)
    size, mean, std = preprocessing(model, args)
    loader = eval_loader(images, eval_transform(size), args.batch_size, args.workers, device,
                         on_bad_image=args.on_bad_image)
    found = []
    for batch in on_device(progress(loader, "predicting"), device, mean, std):
        best = model(batch["image"]).float().softmax(dim=1).max(dim=1)
        for number, value, bad in zip(best.indices.tolist(), best.values.tolist(), batch["bad"].tolist()):
            found.append((number, value) if bad < 0 else (None, None))
    say_unreadable(images, [index for index, (number, _) in enumerate(found) if number is None])
    return zip(*found)


def printable(name):
    """Return a name that can be printed even if it is not valid UTF-8."""
    return str(name).encode(errors="replace").decode()


def cell(text):
    """Return the text of a table cell, preceded by a single quote if a spreadsheet would take it for a formula."""
    return f"'{text}" if str(text).startswith(("=", "+", "-", "@", "\t", "\r")) else str(text)


def print_accuracy(truth, predicted):
    """Print the accuracy over all images of known class and for each class, worst first; return the former, 0..1."""
    right = {name: [a == b for a, b in zip(truth, predicted) if a == name] for name in dict.fromkeys(truth) if name}
    total, count = sum(map(sum, right.values())), sum(map(len, right.values()))
    print0(f"{100 * total / count:.2f} % of {count} images are right"
           + (f" ({len(truth) - count} lie in no folder of a class)" if count < len(truth) else "")
           + "; of each class, worst first:")
    for name, hits in sorted(right.items(), key=lambda item: sum(item[1]) / len(item[1])):
        print0(f"  {printable(name)}: {sum(hits)} of {len(hits)}")
    return total / count


def class_folders(files, root, classes):
    """Return for each image the name of its folder below `root` if it is the name of a class, otherwise ""."""
    first = [file.relative_to(root).parts[:1] for file in files]  # () if root is the image
    return [part[0] if part and part[0] in classes else "" for part in first]


def main(args):
    """Predict the images, write predictions.csv, and return {"classes", "accuracy", "file", "unreadable"}.

    classes: the predicted name for each image, "" if it is unreadable; accuracy: None if no class is known.
    """
    device, weights = distributed.start_process_group(args.device), read_weights(args.init)
    model = eval_mode(load_model(weights, num_heads=args.num_heads, img_size=args.img_size), device)
    check_plain(model, args.init)
    if not getattr(model, "num_classes", 0):
        raise UserError(f"{args.init} holds no classifier: fine-tune from it first (finetune.py or transfer.py)")
    names = weights.classes or [str(number) for number in range(model.num_classes)]
    files = find_images(args.data_path)
    path = Path(args.output) / "predictions" / "predictions.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    chosen, probabilities = predict(model, files, args, device)
    require_finite(path, {"probability": probabilities})
    predicted = ["" if number is None else names[number] for number in chosen]

    truth = class_folders(files, args.data_path, weights.classes or ())
    columns = {"file": files, "class": predicted,
               "probability": ["" if value is None else f"{value:.4f}" for value in probabilities]}
    if any(truth):
        columns["folder"] = truth
    text = io.StringIO()
    csv.writer(text).writerows([columns, *([cell(value) for value in row] for row in zip(*columns.values()))])
    write_atomically(path, lambda file: file.write(text.getvalue().encode(errors="surrogateescape")))
    read = [index for index, number in enumerate(chosen) if number is not None]
    for index in read[:10]:
        print0(f"{printable(files[index])}: {printable(predicted[index])} ({probabilities[index]:.1%})")
    of_read = [truth[index] for index in read]
    accuracy = print_accuracy(of_read, [predicted[index] for index in read]) if any(of_read) else None
    print0(f"all {len(files)} in {path}" + ("" if weights.classes else "; the file does not name its classes"))
    return {"classes": predicted, "accuracy": accuracy, "file": str(path),
            "unreadable": [str(file) for file, number in zip(files, chosen) if number is None]}


if __name__ == "__main__":
    entry.run_script(main, build_parser())
