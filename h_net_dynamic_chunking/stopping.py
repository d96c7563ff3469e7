"""Strings that end a generation: found on the device, cut and held back on the host."""

from collections.abc import Sequence

import torch
from torch import Tensor

ANYTHING = -1
NOTHING_YET = -2


class StopStrings:
    """Byte strings at which a row stops.

    >>> StopStrings([b"\\n\\n"]).cut(b"one line\\n\\n")
    b'one line'
    """

    def __init__(self, stops: Sequence[bytes]) -> None:
        self._stops = tuple(stops)
        self.longest = max(map(len, stops), default=0)

    def patterns(self, device: torch.device) -> Tensor:
        """int64 (stops, longest): the strings, `ANYTHING` on the left of the shorter ones."""
        rows = [[ANYTHING] * (self.longest - len(stop)) + list(stop) for stop in self._stops]
        shape = (len(rows), self.longest)
        return torch.tensor(rows, dtype=torch.int64, device=device).view(shape)

    def cut(self, content: bytes) -> bytes | None:
        """`content` without the stop string at its end, the longest of several; None if none is."""
        found = [len(stop) for stop in self._stops if content.endswith(stop)]
        return content[: len(content) - max(found)] if found else None

    def held_back(self, content: bytes) -> int:
        """How many bytes at the end may turn out to be the start of a stop string.

        >>> StopStrings([b"</s>", b"end"]).held_back(b"to the </")
        2
        """
        for length in range(min(self.longest - 1, len(content)), 0, -1):
            end = content[-length:]
            if any(len(stop) > length and stop.startswith(end) for stop in self._stops):
                return length
        return 0


def ends_with_any(recent: Tensor, patterns: Tensor) -> Tensor:
    """Which rows end with one of the patterns, bool (batch,).

    Args:
        recent: int64 (batch, longest): the last bytes of each row, `NOTHING_YET` where it is
            shorter.
        patterns: from `StopStrings.patterns`.
    """
    same = (recent.unsqueeze(1) == patterns) | (patterns == ANYTHING)
    return same.all(-1).any(-1)


class StopFilter:
    """Lets the bytes of one row through once no stop string can begin with them any more.

    >>> row = StopFilter(StopStrings([b"stop"]))
    >>> row.feed(b"please st", ended=False), row.feed(b"op", ended=True), row.stopped
    (b'please ', b'', True)
    """

    def __init__(self, stops: StopStrings) -> None:
        self._stops = stops
        self._held = b""
        self.stopped = False
        """Whether the row ended with a stop string."""

    def feed(self, new: bytes, ended: bool) -> bytes:
        """What can be let through now. A row that ended lets all through but a stop string."""
        content = self._held + new
        if not ended:
            free = len(content) - self._stops.held_back(content)
            self._held = content[free:]
            return content[:free]
        self._held = b""
        cut = self._stops.cut(content)
        self.stopped = cut is not None
        return content if cut is None else cut
