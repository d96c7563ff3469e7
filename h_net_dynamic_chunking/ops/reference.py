"""Sequential oracles of the operations: the definition, one position at a time.

Plain differentiable torch, exact in float64, never on a hot path. Each takes the arguments of the
operation it defines, without a tail.
"""

import torch
from torch import Tensor


def boundary_probability(q: Tensor, k: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Eq. (4): p_t = (1 - cos(q_t, k_{t-1})) / 2 and p = 1 at the start of a sequence."""
    starts = set(cu_seqlens.tolist())
    p = []
    for t in range(len(q)):
        if t in starts:
            p.append(q.new_ones(()))
            continue
        norms = q[t].norm() * k[t - 1].norm()
        p.append((1 - q[t] @ k[t - 1] / norms) / 2 if norms > 0 else q.new_tensor(0.5))
    return torch.stack(p) if p else q.new_zeros(0)


def compact(x: Tensor, boundary_mask: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, list[int]]:
    """The rows of x at the boundaries, and the chunk that each position is in."""
    starts = set(cu_seqlens.tolist())
    rows, chunk_of_position = [], []
    for t in range(len(x)):
        if t in starts or boundary_mask[t]:
            rows.append(x[t])
        chunk_of_position.append(len(rows) - 1)
    return torch.stack(rows) if rows else x[:0], chunk_of_position


def ema_smooth(
    z: Tensor, p: Tensor, cu_chunks: Tensor, state: Tensor | None = None, weigh_input: bool = True
) -> tuple[Tensor, Tensor]:
    """Eq. (5): s_k = P_k z_k + (1 - P_k) s_{k-1}, from `state` or zero in each sequence."""
    smoothed, states = [], []
    for i, (start, end) in enumerate(
        zip(cu_chunks[:-1].tolist(), cu_chunks[1:].tolist(), strict=True)
    ):
        s = z.new_zeros(z.shape[1]) if state is None else state[i]
        for k in range(start, end):
            s = (p[k] * z[k] if weigh_input else z[k]) + (1 - p[k]) * s
            smoothed.append(s)
        states.append(s)
    return torch.stack(smoothed) if smoothed else z[:0], torch.stack(states)


def expand(
    smoothed: Tensor,
    chunk_of_position: Tensor,
    confidence: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Eq. (7) to (9): out_t = STE(c_t) s_{chunk of t} + residual_t."""
    out = []
    for t, chunk in enumerate(chunk_of_position.tolist()):
        row = smoothed[chunk]
        if confidence is not None:
            row = (confidence[t] + (1 - confidence[t]).detach()) * row
        out.append(row if residual is None else row + residual[t])
    return torch.stack(out) if out else smoothed.new_zeros(0, smoothed.shape[1])


def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, cu_seqlens: Tensor
) -> Tensor:
    """S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T and y_t = S_t C_t + D x_t, from zero states."""
    starts = set(cu_seqlens.tolist())
    y = []
    for t in range(len(x)):
        if t in starts:
            state = x.new_zeros(*x.shape[1:], B.shape[1])
        write = (dt[t, :, None] * x[t])[..., None] * B[t]
        state = (dt[t] * A).exp()[:, None, None] * state + write
        y.append(state @ C[t] + D[:, None] * x[t])
    return torch.stack(y) if y else x


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, cu_seqlens: Tensor) -> Tensor:
    """silu(bias + sum over k of weight_k x_{t - taps + 1 + k}), of x in the sequence of t only."""
    starts, taps, out, first = set(cu_seqlens.tolist()), weight.shape[2], [], 0
    for t in range(len(x)):
        first = t if t in starts else first
        mixed = bias
        for k in range(taps):
            if t - taps + 1 + k >= first:
                mixed = mixed + weight[:, 0, k] * x[t - taps + 1 + k]
        out.append(mixed / (1 + (-mixed).exp()))
    return torch.stack(out) if out else x


def gated_norm(y: Tensor, z: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """g / sqrt(mean(g^2) + eps) * weight with g = y silu(z), one row at a time."""
    out = []
    for t in range(len(y)):
        gated = y[t] * z[t] / (1 + (-z[t]).exp())
        out.append(gated / ((gated @ gated) / len(gated) + eps).sqrt() * weight)
    return torch.stack(out) if out else y


def mamba2_inner(
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    cu_seqlens: Tensor,
) -> Tensor:
    """The three before, one after the other, between the projections of a Mamba-2 layer."""
    d_inner, heads = len(norm_weight), len(A_log)
    gate, conv_in, raw = torch.split(projected, [d_inner, len(conv_bias), heads], dim=1)
    convolved = causal_conv(conv_in, conv_weight, conv_bias, cu_seqlens)
    d_state = (len(conv_bias) - d_inner) // 2
    x, B, C = torch.split(convolved, [d_inner, d_state, d_state], dim=1)
    dt = (1 + (raw + dt_bias).exp()).log()
    y = ssd(x.view(len(x), heads, d_inner // heads), dt, -A_log.exp(), B, C, D, cu_seqlens)
    return gated_norm(y.flatten(1), gate, norm_weight)
