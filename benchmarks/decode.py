"""How fast HNetLM decodes, beside what its memory traffic allows.

    python benchmarks/decode.py                    on one GPU: the L models, random bf16 weights
    python benchmarks/decode.py --device cpu       small presets, beside one forward for each byte

A step must read the weights of every stage that runs, once, and read and write what those stages
remember of each row. These bytes over the bandwidth of a device-to-device copy, measured in the
same run, are the floor. Boundaries are "routed", as random weights happen to cut, or "forced":
every 5th byte opens a chunk in models of one stage, every 3rd position in each stage of two.
"""

import argparse
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from h_net_dynamic_chunking import HNetConfig, HNetLM, __version__
from h_net_dynamic_chunking.cache import tensors_of

PROMPT = 512
EVERY = {1: 5, 2: 3}


@dataclass
class Boundaries:
    """Which positions open chunks in each stage: none given, or (batch, positions) of each."""

    given: list[Tensor]
    """For each stage bool (batch, bytes): whether a chunk opens with that byte, if asked there."""

    @classmethod
    def make(cls, model: HNetLM, batch: int, length: int, forced: bool) -> "Boundaries":
        if not forced:
            return cls([])
        device, every = model.embeddings.weight.device, EVERY[model.config.stages]
        t, row = torch.arange(length, device=device), torch.arange(batch, device=device)
        # Rows open at different times, as independent texts do.
        opens = (t + row[:, None]) % every == 0
        opens[:, 0] = True
        given = [opens]
        for _ in range(1, model.config.stages):
            number = given[-1].cumsum(1) - 1
            given.append(given[-1] & (number % every == 0))
        return cls(given)

    def step(self, t: int) -> list[Tensor]:
        """Masks for one step."""
        return [mask[:, t] for mask in self.given]

    def prompt(self, length: int) -> list[Tensor]:
        """Masks for a prompt, each over the positions of its stage."""
        masks, seen = [], None
        for mask in self.given:
            mask = mask[:, :length]
            masks.append(mask if seen is None else _over_chunks(mask, seen))
            seen = mask
        return masks


def _over_chunks(mask: Tensor, outer: Tensor) -> Tensor:
    """The mask at the positions where the stage around opened chunks: (batch, most chunks)."""
    counts = outer.sum(1)
    out = mask.new_zeros(len(mask), int(counts.max()))
    for row in range(len(mask)):
        out[row, : counts[row]] = mask[row][outer[row]]
    return out


def timed(function: Callable[[], object], device: str, repeats: int) -> float:
    """Median seconds of a call."""
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


def step_bytes(model: HNetLM, cache: object, runs: list[float], batch: int) -> float:
    """Bytes that a step must move: weights of each level as often as it runs, states of its rows.

    runs: for each level, the share of the steps in which it runs for some row, and rows that do.
    """
    total = 0.0
    level_cache = cache
    for level, stacks in enumerate(model.stacks):
        weights = sum(nbytes(list(stack.parameters())) for stack in stacks)
        if level < model.config.stages:
            here = [level_cache.encoder, level_cache.decoder, level_cache.chunker]
            chunker = model.backbone
            for _ in range(level):
                chunker = chunker.network
            weights += nbytes(list(chunker.chunker.parameters()))
            level_cache = level_cache.network
        else:
            here = [level_cache]
        states = nbytes(tensors_of(here)) / batch
        share = runs[level]
        in_some_row = 1 - (1 - share) ** batch
        # States are read and written; of keys and values one slot in hundreds is written.
        total += weights * in_some_row + 2 * states * batch * share
    return total + nbytes([model.lm_head.weight])


def decode(model: HNetLM, batch: int, new: int, forced: bool, bandwidth: float) -> list[str]:
    """One row of the table for a GPU."""
    length = PROMPT + new
    cache = model.allocate_inference_cache(batch, length)
    boundaries = Boundaries.make(model, batch, length, forced)
    prompt = torch.randint(256, (batch, PROMPT), device="cuda")

    synchronize("cuda")
    start = time.perf_counter()
    out = model(prompt, boundary_masks=boundaries.prompt(PROMPT), inference_params=cache)
    ids = out.logits[:, -1].argmax(-1)
    ids.tolist()
    first_byte = time.perf_counter() - start

    warm = min(64, new // 4)
    opened = [0.0] * model.config.stages
    start = 0.0
    for t in range(PROMPT, length):
        if t == PROMPT + warm:
            synchronize("cuda")
            start = time.perf_counter()
        out = model.step(ids, cache, boundary_masks=boundaries.step(t))
        ids = out.logits[:, 0].argmax(-1)
        if t < PROMPT + warm:
            for stage, record in enumerate(out.stages):
                opened[stage] += float(record.boundary_mask.float().mean()) / warm
    synchronize("cuda")
    seconds = (time.perf_counter() - start) / (new - warm)
    floor = step_bytes(model, cache.backbone, [1.0, *opened], batch) / bandwidth
    return [
        str(batch),
        "forced" if forced else "routed",
        " / ".join(f"{share:.2f}" for share in opened),
        f"{batch / seconds:,.0f}",
        f"{seconds * 1e6:.0f}",
        f"{floor * 1e6:.0f}",
        f"{floor / seconds:.0%}",
        f"{first_byte * 1e3:.1f}",
    ]


def prefill(model: HNetLM, length: int) -> tuple[float, float]:
    """Bytes a second of reading a prompt, and of the forward of a training step."""
    ids = torch.randint(256, (1, length), device="cuda")
    masks = Boundaries.make(model, 1, length, True).prompt(length)

    def read() -> None:
        cache = model.allocate_inference_cache(1, length + 1)
        model(ids, boundary_masks=masks, inference_params=cache)

    reading = timed(read, "cuda", 5)
    training = timed(lambda: model(ids, boundary_masks=masks), "cuda", 5)
    return length / reading, length / training


def cache_sizes(model: HNetLM) -> tuple[float, float]:
    """MB of a row that do not grow, and bytes that a byte of context adds."""
    sizes = []
    for context in (4096, 8192):
        cache = model.allocate_inference_cache(1, context)
        masks = Boundaries.make(model, 1, context, True).prompt(context)
        ids = torch.randint(256, (1, context), device="cuda")
        model(ids, boundary_masks=masks, inference_params=cache)
        used = 0.0
        for tensor in tensors_of(cache.backbone):
            used += tensor.nbytes
        sizes.append(used)
    grows = (sizes[1] - sizes[0]) / 4096
    return (sizes[0] - 4096 * grows) / 1e6, grows


def table(header: list[str], rows: list[list[str]]) -> None:
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")


@torch.no_grad()
def on_a_gpu(models: list[str], batches: list[int], new: int) -> None:
    bandwidth = copy_bandwidth()
    print(f"copy: {bandwidth / 1e12:.2f} TB/s")
    for name in models:
        with torch.device("cuda"):
            torch.manual_seed(0)
            model = HNetLM(HNetConfig.preset(name)).bfloat16().eval()
        rows = [
            decode(model, batch, new, forced, bandwidth)
            for forced in (True, False)
            for batch in batches
        ]
        print(f"\n{name}, bf16, {PROMPT} bytes of prompt, {new} new")
        header = ["batch", "boundaries", "share", "bytes/s", "us a step", "floor, us", "of floor"]
        table([*header, "first byte, ms"], rows)
        with torch.enable_grad():
            reading, training = prefill(model, 8192)
        print(
            f"prefill of 8192: {reading:,.0f} bytes/s; forward of training: {training:,.0f}; "
            f"{reading / training:.0%}"
        )
        fixed, grows = cache_sizes(model)
        print(f"caches of a row: {fixed:.1f} MB, and {grows:.0f} bytes a byte of context")


@torch.no_grad()
def on_a_cpu(name: str, contexts: list[int]) -> None:
    torch.manual_seed(0)
    model = HNetLM(HNetConfig.preset(name)).eval()
    rows = []
    for context in contexts:
        ids = torch.randint(256, (1, context))
        cache = model.allocate_inference_cache(1, context + 100)
        model(ids, inference_params=cache)
        byte = ids[:, :1]
        step = timed(lambda byte=byte, cache=cache: model.step(byte, cache), "cpu", 40)
        again = timed(lambda ids=ids: model(ids), "cpu", 3)
        rows.append([str(context), f"{1 / step:,.0f}", f"{step * 1e3:.2f}", f"{again * 1e3:.1f}"])
        rows[-1].append(f"{again / step:.0f}")
    print(f"\n{name}, float32, batch 1, {torch.get_num_threads()} threads")
    table(["context", "bytes/s", "ms a step", "ms a forward", "times faster"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", default=["hnet_1stage_L", "hnet_2stage_L"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--new", type=int, default=512, help="bytes to decode")
    options = parser.parse_args()
    if options.device == "cuda":
        print(torch.cuda.get_device_name(), "torch", torch.__version__, "ours", __version__)
        on_a_gpu(options.models, options.batches, options.new)
    else:
        print(platform.processor() or platform.machine(), "torch", torch.__version__)
        for preset in ("hnet_1stage_S", "hnet_2stage_S"):
            on_a_cpu(preset, [64, 256, 1024, 4096])


if __name__ == "__main__":
    main()
