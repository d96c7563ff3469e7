"""Training steps on one GPU: speed, memory, where the time goes, and what theory says.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --only profile --details 3
    python benchmarks/train_step.py --quick          # tiny models, on a CPU too

Weights of bfloat16, packed sequences of random bytes (in `step` a padded batch, too), boundaries
forced to every 5th position for one stage and to every 3rd for each of two, as the figures of the
official code have them. A section that runs out of memory or fails says so, and the others go on.
`--out DIR` keeps the figures of the sections `length` and `depth`, and draws them where matplotlib
is installed.

Sections: step (the published models), profile (kernels by component), isotropic (beside models
without stages of as many FLOPs a byte), length, depth, small (9 million parameters, operation by
operation and as one CUDA graph), checkpointing (of activations), optimizer, compiled (layers).
"""

import argparse
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import train_profile
from train_cases import (
    COPY,
    DEVICE,
    Case,
    Cost,
    Trainer,
    binary_tree,
    free,
    isotropic,
    measure,
    of_length,
    picture,
    print_table,
    published,
    seconds_of_products,
)

from h_net_dynamic_chunking import HNetConfig, HNetLM
from h_net_dynamic_chunking.training.graphs import GraphedStep

# Forward + backward of the official code on one H200: ms, peak GB.
OFFICIAL = {"hnet_1stage_L": (238.6, 62.2), "hnet_2stage_L": (282.1, 57.2)}
PRESETS = tuple(OFFICIAL)
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, with commas")
    parser.add_argument("--quick", action="store_true", help="tiny models, few calls")
    parser.add_argument("--models", default=",".join(PRESETS), help="presets, with commas")
    parser.add_argument("--details", type=int, default=0, help="kernels to list of each component")
    parser.add_argument("--out", type=Path, help="folder for figures and pictures")
    arguments = parser.parse_args()

    machine = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    print(f"{machine}, torch {torch.__version__}, Python {sys.version.split()[0]}")
    failed = False
    for name in arguments.only.split(","):
        start = time.perf_counter()
        print(f"\n## {name}\n", flush=True)
        try:
            SECTIONS[name](arguments)
        except Exception:
            failed = True
            print("FAILED\n" + traceback.format_exc(limit=-4))
        free()
        print(f"\n({name}: {time.perf_counter() - start:.0f} s)", flush=True)
    sys.exit(failed)


def show(cost: Cost, case: Case) -> list[str]:
    """Milliseconds, bytes a second, gigabytes."""
    if math.isinf(cost.ms):
        return ["out of memory", "", ""]
    return [f"{cost.ms:.1f}", f"{case.total / cost.ms * 1e3:,.0f}", f"{cost.gigabytes:.1f}"]


def cost_of_training(case: Case, **options: Any) -> Cost:
    """Of forward and backward of a new model."""
    try:
        trainer = Trainer(case, DTYPE, **options)
    except torch.OutOfMemoryError:
        return Cost(math.inf)
    return measure(trainer.forward_backward)


# ---- sections


def step(arguments: argparse.Namespace) -> None:
    header = ["model", "forward, ms", "+ backward, ms", "bytes/s", "peak GB"]
    header += ["+ optimizer, ms", "bytes/s", "peak GB", "host, ms", "products, ms"]
    header += ["official, ms (times ours)", "official GB"]
    print_table(header, steps(arguments))


def steps(arguments: argparse.Namespace) -> Iterator[list[str]]:
    for name, padded in product(arguments.models.split(","), (False, True)):
        case = replace(published(name, arguments.quick), padded=padded)
        trainer = Trainer(case, DTYPE)
        forward = measure(trainer.forward)
        both = measure(trainer.forward_backward)
        trained = measure(trainer.step)
        floor, (ms, peak) = 1e3 * seconds_of_products(case), OFFICIAL.get(name, (math.nan,) * 2)
        yield [
            f"{name}, {'padded' if padded else 'packed'}",
            f"{forward.ms:.1f}",
            *show(both, case),
            *show(trained, case),
            f"{both.host_ms:.0f}",
            f"{floor:.0f}",
            f"{ms} ({ms / both.ms:.2f})",
            f"{peak}",
        ]
        del trainer
        free()


def profile(arguments: argparse.Namespace) -> None:
    for name in arguments.models.split(","):
        print(train_profile.report(published(name, arguments.quick), arguments.details), "\n")
        free()


def isotropics(arguments: argparse.Namespace) -> None:
    ours = published("hnet_1stage_L", arguments.quick)
    width = 64 if arguments.quick else 1024
    cases = [ours, isotropic("T", ours, width), isotropic("m", ours, width)]

    def rows() -> Iterator[list[str]]:
        first = math.nan
        for case in cases:
            cost = cost_of_training(case)
            first = cost.ms if case is ours else first
            gflops = case.flops / case.total / 3e9
            yield [case.name, f"{gflops:.3f}", *show(cost, case), f"{first / cost.ms:.2f}"]

    header = ["model", "GFLOP a byte", "forward + backward, ms", "bytes/s", "peak GB"]
    print_table([*header, "H-Net's time over it"], rows())


def length(arguments: argparse.Namespace) -> None:
    ours = published("hnet_1stage_L", arguments.quick)
    width, total = (64, 128) if arguments.quick else (1024, 65536)
    transformer = isotropic("T", of_length(ours, 8192, total), width, window=-1)
    lengths = (32, 64) if arguments.quick else [1024 << power for power in range(8)]
    cases = product(lengths, (ours, transformer))
    measured = ((of_length(model, count, total), count) for count, model in cases)
    print_and_keep(arguments.out, "length", measured)


def depth(arguments: argparse.Namespace) -> None:
    cases = (binary_tree(stages, arguments.quick) for stages in range(1, 5))
    print_and_keep(arguments.out, "depth", ((case, len(case.every)) for case in cases))


def print_and_keep(folder: Path | None, name: str, cases: Iterable[tuple[Case, int]]) -> None:
    """A row for each case, beside its key; all that were measured are kept after each."""
    found: list[dict[str, Any]] = []

    def rows() -> Iterator[list[str]]:
        for case, key in cases:
            found.append(figures(case, key))
            yield list(as_text(found[-1]).values())
            keep(folder, name, found)

    print_table(["model", "of", "bytes", "us a byte", "of products", "bytes/s", "peak GB"], rows())
    if folder is not None:
        picture(folder / f"train_{name}.json")


def figures(case: Case, key: int) -> dict[str, Any]:
    """A row of the sections whose figures are kept."""
    cost = cost_of_training(case)
    return {
        "model": case.name,
        "of": key,
        "bytes": case.total,
        "us a byte": 1e3 * cost.ms / case.total,
        "of products": 1e6 * seconds_of_products(case) / case.total,
        "bytes/s": case.total / cost.ms * 1e3,
        "peak GB": cost.gigabytes,
    }


def as_text(row: dict[str, Any]) -> dict[str, str]:
    return {
        key: str(value)
        if not isinstance(value, float)
        else f"{value:,.0f}"
        if value >= 1000
        else f"{value:.3g}"
        for key, value in row.items()
    }


def keep(folder: Path | None, name: str, rows: list[dict[str, Any]]) -> None:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"train_{name}.json").write_text(json.dumps(rows, indent=1) + "\n")


def small(arguments: argparse.Namespace) -> None:
    config = HNetConfig.preset("hnet_1stage_S")
    print(f"{HNetLM(config).num_parameters() / 1e6:.1f} million parameters\n")
    header = ["batch", "step, ms", "bytes/s", "peak GB", "host, ms"]
    print_table(header, small_steps(config, arguments))


def small_steps(config: HNetConfig, arguments: argparse.Namespace) -> Iterator[list[str]]:
    for batch, count in ((2, 32),) if arguments.quick else ((16, 1024), (64, 1024), (8, 8192)):
        case = Case(f"{batch} x {count}", config, (count,) * batch, (5,), padded=True)
        for graphed in (False, True):
            trainer = Trainer(case, DTYPE, max_chunks=[count // 4])
            step = GraphedStep(trainer.losses_of, trainer.optimizer, graphed=graphed)
            cost = measure(partial(step, trainer.ids, trainer.labels), warm_up=5)
            name = f"{case.name}, {'one graph' if graphed else 'eager'}"
            yield [name, *show(cost, case), f"{cost.host_ms:.1f}"]
            del trainer, step
            free()


def checkpointing(arguments: argparse.Namespace) -> None:
    """What activation checkpointing costs and saves."""
    case = published(arguments.models.split(",")[0], arguments.quick)
    rows = [
        [str(chosen), *show(cost_of_training(case, activation_checkpointing=chosen), case)]
        for chosen in (False, True)
    ]
    header = [f"{case.name}, activation checkpointing", "forward + backward, ms", "bytes/s"]
    print_table([*header, "peak GB"], rows)


def optimizer(arguments: argparse.Namespace) -> None:
    """Clipping reads gradients twice and writes them; AdamW reads four numbers, writes three."""
    trainer = Trainer(published(arguments.models.split(",")[0], arguments.quick), DTYPE)
    trainer.forward_backward()
    parameters, rows = list(trainer.model.parameters()), []
    moved = sum(p.numel() * p.element_size() for p in parameters)
    clip = partial(torch.nn.utils.clip_grad_norm_, parameters, 1.0)
    for name, call, passes in (("clipping", clip, 3), ("AdamW", trainer.optimizer.step, 7)):
        cost = measure(call)
        floor = 1e3 * passes * moved / COPY
        rows.append([name, f"{cost.ms:.2f}", f"{floor:.2f}", f"{cost.host_ms:.2f}"])
    print_table([f"{trainer.case.name}", "ms", "floor, ms", "host, ms"], rows)


def compiled(arguments: argparse.Namespace) -> None:
    """Layers compiled one by one, at two lengths, of which the second must not compile again."""
    case, rows = published(arguments.models.split(",")[0], arguments.quick), []
    length, batch = case.lengths[0], len(case.lengths)
    for layers in (False, True):
        for count in (length, length * 3 // 4):
            now = of_length(case, count, count * batch)
            trainer = Trainer(now, DTYPE)
            if layers:
                trainer.model.compile_layers()
            start = time.perf_counter()
            trainer.forward_backward()
            first = time.perf_counter() - start
            cost = measure(trainer.forward_backward)
            name = f"{batch} x {count}, {'compiled' if layers else 'eager'}"
            rows.append([name, *show(cost, now), f"{first:.1f}"])
            del trainer
            free()
    header = [case.name, "forward + backward, ms", "bytes/s", "peak GB", "first call, s"]
    print_table(header, rows)


SECTIONS: dict[str, Callable[[argparse.Namespace], None]] = {
    "step": step,
    "profile": profile,
    "isotropic": isotropics,
    "length": length,
    "depth": depth,
    "small": small,
    "checkpointing": checkpointing,
    "optimizer": optimizer,
    "compiled": compiled,
}

if __name__ == "__main__":
    main()
