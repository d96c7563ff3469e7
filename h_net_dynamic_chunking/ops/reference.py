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
