"""The packed layout: sequences laid end to end in one `(total, dim)` buffer.

`cu_seqlens` (batch + 1,) holds the cumulative lengths: sequence i owns the positions
`cu_seqlens[i] .. cu_seqlens[i + 1] - 1`. A buffer may be longer than `cu_seqlens[-1]`; the tail
belongs to no sequence, is never read and receives no gradient. That is what lets buffers have
static shapes when the lengths live on a device.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from h_net_dynamic_chunking.ops.registration import is_autocast_on

# Below 32768 elements the elementwise kernels of torch stay on one thread. Two threads gain little
# here and lose much as soon as anything else runs on the machine, because they wait for each other:
# forward and backward of a (3, 1024, 512) chunker, beside another training job on two cores, took
# 1950 ms before the tiles and 340 ms with them (benchmarks/RESULTS.md). From 8 threads on the tiles
# are large enough to be shared.
_TILE_ELEMENTS = 32767


def cu_seqlens_from_lens(lens: Tensor) -> Tensor:
    """Cumulative lengths, int64 `(batch + 1,)`, of integer lengths `(batch,)`."""
    return torch.nn.functional.pad(lens.to(torch.int64).cumsum(0), (1, 0))


def cu_seqlens_of_rows(x: Tensor) -> Tensor:
    """Cumulative lengths of the rows of x (batch, length, ...), each of which is a sequence."""
    batch, length = x.shape[:2]
    # One launch, where the number of steps does not depend on what a compiler knows of the sizes.
    if length > 0 and not torch.compiler.is_compiling():
        return torch.arange(0, batch * length + 1, length, device=x.device)
    return torch.arange(batch + 1, device=x.device) * length


def in_some_sequence(cu_seqlens: Tensor, total: int) -> Tensor:
    """Bool `(total,)`: False in the tail that belongs to no sequence."""
    return torch.arange(total, device=cu_seqlens.device) < cu_seqlens[-1]


def sequence_starts(cu_seqlens: Tensor, total: int) -> Tensor:
    """Bool `(total,)`: True at the first position of each non-empty sequence."""
    # One slot more than there are positions, because empty sequences at the end start there.
    starts = cu_seqlens.new_zeros(total + 1, dtype=torch.bool)
    starts.index_fill_(0, cu_seqlens[:-1].to(torch.int64), True)
    return starts[:total] & in_some_sequence(cu_seqlens, total)


def sequence_of_position(cu_seqlens: Tensor, total: int) -> Tensor:
    """Int64 `(total,)`: which sequence owns each position; `batch` in the tail."""
    positions = torch.arange(total, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), positions, right=True)


def position_in_sequence(cu_seqlens: Tensor, total: int) -> Tensor:
    """Int64 `(total,)`: how many positions of the same sequence stand before each."""
    sequence = sequence_of_position(cu_seqlens, total)
    return torch.arange(total, device=cu_seqlens.device) - cu_seqlens[sequence]


def check_float(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless `tensor` is floating-point and has a last dimension."""
    if tensor.ndim < 1 or not tensor.is_floating_point():
        raise ValueError(
            f"{name} must be a floating-point tensor of shape (..., dim), "
            f"got {tensor.dtype} of shape {tuple(tensor.shape)}"
        )


def check_packed(name: str, tensor: Tensor, ndim: int) -> None:
    """Raise ValueError unless `tensor` is a floating-point tensor of `ndim` dimensions."""
    if tensor.ndim != ndim or not tensor.is_floating_point():
        wanted = "(total, dim)" if ndim == 2 else "(total,)"
        raise ValueError(
            f"{name} must be a floating-point tensor of shape {wanted}, "
            f"got {tensor.dtype} of shape {tuple(tensor.shape)}"
        )


def check_packed_or_padded(name: str, tensor: Tensor, cu_seqlens: Tensor | None) -> None:
    """Raise ValueError unless `tensor` is (total, dim) with `cu_seqlens`, or 3-d without."""
    if cu_seqlens is not None:
        check_packed(name, tensor, 2)
        check_cu_seqlens(cu_seqlens)
    elif tensor.ndim != 3 or not tensor.is_floating_point():
        raise ValueError(
            f"{name} must be a floating-point tensor of shape (batch, length, dim) without "
            f"cu_seqlens, got {tensor.dtype} of shape {tuple(tensor.shape)}"
        )


def check_same_length(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ValueError unless the two share their first dimension."""
    if tensor.shape[0] != other.shape[0]:
        raise ValueError(
            f"{name} must have as many rows as {other_name}, "
            f"got {tensor.shape[0]} and {other.shape[0]}"
        )


def check_cu_seqlens(cu_seqlens: Tensor, name: str = "cu_seqlens") -> None:
    """Raise ValueError unless `cu_seqlens` is an integer vector with at least one entry.

    Its values are not read: on a GPU that would stop the host.
    """
    if not isinstance(cu_seqlens, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"{name} must have shape (batch + 1,), got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be int32 or int64, got {cu_seqlens.dtype}")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64: what the operations compute in."""
    return torch.promote_types(dtype, torch.float32)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast casts to on the device of x; None where it is off."""
    # Most often none is on, and to ask for that of one device takes the host 0.4 us more.
    if not torch.compiler.is_compiling() and not is_autocast_on():
        return None
    kind = x.device.type
    # Of devices that have no autocast torch raises; whether they have, Dynamo of torch 2.11 cannot
    # ask.
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def row_tiles(x: Tensor) -> Iterator[slice]:
    """Slices that cover the rows of x: cache-sized ones on a CPU, a single one elsewhere.

    A temporary of the size of x costs a CPU more for its fresh pages than for its arithmetic; one
    of the size of a tile is memory that the tile before has just left in the cache.
    """
    rows = x.shape[0]
    if x.device.type == "cpu":
        elements = _TILE_ELEMENTS * max(1, torch.get_num_threads() // 4)
        step = max(1, elements // max(1, x.shape[1:].numel()))
    else:
        step = max(1, rows)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def fill_rows_(x: Tensor, rows: Tensor, value: float) -> Tensor:
    """Overwrite, in place, the rows of x (n, dim) where `rows`, bool (n,), is True."""
    if x.device.type == "cpu":
        # Most often there are none, and then x is not touched at all.
        return x.index_fill_(0, rows.nonzero().flatten(), value)
    return x.masked_fill_(rows[:, None], value)


def zero_rows_(x: Tensor, rows: Tensor) -> Tensor:
    """`fill_rows_` with zero."""
    return fill_rows_(x, rows, 0)


def zero_tail_(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Overwrite, in place, the rows of x (total, dim) that are in no sequence; None: all are."""
    return x if cu_seqlens is None else zero_rows_(x, ~in_some_sequence(cu_seqlens, len(x)))


def flat_rows(x: Tensor) -> Tensor:
    """x (..., dim) as (rows, dim): every row contiguous, and all at one distance."""
    flat = x.flatten(0, -2)
    return flat if flat.stride(1) == 1 else flat.contiguous()


def gather_or_zero(x: Tensor, index: Tensor) -> Tensor:
    """`x[index]` for x (rows, dim), with rows of zeros where the index is -1."""
    if x.shape[0] == 0:
        return x.new_zeros(index.shape[0], x.shape[1])
    out = x.new_empty(index.shape[0], x.shape[1])
    # The row that a clamped -1 reads is overwritten, so that a NaN in it goes no further.
    wanted = index.clamp(min=0)
    for tile in row_tiles(out):
        torch.index_select(x, 0, wanted[tile], out=out[tile])
    return zero_rows_(out, index < 0)


def dot_rows(a: Tensor, b: Tensor) -> Tensor:
    """<a_i, b_i> for each row of a and b (rows, dim), in the dtype of a."""
    out = a.new_empty(a.shape[0])
    for tile in row_tiles(a):
        torch.sum(a[tile] * b[tile], -1, out=out[tile])
    return out
