"""Attention distance and attention entropy of a head (Section 4.2), from its logits A before the softmax.

For head h and token j, with P = softmax(A) and G_ij the distance between the centres of patches i and j:

    D_hj =   sum_i P_hij G_ij              attention distance, pixels
    E_hj = - sum_i P_hij log P_hij         attention entropy, nats

Both are then averaged over j and over images. The paper does not say which index is the query; here j is the query, and
the softmax and the sums run over the keys i, as in the authors' code. The class token has no position in the image, so,
again as in the authors' code, prefix tokens are removed before the softmax (equivalently: after it, with each row
rescaled to sum to 1). Uniform attention over 14 x 14 patches of 16 px has distance 116.49 px and entropy
ln 196 = 5.278. The authors' code takes a patch for 14 px, whatever its size, and gives 101.93.
"""
import torch
import torch.nn.functional as F
from timm.models import beit

AUTHORS_PATCH_SIZE = (14.0, 14.0)  # height and width in pixels


def attention_logits(attention: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Compute A = q k^T / sqrt(head dim), before the softmax: tokens (B, N, D) -> (B, heads, N, N).

    attention: a timm Attention, plain or Beit's; tokens: its input, the block's norm1 output. Of a plain one's qkv only
    the rows of q and k are used, so it may be without those of v. Beit's relative position bias is part of A, except a
    table that all blocks share, which the caller adds.
    """
    B, N, _ = tokens.shape
    if isinstance(attention, beit.Attention):
        bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
        q, k, _ = (attention.qkv(tokens) + bias).view(B, N, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        A = (q * attention.scale) @ k.transpose(-2, -1)
        return A if attention.relative_position_bias_table is None else A + attention._get_rel_pos_bias()
    rows, bias = 2 * attention.num_heads * attention.head_dim, attention.qkv.bias
    qk = F.linear(tokens, attention.qkv.weight[:rows], None if bias is None else bias[:rows])
    q, k = qk.view(B, N, 2, attention.num_heads, -1).permute(2, 0, 3, 1, 4)  # each (B, heads, N, head dim)
    return (attention.q_norm(q) * attention.scale) @ attention.k_norm(k).transpose(-2, -1)


def patch_distances(grid, patch_size) -> torch.Tensor:
    """Compute G, the distances between the centres of all pairs of patches: (L, L), in the unit of patch_size.

    grid: (rows, columns); patch_size: (height, width). Patches are in row-major order.
    """
    rows, columns = (torch.arange(n, dtype=torch.float64) * size for n, size in zip(grid, patch_size))
    centres = torch.cartesian_prod(rows, columns)  # (L, 2)
    return torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist").float()  # exact differences


def attention_weights(A: torch.Tensor, prefix=1, keep_prefix=False) -> torch.Tensor:
    """Compute P = softmax(A) of the query patches in float32, each query's weights summing to 1.

    A: logits (B, heads, N, N) of N = `prefix` + L tokens, prefix tokens first. Returns (B, heads, L, L), queries before
    keys; with keep_prefix (B, heads, L, N), prefix tokens among the keys.
    """
    keys = 0 if keep_prefix else prefix
    return A[:, :, prefix:, keys:].float().softmax(dim=-1)


def attention_distance(P: torch.Tensor, G: torch.Tensor) -> torch.Tensor:
    """Compute each head's attention distance D, averaged over queries: (B, heads), in the unit of G.

    P: attention weights (B, heads, L, L) or (B, heads, L, N), of which the last L keys are patches; G: (L, L). Weight
    on prefix tokens counts as distance 0.
    """
    D = torch.einsum("bhji,ji->bhj", P[..., -len(G):], G)
    return D.mean(dim=-1)


def attention_entropy(P: torch.Tensor) -> torch.Tensor:
    """Compute each head's attention entropy E, averaged over queries: (B, heads, queries, keys) -> (B, heads), nats.

    The authors' code adds 1e-6 inside the logarithm, which lowers the entropy by less than 1e-6 times the keys.
    """
    E = torch.special.entr(P).sum(dim=-1)  # entr(p) = -p log p, and 0 at p = 0
    return E.mean(dim=-1)
