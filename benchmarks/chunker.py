"""The chunker beside the one that is published under this package's name, on a CPU, in one run.

    python benchmarks/chunker.py           # 0.5.19 from the index, in an environment of its own

The case is the published README's own example: a (3, 1024, 512) float32 tensor that requires a
gradient, through the chunker and straight back up. Both packages are called by the same name, so
each runs in its own interpreter; rounds alternate, so that whatever else the machine does meets
both. "Products alone" is the floor that both share, the matrix products of the routing projection.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORKER = Path(__file__).with_name("chunker_worker.py")
CORES = os.cpu_count() or 1
PUBLISHED = "h-net-dynamic-chunking==0.5.19"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="alternations between the two")
    parser.add_argument(
        "--published",
        type=Path,
        default=ROOT / "build" / "published-chunker",
        help="folder of the virtual environment of the published package",
    )
    arguments = parser.parse_args()

    report(alternate(arguments.rounds, environment(arguments.published)))


def alternate(rounds: int, published: Path) -> dict[str, list[dict[str, float]]]:
    """Measure both sides in turn."""
    interpreters = {"ours": sys.executable, "published": str(published)}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in interpreters}
    for round_number in range(rounds):
        for name, interpreter in interpreters.items():
            runs[name].append(measure(interpreter, ours=name == "ours"))
        print(f"round {round_number + 1} of {rounds}", file=sys.stderr)
    return runs


def environment(folder: Path) -> Path:
    """The interpreter of a virtual environment that holds the published package."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        constraints = ["-c", str(ROOT / "constraints.txt")]
        subprocess.run(
            [python, "-m", "pip", "install", "-q", *constraints, "torch", "numpy", PUBLISHED],
            check=True,
        )
    return python


def measure(interpreter: str, ours: bool) -> dict[str, float]:
    """One run of the worker in a fresh process."""
    search_path = {"PYTHONPATH": str(ROOT)} if ours else {"PYTHONPATH": ""}
    output = subprocess.run(
        [interpreter, str(WORKER)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, **search_path},
    ).stdout
    result: dict[str, float] = json.loads(output)
    return result


def report(runs: dict[str, list[dict[str, float]]]) -> None:
    """Medians over the rounds, and how they compare."""

    def median(name: str, key: str) -> float:
        return statistics.median(run[key] for run in runs[name])

    load = os.getloadavg()[0]
    print(f"{platform.processor() or platform.machine()}, {CORES} cores, load {load:.1f}")
    print(f"{'':28}{'ours':>10}{'published':>12}{'ratio':>8}")
    for key, label in (
        ("forward_ms", "forward, ms"),
        ("forward_backward_ms", "forward + backward, ms"),
        ("peak_mb", "peak memory, MB"),
        ("products_ms", "products alone, ms"),
    ):
        ours, published = median("ours", key), median("published", key)
        print(f"{label:28}{ours:10.1f}{published:12.1f}{published / ours:8.2f}")
    extra = [
        median(name, "forward_backward_ms") - median(name, "products_ms")
        for name in ("ours", "published")
    ]
    label = "all but the products, ms"
    print(f"{label:28}{extra[0]:10.1f}{extra[1]:12.1f}{extra[1] / extra[0]:8.2f}")


if __name__ == "__main__":
    main()
