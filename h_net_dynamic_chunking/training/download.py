"""Fetch enwik8 once: into a temporary file, and into place only when it is proved right.

A machine without a network is told apart within three seconds, even when the name lookup itself
hangs, because the connection is opened on a thread that can be abandoned.
"""

import contextlib
import os
import queue
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import IO

from tqdm import tqdm

ENWIK8_URL = "https://mattmahoney.net/dc/enwik8.zip"
CONNECT_SECONDS = 3.0  # until the server has answered at all
STALL_SECONDS = 30.0  # between two pieces of an answer that has begun
_PIECE = 1 << 18


class DownloadError(Exception):
    """Why there is no downloaded file, as the beginning of a sentence."""


def download_enwik8(folder: Path, verify: Callable[[Path], None], url: str = ENWIK8_URL) -> Path:
    """Download enwik8.zip into `folder` and return its path; on any failure leave nothing behind.

    verify: raises ValueError when the finished file is not the right one.
    """
    target = folder / "enwik8.zip"
    response = _open(url)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"enwik8.zip.{os.getpid()}.part"
        try:
            with response, part.open("wb") as file:
                _copy(response, file)
            verify(part)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
    except (OSError, HTTPException, ValueError) as error:
        raise DownloadError(f"The download of {url} failed ({error})") from error
    return target


def _open(url: str) -> HTTPResponse:
    """Open `url` within CONNECT_SECONDS or raise DownloadError."""
    answers: queue.SimpleQueue[HTTPResponse | OSError] = queue.SimpleQueue()

    def connect() -> None:
        try:
            answers.put(urllib.request.urlopen(url, timeout=STALL_SECONDS))
        except HTTPException as error:
            answers.put(OSError(str(error)))
        except OSError as error:
            answers.put(error)

    threading.Thread(target=connect, daemon=True).start()
    answer: HTTPResponse | OSError = TimeoutError(f"no answer in {CONNECT_SECONDS:g} s")
    with contextlib.suppress(queue.Empty):
        answer = answers.get(timeout=CONNECT_SECONDS)
    if isinstance(answer, urllib.error.HTTPError):
        answer.close()
        raise DownloadError(f"The download of {url} failed (HTTP status {answer.code})")
    if isinstance(answer, OSError):
        reason = getattr(answer, "reason", answer)
        raise DownloadError(f"There is no network to download {url} ({reason})")
    return answer


def _copy(response: HTTPResponse, file: IO[bytes]) -> None:
    length = response.headers.get("Content-Length")
    wanted = int(length) if length else None
    received = 0
    with tqdm(total=wanted, unit="B", unit_scale=True, desc="enwik8.zip") as bar:
        while piece := response.read(_PIECE):
            file.write(piece)
            received += len(piece)
            bar.update(len(piece))
    if wanted is not None and received != wanted:
        raise OSError(f"it broke off after {received:,} of {wanted:,} bytes")
