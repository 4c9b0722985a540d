"""Measures of scores and features: a classifier's hits, the vote of nearest neighbours, spread and effective rank."""
import torch
import torch.nn.functional as F

from common.watch import progress


def hits(scores, labels, k):
    """Compute how surely each label is among the k highest scores: scores (B, C), labels (B,) -> (B,) in 0..1.

    It is 1 or 0, but where the label's score is tied across rank k: there it is the label's chance if ties are broken
    at random. So equal scores of all classes give k / C, whatever the labels, and not the share of the first class.
    """
    own = scores.gather(1, labels.unsqueeze(1))
    above, tied = (~(scores <= own)).sum(dim=1), (scores == own).sum(dim=1)  # not <=: a NaN is above
    return ((k - above) / tied.clamp(min=1)).clamp(0, 1)


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


def spread(features):
    """Standard deviation of L2-normalised features (N, D) over the images, times sqrt(D), averaged over dimensions: a
    float, 0 where all images have the same feature, about 1 where they are uniform on the sphere.
    """
    return F.normalize(features, dim=1).std(dim=0, correction=0).mean().item() * features.shape[1] ** 0.5


def effective_rank(features):
    """RankMe of features (N, D): exp of the entropy of their singular values, normalised to a sum of 1. A float from 1,
    where all features are multiples of one, to min(N, D), where all singular values are equal.
    """
    values = torch.linalg.svdvals(features.double())
    shares = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
    return torch.special.entr(shares).sum().exp().item()
