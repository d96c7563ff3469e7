"""Pooling of chunks, as an alternative to keeping the boundary vectors (paper, appendix E.1).

A boundary is the last element of the group that it summarises: group k holds the positions behind
the boundary before, up to and including boundary k. That is the only causal choice. Positions
behind the last boundary of a sequence belong to no group.
"""

from typing import Literal

import torch
from torch import Tensor

from h_net_dynamic_chunking.ops.compaction import Segmentation
from h_net_dynamic_chunking.ops.packing import accumulation_dtype, sequence_of_position

Pool = Literal["select", "mean", "max"]


def pool_groups(
    x: Tensor, segmentation: Segmentation, cu_seqlens: Tensor, pool: Literal["mean", "max"]
) -> Tensor:
    """Mean or maximum over the group that ends at each boundary.

    Args:
        x: (total, dim), float; packed.
        segmentation: of the same positions.
        cu_seqlens: int (batch + 1,).
        pool: "mean" or "max".

    Returns:
        (chunks, dim) in the dtype of x; zeros in the tail. Means are accumulated in float32.
    """
    chunks = segmentation.boundary_positions.shape[0]
    group = _group_of_position(segmentation, cu_seqlens)
    if pool == "max":
        index = group[:, None].expand_as(x)
        lowest = x.new_full((chunks + 1, x.shape[1]), -torch.inf)
        best = lowest.scatter_reduce(0, index, x, "amax")[:chunks]
        return best.where(segmentation.boundary_positions[:, None] >= 0, 0.0)
    wide = x.to(accumulation_dtype(x.dtype))
    sums = wide.new_zeros(chunks + 1, x.shape[1]).index_add(0, group, wide)[:chunks]
    counts = wide.new_zeros(chunks + 1).index_add(0, group, wide.new_ones(len(x)))[:chunks]
    return (sums / counts.clamp(min=1)[:, None]).to(x.dtype)


def _group_of_position(segmentation: Segmentation, cu_seqlens: Tensor) -> Tensor:
    """int64 (total,): the chunk whose boundary ends the group; `chunks` where there is none."""
    chunks = segmentation.boundary_positions.shape[0]
    total = segmentation.boundary_mask.shape[0]
    sequence = sequence_of_position(cu_seqlens, total)
    # The next boundary at or behind a position opens the chunk after the one that it is in.
    group = segmentation.chunk_of_position + (~segmentation.boundary_mask).to(torch.int64)
    first_of_next = torch.nn.functional.pad(segmentation.cu_chunks[1:], (0, 1))[sequence]
    return group.where(group < first_of_next, chunks)
