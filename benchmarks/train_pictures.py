"""Pictures of the figures that train_step.py and train_curves.py keep.

python benchmarks/train_pictures.py out/train_length.json out/train_depth.json out/train_curves.json
"""

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def draw(figures: Path) -> None:
    """A picture beside the figures, of the kind that their name says."""
    kinds = {"train_length": by_length, "train_depth": by_depth, "train_curves": curves}
    figure = Figure(figsize=(10, 4), layout="constrained")
    kinds[figures.stem](figure, json.loads(figures.read_text()))
    figure.savefig(figures.with_suffix(".png"), dpi=110)


def by_length(figure: Figure, rows: list[dict[str, Any]]) -> None:
    for axes in _time_and_memory(figure, rows, "model"):
        axes.set(xlabel="bytes of a sequence")
        axes.set_xscale("log", base=2)
        axes.legend()


def by_depth(figure: Figure, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        row["family"] = ""
    for axes in _time_and_memory(figure, rows, "family"):
        axes.set(xlabel="stages of twofold each", xticks=[row["of"] for row in rows])


def _time_and_memory(figure: Figure, rows: list[dict[str, Any]], family: str) -> Any:
    """Over the key of the figures, a line for each family, the floor of the products dashed."""
    rows = [row for row in rows if row["bytes/s"]]  # the others ran out of memory
    left, right = figure.subplots(1, 2)
    for name in dict.fromkeys(row[family] for row in rows):
        points = [row for row in rows if row[family] == name]
        keys = [row["of"] for row in points]
        (line,) = left.plot(keys, [row["us a byte"] for row in points], "o-", label=name)
        left.plot(keys, [row["of products"] for row in points], "--", color=line.get_color())
        right.plot(keys, [row["peak GB"] for row in points], "o-", label=name)
    left.set(ylabel="us a byte (dashed: floor of the products)", yscale="log")
    right.set(ylabel="peak memory, GB", ylim=(0, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return left, right


def curves(figure: Figure, runs: dict[str, list[list[float]]]) -> None:
    """Bits a byte over steps, a line for each seed; beside them the difference to the first."""
    left, right = figure.subplots(1, 2)
    first = next(iter(runs.values()))
    for number, (name, found) in enumerate(runs.items()):
        color, base = f"C{number}", zip(found, first, strict=True)
        for seed, (curve, other) in enumerate(base):
            label = name if seed == 0 else None
            left.plot(curve, color=color, alpha=0.6, linewidth=0.8, label=label)
            if number:
                off = [a - b for a, b in zip(curve, other, strict=True)]
                right.plot(off, color=color, alpha=0.6, linewidth=0.8, label=label)
    left.set(xlabel="step", ylabel="bits a byte")
    right.set(xlabel="step", ylabel=f"difference to {next(iter(runs))}, same seed")
    left.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        draw(Path(argument))
