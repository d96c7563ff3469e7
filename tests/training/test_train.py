"""train.py as a user runs it: a whole run, stopped and killed runs that go on, and bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

STEPS = 40
TINY = [
    *("--dims", "32", "32", "32", "--layouts", "m1", "m1", "T1", "--device", "cpu"),
    *("--batch-size", "2", "--seq-len", "32", "--steps", str(STEPS)),
    *("--val-every", "30", "--checkpoint-every", "7"),
]
# What a resumed run must have in common, to the last bit, with one that was never stopped.
SAME = ("step", "bytes_seen", "train_bpb", "val_bpb", "bytes_per_chunk", "ratio_loss", "lr")


def start(train_py: Path, cwd: Path, *flags: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, str(train_py), *flags],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(train_py.parent)},
    )


def finish(process: "subprocess.Popen[str]", status: int) -> str:
    output, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    return output


def wait_for_rows(path: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert time.monotonic() < deadline, "the run does not get going"
        time.sleep(0.005)


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{name: json.loads(line)[name] for name in SAME} for line in lines]


def test_a_run_stopped_and_killed_goes_on_bitwise(
    train_module: ModuleType,
    train_py: Path,
    corpus_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ("--data", str(corpus_file), *TINY, "--out")
    whole = tmp_path / "whole"
    assert train_module.main((*flags, str(whole))) == 0
    output = capsys.readouterr().out
    assert "corpus: corpus.txt" in output
    assert "held-out bytes, for which gzip -9 needs" in output
    assert "stage 1: " in output
    names = {"config.json", "metrics.jsonl", "checkpoint.pt", "samples.txt", "curves.png"}
    assert {path.name for path in whole.iterdir()} == names
    expected = rows(whole)
    assert [row["step"] for row in expected] == list(range(1, STEPS + 1))
    validated = [row["step"] for row in expected if row["val_bpb"] is not None]
    assert validated == [1, 30, STEPS]

    # The same run in four processes, the first three of which do not live to its end.
    broken = tmp_path / "runs" / "broken"
    process = start(train_py, tmp_path, *flags, str(broken))
    for seen, number, status in (
        (5, signal.SIGTERM, 143),
        (16, signal.SIGINT, 130),
        (25, signal.SIGKILL, -9),
    ):
        wait_for_rows(broken / "metrics.jsonl", seen)
        process.send_signal(number)
        output = finish(process, status)
        assert len(rows(broken)) < STEPS
        if number != signal.SIGKILL:
            assert "go on with: python train.py --resume --out " in output
            assert output.endswith("runs/broken\n")
        # Without --out: the newest run under runs/ is meant.
        process = start(train_py, tmp_path, "--resume")
    finish(process, 0)
    assert rows(broken) == expected


def refuse(train: ModuleType, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """Run main, expect exit status 2 and one line on stderr, and return it."""
    assert train.main(flags) == 2
    message = capsys.readouterr().err
    assert message.startswith("train.py: ")
    assert message.count("\n") == 1
    return message


def test_bad_input_gets_a_sentence_and_writes_nothing(
    train_module: ModuleType,
    corpus_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").touch()
    data = ("--data", str(corpus_file))
    cases = {
        ("--data", "nowhere"): "there is no file",
        ("--data", "empty"): "is empty",
        (*data, *TINY, "--seq-len", "1000000"): "too few for a sequence",
        (*data, "--seq-len", "0"): "seq_len is 0",
        (*data, "--dims", "33", "32", "32"): "dims is (33, 32, 32); twice each of a stage with",
        (*data, "--steps", "0"): "steps is 0",
        (*data, "--device", "nonsense"): "device: 'nonsense' cannot be used here",
        (*data, "--out", str(corpus_file)): "is not a folder",
        ("--resume",): "there is no run under runs",
        ("--resume", "--out", "elsewhere"): "there is no checkpoint in elsewhere",
    }
    before = sorted(tmp_path.rglob("*"))
    for flags, message in cases.items():
        assert message in refuse(train_module, capsys, *flags)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_is_neither_overwritten_nor_continued_as_another(
    train_module: ModuleType,
    corpus_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = ("--out", str(tmp_path / "run"))
    flags = ("--data", str(corpus_file), *out, *TINY, "--steps", "2")
    assert train_module.main(flags) == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    capsys.readouterr()

    assert "already holds a run; add --resume" in refuse(train_module, capsys, *flags)
    message = refuse(train_module, capsys, "--resume", *out, "--seq-len", "16")
    assert "seq_len is 32 there and 16 here" in message
    corpus_file.write_bytes(corpus_file.read_bytes() + b"more")
    assert "corpus_sha256 is" in refuse(train_module, capsys, "--resume", *out)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before

    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"PK")
    assert "is truncated" in refuse(train_module, capsys, "--resume", *out)


def test_a_finished_run_says_so(
    train_module: ModuleType,
    corpus_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = ("--out", str(tmp_path / "run"))
    train_module.main(("--data", str(corpus_file), *out, *TINY, "--steps", "1"))
    assert train_module.main(("--resume", *out)) == 0
    assert "is complete" in capsys.readouterr().out
    assert train_module.main(("--resume", *out, "--steps", "2")) == 0
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2]


def test_a_longer_run_that_is_stopped_goes_on_to_its_new_end(
    train_module: ModuleType, train_py: Path, corpus_file: Path, tmp_path: Path
) -> None:
    """The limit given with --resume is kept, so that the next --resume needs none."""
    out = tmp_path / "run"
    train_module.main(("--data", str(corpus_file), "--out", str(out), *TINY, "--steps", "1"))
    process = start(train_py, tmp_path, "--resume", "--out", str(out), "--steps", "100000")
    wait_for_rows(out / "metrics.jsonl", 3)
    process.send_signal(signal.SIGTERM)
    finish(process, 143)
    assert json.loads((out / "config.json").read_text())["steps"] == 100_000
    # The other limit replaces it: a run by minutes is not complete because of its old steps.
    process = start(train_py, tmp_path, "--resume", "--out", str(out), "--minutes", "60")
    wait_for_rows(out / "metrics.jsonl", len(rows(out)) + 1)
    process.send_signal(signal.SIGTERM)
    finish(process, 143)
    assert json.loads((out / "config.json").read_text())["steps"] is None


def test_a_diverging_run_is_named(
    train_module: ModuleType,
    corpus_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = ("--out", str(tmp_path / "run"))
    flags = ("--data", str(corpus_file), *out, *TINY, "--learning-rate", "1e30")
    assert train_module.main(flags) == 1
    assert "try a lower --learning-rate" in capsys.readouterr().err
