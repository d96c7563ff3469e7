"""Boundaries that come from outside while decoding: checked before a cache changes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from h_net_dynamic_chunking.layout import Layout


def check_masks(
    masks: Any, stages: int, outermost: tuple[int, ...], inside: tuple[int, ...] | None = None
) -> None:
    """Raise ValueError unless these can be the boundaries of the stages, outermost first.

    Args:
        masks: a mask, or None, for each stage; none left lets the router choose.
        stages: how many there are.
        outermost: shape of the positions of the outermost one.
        inside: of the others; None where only the stage itself can tell.
    """
    if isinstance(masks, Tensor):
        raise ValueError("boundary_masks must be a sequence of masks, one a stage, got a tensor")
    if masks and not stages:
        raise ValueError("boundary_masks must be empty: this model has no chunker")
    if len(masks) > stages:
        raise ValueError(
            f"boundary_masks must have one entry a stage at most, got {len(masks) - stages} more"
        )
    for stage, mask in enumerate(masks):
        check_mask(mask, inside if stage else outermost)


def check_mask(mask: Any, shape: tuple[int, ...] | None) -> None:
    """Raise ValueError unless this is None, or bool of the shape, if that is known."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"boundary_masks must hold tensors of bool, or None, got {got}")
    found = tuple((mask.values() if mask.is_nested else mask).shape)
    if shape is not None and found != tuple(shape):
        raise ValueError(
            f"boundary_masks must have the shape of the positions of their stage, {tuple(shape)}, "
            f"got {found}"
        )


def padded_masks(
    masks: Sequence[Tensor | None], layout: Layout, padded: Layout
) -> Sequence[Tensor | None]:
    """The masks, of which the first lies packed, as the positions do, with that one padded.

    Raises:
        ValueError: the first one does not fit the positions.
    """
    if not masks or masks[0] is None:
        return masks
    check_mask(masks[0], layout.shape)
    return [padded.unpack(layout.pack(masks[0])), *masks[1:]]
