"""Segmentations as text: characters that bytes make, marks, brackets and styles."""

import pytest
import torch

from h_net_dynamic_chunking.visualize import (
    Characters,
    ChunkStyles,
    bracketed,
    characters,
    marked,
    printable,
)
from tests.support import generator

BROKEN = "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    ("content", "depths", "wanted"),
    [
        ("aé漢".encode(), [1, 0, 2, 0, 1, 0], [("a", 1), ("é", 2), ("漢", 1)]),
        (b"\xe6\xbcx", [1, 0, 2], [(BROKEN, 1), ("x", 2)]),
        (b"\xe6\xc3\xa9", [1, 0, 2], [(BROKEN, 1), ("é", 2)]),
        (b"\xff\xfe", [0, 1], [(BROKEN, 0), (BROKEN, 1)]),
        (b"x\xe6\xbc", [1, 2, 0], [("x", 1), (BROKEN, 2)]),
        (b"", [], []),
    ],
)
def test_characters(content: bytes, depths: list[int], wanted: list[tuple[str, int]]) -> None:
    assert characters(content, depths) == wanted
    # Also one byte at a time.
    stream = Characters()
    pieces = [
        piece
        for value, depth in zip(content, depths, strict=True)
        for piece in stream.feed(bytes([value]), [depth])
    ]
    assert [*pieces, *stream.flush()] == wanted


def test_characters_of_random_bytes_are_the_decoded_text() -> None:
    for seed in range(50):
        content = bytes(torch.randint(180, 240, (30,), generator=generator(seed)).tolist())
        text = "".join(piece for piece, _ in characters(content, [0] * 30))
        assert text == content.decode(errors="replace")


def test_marks_and_brackets() -> None:
    content, depths = "né à la".encode(), [2, 0, 1, 1, 0, 0, 2, 0, 0]
    assert marked(content, depths, "·┃") == "┃n·é· à┃ la"
    assert bracketed(content, depths, 2) == "[[n][é][ à]][[ la]]"
    # Where BOS opened the first chunk.
    assert bracketed(b"a b", [0, 1, 0], 1) == "[a][ b]"
    assert bracketed(b"a b", [0, 0, 0], 0) == "a b"
    assert bracketed(b"", [], 2) == ""


def test_neighbouring_chunks_look_different() -> None:
    one, two, three = (ChunkStyles(stages) for stages in (1, 2, 3))
    for depth in [1, 1, 2, 1, 3, 2, 1] * 5:
        for styles, stages in ((one, 1), (two, 2), (three, 3)):
            before = styles.at(0)
            assert styles.at(0) == before
            assert styles.at(min(depth, stages)) != before
    assert ChunkStyles(0).at(0) == ChunkStyles(0).at(0)


def test_control_codes_are_shown() -> None:
    text = "\x00\x1b]0;title\x07\r\n\t\x7f\x9b31m é漢"
    assert printable(text) == f"␀␛]0;title␇␍\n\t␡{BROKEN}31m é漢"
