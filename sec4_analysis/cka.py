"""Centred kernel alignment between layers (Section 4.1, Appendix A.6; Nguyen et al. 2021), linear kernel.

Over mini-batches of n images, with features X and Y, and K = X X^T and L = Y Y^T with diagonals set to zero:

    HSIC1(K, L) = [ tr(K L) + (1'K1)(1'L1) / ((n-1)(n-2)) - 2/(n-2) 1'K L1 ] / (n (n-3))
    CKA(X, Y)   = mean HSIC1(K, L) / sqrt( mean HSIC1(K, K) * mean HSIC1(L, L) ),  means over mini-batches

HSIC1 is the unbiased estimator of HSIC. It equals an inner product (Szekely & Rizzo 2014):

    HSIC1(K, L) = <K~, L~> / (n (n-3)),  K~ the U-centred K

So each layer's Gram matrix is computed and centred once, and all pairs of layers take one matrix product. In this form
rounding cannot make HSIC1(K, K) negative, which it can in the first form.
"""
import torch

from common.errors import UserError


def centred_gram(X: torch.Tensor) -> torch.Tensor:
    """Compute the U-centred Gram matrix K~ of a layer on a batch: features (n, ...) -> (n, n) float64, diagonal 0.

        K~_ij = K_ij - r_i / (n-2) - r_j / (n-2) + r / ((n-1)(n-2)) for i != j,  r_i row sums of K, r their sum

    Features are flattened per image and multiplied in float32. Their mean over images is subtracted first: that does
    not change K~, but reduces rounding errors. Raises UserError for fewer than 4 images.
    """
    n = len(X)
    if n < 4:
        raise UserError(f"unbiased HSIC needs at least 4 images at once, not {n}: choose a larger --batch-size")
    X = X.flatten(1).float()
    X = X - X.mean(dim=0)
    K = (X @ X.T).double().fill_diagonal_(0)
    r = K.sum(dim=1)
    centred = K - (r.unsqueeze(0) + r.unsqueeze(1)) / (n - 2) + r.sum() / ((n - 1) * (n - 2))
    return centred.fill_diagonal_(0)


def hsic(K: torch.Tensor, L: torch.Tensor) -> torch.Tensor:
    """Compute HSIC1 of all pairs of layers from their centred Gram matrices: (Lx, n, n), (Ly, n, n) -> (Lx, Ly)."""
    n = K.shape[-1]
    return K.flatten(1) @ L.flatten(1).T / (n * (n - 3))


def minibatch_cka(batches) -> torch.Tensor:
    """Compute the CKA of all pairs of layers: (Lx, Ly), float64.

    batches: an iterable of pairs of centred Gram matrices (Lx, n, n), (Ly, n, n). Batches are weighted by their number
    of images n, so that a smaller last batch does not bias the means. Raises UserError for a layer with constant
    features.
    """
    hsic_kl, hsic_kk, hsic_ll = 0.0, 0.0, 0.0
    for K, L in batches:
        n = K.shape[-1]
        hsic_kl = hsic_kl + n * hsic(K, L)
        hsic_kk = hsic_kk + n * hsic(K, K).diagonal()  # each layer with itself
        hsic_ll = hsic_ll + n * hsic(L, L).diagonal()
    if (hsic_kk == 0).any() or (hsic_ll == 0).any():
        raise UserError("a layer gives every image the same features, so its similarity to others is not defined")
    return hsic_kl / torch.outer(hsic_kk, hsic_ll).sqrt()
