"""Dynamic chunking on one GPU: checks, and times beside the floor that memory sets.

    python benchmarks/dynamic_chunking.py --published /tmp/published
    python benchmarks/dynamic_chunking.py --quick        # small shapes, on a CPU too

`--published` is a folder with the published chunker and what it needs, as `pip install --target`
makes it. `--only module,kernels,sweep,checks` picks sections. Every kernel is timed in a CUDA graph
over several sets of inputs, so that neither the host nor the cache stands in for memory; the bytes
are those that must move, each input read once and each output written once.

Floors at 8 x 8192 x 1024, bfloat16, 20% boundaries, with 4.1 TB/s and 790 TFLOP/s: projections 275
GFLOP, 0.35 ms forward and 0.70 backward; queries and keys 268 MB read, 0.065 ms (backward 537 MB,
0.13); gathering 54 MB, 0.013 (161 MB, 0.04); smoothing and expansion 161 MB, 0.04 (215 MB, 0.05).
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from h_net_dynamic_chunking import DynamicSequenceChunker, use_backend
from h_net_dynamic_chunking.ops import dechunk, segment
from h_net_dynamic_chunking.ops.boundary import boundary_probability_of_pairs

ROOT = Path(__file__).resolve().parent.parent
WORKER = Path(__file__).with_name("dynamic_chunking_worker.py")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPS = torch.ops.h_net
SECTIONS = ("module", "kernels", "sweep", "checks")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--published", type=Path, help="folder to import the published chunker from"
    )
    parser.add_argument("--quick", action="store_true", help="small shapes, one round")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, with commas")
    arguments = parser.parse_args()

    machine = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    print(f"{machine}, torch {torch.__version__}, Python {sys.version.split()[0]}")
    wanted = arguments.only.split(",")
    failed = False
    if "checks" in wanted:
        failed = checks(arguments.quick)
    copy = copy_bandwidth(arguments.quick)
    print(f"device-to-device copy {copy / 1e12:.2f} TB/s; {product_rate(arguments.quick)}")
    if "sweep" in wanted:
        sweep(copy, arguments.quick)
    if "kernels" in wanted:
        kernels(copy, arguments.quick)
    if "module" in wanted:
        module(arguments.published, arguments.quick)
    sys.exit(failed)


# ---- times


def graph_milliseconds(functions: list[Callable[[], object]], rounds: int = 5) -> float:
    """Time of one call, from replays of a graph of all functions; they differ in their inputs."""
    if DEVICE != "cuda":
        for function in functions:
            function()
        return float("nan")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for function in functions:
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [function() for function in functions]
    calls, times = 3, []
    for _ in range(rounds + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / calls / len(functions))
    del kept
    return statistics.median(times[1:])


def copy_bandwidth(quick: bool) -> float:
    """Bytes read and written in a second by a large copy."""
    source = torch.randn(1 << (16 if quick else 29), device=DEVICE)
    target = torch.empty_like(source)
    if DEVICE != "cuda":
        return float("nan")
    # Not in a graph, where a copy is left to the slower copy engine.
    events = [torch.cuda.Event(enable_timing=True) for _ in range(12)]
    for event in events:
        target.copy_(source)
        event.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in itertools.pairwise(events[1:])]
    return 2 * source.nbytes / statistics.median(times) * 1e3


def product_rate(quick: bool) -> str:
    size = 64 if quick else 8192
    a = torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16)
    ms = graph_milliseconds([lambda: a @ a])
    return f"bfloat16 product {2 * size**3 / ms / 1e9:.0f} TFLOP/s"


# ---- each kernel alone


class Case:
    """Inputs of every operation for one shape."""

    def __init__(
        self,
        total: int,
        dim: int,
        share: float = 0.2,
        sequences: int = 8,
        dtype: torch.dtype = torch.bfloat16,
        seed: int = 0,
    ) -> None:
        g = torch.Generator(DEVICE).manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, device=DEVICE, dtype=dtype)

        edges = torch.arange(sequences + 1, device=DEVICE) * total // sequences
        self.cu_seqlens = edges
        self.mask = torch.rand(total, generator=g, device=DEVICE) < share
        self.segmentation = segment(self.mask, edges)
        chunks = len(self.segmentation.boundary_positions)
        self.tokens, self.grad = randn(total, dim), randn(total, dim)
        self.pairs = randn(total, 2 * dim)
        self.z, self.smoothed = randn(chunks, dim), randn(chunks, dim)
        # Just over a half, as an untrained router has it: the longest memory that one can have.
        self.probs = 0.5 + 0.05 * torch.rand(total, generator=g, device=DEVICE)
        self.probs[self.segmentation.starts] = 1
        self.grad_p = torch.randn(total, generator=g, device=DEVICE)
        s = self.segmentation
        self.indices = (
            s.chunk_of_position,
            s.slot_of_position,
            s.boundary_positions,
            s.starts,
            s.cu_chunks,
        )

    def operations(self) -> dict[str, tuple[int, Callable[[], object]]]:
        """Name -> bytes that must move, and the call."""
        s, element = self.segmentation, self.z.element_size()
        positions, chunks = self.tokens.numel() * element, self.z.numel() * element
        dtype, total, none = self.z.dtype, len(self.probs), [None] * 3
        return {
            "boundary": (
                2 * positions + 4 * total,
                lambda: OPS.boundary_probability(self.pairs, self.cu_seqlens),
            ),
            "boundary backward": (
                4 * positions + 4 * total,
                lambda: OPS.boundary_probability_backward(self.grad_p, self.pairs, self.cu_seqlens),
            ),
            "segmentation": (
                (1 + 3 + 3 * 8) * total,
                lambda: OPS.segment(self.mask, self.cu_seqlens, None),
            ),
            "gather": (
                2 * chunks + 8 * len(self.z),
                lambda: OPS.gather_rows(self.tokens, s.boundary_positions, s.slot_of_position),
            ),
            "gather backward": (
                positions + chunks + 8 * total,
                lambda: OPS.gather_rows(self.z, s.slot_of_position, s.boundary_positions),
            ),
            "dechunk": (
                positions + chunks + 21 * total,
                lambda: OPS.dechunk(
                    self.z, self.probs, *self.indices, *none, dtype, True, True, None, False, True
                ),
            ),
            "dechunk, to train": (
                positions + 2 * chunks + 21 * total,
                lambda: OPS.dechunk(
                    self.z, self.probs, *self.indices, *none, dtype, True, True, None, True, True
                ),
            ),
            "dechunk backward": (
                positions + 3 * chunks + 25 * total,
                lambda: OPS.dechunk_backward(
                    self.grad,
                    self.z,
                    self.probs,
                    self.smoothed,
                    *self.indices,
                    True,
                    True,
                    None,
                    True,
                ),
            ),
            "ratio loss": (
                5 * total,
                lambda: OPS.ratio_loss(self.mask, self.probs, self.cu_seqlens, 6.0, 1.0),
            ),
        }


def measured(copy: float, cases: list[Case]) -> Iterator[tuple[str, int, float, float]]:
    """Name, bytes, ms, and share of the copy bandwidth of each operation."""
    sets = [case.operations() for case in cases]
    for name, (moved, _) in sets[0].items():
        ms = graph_milliseconds([operations[name][1] for operations in sets])
        yield name, moved, ms, moved / ms * 1e3 / copy


def kernels(copy: float, quick: bool) -> None:
    shape = (512, 64) if quick else (8 * 8192, 1024)
    cases = [Case(*shape, seed=seed) for seed in range(3)]
    print(f"\n{shape[0]} positions x {shape[1]}, bfloat16, 20% boundaries, 8 sequences")
    print(f"{'operation':22}{'MB':>9}{'ms':>9}{'of copy':>9}")
    for name, moved, ms, share in measured(copy, cases):
        print(f"{name:22}{moved / 1e6:9.1f}{ms:9.4f}{share:9.0%}")


def sweep(copy: float, quick: bool) -> None:
    """The same shares where one dimension changes at a time."""
    base: dict[str, Any] = {"total": 65536, "dim": 1024}
    changes: list[dict[str, Any]] = [
        {},
        *({"dim": d} for d in (256, 512, 2048, 4096)),
        *({"total": t} for t in (1024, 8192, 1 << 20)),
        *({"share": s} for s in (0.02, 0.5, 1.0)),
        *({"sequences": n} for n in (1, 64, 4096)),
        {"dtype": torch.float32},
        {"total": 1 << 20, "dim": 256, "sequences": 1, "share": 1.0},
    ]
    if quick:
        base, changes = {"total": 300, "dim": 20}, [{}, {"share": 1.0}]
    names = [n for n in Case(64, 8).operations() if n not in ("segmentation", "ratio loss")]
    print(f"\nms, and % of the copy bandwidth\n{'changed':34}" + "".join(f"{n:>19}" for n in names))
    for change in changes:
        # Inputs of a gigabyte leave no cache to speak of; small ones are rotated.
        sets = 1 if change.get("total", 0) > 100_000 or change.get("dim", 0) > 2048 else 3
        cases = [Case(**{**base, **change}, seed=seed) for seed in range(sets)]
        row = {name: (ms, share) for name, _, ms, share in measured(copy, cases)}
        label = ", ".join(f"{k} {v}" for k, v in change.items()).replace("torch.", "") or "nothing"
        cells = "".join(f"{row[n][0]:12.4f} {row[n][1]:5.0%} " for n in names)
        print(f"{label:34}{cells}", flush=True)


# ---- the whole module


def module(published: Path | None, quick: bool) -> None:
    case = {"batch": 8, "length": 8192, "dim": 1024, "dtype": "bfloat16", "share": 0.2}
    if quick:
        case.update(batch=2, length=64, dim=32, dtype="float32")
    case["device"] = DEVICE
    limit = case["length"] // 4  # type: ignore[operator]  # an int in this dict
    runs = [
        ("ours, packed", ROOT, {"packed": True}),
        ("ours, padded", ROOT, {}),
        ("ours, packed, max_chunks", ROOT, {"packed": True, "max_chunks": limit}),
    ]
    if published is not None:
        runs += [
            ("published, padded", published, {}),
            ("published, accelerated scan", published, {"accelerated": True}),
        ]
    print(f"\nwhole module, {case}: ms, and of that the GPU's work")
    print(
        f"{'':30}{'inference':>16}{'forward':>16}{'forward+backward':>18}{'peak GB':>9}{'slots':>8}"
    )
    for name, path, options in runs:
        environment = {**os.environ, "PYTHONPATH": str(path)}
        done = subprocess.run(
            [sys.executable, str(WORKER), json.dumps({**case, **options})],
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            print(f"{name:30} failed: {done.stderr.strip().splitlines()[-1]}")
            continue
        result = json.loads(done.stdout.splitlines()[-1])
        cells = "".join(
            f"{result[f'{key}_ms']:9.3f} {result[f'{key}_kernels_ms']:6.3f}"
            for key in ("inference", "forward", "forward_backward")
        )
        print(f"{name:30}{cells}{result.get('peak_gb', 0):9.2f}{result['chunk_slots']:8}")


# ---- checks


def checks(quick: bool) -> bool:
    """Run each and print what it found; whether one failed."""
    failed = False
    for check in (errors, repeats, recompiles, host_reads, one_graph, large_offsets):
        try:
            found = check(quick)
        except Exception:
            failed, found = True, "FAILED\n" + traceback.format_exc(limit=-3)
        print(f"{check.__name__:16} {found}", flush=True)
    return failed


def route_and_return(case: Case, pairs: Tensor, z: Tensor) -> tuple[Tensor, ...]:
    """Probabilities and dechunked values, and the gradients of pairs, chunks and probabilities."""
    pairs, z = pairs.detach().requires_grad_(), z.detach().requires_grad_()
    wide = torch.promote_types(z.dtype, torch.float32)
    given = case.probs.detach().to(wide).requires_grad_()
    p = boundary_probability_of_pairs(pairs, case.cu_seqlens)
    out = dechunk(z, given, case.segmentation)
    gradients = torch.autograd.grad(
        (p, out), (pairs, z, given), (case.grad_p.to(p.dtype), case.grad.to(z.dtype))
    )
    return p.detach(), out.detach(), *gradients


def errors(quick: bool) -> str:
    """Against float64: of the kernels over that of the torch operations in the same dtype."""
    worst = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        case = Case(*((128, 16) if quick else (8192, 1024)), dtype=dtype)
        exact = route_and_return(case, case.pairs.double(), case.z.double())
        got = route_and_return(case, case.pairs, case.z)
        with use_backend("torch"):
            plain = route_and_return(case, case.pairs, case.z)
        ratios = [
            float((g.double() - e).abs().max()) / max(float((p.double() - e).abs().max()), 1e-30)
            for g, p, e in zip(got, plain, exact, strict=True)
        ]
        worst[str(dtype)[6:]] = " ".join(f"{r:.2f}" for r in ratios)
    return f"kernels / torch of p, out, d pairs, d z, d p: {worst}"


def repeats(quick: bool) -> str:
    """Twenty runs, equal to the last bit, into memory that held something else."""
    case = Case(*((128, 16) if quick else (65536, 1024)))
    first = route_and_return(case, case.pairs, case.z)
    for _ in range(2 if quick else 20):
        again = route_and_return(case, case.pairs, case.z)
        assert all(map(torch.equal, first, again))
        filler = torch.full_like(case.pairs, torch.nan)
        del again, filler
    return "bitwise equal"


def compiled_kernels() -> int:
    """Variants of our kernels that Triton has compiled in this process."""
    from triton.runtime.jit import JITFunction

    return sum(
        len(caches[0])
        for name, module in list(sys.modules.items())
        if name.startswith("h_net_dynamic_chunking.ops._triton")
        for kernel in vars(module).values()
        if isinstance(kernel, JITFunction) and kernel.__module__ == name
        for caches in kernel.device_caches.values()
    )


def recompiles(quick: bool) -> str:
    if DEVICE != "cuda":
        return "needs a GPU"
    chunker = DynamicSequenceChunker(64).cuda()

    def run(length: int, batch: int) -> None:
        x = torch.randn(length, 64, device=DEVICE, requires_grad=True)
        edges = torch.arange(batch + 1, device=DEVICE) * length // batch
        chunks, upsample, loss = chunker(x, cu_seqlens=edges)
        (upsample(chunks).sum() + loss).backward()

    run(1000, 4)
    before = compiled_kernels()
    for length, batch in ((1, 1), (16, 1), (17, 2), (999, 3), (4096, 16), (100_003, 7)):
        run(length, batch)
    assert compiled_kernels() == before, f"{compiled_kernels()} variants, {before} before"
    return f"{before} variants of the kernels, as many after six other lengths and batches"


def host_reads(quick: bool) -> str:
    if DEVICE != "cuda":
        return "needs a GPU"
    found = {}
    for limit in (None, 300):
        chunker = DynamicSequenceChunker(64, max_chunks=limit).cuda()
        x = torch.randn(4, 1000, 64, device=DEVICE)

        def forward(chunker: DynamicSequenceChunker = chunker, x: Tensor = x) -> None:
            chunks, upsample, _ = chunker(x)
            upsample(chunks)

        forward()
        found[f"max_chunks={limit}"] = reads_of(forward)
    assert list(found.values()) == [1, 0], found
    return str(found)


def reads_of(function: Callable[[], object]) -> int:
    """Synchronising operations in a call, and waits for an event, which stop the host as well."""
    waits = 0
    synchronize = torch.cuda.Event.synchronize

    def counted(event: torch.cuda.Event) -> None:
        nonlocal waits
        waits += 1
        synchronize(event)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.Event.synchronize = counted  # type: ignore[method-assign]
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.Event.synchronize = synchronize  # type: ignore[method-assign]
    return waits + sum("called a synchronizing CUDA operation" in str(w.message) for w in caught)


def one_graph(quick: bool) -> str:
    """The capped module, forward and backward, compiled as one graph and in a CUDA graph."""
    shape = (2, 50, 16) if quick else (8, 8192, 1024)
    dtype = torch.float32 if quick else torch.bfloat16
    chunker = DynamicSequenceChunker(shape[2], max_chunks=shape[1] // 2).to(DEVICE, dtype)
    x = torch.randn(shape, device=DEVICE, dtype=dtype, requires_grad=True)
    grad = torch.randn_like(x)

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        chunks, upsample, loss = chunker(x)
        return upsample(chunks), loss

    def step(forward: Callable[[Tensor], tuple[Tensor, Tensor]] = forward) -> tuple[Tensor, ...]:
        out, loss = forward(x)
        leaves = [x, *chunker.parameters()]
        gradients = torch.autograd.grad((out, loss), leaves, (grad, torch.ones_like(loss)))
        return out.detach(), *gradients

    want = step()
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, step(compiled), want))
    if DEVICE != "cuda":
        return "fullgraph equal"
    ms = graph_milliseconds([step])
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream):
        captured = step()
    for tensor in captured:
        tensor.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, captured, want))
    return f"fullgraph and CUDA graph equal eager; replay, forward + backward {ms:.3f} ms"


def large_offsets(quick: bool) -> str:
    """A last sequence behind 2^31 elements gives what it gives alone."""
    dim, tail = (16, 40) if quick else (1024, 5000)
    total = 200 if quick else (1 << 31) // dim + 2 * tail
    case = Case(total, dim, sequences=1)
    # The last positions become a sequence of their own.
    case.cu_seqlens = torch.tensor([0, total - tail, total], device=DEVICE)
    case.segmentation = segment(case.mask, case.cu_seqlens)
    chunks = len(case.segmentation.boundary_positions)
    case.z = torch.randn(chunks, dim, device=DEVICE, dtype=torch.bfloat16)
    alone = Case(tail, dim, sequences=1)
    alone.mask, alone.grad, alone.grad_p = case.mask[-tail:], case.grad[-tail:], case.grad_p[-tail:]
    alone.probs = case.probs[-tail:]
    alone.segmentation = segment(alone.mask, alone.cu_seqlens)
    last = len(alone.segmentation.boundary_positions)
    got = route_and_return(case, case.pairs, case.z)
    want = route_and_return(alone, case.pairs[-tail:], case.z[-last:])
    selected = OPS.gather_rows(
        case.pairs, case.segmentation.boundary_positions, case.segmentation.slot_of_position
    )
    assert torch.equal(selected[-last:], case.pairs[-tail:][alone.segmentation.boundary_mask])
    for g, w in zip(got, want, strict=True):
        g = g[-len(w) :]
        error = float((g.double() - w.double()).abs().max() / w.double().abs().max())
        assert error < 1e-2, error
    return f"{2 * total * dim / 2**31:.2f} x 2^31 elements of queries and keys: equal"


if __name__ == "__main__":
    main()
