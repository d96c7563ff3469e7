"""RMSNorm of gated rows, all heads of a row together.

    out = g / sqrt(mean(g^2) + eps) * weight        with g = y silu(z)

Contract
    y:           (total, dim), float
    z:           (total, dim), dtype of y; any stride between the rows
    weight:      (dim,), float
    cu_seqlens:  (batch + 1,), int32 or int64
    out:         (total, dim), contiguous, dtype of y; zeros in the tail

Computed in float32 (float64 for float64) and rounded once.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from h_net_dynamic_chunking.ops.backend import chosen_backend, use_backend, uses_triton
from h_net_dynamic_chunking.ops.packing import (
    accumulation_dtype,
    check_cu_seqlens,
    check_packed,
    in_some_sequence,
)
from h_net_dynamic_chunking.ops.registration import operation

# Of a row that the kernels keep in registers; wider ones go to torch.
_MAX_DIM = 8192


def gated_norm(
    y: Tensor, z: Tensor, weight: Tensor, cu_seqlens: Tensor, *, eps: float = 1e-5
) -> Tensor:
    """The norm; the contract is at the top of this file.

    Raises:
        ValueError: shapes or dtypes off the contract.

    >>> y, z = torch.tensor([[3.0, -3.0]]), torch.tensor([[1.0, 1.0]])
    >>> gated_norm(y, z, torch.ones(2), torch.tensor([0, 1]))
    tensor([[ 1.0000, -1.0000]])
    """
    check_packed("y", y, 2)
    check_cu_seqlens(cu_seqlens)
    if z.shape != y.shape or z.dtype != y.dtype:
        raise ValueError(
            f"z must be {y.dtype} of shape {tuple(y.shape)}, got {z.dtype} of {tuple(z.shape)}"
        )
    if weight.shape != y.shape[1:]:
        raise ValueError(f"weight must have shape ({y.shape[1]},), got {tuple(weight.shape)}")
    out: Tensor = _gated_norm(y, z, weight, eps, cu_seqlens)
    return out


def gated_norm_torch(y: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same in differentiable torch, of rows of any shape and without a tail."""
    wide = accumulation_dtype(torch.promote_types(y.dtype, weight.dtype))
    gated = y.to(wide) * F.silu(z.to(wide))
    return F.rms_norm(gated, weight.shape, weight.to(wide), eps).to(y.dtype)


def runs_on_triton(y: Tensor) -> bool:
    return y.shape[1] <= _MAX_DIM and uses_triton(y)


@operation("gated_norm")
def _gated_norm(y: Tensor, z: Tensor, weight: Tensor, eps: float, cu_seqlens: Tensor) -> Tensor:
    if runs_on_triton(y):
        from h_net_dynamic_chunking.ops._triton.gated_norm import gated_norm_fwd

        z = z if z.stride(1) == 1 else z.contiguous()
        return gated_norm_fwd(y.contiguous(), z, weight, eps, cu_seqlens)
    inside = in_some_sequence(cu_seqlens, len(y))[:, None]
    return gated_norm_torch(y.where(inside, 0), z.where(inside, 0), weight, eps)


@_gated_norm.register_fake
def _(y: Tensor, z: Tensor, weight: Tensor, eps: float, cu_seqlens: Tensor) -> Tensor:
    return y.new_empty(y.shape)


@operation("gated_norm_backward")
def _gated_norm_backward(
    grad: Tensor, y: Tensor, z: Tensor, weight: Tensor, eps: float, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if runs_on_triton(y):
        from h_net_dynamic_chunking.ops._triton.gated_norm import gated_norm_bwd

        z = z if z.stride(1) == 1 else z.contiguous()
        grad_z = y.new_empty(y.shape)
        grad_y, grad_weight = gated_norm_bwd(
            grad.contiguous(), y.contiguous(), z, weight, eps, cu_seqlens, grad_z
        )
        return grad_y, grad_z, grad_weight
    inside = in_some_sequence(cu_seqlens, len(y))[:, None]
    wide = accumulation_dtype(torch.promote_types(y.dtype, weight.dtype))
    grad, wide_y, wide_z = (t.where(inside, 0).to(wide) for t in (grad, y, z))
    silu, wide_weight = F.silu(wide_z), weight.to(wide)
    gated = wide_y * silu
    scale = (gated.square().mean(-1, keepdim=True) + eps).rsqrt()
    normed = gated * scale
    weighted = grad * wide_weight
    grad_gated = scale * (weighted - normed * (weighted * normed).mean(-1, keepdim=True))
    grad_z = torch.ops.aten.silu_backward(grad_gated * wide_y, wide_z)
    grad_weight = (grad * normed).sum(0)
    return (grad_gated * silu).to(y.dtype), grad_z.to(y.dtype), grad_weight.to(weight.dtype)


@_gated_norm_backward.register_fake
def _(
    grad: Tensor, y: Tensor, z: Tensor, weight: Tensor, eps: float, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return y.new_empty(y.shape), y.new_empty(y.shape), weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, z, weight, ctx.eps, cu_seqlens = inputs
    ctx.backend = chosen_backend()
    ctx.save_for_backward(y, z, weight, cu_seqlens)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    y, z, weight, cu_seqlens = ctx.saved_tensors
    with use_backend(ctx.backend):
        return *_gated_norm_backward(grad, y, z, weight, ctx.eps, cu_seqlens), None, None


_gated_norm.register_autograd(_backward, setup_context=_setup_context)
_gated_norm_backward.refuse_autograd()
