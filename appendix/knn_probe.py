"""kNN probe: accuracy of a weighted nearest-neighbour vote on frozen features (the protocol of DINO).

    python appendix/knn_probe.py --init outputs/pretrain_mae/RUN/weights.pt                  # on generated images
    python appendix/knn_probe.py --init FILE --preset small --data-path DIR
    torchrun --nproc-per-node=8 appendix/knn_probe.py --init FILE --data-path IMAGENET

Takes seconds once the features are computed, which happens only once. Each of the k most similar training images
(cosine) votes for its class with weight exp(similarity / T); a class without votes never counts as an answer. No source
gives kNN accuracies for the paper's models. Writes outputs/knn_probe/<data>-<model>-<weights>-<hash>.json.
"""
import torch

from appendix.features import add_arguments, add_execution, build_encoder, cached_features
from appendix.probes import check_save_to, write_result
from common import distributed, entry, options
from common.data import load_sets
from common.errors import UserError
from common.measures import knn_accuracy
from common.ranges import Float, Int
from sec3_benchmark.evaluate import count_classes

READS = "labels"
PRESETS = {"demo": dict(data="fractals"), "laptop": dict(data="folder"), "small": dict(data="folder")}


def build_parser():
    parser = add_arguments(options.make_parser(__doc__))
    parser.add_argument("--k", type=Int(1), default=20, help="neighbours that vote")
    parser.add_argument("--temperature", type=Float(1e-6), default=0.07,
                        help="T; a smaller one gives near neighbours more weight")
    parser.add_argument("--seed", type=Int(0), default=0, help="nothing is random here; tables pass it to every stage")
    add_execution(parser, save_to="also copy the probed weights to this file, for a row's next stage")
    return parser


def main(args):
    """Measure and write the accuracy; return {"top1", "top5", "checkpoint": the probed weights, ...}."""
    check_save_to(args)
    device = distributed.start_process_group(args.device)
    encoder, fingerprint, args = build_encoder(args, device)
    train_set, val_set = load_sets(args)
    num_classes = count_classes(train_set)
    if args.k > len(train_set):
        raise UserError(f"--k {args.k}: the training set has {len(train_set)} images")
    train, val = (cached_features(encoder, fingerprint, images, args, device, args.fresh).to(device)
                  for images in (train_set, val_set))
    labels, targets = (torch.as_tensor(images.labels).to(device) for images in (train_set, val_set))
    result = knn_accuracy(train, labels, val, targets, num_classes, args.k, args.temperature)
    return write_result("knn_probe", args, fingerprint, (train_set, val_set), result)


if __name__ == "__main__":
    entry.run_script(main, build_parser(), PRESETS)
