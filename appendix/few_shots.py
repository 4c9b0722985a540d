"""Linear probing with few labels: k images of each class, drawn several times.

Fits logistic regression on standardised features with the usual L2 penalty (C = 1) to its minimum. There is no learning
rate to choose, and only the draw of the images is random.
"""
import numpy as np
import torch
import torch.nn.functional as F

from common import report
from common.errors import UserError
from common.measures import hits
from sec3_benchmark.subsets import draw


def drawn(labels, shots, seed, number):
    """Draw the indices of `shots` images of each class from labels (N,). Raises UserError if a class has fewer."""
    counts = np.bincount(labels)
    if counts.min() < shots:
        raise UserError(f"--shots {shots}: class number {counts.argmin()} has only {counts.min()} training images")
    return draw(labels, np.full(len(counts), shots), (seed, number))


def fit(features, labels, iterations=200):
    """Minimise sum of cross-entropies + |W|^2 / 2 by L-BFGS; return W (C, D), b (C,). features (N, D), labels (N,)."""
    classes = int(labels.max()) + 1
    weight = torch.zeros(classes, features.shape[1], dtype=features.dtype, device=features.device, requires_grad=True)
    bias = torch.zeros(classes, dtype=features.dtype, device=features.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=iterations, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        loss = F.cross_entropy(features @ weight.T + bias, labels, reduction="sum") + weight.square().sum() / 2
        loss.backward()
        return loss
    optimizer.step(objective)
    return weight.detach(), bias.detach()


def accuracies(train, labels, val, targets, shots, draws, seed):
    """Return the top-1 accuracy in percent of each of several draws.

    train (N, D), labels (N,): features and labels to draw from. val (M, D), targets (M,): those to evaluate on.
    """
    found = []
    for number in range(draws):
        chosen = torch.from_numpy(drawn(labels.cpu().numpy(), shots, seed, number)).to(train.device)
        few = train[chosen].double()
        mean, deviation = few.mean(dim=0), few.std(dim=0, correction=0) + 1e-6
        weight, bias = fit((few - mean) / deviation, labels[chosen])
        scores = (val.double() - mean) / deviation @ weight.T + bias
        found.append(100 * hits(scores, targets, 1).mean().item())
    return found


def table(found):
    """Format {shots: [top-1 of each draw]} as Markdown."""
    return report.markdown(["images a class", "top-1", "draws"],
                           [[shots, report.mean_std(values), len(values)] for shots, values in found.items()])
