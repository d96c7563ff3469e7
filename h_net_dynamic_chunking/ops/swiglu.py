"""The gate of an MLP: value * silu(gate) of the halves of one tensor.

Contract
    x:    (..., 2 * width), float: values first, gates behind
    out:  (..., width), dtype of x, contiguous; computed in float32 (float64 for float64), rounded
          once

The gradient of x is written whole, so that no halves are put together.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from h_net_dynamic_chunking.ops.backend import chosen_backend, use_backend, uses_triton
from h_net_dynamic_chunking.ops.packing import accumulation_dtype, check_float
from h_net_dynamic_chunking.ops.registration import operation


def swiglu(x: Tensor) -> Tensor:
    """value * silu(gate); the contract is at the top of this file.

    Raises:
        ValueError: x of integers, or with an odd last dimension.

    >>> swiglu(torch.tensor([2.0, 3.0, 0.0, 20.0]))
    tensor([ 0., 60.])
    """
    check_halves(x)
    out: Tensor = _swiglu(x)
    return out


def check_halves(x: Tensor) -> None:
    """Raise ValueError unless x is as the contract has it."""
    check_float("x", x)
    if x.shape[-1] % 2:
        raise ValueError(f"x must have an even last dimension, got {tuple(x.shape)}")


@operation("swiglu")
def _swiglu(x: Tensor) -> Tensor:
    if uses_triton(x):
        from h_net_dynamic_chunking.ops._triton.swiglu import swiglu_fwd

        return swiglu_fwd(x)
    value, gate = x.to(accumulation_dtype(x.dtype)).chunk(2, dim=-1)
    # The strides that the fake promises, whatever those of x are: compiled code asserts them.
    return (value * F.silu(gate)).to(x.dtype).contiguous()


@_swiglu.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@operation("swiglu_backward")
def _swiglu_backward(grad: Tensor, x: Tensor) -> Tensor:
    if uses_triton(x):
        from h_net_dynamic_chunking.ops._triton.swiglu import swiglu_bwd

        return swiglu_bwd(grad, x)
    wide = accumulation_dtype(x.dtype)
    value, gate = x.to(wide).chunk(2, dim=-1)
    grad = grad.to(wide)
    grad_gate = torch.ops.aten.silu_backward(grad * value, gate)
    return torch.cat((grad * F.silu(gate), grad_gate), dim=-1).to(x.dtype)


@_swiglu_backward.register_fake
def _(grad: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def gradient_and_result(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of x, and the result again, which may take the place of `grad`, contiguous.

    Without autograd, inside an operation.
    """
    if uses_triton(x):
        from h_net_dynamic_chunking.ops._triton.swiglu import swiglu_bwd

        return swiglu_bwd(grad, x, again=True), grad
    return _swiglu_backward(grad, x), _swiglu(x)


def _setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.backend = chosen_backend()
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    with use_backend(ctx.backend):
        grad_x: Tensor = _swiglu_backward(grad, *ctx.saved_tensors)
    return grad_x


_swiglu.register_autograd(_backward, setup_context=_setup_context)
_swiglu_backward.refuse_autograd()
