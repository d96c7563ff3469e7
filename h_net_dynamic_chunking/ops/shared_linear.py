"""A linear layer without bias whose input goes elsewhere too: routing, and the chunks cut from it.

The gradient of such an input is a sum. As a layer and a second use, autograd writes both terms and
then their sum; here the product of the backward pass is added to the other term where that lies.
"""

from typing import Any

import torch
from torch import Tensor, nn

from h_net_dynamic_chunking.ops.plain import product_weight
from h_net_dynamic_chunking.ops.registration import apply_of, is_watched


def shared_linear(x: Tensor, linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """`linear(x)` for x (total, in), and x for whatever else uses it."""
    weight = tracked_weight(x, linear)
    if weight is None:
        return linear(x), x
    y: Tensor
    y, x = _apply_shared(x, weight)
    return y, x


def tracked_weight(x: Tensor, linear: nn.Linear) -> Tensor | None:
    """The weight in the dtype of x, if x takes a gradient and the layer is a product, no more."""
    if not (x.requires_grad and torch.is_grad_enabled()):
        return None
    looked_at = torch.compiler.is_compiling() or is_watched()
    return None if looked_at else product_weight(linear, x)


class _SharedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        ctx.set_materialize_grads(False)
        return torch.nn.functional.linear(x, weight), x.view_as(x)

    @staticmethod
    def backward(
        ctx: Any, grad_y: Tensor | None, grad_x: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        if grad_y is None:
            return grad_x, None
        return gradients_of_shared(ctx, grad_y, grad_x, *ctx.saved_tensors)


_apply_shared = apply_of(_SharedLinear)


def gradients_of_shared(
    ctx: Any, grad_y: Tensor, grad_x: Tensor | None, x: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Of x, what the other use of it has sent included, and of the weight."""
    grad_weight = torch.mm(grad_y.t(), x) if ctx.needs_input_grad[1] else None
    if grad_x is None:
        grad_x = torch.mm(grad_y, weight)
    elif torch.is_grad_enabled():
        grad_x = torch.addmm(grad_x, grad_y, weight)
    else:
        # Nobody else holds it: x has gone to one operation, whose backward has just made it.
        grad_x = torch.addmm(grad_x, grad_y, weight, out=grad_x)
    return grad_x, grad_weight
