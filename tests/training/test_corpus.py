"""Reading, recognising and splitting corpora."""

import gzip
import hashlib
import lzma
import zipfile
from pathlib import Path

import pytest
import torch

from h_net_dynamic_chunking.training import corpus as corpus_module
from h_net_dynamic_chunking.training.corpus import (
    ENWIK8_SHA256,
    STANDARD_LIBRARY,
    Corpus,
    find_enwik8,
    open_corpus,
    read_bytes,
    standard_library,
)
from h_net_dynamic_chunking.training.download import DownloadError

CONTENT = bytes(range(256)) * 5


def write_zip(path: Path, *names: str) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, CONTENT)


def test_archives_are_told_by_content_whatever_their_name(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(gzip.compress(CONTENT))
    (tmp_path / "b.zip").write_bytes(lzma.compress(CONTENT))
    (tmp_path / "c.xz").write_bytes(CONTENT)
    write_zip(tmp_path / "d.gz", "folder/only")
    for path in tmp_path.iterdir():
        assert read_bytes(path) == CONTENT, path.name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (gzip.compress(b""), "is empty"),
        (gzip.compress(CONTENT)[:-9], "damaged archive"),
        (lzma.compress(CONTENT)[:-9], "damaged archive"),
        (b"PK\x03\x04 and then nothing", "damaged archive"),
    ],
)
def test_unusable_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "corpus"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"data: .*corpus.* {message}"):
        read_bytes(path)


def test_missing_files_folders_and_zips_of_several_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no file"):
        read_bytes(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is not a file"):
        read_bytes(tmp_path)
    write_zip(tmp_path / "two.zip", "one", "two")
    with pytest.raises(ValueError, match="it holds 2 files, one is wanted"):
        read_bytes(tmp_path / "two.zip")


def test_split_is_fixed_for_enwik8_and_relative_otherwise() -> None:
    # The digest decides, not the size.
    whole = Corpus("enwik8", "", torch.zeros(100_000_000, dtype=torch.uint8), ENWIK8_SHA256)
    assert [len(part) for part in whole.split()] == [90_000_000, 5_000_000, 5_000_000]
    other = Corpus("x", "", torch.arange(250).to(torch.uint8), "")
    assert [len(part) for part in other.split()] == [226, 12, 12]
    assert torch.equal(torch.cat(other.split()), other.content)


def test_a_piece_of_enwik8_is_used_and_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "enwik8.123.part").write_bytes(b"half a download")
    assert find_enwik8(tmp_path) is None
    (tmp_path / "enwik8.first.xz").write_bytes(lzma.compress(CONTENT))
    corpus, notice = open_corpus(None, tmp_path)
    assert notice is None
    assert corpus.describe() == (
        "corpus: enwik8.first.xz (not the whole enwik8), 1,280 bytes, split 1,152 / 64 / 64"
    )
    (tmp_path / "enwik8").write_bytes(CONTENT)
    assert find_enwik8(tmp_path) == tmp_path / "enwik8"


def test_a_file_of_the_right_size_must_have_the_right_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_module, "ENWIK8_BYTES", len(CONTENT))
    (tmp_path / "enwik8").write_bytes(CONTENT)
    with pytest.raises(ValueError, match="the size of enwik8 but the sha256"):
        open_corpus(None, tmp_path)
    digest = hashlib.sha256(CONTENT).hexdigest()
    monkeypatch.setattr(corpus_module, "ENWIK8_SHA256", digest)
    assert open_corpus(None, tmp_path)[0].is_whole_enwik8


def test_without_file_and_network_the_standard_library_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_: object) -> Path:
        raise DownloadError("There is no network")

    monkeypatch.setattr(corpus_module, "download_enwik8", no_network)
    corpus, notice = open_corpus(None, tmp_path)
    assert notice is not None
    assert notice.startswith("There is no network; training on the source files of Python's")
    assert "\n" not in notice
    assert len(corpus.content) > 1_000_000
    again = standard_library()
    assert corpus.source == again.source == STANDARD_LIBRARY
    assert corpus.sha256 == again.sha256


def test_a_corpus_must_hold_a_sequence() -> None:
    corpus = Corpus("x", "", torch.zeros(100, dtype=torch.uint8), "")
    corpus.require(89)
    with pytest.raises(ValueError, match="too few for a sequence of 90 bytes"):
        corpus.require(90)
