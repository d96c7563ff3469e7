"""Oracles of the operations of the layers: the definition, one position at a time.

Plain differentiable torch, exact in float64, never on a hot path. Packed rows have no tail here.
"""

import torch
from torch import Tensor


def add_rms_norm(
    h: Tensor, update: Tensor | None, weight: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """s = h + update, and s / sqrt(mean(s^2) + eps) * weight; all of h (total, dim)."""
    sums, normed = [h[:0]], [h[:0]]
    for t in range(len(h)):
        s = h[t] if update is None else h[t] + update[t]
        sums.append(s[None])
        normed.append((s / ((s @ s) / len(s) + eps).sqrt() * weight)[None])
    return torch.cat(sums), torch.cat(normed)


def swiglu(x: Tensor) -> Tensor:
    """value * gate / (1 + exp(-gate)), x (total, 2 * width) -> (total, width)."""
    value, gate = x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]
    return value * gate / (1 + (-gate).exp())


def rotary(
    qkv: Tensor, heads: int, rotary_dim: int, base: float, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of channels as complex numbers, which turn by exp(i t base^(-2c/rotary_dim))."""
    starts, half = set(cu_seqlens.tolist()), rotary_dim // 2
    frequency = qkv.new_tensor([base ** (-2 * c / max(rotary_dim, 1)) for c in range(half)])
    rows, position = [qkv[:0].view(0, 3, heads, qkv.shape[1] // (3 * heads))], 0
    for t in range(len(qkv)):
        position = 0 if t in starts else position + 1
        row = qkv[t].view(3, heads, -1)
        pair = torch.complex(row[:2, :, :half], row[:2, :, half:rotary_dim])
        angle = position * frequency
        pair = pair * torch.polar(torch.ones_like(angle), angle)
        turned = torch.cat((pair.real, pair.imag, row[:2, :, rotary_dim:]), dim=-1)
        rows.append(torch.cat((turned, row[2:]))[None])
    q, k, v = torch.cat(rows).unbind(1)
    return q, k, v


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over the labels that are not negative of -log softmax(logits)[label]."""
    loss = logits.new_zeros(())
    for row, label in zip(logits, labels.tolist(), strict=True):
        if label >= 0:
            loss = loss - (row[label].exp() / row.exp().sum()).log()
    return loss
