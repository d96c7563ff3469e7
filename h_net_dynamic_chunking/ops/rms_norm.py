"""Adding to the residual stream and normalising it, in one pass over it.

    s = h + update,        out = s / sqrt(mean(s^2) + eps) * weight

Contract
    h:           (..., dim), float
    update:      (..., dim), float, or None for nothing to add
    weight:      (dim,), float
    cu_seqlens:  (batch + 1,), int32 or int64, or None. With it h is (total, dim), and the tail
                 behind the last sequence counts as zeros, whatever stands there
    s:           (..., dim), float32 (float64 if h or update are), contiguous
    out:         (..., dim), dtype of `weight`, contiguous; computed in the wider of the dtypes of s
                 and weight

The backward pass keeps s and nothing else, and writes the gradients of h and of update together.
"""

from typing import Any

import torch
from torch import Tensor

from h_net_dynamic_chunking.ops.backend import chosen_backend, use_backend, uses_triton
from h_net_dynamic_chunking.ops.packing import (
    accumulation_dtype,
    check_cu_seqlens,
    check_float,
    check_packed,
    in_some_sequence,
)
from h_net_dynamic_chunking.ops.registration import operation

# A program of the kernels holds a whole row; wider ones go to torch.
_WIDEST = 8192


def add_rms_norm(
    h: Tensor,
    update: Tensor | None,
    weight: Tensor,
    eps: float = 1e-5,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """s and out; the contract is at the top of this file.

    Raises:
        ValueError: shapes or dtypes off the contract.

    >>> h, update = torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, -6.0]])
    >>> add_rms_norm(h, update, torch.ones(2))
    (tensor([[ 3., -3.]]), tensor([[ 1.0000, -1.0000]]))
    """
    _check(h, update, weight, cu_seqlens)
    s: Tensor
    out: Tensor
    s, out = _add_rms_norm(h, update, weight, eps, cu_seqlens)
    return s, out


def _check(h: Tensor, update: Tensor | None, weight: Tensor, cu_seqlens: Tensor | None) -> None:
    if cu_seqlens is None:
        check_float("h", h)
    else:
        check_packed("h", h, 2)
        check_cu_seqlens(cu_seqlens)
    if update is not None and update.shape != h.shape:
        raise ValueError(
            f"update must have the shape of h, {tuple(h.shape)}, got {tuple(update.shape)}"
        )
    if weight.shape != h.shape[-1:]:
        raise ValueError(f"weight must have shape ({h.shape[-1]},), got {tuple(weight.shape)}")


@operation("add_rms_norm")
def _add_rms_norm(
    h: Tensor, update: Tensor | None, weight: Tensor, eps: float, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    if _runs_on_triton(h, update, weight):
        from h_net_dynamic_chunking.ops._triton.rms_norm import add_rms_norm_fwd

        return add_rms_norm_fwd(h, update, weight, eps, cu_seqlens)
    # Contiguous, as the fake promises, whatever h is: compiled code asserts the strides.
    s = h.to(_stream_dtype(h, update), copy=True, memory_format=torch.contiguous_format)
    if update is not None:
        s += update
    if cu_seqlens is not None:
        s = s.where(in_some_sequence(cu_seqlens, len(s))[:, None], 0)
    wide = torch.promote_types(s.dtype, weight.dtype)
    return s, (_normed(s.to(wide), eps)[0] * weight.to(wide)).to(weight.dtype)


@_add_rms_norm.register_fake
def _(
    h: Tensor, update: Tensor | None, weight: Tensor, eps: float, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    return h.new_empty(h.shape, dtype=_stream_dtype(h, update)), weight.new_empty(h.shape)


@operation("add_rms_norm_backward")
def _add_rms_norm_backward(
    grad_s: Tensor | None,
    grad_out: Tensor,
    s: Tensor,
    weight: Tensor,
    eps: float,
    cu_seqlens: Tensor | None,
    dtype: torch.dtype,
    second: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of s in one dtype, in a second (nothing for None), and that of the weight."""
    if _runs_on_triton(s, grad_out, weight):
        from h_net_dynamic_chunking.ops._triton.rms_norm import add_rms_norm_bwd

        return add_rms_norm_bwd(grad_s, grad_out, s, weight, eps, cu_seqlens, dtype, second)
    wide = torch.promote_types(s.dtype, weight.dtype)
    normed, scale = _normed(s.to(wide), eps)
    grad = grad_out.to(wide).contiguous()
    if cu_seqlens is not None:
        inside = in_some_sequence(cu_seqlens, len(s))[:, None]
        grad = grad.where(inside, 0)
        grad_s = None if grad_s is None else grad_s.where(inside, 0)
    weighted = grad * weight.to(wide)
    along = (weighted * normed).mean(-1, keepdim=True)
    total = (weighted - normed * along) * scale
    if grad_s is not None:
        total += grad_s
    grad_weight = (grad * normed).sum_to_size(weight.shape).to(weight.dtype)
    again = s.new_empty(0) if second is None else total.to(second, copy=True)
    return total.to(dtype), again, grad_weight


@_add_rms_norm_backward.register_fake
def _(
    grad_s: Tensor | None,
    grad_out: Tensor,
    s: Tensor,
    weight: Tensor,
    eps: float,
    cu_seqlens: Tensor | None,
    dtype: torch.dtype,
    second: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    again = s.new_empty(0) if second is None else s.new_empty(s.shape, dtype=second)
    return s.new_empty(s.shape, dtype=dtype), again, weight.new_empty(weight.shape)


def _normed(s: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """s over its root mean square, and one over that."""
    scale = (s.square().mean(-1, keepdim=True) + eps).rsqrt()
    return s * scale, scale


def _stream_dtype(h: Tensor, update: Tensor | None) -> torch.dtype:
    return accumulation_dtype(
        h.dtype if update is None else torch.promote_types(h.dtype, update.dtype)
    )


def _runs_on_triton(*tensors: Tensor | None) -> bool:
    given = [tensor for tensor in tensors if tensor is not None]
    width = given[0].shape[-1]
    unfit = f"the kernels take rows of up to {_WIDEST}, not {width}" if width > _WIDEST else None
    return all(uses_triton(tensor, unfit=unfit) for tensor in given)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    h, update, weight, ctx.eps, cu_seqlens = inputs
    ctx.backend = chosen_backend()
    ctx.dtype, ctx.update_dtype = h.dtype, None if update is None else update.dtype
    ctx.save_for_backward(output[0], weight, cu_seqlens)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_s: Tensor | None, grad_out: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad_s is None and grad_out is None:
        return None, None, None, None, None
    s, weight, cu_seqlens = ctx.saved_tensors
    if grad_out is None:
        grad_out = weight.new_zeros(s.shape)
    # One tensor is enough for two gradients of one dtype.
    second = None if ctx.update_dtype == ctx.dtype else ctx.update_dtype
    with use_backend(ctx.backend):
        grad_h, grad_update, grad_weight = _add_rms_norm_backward(
            grad_s, grad_out, s, weight, ctx.eps, cu_seqlens, ctx.dtype, second
        )
    if second is None:
        grad_update = None if ctx.update_dtype is None else grad_h
    return grad_h, grad_update, grad_weight, None, None


_add_rms_norm.register_autograd(_backward, setup_context=_setup_context)
_add_rms_norm_backward.refuse_autograd()
