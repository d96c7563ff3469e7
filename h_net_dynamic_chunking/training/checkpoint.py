"""Checkpoints that are either whole or absent, and that refuse to continue a different run."""

import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from h_net_dynamic_chunking.files import write_atomically

FILE_NAME = "checkpoint.pt"


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to go on; the data has no state, batches are functions of the step."""

    model: dict[str, Any]
    optimizer: dict[str, Any]
    step: int
    bytes_seen: int
    seconds: float  # spent in training so far
    config: dict[str, Any]
    version: str  # of the package that wrote it

    def save(self, path: Path) -> None:
        """Write it so that a crash at any moment leaves the old file or the new one."""
        # Not asdict, which would copy every tensor.
        content = {field.name: getattr(self, field.name) for field in fields(self)}
        write_atomically(path, lambda file: torch.save(content, file))

    @classmethod
    def load(
        cls, path: Path, config: Mapping[str, Any], device: torch.device | str = "cpu"
    ) -> "Checkpoint":
        """Read the checkpoint of the run that `config` describes, or say in one sentence why not.

        Raises:
            ValueError: a truncated or foreign file, or one of another configuration.
        """
        unreadable = f"resume: {path} is truncated, or not a checkpoint at all"
        # Every checkpoint is a zip archive; torch.load would take other files for its older format
        # and fail inside that in any way.
        if not zipfile.is_zipfile(path):
            raise ValueError(unreadable)
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()  # torch does not compare the checksums itself
        except zipfile.BadZipFile as error:
            raise ValueError(unreadable) from error
        if damaged is not None:
            raise ValueError(f"resume: {path} is damaged: {damaged} has another checksum")
        try:
            content = torch.load(path, map_location=device, weights_only=True)
        except (RuntimeError, pickle.UnpicklingError) as error:
            raise ValueError(unreadable) from error
        names = {field.name for field in fields(cls)}
        if not isinstance(content, dict) or set(content) != names:
            raise ValueError(f"resume: {path} is not a checkpoint of train.py")
        if found := differences(content["config"], config):
            raise ValueError(f"resume: {path} is of another configuration: {'; '.join(found)}")
        return cls(**content)


def differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Say of each entry that differs what it is, as in `seq_len is 128 there and 256 here`."""
    found = []
    for name in sorted(saved.keys() | wanted.keys()):
        there, here = saved.get(name, "absent"), wanted.get(name, "absent")
        if there != here:
            found.append(f"{name} is {there} there and {here} here")
    return found
