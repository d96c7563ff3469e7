"""How fast HNetLM decodes, beside what its memory traffic allows.

    python benchmarks/decode.py                    on one GPU: the L models, random bf16 weights
    python benchmarks/decode.py --device cpu       small presets, beside one forward for each byte

Bytes are drawn at temperature 1 by what `generate` is made of. A step must read the weights of
every stage that runs, once, read and write the states of Mamba-2, and read keys and values of the
positions so far. These bytes over the bandwidth of a device-to-device copy, measured in the same
run, are the floor. Where rows wait for each other, weights count as often as the stages did run, so
that the floor is that of the plan. It and the time are of one byte of every row, and the time is
that of the whole run, until the last row has all of its bytes. Random weights open few chunks or
many, as it happens; so the threshold of each router is set where it opens one in so many positions,
and the share that came out is shown.
"""

import argparse
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from h_net_dynamic_chunking import HNetConfig, HNetLM, __version__
from h_net_dynamic_chunking.cache import tensors_of
from h_net_dynamic_chunking.decoding import Decoding
from h_net_dynamic_chunking.h_net_inference import HNetCache, HNetInference
from h_net_dynamic_chunking.layers import AttentionCache, MambaCache
from h_net_dynamic_chunking.sampling import Sampling
from h_net_dynamic_chunking.stopping import StopStrings

PROMPT = 512
# Positions a chunk, as in the peers' figures: for models of one stage, and of two.
EVERY = {1: 5, 2: 3}
OFFICIAL = 34  # bytes a second of the official code at batch 1, on the same machine type


def timed(function: Callable[[], object], device: str, repeats: int) -> float:
    """Median seconds of a call, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeats // 2]


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy on the device."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / timed(lambda: target.copy_(source), "cuda", 9)


def nbytes(tensors: list[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def stages_of(model: HNetLM) -> Iterator[HNetInference]:
    level = model.backbone
    while isinstance(level, HNetInference):
        yield level
        level = level.network


@torch.no_grad()
def open_every(model: HNetLM, every: int) -> None:
    """Set the thresholds of the routers, outermost first, to the quantile that opens so many."""
    ids = torch.randint(256, (4, 1024), device=model.embeddings.weight.device)
    for depth, stage in enumerate(stages_of(model)):
        probs = model(ids).stages[depth].probs
        probs = probs[(probs > 0) & (probs < 1)]
        stage.chunker.boundary_threshold = float(probs.quantile(1 - 1 / every))


def step_bytes(model: HNetLM, cache: HNetCache, shares: list[float], runs: list[float]) -> float:
    """Bytes to move for one byte of every row: weights of each level, and states of its rows.

    shares: for each level, the share of the bytes of a row at which it runs.
    runs: for each level, how often its weights are read.
    """
    total = runs[0] * nbytes([model.lm_head.weight])
    level_cache = cache
    stages = list(stages_of(model))
    for level, stacks in enumerate(model.stacks):
        weights = sum(nbytes(list(stack.parameters())) for stack in stacks)
        if level < len(stages):
            weights += nbytes(list(stages[level].chunker.parameters()))
            caches = [*level_cache.encoder, *level_cache.decoder]
            level_cache = level_cache.network
        else:
            caches = level_cache
        total += weights * runs[level] + shares[level] * sum(map(state_bytes, caches))
    return total


def state_bytes(cache: MambaCache | AttentionCache) -> float:
    """What one step of all rows reads and writes of them."""
    if isinstance(cache, MambaCache):
        return 2.0 * nbytes(tensors_of(cache))
    slot = 2 * cache.keys.nbytes / cache.slots / len(cache.position)
    return slot * float(cache.position.clamp(max=cache.slots).sum())


@contextmanager
def counted_depths(model: HNetLM) -> Iterator[Counter[int]]:
    """How many steps of each depth are made, if rows wait."""
    count: Counter[int] = Counter()
    waiting_step = model.waiting_step

    def counting(*arguments: Any) -> Callable[[int], None]:
        run = waiting_step(*arguments)

        def step(depth: int) -> None:
            count[depth] += 1
            run(depth)

        return step

    model.waiting_step = counting  # type: ignore[method-assign]
    try:
        yield count
    finally:
        del model.waiting_step


def decode(
    model: HNetLM,
    batch: int,
    new: int,
    bandwidth: float,
    repeats: int,
    plan: str,
    state_dtype: torch.dtype,
) -> list[str]:
    """One row of the table for a GPU: the median over some runs."""
    generator = torch.Generator().manual_seed(0)
    prompts = [
        bytes(torch.randint(256, (PROMPT,), generator=generator).tolist()) for _ in range(batch)
    ]

    def start(count: int) -> Decoding:
        return Decoding(
            model,
            prompts,
            count,
            sampling=Sampling(),
            seeds=range(batch),
            stops=StopStrings([]),
            bos=False,
            eos=False,
            plan=plan,
            state_dtype=state_dtype,
        )

    first_byte = timed(lambda: list(start(1).blocks()), "cuda", 3)
    seconds = []
    torch.cuda.reset_peak_memory_stats()
    with counted_depths(model) as count:
        for _ in range(repeats):
            decoding = start(new)
            blocks = decoding.blocks()
            first = sum(map(len, next(blocks).contents)) / batch
            begin = time.perf_counter()
            for _ in blocks:
                pass
            seconds.append((time.perf_counter() - begin) / (new - first))
    step = sorted(seconds)[repeats // 2]
    peak = torch.cuda.max_memory_allocated() / 1e9

    cache = decoding._cache.backbone
    shares, level = [1.0], cache
    while isinstance(level, HNetCache):
        shares.append(float(level.chunker.chunks.sum()) / batch / (PROMPT + new))
        level = level.network
    runs = [1 - (1 - share) ** batch for share in shares]
    if count:
        steps = [sum(count[d] for d in count if d >= level) for level in range(len(shares))]
        runs = [number / repeats / new for number in steps]
    floor = step_bytes(model, cache, shares, runs) / bandwidth
    return [
        str(batch),
        "waiting" if count else "lock-step",
        " / ".join(f"{share:.2f}" for share in shares[1:]),
        f"{batch / step:,.0f}",
        f"{step * 1e6:.0f}",
        f"{floor * 1e6:.0f}",
        f"{floor / step:.0%}",
        f"{first_byte * 1e3:.1f}",
        f"{peak:.1f}",
    ]


def prefill(model: HNetLM, length: int) -> tuple[float, float]:
    """Bytes a second of reading a prompt, and of the forward of a training step."""
    ids = torch.randint(256, (1, length), device="cuda")

    def read() -> None:
        cache = model.allocate_inference_cache(1, length + 1)
        model(ids, inference_params=cache)

    reading = timed(read, "cuda", 5)
    with torch.enable_grad():
        training = timed(lambda: model(ids), "cuda", 5)
    return length / reading, length / training


def cache_sizes(model: HNetLM, state_dtype: torch.dtype) -> tuple[float, float]:
    """MB of a row that do not grow, and bytes that a byte of context adds."""
    sizes = []
    for context in (8192, 16384):  # past the windows, where the rings are full
        cache = model.allocate_inference_cache(1, context, state_dtype=state_dtype)
        model(torch.randint(256, (1, context), device="cuda"), inference_params=cache)
        level, used = cache.backbone, 0.0
        while isinstance(level, HNetCache):
            used += sum(held(part) for part in (*level.encoder, *level.decoder))
            level = level.network
        sizes.append(used + sum(map(held, level)))
    grows = (sizes[1] - sizes[0]) / 8192
    return (sizes[0] - 8192 * grows) / 1e6, grows


def held(cache: MambaCache | AttentionCache) -> float:
    """Bytes of what a row remembers, without the slots that are free."""
    if isinstance(cache, MambaCache):
        return float(nbytes(tensors_of(cache)))
    return 2 * cache.keys.nbytes / cache.slots * float(cache.position.clamp(max=cache.slots))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def table(header: list[str], rows: list[list[str]]) -> None:
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)


@torch.no_grad()
def on_a_gpu(
    models: list[str],
    batches: list[int],
    new: int,
    repeats: int,
    plans: list[str],
    state_dtypes: list[torch.dtype],
) -> None:
    bandwidth = copy_bandwidth()
    print(f"copy: {bandwidth / 1e12:.2f} TB/s; official code, batch 1: {OFFICIAL} bytes/s")
    for name in models:
        torch.manual_seed(0)
        with torch.device("cuda"):
            model = HNetLM(HNetConfig.preset(name)).bfloat16().eval()
        every = EVERY[model.config.stages]
        open_every(model, every)
        print(f"\n{name}, bf16, {PROMPT} bytes of prompt, {new} new, 1 of {every} opens a chunk")
        header = ["batch", "plan", "share", "bytes/s", "us a byte", "floor, us", "of floor"]
        rows = [
            [dtype_name(dtype), *decode(model, batch, new, bandwidth, repeats, plan, dtype)]
            for batch in batches
            for plan in plans
            for dtype in state_dtypes
        ]
        table(["states", *header, "first byte, ms", "peak, GB"], rows)
        reading, training = prefill(model, 8192)
        print(
            f"prefill of 8192: {reading:,.0f} bytes/s; forward of training: {training:,.0f}; "
            f"{reading / training:.0%}"
        )
        for dtype in state_dtypes:
            fixed, grows = cache_sizes(model, dtype)
            print(
                f"caches of a row, {dtype_name(dtype)} states: {fixed:.1f} MB, and {grows:.0f} "
                "bytes a byte of context"
            )


@torch.no_grad()
def on_a_cpu(name: str, contexts: list[int], state_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = HNetLM(HNetConfig.preset(name)).eval()
    open_every(model, EVERY[model.config.stages])
    rows = []
    for context in contexts:
        ids = torch.randint(256, (1, context + 60))
        cache = model.allocate_inference_cache(1, context + 60, state_dtype=state_dtype)
        model(ids[:, :context], inference_params=cache)
        start = time.perf_counter()
        for t in range(context, context + 60):
            model.step(ids[:, t], cache)
        step = (time.perf_counter() - start) / 60
        again = timed(lambda ids=ids, n=context: model(ids[:, :n]), "cpu", 3)
        rows.append([str(context), f"{1 / step:,.0f}", f"{step * 1e3:.2f}", f"{again * 1e3:.1f}"])
        rows[-1].append(f"{again / step:.0f}")
    print(
        f"\n{name}, float32, {dtype_name(state_dtype)} states, batch 1, "
        f"{torch.get_num_threads()} threads"
    )
    table(["context", "bytes/s", "ms a step", "ms a forward", "times faster"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--models", nargs="+", default=["hnet_1stage_L", "hnet_2stage_L"], help="presets (on a GPU)"
    )
    parser.add_argument(
        "--batches", nargs="+", type=int, default=[1, 8, 64], help="rows at once (on a GPU)"
    )
    parser.add_argument("--new", type=int, default=512, help="bytes to decode (on a GPU)")
    parser.add_argument("--plans", nargs="+", default=["auto"], help="of generate (on a GPU)")
    parser.add_argument("--repeats", type=int, default=3, help="runs; the median counts (on a GPU)")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument(
        "--state-dtypes",
        nargs="+",
        choices=["float32", "bfloat16", "float16"],
        help="of Mamba-2's states: float32, and on a GPU bfloat16 as well, if not given",
    )
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    names = options.state_dtypes or (["float32", "bfloat16"] if on_gpu else ["float32"])
    state_dtypes = [getattr(torch, name) for name in names]
    if on_gpu:
        print(torch.cuda.get_device_name(), "torch", torch.__version__, "ours", __version__)
        runs = options.batches, options.new, options.repeats, options.plans, state_dtypes
        on_a_gpu(options.models, *runs)
        return
    torch.set_num_threads(options.threads)
    print(platform.processor() or platform.machine(), "torch", torch.__version__)
    for preset in ("hnet_1stage_S", "hnet_2stage_S"):
        for state_dtype in state_dtypes:
            on_a_cpu(preset, [64, 256, 1024, 4096], state_dtype)


if __name__ == "__main__":
    main()
