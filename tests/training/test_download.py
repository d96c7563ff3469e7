"""Downloading, from a server in this process."""

import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from h_net_dynamic_chunking.training import download
from h_net_dynamic_chunking.training.download import DownloadError, download_enwik8

CONTENT = b"wiki" * 100_000


class Handler(BaseHTTPRequestHandler):
    """Serves /whole, breaks off in /broken, and knows nothing else."""

    def do_GET(self) -> None:
        if self.path not in ("/whole", "/broken"):
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT if self.path == "/whole" else CONTENT[:1000])

    def log_message(self, *_: object) -> None:
        """Stay quiet."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


def accept(_: Path) -> None:
    """Take any file for the right one."""


def refuse(_: Path) -> None:
    raise ValueError("the sha256 is wrong")


def test_a_whole_file_moves_into_place(server: str, tmp_path: Path) -> None:
    path = download_enwik8(tmp_path / "data", accept, f"{server}/whole")
    assert path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("page", "verify", "message"),
    [
        ("broken", accept, "failed .*broke off after 1,000 of 400,000 bytes"),
        ("whole", refuse, "failed .*the sha256 is wrong"),
        ("absent", accept, "failed .*HTTP status 404"),
    ],
)
def test_a_failed_download_leaves_nothing(
    server: str, tmp_path: Path, page: str, verify: Callable[[Path], None], message: str
) -> None:
    with pytest.raises(DownloadError, match=message):
        download_enwik8(tmp_path, verify, f"{server}/{page}")
    assert list(tmp_path.iterdir()) == []


def test_a_refused_connection_is_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(DownloadError, match="There is no network"):
        download_enwik8(tmp_path, accept, "http://127.0.0.1:9")


def test_a_name_lookup_that_hangs_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "CONNECT_SECONDS", 0.2)
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: time.sleep(2))
    start = time.monotonic()
    with pytest.raises(DownloadError, match=r"There is no network .*no answer in 0\.2 s"):
        download_enwik8(tmp_path, accept)
    assert time.monotonic() - start < 1.5
