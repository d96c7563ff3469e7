"""The ratio loss, eq. (10) of the paper, and the statistics of a segmentation.

With F the share of positions that are boundaries, G the mean probability and N the target ratio,

    L = N / (N - 1) * ((N - 1) F G + (1 - F) (1 - G)) = 1 + N^2 / (N - 1) * (F - 1/N) (G - 1/N)

Only G carries a gradient, N^2 / (N - 1) * (F - 1/N): a controller of the soft rate by the hard one.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from h_net_dynamic_chunking.ops.packing import (
    check_cu_seqlens,
    in_some_sequence,
    sequence_of_position,
)
from h_net_dynamic_chunking.ops.ratio import pooled_ratio_loss


class SegmentationStatistics(NamedTuple):
    """What a segmentation looks like; every field is a float32 tensor without dimensions."""

    positions_per_chunk: Tensor
    """Mean length of a chunk; bytes per chunk where the positions are bytes."""
    boundary_share: Tensor
    """F: share of the positions that the router wants as boundaries."""
    mean_probability: Tensor
    """G: mean boundary probability."""
    probability_entropy: Tensor
    """Mean entropy of the boundary probabilities, in bits: 0 where the router is certain."""
    capped_share: Tensor
    """Share of the wanted boundaries that `max_chunks` refused."""


def ratio_loss(
    boundary_mask: Tensor,
    probs: Tensor,
    target_ratio: float,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    per_sequence: bool = False,
    soft_boundaries: Tensor | None = None,
) -> Tensor:
    """The ratio loss over the real positions, a float32 scalar (float64 for float64 probs).

    It is 0 where there are no positions.

    The number is the same in training and in evaluation.

    Args:
        boundary_mask: bool, (batch, length) or packed (total,).
        probs: float, of the same shape; pads may hold anything.
        target_ratio: N > 1, positions per chunk.
        mask: bool, of the same shape, True at real positions.
        cu_seqlens: int (batch + 1,), for packed input; a tail behind the last sequence is left out.
        per_sequence: Evaluate the loss for each sequence and take the mean over the sequences
            that are not empty. The default pools F and G over the whole batch first.
        soft_boundaries: float, of the same shape: F takes the gradient of their mean, straight
            through. None for the paper's F, which has no gradient.

    Raises:
        ValueError: shapes differ, are not (total,) with cu_seqlens, boundary_mask is not bool, or
            target_ratio is not above 1 and finite.

    >>> mask = torch.tensor([[True, False, False, True, False, False]])
    >>> round(float(ratio_loss(mask, mask.float(), 3.0)), 6)
    1.0
    """
    if not 1 < target_ratio < math.inf:
        raise ValueError(f"target_ratio must be above 1 and finite, got {target_ratio}")
    _check_shapes(boundary_mask, probs, mask, cu_seqlens)
    if cu_seqlens is not None and mask is None and not per_sequence and soft_boundaries is None:
        return pooled_ratio_loss(boundary_mask, probs, cu_seqlens, target_ratio)[0]
    real = _real_positions(boundary_mask, mask, cu_seqlens)

    def total(values: Tensor) -> Tensor:
        values = values.to(torch.promote_types(values.dtype, torch.float32)).where(real, 0.0)
        return _sum_by_sequence(values, cu_seqlens) if per_sequence else values.sum()

    count, boundaries, probability = (
        total(torch.ones_like(probs)),
        total(boundary_mask),
        total(probs),
    )
    if soft_boundaries is not None:
        soft = total(soft_boundaries)
        boundaries = boundaries + soft - soft.detach()
    size = count.clamp(min=1)
    f, g, n = boundaries / size, probability / size, target_ratio
    loss = n / (n - 1) * ((n - 1) * f * g + (1 - f) * (1 - g))
    filled = count > 0
    return loss.where(filled, 0.0).sum() / filled.sum().clamp(min=1)


def segmentation_statistics(
    wanted_boundaries: Tensor,
    boundary_mask: Tensor,
    probs: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> SegmentationStatistics:
    """Statistics over the real positions; arguments as in `ratio_loss`.

    `wanted_boundaries` is what the router chose and `boundary_mask` what was left of it under
    `max_chunks`. Without real positions every field is 0. Nothing here carries a gradient.

    >>> mask = torch.tensor([True, False, True, False])
    >>> float(segmentation_statistics(mask, mask, mask.float()).positions_per_chunk)
    2.0
    """
    _check_shapes(boundary_mask, probs, mask, cu_seqlens)
    real = _real_positions(boundary_mask, mask, cu_seqlens)
    p = probs.detach().float().where(real, 0.0)
    wanted = (wanted_boundaries & real).sum().float()
    kept = (boundary_mask & real).sum().float()
    positions = real.sum().clamp(min=1)
    entropy = -(torch.special.xlogy(p, p) + torch.special.xlogy(1 - p, 1 - p))
    return SegmentationStatistics(
        positions_per_chunk=real.sum() / kept.clamp(min=1),
        boundary_share=wanted / positions,
        mean_probability=p.sum() / positions,
        probability_entropy=entropy.sum() / positions / torch.log(torch.tensor(2.0)),
        capped_share=(wanted - kept) / wanted.clamp(min=1),
    )


def _check_shapes(
    boundary_mask: Tensor, probs: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    if boundary_mask.dtype != torch.bool:
        raise ValueError(f"boundary_mask must be bool, got {boundary_mask.dtype}")
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens)
        if boundary_mask.ndim != 1:
            raise ValueError(
                f"boundary_mask must have shape (total,) with cu_seqlens, "
                f"got {tuple(boundary_mask.shape)}"
            )
    for name, tensor in (("probs", probs), ("mask", mask)):
        if tensor is not None and tensor.shape != boundary_mask.shape:
            raise ValueError(
                f"{name} must have the shape of boundary_mask, {tuple(boundary_mask.shape)}, "
                f"got {tuple(tensor.shape)}"
            )


def _real_positions(
    boundary_mask: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """bool, of the shape of the others: where a position counts."""
    real = torch.ones_like(boundary_mask) if mask is None else mask
    if cu_seqlens is None:
        return real
    return real & in_some_sequence(cu_seqlens, len(boundary_mask))


def _sum_by_sequence(values: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """(sequences,): sums over the rows of `values`, or over its packed sequences."""
    if cu_seqlens is None:
        return values.sum(-1)
    batch = len(cu_seqlens) - 1
    owner = sequence_of_position(cu_seqlens, len(values))
    return values.new_zeros(batch + 1).index_add(0, owner, values)[:batch]
