"""Where a run lives, and which files it holds."""

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from h_net_dynamic_chunking.files import write_text
from h_net_dynamic_chunking.training import checkpoint, metrics


class RunFolder:
    """The folder of one run. Nothing is written before `write_settings`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.checkpoint = path / checkpoint.FILE_NAME
        self.metrics = path / metrics.FILE_NAME
        self.samples = path / "samples.txt"
        self.curves = path / "curves.png"

    @property
    def holds_a_run(self) -> bool:
        return any(file.exists() for file in (self.config, self.checkpoint, self.metrics))

    @property
    def is_of_train(self) -> bool:
        """Whether its config.json is one of train.py, and no model's that any program wrote."""
        try:
            return "corpus_sha256" in self.read_settings()
        except ValueError:
            return False

    def write_settings(self, settings: dict[str, Any]) -> None:
        """Write down, in a folder made if need be, with which settings the run goes."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.config, json.dumps(settings, indent=2) + "\n")
        except OSError as error:
            raise ValueError(f"out: {self.path} cannot be written ({error.strerror})") from error

    def read_settings(self) -> dict[str, Any]:
        """Return what `write_settings` wrote."""
        try:
            settings = json.loads(self.config.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"resume: {self.config} cannot be read ({error})") from error
        if not isinstance(settings, dict):
            raise ValueError(f"resume: {self.config} is not a configuration of train.py")
        return settings


def new_run(out: str | None, runs: Path) -> RunFolder:
    """Return the folder for a fresh run: `out`, or one under `runs` named after the time in UTC."""
    stamp = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H-%M-%SZ")
    folder = RunFolder(Path(out) if out is not None else runs / stamp)
    if folder.path.exists() and not folder.path.is_dir():
        raise ValueError(f"out: {folder.path} is not a folder")
    if folder.holds_a_run:
        raise ValueError(f"out: {folder.path} already holds a run; add --resume to go on with it")
    return folder


def run_to_resume(out: str | None, runs: Path) -> RunFolder:
    """Return the folder of the run to go on with: `out`, or the newest one under `runs`."""
    if out is not None:
        folder = RunFolder(Path(out))
    else:
        found = [RunFolder(path) for path in runs.glob("*")]
        found = [folder for folder in found if folder.checkpoint.is_file()]
        if not found:
            raise ValueError(f"resume: there is no run under {runs}; name one with --out")
        # The newest checkpoint rather than the newest name, because --out may name anything.
        folder = max(found, key=lambda folder: folder.checkpoint.stat().st_mtime)
    if not folder.checkpoint.is_file():
        raise ValueError(f"resume: there is no checkpoint in {folder.path}")
    return folder
