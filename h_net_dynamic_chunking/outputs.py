"""What the chunker hands out, and what it takes back."""

from typing import Any, NamedTuple, Protocol

from torch import Tensor


class Upsample(Protocol):
    """The way back up, as `DynamicSequenceChunker` returns it."""

    def __call__(self, inner: Any, apply_scale: bool = True) -> Tensor:
        """Smooth and expand what the inner network returned.

        Args:
            inner: (batch, chunks, width), or (chunks, width) when packed, of any float dtype: a
                tensor, a tuple or list that starts with one, or an object with `.output` or
                `.last_hidden_state`. The width may differ from the chunker's unless it handles
                the residual.
            apply_scale: False cuts the gradient that the straight-through estimator of eq. (9)
                sends to the router. The values are the same.

        Returns:
            (batch, length, width), or (total, width), in the dtype of the tokens; 0 at pads.

        Raises:
            ValueError: the batch or the number of chunks is not what the chunker handed out.
        """
        ...


class Outputs(NamedTuple):
    """What `DynamicSequenceChunker` returns."""

    downsampled: Tensor
    """(batch, most chunks, dim), or packed (chunks, dim): the chunk vectors; zeros at pads, and in
    the slots that `max_chunks` leaves unused."""
    upsample_fn: Upsample
    """The way back from chunks to positions."""
    weighted_aux_ratio_loss: Tensor
    """float32 scalar (float64 for float64 tokens): ratio loss times its weight."""


def hidden_states(result: Any, name: str = "the network") -> Tensor:
    """The hidden states in what a network returned.

    That is the result itself, the first element of a tuple or list, or the attribute `output` or
    `last_hidden_state`.

    Raises:
        ValueError: there is no tensor in any of these places.
    """
    if isinstance(result, Tensor):
        return result
    candidates = []
    if isinstance(result, (tuple, list)) and result:
        candidates.append(result[0])
    candidates += [getattr(result, name, None) for name in ("output", "last_hidden_state")]
    for candidate in candidates:
        if isinstance(candidate, Tensor):
            return candidate
    raise ValueError(
        f"{name} must return a tensor, a tuple that starts with one, or an object with "
        f".output or .last_hidden_state, got {type(result).__name__}"
    )
