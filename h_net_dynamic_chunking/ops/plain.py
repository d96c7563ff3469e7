"""Whether a module does what its class says, so that an operation may take its weights instead."""

from torch import nn


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
