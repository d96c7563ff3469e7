"""The kernels of a decoding step on a GPU, at the shapes of hnet_1stage_L in bfloat16.

    python benchmarks/decode_kernels.py              # 1, 16 and 64 rows
    python benchmarks/decode_kernels.py --overlap off --rows 1

Each kernel is checked against torch, then captured some tens of times in one CUDA graph over
weights, states and caches of which there are so many that L2 serves none of them. us is the
time of one call (of a whole layer: of all its kernels), MB what it must read and write; "of copy"
compares with the bandwidth of a large copy in the same process. state_step and attention_step are
checked as parts of their layers, which end with a norm here. The linear layers are listed for one
row only.
"""

import argparse
import copy
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from h_net_dynamic_chunking.cache import Rows
from h_net_dynamic_chunking.layers import Isotropic
from h_net_dynamic_chunking.layers.attention_cache import AttentionCache
from h_net_dynamic_chunking.layers.block import Block
from h_net_dynamic_chunking.layers.fused_step import fused_step
from h_net_dynamic_chunking.layers.mamba2 import MambaCache
from h_net_dynamic_chunking.ops import boundary_probability_step, ema_smooth_step

with suppress(ModuleNotFoundError):  # without triton, which `main` asks for
    from h_net_dynamic_chunking.ops._triton import step_common
    from h_net_dynamic_chunking.ops._triton.attention_step import attention_step
    from h_net_dynamic_chunking.ops._triton.dechunk_step import dechunk_step
    from h_net_dynamic_chunking.ops._triton.linear_step import linear_step
    from h_net_dynamic_chunking.ops._triton.route_step import route_step
    from h_net_dynamic_chunking.ops._triton.state_step import state_step

ROTATED = 200e6  # bytes that one turn over all copies must exceed: several times L2
CALLS = 32
SLOTS, POSITION = 2048, 1500  # of the attention cache: about 8 KB of text in chunks

#           name               in    out   norm   gate  swiglu  residual
LINEARS = [
    ("in_proj", 1024, 4384, True, False, False, False),
    ("out_proj (gate)", 2048, 1024, True, True, False, True),
    ("Wqkv", 1536, 4608, True, False, False, False),
    ("out_proj", 1536, 1536, False, False, False, True),
    ("fc1 swiglu", 1536, 4096, True, False, True, False),
    ("fc2", 4096, 1536, False, False, False, True),
    ("queries, keys", 1024, 2048, False, False, False, False),
    ("head", 1024, 256, False, False, False, False),
]


class Case(NamedTuple):
    """One line of the table."""

    name: str
    run: Callable[[int], object]
    """Call the kernel on copy i."""
    error: float | None
    """Against torch, relative to the largest number."""
    bytes: int
    """That a call must read and write."""
    copies: int


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64], help="rows at once")
    parser.add_argument(
        "--overlap", choices=["auto", "on", "off"], default="auto", help="let kernels overlap"
    )
    arguments = parser.parse_args()
    if not (torch.cuda.is_available() and find_spec("triton")):
        parser.error("needs a GPU, and triton")
    step_common.overlap_launches = {"auto": None, "on": True, "off": False}[arguments.overlap]
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {bandwidth:.0f} GB/s")
    print(f"{'kernel':>18}{'rows':>6}{'us':>9}{'MB':>9}{'GB/s':>8}{'of copy':>9}{'error':>9}")
    for rows in arguments.rows:
        linears = map(linear_maker, LINEARS) if rows == 1 else []
        for make in [
            *linears,
            state,
            attention,
            route,
            dechunk,
            m_layer,
            t_layer,
        ]:
            report(make(rows), rows, bandwidth)


def report(case: Case, rows: int, bandwidth: float) -> None:
    if case.error is not None and not case.error < 0.02:
        raise SystemExit(f"{case.name}, {rows} rows: error {case.error:.3g} against torch")
    microseconds = 1e6 * seconds(case)
    rate = case.bytes / microseconds / 1e3
    error = "" if case.error is None else f"{case.error:.1e}"
    print(
        f"{case.name:>18}{rows:>6}{microseconds:>9.2f}{case.bytes / 1e6:>9.2f}{rate:>8.0f}"
        f"{rate / bandwidth:>9.0%}{error:>9}",
        flush=True,
    )


def seconds(case: Case) -> float:
    """Of one call: the best of five replays of a graph of them."""
    turns = -(-CALLS // case.copies)
    order = list(range(case.copies)) * turns
    case.run(0)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in order:
            case.run(i)
    graph.replay()
    return min(timed(graph.replay) for _ in range(5)) / len(order)


def timed(function: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def copy_bandwidth() -> float:
    """GB/s of a copy of 1 GB, read and written."""
    source = torch.zeros(2**28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(timed(lambda: target.copy_(source)) for _ in range(10)) / 1e9


def bf16(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * scale


def copies_for(size: float) -> int:
    return max(2, int(ROTATED / size) + 1)


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())


def linear_maker(shape: tuple[str, int, int, bool, bool, bool, bool]) -> Callable[[int], Case]:
    name, inputs, outputs, norm, gate, swiglu, residual = shape

    def make(rows: int) -> Case:
        out_rows = outputs * (1 + swiglu)
        copies = copies_for(2 * inputs * out_rows)
        weights = bf16(copies, out_rows, inputs, scale=inputs**-0.5)
        # The norm of a layer reads the residual stream; that of Mamba-2, and no norm, bfloat16.
        x = bf16(rows, inputs)
        x = x.float() if norm and not gate else x
        options: dict[str, Any] = {"swiglu": swiglu}
        options["norm_weight"] = 1 + bf16(inputs, scale=0.1) if norm else None
        options["gate"] = bf16(rows, 2 * inputs)[:, :inputs] if gate else None
        stream = torch.randn(rows, outputs, device="cuda") if residual else None
        want = plain_linear(x, weights[0], stream=stream, **options)
        got = linear_step(x, weights[0], residual=stream, **options)
        moved = [x, weights[0], options["gate"], *2 * [stream if residual else got[:0]], got]
        size = sum(tensor.nbytes for tensor in moved[:-1] if tensor is not None)
        size += 0 if residual else got.nbytes
        return Case(
            name,
            lambda i: linear_step(x, weights[i], residual=stream, **options),
            relative_error(got, want),
            size,
            copies,
        )

    return make


def plain_linear(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    gate: Tensor | None,
    swiglu: bool,
    stream: Tensor | None,
) -> Tensor:
    x = x.double()
    if gate is not None:
        x = x * F.silu(gate.double())
    if norm_weight is not None:
        x = F.rms_norm(x, x.shape[-1:], norm_weight.double(), 1e-5)
    y = x @ weight.double().T
    if swiglu:
        value, gates = y.chunk(2, 1)
        y = value * F.silu(gates)
    return y if stream is None else stream.double() + y


def stacks(letter: str, dim: int, copies: int) -> list[Block]:
    """Layers of one stack, with the rotary channels and the MLP of hnet_1stage_L."""
    with torch.device("cuda"):
        stack = Isotropic(
            f"{letter}{copies}",
            dim,
            attention={"num_heads": 16, "rotary_dim": 48},
            d_intermediate=4096,
        )
    return [block.bfloat16() for block in stack.layers]


def state_between(block: Block, conv_out: Tensor, dt: Tensor, cache: MambaCache) -> Tensor:
    mixer: Any = block.mixer
    return state_step(
        conv_out,
        dt,
        cache.state,
        dt_bias=mixer.dt_bias,
        A_log=mixer.A_log,
        D=mixer.D,
        out_dtype=dt.dtype,
    )


def attention_between(qkv: Tensor, cache: AttentionCache) -> Tensor:
    return attention_step(
        qkv, cache.keys, cache.values, cache.position, rotary_dim=48, ring=cache.ring
    )


def step_alone(block: Block, h: Tensor, cache: Any) -> Tensor:
    """A layer as a stack of its own, which ends with a norm."""
    return fused_step([block], block.norm1, h, [cache], Rows())


def mamba_caches(block: Block, rows: int, copies: int) -> list[MambaCache]:
    caches = [block.mixer.allocate_inference_cache(rows, 1) for _ in range(copies)]
    for cache in caches:
        cache.conv.normal_()
        cache.state.normal_()
    return caches


def attention_caches(block: Block, rows: int, copies: int) -> list[AttentionCache]:
    caches = [block.mixer.allocate_inference_cache(rows, SLOTS) for _ in range(copies)]
    for cache in caches:
        cache.position.fill_(POSITION)
        cache.positions.bound = POSITION
        cache.reserve(SLOTS)  # for all calls: nothing may grow while a graph is captured
        cache.keys.normal_()
        cache.values.normal_()
    return caches


def moved_by_mamba(cache: MambaCache, rows: int) -> int:
    """States and windows, and what `in_proj` made, in bfloat16."""
    return 2 * cache.state.nbytes + 2 * cache.conv.nbytes + 2 * rows * 4384


def moved_by_attention(rows: int, dim: int) -> int:
    """Keys and values of the positions so far, q, k, v, the new slot and the result."""
    return rows * 2 * dim * (2 * POSITION + 3 + 2 + 1)


def state(rows: int) -> Case:
    (block,) = stacks("m", 1024, 1)
    copies = copies_for(2e6 * rows)
    caches = mamba_caches(block, rows, copies)
    conv_out, dt = torch.randn(rows, 2304, device="cuda"), bf16(rows, 32)

    def run(i: int) -> Tensor:
        return state_between(block, conv_out, dt, caches[i])

    size = 2 * caches[0].state.nbytes + conv_out.nbytes + 2 * rows * 2048
    return Case("state_step", run, None, size, copies)


def attention(rows: int) -> Case:
    (block,) = stacks("t", 1536, 1)
    size = moved_by_attention(rows, 1536)
    copies = copies_for(size)
    caches = attention_caches(block, rows, copies)
    qkv = bf16(rows, 3 * 1536)
    return Case("attention_step", lambda i: attention_between(qkv, caches[i]), None, size, copies)


def route(rows: int) -> Case:
    queries_keys, previous = bf16(rows, 2048), bf16(rows, 1024)
    chunks, seen = torch.ones(2, rows, dtype=torch.int64, device="cuda")
    want = boundary_probability_step(queries_keys[:, :1024], previous)
    p, _ = route_step(queries_keys, previous.clone(), chunks, seen, 0.5)

    def run(i: int) -> object:
        return route_step(queries_keys, previous, chunks, seen, 0.5)

    size = queries_keys.nbytes + 2 * previous.nbytes
    return Case("route_step", run, relative_error(p, want), size, 1)


def dechunk(rows: int) -> Case:
    z, residual = bf16(rows, 1536), torch.randn(rows, 1024, device="cuda")
    smoothed, p = torch.randn(rows, 1024, device="cuda"), torch.rand(rows, device="cuda")
    opens = torch.arange(rows, device="cuda") % 2 == 0
    moved = ema_smooth_step(z[:, :1024], p, smoothed)
    want = torch.where(opens[:, None], moved, smoothed) + residual

    def run(i: int) -> Tensor:
        return dechunk_step(z, smoothed, p, opens, residual, torch.bfloat16)

    size = 3 * residual.nbytes + 2 * 2 * rows * 1024
    return Case("dechunk_step", run, relative_error(run(0), want), size, 1)


def m_layer(rows: int) -> Case:
    blocks = stacks("m", 1024, copies_for(13e6 + 2e6 * rows))
    caches = mamba_caches(blocks[0], rows, len(blocks))
    h = torch.randn(rows, 1024, device="cuda")
    size = moved_by_mamba(caches[0], rows) + weight_bytes(blocks[0]) + 4 * h.nbytes
    return Case(
        "m layer",
        lambda i: step_alone(blocks[i], h, caches[i]),
        layer_error(blocks[0], h, mamba_caches(blocks[0], rows, 1)[0]),
        size,
        len(blocks),
    )


def t_layer(rows: int) -> Case:
    blocks = stacks("T", 1536, copies_for(57e6 + moved_by_attention(rows, 1536)))
    caches = attention_caches(blocks[0], rows, len(blocks))
    h = torch.randn(rows, 1536, device="cuda")
    size = moved_by_attention(rows, 1536) + weight_bytes(blocks[0]) + 6 * h.nbytes
    return Case(
        "T layer",
        lambda i: step_alone(blocks[i], h, caches[i]),
        layer_error(blocks[0], h, attention_caches(blocks[0], rows, 1)[0]),
        size,
        len(blocks),
    )


def weight_bytes(block: Block) -> int:
    return sum(parameter.nbytes for parameter in block.parameters())


def layer_error(block: Block, h: Tensor, cache: Any) -> float:
    """Of a layer beside its own step, from equal caches."""
    want = block.norm1(block.step(h, copy.deepcopy(cache)))
    return relative_error(step_alone(block, h, cache), want)


if __name__ == "__main__":
    main()
