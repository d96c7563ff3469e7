"""Bytes that come one by one, as text that is valid at every moment."""

import codecs


class Utf8Decoder:
    """Whole characters as soon as they are complete, never a part of one.

    Bytes that can no longer become a character turn into U+FFFD, as `bytes.decode` with
    errors="replace" has it: all pieces together are what that makes of all bytes.

    >>> decoder = Utf8Decoder()
    >>> [decoder.feed(bytes([value])) for value in "né".encode()]
    ['n', '', 'é']
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, new: bytes) -> str:
        """The characters that `new` completes."""
        return self._decoder.decode(new)

    def flush(self) -> str:
        """U+FFFD if a character was begun and not completed. The decoder can be used again."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest

    @property
    def pending(self) -> int:
        """How many bytes of a character that is not complete have been fed."""
        return len(self._decoder.getstate()[0])
