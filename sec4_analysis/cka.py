"""Centred kernel alignment between layers (Section 4.1, Appendix A.6; Nguyen et al. 2021), linear kernel.

Over mini-batches of n images, with K = X X^T and L = Y Y^T whose diagonals are set to zero, the unbiased estimator is

    HSIC1(K, L) = [ tr(K L) + (1'K1)(1'L1) / ((n-1)(n-2)) - 2/(n-2) 1'K L1 ] / (n (n-3))
    CKA(X, Y)   = mean HSIC1(K, L) / sqrt( mean HSIC1(K, K) * mean HSIC1(L, L) ),  means over mini-batches

The same number is an inner product (Szekely & Rizzo 2014): HSIC1(K, L) = <K~, L~> / (n (n-3)), where K~ is the
U-centred K. So each layer's matrix is made and centred once, and all pairs of layers are one matrix product. It also
keeps HSIC1(K, K) from falling below zero by rounding, which the first form does.
"""
import torch

from common.errors import UserError


def centred_gram(features):
    """K~ of one layer on one batch: features (n, ...) flattened per image -> (n, n) float64, diagonal 0.

        K~_ij = K_ij - r_i / (n-2) - r_j / (n-2) + r / ((n-1)(n-2)) for i != j,  r_i row sums, r their sum

    The products are float32, as are the features; the mean image is taken off first, which changes no K~ and spares
    the subtractions their rounding.
    """
    n = len(features)
    if n < 4:
        raise UserError(f"unbiased HSIC needs at least 4 images at once, not {n}: choose a larger --batch-size")
    features = features.flatten(1).float()
    features = features - features.mean(dim=0)
    gram = (features @ features.T).double().fill_diagonal_(0)
    rows = gram.sum(dim=1)
    centred = gram - (rows.unsqueeze(0) + rows.unsqueeze(1)) / (n - 2) + rows.sum() / ((n - 1) * (n - 2))
    return centred.fill_diagonal_(0)


def hsic(grams_x, grams_y):
    """HSIC1 of every layer with every layer: centred matrices (layers, n, n) twice -> (layers of x, layers of y)."""
    n = grams_x.shape[-1]
    return grams_x.flatten(1) @ grams_y.flatten(1).T / (n * (n - 3))


def minibatch_cka(batches):
    """CKA of all pairs of layers: (layers of x, layers of y), float64.

    batches: pairs of stacked centred matrices (layers of x, n, n), (layers of y, n, n), one pair at a time. Batches
    count by their number of images, so that an unequal last one distorts nothing.
    """
    cross, own_x, own_y = 0.0, 0.0, 0.0
    for x, y in batches:
        n = x.shape[-1]
        cross = cross + n * hsic(x, y)
        own_x = own_x + x.square().sum(dim=(1, 2)) / (n - 3)  # n times HSIC1 of each layer with itself
        own_y = own_y + y.square().sum(dim=(1, 2)) / (n - 3)
    if (own_x == 0).any() or (own_y == 0).any():
        raise UserError("a layer gives every image the same features, so its similarity to others is not defined")
    return cross / torch.outer(own_x, own_y).sqrt()


def cka(features_x, features_y):
    """All images as one batch: lists of layers (n, ...), of any widths -> (layers of x, layers of y), float64."""
    return minibatch_cka([tuple(torch.stack([centred_gram(layer) for layer in layers])
                                for layers in (features_x, features_y))])
