"""The bytes that a run trains on, and how they are split.

A corpus comes from a file that the user names, from enwik8 under `data/`, from the network, or
else from the source files of the running Python's standard library, which every machine has.
"""

import gzip
import hashlib
import io
import lzma
import sysconfig
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from h_net_dynamic_chunking.training.download import DownloadError, download_enwik8

ENWIK8_BYTES = 100_000_000
ENWIK8_SHA256 = "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8"
STANDARD_LIBRARY = "stdlib"  # what names it where a path names a file
ENWIK8_NAMES = ("enwik8", "enwik8.zip", "enwik8.gz", "enwik8.xz")

# Folders of the standard library that hold no modules of it.
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


class Split(NamedTuple):
    """The three consecutive slices of a corpus, each uint8 (length,)."""

    training: Tensor
    validation: Tensor
    test: Tensor


@dataclass(frozen=True)
class Corpus:
    """Some bytes, what to call them, and the digest by which a resumed run knows them again."""

    name: str
    source: str  # a path, or STANDARD_LIBRARY: opens the same corpus again
    content: Tensor  # uint8 (length,)
    sha256: str

    @property
    def is_whole_enwik8(self) -> bool:
        return self.sha256 == ENWIK8_SHA256

    def split(self) -> Split:
        """Cut 90M/5M/5M bytes of the whole enwik8, 90/5/5 per cent of anything else."""
        length = len(self.content)
        held_out = 5_000_000 if self.is_whole_enwik8 else length * 5 // 100
        parts = torch.split(self.content, [length - 2 * held_out, held_out, held_out])
        return Split(*parts)

    def require(self, seq_len: int) -> None:
        """Refuse a corpus that cannot fill one sequence, or leaves nothing to validate on."""
        training, validation, _ = self.split()
        if len(training) <= seq_len or len(validation) < 2:
            raise ValueError(
                f"data: {self.name} has {len(self.content):,} bytes, {len(training):,} of them for "
                f"training; too few for a sequence of {seq_len:,} bytes and the one after it"
            )

    def describe(self) -> str:
        """One line: what the corpus is, its size and its split."""
        sizes = " / ".join(f"{len(part):,}" for part in self.split())
        return f"corpus: {self.name}, {len(self.content):,} bytes, split {sizes}"


def open_corpus(data: str | None, folder: Path) -> tuple[Corpus, str | None]:
    """Return the corpus to train on, and why it is not the one hoped for (None when it is).

    data: a file, or STANDARD_LIBRARY; None looks for enwik8 in `folder`, then on the network
    """
    if data == STANDARD_LIBRARY:
        return standard_library(), None
    if data is not None:
        return _from_file(Path(data)), None
    path = find_enwik8(folder)
    if path is None:
        try:
            path = download_enwik8(folder, _verify_download)
        except DownloadError as error:
            notice = f"{error}; training on the source files of Python's standard library instead"
            return standard_library(), notice
    return _enwik8_from(path), None


def find_enwik8(folder: Path) -> Path | None:
    """Return the file under `folder` that holds enwik8 or a piece of it, if there is one."""
    for name in ENWIK8_NAMES:
        if (folder / name).is_file():
            return folder / name
    pieces = sorted(path for path in folder.glob("enwik8*") if path.suffix != ".part")
    return next((path for path in pieces if path.is_file()), None)


def read_bytes(path: Path) -> bytes:
    """Read a file; unpack it when its first bytes, not its name, say gzip, xz or zip."""
    if not path.exists():
        raise ValueError(f"data: there is no file {path}")
    if not path.is_file():
        raise ValueError(f"data: {path} is not a file")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ValueError(f"data: {path} cannot be read ({error.strerror})") from error
    try:
        content = unpack(raw)
    except (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile) as error:
        raise ValueError(f"data: {path} is a damaged archive ({error})") from error
    except (NotImplementedError, RuntimeError) as error:
        raise ValueError(f"data: {path} is an archive of an unknown kind ({error})") from error
    if not content:
        raise ValueError(f"data: {path} is empty")
    return content


def unpack(raw: bytes) -> bytes:
    """Return the content of a gzip, xz or one-file zip archive; `raw` itself when it is none."""
    if raw.startswith(b"\x1f\x8b\x08"):
        return gzip.decompress(raw)
    if raw.startswith(b"\xfd7zXZ\x00"):
        return lzma.decompress(raw)
    if raw.startswith(b"PK\x03\x04"):
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            files = [entry for entry in archive.infolist() if not entry.is_dir()]
            if len(files) != 1:
                raise zipfile.BadZipFile(f"it holds {len(files)} files, one is wanted")
            return archive.read(files[0])
    return raw


def standard_library() -> Corpus:
    """Join the source files of the running Python's standard library, in sorted order, no tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    content = b"".join(path.read_bytes() for path in _library_files(root))
    if not content:
        raise ValueError(f"data: no source files under {root}; name a file with --data")
    version = sysconfig.get_python_version()
    name = f"source files of the standard library of Python {version}"
    return _corpus(name, STANDARD_LIBRARY, content)


def _library_files(root: Path) -> Iterator[Path]:
    relative = (path.relative_to(root) for path in root.rglob("*.py"))
    names = sorted(path.as_posix() for path in relative if _NOT_LIBRARY.isdisjoint(path.parts))
    return (root / name for name in names)


def _from_file(path: Path) -> Corpus:
    corpus = _corpus(path.name, str(path.resolve()), read_bytes(path))
    if path.name.startswith("enwik8") and not corpus.is_whole_enwik8:
        return replace(corpus, name=f"{path.name} (not the whole enwik8)")
    return corpus


def _enwik8_from(path: Path) -> Corpus:
    corpus = _from_file(path)
    if len(corpus.content) == ENWIK8_BYTES and not corpus.is_whole_enwik8:
        raise ValueError(
            f"data: {path} has the size of enwik8 but the sha256 {corpus.sha256}, "
            f"not {ENWIK8_SHA256}; delete it, or name it with --data to train on it as it is"
        )
    return corpus


def _verify_download(path: Path) -> None:
    digest = hashlib.sha256(read_bytes(path)).hexdigest()
    if digest != ENWIK8_SHA256:
        raise ValueError(f"the sha256 is {digest}, not {ENWIK8_SHA256}")


def _corpus(name: str, source: str, content: bytes) -> Corpus:
    # bytearray because torch warns about a buffer that it may not write to.
    values = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return Corpus(name, source, values, hashlib.sha256(content).hexdigest())
