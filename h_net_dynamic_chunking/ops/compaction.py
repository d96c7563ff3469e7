"""Compaction: keep the boundary positions, and know for each position which chunk it is in.

Contract
    x:                 (total, dim), any dtype; packed
    boundary_mask:     (total,), bool
    cu_seqlens:        (batch + 1,), int32 or int64
    max_chunks:        None, or how many chunks a sequence may have
    out chunks:        (chunks, dim): x at the boundaries, order kept
    out segmentation:  see `Segmentation`

The first position of every sequence is a boundary whatever the mask says. One host read at most:
how many chunks there are, in all and in the longest sequence; `begin_segment` leaves room for work
while that number travels. With `max_chunks` there is none: the chunk buffer then has the static
size batch * max_chunks, its tail holds zeros, and boundaries past the limit of their sequence are
dropped, first come first served, so that the choice stays causal.
"""

from collections import defaultdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from h_net_dynamic_chunking.ops.backend import chosen_backend, kernels, use_backend, uses_triton
from h_net_dynamic_chunking.ops.packing import (
    check_cu_seqlens,
    check_packed,
    check_same_length,
    gather_or_zero,
    in_some_sequence,
    sequence_of_position,
    sequence_starts,
)
from h_net_dynamic_chunking.ops.places import padded_places
from h_net_dynamic_chunking.ops.registration import apply_of, is_watched, operation


class Segmentation(NamedTuple):
    """Which positions open chunks, in the packed layout."""

    wanted: Tensor
    """bool (total,): the boundaries before `max_chunks` refused any; starts are among them."""
    boundary_mask: Tensor
    """bool (total,): the boundaries that were kept."""
    starts: Tensor
    """bool (total,): the first position of each sequence."""
    boundary_positions: Tensor
    """int64 (chunks,): where each chunk opens; -1 in the tail."""
    chunk_of_position: Tensor
    """int64 (total,): the chunk that each position is in; -1 in the tail."""
    slot_of_position: Tensor
    """int64 (total,): the chunk that a boundary opens, -1 at the other positions."""
    cu_chunks: Tensor
    """int64 (batch + 1,): cumulative number of chunks."""
    most_chunks: int
    """Chunks of the longest sequence; with `max_chunks`, that."""

    @property
    def chunk_grid(self) -> Tensor:
        """int64 (batch, most chunks): the chunks of each sequence, side by side; -1 where none."""
        _, grid = padded_places(self.cu_chunks, self.most_chunks, len(self.boundary_positions))
        return grid.view(len(self.cu_chunks) - 1, self.most_chunks)

    def select(self, x: Tensor, ahead: Tensor | None = None) -> Tensor:
        """The rows of x (total, dim) where the chunks open: (chunks, dim), 0 in the tail.

        `ahead` is what `PendingSegmentation.select_ahead` returned for this x; it is used up.
        """
        positions, slots = self.boundary_positions, self.slot_of_position
        if ahead is None or ahead.shape[0] < positions.shape[0]:
            return gather_rows(x, positions, slots)
        rows = ahead.resize_(positions.shape[0], x.shape[1])
        if not (x.requires_grad and torch.is_grad_enabled()):
            return rows
        tracked: Tensor = _apply_gathered(x, positions, slots, [rows])
        return tracked

    def at_boundaries(self, values: Tensor) -> Tensor:
        """`values` (total,) where the chunks open: (chunks,), 0 in the tail."""
        return self.select(values[:, None])[:, 0]

    def sum_over_chunks(self, values: Tensor | None = None) -> Tensor:
        """Sum of `values` (total,) over each chunk: (chunks,); of ones, its length, by default."""
        values = torch.ones_like(self.chunk_of_position) if values is None else values
        chunks = self.boundary_positions.shape[0]
        # The tail adds to a spare slot, which is cut off again.
        owner = self.chunk_of_position.where(self.chunk_of_position >= 0, chunks)
        return values.new_zeros(chunks + 1).index_add(0, owner, values)[:chunks]


class PendingSegmentation:
    """A segmentation whose number of chunks is on its way to the host."""

    wanted: Tensor
    """bool (total,): as in `Segmentation`, and known at once."""
    positions: Tensor
    """int64: where each chunk opens. With room for more, which may be unwritten."""
    cu_chunks: Tensor
    """int64 (batch + 1,): as in `Segmentation`."""
    sizes: Tensor
    """int64 (2,): chunks, and those of the longest sequence."""

    def __init__(
        self,
        asked: Tensor,
        cu_seqlens: Tensor,
        max_chunks: int | None,
        threshold: float | None = None,
    ) -> None:
        self.wanted, kept, *rest = _segment(asked, cu_seqlens, max_chunks, threshold)
        self._kept = self.wanted if max_chunks is None else kept
        self._starts, self.positions, self._chunks, self._slots, self.cu_chunks, sizes = rest
        self._max_chunks, self.sizes = max_chunks, sizes
        self._read = None if max_chunks is not None else _HostRead(sizes)

    def select_ahead(self, x: Tensor, room: int) -> Tensor | None:
        """What `Segmentation.select` would gather, queued before the host knows how much that is.

        On a GPU the rows are ready by the time that their number arrives, into a buffer with room
        for `room` of them, which stays as large as that. None, with nothing queued, elsewhere and
        with a limit.
        """
        if not self.runs_ahead(x):
            return None
        rows: Tensor = kernels("gather").gather(x, self.positions, self.sizes, room)
        return rows

    def runs_ahead(self, x: Tensor) -> bool:
        """Whether kernels move rows of x before the host knows how many chunks there are."""
        if self._read is None or torch.compiler.is_compiling() or is_watched():
            return False
        return _moves_on_triton(x)

    def finish(self) -> Segmentation:
        """The segmentation. Without `max_chunks`, the one host read of a stage ends here."""
        positions = self.positions
        if self._max_chunks is not None:
            most = self._max_chunks
        elif self._read is not None and torch.compiler.is_compiling():
            # Operations, in a graph, whose sizes are known when it runs.
            positions, steps = _trim(positions, self._read.sizes)
            most = steps.shape[0]
        elif self._read is not None:
            chunks, most = self._read.wait()
            positions = positions[:chunks]
        return Segmentation(
            self.wanted,
            self._kept,
            self._starts,
            positions,
            self._chunks,
            self._slots,
            self.cu_chunks,
            most,
        )


class _Landing(NamedTuple):
    """Where a copy to the host arrives, and by what one knows that it has."""

    memory: Tensor
    """int64 (2,), pinned."""
    event: torch.cuda.Event


# To which nothing is on its way: to make one, and to give it back, takes calls of the driver.
_FREE_LANDINGS: defaultdict[torch.device, list[_Landing]] = defaultdict(list)


def _landing(device: torch.device) -> _Landing:
    try:
        return _FREE_LANDINGS[device].pop()
    except IndexError:
        # Of inference mode, it could not be written to outside of it.
        with torch.inference_mode(False):
            memory = torch.empty(2, dtype=torch.int64, device="cpu", pin_memory=True)
        return _Landing(memory, torch.cuda.Event())  # type: ignore[no-untyped-call]  # torch's


class _HostRead:
    """Two integers that are copied to the host while the device goes on."""

    def __init__(self, sizes: Tensor) -> None:
        self.sizes = sizes
        self._values: list[int] | None = None
        # None too where a compiler began what then runs without it.
        self._landing: _Landing | None = None
        if sizes.is_cuda and not torch.compiler.is_compiling():
            # Behind what is queued so far, and before what will be.
            self._landing = _landing(sizes.device)
            self._landing.memory.copy_(sizes, non_blocking=True)
            self._landing.event.record(torch.cuda.current_stream(sizes.device))

    def wait(self) -> list[int]:
        if self._values is None and self._landing is not None:
            self._landing.event.synchronize()
            self._values = self._landing.memory.tolist()
            _FREE_LANDINGS[self.sizes.device].append(self._landing)
        elif self._values is None:
            self._values = self.sizes.tolist()
        return self._values


def begin_segment(
    boundary_mask: Tensor, cu_seqlens: Tensor, max_chunks: int | None = None
) -> PendingSegmentation:
    """`segment` in two halves: what is queued before `.finish()` runs while the host would wait.

    Raises:
        ValueError: as `segment`.
    """
    if boundary_mask.ndim != 1 or boundary_mask.dtype != torch.bool:
        raise ValueError(
            f"boundary_mask must be bool of shape (total,), "
            f"got {boundary_mask.dtype} of shape {tuple(boundary_mask.shape)}"
        )
    _check_limits(cu_seqlens, max_chunks)
    return PendingSegmentation(boundary_mask, cu_seqlens, max_chunks)


def begin_segment_above(
    threshold: float, probs: Tensor, cu_seqlens: Tensor, max_chunks: int | None = None
) -> PendingSegmentation:
    """`begin_segment(probs > threshold, ...)`, where a kernel compares as it reads them.

    Args:
        threshold: see above.
        probs: float (total,).
        cu_seqlens: as in `segment`.
        max_chunks: as in `segment`.

    Raises:
        ValueError: as `segment`.
    """
    check_packed("probs", probs, 1)
    _check_limits(cu_seqlens, max_chunks)
    return PendingSegmentation(probs.detach(), cu_seqlens, max_chunks, threshold)


def _check_limits(cu_seqlens: Tensor, max_chunks: int | None) -> None:
    check_cu_seqlens(cu_seqlens)
    if max_chunks is not None and max_chunks < 1:
        raise ValueError(f"max_chunks must be at least 1, got {max_chunks}")


def segment(
    boundary_mask: Tensor, cu_seqlens: Tensor, max_chunks: int | None = None
) -> Segmentation:
    """Turn a boundary mask into chunk numbers; see the contract at the top of this file.

    Raises:
        ValueError: shapes or dtypes off the contract, or `max_chunks` under 1.

    >>> mask = torch.tensor([True, False, True, False])
    >>> segment(mask, torch.tensor([0, 3, 4])).chunk_of_position
    tensor([0, 0, 1, 2])
    """
    return begin_segment(boundary_mask, cu_seqlens, max_chunks).finish()


def compact(
    x: Tensor, boundary_mask: Tensor, cu_seqlens: Tensor, max_chunks: int | None = None
) -> tuple[Tensor, Segmentation]:
    """Select the rows of `x` at the boundaries; see the contract at the top of this file.

    Raises:
        ValueError: shapes or dtypes off the contract, or `max_chunks` under 1.

    >>> x = torch.arange(4.0)[:, None]
    >>> compact(x, torch.tensor([True, False, True, False]), torch.tensor([0, 4]))[0].flatten()
    tensor([0., 2.])
    """
    check_same_length("boundary_mask", boundary_mask, "x", x)
    segmentation = segment(boundary_mask, cu_seqlens, max_chunks)
    return segmentation.select(x), segmentation


def gather_rows(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """`out[i] = x[index[i]]`, and a row of zeros where `index[i]` is -1.

    No row is read twice, and `inverse` says where each row of `x` went (-1: nowhere), so that
    the backward pass is this same function with the two exchanged: no sum, no atomics.

    Args:
        x: (rows, dim), any dtype.
        index: int64 (rows_out,), in -1 .. rows - 1.
        inverse: int64 (rows,), in -1 .. rows_out - 1, with `index[inverse[j]] == j`.
    """
    out: Tensor = _gather_rows(x, index, inverse)
    return out


@operation("segment")
def _segment(
    asked: Tensor, cu_seqlens: Tensor, max_chunks: int | None, threshold: float | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Wanted, kept (empty without a limit), starts, positions (room for all; without a limit what
    lies behind the last chunk may be unwritten), chunk of position, slot of position, cu_chunks,
    and the sizes that the host wants: chunks, in the longest.

    What is asked for is a mask; with a threshold, probabilities above it."""
    # The kernels compare in float32.
    if threshold is not None and (asked.dtype != torch.float32 or not uses_triton(asked)):
        asked, threshold = asked > threshold, None
    if uses_triton(asked, moves_only=True):
        from h_net_dynamic_chunking.ops._triton import segmentation

        return segmentation.segment(asked, cu_seqlens, max_chunks, threshold)
    total, batch = asked.shape[0], cu_seqlens.shape[0] - 1
    live, starts = in_some_sequence(cu_seqlens, total), sequence_starts(cu_seqlens, total)
    wanted = (asked | starts) & live
    cu_seqlens = cu_seqlens.to(torch.int64)
    kept, opens, room = wanted.new_empty(0), wanted, total
    if max_chunks is not None:
        kept = opens = wanted & _within_limit(wanted, cu_seqlens, max_chunks)
        room = batch * max_chunks
    opened = _count_before(opens)
    cu_chunks = opened[cu_seqlens]
    chunk_of_position = (opened[1:] - 1).masked_fill_(~live, -1)
    slot_of_position = chunk_of_position.where(opens, -1)
    # The positions that open nothing write to a spare slot, which is cut off again.
    positions = torch.full((room + 1,), -1, dtype=torch.int64, device=opens.device)
    slots = slot_of_position.where(opens, room)
    positions = positions.scatter_(0, slots, torch.arange(total, device=opens.device))[:room]
    longest = cu_chunks.diff().amax() if batch else cu_chunks[0]
    sizes = torch.stack((cu_chunks[-1], longest))
    return wanted, kept, starts, positions, chunk_of_position, slot_of_position, cu_chunks, sizes


@operation("trim")
def _trim(positions: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """The positions of the chunks that there are, and 0, 1, ... for those of the longest."""
    chunks, most = sizes.tolist()  # the one host read of a stage
    return positions[:chunks].clone(), torch.arange(most, device=positions.device)


@_trim.register_fake
def _(positions: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    context = torch.library.get_ctx()
    return (
        positions.new_empty(context.new_dynamic_size()),
        positions.new_empty(context.new_dynamic_size()),
    )


def _count_before(opens: Tensor) -> Tensor:
    """int64 (total + 1,): how many are set before each position, and in all."""
    return torch.nn.functional.pad(opens.cumsum(0), (1, 0))


def _within_limit(opens: Tensor, cu_seqlens: Tensor, max_chunks: int) -> Tensor:
    opened = _count_before(opens)
    before_sequence = opened[cu_seqlens][sequence_of_position(cu_seqlens, opens.shape[0])]
    return opened[1:] - before_sequence <= max_chunks


@_segment.register_fake
def _(
    asked: Tensor, cu_seqlens: Tensor, max_chunks: int | None, threshold: float | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    total, batch = asked.shape[0], cu_seqlens.shape[0] - 1
    mask = torch.empty_like(asked, dtype=torch.bool)
    integers = torch.empty_like(asked, dtype=torch.int64)
    return (
        mask,
        mask.new_empty(0 if max_chunks is None else total),
        torch.empty_like(mask),
        integers.new_empty(total if max_chunks is None else batch * max_chunks),
        integers,
        torch.empty_like(integers),
        integers.new_empty(batch + 1),
        integers.new_empty(2),
    )


def _moves_on_triton(x: Tensor) -> bool:
    return x.element_size() <= 8 and uses_triton(x, moves_only=True)


@operation("gather_rows")
def _gather_rows(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    if _moves_on_triton(x):
        rows: Tensor = kernels("gather").gather(x, index)
        return rows
    return gather_or_zero(x, index)


@_gather_rows.register_fake
def _(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    return x.new_empty(index.shape[0], x.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    _, index, inverse = inputs
    ctx.backend = chosen_backend()
    ctx.save_for_backward(index, inverse)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    index, inverse = ctx.saved_tensors
    with use_backend(ctx.backend):
        return _gather_rows(grad, inverse, index), None, None


_gather_rows.register_autograd(_backward, setup_context=_setup_context)


class _GatheredAhead(torch.autograd.Function):
    """`gather_rows` whose result is there already: the one element of a list."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor, rows: list[Tensor]) -> Tensor:
        _setup_context(ctx, (x, index, inverse), rows[0])
        return rows[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_backward(ctx, grad), None


_apply_gathered = apply_of(_GatheredAhead)
