"""Registers operations with torch.library, for autograd, opcheck and torch.compile to see.

`torch.library.custom_op` does the same with more checks a call. At the size of these operations
they are seen: 10 us a call with two tensors where this takes 3, and 27 against 15 with a gradient
(CPU, torch 2.13.0); a forward pass of the chunker makes five calls in 600 us.
"""

from collections.abc import Callable
from typing import Any

import torch

# torch's own signatures in this module carry no types.
_LIBRARY: Any = torch.library.Library("h_net", "FRAGMENT")  # type: ignore[no-untyped-call]


class Operation:
    """An operation `h_net::name` that changes none of its arguments; call it like a function."""

    def __init__(self, name: str, implementation: Callable[..., Any]) -> None:
        schema = torch.library.infer_schema(implementation, mutates_args=())
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
        self._name = f"h_net::{name}"
        self._overload = getattr(torch.ops.h_net, name).default
        self._refuses = False

    def __call__(self, *arguments: Any) -> Any:
        if self._refuses and torch.is_grad_enabled():
            return _Refusing.apply(self._name, self._overload, *arguments)  # type: ignore[no-untyped-call]  # torch's
        return self._overload(*arguments)

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` gives results of the right shapes and dtypes; a decorator."""
        torch.library.register_fake(self._name, function, lib=_LIBRARY)
        return function

    def register_autograd(
        self, backward: Callable[..., Any], *, setup_context: Callable[..., None]
    ) -> None:
        """As for `torch.library.register_autograd`."""
        torch.library.register_autograd(
            self._name, backward, setup_context=setup_context, lib=_LIBRARY
        )

    def refuse_autograd(self) -> None:
        """A derivative of the results raises RuntimeError: torch would take them for constants.

        For backward passes, whose derivative is a second one, and for inference. As a kernel for
        autograd this would cost 6 us a call (CPU, torch 2.13.0), wanted or not; so it stands before
        the call.
        """
        self._refuses = True


class _Refusing(torch.autograd.Function):
    """Calls an operation, and has no backward."""

    @staticmethod
    def forward(ctx: Any, name: str, overload: Any, *arguments: Any) -> Any:
        ctx.name = name
        return overload(*arguments)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(f"{ctx.name} has no derivative")


def operation(name: str) -> Callable[[Callable[..., Any]], Operation]:
    """Decorator that turns an implementation, for every device, into an `Operation`."""
    return lambda implementation: Operation(name, implementation)
