"""A linear layer in float32 of vectors that are narrower: the residual of an H-Net, eq. (3).

    y = x W^T + b

Contract
    x:       (total, in), float
    weight:  (out, in), float
    bias:    (out,), float, or None
    out y:   (total, out), float32 (float64 for float64 x), whatever autocast says

The gradient of x is in its dtype, those of weight and bias are summed in float32 (float64). How the
products are made on a GPU is in `ops.wide_products`.
"""

from typing import Any

from torch import Tensor

from h_net_dynamic_chunking.ops.packing import accumulation_dtype, check_packed
from h_net_dynamic_chunking.ops.registration import operation
from h_net_dynamic_chunking.ops.wide_products import gradients, product


def wide_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The linear layer; the contract is at the top of this file.

    Raises:
        ValueError: shapes or dtypes off the contract.

    >>> import torch
    >>> wide_linear(torch.ones(1, 2).bfloat16(), torch.tensor([[1.0, 0.001]]))
    tensor([[1.0010]])
    """
    check_packed("x", x, 2)
    check_weight(x, weight, bias)
    y: Tensor = _wide_linear(x, weight, bias)
    return y


def check_weight(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError unless weight and bias fit x (total, in)."""
    if weight.ndim != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"weight must have shape (out, {x.shape[1]}), got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape {(len(weight),)}, got {tuple(bias.shape)}")


@operation("wide_linear")
def _wide_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return product(x, weight, bias)


@_wide_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=accumulation_dtype(x.dtype))


@operation("wide_linear_backward")
def _wide_linear_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return gradients(grad, x, weight)


@_wide_linear_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    x, weight, bias = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    grad_x, grad_weight, grad_bias = _wide_linear_backward(grad, *ctx.saved_tensors)
    return grad_x, grad_weight, None if ctx.bias_dtype is None else grad_bias.to(ctx.bias_dtype)


_wide_linear.register_autograd(_backward, setup_context=_setup_context)
_wide_linear_backward.refuse_autograd()
