"""From tokens to boundaries in one node of autograd: projection, probability, cut and ratio loss.

To the host a node costs more than a launch, in both directions. The probabilities have two
gradients, from the loss and from their other uses; between nodes, autograd would add them up in a
kernel of its own. As the loss comes out beside the probabilities, and not of them, it is for
callers that keep the probabilities to themselves.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from h_net_dynamic_chunking.ops.backend import chosen_backend, use_backend
from h_net_dynamic_chunking.ops.boundary import (
    _boundary_probability,
    _boundary_probability_backward,
    boundary_probability_of_pairs,
)
from h_net_dynamic_chunking.ops.compaction import PendingSegmentation
from h_net_dynamic_chunking.ops.ratio import _ratio_loss, _ratio_loss_backward, pooled_ratio_loss
from h_net_dynamic_chunking.ops.registration import apply_of
from h_net_dynamic_chunking.ops.shared_linear import (
    gradients_of_shared,
    shared_linear,
    tracked_weight,
)


class Routing(NamedTuple):
    """Where tokens are cut, while the number of chunks is on its way to the host."""

    tokens: Tensor
    """(total, dim): packed, for whatever else uses them."""
    queries_keys: Tensor | None
    """(total, 2 * dim_queries_keys): side by side; None where they stay inside one node."""
    probs: Tensor
    """float32 (float64 for float64) (total,)."""
    pending: PendingSegmentation
    losses: tuple[Tensor, Tensor] | None
    """The ratio loss, before and after its weight; None where it is yet to be computed."""


def routed(
    x: Tensor,
    linear: nn.Linear,
    cu_seqlens: Tensor,
    cut: Callable[[Tensor], PendingSegmentation],
    start_key: Tensor | None = None,
    ratio: tuple[float, float] | None = None,
) -> Routing:
    """`boundary_probability_of_pairs(linear(x), ...)`, what `cut` makes of it, and the loss.

    Args:
        x: (total, in); packed.
        linear: makes queries and keys, side by side.
        cu_seqlens: as everywhere.
        cut: Where there are boundaries; must not record gradients.
        start_key: As for `boundary_probability_of_pairs`.
        ratio: N of the ratio loss, and its weight.
    """
    weight = None if start_key is not None else tracked_weight(x, linear)
    if weight is not None:
        # A function of autograd takes and returns tensors, and what else it makes by a list.
        made: list[PendingSegmentation] = []
        p, x, *losses = _apply_routed(x, weight, cu_seqlens, cut, ratio, made)
        if ratio is None:
            return Routing(x, None, p, made[0], None)
        # Views, because a hook on a result of a node is called, with None, by a backward pass that
        # comes to the node but not from that result.
        loss, weighted = (loss.view(()) for loss in losses)
        return Routing(x, None, p, made[0], (loss, weighted))
    queries_keys, x = shared_linear(x, linear)
    p = boundary_probability_of_pairs(queries_keys, cu_seqlens, start_key)
    pending = cut(p)
    pooled = None if ratio is None else pooled_ratio_loss(pending.wanted, p, cu_seqlens, *ratio)
    return Routing(x, queries_keys, p, pending, pooled)


class _Routed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        cu_seqlens: Tensor,
        cut: Callable[[Tensor], PendingSegmentation],
        ratio: tuple[float, float] | None,
        made: list[PendingSegmentation],
    ) -> tuple[Tensor | None, ...]:
        queries_keys = torch.nn.functional.linear(x, weight)
        p = _boundary_probability(queries_keys, cu_seqlens)
        pending = cut(p)
        made.append(pending)
        loss = weighted = slope = None
        if ratio is not None:
            loss, weighted, slope = _ratio_loss(pending.wanted, p, cu_seqlens, *ratio)
            ctx.loss_weight = ratio[1]
        ctx.save_for_backward(
            x, weight, queries_keys, cu_seqlens, None if slope is None else p, slope
        )
        ctx.set_materialize_grads(False)
        ctx.backend = chosen_backend()
        return p, x.view_as(x), loss, weighted

    @staticmethod
    def backward(
        ctx: Any,
        grad_p: Tensor | None,
        grad_x: Tensor | None,
        grad_loss: Tensor | None,
        grad_weighted: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        if grad_p is None and grad_loss is None and grad_weighted is None:
            return grad_x, *[None] * 5
        x, weight, queries_keys, cu_seqlens, p, slope = ctx.saved_tensors
        with use_backend(ctx.backend):
            if grad_loss is not None or grad_weighted is not None:
                grad_p = _ratio_loss_backward(
                    grad_loss, grad_weighted, slope, p, cu_seqlens, ctx.loss_weight, grad_p
                )
            if torch.is_grad_enabled():
                # What was saved is a constant to autograd, which has to see what is refused here.
                queries_keys = torch.mm(x, weight.t())
            grad_y = _boundary_probability_backward(grad_p, queries_keys, cu_seqlens)
        return *gradients_of_shared(ctx, grad_y, grad_x, x, weight), *[None] * 4


_apply_routed = apply_of(_Routed)
