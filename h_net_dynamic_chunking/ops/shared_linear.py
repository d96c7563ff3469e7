"""A linear layer without bias whose input goes elsewhere too: routing, and the chunks cut from it.

The gradient of such an input is a sum. As a layer and a second use, autograd writes both terms and
then their sum; here the product of the backward pass is added to the other term where that lies.
"""

from typing import Any

import torch
from torch import Tensor, nn

from h_net_dynamic_chunking.ops.packing import autocast_dtype
from h_net_dynamic_chunking.ops.plain import is_plain
from h_net_dynamic_chunking.ops.registration import PLAIN, is_watched


def shared_linear(x: Tensor, linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """`linear(x)` for x (total, in), and x for whatever else uses it."""
    if not (x.requires_grad and torch.is_grad_enabled()) or not _is_plain(x, linear):
        return linear(x), x
    y: Tensor
    y, x = _SharedLinear.apply(x, linear.weight.to(x.dtype))  # type: ignore[no-untyped-call]  # torch's
    return y, x


def _is_plain(x: Tensor, linear: nn.Linear) -> bool:
    """Whether the layer is a product and nothing else, in the dtype of x."""
    return (
        is_plain(linear, nn.Linear)
        and linear.bias is None
        and x.dtype == (autocast_dtype(x) or linear.weight.dtype)
        and type(x) in PLAIN
        and type(linear.weight) in PLAIN
        and not torch.compiler.is_compiling()
        and not is_watched()
    )


class _SharedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        ctx.set_materialize_grads(False)
        return torch.mm(x, weight.t()), x.view_as(x)

    @staticmethod
    def backward(
        ctx: Any, grad_y: Tensor | None, grad_x: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        if grad_y is None:
            return grad_x, None
        grad_weight = torch.mm(grad_y.t(), x) if ctx.needs_input_grad[1] else None
        if grad_x is None:
            grad_x = torch.mm(grad_y, weight)
        elif torch.is_grad_enabled():
            grad_x = torch.addmm(grad_x, grad_y, weight)
        else:
            # Nobody else holds it: x has gone to one operation, whose backward has just made it.
            grad_x = torch.addmm(grad_x, grad_y, weight, out=grad_x)
        return grad_x, grad_weight
