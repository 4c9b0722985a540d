"""Centred kernel alignment between layers (Section 4.1, Appendix A.6; Nguyen et al. 2021), linear kernel.

Over mini-batches of n images, with features X and Y, and K = X X^T and L = Y Y^T with diagonals set to zero:

    HSIC1(K, L) = [ tr(K L) + (1'K1)(1'L1) / ((n-1)(n-2)) - 2/(n-2) 1'K L1 ] / (n (n-3))
    CKA(X, Y)   = mean HSIC1(K, L) / sqrt( mean HSIC1(K, K) * mean HSIC1(L, L) ),  means over mini-batches

HSIC1 is the unbiased estimator of HSIC. It equals an inner product (Szekely & Rizzo 2014): HSIC1(K, L) = <K~, L~> /
(n (n-3)), where K~ is the U-centred K. So each layer's Gram matrix is computed and centred once, and all pairs of
layers take one matrix product. In this form rounding cannot make HSIC1(K, K) negative, which it can in the first form.
"""
import torch

from common.errors import UserError


def centred_gram(features: torch.Tensor) -> torch.Tensor:
    """Compute the U-centred Gram matrix K~ of a layer on a batch: features (n, ...) -> (n, n) float64, diagonal 0.

        K~_ij = K_ij - r_i / (n-2) - r_j / (n-2) + r / ((n-1)(n-2)) for i != j,  r_i row sums of K, r their sum

    Features are flattened per image and multiplied in float32. Their mean over images is subtracted first: that does
    not change K~, but reduces rounding errors. Raises UserError for fewer than 4 images.
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


def hsic(grams_x: torch.Tensor, grams_y: torch.Tensor) -> torch.Tensor:
    """Compute HSIC1 of all pairs of layers: centred Gram matrices (Lx, n, n), (Ly, n, n) -> (Lx, Ly)."""
    n = grams_x.shape[-1]
    return grams_x.flatten(1) @ grams_y.flatten(1).T / (n * (n - 3))


def minibatch_cka(batches) -> torch.Tensor:
    """Compute the CKA of all pairs of layers: (Lx, Ly), float64.

    batches: an iterable of pairs of centred Gram matrices (Lx, n, n), (Ly, n, n). Batches are weighted by their number
    of images n, so that a smaller last batch does not bias the means. Raises UserError for a layer with constant
    features.
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


def cka(features_x, features_y) -> torch.Tensor:
    """Compute the CKA of all pairs of layers on a single batch: (Lx, Ly), float64.

    features_x, features_y: lists of layers' features (n, ...), of any widths.
    """
    return minibatch_cka([tuple(torch.stack([centred_gram(layer) for layer in layers])
                                for layers in (features_x, features_y))])
