"""Does training go the same way by Triton kernels, in a CUDA graph, and by torch's operations?

    python benchmarks/train_curves.py --out figures
    python benchmarks/train_curves.py --quick            # a tiny model, on a CPU too

Trains a model of 9 million parameters from the same weights by the same batches, once for each seed
and variant. What the variants differ by is to be much less than what seeds differ by. Text is the
source of Python's standard library unless `--data` names a file; weights are float32. All but the
first variant, which the others are compared with, have autocast to bfloat16.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from train_cases import DEVICE, free, picture, table

from h_net_dynamic_chunking import HNetConfig, HNetLM, use_backend
from h_net_dynamic_chunking.ops.backend import Backend
from h_net_dynamic_chunking.training.batches import training_batch
from h_net_dynamic_chunking.training.corpus import STANDARD_LIBRARY, open_corpus
from h_net_dynamic_chunking.training.graphs import GraphedStep
from h_net_dynamic_chunking.training.optimizer import adamw, set_learning_rate
from h_net_dynamic_chunking.training.schedule import warmup_stable_decay

LEARNING_RATE = 1e-3
WINDOW = 20  # steps that a figure is the mean of


class Variant(NamedTuple):
    backend: Backend
    dtype: torch.dtype
    graphed: bool

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.backend}, {dtype}, {'graph' if self.graphed else 'eager'}"


VARIANTS = (
    Variant("torch", torch.float32, True),
    Variant("torch", torch.bfloat16, True),
    Variant("auto", torch.bfloat16, True),
    Variant("auto", torch.bfloat16, False),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=STANDARD_LIBRARY, help="any file")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--quick", action="store_true", help="a tiny model, few steps")
    parser.add_argument("--out", type=Path, help="folder for figures and a picture")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.steps, arguments.batch_size, arguments.length = 40, 2, 64
    # Without a GPU all variants would be one.
    variants = VARIANTS if DEVICE == "cuda" else VARIANTS[:1]
    machine = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    print(f"{machine}, torch {torch.__version__}, Python {sys.version.split()[0]}")
    corpus, _ = open_corpus(arguments.data, Path("data"))
    content = corpus.split().training.to(DEVICE)
    curves: dict[str, list[list[float]]] = {}
    kept = (arguments.out or Path()) / "train_curves.json"
    for variant in variants:
        start = time.perf_counter()
        curves[str(variant)] = [
            train(variant, s, content, arguments) for s in range(arguments.seeds)
        ]
        ms = 1e3 * (time.perf_counter() - start) / (arguments.seeds * arguments.steps)
        print(f"{variant}: {ms:.1f} ms a step, with what comes before the first", flush=True)
        free()
        if arguments.out is not None:
            arguments.out.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(curves) + "\n")
    print("\n" + report(curves))
    if arguments.out is not None:
        picture(kept)


def train(
    variant: Variant, seed: int, content: Tensor, arguments: argparse.Namespace
) -> list[float]:
    """The cross entropy of each step in bits a byte."""
    length = arguments.length
    torch.manual_seed(seed)
    if arguments.quick:
        config = HNetConfig.create_reasonable_config(D=[64, 128], arch=["m1", "T1"])
    else:
        config = HNetConfig.preset("hnet_1stage_S")
    # As in train.py: the paper's weight would not move the boundaries in so few steps.
    model = HNetLM(config, ratio_loss_weight=0.3, max_chunks=[length // 2]).to(DEVICE)
    optimizer = adamw(model.parameter_groups(0.1), LEARNING_RATE)

    def losses_of(windows: Tensor) -> list[Tensor]:
        with (
            use_backend(variant.backend),
            torch.autocast(DEVICE, torch.bfloat16, enabled=variant.dtype == torch.bfloat16),
        ):
            out = model(windows[:, :-1], windows[:, 1:])
        assert out.loss is not None
        assert out.cross_entropy is not None
        return [out.loss, out.cross_entropy]

    take = GraphedStep(losses_of, optimizer, graphed=variant.graphed)
    losses = []
    for step in range(arguments.steps):
        progress = (step + 0.5) / arguments.steps
        set_learning_rate(optimizer, LEARNING_RATE * warmup_stable_decay(progress))
        windows = training_batch(content, arguments.batch_size, length, seed, step)
        losses.append(take(windows)[1])
    return (torch.stack(losses) / math.log(2)).tolist()


def windowed(curve: Sequence[float]) -> list[float]:
    """Means of WINDOW steps each."""
    return [statistics.fmean(curve[i : i + WINDOW]) for i in range(0, len(curve), WINDOW)]


def report(curves: dict[str, list[list[float]]]) -> str:
    """Rows of windows: the mean over seeds, their spread, and how far each variant is from the
    first with the same seed."""
    first, *others = curves
    smooth = {name: [windowed(curve) for curve in found] for name, found in curves.items()}
    header = ["steps", f"bits a byte, {first}", "deviation of seeds"]
    header += [f"{name}: mean difference, largest" for name in others]
    rows = []
    for window in range(len(smooth[first][0])):
        base = [curve[window] for curve in smooth[first]]
        row = [f"up to {(window + 1) * WINDOW}", f"{statistics.fmean(base):.4f}"]
        row.append(f"{statistics.stdev(base):.4f}" if len(base) > 1 else "")
        for name in others:
            off = [c[window] - b for c, b in zip(smooth[name], base, strict=True)]
            row.append(f"{statistics.fmean(off):+.4f}, {max(off, key=abs):+.4f}")
        rows.append(row)
    return table(header, rows)


if __name__ == "__main__":
    main()
