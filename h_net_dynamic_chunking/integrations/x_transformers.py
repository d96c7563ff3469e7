"""x-transformers' Decoder as a part of an HNet that decodes.

Its cache holds one length for a whole batch, and grows by one position a call. Rows of an HNet
differ in length as soon as they chunk differently, so that each row here has a cache of its own.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from h_net_dynamic_chunking.cache import ALL_ROWS, Rows, check_cache_class

# Options of x-transformers' attention that need more of the past than the keys and values that its
# cache keeps, so that its steps would not be its forward.
_OF_THE_WHOLE_PAST = ("data_dependent_alibi", "orthog_projected_values", "selective")


@dataclass(eq=False)
class DecoderCache:
    """What the decoder remembers of each row: x-transformers' own record, None before the first."""

    rows: list[Any]
    max_seqlen: int


class SteppedDecoder(nn.Module):
    """Wraps an `x_transformers.Decoder`, so that an HNet around it can decode.

    x, out: (batch, length, dim), as the decoder has them

    Args:
        decoder: with a causal attention and no cross attention.

    Raises:
        ValueError: something else than x-transformers' attention layers, or one that attends to
            another sequence.
    """

    def __init__(self, decoder: nn.Module) -> None:
        if not hasattr(decoder, "layers") or not getattr(decoder, "causal", False):
            raise ValueError(
                f"decoder must be an x_transformers.Decoder, got {type(decoder).__name__}"
            )
        if getattr(decoder, "cross_attend", False):
            raise ValueError("decoder must have cross_attend=False: there is nothing else to see")
        super().__init__()
        self.decoder = decoder

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.decoder(x)
        return out

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> DecoderCache:
        """A cache for `batch_size` rows of up to `max_seqlen` positions, before the first.

        Raises:
            ValueError: an option of the decoder with which its steps are not its forward.
        """
        option = _option_of_the_whole_past(self.decoder)
        if option is not None:
            raise ValueError(
                f"decoder must be without {option} to decode: x-transformers' cache does not keep "
                "what it needs"
            )
        return DecoderCache([None] * batch_size, max_seqlen)

    def check_inference_cache(
        self,
        cache: Any,
        batch_size: int,
        dtype: torch.dtype,
        new: int = 1,
        rows: Rows = ALL_ROWS,
        lens: Tensor | None = None,
    ) -> None:
        """Raise ValueError unless the cache is one of an adapter for that batch."""
        check_cache_class(cache, DecoderCache, self)
        if len(cache.rows) != batch_size:
            raise ValueError(
                f"cache must have the batch size of x, {batch_size}, got one of {len(cache.rows)}"
            )

    def step(self, x: Tensor, cache: DecoderCache, rows: Rows = ALL_ROWS) -> Tensor:
        """The next position of every row: x, out (rows, dim)."""
        return self.extend(x[:, None], cache, None, rows)[:, 0]

    @torch.no_grad()
    def extend(
        self, x: Tensor, cache: DecoderCache, lens: Tensor | None = None, rows: Rows = ALL_ROWS
    ) -> Tensor:
        """The next positions of every row: x, out (rows, length, dim); zeros come out at pads."""
        out = torch.zeros_like(x)
        index = rows.indices(len(x), x.device).tolist()
        counts = [x.shape[1]] * len(x) if lens is None else lens.tolist()
        active = [True] * len(x) if rows.active is None else rows.active.tolist()
        for place, (row, count) in enumerate(zip(index, counts, strict=True)):
            if active[place] and count:
                out[place, :count] = self._extend_row(x[place : place + 1, :count], cache, row)[0]
        return out

    def _extend_row(self, x: Tensor, cache: DecoderCache, row: int) -> Tensor:
        # Against a cache that holds something, the decoder takes one position a call.
        pieces = [x] if cache.rows[row] is None else torch.split(x, 1, dim=1)
        outs = []
        for piece in pieces:
            out, cache.rows[row] = self.decoder(
                piece, cache=cache.rows[row], input_not_include_cache=True, return_hiddens=True
            )
            outs.append(out)
        return torch.cat(outs, dim=1)


def _option_of_the_whole_past(decoder: nn.Module) -> str | None:
    """The first option in use that x-transformers' cache leaves out."""
    for module in decoder.modules():
        if type(module).__name__ == "ShiftTokens":
            return "shift_tokens"
        for name in _OF_THE_WHOLE_PAST:
            if getattr(module, name, None):
                return name
    return None
