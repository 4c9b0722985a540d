"""Accuracy of a weighted nearest-neighbour vote on frozen features (the protocol of DINO).

    python appendix/knn_probe.py --init outputs/pretrain_mae/RUN/weights.pt                  # on generated images
    python appendix/knn_probe.py --init FILE --preset small --data-path DIR
    torchrun --nproc-per-node=8 appendix/knn_probe.py --init FILE --data-path IMAGENET

Seconds after the features, which are computed once. Each of the k most similar training images (cosine) votes for its
class with weight exp(similarity / T); a class without a vote is no answer. No source gives the paper's models' kNN
accuracy. Writes outputs/knn_probe/<data>-<model>-<weights>-<hash>.json.
"""
import torch
import torch.nn.functional as F

from appendix.features import add_arguments, add_execution, build_encoder, cached_features
from appendix.probes import check_save_to, write_result
from common import distributed, entry, options
from common.data import load_sets
from common.errors import UserError
from common.ranges import Float, Int
from common.watch import progress
from sec3_benchmark.evaluate import count_classes, hits

READS = "labels"
PRESETS = {"demo": dict(data="fractals"), "laptop": dict(data="folder"), "small": dict(data="folder")}


def build_parser():
    parser = add_arguments(options.make_parser(__doc__))
    parser.add_argument("--k", type=Int(1), default=20, help="neighbours that vote")
    parser.add_argument("--temperature", type=Float(1e-6), default=0.07,
                        help="T; the smaller, the more the nearest count")
    parser.add_argument("--seed", type=Int(0), default=0, help="nothing is random here; tables pass it to every stage")
    add_execution(parser, save_to="also copy the probed weights to this file, for a row's next stage")
    return parser


def vote(train, labels, queries, num_classes, k=20, temperature=0.07, chunk=65536):
    """Scores (Q, classes) of queries (Q, D) from training features (N, D) and labels (N,), all rows of length 1; the
    nearest neighbour's vote is 1, and only a class without a vote has 0. Exact: the training set passes by in chunks,
    of which the best k so far are kept.
    """
    best = queries.new_empty(len(queries), 0)
    index = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for first in range(0, len(train), chunk):
        similarity = queries @ train[first:first + chunk].T
        places = torch.arange(first, first + similarity.shape[1], device=index.device).expand(len(queries), -1)
        best, chosen = torch.cat([best, similarity], dim=1).topk(min(k, index.shape[1] + similarity.shape[1]), dim=1)
        index = torch.cat([index, places], dim=1).gather(1, chosen)
    votes = torch.zeros(len(queries), num_classes, device=queries.device)
    weights = ((best - best[:, :1]) / temperature).exp()  # less the largest: exp(1 / 0.011) is no float32
    return votes.scatter_add_(1, labels[index], weights.clamp(min=torch.finfo(weights.dtype).tiny))


def knn_accuracy(train, labels, queries, targets, num_classes, k=20, temperature=0.07, batch=1024):
    """{"top1", "top5"} in percent of queries (Q, D) with targets (Q,); features of any length."""
    train, queries = F.normalize(train, dim=1), F.normalize(queries, dim=1)
    correct = torch.zeros(2)
    for first in progress(range(0, len(queries), batch), "voting", unit="batch"):
        scores = vote(train, labels, queries[first:first + batch], num_classes, k, temperature)
        own = targets[first:first + batch]
        voted = scores.gather(1, own.unsqueeze(1))[:, 0] > 0
        correct += torch.stack([(hits(scores, own, rank) * voted).sum() for rank in (1, 5)]).cpu()
    return {name: 100 * value / len(queries) for name, value in zip(("top1", "top5"), correct.tolist())}


def main(args):
    """Returns {"top1", "top5", "checkpoint": the weights that were probed, ...}."""
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
