"""A segmentation as text: marks or brackets where chunks open, and the colours of chunks.

Bytes come with their depth, the number of stages at which they open a chunk (`byte_chunks`). A
character is never cut: it opens what its bytes open.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from h_net_dynamic_chunking.utf8 import Utf8Decoder

# A light and a darker shade of blue, green, yellow, red, magenta and cyan, behind black text.
SHADES = (
    ("#cfe8ff", "#9bccf7"),
    ("#d9f5cf", "#a9e094"),
    ("#fff3b8", "#f7dc6f"),
    ("#ffdcd2", "#fab09c"),
    ("#f5d6ff", "#dea6f5"),
    ("#cdf3ee", "#8fdccf"),
)


class Characters:
    """Bytes and depths that come in any pieces, as characters and depths.

    >>> characters = Characters()
    >>> [*characters.feed(b"a\\xc3", [1, 0]), *characters.feed(b"\\xa9", [2])]
    [('a', 1), ('é', 2)]
    """

    def __init__(self) -> None:
        self._decoder = Utf8Decoder()
        self._depth = 0  # of the bytes that wait for the rest of their character

    def feed(self, content: bytes, depths: Sequence[int]) -> Iterator[tuple[str, int]]:
        """The characters that `content` completes; U+FFFD stands for bytes that are none."""
        for value, depth in zip(content, depths, strict=True):
            text = self._decoder.feed(bytes([value]))
            if self._decoder.pending:
                # What comes now was begun before this byte, and this byte begins the next.
                yield from self._completed(text, self._depth)
                self._depth = depth if text else max(self._depth, depth)
            elif len(text) > 1:
                yield from self._completed(text[:-1], self._depth)
                yield text[-1], depth
                self._depth = 0
            else:
                yield text, max(self._depth, depth)
                self._depth = 0

    def flush(self) -> Iterator[tuple[str, int]]:
        """U+FFFD if a character was begun and not completed."""
        yield from self._completed(self._decoder.flush(), self._depth)
        self._depth = 0

    @staticmethod
    def _completed(text: str, depth: int) -> Iterator[tuple[str, int]]:
        for place, character in enumerate(text):
            yield character, 0 if place else depth


def characters(content: bytes, depths: Sequence[int]) -> list[tuple[str, int]]:
    """All characters of `content`, each with its depth."""
    stream = Characters()
    return [*stream.feed(content, depths), *stream.flush()]


def marked(content: bytes, depths: Sequence[int], marks: Sequence[str]) -> str:
    """The text with marks[d - 1] before each character of depth d.

    >>> marked(b"a cat", [2, 1, 0, 0, 0], "·┃")
    '┃a· cat'
    """
    pieces = characters(content, depths)
    return "".join((marks[depth - 1] if depth else "") + text for text, depth in pieces)


def bracketed(content: bytes, depths: Sequence[int], stages: int) -> str:
    """The text with a pair of brackets around each chunk of each stage, outermost stage inmost.

    >>> bracketed(b"a cat sat", [2, 1, 0, 0, 0, 2, 0, 0, 0], 2)
    '[[a][ cat]][[ sat]]'
    """
    pieces = []
    for place, (text, depth) in enumerate(characters(content, depths)):
        # A text begins with a chunk even where that opened before it, with BOS.
        pieces += ["[" * stages if place == 0 else "]" * depth + "[" * depth, text]
    return "".join(pieces) + "]" * stages if pieces else ""


def printable(text: str) -> str:
    """The text with control codes made visible, which could otherwise command a terminal.

    >>> printable("a\\x1b[2J\\tb\\n")
    'a␛[2J\\tb\\n'
    """
    return "".join(map(_visible, text))


@dataclass(frozen=True)
class ChunkStyle:
    """How the characters of a chunk look, in black."""

    hue: int
    """Row of SHADES."""
    shade: int
    """0, or 1 for the darker one."""
    underline: bool

    @property
    def background(self) -> str:
        """As #rrggbb."""
        return SHADES[self.hue][self.shade]


class ChunkStyles:
    """The look of chunks in the order of the text.

    The hue changes with each chunk of the innermost stage, the shade with each chunk of stage 0,
    and with three stages or more underlining with each chunk of stage 1.

    >>> styles = ChunkStyles(stages=2)
    >>> [styles.at(depth).background for depth in (2, 1, 0, 2)]
    ['#a9e094', '#d9f5cf', '#d9f5cf', '#f7dc6f']
    """

    def __init__(self, stages: int) -> None:
        self._opened = [0] * stages

    def at(self, depth: int) -> ChunkStyle:
        """The look of the next character."""
        for stage in range(depth):
            self._opened[stage] += 1
        opened = self._opened or [0]
        shade = opened[0] % 2 if len(opened) > 1 else 0
        underline = len(opened) > 2 and opened[1] % 2 == 1
        return ChunkStyle(opened[-1] % len(SHADES), shade, underline)


def _visible(character: str) -> str:
    code = ord(character)
    if character in "\n\t" or 0x20 <= code < 0x7F or code >= 0xA0:
        return character
    if code < 0x20:
        return chr(0x2400 + code)
    return "\N{SYMBOL FOR DELETE}" if code == 0x7F else "\N{REPLACEMENT CHARACTER}"
