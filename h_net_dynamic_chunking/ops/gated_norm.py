"""RMSNorm of gated rows, all heads of a row together.

    out = g / sqrt(mean(g^2) + eps) * weight        with g = y silu(z)

Contract
    y:           (total, dim), float, packed; or (batch, length, dim)
    z:           shape and dtype of y
    weight:      (dim,), float
    cu_seqlens:  (batch + 1,), int32 or int64; None for the second form of y
    out:         shape and dtype of y, contiguous; zeros in the tail

Computed in float32 (float64 for float64) and rounded once. The tail may hold anything and gets no
gradient. z may be a slice of wider rows.
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
    zero_tail_,
)
from h_net_dynamic_chunking.ops.registration import operation

# A program of the kernels keeps a whole row in registers; wider ones go to torch.
_WIDEST = 8192


def gated_norm(
    y: Tensor,
    z: Tensor,
    weight: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> Tensor:
    """The norm; the contract is at the top of this file.

    Raises:
        ValueError: shapes or dtypes off the contract.

    >>> y, z = torch.tensor([[3.0, -3.0]]), torch.tensor([[1.0, 1.0]])
    >>> gated_norm(y, z, torch.ones(2), torch.tensor([0, 1]))
    tensor([[ 1.0000, -1.0000]])
    """
    check_packed_or_padded("y", y, cu_seqlens)
    if z.shape != y.shape or z.dtype != y.dtype:
        raise ValueError(
            f"z must be {y.dtype} of shape {tuple(y.shape)}, got {z.dtype} of {tuple(z.shape)}"
        )
    if weight.shape != y.shape[-1:]:
        raise ValueError(f"weight must have shape ({y.shape[-1]},), got {tuple(weight.shape)}")
    out: Tensor = _gated_norm(y, z, weight, eps, cu_seqlens)
    return out


def why_no_norm_kernels(dim: int) -> str | None:
    """Why the kernels do not take rows that wide, or None if they do."""
    return None if dim <= _WIDEST else f"the kernels take rows of up to {_WIDEST}, not {dim}"


@operation("gated_norm")
def _gated_norm(
    y: Tensor, z: Tensor, weight: Tensor, eps: float, cu_seqlens: Tensor | None
) -> Tensor:
    if uses_triton(y, unfit=why_no_norm_kernels(len(weight))):
        from h_net_dynamic_chunking.ops._triton.gated_norm import gated_norm_fwd

        cu_seqlens = cu_seqlens_of_rows(y) if cu_seqlens is None else cu_seqlens
        flat_y, flat_z = flat_rows(y).contiguous(), flat_rows(z)
        return gated_norm_fwd(flat_y, flat_z, weight, eps, cu_seqlens).view(y.shape)
    wide = _wide(y, weight)
    gated = F.silu(z.to(wide)).mul_(y)
    out = F.rms_norm(gated, weight.shape, weight.to(wide), eps).to(y.dtype)
    return zero_tail_(out.contiguous(), cu_seqlens)


@_gated_norm.register_fake
def _(y: Tensor, z: Tensor, weight: Tensor, eps: float, cu_seqlens: Tensor | None) -> Tensor:
    return y.new_empty(y.shape)


@operation("gated_norm_backward")
def _gated_norm_backward(
    grad: Tensor, y: Tensor, z: Tensor, weight: Tensor, eps: float, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    if uses_triton(y, unfit=why_no_norm_kernels(len(weight))):
        from h_net_dynamic_chunking.ops._triton.gated_norm import gated_norm_bwd

        cu_seqlens = cu_seqlens_of_rows(y) if cu_seqlens is None else cu_seqlens
        flat_grad, flat_y = flat_rows(grad).contiguous(), flat_rows(y).contiguous()
        grad_z = y.new_empty(y.shape)
        grad_y, grad_weight = gated_norm_bwd(
            flat_grad, flat_y, flat_rows(z), weight, eps, cu_seqlens, flat_rows(grad_z)
        )
        return grad_y.view(y.shape), grad_z, grad_weight
    wide = _wide(y, weight)
    grad, wide_z = grad.to(wide), z.to(wide)
    silu = F.silu(wide_z)
    gated = silu * y
    scale = (gated.square().mean(-1, keepdim=True) + eps).rsqrt()
    normed = gated.mul_(scale)
    weighted = grad * weight.to(wide)
    along = (weighted * normed).mean(-1, keepdim=True)
    grad_gated = weighted.addcmul_(normed, along, value=-1).mul_(scale)
    grad_weight = zero_tail_(normed.mul_(grad), cu_seqlens).flatten(0, -2).sum(0)
    grad_z = torch.ops.aten.silu_backward(grad_gated * y, wide_z)
    # Contiguous, as registered, where y is not.
    gradients = (g.to(y.dtype).contiguous() for g in (silu.mul_(grad_gated), grad_z))
    grad_y, grad_z = (zero_tail_(g, cu_seqlens) for g in gradients)
    return grad_y, grad_z, grad_weight.to(weight.dtype)


@_gated_norm_backward.register_fake
def _(
    grad: Tensor, y: Tensor, z: Tensor, weight: Tensor, eps: float, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return y.new_empty(y.shape), y.new_empty(y.shape), weight.new_empty(weight.shape)


def _wide(y: Tensor, weight: Tensor) -> torch.dtype:
    return accumulation_dtype(torch.promote_types(y.dtype, weight.dtype))


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
