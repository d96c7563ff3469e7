"""A depthwise causal convolution of a few taps, with bias and SiLU, over packed sequences.

    out_t = silu(bias + sum over k of weight_k x_{t - taps + 1 + k}),        for each channel

Contract
    x:           (total, channels), float; any stride between the rows
    weight:      (channels, 1, taps), float, as of torch.nn.Conv1d
    bias:        (channels,), float
    cu_seqlens:  (batch + 1,), int32 or int64
    out:         (total, channels), contiguous, dtype of x; zeros in the tail

Before the start of a sequence stand zeros. Accumulates in float32 (float64 for float64) on Triton;
torch rounds to the dtype of x before the SiLU.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from h_net_dynamic_chunking.ops.backend import chosen_backend, use_backend, uses_triton
from h_net_dynamic_chunking.ops.packing import (
    check_cu_seqlens,
    check_packed,
    in_some_sequence,
    sequence_of_position,
)
from h_net_dynamic_chunking.ops.registration import operation

# Of the kernels; more go to torch.
_MAX_TAPS = 4


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The convolution; the contract is at the top of this file.

    Raises:
        ValueError: shapes or dtypes off the contract.

    >>> x, weight = torch.ones(3, 1), torch.ones(1, 1, 2)
    >>> causal_conv(x, weight, torch.zeros(1), torch.tensor([0, 2, 3])).flatten()
    tensor([0.7311, 1.7616, 0.7311])
    """
    check_packed("x", x, 2)
    check_cu_seqlens(cu_seqlens)
    channels = x.shape[1]
    if weight.ndim != 3 or weight.shape[:2] != (channels, 1) or weight.shape[2] < 1:
        raise ValueError(f"weight must have shape ({channels}, 1, taps), got {tuple(weight.shape)}")
    if bias.shape != (channels,):
        raise ValueError(f"bias must have shape ({channels},), got {tuple(bias.shape)}")
    out: Tensor = _causal_conv(x, weight, bias, cu_seqlens)
    return out


def causal_conv_torch(x: Tensor, weight: Tensor, bias: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The same in differentiable torch."""
    inside = in_some_sequence(cu_seqlens, len(x))[:, None]
    spread, row = _spread(x.where(inside, 0), cu_seqlens, weight.shape[2])
    return F.silu(_convolve(spread, weight, bias)[row]).where(inside, 0)


def _spread(x: Tensor, cu_seqlens: Tensor, taps: int) -> tuple[Tensor, Tensor]:
    """x with zeros, as many as taps reach back, between the sequences; and where its rows are now.

    Empty sequences and the tail are sequences too. One zero stands behind, so that there is a row.
    """
    (total, channels), batch = x.shape, len(cu_seqlens) - 1
    row = torch.arange(total, device=x.device)
    row = row + sequence_of_position(cu_seqlens, total) * (taps - 1)
    spread = x.new_zeros(total + batch * (taps - 1) + 1, channels)
    return spread.index_copy(0, row, x), row


def _convolve(spread: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Before the SiLU: as many rows as of `spread`, and some behind them."""
    weight, bias = weight.to(spread.dtype), bias.to(spread.dtype)
    padding, groups = weight.shape[2] - 1, len(weight)
    return F.conv1d(spread.mT[None], weight, bias, padding=padding, groups=groups)[0].mT


def runs_on_triton(x: Tensor, weight: Tensor) -> bool:
    return weight.shape[2] <= _MAX_TAPS and uses_triton(x)


@operation("causal_conv")
def _causal_conv(x: Tensor, weight: Tensor, bias: Tensor, cu_seqlens: Tensor) -> Tensor:
    if runs_on_triton(x, weight):
        from h_net_dynamic_chunking.ops._triton.causal_conv import conv_fwd
        from h_net_dynamic_chunking.ops._triton.sequence_ids import sequence_ids

        sequence = sequence_ids(cu_seqlens, len(x))
        return conv_fwd(_rows(x), weight, bias, sequence, len(cu_seqlens) - 1)
    return causal_conv_torch(x, weight, bias, cu_seqlens).contiguous()


def _rows(x: Tensor) -> Tensor:
    """x, of which each row is contiguous."""
    return x if x.stride(1) == 1 else x.contiguous()


@_causal_conv.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, cu_seqlens: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@operation("causal_conv_backward")
def _causal_conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if runs_on_triton(x, weight):
        from h_net_dynamic_chunking.ops._triton.causal_conv import conv_bwd
        from h_net_dynamic_chunking.ops._triton.sequence_ids import sequence_ids

        sequence, grad_x = sequence_ids(cu_seqlens, len(x)), x.new_empty(x.shape)
        grad, x, batch = grad.contiguous(), _rows(x), len(cu_seqlens) - 1
        return grad_x, *conv_bwd(grad, x, weight, bias, sequence, batch, grad_x)
    inside = in_some_sequence(cu_seqlens, len(x))[:, None]
    spread, row = _spread(x.where(inside, 0), cu_seqlens, weight.shape[2])
    convolved = _convolve(spread, weight, bias)
    grad = torch.ops.aten.silu_backward(grad.where(inside, 0), convolved[row])
    grad_spread, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        torch.zeros_like(convolved).index_copy(0, row, grad).mT[None],
        spread.mT[None],
        weight.to(x.dtype),
        [len(weight)],
        [1],
        [weight.shape[2] - 1],
        [1],
        False,
        [0],
        len(weight),
        [True, True, True],
    )
    grad_x = grad_spread[0].mT[row].where(inside, 0)
    return grad_x.contiguous(), grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)


@_causal_conv_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.backend = chosen_backend()
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    with use_backend(ctx.backend):
        return *_causal_conv_backward(grad, *ctx.saved_tensors), None


_causal_conv.register_autograd(_backward, setup_context=_setup_context)
_causal_conv_backward.refuse_autograd()
