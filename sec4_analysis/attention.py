"""Attention distance and attention entropy of a head (Section 4.2), from its logits A before the softmax.

For head h, query patch q and key patch k, with P = softmax of A over the keys and G_qk the distance between the
centres of patches q and k:

    D_hq =   sum_k P_hqk G_qk              attention distance, pixels
    E_hq = - sum_k P_hqk log P_hqk         attention entropy, nats

Both are averaged over queries and images. The paper's formula does not say which of its two indices is the query; here
the softmax and the sums run over keys, as in the authors' code. The class token has no position in the image, so, again
as in the authors' code, prefix tokens are removed before the softmax (equivalently: after it, with each row rescaled to
sum to 1). Uniform attention over 14 x 14 patches of 16 px has distance 116.49 px and entropy ln 196 = 5.278. The
authors' code uses 14 px per patch, whatever the patch size, and gives 101.93.
"""
import torch

AUTHORS_UNIT = (14.0, 14.0)  # patch height and width, in pixels, assumed by the authors' code


def attention_logits(attention: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Compute A = q k^T / sqrt(head dim), before the softmax: tokens (B, N, D) -> (B, heads, N, N).

    attention: a timm Attention, plain or Beit's; tokens: its input, the block's norm1 output. Beit's relative position
    bias is part of A, except a table that all blocks share, which the caller adds.
    """
    B, N, _ = tokens.shape
    if not hasattr(attention, "relative_position_bias_table"):  # a plain ViT: q k^T alone
        qkv = attention.qkv(tokens).reshape(B, N, 3, attention.num_heads, attention.head_dim)
        q, k = qkv[:, :, 0].transpose(1, 2), qkv[:, :, 1].transpose(1, 2)  # each (B, heads, N, head dim)
        q, k = attention.q_norm(q), attention.k_norm(k)
        return (q * attention.scale) @ k.transpose(-2, -1)
    bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])  # Beit: biases apart, that of k is 0
    q, k, _ = (attention.qkv(tokens) + bias).view(B, N, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    logits = (q * attention.scale) @ k.transpose(-2, -1)
    return logits if attention.relative_position_bias_table is None else logits + attention._get_rel_pos_bias()


def patch_distances(grid, patch_size) -> torch.Tensor:
    """Compute the distances between the centres of all pairs of patches: (L, L), in the unit of patch_size.

    grid: (rows, columns); patch_size: (height, width). Patches are in row-major order.
    """
    rows, columns = (torch.arange(n, dtype=torch.float64) * size for n, size in zip(grid, patch_size))
    centres = torch.cartesian_prod(rows, columns)  # (L, 2)
    return torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist").float()  # exact differences


def attention_weights(logits: torch.Tensor, prefix=1, keep_prefix=False) -> torch.Tensor:
    """Compute the attention weights of the query patches in float32, rows summing to 1.

    Logits (B, heads, P + L, P + L) with P = `prefix` prefix tokens first -> (B, heads, L, L) over key patches, or with
    keep_prefix (B, heads, L, P + L) over all keys.
    """
    keys = 0 if keep_prefix else prefix
    return logits[:, :, prefix:, keys:].float().softmax(dim=-1)


def attention_distance(weights: torch.Tensor, distances: torch.Tensor) -> torch.Tensor:
    """Compute each head's attention distance, averaged over query patches: (B, heads), in the unit of `distances`.

    weights: (B, heads, L, L) or (B, heads, L, P + L), the last axis over keys; distances: (L, L). Weight on prefix
    tokens counts as distance 0.
    """
    L = distances.shape[-1]
    return torch.einsum("bhqk,qk->bhq", weights[..., -L:], distances).mean(dim=-1)


def attention_entropy(weights: torch.Tensor, epsilon=0.0) -> torch.Tensor:
    """Compute each head's attention entropy, averaged over queries: (B, heads, queries, keys) -> (B, heads), nats.

    epsilon is added inside the logarithm: 1e-6 in the authors' code, which lowers the entropy by less than keys * 1e-6.
    """
    entropy = -(weights * (weights + epsilon).log()) if epsilon else torch.special.entr(weights)
    return entropy.sum(dim=-1).mean(dim=-1)
