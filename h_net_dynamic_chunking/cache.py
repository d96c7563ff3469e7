"""Which rows of a cache a call concerns, and how to reach them in a cache of any make.

Every row of a batch chunks at its own pace, so that an inner network runs for some rows only. Two
plans say which, with the same numbers: the compact one gathers the rows that have something to do,
the masked one runs all of them and lets only those change that have.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a cache that the rows of an input stand for."""

    index: Tensor | None = None
    """int64 (rows,): the cache's row for each row of the input; None: they are the same."""
    active: Tensor | None = None
    """bool (rows,): whose cache changes; None: all. The others' inputs may be anything."""
    checked: bool = False
    """Whether the cache was found to fit already, by the module around this one."""

    def read(self, cached: Tensor) -> Tensor:
        """The rows of (batch, ...) that the input stands for: (rows, ...)."""
        return cached if self.index is None else cached.index_select(0, self.index)

    def write(self, cached: Tensor, new: Tensor) -> None:
        """Put (rows, ...) in their place in (batch, ...); rows that are not active stay."""
        new = new.to(cached.dtype)
        if self.active is not None:
            new = new.where(_like(self.active, new), self.read(cached))
        if self.index is None:
            cached.copy_(new)
        else:
            cached.index_copy_(0, self.index, new)

    def among(self, chosen: Tensor) -> "Rows":
        """The rows at the places `chosen`, int64 (fewer,), of these."""
        return Rows(
            chosen if self.index is None else self.index.index_select(0, chosen),
            None if self.active is None else self.active.index_select(0, chosen),
            self.checked,
        )

    def only(self, active: Tensor) -> "Rows":
        """The same rows, of which at most those of `active`, bool (rows,), change."""
        both = active if self.active is None else active & self.active
        return Rows(self.index, both, self.checked)

    def lens(self, lens: Tensor | None, shape: Sequence[int]) -> Tensor | None:
        """How many positions of an input (rows, length, ...) change the cache; None for all.

        lens:  int (rows,): how many are no pads; None for all
        """
        if self.active is None:
            return lens
        return self.active * (shape[1] if lens is None else lens)

    def indices(self, count: int, device: torch.device) -> Tensor:
        """int64 (rows,): `index`, written out."""
        return torch.arange(count, device=device) if self.index is None else self.index


ALL_ROWS = Rows()


@dataclass(eq=False)
class Positions:
    """How many positions each row has seen, and how many it may see."""

    seen: Tensor
    """int64 (batch,)."""
    limit: int | None
    """Positions that a row may see; None for any number."""
    bound: int = 0
    """No row has seen more: known on the host, where `seen` may not be."""

    def check_room(self, new: int, rows: Rows = ALL_ROWS, lens: Tensor | None = None) -> None:
        """Raise ValueError if `new` positions, or lens[r] of them, do not fit into row r.

        Reads the positions on the host only where the bound no longer tells.
        """
        if self.limit is None or self.bound + new <= self.limit:
            return
        self.tighten()
        if self.bound + new <= self.limit:
            return
        seen = rows.read(self.seen)
        after = seen + (new if lens is None else lens)
        after = after if rows.active is None else after[rows.active]
        if after.numel() and int(after.max()) > self.limit:
            raise ValueError(
                f"cache is full: it was allocated for max_seqlen = {self.limit} positions, its "
                f"rows have seen {seen.tolist()}, and "
                f"{new if lens is None else lens.tolist()} more are to come"
            )

    def tighten(self) -> None:
        """Read the bound from the positions, if there may be some."""
        if self.bound:
            self.bound = int(self.seen.amax()) if self.seen.shape[0] else 0

    def advance(self, by: Tensor | int, at_most: int, rows: Rows = ALL_ROWS) -> None:
        """Count `by`, int or int64 (rows,), more positions, which are `at_most` so many."""
        if rows.index is None:  # in one launch
            one = isinstance(by, int) and by == 1
            self.seen += by if rows.active is None else rows.active if one else rows.active * by
        else:
            rows.write(self.seen, rows.read(self.seen) + by)
        self.bound += at_most


def mapped(cache: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a cache with `function` applied to its tensors.

    Caches are tensors, and lists, tuples, dicts and dataclasses of caches; what else they hold is
    handed on.
    """
    return _mapped_parts(cache, lambda part: function(part) if isinstance(part, Tensor) else part)


def _mapped_parts(cache: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(cache, dict):
        return {key: _mapped_parts(value, function) for key, value in cache.items()}
    if isinstance(cache, tuple) and hasattr(cache, "_fields"):
        return type(cache)(*(_mapped_parts(value, function) for value in cache))
    if isinstance(cache, (list, tuple)):
        return type(cache)(_mapped_parts(value, function) for value in cache)
    if dataclasses.is_dataclass(cache) and not isinstance(cache, type):
        fields = (entry.name for entry in dataclasses.fields(cache) if entry.init)
        return dataclasses.replace(
            cache, **{name: _mapped_parts(getattr(cache, name), function) for name in fields}
        )
    return function(cache)


def parts_of(cache: Any) -> list[Any]:
    """The tensors of a cache, in the order of `mapped`, and what else it holds but None."""
    found: list[Any] = []

    def collect(part: Any) -> Any:
        found.append(part)
        return part

    _mapped_parts(cache, collect)
    return [part for part in found if part is not None]


def tensors_of(cache: Any) -> list[Tensor]:
    """The tensors of a cache, in the order of `mapped`."""
    return [part for part in parts_of(cache) if isinstance(part, Tensor)]


# What the states of a recurrence may be kept in, beside the dtype in which it is computed.
STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_state_dtype(state_dtype: torch.dtype | None) -> None:
    """Raise ValueError unless it is None or one of `STATE_DTYPES`."""
    if state_dtype is not None and state_dtype not in STATE_DTYPES:
        raise ValueError(
            "state_dtype must be torch.float32, torch.bfloat16, torch.float16 or None, which keeps "
            f"float32, or float64 of a float64 model; got {state_dtype!r}"
        )


def check_cache_class(cache: object, wanted: type, owner: object) -> None:
    """Raise ValueError unless the cache is of the class that `owner` allocates."""
    if not isinstance(cache, wanted):
        raise ValueError(
            f"cache must be the {wanted.__name__} that {type(owner).__name__} allocates, "
            f"got {type(cache).__name__}"
        )


def check_cache_tensor(
    name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> None:
    """Raise ValueError unless a tensor of a cache fits an input; shape[0] is the batch size."""
    if tensor.shape[0] != shape[0]:
        raise ValueError(
            f"cache must have the batch size of x, {shape[0]}, got one of {tensor.shape[0]}"
        )
    if tensor.shape != torch.Size(shape):
        raise ValueError(
            f"cache must be of this model: {name} of shape {tuple(shape)}, "
            f"got {tuple(tensor.shape)}"
        )
    if tensor.dtype != dtype:
        raise ValueError(f"cache must have the dtype of x, {dtype}, got one of {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"cache must be on {device}, as the model, got {tensor.device}")


def _like(mask: Tensor, x: Tensor) -> Tensor:
    """The mask with as many dimensions as x."""
    return mask.view(*mask.shape, *[1] * (x.ndim - mask.ndim))
