"""Stop strings on the device and on the host, and UTF-8 that comes byte by byte."""

import pytest
import torch

from h_net_dynamic_chunking.stopping import (
    NOTHING_YET,
    StopFilter,
    StopStrings,
    ends_with_any,
)
from h_net_dynamic_chunking.utf8 import Utf8Decoder
from tests.support import generator

STOPS = [b"ab", b"b", b"aab", b"cc"]


def test_device_and_filter_against_a_search() -> None:
    """Random strings of three letters: both find the first stop string, and cut it."""
    stops = StopStrings(STOPS)
    patterns = stops.patterns(torch.device("cpu"))
    contents = (torch.randint(3, (200, 12), generator=generator()) + ord("a")).tolist()
    for content in map(bytes, contents):
        ends = [end for end in range(13) if content[:end].endswith(tuple(STOPS))]
        end = ends[0] if ends else 12
        recent = torch.full((1, stops.longest), NOTHING_YET)
        row, passed = StopFilter(stops), b""
        for place in range(end):
            recent = torch.cat([recent[:, 1:], torch.tensor([[content[place]]])], dim=1)
            stopped = bool(ends_with_any(recent, patterns))
            assert stopped == (place + 1 == end and bool(ends))
            passed += row.feed(content[place : place + 1], ended=place + 1 == end)
        longest = max((len(s) for s in STOPS if content[:end].endswith(s)), default=0)
        assert passed == content[: end - longest]
        assert row.stopped == bool(ends)


def test_filter_holds_back_no_more_than_it_must() -> None:
    row = StopFilter(StopStrings([b"<end>", b"\n\n"]))
    pieces = [row.feed(bytes([value]), ended=False) for value in b"a<en<\nb"]
    assert pieces == [b"a", b"", b"", b"", b"<en", b"<", b"\nb"]


def test_no_stop_strings_hold_nothing_back() -> None:
    assert StopFilter(StopStrings([])).feed(b"all", ended=False) == b"all"


@pytest.mark.parametrize(
    "content",
    [
        "naïve 漢字 🎈 e\u0301".encode(),
        bytes(range(256)),
        b"\xf0\x9f\x8e cut, \xe6\xbc",
        b"\xed\xa0\x80 a surrogate, \xc0\x80 overlong, \xf5\x80",
        b"",
    ],
    ids=["text", "all values", "cut", "never valid", "empty"],
)
def test_utf8_is_what_decode_makes_of_it(content: bytes) -> None:
    """Fed one by one; every piece is valid text, and characters come with their last byte."""
    decoder = Utf8Decoder()
    pieces = []
    for end in range(1, len(content) + 1):
        pieces.append(decoder.feed(content[end - 1 : end]))
        pieces[-1].encode()
        so_far = "".join(pieces)
        assert content[: end - decoder.pending].decode(errors="replace") == so_far
    assert "".join(pieces) + decoder.flush() == content.decode(errors="replace")
    assert decoder.feed(b"again") == "again"
