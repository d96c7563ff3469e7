"""Steps in which rows that open a chunk wait for others, so that inner networks run less often.

Whatever the number of rows that a network steps, it reads all of its weights. In lock-step the main
network reads them at every byte, for the few rows that open a chunk there. Here a step has a depth:

    depth 0    the outermost networks step; a row that opens a chunk waits, the others get a byte
    depth 1    as well, the stage inside steps all rows that have gathered since its last step, and
               those that open no chunk there get a byte, too
    depth S    as well, the main network steps all that wait for it, and no row waits any longer

What a row computes is what it computes alone, in the same order, so that its bytes do not depend on
when the others are there. All shapes are static, and the host reads nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from h_net_dynamic_chunking.cache import Rows
from h_net_dynamic_chunking.chunker import DynamicSequenceChunker
from h_net_dynamic_chunking.chunker_inference import (
    route_by_kernel,
    route_step,
    routes_by_kernel,
)
from h_net_dynamic_chunking.h_net_inference import Entered, HNetCache, stages_of
from h_net_dynamic_chunking.ops.packing import accumulation_dtype

# Steps of a level, at most, for one of the next.
_LONGEST_PERIOD = 8
# Of the outermost stage, as a share of the length of a chunk. Longer ones make more bytes while all
# rows go, but those that open more chunks fall behind, and end alone.
_OF_A_CHUNK = 0.8


class WaitingStep:
    """One byte for each row that needs none of the networks below some depth.

    Args:
        embed: ids (batch,) -> (batch, dim).
        backbone: an HNet.
        head: (batch, dim) -> logits (batch, vocab).
        cache: of the backbone; changes in place.
        ids: int64 (batch,): the bytes that rows read.
        reads: bool (batch,): rows that hold a byte which they have not read.
        choose: takes logits, and bool (batch,), the rows whose logits they are. Puts their next
            bytes into `ids`, and changes `reads` in place: set where there is one, and in no row
            whose logits they are not.
    """

    def __init__(
        self,
        embed: Callable[[Tensor], Tensor],
        backbone: Any,
        head: Callable[[Tensor], Tensor],
        cache: Any,
        ids: Tensor,
        reads: Tensor,
        choose: Callable[[Tensor, Tensor], None],
    ) -> None:
        self._embed, self._head, self._ids, self._choose = embed, head, ids, choose
        self._stages = stages_of(backbone, cache)
        self.waits = [reads, *(torch.zeros_like(reads) for _ in self._stages)]
        """For each stage, and the main network: which rows wait to enter it."""
        self._kept: list[Entered] = []

    @property
    def depth(self) -> int:
        """The depth of a step of all networks."""
        return len(self._stages)

    @torch.no_grad()
    def run(self, depth: int) -> None:
        """Step all rows that wait at a stage up to `depth`, or with the last for the main network.

        Rows that open a chunk one stage deeper wait there, the others choose their next byte.
        """
        innermost = min(depth, self.depth - 1)
        inward = self.waits[0]
        leaves: list[Tensor] = []  # which rows leave each stage, innermost first
        for stage in range(innermost + 1):
            around = leaves if stage == innermost else None
            leaving, inward = self._enter(stage, inward, stage < depth, around)
            leaves = [leaving, *leaves]
        z, back = None, inward
        if depth == self.depth:
            z = self._run_main_network(inward)
        for stage, leaving in zip(reversed(range(innermost + 1)), leaves, strict=True):
            z, back = self._leave(stage, z, back, leaving), leaving
        assert z is not None
        self._choose(self._head(z), back)

    def _enter(
        self, stage: int, active: Tensor, go_in: bool, around: list[Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """The way in of the rows `active`; what they need on the way out is kept.

        Returns which rows leave the stage, and which go in; see `ops._triton.keep_step.Keep`.
        """
        network, cache = self._stages[stage]
        rows = Rows(active=active, checked=True)
        x = self._embed(self._ids) if stage == 0 else self._chunks(stage - 1)
        encoded = network.encode(x, cache, rows)
        if stage == len(self._kept):
            probs = encoded.new_zeros(len(encoded), dtype=accumulation_dtype(encoded.dtype))
            self._kept.append(Entered(torch.zeros_like(encoded), probs, self.waits[stage + 1]))
        return _route(network.chunker, encoded, cache, rows, self._kept[stage], go_in, around)

    def _chunks(self, stage: int) -> Tensor:
        return self._stages[stage][0].chunks(self._kept[stage])

    def _run_main_network(self, active: Tensor) -> Tensor:
        network, cache = self._stages[-1]
        rows = Rows(active=active, checked=True)
        z, _ = network._step_network(self._chunks(self.depth - 1), cache.network, rows, True, ())
        return z

    def _leave(self, stage: int, z: Tensor | None, back: Tensor, leaving: Tensor) -> Tensor:
        """The way out, of the rows that opened no chunk, and of those that are back from inside."""
        network, cache = self._stages[stage]
        encoded, probs, _ = self._kept[stage]
        rows = Rows(active=leaving, checked=True)
        return network.leave(z, Entered(encoded, probs, back), cache, rows)


def _route(
    chunker: DynamicSequenceChunker,
    encoded: Tensor,
    cache: HNetCache,
    rows: Rows,
    kept: Entered,
    go_in: bool,
    around: list[Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Keep the rows that are active, and say which leave, and which go in; see `Keep`."""
    if routes_by_kernel(chunker, encoded, rows):
        from h_net_dynamic_chunking.ops._triton.keep_step import Keep

        keep = Keep(encoded, *kept, go_in, around)
        return route_by_kernel(chunker, encoded, cache.chunker, cache.positions, rows, keep=keep)
    probs, opens = route_step(chunker, encoded, cache.chunker, cache.positions, rows)
    active, waits = rows.active, kept.opens
    assert active is not None
    torch.where(active[:, None], encoded, kept.encoded, out=kept.encoded)
    torch.where(active, probs, kept.probs, out=kept.probs)
    waits |= opens
    leaves, inward = active & ~waits, waits & go_in
    if go_in:
        waits.zero_()
    if around is not None:
        leaves |= inward
        for inner, outer in pairwise([leaves, *around]):
            outer |= inner
    return leaves, inward


def depths(periods: Sequence[int]) -> Iterator[int]:
    """The depths of steps: of periods[s] that reach stage s, the last goes one stage deeper.

    >>> from itertools import islice
    >>> list(islice(depths([3]), 7))
    [0, 0, 1, 0, 0, 1, 0]
    >>> list(islice(depths([2, 2]), 8))
    [0, 1, 0, 2, 0, 1, 0, 2]
    """
    count = 0
    while True:
        count += 1
        depth, period = 0, 1
        for steps in periods:
            period *= steps
            if count % period:
                break
            depth += 1
        yield depth


def usual_periods(cache: HNetCache) -> list[int]:
    """As many steps as a chunk had positions on average so far, for each stage; reads the cache.

    After so many, about two of three rows have opened a chunk. Of the outermost stage, a few less.
    """
    periods: list[int] = []
    level: Any = cache
    while isinstance(level, HNetCache):
        chunks, positions = int(level.chunker.chunks.sum()), int(level.positions.seen.sum())
        steps = positions / max(chunks, 1) * (1 if periods else _OF_A_CHUNK)
        periods.append(max(1, min(round(steps), _LONGEST_PERIOD)))
        level = level.network
    return periods
