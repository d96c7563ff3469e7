"""The ratio loss over all positions of a batch, eq. (10): one operation for a dozen sums.

    L = N / (N - 1) * ((N - 1) F G + (1 - F) (1 - G)),        dL/dG = N / (N - 1) * (N F - 1)

Contract
    boundary_mask:  (total,), bool
    probs:          (total,), float
    cu_seqlens:     (batch + 1,), int32 or int64
    out loss:       scalar, float32 (float64 for float64 probs); 0 where there are no positions
    out weighted:   the loss times its weight

F is the share of positions that are boundaries and G the mean probability. F has no gradient. The
tail behind the last sequence counts for nothing. The weight is in here because by itself it takes
a launch forward and another backward.
"""

from typing import Any

import torch
from torch import Tensor

from h_net_dynamic_chunking.ops.backend import chosen_backend, kernels, use_backend, uses_triton
from h_net_dynamic_chunking.ops.packing import accumulation_dtype, in_some_sequence
from h_net_dynamic_chunking.ops.registration import operation


def pooled_ratio_loss(
    boundary_mask: Tensor,
    probs: Tensor,
    cu_seqlens: Tensor,
    target_ratio: float,
    weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Loss and weighted loss, pooled over the batch; the contract is at the top of this file."""
    loss: Tensor
    weighted: Tensor
    loss, weighted, _ = _ratio_loss(
        boundary_mask, probs, cu_seqlens, float(target_ratio), float(weight)
    )
    return loss, weighted


@operation("ratio_loss")
def _ratio_loss(
    boundary_mask: Tensor, probs: Tensor, cu_seqlens: Tensor, target_ratio: float, weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, weighted loss, and the derivative of the loss by the probability of any position."""
    if uses_triton(probs):
        results: tuple[Tensor, Tensor, Tensor] = kernels("ratio").ratio_loss_fwd(
            boundary_mask, probs, cu_seqlens, target_ratio, weight
        )
        return results
    n, live = target_ratio, in_some_sequence(cu_seqlens, probs.shape[0])
    dtype = accumulation_dtype(probs.dtype)
    count = live.sum()
    size = count.clamp(min=1)
    f = (boundary_mask & live).sum(dtype=dtype) / size
    g = probs.to(dtype).where(live, 0.0).sum() / size
    loss = (n / (n - 1) * ((n - 1) * f * g + (1 - f) * (1 - g))).where(count > 0, 0.0)
    return loss, weight * loss, n / (n - 1) * (n * f - 1) / size


@_ratio_loss.register_fake
def _(
    boundary_mask: Tensor, probs: Tensor, cu_seqlens: Tensor, target_ratio: float, weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    loss = probs.new_empty((), dtype=accumulation_dtype(probs.dtype))
    return loss, torch.empty_like(loss), torch.empty_like(loss)


@operation("ratio_loss_backward")
def _ratio_loss_backward(
    grad: Tensor | None,
    grad_weighted: Tensor | None,
    slope: Tensor,
    probs: Tensor,
    cu_seqlens: Tensor,
    weight: float,
    grad_probs: Tensor | None = None,
) -> Tensor:
    """The gradient of the probabilities, with what they have from elsewhere, `grad_probs`."""
    if uses_triton(probs):
        gradient: Tensor = kernels("ratio").ratio_loss_bwd(
            grad, grad_weighted, slope, probs, cu_seqlens, weight, grad_probs
        )
        return gradient
    live = in_some_sequence(cu_seqlens, probs.shape[0])
    both = torch.zeros_like(slope) if grad is None else grad
    if grad_weighted is not None:
        both = both + weight * grad_weighted
    of_loss = (both * slope).where(live, 0.0).to(probs.dtype)
    return of_loss if grad_probs is None else of_loss + grad_probs


@_ratio_loss_backward.register_fake
def _(
    grad: Tensor | None,
    grad_weighted: Tensor | None,
    slope: Tensor,
    probs: Tensor,
    cu_seqlens: Tensor,
    weight: float,
    grad_probs: Tensor | None = None,
) -> Tensor:
    return torch.empty_like(probs)


def _setup_context(
    ctx: Any,
    inputs: tuple[Tensor, Tensor, Tensor, float, float],
    output: tuple[Tensor, Tensor, Tensor],
) -> None:
    _, probs, cu_seqlens, _, ctx.weight = inputs
    ctx.backend = chosen_backend()
    ctx.save_for_backward(output[2], probs, cu_seqlens)
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad: Tensor | None, grad_weighted: Tensor | None, _: None
) -> tuple[None, Tensor | None, None, None, None]:
    if grad is None and grad_weighted is None:
        return None, None, None, None, None
    with use_backend(ctx.backend):
        grad_probs = _ratio_loss_backward(grad, grad_weighted, *ctx.saved_tensors, ctx.weight)
    return None, grad_probs, None, None, None


_ratio_loss.register_autograd(_backward, setup_context=_setup_context)
_ratio_loss_backward.refuse_autograd()
