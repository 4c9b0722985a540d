"""appendix/few_shots.py: draws, the classifier's minimum, accuracy on clusters that can be told apart."""
import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from appendix import few_shots
from common.errors import UserError


def test_draws_are_balanced_reproducible_and_different():
    labels = np.repeat([0, 1, 2], [7, 5, 9])
    first = few_shots.drawn(labels, 5, seed=0, number=0)
    assert np.bincount(labels[first]).tolist() == [5, 5, 5] and len(set(first)) == 15
    assert (first == few_shots.drawn(labels, 5, 0, 0)).all()
    assert set(first) != set(few_shots.drawn(labels, 5, 0, 1)) and set(first) != set(few_shots.drawn(labels, 5, 1, 0))
    with pytest.raises(UserError, match="class number 1 has only 5"):
        few_shots.drawn(labels, 6, 0, 0)


def test_the_classifier_is_at_the_minimum_that_another_optimizer_finds():
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(30, 4)), np.arange(30) % 3

    def objective(parameters):
        weight, bias = parameters[:12].reshape(3, 4), parameters[12:]
        scores = features @ weight.T + bias
        losses = np.log(np.exp(scores).sum(1)) - scores[np.arange(30), labels]
        return losses.sum() + (weight ** 2).sum() / 2
    theirs = minimize(objective, np.zeros(15), method="BFGS", options={"gtol": 1e-8}).x[:12].reshape(3, 4)
    ours, _ = few_shots.fit(torch.from_numpy(features), torch.from_numpy(labels))
    np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-4)


def test_more_labels_tell_more():
    generator = torch.Generator().manual_seed(0)
    labels, targets = torch.arange(300) % 3, torch.arange(600) % 3
    centres = torch.randn(3, 16, generator=generator)
    train, val = (centres[classes] + 1.5 * torch.randn(len(classes), 16, generator=generator)
                  for classes in (labels, targets))
    found = {shots: few_shots.accuracies(train, labels, val, targets, shots, draws=5, seed=0) for shots in (1, 5, 50)}
    means = [np.mean(values) for values in found.values()]
    assert 40 < means[0] < means[1] < means[2] and np.std(found[1]) > np.std(found[50])
    assert few_shots.table(found).count("±") == 3


def test_features_without_news_are_a_guess():
    """Equal features of all images: each class has its chance, and not the share of the first one."""
    labels = torch.arange(20) % 4
    same = torch.ones(20, 3)
    assert few_shots.accuracies(same, labels, same, labels, 1, draws=2, seed=0) == pytest.approx([25, 25])
