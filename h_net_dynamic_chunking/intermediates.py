"""What one call of the chunker leaves behind, for statistics, pictures and further losses."""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from h_net_dynamic_chunking.layout import Layout
from h_net_dynamic_chunking.losses import SegmentationStatistics, segmentation_statistics
from h_net_dynamic_chunking.ops import Segmentation


@dataclass(frozen=True, eq=False)
class Intermediates:
    """What happened inside one call of the chunker, in the form that the tokens came in.

    Padded input gives (batch, length) and (batch, chunks), packed input (total,) and (chunks,),
    jagged input nested tensors (HNet: packed). What is no field is computed when asked for.
    """

    tokens: Tensor
    """The input, (batch, length, dim): the residual that skips the inner network."""
    layout: Layout
    """How the positions are laid out."""
    chunk_layout: Layout
    """How the chunks are laid out."""
    segmentation: Segmentation
    """Which positions open chunks, packed."""
    packed_probs: Tensor
    """float32 (total,), float64 for float64 tokens: boundary probabilities, with gradient."""
    aux_ratio_loss: Tensor
    """float32 scalar (float64 for float64 tokens): the ratio loss before its weight."""
    boundaries_given: bool = False
    """Whether the caller gave the boundaries, which then may stand where p is small."""
    outer: "Intermediates | None" = None
    """The record of the stage around this one; None for the outermost."""

    @property
    def residual(self) -> Tensor:
        """The input tokens, under the name that the published chunker uses."""
        return self.tokens

    @property
    def probs(self) -> Tensor:
        """float32: probability that each position opens a chunk; 0 at pads."""
        return self.layout.unpack(self.packed_probs)

    @property
    def boundary_mask(self) -> Tensor:
        """bool: which positions open a chunk; False at pads."""
        return self.layout.unpack(self.segmentation.boundary_mask)

    @property
    def mask(self) -> Tensor:
        """bool: which of the chunk slots hold a chunk."""
        return self.chunk_layout.mask

    @property
    def num_chunks(self) -> Tensor:
        """int64 (batch,): chunks of each sequence."""
        return self.chunk_layout.lens

    @property
    def gates(self) -> Tensor:
        """float32: 1 - P of each chunk, its memory of the chunk before; 0 at pads."""
        p = self.segmentation.at_boundaries(self.packed_probs)
        real = self.segmentation.boundary_positions >= 0
        return self.chunk_layout.unpack((1 - p).where(real, 0.0))

    @cached_property
    def chunk_lens(self) -> Tensor:
        """int64: positions in each chunk; 0 at pads."""
        return self.chunk_layout.unpack(self.segmentation.sum_over_chunks())

    @cached_property
    def absolute_chunk_lens(self) -> Tensor:
        """int64: positions of the outermost stage in each chunk; 0 at pads."""
        if self.outer is None:
            return self.chunk_lens
        lengths = self.layout.pack(self.outer.absolute_chunk_lens)
        return self.chunk_layout.unpack(self.segmentation.sum_over_chunks(lengths))

    @cached_property
    def statistics(self) -> SegmentationStatistics:
        """Bytes per chunk, share and entropy of p, and how often the cap was hit."""
        return segmentation_statistics(
            self.segmentation.wanted,
            self.segmentation.boundary_mask,
            self.packed_probs,
            cu_seqlens=self.layout.cu_seqlens,
        )
