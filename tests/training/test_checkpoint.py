"""Checkpoints are whole or absent, and know which run they belong to."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from h_net_dynamic_chunking.files import write_atomically
from h_net_dynamic_chunking.training.checkpoint import Checkpoint

CONFIG = {"seq_len": 128, "dims": [1, 2, 3]}
CHECKPOINT = Checkpoint(
    model={"weight": torch.arange(6.0)},
    optimizer={"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]},
    step=3,
    bytes_seen=384,
    seconds=1.5,
    config=CONFIG,
    version="1",
)


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    CHECKPOINT.save(path)
    replace(CHECKPOINT, step=4).save(path)
    loaded = Checkpoint.load(path, CONFIG)
    assert (loaded.step, loaded.bytes_seen, loaded.seconds) == (4, 384, 1.5)
    assert torch.equal(loaded.model["weight"], CHECKPOINT.model["weight"])
    assert loaded.optimizer == CHECKPOINT.optimizer
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"old")

    def fail(file: object) -> None:
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_another_configuration_is_named(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    CHECKPOINT.save(path)
    with pytest.raises(ValueError, match=r"seq_len is 128 there and 256 here$"):
        Checkpoint.load(path, {**CONFIG, "seq_len": 256})


@pytest.mark.parametrize("kept", [0, 10, 500])
def test_a_truncated_file_is_refused(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "checkpoint.pt"
    CHECKPOINT.save(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="is truncated, or not a checkpoint at all"):
        Checkpoint.load(path, CONFIG)


def test_a_file_with_a_flipped_byte_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    CHECKPOINT.save(path)
    content = bytearray(path.read_bytes())
    at = content.index(torch.arange(6.0).numpy().tobytes())
    content[at + 3] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged"):
        Checkpoint.load(path, CONFIG)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_text("a text that is no checkpoint")
    with pytest.raises(ValueError, match="not a checkpoint at all"):
        Checkpoint.load(path, CONFIG)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(ValueError, match=r"is not a checkpoint of train\.py"):
        Checkpoint.load(path, CONFIG)
    torch.save(torch.zeros, path)  # a function: what weights_only=True is there to refuse
    with pytest.raises(ValueError, match="not a checkpoint at all"):
        Checkpoint.load(path, CONFIG)
