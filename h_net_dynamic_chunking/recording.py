"""Pieces of a step as CUDA graphs: what the host would launch, launched at once.

The recorded kernels hold the addresses of the caches. Where attention may see many positions, its
caches get slots for all of them at once if these take little of the free memory; else they grow,
in a step or when a piece of text is read between two of them, and everything is recorded again.
"""

import dataclasses
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from h_net_dynamic_chunking.cache import Positions
from h_net_dynamic_chunking.layers import AttentionCache

# Share of the free memory that slots may take before there are positions for them.
_FREE_SHARE = 0.1


def can_record(ids: Tensor) -> bool:
    """Whether a step that reads these ids is recorded: on a GPU, and outside of autocast.

    Autocast casts weights once and keeps them for as long as it is on, which a graph outlives.
    """
    return ids.is_cuda and not torch.is_autocast_enabled("cuda")


class Recording:
    """Pieces of a step, recorded on some caches.

    Args:
        pieces: gives what to record, anew each time. Each runs on static tensors, and changes no
            cache where no flag is set.
        cache: all that counts positions; its tensors are changed in place by every replay.
        flags: bool tensors that say which rows have something to do.
    """

    def __init__(
        self, pieces: Callable[[], list[Callable[[], None]]], cache: Any, flags: Sequence[Tensor]
    ) -> None:
        self._pieces, self._flags = pieces, flags
        self._device = flags[0].device
        self._attention: list[AttentionCache] = _found(cache, AttentionCache)
        self._all_positions: list[Positions] = _found(cache, Positions)
        self._growing: list[AttentionCache] = []
        self._slots: list[int] = []
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._positions: list[list[Positions]] = []
        with torch.cuda.device(self._device):
            self._record()

    def run(self, piece: int) -> None:
        """Replay one piece, which is a step."""
        with torch.cuda.device(self._device):
            self.make_room()
            self.replay(piece)

    def make_room(self) -> None:
        """Before a step, on the current device: see that no cache is full."""
        # Of all of them, so that one recording is enough.
        for cache in self._growing:
            cache.reserve(1)
        if [cache.slots for cache in self._growing] != self._slots:
            self._record()

    def replay(self, piece: int) -> None:
        """Replay one piece, on the current device."""
        self._graphs[piece].replay()
        for positions in self._positions[piece]:
            positions.bound += 1

    def _record(self) -> None:
        """Run all pieces once with no flag set, which changes no cache, then record them."""
        self._take_slots()
        bounds = [positions.bound for positions in self._all_positions]
        flags = [flag.clone() for flag in self._flags]
        for flag in self._flags:
            flag.zero_()
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch's
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for piece in self._pieces():
                piece()
        torch.cuda.current_stream().wait_stream(side)
        self._graphs, self._positions = [], []
        pool = torch.cuda.graph_pool_handle()
        for piece in self._pieces():
            before = [positions.bound for positions in self._all_positions]
            graph = torch.cuda.CUDAGraph()
            with _without_collection(), torch.cuda.graph(graph, pool=pool, stream=side):
                piece()
            self._graphs.append(graph)
            self._positions.append(
                [p for p, old in zip(self._all_positions, before, strict=True) if p.bound != old]
            )
        for positions, bound in zip(self._all_positions, bounds, strict=True):
            positions.bound = bound
        for flag, value in zip(self._flags, flags, strict=True):
            flag.copy_(value)

    def _take_slots(self) -> None:
        growing = [cache for cache in self._attention if not cache.ring]
        whole = sum(cache.bytes_at_limit for cache in growing)
        at_once = whole <= _FREE_SHARE * torch.cuda.mem_get_info(self._device)[0]
        for cache in growing:
            cache.reserve(cache.positions.limit if at_once and cache.positions.limit else 1)
        # The bound counts steps of rows that rest, too, so that some may grow early.
        self._growing = [] if at_once else growing
        self._slots = [cache.slots for cache in self._growing]


@contextmanager
def _without_collection() -> Iterator[None]:
    """No graph of before is collected in here: to free one breaks off what is being recorded."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _found(cache: Any, wanted: type) -> list[Any]:
    """The parts of a cache that are of a class."""
    if isinstance(cache, wanted):
        return [cache]
    if isinstance(cache, (list, tuple)):
        return [part for entry in cache for part in _found(entry, wanted)]
    if dataclasses.is_dataclass(cache) and not isinstance(cache, type):
        entries = [getattr(cache, entry.name) for entry in dataclasses.fields(cache)]
        return [part for entry in entries for part in _found(entry, wanted)]
    return []
