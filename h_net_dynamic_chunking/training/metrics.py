"""`metrics.jsonl`, one row a step, and the picture of its curves."""

import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from h_net_dynamic_chunking.files import write_atomically, write_text

FILE_NAME = "metrics.jsonl"


@dataclass(frozen=True)
class Row:
    """What is known after a step; bpb is bits per byte."""

    step: int
    bytes_seen: int
    train_bpb: float
    val_bpb: float | None  # None at the steps that do not validate
    bytes_per_chunk: list[float]  # stages from the outside in, each in bytes
    ratio_loss: float  # unweighted, summed over stages; about 1 a stage when on target
    bytes_per_second: float
    lr: float


class MetricsLog:
    """Appends rows to a file; a run that resumes at `step` first drops the rows beyond it."""

    def __init__(self, path: Path, step: int) -> None:
        kept = [row for row in read_rows(path) if row["step"] <= step] if path.exists() else []
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        # Line-buffered, so that the file can be followed and a killed run loses half a row at most.
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def append(self, row: Row) -> None:
        # JSON has no NaN; a row that holds one is a bug, and allow_nan=False finds it.
        self._file.write(json.dumps(asdict(row), allow_nan=False) + "\n")

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a metrics file, without a last line that a crash cut short."""
    lines = path.read_text(encoding="utf-8").split("\n")
    # What follows the last line feed is empty, or half of a row.
    try:
        return [json.loads(line) for line in lines[:-1]]
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); mend or remove it") from error


def plot(rows: list[dict[str, Any]], targets: tuple[float, ...], path: Path) -> None:
    """Draw bits per byte and bytes per chunk over the bytes seen.

    targets: wanted bytes per chunk, stages from the outside in
    """
    # Here, because matplotlib takes a second to load and only the end of a run draws. Without
    # pyplot, a figure needs no display and no global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    seen = [row["bytes_seen"] for row in rows]
    validated = [row for row in rows if row["val_bpb"] is not None]

    left.plot(seen, [row["train_bpb"] for row in rows], linewidth=0.7, label="training")
    left.plot(
        [row["bytes_seen"] for row in validated],
        [row["val_bpb"] for row in validated],
        marker="o",
        label="validation",
    )
    left.set(xlabel="bytes seen", ylabel="bits per byte")
    for stage, target in enumerate(targets):
        lengths = [row["bytes_per_chunk"][stage] for row in rows]
        (line,) = right.plot(seen, lengths, linewidth=0.7, label=f"stage {stage}")
        right.axhline(target, color=line.get_color(), linestyle="--")
    right.set(xlabel="bytes seen", ylabel="bytes per chunk (dashed: target)")
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)

    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_atomically(path, lambda file: file.write(picture.getvalue()))
