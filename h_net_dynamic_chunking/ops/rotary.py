"""Rotary positions on the queries and keys of one product, and the way from there to three tensors.

    channels i and i + r/2 of a head turn by the angle t * base^(-2i/r), r = rotary_dim

Contract
    qkv:         (batch, length, 3 * heads * head_dim), float, channels [all q; all k; all v], each
                 (head, channel); or packed, (total, 3 * heads * head_dim), with cu_seqlens
    cu_seqlens:  (batch + 1,), int32 or int64, or None
    q, k, v:     the leading shape of qkv, then (heads, head_dim); contiguous, dtype of qkv. Zeros
                 in the tail behind the last sequence, which gets no gradient, whatever is there

t counts positions in their sequence, from 0. Channels from r on stay as they are. Angles are
float32 (float64 for float64). The gradient of qkv is written whole.
"""

from typing import Any

import torch
from torch import Tensor

from h_net_dynamic_chunking.ops.backend import chosen_backend, use_backend, uses_triton
from h_net_dynamic_chunking.ops.packing import (
    accumulation_dtype,
    check_packed_or_padded,
    in_some_sequence,
    position_in_sequence,
)
from h_net_dynamic_chunking.ops.registration import operation


def rotary(
    qkv: Tensor,
    heads: int,
    rotary_dim: int,
    base: float = 10000.0,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, the first two turned; the contract is at the top of this file.

    Raises:
        ValueError: shapes or dtypes off the contract, or a rotary_dim that is odd or wider than a
            head.

    >>> q, k, v = rotary(torch.ones(1, 2, 6), heads=1, rotary_dim=2)
    >>> q[0, :, 0]
    tensor([[ 1.0000,  1.0000],
            [-0.3012,  1.3818]])
    """
    _check(qkv, heads, rotary_dim, cu_seqlens)
    q, k, v, _ = _rotary(qkv, heads, rotary_dim, base, cu_seqlens)
    return q, k, v


def rotary_from(
    first: Tensor,
    qkv: Tensor,
    heads: int,
    rotary_dim: int,
    base: float = 10000.0,
    lens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`rotary` of rows that start at the positions `first`. No gradients.

    first:  int (batch,)
    qkv:    (batch, length, ...)
    lens:   int (batch,): positions of each row, on the left; behind them zeros come out, whatever
            is there. None: all have `length`

    Raises:
        ValueError: as `rotary`.
    """
    _check(qkv, heads, rotary_dim, None)
    if uses_triton(qkv):
        from h_net_dynamic_chunking.ops._triton.rotary import rotary_fwd

        return rotary_fwd(qkv, heads, rotary_dim, base, None, first, lens)[:3]
    steps = torch.arange(qkv.shape[1], device=qkv.device)
    if lens is not None:
        qkv = qkv.where((steps < lens[:, None])[..., None], 0)
    position = first[:, None] + steps
    return _apart(qkv, heads, _cos_sin(position, rotary_dim, base, qkv.dtype))


def _apart(qkv: Tensor, heads: int, cos_sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, the first two turned by cos_sin (..., 2, rotary_dim / 2)."""
    head_dim = qkv.shape[-1] // (3 * heads)
    q, k, v = qkv.reshape(*qkv.shape[:-1], 3, heads, head_dim).unbind(-3)
    q, k = (_turn(part, *cos_sin.unbind(-2)) for part in (q, k))
    return q, k, v.clone(memory_format=torch.contiguous_format)


def _check(qkv: Tensor, heads: int, rotary_dim: int, cu_seqlens: Tensor | None) -> None:
    check_packed_or_padded("qkv", qkv, cu_seqlens)
    width = qkv.shape[-1]
    if heads < 1 or width % (3 * heads):
        raise ValueError(f"heads must divide a third of qkv's width {width}, got {heads}")
    head_dim = width // (3 * heads)
    if rotary_dim % 2 or not 0 <= rotary_dim <= head_dim:
        raise ValueError(f"rotary_dim must be even and in 0 .. {head_dim}, got {rotary_dim}")


def rotate(x: Tensor, position: Tensor, rotary_dim: int, base: float = 10000.0) -> Tensor:
    """Turn any heads at any positions, in differentiable torch.

    x:         (..., heads, head_dim), float
    position:  int, with the leading dimensions of x or the last of them: (length,) or (batch,)
    out:       like x

    >>> x = torch.tensor([1.0, 0.0]).expand(1, 2, 1, 2)
    >>> rotate(x, torch.arange(2), 2)[0, :, 0]
    tensor([[1.0000, 0.0000],
            [0.5403, 0.8415]])
    """
    return _turn(x, *_cos_sin(position, rotary_dim, base, x.dtype).unbind(-2))


def _cos_sin(position: Tensor, rotary_dim: int, base: float, dtype: torch.dtype) -> Tensor:
    """(..., 2, rotary_dim / 2): cosines and sines of the angles at positions (...)."""
    wide, half = accumulation_dtype(dtype), rotary_dim // 2
    exponent = torch.arange(half, dtype=wide, device=position.device) * (-2 / max(rotary_dim, 1))
    angle = position.to(wide)[..., None] * base**exponent
    return torch.stack((angle.cos(), angle.sin()), dim=-2)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (..., heads, head_dim) by the angles of cos, sin (..., rotary_dim / 2)."""
    half, cos, sin = cos.shape[-1], cos.unsqueeze(-2), sin.unsqueeze(-2)
    first, second, rest = torch.split(x, [half, half, x.shape[-1] - 2 * half], dim=-1)
    turned = (first * cos - second * sin, first * sin + second * cos)
    return torch.cat([*(part.to(x.dtype) for part in turned), rest], dim=-1)


@operation("rotary")
def _rotary(
    qkv: Tensor, heads: int, rotary_dim: int, base: float, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, and the cosines and sines of each row."""
    if uses_triton(qkv):
        from h_net_dynamic_chunking.ops._triton.rotary import rotary_fwd

        return rotary_fwd(qkv, heads, rotary_dim, base, cu_seqlens)
    if cu_seqlens is None:
        position = torch.arange(qkv.shape[-2], device=qkv.device).expand(qkv.shape[:-1])
    else:
        position = position_in_sequence(cu_seqlens, len(qkv))
        qkv = qkv.where(in_some_sequence(cu_seqlens, len(qkv))[:, None], 0)
    cos_sin = _cos_sin(position, rotary_dim, base, qkv.dtype)
    return *_apart(qkv, heads, cos_sin), cos_sin


@_rotary.register_fake
def _(
    qkv: Tensor, heads: int, rotary_dim: int, base: float, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (*qkv.shape[:-1], heads, qkv.shape[-1] // (3 * heads))
    cos_sin = qkv.new_empty(
        *qkv.shape[:-1], 2, rotary_dim // 2, dtype=accumulation_dtype(qkv.dtype)
    )
    return qkv.new_empty(shape), qkv.new_empty(shape), qkv.new_empty(shape), cos_sin


@operation("rotary_backward")
def _rotary_backward(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, cos_sin: Tensor, cu_seqlens: Tensor | None
) -> Tensor:
    if uses_triton(grad_q):
        from h_net_dynamic_chunking.ops._triton.rotary import rotary_bwd

        return rotary_bwd(grad_q, grad_k, grad_v, cos_sin, cu_seqlens)
    cos, sin = cos_sin.unbind(-2)
    grads = _turn(grad_q, cos, -sin), _turn(grad_k, cos, -sin), grad_v
    grad = torch.stack(grads, dim=-3).flatten(-3)
    if cu_seqlens is not None:
        grad = grad.where(in_some_sequence(cu_seqlens, len(grad))[:, None], 0)
    return grad


@_rotary_backward.register_fake
def _(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, cos_sin: Tensor, cu_seqlens: Tensor | None
) -> Tensor:
    return grad_q.new_empty(*grad_q.shape[:-2], 3 * grad_q.shape[-2] * grad_q.shape[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.backend = chosen_backend()
    ctx.save_for_backward(output[3], inputs[4])
    ctx.mark_non_differentiable(output[3])


def _backward(
    ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, _: Tensor
) -> tuple[Tensor | None, ...]:
    with use_backend(ctx.backend):
        grad = _rotary_backward(grad_q, grad_k, grad_v, *ctx.saved_tensors)
    return grad, None, None, None, None


_rotary.register_autograd(_backward, setup_context=_setup_context)
_rotary_backward.refuse_autograd()
