"""D-MAE straight from its description: explicit attention in every block of both networks, the teacher run to its end.

The second opinion for tests/test_distill.py and the baseline of the throughput benchmark. It shares no code with
common/ and sec5_distill/. B images, h heads, N = 1 + K tokens.
"""
import torch
import torch.nn.functional as F
from straightforward_mae import StraightforwardMAE
from torch import nn


class ExplicitAttention(nn.Module):
    """Takes over the weights of a timm Attention; after each forward `logits` (B, h, N, N) is what it saw."""

    def __init__(self, attention):
        super().__init__()
        self.qkv, self.proj, self.num_heads = attention.qkv, attention.proj, attention.num_heads

    def forward(self, x, **_):
        B, N, D = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
        self.logits = (q @ k.transpose(-2, -1)) * (D // self.num_heads) ** -0.5
        return self.proj((self.logits.softmax(dim=-1) @ v).transpose(1, 2).reshape(B, N, D))


def with_explicit_attention(mae):
    for block in (*mae.blocks, *mae.decoder_blocks):
        block.attn = ExplicitAttention(block.attn)
    return mae


class StraightforwardDMAE(nn.Module):
    """`pairs` of (student block, teacher block), from 1. The settings are those of StraightforwardMAE."""

    def __init__(self, student, teacher, pairs=((12, 12),), weight=1.0):
        super().__init__()
        self.model = with_explicit_attention(StraightforwardMAE(**student))
        self.tch_model = with_explicit_attention(StraightforwardMAE(**teacher)).requires_grad_(False).eval()
        heads = [network.blocks[0].attn.num_heads for network in (self.model, self.tch_model)]
        self.attn_adapter = nn.ModuleDict({f"adapter{s - 1}": nn.Conv2d(*heads, 1, bias=False) for s, _ in pairs})
        self.pairs, self.weight = pairs, weight

    def forward(self, images, noise, mask_ratio=0.75):
        loss = self.model(images, noise, mask_ratio)[0]
        with torch.no_grad():
            self.tch_model.encode(images, noise, mask_ratio)
        for s, t in self.pairs:
            mapped = self.attn_adapter[f"adapter{s - 1}"](self.model.blocks[s - 1].attn.logits)
            loss = loss + self.weight * F.mse_loss(mapped.float(), self.tch_model.blocks[t - 1].attn.logits.float())
        return loss
