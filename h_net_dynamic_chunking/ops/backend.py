"""Which implementation runs an operation: plain torch, or the Triton kernels of `ops._triton`.

"auto", the default, takes Triton on an NVIDIA GPU that it supports and torch everywhere else, and
never raises. Asking for "triton" by name raises ValueError where the kernels cannot run.
"""

import logging
import os
from contextvars import ContextVar, Token
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

Backend = Literal["torch", "triton", "auto"]

_logger = logging.getLogger(__name__)
_chosen: ContextVar[Backend] = ContextVar("h_net_backend", default="auto")

_NAMES = get_args(Backend)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# bfloat16 arithmetic, which the kernels use freely, begins with this generation.
_CAPABILITY = (8, 0)


class use_backend:
    """Choose the backend of every operation inside a `with` block.

    The choice holds for the block's own thread, and for the backward pass of what is computed in
    the block, wherever that runs. What torch.compile traced follows the choice of its caller
    forward, and "auto" backward.

    Args:
        name: "torch", "triton" or "auto".

    Raises:
        ValueError: another name. "triton" raises inside the block, with the reason, as soon as an
            operation meets tensors that the kernels cannot take.

    >>> with use_backend("torch"):
    ...     chosen_backend()
    'torch'
    """

    def __init__(self, name: Backend) -> None:
        if name not in _NAMES:
            raise ValueError(f"name must be one of {_NAMES}, got {name!r}")
        self._name: Backend = name
        self._tokens: list[Token[Backend]] = []

    def __enter__(self) -> None:
        self._tokens.append(_chosen.set(self._name))

    def __exit__(self, *_: object) -> None:
        _chosen.reset(self._tokens.pop())


def chosen_backend() -> Backend:
    """What `use_backend` chose for this thread; "auto" outside of it."""
    return _chosen.get()


class Machine(NamedTuple):
    """What decides, beside the tensors, whether the kernels can run."""

    triton_installed: bool
    interpreted: bool
    """Whether Triton runs its kernels in its interpreter, on the CPU, for tests."""
    capability: tuple[int, int] | None
    """Compute capability of an NVIDIA GPU; None for any other device."""


def why_not_triton(
    device_type: str, dtype: torch.dtype | None, machine: Machine, *, by_name: bool
) -> str | None:
    """Why the kernels do not run for such tensors, or None if they do.

    Args:
        device_type: "cuda", "cpu", ...
        dtype: of the values, or None for an operation that only moves them.
        machine: what there is to run on.
        by_name: Whether "triton" was asked for, which also takes the interpreter and GPUs on which
            the kernels were never measured.

    >>> why_not_triton("cuda", torch.float64, Machine(True, False, (9, 0)), by_name=False)
    'the kernels take bfloat16, float16 and float32, not float64'
    """
    if not machine.triton_installed:
        return "triton is not installed"
    if dtype is not None and dtype not in _DTYPES:
        return f"the kernels take bfloat16, float16 and float32, not {str(dtype)[6:]}"
    if machine.interpreted:
        return None if by_name else "triton's interpreter runs only when it is asked for by name"
    if device_type != "cuda":
        return f"the kernels run on a GPU, not on {device_type}"
    if machine.capability is None:
        return None if by_name else "the kernels are measured on NVIDIA GPUs only"
    if machine.capability < _CAPABILITY:
        return "the kernels need compute capability {}.{}, not {}.{}".format(
            *_CAPABILITY, *machine.capability
        )
    return None


def uses_triton(x: Tensor, *, moves_only: bool = False, unfit: str | None = None) -> bool:
    """Whether the operation whose main input is `x` runs on Triton; torch takes empty ones.

    Args:
        x: of the device and the dtype that count.
        moves_only: Whether the operation takes any dtype.
        unfit: Why its kernels do not take such sizes; None if they do.

    Raises:
        ValueError: Triton was asked for by name and cannot run.
    """
    chosen = _chosen.get()
    if chosen == "torch" or x.numel() == 0:
        return False
    reason = _reason(x.device, None if moves_only else x.dtype, chosen == "triton") or unfit
    if reason is None:
        return True
    if chosen == "triton":
        raise ValueError(f"backend 'triton' cannot run here: {reason}")
    if x.is_cuda:
        _log_once(reason)
    return False


@cache
def kernels(name: str) -> Any:
    """The module of `ops._triton` of that name.

    An import statement takes the host 1 us at each call; at the top it would want Triton.
    """
    return import_module(f"h_net_dynamic_chunking.ops._triton.{name}")


@cache
def _reason(device: torch.device, dtype: torch.dtype | None, by_name: bool) -> str | None:
    return why_not_triton(device.type, dtype, _machine(device), by_name=by_name)


def _machine(device: torch.device) -> Machine:
    nvidia = device.type == "cuda" and torch.version.hip is None
    return Machine(
        triton_installed=find_spec("triton") is not None,
        interpreted=os.environ.get("TRITON_INTERPRET") == "1",
        capability=torch.cuda.get_device_capability(device) if nvidia else None,
    )


@cache
def _log_once(reason: str) -> None:
    _logger.warning("torch operations in place of Triton kernels: %s", reason)
