"""What stands between the two projections of a Mamba-2 layer, as one operation.

    gate, conv_in, raw = projected,       x, B, C = causal_conv(conv_in)
    y = ssd(x, softplus(raw + dt_bias), -exp(A_log), B, C, D),       out = gated_norm(y, gate)

Contract
    projected:    (total, 2 d_inner + 2 d_state + heads), float: gate, conv_in and raw side by side
    conv_weight:  (d_inner + 2 d_state, 1, taps), conv_bias (d_inner + 2 d_state,)
    dt_bias, A_log, D:  (heads,)
    norm_weight:  (d_inner,)
    cu_seqlens:   (batch + 1,), int32 or int64
    out:          (total, d_inner), dtype of projected; zeros in the tail

As one operation the gradients of the three parts are written where they belong, into one buffer,
and what can be had again cheaply is not kept for the backward pass: projected and y are.
"""

from typing import Any

from torch import Tensor

from h_net_dynamic_chunking.ops.backend import chosen_backend, use_backend
from h_net_dynamic_chunking.ops.registration import operation


def mamba2_inner(
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    cu_seqlens: Tensor,
    *,
    eps: float = 1e-5,
) -> Tensor:
    """The operation; the contract is at the top of this file."""
    parameters = conv_weight, conv_bias, dt_bias, A_log, D, norm_weight
    out: Tensor = _mamba2_inner(projected, *parameters, eps, cu_seqlens)[0]
    return out


@operation("mamba2_inner")
def _mamba2_inner(
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    eps: float,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor]:
    """The result, and y (total, d_inner)."""
    from h_net_dynamic_chunking.ops._triton.mamba2 import mamba2_fwd

    parameters = conv_weight, conv_bias, dt_bias, A_log, D, norm_weight
    return mamba2_fwd(projected, *parameters, eps, cu_seqlens)


@_mamba2_inner.register_fake
def _(
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    eps: float,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor]:
    shape = projected.shape[0], norm_weight.shape[0]
    return projected.new_empty(shape), projected.new_empty(shape)


@operation("mamba2_inner_backward")
def _mamba2_inner_backward(
    grad: Tensor,
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    eps: float,
    cu_seqlens: Tensor,
    y: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from h_net_dynamic_chunking.ops._triton.mamba2 import mamba2_bwd

    parameters = conv_weight, conv_bias, dt_bias, A_log, D, norm_weight
    return mamba2_bwd(grad.contiguous(), projected, *parameters, eps, cu_seqlens, y)


@_mamba2_inner_backward.register_fake
def _(
    grad: Tensor,
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    eps: float,
    cu_seqlens: Tensor,
    y: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    parameters = conv_weight, conv_bias, dt_bias, A_log, D, norm_weight
    a, b, c, d, e, f = (p.new_empty(p.shape) for p in parameters)
    return projected.new_empty(projected.shape), a, b, c, d, e, f


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.eps, cu_seqlens = inputs
    ctx.backend = chosen_backend()
    ctx.save_for_backward(*tensors, cu_seqlens, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    *tensors, cu_seqlens, y = ctx.saved_tensors
    with use_backend(ctx.backend):
        gradients = _mamba2_inner_backward(grad, *tensors, ctx.eps, cu_seqlens, y)
    return *gradients, None, None


_mamba2_inner.register_autograd(_backward, setup_context=_setup_context)
_mamba2_inner_backward.refuse_autograd()
