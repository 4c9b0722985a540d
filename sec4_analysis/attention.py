"""How far an attention head looks, and how widely (Section 4.2), from its logits A (before the softmax).

For head h and query patch j, with P = softmax over keys i and G_ij the distance between the patches' centres:

    D_hj =   sum_i P_ij G_ij            attention distance, pixels
    E_hj = - sum_i P_ij log P_ij        attention entropy, nats

both averaged over queries and images. The class token has no place in the image: as the authors do, prefix tokens are
cut off before the softmax, which equals a softmax over all tokens whose patch part is scaled to sum to 1. Over 14 x 14
patches of 16 px uniform attention has distance 116.49 px and entropy ln 196 = 5.278. The authors' code multiplies by
14 px, whatever the patch size, and gives 101.93.
"""
import torch

AUTHORS_UNIT = (14.0, 14.0)  # pixels per patch in the authors' distances


def attention_logits(attention, tokens):
    """A = q k^T / sqrt(head dim), before the softmax (Section 5's A): tokens (B, N, D) -> (B, heads, N, N).

    `attention` is a timm Attention, `tokens` its input, that is the block's norm1 output. Relative positions are part
    of A.
    """
    B, N, _ = tokens.shape
    if hasattr(attention, "relative_position_bias_table"):  # timm's Beit: no bias for k, no norms of q and k
        bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
        q, k, _ = (attention.qkv(tokens) + bias).view(B, N, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        logits = (q * attention.scale) @ k.transpose(-2, -1)  # a table that all blocks share is the caller's to add
        return logits if attention.relative_position_bias_table is None else logits + attention._get_rel_pos_bias()
    qkv = attention.qkv(tokens).reshape(B, N, 3, attention.num_heads, attention.head_dim)
    q, k = qkv[:, :, 0].transpose(1, 2), qkv[:, :, 1].transpose(1, 2)  # each (B, heads, N, head dim)
    q, k = attention.q_norm(q), attention.k_norm(k)
    return (q * attention.scale) @ k.transpose(-2, -1)


def patch_distances(grid, patch_size):
    """Between the centres of all pairs of patches: grid (rows, columns), patch_size (height, width) -> (L, L)."""
    rows, columns = (torch.arange(n, dtype=torch.float64) * size for n, size in zip(grid, patch_size))
    centres = torch.cartesian_prod(rows, columns)  # (L, 2)
    return torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist").float()  # mm would lose digits


def attention_weights(logits, prefix=1, keep_prefix=False):
    """Logits (B, heads, P + L, P + L) -> weights of the query patches, rows summing to 1, float32: over the patches
    (B, heads, L, L), or with keep_prefix over all tokens (B, heads, L, P + L), prefix tokens first.
    """
    keys = 0 if keep_prefix else prefix
    return logits[:, :, prefix:, keys:].float().softmax(dim=-1)


def attention_distance(weights, distances):
    """Weights (B, heads, L, L) or (B, heads, L, P + L), distances (L, L) -> mean over queries (B, heads).

    What goes to prefix tokens counts as no distance at all.
    """
    L = distances.shape[-1]
    return torch.einsum("bhqk,qk->bhq", weights[..., -L:], distances).mean(dim=-1)


def attention_entropy(weights, epsilon=0.0):
    """Weights (B, heads, queries, keys) -> mean over queries (B, heads), nats.

    epsilon: 1e-6 in the authors' code, inside the logarithm; it lowers the entropy by less than keys * 1e-6.
    """
    entropy = -(weights * (weights + epsilon).log()) if epsilon else torch.special.entr(weights)
    return entropy.sum(dim=-1).mean(dim=-1)
