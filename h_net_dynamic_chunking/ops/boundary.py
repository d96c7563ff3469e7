"""Boundary probability: how unlike its predecessor each position is. Eq. (4) of the paper.

    p_t = (1 - cos(q_t, k_{t-1})) / 2,        p = 1 at the start of every sequence

Contract
    q, k:        (total, dim), float; packed. Or the two side by side, (total, 2 * dim), as one
                 projection makes them: `boundary_probability_of_pairs`
    cu_seqlens:  (batch + 1,), int32 or int64
    start_key:   (batch, dim), float, or None: what stands before the first position
    out p:       (total,), float32 (float64 for float64 input), in [0, 1]; 0 in the tail

Norms and products are computed in float32 whatever the dtype of q and k. A zero vector has
cosine 0 with everything, hence p = 0.5, and receives no gradient; so do vectors whose squared norm
leaves the range of float32, below about 1e-19 and above 1e19.
"""

from typing import Any

import torch
from torch import Tensor

from h_net_dynamic_chunking.ops.backend import chosen_backend, use_backend, uses_triton
from h_net_dynamic_chunking.ops.packing import (
    accumulation_dtype,
    check_cu_seqlens,
    check_packed,
    in_some_sequence,
    row_tiles,
    sequence_starts,
    zero_rows_,
)
from h_net_dynamic_chunking.ops.registration import operation


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
    return boundary_probability_of_pairs(torch.cat((q, k), dim=1), cu_seqlens, start_key)


def boundary_probability_of_pairs(
    queries_keys: Tensor, cu_seqlens: Tensor, start_key: Tensor | None = None
) -> Tensor:
    """`boundary_probability` of `q, k = queries_keys.chunk(2, dim=1)`, without splitting them.

    Its gradient comes out in one piece too, ready for the product with the projection's weights.
    """
    check_packed("queries_keys", queries_keys, 2)
    if queries_keys.shape[1] % 2:
        raise ValueError(f"queries_keys must have an even width, got {queries_keys.shape[1]}")
    check_cu_seqlens(cu_seqlens)
    p: Tensor = _boundary_probability(queries_keys, cu_seqlens)
    if start_key is None or p.shape[0] == 0:
        return p
    batch, dim = cu_seqlens.shape[0] - 1, queries_keys.shape[1] // 2
    if start_key.shape != (batch, dim):
        raise ValueError(f"start_key must have shape {(batch, dim)}, got {tuple(start_key.shape)}")
    return _with_start_key(p, queries_keys[:, :dim], start_key, cu_seqlens.to(torch.int64))


def boundary_probability_step(q: Tensor, k_prev: Tensor, is_first: Tensor | None = None) -> Tensor:
    """Any positions by themselves: `q`, `k_prev` (..., dim), `is_first` bool (...) -> (...).

    Those that are first have p = 1. Plain differentiable torch, same numbers as the packed form.
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
    return x * _reciprocal(torch.linalg.vector_norm(x, dim=-1))[..., None]


def _reciprocal(norm: Tensor) -> Tensor:
    """1 / norm, and 0 where the norm is 0."""
    # The inner where keeps the infinite derivative of 1 / 0 out of the backward pass.
    return torch.where(norm > 0, 1 / torch.where(norm > 0, norm, 1.0), 0.0)


@operation("boundary_probability")
def _boundary_probability(queries_keys: Tensor, cu_seqlens: Tensor) -> Tensor:
    if uses_triton(queries_keys):
        from h_net_dynamic_chunking.ops._triton.boundary import boundary_fwd

        return boundary_fwd(queries_keys, cu_seqlens)
    total = queries_keys.shape[0]
    cosine, _, _ = _cosines_and_scales(*_neighbours(queries_keys))
    p = torch.ones(total, dtype=cosine.dtype, device=cosine.device)
    p[1:] = (0.5 - 0.5 * cosine).clamp_(0, 1)
    p.masked_fill_(sequence_starts(cu_seqlens, total), 1.0)
    return p.masked_fill_(~in_some_sequence(cu_seqlens, total), 0.0)


def _neighbours(queries_keys: Tensor) -> tuple[Tensor, Tensor]:
    """The query of each position but the first, and the key of the position before it."""
    q, k = queries_keys.chunk(2, dim=1)
    return q[1:], k[:-1]


def _cosines_and_scales(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """cos(q, k), 1 / |q| and 1 / |k| of each row, in the dtype to accumulate in."""
    dtype = accumulation_dtype(q.dtype)
    cosine, q_scale, k_scale = torch.empty(3, q.shape[0], dtype=dtype, device=q.device)
    for tile in row_tiles(q):
        q_tile, k_tile = q[tile].to(dtype), k[tile].to(dtype)
        q_scale[tile] = _reciprocal(torch.linalg.vector_norm(q_tile, dim=-1))
        k_scale[tile] = _reciprocal(torch.linalg.vector_norm(k_tile, dim=-1))
        # Scaled before the product, which could overflow otherwise.
        unit_q = q_tile * q_scale[tile, None]
        torch.sum(unit_q.mul_(k_tile).mul_(k_scale[tile, None]), -1, out=cosine[tile])
    return cosine, q_scale, k_scale


@_boundary_probability.register_fake
def _(queries_keys: Tensor, cu_seqlens: Tensor) -> Tensor:
    dtype = accumulation_dtype(queries_keys.dtype)
    return queries_keys.new_empty(queries_keys.shape[0], dtype=dtype)


@operation("boundary_probability_backward")
def _boundary_probability_backward(
    grad_p: Tensor, queries_keys: Tensor, cu_seqlens: Tensor
) -> Tensor:
    if uses_triton(queries_keys):
        from h_net_dynamic_chunking.ops._triton.boundary import boundary_bwd

        return boundary_bwd(grad_p, queries_keys, cu_seqlens)
    total = queries_keys.shape[0]
    dtype = accumulation_dtype(queries_keys.dtype)
    q, k = _neighbours(queries_keys)
    cosine, q_scale, k_scale = _cosines_and_scales(q, k)
    # With unit vectors u = q / |q| and v = k / |k|: d cos / dq = (v - cos u) / |q|, and the same
    # with the two exchanged.
    grad_cosine = -0.5 * grad_p[1:]
    to_q, to_k = (grad_cosine * q_scale)[:, None], (grad_cosine * k_scale)[:, None]
    q_pull, k_pull = -to_q * cosine[:, None], -to_k * cosine[:, None]

    grad = queries_keys.new_empty(queries_keys.shape)
    grad[:1], grad[-1:] = 0, 0
    grad_q, grad_k = _neighbours(grad)
    for tile in row_tiles(q):
        u = q[tile].to(dtype) * q_scale[tile, None]
        v = k[tile].to(dtype) * k_scale[tile, None]
        _write_sum(grad_q[tile], to_q[tile], v, q_pull[tile], u)
        _write_sum(grad_k[tile], to_k[tile], u, k_pull[tile], v)
    # Starts and tail have a constant p; their rows are overwritten, whatever lies in the tail.
    fixed = (sequence_starts(cu_seqlens, total) | ~in_some_sequence(cu_seqlens, total))[1:]
    zero_rows_(grad_q, fixed)
    zero_rows_(grad_k, fixed)
    return grad


def _write_sum(out: Tensor, a: Tensor, x: Tensor, b: Tensor, y: Tensor) -> None:
    """out = a x + b y, without a copy where out is as precise as the rest."""
    if out.dtype == x.dtype:
        torch.mul(a, x, out=out).addcmul_(b, y)
    else:
        out.copy_((a * x).addcmul_(b, y))


@_boundary_probability_backward.register_fake
def _(grad_p: Tensor, queries_keys: Tensor, cu_seqlens: Tensor) -> Tensor:
    return queries_keys.new_empty(queries_keys.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.backend = chosen_backend()
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_p: Tensor) -> tuple[Tensor, None]:
    queries_keys, cu_seqlens = ctx.saved_tensors
    with use_backend(ctx.backend):
        return _boundary_probability_backward(grad_p, queries_keys, cu_seqlens), None


_boundary_probability.register_autograd(_backward, setup_context=_setup_context)
_boundary_probability_backward.refuse_autograd()
