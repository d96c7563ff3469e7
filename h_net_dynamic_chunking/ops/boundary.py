"""Boundary probability: how unlike its predecessor each position is. Eq. (4) of the paper.

    p_t = (1 - cos(q_t, k_{t-1})) / 2,        p = 1 at the start of every sequence

Contract
    q, k:        (total, dim), float; packed
    cu_seqlens:  (batch + 1,), int32 or int64
    start_key:   (batch, dim), float, or None: what stands before the first position
    out p:       (total,), float32 (float64 for float64 input), in [0, 1]; 0 in the tail

Norms and products are computed in float32 whatever the dtype of q and k. A zero vector has
cosine 0 with everything, hence p = 0.5, and receives no gradient.
"""

from typing import Any

import torch
from torch import Tensor

from h_net_dynamic_chunking.ops.packing import (
    accumulation_dtype,
    check_cu_seqlens,
    check_packed,
    in_some_sequence,
    row_tiles,
    sequence_starts,
    zero_rows_,
)


def boundary_probability(
    q: Tensor, k: Tensor, cu_seqlens: Tensor, start_key: Tensor | None = None
) -> Tensor:
    """Probability that each position opens a chunk; the contract is at the top of this file.

    Without `start_key` the first position of each sequence has p = 1 and no gradient. With it
    (a learned key, or the last key of an earlier piece of the same sequence) the first position
    is treated like any other.

    Raises:
        ValueError: shapes or dtypes off the contract.

    >>> q = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    >>> boundary_probability(q, q, torch.tensor([0, 3]))
    tensor([1., 0., 1.])
    """
    check_packed("q", q, 2)
    if k.shape != q.shape or k.dtype != q.dtype:
        raise ValueError(
            f"k must have the shape and dtype of q, {tuple(q.shape)} {q.dtype}, "
            f"got {tuple(k.shape)} {k.dtype}"
        )
    check_cu_seqlens(cu_seqlens)
    p: Tensor = _boundary_probability(q, k, cu_seqlens)
    if start_key is None or q.shape[0] == 0:
        return p
    batch = cu_seqlens.shape[0] - 1
    if start_key.shape != (batch, q.shape[1]):
        raise ValueError(
            f"start_key must have shape {(batch, q.shape[1])}, got {tuple(start_key.shape)}"
        )
    return _with_start_key(p, q, start_key, cu_seqlens.to(torch.int64))


def boundary_probability_step(q: Tensor, k_prev: Tensor, is_first: Tensor | None = None) -> Tensor:
    """One position of each row: `q`, `k_prev` (batch, dim), `is_first` bool (batch,) -> (batch,).

    Rows that are first have p = 1. Plain differentiable torch, same numbers as the packed form.
    """
    dtype = accumulation_dtype(q.dtype)
    cosine = (_unit(q.to(dtype)) * _unit(k_prev.to(dtype))).sum(-1)
    p = (0.5 - 0.5 * cosine).clamp(0, 1)
    return p if is_first is None else torch.where(is_first, 1.0, p)


def _with_start_key(p: Tensor, q: Tensor, start_key: Tensor, cu_seqlens: Tensor) -> Tensor:
    total = q.shape[0]
    starts, ends = cu_seqlens[:-1], cu_seqlens[1:]
    p_start = boundary_probability_step(q[starts.clamp(max=total - 1)], start_key)
    # Empty sequences write to a slot behind the last position, which is cut off again.
    slots = torch.where(ends > starts, starts, total)
    return torch.nn.functional.pad(p, (0, 1)).index_copy(0, slots, p_start.to(p.dtype))[:total]


def _unit(x: Tensor) -> Tensor:
    """x / |x| along the last dimension; zero, without gradient, where |x| is zero."""
    return x * _inverse_norm(x)[..., None]


def _inverse_norm(x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1)
    # The inner where keeps the infinite derivative of 1 / 0 out of the backward pass.
    return torch.where(norm > 0, 1 / torch.where(norm > 0, norm, 1.0), 0.0)


@torch.library.custom_op("h_net::boundary_probability", mutates_args=())
def _boundary_probability(q: Tensor, k: Tensor, cu_seqlens: Tensor) -> Tensor:
    total = q.shape[0]
    dtype = accumulation_dtype(q.dtype)
    p = torch.ones(total, dtype=dtype, device=q.device)
    q_here, k_before = q[1:], k[:-1]
    for tile in row_tiles(q_here):
        dot, q_scale, k_scale = _dot_and_scales(q_here[tile].to(dtype), k_before[tile].to(dtype))
        p[1:][tile] = (0.5 - 0.5 * dot * q_scale * k_scale).clamp_(0, 1)
    p.masked_fill_(sequence_starts(cu_seqlens, total), 1.0)
    return p.masked_fill_(~in_some_sequence(cu_seqlens, total), 0.0)


def _dot_and_scales(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """<q, k>, 1 / |q| and 1 / |k| of each row."""
    return (q * k).sum(-1), _inverse_norm(q), _inverse_norm(k)


@_boundary_probability.register_fake
def _(q: Tensor, k: Tensor, cu_seqlens: Tensor) -> Tensor:
    return q.new_empty(q.shape[0], dtype=accumulation_dtype(q.dtype))


@torch.library.custom_op("h_net::boundary_probability_backward", mutates_args=())
def _boundary_probability_backward(
    grad_p: Tensor, q: Tensor, k: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    total = q.shape[0]
    dtype = accumulation_dtype(q.dtype)
    grad_q, grad_k = torch.empty_like(q), torch.empty_like(k)
    grad_q[:1], grad_k[-1:] = 0, 0
    # Starts and tail have a constant p; their rows are overwritten, whatever lies in the tail.
    fixed = (sequence_starts(cu_seqlens, total) | ~in_some_sequence(cu_seqlens, total))[1:]
    for tile in row_tiles(q[1:]):
        q_here, k_before = q[1:][tile].to(dtype), k[:-1][tile].to(dtype)
        dot, q_scale, k_scale = _dot_and_scales(q_here, k_before)
        # d cos / dq = k / (|q| |k|) - cos q / |q|^2, and the same with q and k exchanged.
        grad_dot = -0.5 * grad_p[1:][tile] * q_scale * k_scale
        pull = grad_dot * dot
        for out, other, own, own_scale in (
            (grad_q[1:][tile], k_before, q_here, q_scale),
            (grad_k[:-1][tile], q_here, k_before, k_scale),
        ):
            gradient = grad_dot[:, None] * other
            gradient.addcmul_((pull * own_scale.square())[:, None], own, value=-1)
            out.copy_(zero_rows_(gradient, fixed[tile]))
    return grad_q, grad_k


@_boundary_probability_backward.register_fake
def _(grad_p: Tensor, q: Tensor, k: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k)


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_p: Tensor) -> tuple[Tensor, Tensor, None]:
    q, k, cu_seqlens = ctx.saved_tensors
    grad_q, grad_k = _boundary_probability_backward(grad_p, q, k, cu_seqlens)
    return grad_q, grad_k, None


_boundary_probability.register_autograd(_backward, setup_context=_setup_context)
