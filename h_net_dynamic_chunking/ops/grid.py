"""Chunks in padded rows, a row for each sequence, before the host knows how many there are.

Contract
    x:             (total, dim), any dtype; packed
    out chunks:    (batch, most chunks, dim): x where the chunks open; zeros at pads
    out places:    int64 (chunks,), inverse: int64 (batch * most chunks,): as in `ops.places`

On a GPU the kernels read there how many chunks there are, and write into buffers with some room. So
when the number arrives at the host, nothing is left to launch; and the chunks are not gathered into
packed rows first, and then into these.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from h_net_dynamic_chunking.ops.backend import chosen_backend, kernels, use_backend
from h_net_dynamic_chunking.ops.compaction import (
    PendingSegmentation,
    Segmentation,
    gather_rows,
)
from h_net_dynamic_chunking.ops.registration import apply_of


class ChunkGrid(NamedTuple):
    """Chunks in padded rows; what lies behind the last row is unwritten."""

    rows: Tensor
    """(room, dim)."""
    places: Tensor
    """int64 (room,)."""
    inverse: Tensor
    """int64 (room,)."""

    def finish(self, x: Tensor, segmentation: Segmentation) -> tuple[Tensor, Tensor, Tensor] | None:
        """Chunks, places and inverse of the contract, used up; None if there was too little room.

        x and the segmentation are those of `grid_ahead`.
        """
        batch, most = segmentation.cu_chunks.shape[0] - 1, segmentation.most_chunks
        if batch * most > self.rows.shape[0]:
            return None
        # To cut them to size takes a view 0.6 us more, while a GPU waits.
        places = self.places.resize_(segmentation.boundary_positions.shape[0])
        inverse = self.inverse.resize_(batch * most)
        chunks = self.rows.resize_(batch, most, x.shape[1])
        if x.requires_grad and torch.is_grad_enabled():
            indices = segmentation.boundary_positions, segmentation.slot_of_position
            chunks = _apply_grid(x, *indices, places, inverse, [chunks])
        return chunks, places, inverse


def grid_ahead(x: Tensor, pending: PendingSegmentation, room: int) -> ChunkGrid | None:
    """Queue the chunks of x (total, dim), `room` of them and pads at most.

    None, with nothing queued, where `PendingSegmentation.select_ahead` does not run either.
    """
    if not pending.runs_ahead(x):
        return None
    places, inverse, opens, count = kernels("places").places_of_chunks(
        pending.cu_chunks, pending.positions, pending.sizes, room
    )
    return ChunkGrid(kernels("gather").gather(x, opens, count), places, inverse)


class _GridAhead(torch.autograd.Function):
    """Gathers rows and spreads them over a grid; the result is there: the one element of a list."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        positions: Tensor,
        slots: Tensor,
        places: Tensor,
        inverse: Tensor,
        chunks: list[Tensor],
    ) -> Tensor:
        ctx.backend = chosen_backend()
        ctx.save_for_backward(positions, slots, places, inverse)
        return chunks[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        positions, slots, places, inverse = ctx.saved_tensors
        with use_backend(ctx.backend):
            packed = gather_rows(grad.flatten(0, 1), places, inverse)
            return gather_rows(packed, slots, positions), *[None] * 5


_apply_grid = apply_of(_GridAhead)
