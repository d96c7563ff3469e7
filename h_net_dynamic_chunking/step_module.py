"""The protocol by which HNet decodes with its parts: any module that remembers what it has seen.

    allocate_inference_cache(batch_size, max_seqlen, dtype=None) -> cache
    step(x, cache) -> out            the next position of every row, x and out (batch, dim);
                                     changes the cache in place

A cache is a tensor whose first dimension is the batch, or a list, tuple, dict or dataclass of
such; HNet steps some rows of a batch by gathering them and putting the new ones back. So a position
must be a tensor too, one a row. A module that can do better names `rows` in its step, and gets a
`cache.Rows`: see there; its cache may be anything. A module may also have

    extend(x, cache, lens) -> out    the next positions of every row at once, x and out
                                     (batch, length, dim); row r has lens[r] of them, on the left,
                                     and lens is None where all have `length`

and `rows` there; without it several positions are several steps. And, so that nothing changes
before a wrong cache is refused,

    check_inference_cache(cache, batch_size, dtype, new, rows, lens)      raises ValueError

A module whose allocate_inference_cache names `state_dtype` is told in what dtype the state of a
recurrence is to be kept; None leaves it to the module.

Modules that see one position at a time, such as nn.Identity and nn.Linear, need no cache. Anything
else is refused. torch.compile, and other wrappers that `sequence_module` knows, are looked through:
what they add to forward is not part of a step.
"""

import inspect
from functools import cache as remember
from typing import Any

import torch
from torch import Tensor, nn

from h_net_dynamic_chunking.cache import (
    ALL_ROWS,
    Rows,
    check_state_dtype,
    mapped,
    parts_of,
    tensors_of,
)
from h_net_dynamic_chunking.outputs import hidden_states
from h_net_dynamic_chunking.sequence_module import is_position_wise, unwrapped


def allocate(
    name: str,
    module: nn.Module,
    batch_size: int,
    max_seqlen: int,
    dtype: torch.dtype | None,
    state_dtype: torch.dtype | None = None,
) -> Any:
    """A cache for the module before the first position; None for one that needs none.

    Raises:
        ValueError: the module cannot decode, or some rows of its cache cannot be told from others;
            or no state can be kept in `state_dtype`.
    """
    check_state_dtype(state_dtype)
    module = unwrapped(module)
    if _can_step(module):
        method = _method(module, "allocate_inference_cache")
        named = {"state_dtype": state_dtype} if _names(method, "state_dtype") else {}
        cache = method(batch_size, max_seqlen, dtype, **named)
        methods = [method for method in ("step", "extend") if hasattr(module, method)]
        if not all(_names_rows(_method(type(module), method)) for method in methods):
            _check_rows(name, cache, batch_size)
        return cache
    if is_position_wise(module):
        return None
    raise ValueError(
        f"{name} must have allocate_inference_cache(batch_size, max_seqlen, dtype) and "
        f"step(x, cache) to decode, or see one position at a time; {type(module).__name__} has "
        "not: add them, or put an adapter around it (h_net_dynamic_chunking.step_module)"
    )


def check_cache(
    name: str,
    module: nn.Module,
    cache: Any,
    batch_size: int,
    dtype: torch.dtype,
    new: int = 0,
    rows: Rows = ALL_ROWS,
    lens: Tensor | None = None,
) -> None:
    """Raise ValueError unless the cache is of this module, as far as the module can tell.

    Args:
        new: positions that are about to come.
        rows: of which rows.
        lens: how many of them come for each row; None: all.
    """
    module = unwrapped(module)
    if hasattr(module, "check_inference_cache"):
        _method(module, "check_inference_cache")(cache, batch_size, dtype, new, rows, lens)
    elif not _can_step(module) and cache is not None:
        raise ValueError(f"cache must hold None for {name}, got {type(cache).__name__}")


def step(name: str, module: nn.Module, x: Tensor, cache: Any, rows: Rows = ALL_ROWS) -> Any:
    """What the module returns for the next position of each row: x (rows, dim)."""
    module = unwrapped(module)
    if not _can_step(module):
        return module(x)
    method = _method(module, "step")
    if _names_rows(_method(type(module), "step")):
        return method(x, cache, rows=rows)
    if rows.index is None and rows.active is None:
        return method(x, cache)
    part = _part_of(cache, rows)
    result = method(x, part)
    _put_back(name, cache, part, rows)
    return result


def extend(
    name: str,
    module: nn.Module,
    x: Tensor,
    cache: Any,
    lens: Tensor | None = None,
    rows: Rows = ALL_ROWS,
) -> Any:
    """What the module returns for the next positions of each row: x (rows, length, dim)."""
    module = unwrapped(module)
    if not _can_step(module):
        return module(x)
    if not hasattr(module, "extend"):
        return _extend_by_steps(name, module, x, cache, lens, rows)
    method = _method(module, "extend")
    if _names_rows(_method(type(module), "extend")):
        return method(x, cache, lens, rows=rows)
    if rows.index is None and rows.active is None:
        return method(x, cache, lens)
    part = _part_of(cache, rows)
    result = method(x, part, lens)
    _put_back(name, cache, part, rows)
    return result


def _extend_by_steps(
    name: str, module: nn.Module, x: Tensor, cache: Any, lens: Tensor | None, rows: Rows
) -> Tensor:
    """Position after position; zeros at the pads."""
    if x.shape[1] == 0:
        return torch.zeros_like(x)
    outs = []
    for t, x_t in enumerate(x.unbind(1)):
        at_t = rows if lens is None else rows.only(lens > t)
        out = hidden_states(step(name, module, x_t, cache, at_t), name)
        outs.append(out if lens is None else out.where((lens > t)[:, None], 0))
    return torch.stack(outs, dim=1)


def _check_rows(name: str, cache: Any, batch_size: int) -> None:
    """Raise ValueError unless the cache is made of tensors with a row for each of the batch."""
    for part in parts_of(cache):
        if not isinstance(part, Tensor) or part.shape[:1] != (batch_size,):
            got = tuple(part.shape) if isinstance(part, Tensor) else repr(part)
            raise ValueError(
                f"{name} must have a cache of tensors whose first dimension is the batch, "
                f"{batch_size}, got {got} in it; or let its step take rows "
                "(h_net_dynamic_chunking.step_module)"
            )


def _part_of(cache: Any, rows: Rows) -> Any:
    """A copy of the rows of a cache."""
    if rows.index is None:
        return mapped(cache, torch.clone)
    return mapped(cache, rows.read)


def _put_back(name: str, cache: Any, part: Any, rows: Rows) -> None:
    whole, changed = tensors_of(cache), tensors_of(part)
    if len(whole) != len(changed) or any(
        a.shape[1:] != b.shape[1:] for a, b in zip(whole, changed, strict=True)
    ):
        raise ValueError(
            f"{name} must keep the number and the shapes of the tensors in its cache when only "
            "some rows step; let its step take rows (h_net_dynamic_chunking.step_module)"
        )
    for old, new in zip(whole, changed, strict=True):
        rows.write(old, new)


def _can_step(module: nn.Module) -> bool:
    return hasattr(module, "step") and hasattr(module, "allocate_inference_cache")


def _method(module: nn.Module | type[nn.Module], name: str) -> Any:
    return getattr(module, name)


def _names(method: Any, parameter: str) -> bool:
    return parameter in inspect.signature(method).parameters


@remember
def _names_rows(method: Any) -> bool:
    return _names(method, "rows")
