"""Whether a module does what its class says, so that an operation may take its weights instead."""

import itertools

import torch
from torch import Tensor, nn

from h_net_dynamic_chunking.ops.packing import autocast_dtype
from h_net_dynamic_chunking.ops.registration import PLAIN


def is_plain(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    """Whether the module is of that very class, and nobody watches or changes its calls.

    A parametrized module, an adapter and most wrappers have a class of their own; the older
    weight_norm is a hook; accelerate replaces the forward of the instance, to fetch weights in it.
    """
    return type(module) is kind and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def product_weight(linear: nn.Linear, x: Tensor) -> Tensor | None:
    """The weight, in the dtype of x, of a layer that is a product with it and nothing else."""
    if not is_plain(linear, nn.Linear):
        return None
    # Where a module keeps them: to ask it for one takes the host 0.4 us.
    parameters = linear._parameters
    if "bias" not in parameters or parameters["bias"] is not None:
        return None
    weight = parameters.get("weight")
    if weight is None or type(weight) not in PLAIN or type(x) not in PLAIN:
        return None
    if x.dtype != (autocast_dtype(x) or weight.dtype):
        return None
    return weight if weight.dtype == x.dtype else weight.to(x.dtype)


def parameter_of(module: nn.Module, otherwise: torch.dtype = torch.float32) -> Tensor:
    """A tensor that has the dtype and the device of a layer, which may be a wrapper of one.

    Its weight; if it has none of floating point, its first parameter or buffer that is; if there is
    none either, an empty tensor in the dtype `otherwise`.
    """
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point():
        return weight
    tensors = list(itertools.chain(module.parameters(), module.buffers()))
    for tensor in tensors:
        if tensor.is_floating_point():
            return tensor
    return torch.empty(0, dtype=otherwise, device=tensors[0].device if tensors else None)
