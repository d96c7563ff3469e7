"""Writing files whole."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path to write to that replaces `path` once the block has ended and it is on the disk.

    If the block raises, `path` is as it was.
    """
    # In the same folder, because a rename is atomic only within one file system.
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a file that replaces `path` only once it is complete and on the disk."""
    with whole(path) as part, part.open("wb") as file:
        write(file)


def write_text(path: Path, text: str) -> None:
    """Replace the file at `path` by `text` in UTF-8, atomically."""
    write_atomically(path, lambda file: file.write(text.encode("utf-8")))
