"""Pictures of the figures that train_step.py keeps.

python benchmarks/train_pictures.py out/train_length.json out/train_depth.json
"""

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

# What the numbers under the axis are, by the name of the file.
AXES = {"train_length": "bytes of a sequence", "train_depth": "stages of twofold each"}


def draw(figures: Path) -> None:
    """Time and memory over the key of the figures, the floor of the products dashed."""
    rows = json.loads(figures.read_text())
    rows = [row for row in rows if row["bytes/s"]]  # the others ran out of memory
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    by_length = figures.stem == "train_length"
    for name in dict.fromkeys(row["model"] if by_length else "" for row in rows):
        points = [row for row in rows if not by_length or row["model"] == name]
        keys = [row["of"] for row in points]
        (line,) = left.plot(keys, [row["us a byte"] for row in points], "o-", label=name)
        left.plot(keys, [row["of products"] for row in points], "--", color=line.get_color())
        right.plot(keys, [row["peak GB"] for row in points], "o-", label=name)
    left.set(ylabel="us a byte, forward + backward (dashed: FLOPs at 790 TFLOP/s)", yscale="log")
    right.set(ylabel="peak memory, GB", ylim=(0, None))
    for axes in (left, right):
        axes.set(xlabel=AXES.get(figures.stem, ""))
        axes.grid(alpha=0.3)
        if by_length:
            axes.set_xscale("log", base=2)
            axes.legend()
        else:
            axes.set_xticks([row["of"] for row in rows])
    figure.savefig(figures.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        draw(Path(argument))
