"""Chunks of every stage, told by the bytes they open at.

A stage runs on the chunks of the one around it, so a byte that opens a chunk at stage s opens one
at every stage before s. One number a byte says it all: its depth, the number of stages at which it
opens a chunk.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class StageDecisions(Protocol):
    """What is needed of `lm.StageRecord`."""

    @property
    def boundary_mask(self) -> Tensor: ...
    @property
    def probs(self) -> Tensor: ...


class ByteChunks(NamedTuple):
    """What `byte_chunks` returns."""

    depths: Tensor
    """uint8 (batch, length): at how many stages a byte opens a chunk; 0 at pads."""
    probs: Tensor
    """float32 (stages, batch, length): boundary probabilities; NaN where the stage did not run."""


def byte_chunks(stages: Sequence[StageDecisions], lens: Tensor, length: int) -> ByteChunks:
    """Bring the decisions of all stages back to the bytes.

    Args:
        stages: outermost first, each with .boundary_mask and .probs (batch, its positions).
        lens: int (batch,): real bytes of each row.
        length: bytes in the padded rows.
    """
    ran = _first(lens, length)  # the bytes that are positions of the stage at hand
    depths = torch.zeros_like(ran, dtype=torch.uint8)
    probs = torch.full((len(stages), *ran.shape), torch.nan, device=ran.device)
    for stage, probs_of_stage in zip(stages, probs, strict=True):
        real = _first(ran.sum(1), stage.boundary_mask.shape[1])
        opens = torch.zeros_like(ran)
        opens[ran] = stage.boundary_mask[real]
        probs_of_stage[ran] = stage.probs[real].float()
        depths += opens
        ran = opens
    return ByteChunks(depths, probs)


def _first(counts: Tensor, length: int) -> Tensor:
    """bool (batch, length): True at the first so many places of each row."""
    return torch.arange(length, device=counts.device) < counts.unsqueeze(1)
