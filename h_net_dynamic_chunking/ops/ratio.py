"""The ratio loss over all positions of a batch, eq. (10): one operation for a dozen sums.

    L = N / (N - 1) * ((N - 1) F G + (1 - F) (1 - G)),        dL/dG = N / (N - 1) * (N F - 1)

Contract
    boundary_mask:  (total,), bool
    probs:          (total,), float
    cu_seqlens:     (batch + 1,), int32 or int64
    out:            scalar, float32 (float64 for float64 probs); 0 where there are no positions

F is the share of positions that are boundaries and G the mean probability. F has no gradient. The
tail behind the last sequence counts for nothing.
"""

from typing import Any

import torch
from torch import Tensor

from h_net_dynamic_chunking.ops.backend import chosen_backend, use_backend, uses_triton
from h_net_dynamic_chunking.ops.packing import accumulation_dtype, in_some_sequence
from h_net_dynamic_chunking.ops.registration import operation


def pooled_ratio_loss(
    boundary_mask: Tensor, probs: Tensor, cu_seqlens: Tensor, target_ratio: float
) -> Tensor:
    """The ratio loss, pooled over the batch; the contract is at the top of this file."""
    loss: Tensor
    loss, _ = _ratio_loss(boundary_mask, probs, cu_seqlens, target_ratio)
    return loss


@operation("ratio_loss")
def _ratio_loss(
    boundary_mask: Tensor, probs: Tensor, cu_seqlens: Tensor, target_ratio: float
) -> tuple[Tensor, Tensor]:
    """The loss, and its derivative by the probability of any one position."""
    if uses_triton(probs):
        from h_net_dynamic_chunking.ops._triton.ratio import ratio_loss_fwd

        return ratio_loss_fwd(boundary_mask, probs, cu_seqlens, target_ratio)
    n, live = target_ratio, in_some_sequence(cu_seqlens, len(probs))
    dtype = accumulation_dtype(probs.dtype)
    count = live.sum()
    size = count.clamp(min=1)
    f = (boundary_mask & live).sum(dtype=dtype) / size
    g = probs.to(dtype).where(live, 0.0).sum() / size
    loss = n / (n - 1) * ((n - 1) * f * g + (1 - f) * (1 - g))
    slope = n / (n - 1) * (n * f - 1) / size
    return loss.where(count > 0, 0.0), slope


@_ratio_loss.register_fake
def _(
    boundary_mask: Tensor, probs: Tensor, cu_seqlens: Tensor, target_ratio: float
) -> tuple[Tensor, Tensor]:
    loss = probs.new_empty((), dtype=accumulation_dtype(probs.dtype))
    return loss, torch.empty_like(loss)


@operation("ratio_loss_backward")
def _ratio_loss_backward(grad: Tensor, slope: Tensor, probs: Tensor, cu_seqlens: Tensor) -> Tensor:
    if uses_triton(probs):
        from h_net_dynamic_chunking.ops._triton.ratio import ratio_loss_bwd

        return ratio_loss_bwd(grad, slope, probs, cu_seqlens)
    live = in_some_sequence(cu_seqlens, len(probs))
    return (grad * slope).where(live, 0.0).to(probs.dtype)


@_ratio_loss_backward.register_fake
def _(grad: Tensor, slope: Tensor, probs: Tensor, cu_seqlens: Tensor) -> Tensor:
    return torch.empty_like(probs)


def _setup_context(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: tuple[Tensor, Tensor]
) -> None:
    _, probs, cu_seqlens, _ = inputs
    ctx.backend = chosen_backend()
    ctx.save_for_backward(output[1], probs, cu_seqlens)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[None, Tensor | None, None, None]:
    if grad is None:
        return None, None, None, None
    with use_backend(ctx.backend):
        return None, _ratio_loss_backward(grad, *ctx.saved_tensors), None, None


_ratio_loss.register_autograd(_backward, setup_context=_setup_context)
_ratio_loss_backward.refuse_autograd()
