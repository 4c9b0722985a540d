"""Measures of scores and features: top-k hits, k-nearest-neighbour accuracy, spread and effective rank."""
import torch
import torch.nn.functional as F

from common.watch import progress


def hits(scores, labels, k):
    """Compute the probability that each label is among the k highest scores: scores (B, C), labels (B,) -> (B,).

    It is 1 or 0 unless the label's score is tied with others at the k-th place; ties count as broken at random. So a
    model that gives all classes the same score gets k / C, whatever the labels, and not the share of the first class.
    """
    own = scores.gather(1, labels.unsqueeze(1))
    above, tied = (~(scores <= own)).sum(dim=1), (scores == own).sum(dim=1)  # not scores > own: NaN counts as above
    return ((k - above) / tied.clamp(min=1)).clamp(0, 1)


def vote(train, labels, queries, num_classes, k=20, temperature=0.07, chunk=65536):
    """Score the classes for queries (Q, D) by their k nearest training features (N, D) with labels (N,): (Q, classes).

    All features have length 1. A neighbour of similarity s votes with exp(s / temperature), divided by the vote of the
    nearest; only classes without any vote have score 0. The search is exact: it goes through the training set in chunks
    and keeps the best k so far.
    """
    best = queries.new_empty(len(queries), 0)
    index = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for first in range(0, len(train), chunk):
        similarity = queries @ train[first:first + chunk].T
        places = torch.arange(first, first + similarity.shape[1], device=index.device).expand(len(queries), -1)
        candidates = torch.cat([best, similarity], dim=1)
        best, chosen = candidates.topk(min(k, candidates.shape[1]), dim=1)
        index = torch.cat([index, places], dim=1).gather(1, chosen)
    votes = torch.zeros(len(queries), num_classes, device=queries.device)
    weights = ((best - best[:, :1]) / temperature).exp()  # less the largest: exp(1 / 0.011) overflows
    return votes.scatter_add_(1, labels[index], weights.clamp(min=torch.finfo(weights.dtype).tiny))


def knn_accuracy(train, labels, queries, targets, num_classes, k=20, temperature=0.07, batch=1024):
    """Classify queries (Q, D) by their nearest training features (N, D); return {"top1", "top5"} in percent.

    Features are normalised here. labels (N,) and targets (Q,) are the classes of training features and queries.
    """
    train, queries = F.normalize(train, dim=1), F.normalize(queries, dim=1)
    correct = torch.zeros(2)
    for first in progress(range(0, len(queries), batch), "voting", unit="batch"):
        scores = vote(train, labels, queries[first:first + batch], num_classes, k, temperature)
        own = targets[first:first + batch]
        voted = scores.gather(1, own.unsqueeze(1))[:, 0] > 0
        correct += torch.stack([(hits(scores, own, rank) * voted).sum() for rank in (1, 5)]).cpu()
    return {name: 100 * value / len(queries) for name, value in zip(("top1", "top5"), correct.tolist())}


def spread(features):
    """Measure how far apart the features (N, D) of images point: 0 if all are alike, about 1 if uniform on the sphere.

    The standard deviation of the L2-normalised features over the images, averaged over dimensions, times sqrt(D).
    """
    return F.normalize(features, dim=1).std(dim=0, correction=0).mean().item() * features.shape[1] ** 0.5


def effective_rank(features):
    """Compute RankMe (Garrido et al. 2023) of features (N, D): exp of the entropy of their normalised singular values.

    From 1, if all features are multiples of one vector, to min(N, D), if all singular values are equal. The singular
    values are normalised to a sum of 1.
    """
    values = torch.linalg.svdvals(features.double())
    shares = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
    return torch.special.entr(shares).sum().exp().item()
