"""What HNetLM returns."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from h_net_dynamic_chunking.h_net_inference import Decision
from h_net_dynamic_chunking.intermediates import Intermediates


@dataclass(frozen=True, eq=False)
class StageRecord:
    """What the chunker of one stage did."""

    seen: Intermediates | Decision
    """All of it, or with a cache the decisions alone."""

    @property
    def intermediates(self) -> Intermediates:
        """What the chunker left behind.

        Raises:
            ValueError: the call had a cache.
        """
        if isinstance(self.seen, Decision):
            raise ValueError("a call with inference_params keeps decisions only, no intermediates")
        return self.seen

    @property
    def probs(self) -> Tensor:
        """float32: boundary probabilities, over the positions of this stage."""
        return self.seen.probs

    @property
    def boundary_mask(self) -> Tensor:
        """bool: boundaries, over the positions of this stage."""
        return self.seen.boundary_mask

    @property
    def ratio_loss(self) -> Tensor:
        """float32 scalar (float64 for a float64 model): the ratio loss before its weight."""
        return self.intermediates.aux_ratio_loss

    @property
    def bytes_per_chunk(self) -> Tensor:
        """float32 scalar: bytes in a chunk of this stage, on average."""
        lens = self.intermediates.absolute_chunk_lens
        lens = lens.values() if lens.is_nested else lens
        return lens.sum() / self.intermediates.num_chunks.sum().clamp(min=1)


@dataclass(frozen=True, eq=False)
class HNetLMOutput:
    """What HNetLM returns. The losses are float32 scalars, float64 for a float64 model."""

    logits: Tensor
    """(batch, length, vocab), or packed (total, vocab); (batch, 1, vocab) after a step."""
    loss: Tensor | None
    """With labels: mean cross entropy in nats plus the weighted ratio losses."""
    loss_sum: Tensor | None
    """With labels: the sum of the cross entropies, in nats."""
    ratio_loss: Tensor
    """The ratio losses of all stages before their weight; 0 with a cache."""
    stages: tuple[StageRecord, ...]
    """One record a chunker, outermost first."""
    cross_entropy: Tensor | None = None
    """With labels: the mean cross entropy alone, in nats."""

    def __iter__(self) -> Iterator[Any]:
        """Unpack as `logits, stages`, and with labels as `(cross_entropy, loss_sum), stages`."""
        scored = (self.cross_entropy, self.loss_sum)
        return iter((self.logits if self.loss is None else scored, self.stages))
