"""Models and batches for the benchmarks of training, and the clock that they are timed by."""

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from h_net_dynamic_chunking import HNetConfig, HNetLM
from h_net_dynamic_chunking.flops import flops_per_byte
from h_net_dynamic_chunking.training.optimizer import adamw

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PRODUCTS = 790e12  # FLOPs a second of dense bfloat16 products on an H200
COPY = 4.1e12  # bytes a second, read and written


@dataclass(frozen=True)
class Case:
    """A model, and sequences whose boundaries are forced to every so many positions."""

    name: str
    config: HNetConfig
    lengths: tuple[int, ...]
    every: tuple[int, ...] = ()
    """Positions in a chunk, for each stage."""
    padded: bool = False
    """Whether the sequences, all of one length then, come as (batch, length), not packed."""

    @property
    def total(self) -> int:
        """Bytes in a batch."""
        return sum(self.lengths)

    @property
    def flops(self) -> float:
        """FLOPs of forward and backward, as the paper counts them: attention is not halved."""
        return 3 * self.total * flops_per_byte(self.config, max(self.lengths), self.every)

    def positions(self) -> list[int]:
        """How many positions each level has, outermost first."""
        return [sum(lengths) for lengths in self.lengths_by_level()]

    def lengths_by_level(self) -> list[list[int]]:
        """The lengths of the sequences of each level."""
        levels = [list(self.lengths)]
        for every in self.every:
            levels.append([-(-length // every) for length in levels[-1]])
        return levels

    def boundary_masks(self) -> list[Tensor]:
        """For each stage bool, over its positions: (total,), or (batch, length) if padded."""
        join = torch.stack if self.padded else torch.cat
        return [
            join([torch.arange(n) % every == 0 for n in lengths]).to(DEVICE)
            for every, lengths in zip(self.every, self.lengths_by_level(), strict=False)
        ]


class Trainer:
    """A model of random weights, one batch of random bytes, and an optimizer."""

    def __init__(self, case: Case, dtype: torch.dtype = torch.bfloat16, **options: Any) -> None:
        torch.manual_seed(0)
        with torch.device(DEVICE):
            self.model = HNetLM(case.config, **options).to(dtype)
        self.case = case
        self.ids = torch.randint(256, (case.total,), device=DEVICE)
        self.kwargs: dict[str, Any] = {"boundary_masks": case.boundary_masks()}
        if case.padded:
            self.ids = self.ids.view(len(case.lengths), -1)
        else:
            self.kwargs["cu_seqlens"] = torch.tensor([0, *case.lengths]).cumsum(0).to(DEVICE)
        self.labels = self.ids.roll(-1)
        self.optimizer = adamw(self.model.parameter_groups(0.1), 1e-4)

    def losses_of(self, ids: Tensor, labels: Tensor) -> list[Tensor]:
        return [self.model(ids, labels, **self.kwargs).loss]

    def forward(self) -> Tensor:
        return self.losses_of(self.ids, self.labels)[0]

    def forward_backward(self) -> None:
        self.model.zero_grad(set_to_none=True)
        self.forward().backward()

    def step(self) -> None:
        self.forward_backward()
        self.optimizer.step()


@dataclass(frozen=True)
class Cost:
    """Of one call: milliseconds, of those the host alone, and bytes of memory at the peak."""

    ms: float
    host_ms: float = 0.0
    peak: float = 0.0

    @property
    def gigabytes(self) -> float:
        return self.peak / 1e9


OUT_OF_MEMORY = Cost(math.inf)


def measure(function: Callable[[], object], seconds: float = 1.0, warm_up: int = 2) -> Cost:
    """Median over as many calls as fit the time, at least 3; `OUT_OF_MEMORY` if it does not fit."""
    try:
        for _ in range(warm_up):
            function()
        return _measure(function, seconds)
    except torch.OutOfMemoryError:
        return OUT_OF_MEMORY
    finally:
        free()


def _measure(function: Callable[[], object], seconds: float) -> Cost:
    if DEVICE != "cuda":
        start = time.perf_counter()
        function()
        return Cost(1e3 * (time.perf_counter() - start))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    function()
    host = time.perf_counter() - start
    torch.cuda.synchronize()
    once = time.perf_counter() - start
    calls = min(max(3, int(seconds / once)), 30)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
    events[0].record()
    for event in events[1:]:
        function()
        event.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in itertools.pairwise(events)]
    return Cost(statistics.median(times), 1e3 * host, torch.cuda.max_memory_allocated())


def free() -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


# ---- models


def published(name: str, quick: bool = False) -> Case:
    """A published model on 8 x 8192 bytes, boundaries as in the figures of the official code."""
    stages = HNetConfig.preset(name).stages
    every = (5,) if stages == 1 else (3, 3)
    if quick:
        arch = ["m1", "T1"] if stages == 1 else ["m1", "T1m1", "T1"]
        config = HNetConfig.create_reasonable_config(D=[64] * stages + [128], arch=arch)
        return Case(name, config, (64,) * 2, every)
    return Case(name, HNetConfig.preset(name), (8192,) * 8, every)


def isotropic(letter: str, like: Case, width: int = 1024, *, window: int = 1023) -> Case:
    """As many layers over the bytes themselves as cost what another case costs, or a bit less.

    Attention looks `window` positions back, -1 for all; its MLP takes up what the layers leave.
    """
    goal = like.flops

    def case(layers: int, intermediate: int) -> Case:
        base = HNetConfig.create_reasonable_config(D=[width], arch=[f"{letter}{layers}"])
        config = replace(
            base,
            d_intermediate=(intermediate,),
            attn_cfg=replace(base.attn_cfg, window_size=(window,)),
        )
        return Case(f"{letter}{layers}, width {width}", config, like.lengths)

    usual = -(-8 * width // 3 // 128) * 128 if letter.isupper() else 0
    one, two = case(1, usual).flops, case(2, usual).flops
    layers = max(1, 1 + round((goal - one) / (two - one)))
    if not usual:
        return case(layers, 0)
    widths = range(128, 2 * usual, 128)
    return min((case(layers, w) for w in widths), key=lambda c: abs(c.flops - goal))


def binary_tree(stages: int, quick: bool = False) -> Case:
    """Stages that halve the positions, two Mamba-2 layers each way, around one main network."""
    outer, inner, arch = (64, 128, "T1") if quick else (512, 1024, "T12")
    config = HNetConfig.create_reasonable_config(
        D=[outer] * stages + [inner], arch=["m1" if quick else "m2"] * stages + [arch]
    )
    config = replace(config, target_ratio=(2.0,) * stages)
    return Case(f"{stages} x 2", config, (64,) * 2 if quick else (8192,) * 8, (2,) * stages)


def of_length(case: Case, length: int, total: int) -> Case:
    """The same model on as many sequences of a length as make up `total` bytes, at least one."""
    return replace(case, lengths=(length,) * max(1, total // length))


def seconds_of_products(case: Case) -> float:
    """What forward and backward would take if all their FLOPs were dense products."""
    return case.flops / PRODUCTS


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(_lines(header, rows))


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """The same, each row as soon as it has come: what runs out of time has shown what it had."""
    for line in _lines(header, rows):
        print(line, flush=True)


def _lines(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    for cells in itertools.chain((header, ["---"] * len(header)), rows):
        yield "| " + " | ".join(cells) + " |"


def picture(figures: Path) -> None:
    """Draw the figures of a file beside it, if matplotlib is there."""
    try:
        from train_pictures import draw
    except ImportError as error:
        print(f"no picture ({error}): pip install matplotlib")
        return
    draw(figures)
