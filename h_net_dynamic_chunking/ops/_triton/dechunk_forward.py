"""Smoothing and expansion forward: read each chunk once, write each position once.

Tiles of positions under `tl.associative_scan` take some 20 instructions an element, and were bound
by them; a walk over chunks takes one multiplication a chunk, and a share of a store.
"""

# Unrolled loops fill tuples, whose type then changes.
# mypy: disable-error-code="assignment, var-annotated"

import torch
import triton
import triton.language as tl
from torch import Tensor

from h_net_dynamic_chunking.ops._triton.common import launch
from h_net_dynamic_chunking.ops._triton.walk import (
    after,
    block_of_positions,
    carry,
    counts,
    divide,
    limits,
    opening,
    passed_on,
    program,
)

# One warp with 16 bytes a thread; 64 and 128 channels were slower (H200).
_BLOCK_D = 256
# Programs that are handed nothing: more than run at once, so that some read while others write.
# Half as many took 6% longer (H200, blocks of 125 for 64 positions, benchmarks/RESULTS.md).
_PROGRAMS = 4096
# Programs that are handed what comes in. Half as many leave the GPU idle (H200).
_HANDED_IN = 2048
# Positions that are written at a time, and chunks that are loaded at a time.
_ROWS, _CHUNKS = 4, 8
# Chunks that are looked back over at a time.
_BACK = 32


@triton.jit
def _known(gate):
    """The gate, and 0 for NaN: products would carry that over a start. Its own chunk is NaN, and
    those behind it, so that nothing before it matters."""
    return tl.where(gate == gate, gate, 0.0)


@triton.jit
def _look_back(
    z,
    p,
    positions,
    starts,
    i_c,
    before,
    o_d,
    m_d,
    low,
    high,
    D: tl.constexpr,
    WEIGH: tl.constexpr,
    CHUNKS: tl.constexpr,
    NEGLIGIBLE: tl.constexpr,
):
    """The state after chunk i_c from those behind `before`, and how much would pass them all."""
    o_back = tl.arange(0, CHUNKS)
    b_state = tl.zeros(o_d.shape, dtype=tl.float32)
    # Nothing passes into the tail.
    weight = tl.where(i_c >= 0, 1.0, 0.0)
    while (i_c > before) & counts(weight, NEGLIGIBLE):
        o_c = i_c - o_back
        m_c = o_c > before
        o_open = tl.load(positions + o_c, mask=m_c, other=0)
        b_p, b_gate = opening(p, starts, o_open, m_c, low, high, True)
        m_newer = (o_c + 1 > before) & (o_back > 0)
        o_open = tl.load(positions + o_c + 1, mask=m_newer, other=0)
        _, b_newer_gate = opening(p, starts, o_open, m_newer, low, high, True)
        b_newer_gate = tl.where(m_newer, _known(b_newer_gate), 1.0)
        b_weight = weight * tl.cumprod(b_newer_gate, axis=0)
        m_counts = m_c & counts(b_weight, NEGLIGIBLE)
        m_z = m_counts[:, None] & m_d[None, :]
        b_z = tl.load(z + o_c[:, None] * D + o_d[None, :], mask=m_z, other=0).to(tl.float32)
        b_share = b_weight * b_p if WEIGH else tl.where(b_gate == b_gate, b_weight, b_gate)
        b_state += tl.sum(tl.where(m_counts, b_share, 0.0)[:, None] * b_z, axis=0)
        b_passed = b_weight * tl.where(m_c, _known(b_gate), 1.0)
        weight = tl.sum(tl.where(o_back == CHUNKS - 1, b_passed, 0.0))
        i_c -= CHUNKS
    return b_state, weight


@triton.jit
def _reach_back(
    p, positions, starts, i_c, low, high, CHUNKS: tl.constexpr, NEGLIGIBLE: tl.constexpr
):
    """The first chunk of which something is left after chunk i_c; i_c + 1 if there is none."""
    i_first = i_c + 1
    weight = tl.full([], 1.0, tl.float32)
    while (i_first > 0) & counts(weight, NEGLIGIBLE):
        o_back = tl.arange(0, CHUNKS)
        o_c = i_first - 1 - o_back
        # What is left of a chunk has passed the gates of those behind it, but not its own.
        m_newer = (o_c >= -1) & (o_c < i_c)
        o_open = tl.load(positions + o_c + 1, mask=m_newer, other=0)
        _, b_gate = opening(p, starts, o_open, m_newer, low, high, True)
        b_weight = weight * tl.cumprod(tl.where(m_newer, _known(b_gate), 1.0), axis=0)
        m_counts = (o_c >= 0) & counts(b_weight, NEGLIGIBLE)
        i_first = tl.min(tl.where(m_counts, o_c, i_first), axis=0)
        # 0, which ends the loop, unless all that was looked at counts.
        weight = tl.sum(tl.where(m_counts & (o_back == CHUNKS - 1), b_weight, 0.0))
    return i_first


@triton.jit(do_not_specialize=["T", "block"])
def ends_kernel(
    z,
    p,
    chunk,
    positions,
    starts,
    states,
    through,
    T,
    block,
    low,
    high,
    WEIGH: tl.constexpr,
    CHUNKS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NEGLIGIBLE: tl.constexpr,
):
    """The state at the end of each block if none came in, and how much passes the block."""
    i_b, i_d, o_d, m_d = program(D, BLOCK_D)
    i_t = i_b * block
    # Chunks open in this block from behind `before` up to `i_c`.
    before = tl.load(chunk + i_t - 1, mask=i_t > 0, other=-1)
    i_c = tl.load(chunk + tl.minimum(i_t + block, T) - 1)
    b_state, weight = _look_back(
        z, p, positions, starts, i_c, before, o_d, m_d, low, high, D, WEIGH, CHUNKS, NEGLIGIBLE
    )
    tl.store(states + i_b * D + o_d, b_state, mask=m_d)
    if i_d == 0:
        tl.store(through + i_b, tl.where(counts(weight, NEGLIGIBLE), weight, 0.0))


@triton.jit
def _store_rows(
    out,
    residual,
    b_bias,
    i_from,
    i_to,
    b_row,
    o_d,
    m_d,
    D,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The row, plus the residual, to positions i_from .. i_to."""
    for i_t in range(i_from, i_to, ROWS):
        o_t = i_t + tl.arange(0, ROWS)
        m_row = (o_t < i_to)[:, None] & m_d[None, :]
        o_row = o_t[:, None] * D + o_d[None, :]
        b_out = tl.broadcast_to(b_row[None, :], [ROWS, b_row.shape[0]])
        if HAS_RESIDUAL:
            # Nothing reads these again soon: chunks, which are read twice, stay in the cache.
            b_residual = tl.load(
                residual + o_row, mask=m_row, other=0, eviction_policy="evict_first"
            )
            b_out += b_residual.to(tl.float32) + b_bias[None, :]
        b_out = b_out.to(out.dtype.element_ty)
        tl.store(out + o_row, b_out, mask=m_row, eviction_policy="evict_first")


@triton.jit
def _opens(positions, i_c, i_last, CHUNKS: tl.constexpr):
    """Where chunks i_c, i_c + 1, ... open; behind the last one, where that does."""
    i_opens = ()
    for k in tl.static_range(CHUNKS):
        i_opens += (tl.load(positions + tl.minimum(i_c + k, i_last)),)
    return i_opens


@triton.jit
def _loads(
    z,
    p,
    starts,
    i_opens,
    i_c,
    i_last,
    o_d,
    m_d,
    low,
    high,
    D: tl.constexpr,
    SMOOTH: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """P, gate and vector of chunks i_c, i_c + 1, ...; behind the last one, of that."""
    loaded = ()
    for k in tl.static_range(CHUNKS):
        i_k, i_open = tl.minimum(i_c + k, i_last), i_opens[k]
        weight, gate = opening(p, starts, i_open, i_open >= 0, low, high, SMOOTH)
        loaded += ((weight, gate, tl.load(z + i_k * D + o_d, mask=m_d, other=0)),)
    return loaded


@triton.jit(do_not_specialize=["T", "block"])
def dechunk_fwd_kernel(
    z,
    p,
    chunk,
    positions,
    starts,
    residual,
    bias,
    states,
    through,
    out,
    smoothed,
    T,
    block,
    low,
    high,
    WEIGH: tl.constexpr,
    SMOOTH: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP: tl.constexpr,
    LOOKS_BACK: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BACK: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NEGLIGIBLE: tl.constexpr,
):
    i_b, _, o_d, m_d = program(D, BLOCK_D)
    i_start, i_stop, i_first, i_last = block_of_positions(chunk, i_b, T, block)
    b_state = tl.zeros([BLOCK_D], dtype=tl.float32)
    b_bias = b_state
    if HAS_BIAS:
        b_bias += tl.load(bias + o_d, mask=m_d, other=0).to(tl.float32)
    if i_first >= 0:
        if LOOKS_BACK:
            # The walk begins as many chunks before the block as are still felt there.
            i_c = tl.load(chunk + i_start - 1, mask=i_start > 0, other=-1)
            i_first = _reach_back(p, positions, starts, i_c, low, high, BACK, NEGLIGIBLE)
        elif SMOOTH:
            b_state = carry(states, through, i_b - 1, -1, o_d, m_d, D, -1, NEGLIGIBLE)
        i_opens = _opens(positions, i_first, i_last, CHUNKS)
        for i_c in range(i_first, i_last + 1, CHUNKS):
            # All that these chunks need is on its way before the first of them is written.
            loaded = _loads(
                z, p, starts, i_opens, i_c, i_last, o_d, m_d, low, high, D, SMOOTH, CHUNKS
            )
            i_nexts = _opens(positions, i_c + CHUNKS, i_last, CHUNKS)
            i_ends = i_opens + i_nexts
            for k in tl.static_range(CHUNKS):
                if i_c + k <= i_last:
                    weight, gate, b_z = loaded[k]
                    # What was carried in holds the chunks that opened before the block.
                    if LOOKS_BACK or not SMOOTH or i_opens[k] >= i_start:
                        b_x = b_z.to(tl.float32)
                        if WEIGH:
                            b_x *= weight
                        b_state = after(b_x, gate, b_state)
                    if KEEP and i_opens[k] >= i_start:
                        b_kept = b_state.to(smoothed.dtype.element_ty)
                        p_kept = smoothed + (i_c + k) * D + o_d
                        tl.store(p_kept, b_kept, mask=m_d, eviction_policy="evict_first")
                    i_from = tl.maximum(i_opens[k], i_start)
                    i_to = tl.where(i_c + k < i_last, i_ends[k + 1], i_stop)
                    _store_rows(
                        out,
                        residual,
                        b_bias,
                        i_from,
                        i_to,
                        b_state,
                        o_d,
                        m_d,
                        D,
                        HAS_RESIDUAL,
                        ROWS,
                    )
            i_opens = i_nexts
    b_none = tl.zeros([BLOCK_D], dtype=tl.float32)
    i_end = tl.minimum(i_start + block, T)
    _store_rows(out, residual, b_bias, i_stop, i_end, b_none, o_d, m_d, D, HAS_RESIDUAL, ROWS)


def dechunk_fwd(
    z: Tensor,
    p: Tensor,
    chunk: Tensor,
    positions: Tensor,
    starts: Tensor,
    residual: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    *,
    weigh_input: bool,
    clamp: float | None,
    keep_smoothed: bool,
    short_memory: bool,
) -> tuple[Tensor, Tensor]:
    """What the positions receive, (total, dim), and the smoothed chunks or (0, dim).

    The bias (dim,) is added to the residual. With `short_memory` each block looks back over the
    chunks themselves, which saves a kernel, and is as exact, but slow where no P is large.
    """
    return _forward(
        z,
        p.float().contiguous(),
        chunk,
        positions,
        starts,
        residual,
        bias,
        dtype,
        weigh_input=weigh_input,
        smooth=True,
        clamp=clamp,
        keep_smoothed=keep_smoothed,
        short_memory=short_memory,
    )


def expand_fwd(
    smoothed: Tensor, chunk: Tensor, positions: Tensor, residual: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """What the positions receive, (total, dim), from chunks that are smooth already."""
    unused = smoothed
    out, _ = _forward(
        smoothed,
        unused,
        chunk,
        positions,
        unused,
        residual,
        None,
        dtype,
        weigh_input=False,
        smooth=False,
        clamp=None,
        keep_smoothed=False,
        short_memory=False,
    )
    return out


def _forward(
    z: Tensor,
    p: Tensor,
    chunk: Tensor,
    positions: Tensor,
    starts: Tensor,
    residual: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    *,
    weigh_input: bool,
    smooth: bool,
    clamp: float | None,
    keep_smoothed: bool,
    short_memory: bool,
) -> tuple[Tensor, Tensor]:
    z = z.contiguous()
    total, dim = chunk.shape[0], z.shape[1]
    is_handed_in = smooth and not short_memory
    walk = divide(z, total, _BLOCK_D, _HANDED_IN if is_handed_in else _PROGRAMS)
    tensors = {"z": z, "p": p, "chunk": chunk, "positions": positions, "starts": starts}
    passed = passed_on(walk, z) if is_handed_in else {"states": p, "through": p}
    numbers = {"T": total, "block": walk.block, **limits(clamp)}
    if is_handed_in:
        launch(
            ends_kernel,
            walk.programs,
            {**tensors, **passed, **numbers},
            {"WEIGH": weigh_input, "CHUNKS": _BACK, **walk.constants},
            num_warps=4,
        )
    out = z.new_empty(total, dim, dtype=dtype)
    smoothed = torch.empty_like(z) if keep_smoothed else z.new_empty(0, dim)
    launch(
        dechunk_fwd_kernel,
        walk.programs,
        {
            **tensors,
            "residual": z if residual is None else residual.contiguous(),
            # Triton 3.6 fails to compile this kernel for a bias in bfloat16.
            "bias": z if bias is None else bias.float().contiguous(),
            **passed,
            "out": out,
            "smoothed": smoothed,
            **numbers,
        },
        {
            "WEIGH": weigh_input,
            "SMOOTH": smooth,
            "HAS_RESIDUAL": residual is not None,
            "HAS_BIAS": bias is not None,
            "KEEP": keep_smoothed,
            "LOOKS_BACK": short_memory,
            "ROWS": _ROWS,
            "CHUNKS": _CHUNKS,
            "BACK": _BACK,
            **walk.constants,
        },
        num_warps=1,
    )
    return out, smoothed
