"""Zeros in the tail: what stands in rows of no sequence goes no further.

    out_t = x_t in a sequence, 0 behind the last one

Contract
    x:           (total, ...), any dtype
    cu_seqlens:  (batch + 1,), int32 or int64
    out:         as x, contiguous

The gradient of x is zero in the tail too, whatever comes in there.
"""

from typing import Any

from torch import Tensor

from h_net_dynamic_chunking.ops.backend import chosen_backend, use_backend, uses_triton
from h_net_dynamic_chunking.ops.packing import check_cu_seqlens, in_some_sequence
from h_net_dynamic_chunking.ops.registration import operation


def zero_tail(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """A copy of x with zeros in the tail; the contract is at the top of this file.

    Raises:
        ValueError: x of no dimension, or cu_seqlens off the contract.

    >>> import torch
    >>> zero_tail(torch.ones(3, 1), torch.tensor([0, 2])).flatten()
    tensor([1., 1., 0.])
    """
    if x.ndim < 1:
        raise ValueError("x must have shape (total, ...), got ()")
    check_cu_seqlens(cu_seqlens)
    out: Tensor = _zero_tail(x, cu_seqlens)
    return out


@operation("zero_tail")
def _zero_tail(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    if uses_triton(x, moves_only=True):
        from h_net_dynamic_chunking.ops._triton.tail import zero_tail

        return zero_tail(x.contiguous(), cu_seqlens)
    inside = in_some_sequence(cu_seqlens, x.shape[0])
    return x.where(inside.view(-1, *[1] * (x.ndim - 1)), 0).contiguous()


@_zero_tail.register_fake
def _(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.backend = chosen_backend()
    ctx.save_for_backward(inputs[1])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    with use_backend(ctx.backend):
        return _zero_tail(grad, *ctx.saved_tensors), None


_zero_tail.register_autograd(_backward, setup_context=_setup_context)
