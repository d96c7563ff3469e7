"""Registers operations with torch.library, for autograd, opcheck and torch.compile to see.

In plain eager mode a call goes past torch's dispatcher, straight into the implementation or, where
a gradient is wanted, an autograd.Function around it. With 16 arguments, as dechunking has, that
takes 2 us where the dispatcher takes 11, and 11 where it takes 79 with a gradient (CPU, torch
2.13.0). Whatever wants to see the operation, a mode, a tensor subclass, a transform or a compiler,
meets it at the dispatcher as ever. Autocast is not among these: what dtypes go in decides.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

# torch's own signatures in this module carry no types.
_LIBRARY: Any = torch.library.Library("h_net", "FRAGMENT")  # type: ignore[no-untyped-call]


class Operation:
    """An operation `h_net::name` that changes none of its arguments; call it like a function."""

    def __init__(self, name: str, implementation: Callable[..., Any]) -> None:
        schema = torch.library.infer_schema(implementation, mutates_args=())
        implementation = _without_autocast(implementation)
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
        self._name = f"h_net::{name}"
        self._implementation = implementation
        self._overload = getattr(torch.ops.h_net, name).default
        self._apply: Callable[..., Any] | None = None
        self._refuses = False

    def __call__(self, *arguments: Any) -> Any:
        wants_grad = torch.is_grad_enabled()
        if wants_grad and self._refuses:
            return _Refusing.apply(self._name, self._overload, *arguments)  # type: ignore[no-untyped-call]  # torch's
        if torch.compiler.is_compiling():
            return self._overload(*arguments)
        if forward_ad._current_level >= 0 and any(map(_has_tangent, arguments)):
            raise NotImplementedError(f"{self._name} has no forward-mode derivative")
        if is_watched():
            return self._overload(*arguments)
        # Most often there are no other kinds, and then no argument need be looked at by itself.
        if not _ORDINARY.issuperset(map(type, arguments)):
            kinds = {*map(type, arguments)} - _ORDINARY
            if any(issubclass(kind, Tensor) for kind in kinds):
                return self._overload(*arguments)
        if wants_grad:
            for argument in arguments:
                if isinstance(argument, Tensor) and argument.requires_grad:
                    return (self._apply or self._overload)(*arguments)
        return self._implementation(*arguments)

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
        implementation = self._implementation

        def forward(ctx: Any, *arguments: Any) -> Any:
            output = implementation(*arguments)
            setup_context(ctx, arguments, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        name = self._name.replace("::", "_")
        self._apply = apply_of(type(name, (torch.autograd.Function,), methods))

    def refuse_autograd(self) -> None:
        """A derivative of the results raises RuntimeError: torch would take them for constants.

        For backward passes, whose derivative is a second one, and for inference. As a kernel for
        autograd this would cost 6 us a call (CPU, torch 2.13.0), wanted or not; so it stands before
        the call.
        """
        self._refuses = True


def _has_tangent(argument: Any) -> bool:
    """Whether forward-mode differentiation comes by it; torch would take the tangent for zero."""
    if not isinstance(argument, Tensor) or not argument.is_floating_point():
        return False
    # Which level of nested transforms holds the tangent is not looked for.
    return bool(
        torch._C._functorch.is_gradtrackingtensor(argument)
        or forward_ad.unpack_dual(argument).tangent is not None  # type: ignore[no-untyped-call]  # torch's
    )


def is_autocast_on() -> bool:
    """Whether autocast is on for any device; torch 2.13.0 forgets MPS when it is asked."""
    return torch._C._is_any_autocast_enabled() or torch.is_autocast_enabled("mps")


def _without_autocast(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """The implementation with autocast off: its dtypes are its own, in the backward pass too.

    0.3 us a call where it is off anyway (CPU, torch 2.13.0).
    """

    @wraps(implementation)
    def run(*arguments: Any) -> Any:
        if not is_autocast_on():
            return implementation(*arguments)
        with torch._C._DisableAutocast():
            return implementation(*arguments)

    return run


# Types of tensors that are no more than tensors.
PLAIN = (Tensor, torch.nn.Parameter)
_ORDINARY = {*PLAIN, type(None), bool, int, float, torch.dtype}


def is_watched() -> bool:
    """Whether something is active that wants to see operations, and not what they consist of."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_tracing()
    )


def apply_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply`, to be called where nothing is active that `is_watched` tells of.

    Past what `apply` does in Python for the transforms of torch.func, which takes 0.9 us, and 2.3
    us with 16 arguments (CPU, torch 2.13.0). 0.4 us of it is saved by asking for it only once.
    """
    apply: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return apply


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
