"""A depthwise causal convolution of a few taps, with bias and SiLU, over each sequence.

    out_t = silu(bias + sum over k of weight_k x_{t - taps + 1 + k}),        for each channel

Contract
    x:           (total, channels), float, packed; or (batch, length, channels)
    weight:      (channels, 1, taps), float, as of torch.nn.Conv1d
    bias:        (channels,), float
    cu_seqlens:  (batch + 1,), int32 or int64; None for the second form of x, where every row is one
                 sequence
    out:         shape and dtype of x, contiguous; zeros in the tail

Before the start of a sequence stand zeros. The tail may hold anything and gets no gradient.
Accumulates in float32 on Triton; torch rounds to the dtype of x before the SiLU. x may be a slice
of wider rows.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from h_net_dynamic_chunking.ops.backend import chosen_backend, use_backend, uses_triton
from h_net_dynamic_chunking.ops.packing import (
    accumulation_dtype,
    check_packed_or_padded,
    cu_seqlens_of_rows,
    flat_rows,
    in_some_sequence,
    sequence_of_position,
    zero_rows_,
    zero_tail_,
)
from h_net_dynamic_chunking.ops.registration import operation

# The kernels keep as many rows in registers; more taps go to torch.
_MOST_TAPS = 4


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor, cu_seqlens: Tensor | None = None
) -> Tensor:
    """The convolution; the contract is at the top of this file.

    Raises:
        ValueError: shapes or dtypes off the contract.

    >>> x, weight = torch.ones(3, 1), torch.ones(1, 1, 2)
    >>> causal_conv(x, weight, torch.zeros(1), torch.tensor([0, 2, 3])).flatten()
    tensor([0.7311, 1.7616, 0.7311])
    """
    check_packed_or_padded("x", x, cu_seqlens)
    channels = x.shape[-1]
    if weight.ndim != 3 or weight.shape[:2] != (channels, 1) or weight.shape[2] < 1:
        raise ValueError(f"weight must have shape ({channels}, 1, taps), got {tuple(weight.shape)}")
    if bias.shape != (channels,):
        raise ValueError(f"bias must have shape ({channels},), got {tuple(bias.shape)}")
    out: Tensor = _causal_conv(x, weight, bias, cu_seqlens)
    return out


def why_no_conv_kernels(taps: int) -> str | None:
    """Why the kernels do not take so many taps, or None if they do."""
    if taps <= _MOST_TAPS:
        return None
    return f"the kernels take up to {_MOST_TAPS} taps, not {taps}"


@operation("causal_conv")
def _causal_conv(x: Tensor, weight: Tensor, bias: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    if x.numel() == 0:
        return x.new_empty(x.shape)
    if uses_triton(x, unfit=why_no_conv_kernels(weight.shape[2])):
        from h_net_dynamic_chunking.ops._triton.causal_conv import conv_fwd
        from h_net_dynamic_chunking.ops._triton.sequence_ids import sequence_ids

        cu_seqlens = cu_seqlens_of_rows(x) if cu_seqlens is None else cu_seqlens
        flat = flat_rows(x)
        ids = sequence_ids(cu_seqlens, len(flat))
        return conv_fwd(flat, weight, bias, *ids).view(x.shape)
    rows, row = spread_rows(x, cu_seqlens, weight.shape[2])
    out = _at_positions(F.silu(_convolve(rows, weight, bias), inplace=True), row, x)
    return zero_tail_(out, cu_seqlens)


@_causal_conv.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


@operation("causal_conv_backward")
def _causal_conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    if x.numel() == 0:
        return x.new_empty(x.shape), torch.zeros_like(weight), torch.zeros_like(bias)
    if uses_triton(x, unfit=why_no_conv_kernels(weight.shape[2])):
        from h_net_dynamic_chunking.ops._triton.causal_conv import conv_bwd
        from h_net_dynamic_chunking.ops._triton.sequence_ids import sequence_ids

        cu_seqlens = cu_seqlens_of_rows(x) if cu_seqlens is None else cu_seqlens
        flat = flat_rows(x)
        ids = sequence_ids(cu_seqlens, len(flat))
        grad_x = x.new_empty(x.shape)
        grad = flat_rows(grad).contiguous()
        return grad_x, *conv_bwd(grad, flat, weight, bias, *ids, flat_rows(grad_x))
    return _backward_torch(grad, x, weight, bias, cu_seqlens)


@_causal_conv_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
    ctx.backend = chosen_backend()
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    with use_backend(ctx.backend):
        return *_causal_conv_backward(grad, *ctx.saved_tensors), None


_causal_conv.register_autograd(_backward, setup_context=_setup_context)
_causal_conv_backward.refuse_autograd()


def spread_rows(x: Tensor, cu_seqlens: Tensor | None, taps: int) -> tuple[Tensor, Tensor | None]:
    """x as (batch, length, channels); packed x as one row, and where its positions are in it.

    That row has zeros, as many as taps reach back, between the sequences, of which empty ones and
    the tail are some too. The tail holds zeros.
    """
    if cu_seqlens is None:
        return x, None
    (total, channels), between = x.shape, taps - 1
    row = torch.arange(total, device=x.device)
    row = row + sequence_of_position(cu_seqlens, total) * between
    zeros = (len(cu_seqlens) - 1) * between
    spread = x.new_zeros(total + zeros, channels).index_copy_(0, row, x)
    return zero_rows_(spread, ~in_some_sequence(cu_seqlens + zeros, len(spread)))[None], row


def _convolve(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Before the SiLU, like rows (batch, length, channels), in the dtype of accumulation.

    Tap by tap: torch's convolution wants channels before positions, and takes a CPU twice as long.
    """
    wide = accumulation_dtype(rows.dtype)
    rows, taps = rows.to(wide), weight.flatten(1).to(wide).unbind(1)
    out = rows * taps[-1] + bias.to(wide)
    for back in range(1, min(len(taps), rows.shape[1])):
        out[:, back:].addcmul_(rows[:, :-back], taps[-1 - back])
    return out


def _convolve_backward(grad: Tensor, rows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of rows, weight and bias, in the dtype of grad."""
    rows, taps = rows.to(grad.dtype), weight.flatten(1).to(grad.dtype).unbind(1)
    grad_rows, grad_taps = grad * taps[-1], [(grad * rows).sum((0, 1))]
    for back in range(1, len(taps)):
        # Empty slices where the taps reach back further than a row is long.
        later, earlier = grad[:, back:], rows[:, : max(rows.shape[1] - back, 0)]
        grad_rows[:, : earlier.shape[1]].addcmul_(later, taps[-1 - back])
        grad_taps.append((later * earlier).sum((0, 1)))
    grad_weight = torch.stack(grad_taps[::-1], dim=1).view(weight.shape)
    return grad_rows, grad_weight, grad.sum((0, 1))


def _at_positions(rows: Tensor, row: Tensor | None, x: Tensor) -> Tensor:
    """What stands at the positions of x, in its dtype."""
    return (rows if row is None else rows[0].index_select(0, row)).to(x.dtype)


def _backward_torch(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    rows, row = spread_rows(x, cu_seqlens, weight.shape[2])
    convolved = _convolve(rows, weight, bias)
    if row is not None:
        grad = zero_tail_(grad.clone(), cu_seqlens)
        grad = grad.new_zeros(rows.shape[1:]).index_copy_(0, row, grad)[None]
    grad = torch.ops.aten.silu_backward(grad.to(convolved.dtype), convolved)
    grad_rows, grad_weight, grad_bias = _convolve_backward(grad, rows, weight)
    grad_x = zero_tail_(_at_positions(grad_rows, row, x), cu_seqlens)
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)
