"""The gate of an MLP and the linear layer behind it, which keep no gated rows.

    y = (value * silu(gate)) W^T,       [value; gate] = x

Contract
    x:       (..., 2 * width), float: values first, gates behind
    weight:  (out, width), dtype of x
    y:       (..., out), dtype of x; the gated rows are rounded to it as by `ops.swiglu`
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from h_net_dynamic_chunking.ops.backend import chosen_backend, use_backend
from h_net_dynamic_chunking.ops.registration import operation
from h_net_dynamic_chunking.ops.swiglu import _swiglu, check_halves, gradient_and_result, swiglu
from h_net_dynamic_chunking.ops.unkept_input import weight_to_take


def swiglu_linear(x: Tensor, linear: nn.Linear) -> Tensor:
    """`linear(swiglu(x))`, whatever module that is; the numbers do not depend on how.

    Raises:
        ValueError: x of integers, or with an odd last dimension.
    """
    check_halves(x)
    weight = weight_to_take(linear, x)
    y: Tensor = linear(swiglu(x)) if weight is None else _swiglu_linear(x, weight)
    return y


@operation("swiglu_linear")
def _swiglu_linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(_swiglu(x), weight)


@_swiglu_linear.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@operation("swiglu_linear_backward")
def _swiglu_linear_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    rows = grad.reshape(-1, grad.shape[-1])
    grad_x, gated = gradient_and_result(rows @ weight, x.reshape(-1, x.shape[-1]))
    return grad_x.view(x.shape), rows.t() @ gated


@_swiglu_linear_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.backend = chosen_backend()
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    with use_backend(ctx.backend):
        grad_x, grad_weight = _swiglu_linear_backward(grad, *ctx.saved_tensors)
    return grad_x, grad_weight


_swiglu_linear.register_autograd(_backward, setup_context=_setup_context)
_swiglu_linear_backward.refuse_autograd()
