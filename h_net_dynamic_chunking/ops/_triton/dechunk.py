"""Smoothing and expansion in one pass, and backward in one: read the chunks, write the positions.

Over positions t the smoothed vector of the current chunk obeys

    s_t = gate_t s_{t-1} + weight_t z_{chunk of t}

with weight P and gate 1 - P where a chunk opens, gate 0 at the start of a sequence, and 0 and 1 at
the positions between. Each program walks over a block of positions, a few rows at a time, with a
stretch of channels in registers. What it needs of the blocks before comes from a first kernel: the
state at the end of each block, as if nothing had been before, and how much goes through the block.
Both stop looking back where nothing that far away has weight, so that with P above a half they
read a few chunks; with any other P they read as many as there are, and are as exact. Backward is
the same in reverse, with the gradient of the positions in place of the chunks.

A number that is not finite spreads to its channel of the chunks behind it in its sequence, as far
as their gates let through more than `NEGLIGIBLE`, and to nothing else.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from h_net_dynamic_chunking.ops._triton.common import on_device, power_of_2

# One warp with 16 bytes a thread takes 256 channels, keeps the rows of a channel in one thread, and
# so scans without talking to the others.
_BLOCK_D = 256
# Rows in flight at a time: as many as the registers hold (96 and 192 of 255 for bfloat16).
_ROWS_FORWARD, _ROWS_BACKWARD = 4, 4
# Iterations whose loads are on their way.
_STAGES_FORWARD, _STAGES_BACKWARD = 3, 2
# Chunks that are looked back over at a time.
_CHUNKS = 16


@triton.jit
def _compose(a_first, b_first, a_second, b_second):
    """x -> a x + b, one after the other. A gate of 0 lets nothing through, not even NaN."""
    return a_first * a_second, _after(b_second, a_second, b_first)


@triton.jit
def _after(b_x, b_gate, b_state):
    return tl.where(b_gate == 0, b_x, b_gate * b_state + b_x)


@triton.jit
def _clamped(b_p, low, high):
    return tl.where(b_p < low, low, tl.where(b_p > high, high, b_p))


@triton.jit
def _opening(p, starts, o_t, m_t, low, high, SMOOTH: tl.constexpr):
    """P of each position, and how much of the chunk before passes it, if a chunk opens there."""
    if SMOOTH:
        b_p = _clamped(tl.load(p + o_t, mask=m_t, other=1), low, high)
        m_start = tl.load(starts + o_t, mask=m_t, other=1) != 0
        b_gate = tl.where(m_start, 0.0, 1 - b_p)
    else:
        b_p = tl.full(o_t.shape, 1.0, tl.float32)
        b_gate = tl.zeros(o_t.shape, tl.float32)
    return b_p, b_gate


@triton.jit
def _load_gates(p, chunk, slot, starts, o_t, T, low, high, SMOOTH: tl.constexpr):
    """Chunk (-1: none), whether it opens here, its P, and the gate of each position."""
    m_t = o_t < T
    b_chunk = tl.load(chunk + o_t, mask=m_t, other=-1)
    m_opens = tl.load(slot + o_t, mask=m_t, other=-1) >= 0
    b_p, b_gate = _opening(p, starts, o_t, m_t, low, high, SMOOTH)
    b_gate = tl.where(m_opens, b_gate, tl.where(b_chunk >= 0, 1.0, 0.0))
    return b_chunk, m_opens, b_p, b_gate


@triton.jit
def _carry(
    states, through, i_first, i_stop, o_d, m_d, D, STEP: tl.constexpr, NEGLIGIBLE: tl.constexpr
):
    """The state that block `i_first` passes on, from it and all that lie behind it."""
    b_state = tl.zeros(o_d.shape, tl.float32)
    weight = tl.full([], 1.0, tl.float32)
    i_b = i_first
    while (i_b != i_stop) & ((weight > NEGLIGIBLE) | (weight != weight)):
        b_state += weight * tl.load(states + i_b * D + o_d, mask=m_d, other=0)
        weight *= tl.load(through + i_b)
        i_b += STEP
    return b_state


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
    D: tl.constexpr,
    WEIGH: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NEGLIGIBLE: tl.constexpr,
):
    """The state at the end of each block if none came in, and how much passes the block."""
    i_p = tl.program_id(0).to(tl.int64)
    i_b, i_d = i_p // tl.cdiv(D, BLOCK_D), i_p % tl.cdiv(D, BLOCK_D)
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    i_t = i_b * block
    # Chunks open in this block from behind `before` up to `i_c`.
    before = tl.load(chunk + i_t - 1, mask=i_t > 0, other=-1)
    i_c = tl.load(chunk + tl.minimum(i_t + block, T) - 1)
    o_back = tl.arange(0, CHUNKS)
    b_state = tl.zeros([BLOCK_D], dtype=tl.float32)
    # Nothing passes into the tail.
    weight = tl.where(i_c >= 0, 1.0, 0.0)
    while (i_c > before) & ((weight > NEGLIGIBLE) | (weight != weight)):
        o_c = i_c - o_back
        m_c = o_c > before
        o_open = tl.load(positions + o_c, mask=m_c, other=0)
        b_p, b_gate = _opening(p, starts, o_open, m_c, low, high, True)
        b_gate = tl.where(m_c, b_gate, 1.0)
        m_newer = (o_c + 1 > before) & (o_back > 0)
        o_open = tl.load(positions + o_c + 1, mask=m_newer, other=0)
        _, b_newer_gate = _opening(p, starts, o_open, m_newer, low, high, True)
        b_weight = weight * tl.cumprod(tl.where(m_newer, b_newer_gate, 1.0), axis=0)
        m_counts = m_c & ((b_weight > NEGLIGIBLE) | (b_weight != b_weight))
        b_z = tl.load(
            z + o_c[:, None] * D + o_d[None, :], mask=m_counts[:, None] & m_d[None, :], other=0
        ).to(tl.float32)
        b_share = b_weight * b_p if WEIGH else b_weight
        b_state += tl.sum(tl.where(m_counts, b_share, 0.0)[:, None] * b_z, axis=0)
        weight = tl.sum(tl.where(o_back == CHUNKS - 1, b_weight * b_gate, 0.0))
        i_c -= CHUNKS
    tl.store(states + i_b * D + o_d, b_state, mask=m_d)
    if i_d == 0:
        tl.store(through + i_b, tl.where(weight <= NEGLIGIBLE, 0.0, weight))


@triton.jit(do_not_specialize=["T", "block"])
def dechunk_fwd_kernel(
    z,
    p,
    chunk,
    slot,
    starts,
    residual,
    states,
    through,
    out,
    smoothed,
    T,
    block,
    low,
    high,
    D: tl.constexpr,
    WEIGH: tl.constexpr,
    SMOOTH: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    KEEP: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NEGLIGIBLE: tl.constexpr,
):
    i_p = tl.program_id(0).to(tl.int64)
    i_b, i_d = i_p // tl.cdiv(D, BLOCK_D), i_p % tl.cdiv(D, BLOCK_D)
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    o_r = tl.arange(0, ROWS)
    i_start = i_b * block
    if SMOOTH:
        b_state = _carry(states, through, i_b - 1, -1, o_d, m_d, D, -1, NEGLIGIBLE)
    else:
        # The chunk that an earlier block opened.
        i_c = tl.load(chunk + i_start)
        b_state = tl.load(z + tl.maximum(i_c, 0) * D + o_d, mask=m_d, other=0).to(tl.float32)
    for i_t in tl.range(i_start, tl.minimum(i_start + block, T), ROWS, num_stages=STAGES):
        o_t = i_t + o_r
        m_row = (o_t < T)[:, None] & m_d[None, :]
        b_chunk, m_opens, b_p, b_gate = _load_gates(
            p, chunk, slot, starts, o_t, T, low, high, SMOOTH
        )
        m_z = m_opens[:, None] & m_d[None, :]
        o_z = b_chunk[:, None] * D + o_d[None, :]
        b_z = tl.load(z + o_z, mask=m_z, other=0).to(tl.float32)
        if HAS_RESIDUAL:
            o_row = o_t[:, None] * D + o_d[None, :]
            b_residual = tl.load(residual + o_row, mask=m_row, other=0).to(tl.float32)
        if WEIGH:
            b_z *= tl.where(m_opens, b_p, 0.0)[:, None]
        b_gates = tl.broadcast_to(b_gate[:, None], [ROWS, BLOCK_D])
        b_through, b_s = tl.associative_scan((b_gates, b_z), 0, _compose)
        b_s = _after(b_s, b_through, b_state[None, :])
        b_state = tl.sum(tl.where(o_r[:, None] == ROWS - 1, b_s, 0.0), axis=0)
        if KEEP:
            tl.store(smoothed + o_z, b_s.to(smoothed.dtype.element_ty), mask=m_z)
        b_s = tl.where(b_chunk[:, None] >= 0, b_s, 0.0)
        if HAS_RESIDUAL:
            b_s += b_residual
        tl.store(out + o_t[:, None] * D + o_d[None, :], b_s.to(out.dtype.element_ty), mask=m_row)


@triton.jit(do_not_specialize=["T", "block"])
def begins_kernel(
    grad,
    p,
    chunk,
    slot,
    starts,
    states,
    through,
    T,
    block,
    low,
    high,
    D: tl.constexpr,
    SMOOTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NEGLIGIBLE: tl.constexpr,
):
    """What reaches the first position of each block from the block, and how much passes it."""
    i_p = tl.program_id(0).to(tl.int64)
    i_b, i_d = i_p // tl.cdiv(D, BLOCK_D), i_p % tl.cdiv(D, BLOCK_D)
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    o_r = tl.arange(0, ROWS)
    i_start = i_b * block
    i_stop = tl.minimum(i_start + block, T)
    b_state = tl.zeros([BLOCK_D], dtype=tl.float32)
    weight = tl.full([], 1.0, tl.float32)
    i_t = i_start
    while (i_t < i_stop) & ((weight > NEGLIGIBLE) | (weight != weight)):
        o_t = i_t + o_r
        b_chunk, _, _, b_gate = _load_gates(p, chunk, slot, starts, o_t, T, low, high, SMOOTH)
        b_gate = tl.where(o_t == i_start, 1.0, b_gate)
        b_weight = weight * tl.cumprod(b_gate, axis=0)
        m_counts = (b_chunk >= 0) & ((b_weight > NEGLIGIBLE) | (b_weight != b_weight))
        b_g = tl.load(
            grad + o_t[:, None] * D + o_d[None, :], mask=m_counts[:, None] & m_d[None, :], other=0
        ).to(tl.float32)
        b_state += tl.sum(tl.where(m_counts, b_weight, 0.0)[:, None] * b_g, axis=0)
        weight = tl.sum(tl.where(o_r == ROWS - 1, b_weight, 0.0))
        i_t += ROWS
    tl.store(states + i_b * D + o_d, b_state, mask=m_d)
    if i_d == 0:
        # The gate behind the block is the last that a gradient passes on its way in.
        _, _, _, b_gate = _load_gates(p, chunk, slot, starts, i_stop + o_r, T, low, high, SMOOTH)
        weight *= tl.sum(tl.where(o_r == 0, b_gate, 0.0))
        tl.store(through + i_b, tl.where(weight <= NEGLIGIBLE, 0.0, weight))


@triton.jit(do_not_specialize=["T", "B", "M", "block", "blocks"])
def dechunk_bwd_kernel(
    grad,
    z,
    smoothed,
    p,
    chunk,
    slot,
    starts,
    cu_chunks,
    states,
    through,
    grad_z,
    dots,
    T,
    B,
    M,
    block,
    blocks,
    low,
    high,
    D: tl.constexpr,
    WEIGH: tl.constexpr,
    SMOOTH: tl.constexpr,
    CONFIDENCE: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NEGLIGIBLE: tl.constexpr,
):
    i_p = tl.program_id(0).to(tl.int64)
    # The last block first: its gradients are what the kernel before has left in the cache.
    i_b, i_d = blocks - 1 - i_p // tl.cdiv(D, BLOCK_D), i_p % tl.cdiv(D, BLOCK_D)
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    o_r = tl.arange(0, ROWS)
    # Slots behind the last chunk belong to no program: all share in clearing them.
    for i_c in range(tl.load(cu_chunks + B).to(tl.int64) + i_b, M, blocks):
        tl.store(grad_z + i_c * D + o_d, tl.zeros_like(o_d).to(grad_z.dtype.element_ty), mask=m_d)
    b_state = _carry(states, through, i_b + 1, blocks, o_d, m_d, D, 1, NEGLIGIBLE)
    i_start = i_b * block
    tiles = tl.cdiv(tl.minimum(block, T - i_start), ROWS)
    for i_tile in tl.range(0, tiles, num_stages=STAGES):
        # The last position first, so that the scan runs forward: its reverse moves every register.
        o_t = i_start + (tiles - i_tile) * ROWS - 1 - o_r
        b_chunk, m_opens, b_p, _ = _load_gates(p, chunk, slot, starts, o_t, T, low, high, SMOOTH)
        _, _, _, b_next_gate = _load_gates(p, chunk, slot, starts, o_t + 1, T, low, high, SMOOTH)
        m_row = (b_chunk >= 0)[:, None] & m_d[None, :]
        m_z = m_opens[:, None] & m_d[None, :]
        o_z = b_chunk[:, None] * D + o_d[None, :]
        b_g = tl.load(grad + o_t[:, None] * D + o_d[None, :], mask=m_row, other=0).to(tl.float32)
        b_dot = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
        if CONFIDENCE != "none":
            b_dot += b_g * tl.load(smoothed + o_z, mask=m_row, other=0).to(tl.float32)
        if CONFIDENCE == "of decision":
            # 1 - p is the confidence between boundaries.
            b_dot = tl.where(m_opens[:, None], b_dot, -b_dot)
        if SMOOTH:
            m_start = tl.load(starts + o_t, mask=m_opens, other=1) != 0
            m_before = m_z & (m_start == 0)[:, None]
            b_change = -tl.load(smoothed + o_z - D, mask=m_before, other=0).to(tl.float32)
            if WEIGH:
                b_change += tl.load(z + o_z, mask=m_z, other=0).to(tl.float32)
        b_gates = tl.broadcast_to(b_next_gate[:, None], [ROWS, BLOCK_D])
        b_through, b_u = tl.associative_scan((b_gates, b_g), 0, _compose)
        b_u = _after(b_u, b_through, b_state[None, :])
        b_state = tl.sum(tl.where(o_r[:, None] == ROWS - 1, b_u, 0.0), axis=0)
        b_grad_z = b_u * b_p[:, None] if WEIGH else b_u
        tl.store(grad_z + o_z, b_grad_z.to(grad_z.dtype.element_ty), mask=m_z)
        if SMOOTH:
            b_raw = tl.load(p + o_t, mask=m_opens, other=0)
            m_moves = m_opens & ((b_raw < low) | (b_raw > high) == 0)
            b_dot += tl.where(m_moves[:, None], b_u * b_change, 0.0)
        tl.store(dots + i_d * T + o_t, tl.sum(b_dot, axis=1), mask=o_t < T)


def _block(total: int) -> int:
    """Positions of a block: about 512 blocks, so that no program looks back over more than that."""
    return max(64, power_of_2(triton.cdiv(total, 512)))


def _launch(x: Tensor, total: int) -> tuple[dict[str, Any], int, tuple[int], Tensor, Tensor]:
    """Arguments that all kernels share, blocks, grid, and room for what blocks pass on."""
    dim = x.shape[1]
    block, block_d = _block(total), min(power_of_2(dim), _BLOCK_D)
    blocks = triton.cdiv(total, block)
    states = torch.empty(blocks, dim, dtype=torch.float32, device=x.device)
    shared = {
        "T": total,
        "block": block,
        "D": dim,
        "BLOCK_D": block_d,
        "NEGLIGIBLE": 2.0**-32 if x.dtype == torch.float32 else 2.0**-20,
        "num_warps": max(1, block_d // 256),
    }
    return (
        shared,
        blocks,
        (blocks * triton.cdiv(dim, block_d),),
        states,
        states.new_empty(blocks),
    )


def _limits(clamp: float | None) -> dict[str, float]:
    if clamp is None:
        return {"low": -float("inf"), "high": float("inf")}
    return {"low": clamp, "high": 1 - clamp}


def dechunk_fwd(
    z: Tensor,
    p: Tensor,
    chunk: Tensor,
    slot: Tensor,
    positions: Tensor,
    starts: Tensor,
    residual: Tensor | None,
    dtype: torch.dtype,
    *,
    weigh_input: bool,
    clamp: float | None,
    keep_smoothed: bool,
) -> tuple[Tensor, Tensor]:
    """What the positions receive, (total, dim), and the smoothed chunks or (0, dim)."""
    z, p = z.contiguous(), p.float().contiguous()
    shared, _, grid, states, through = _launch(z, len(chunk))
    limits = _limits(clamp)
    with on_device(z):
        ends_kernel[grid](
            z=z,
            p=p,
            chunk=chunk,
            positions=positions,
            starts=starts,
            states=states,
            through=through,
            WEIGH=weigh_input,
            CHUNKS=_CHUNKS,
            **limits,
            **shared,
        )
    return _forward(
        z,
        p,
        chunk,
        slot,
        starts,
        residual,
        states,
        through,
        dtype,
        keep_smoothed,
        {"WEIGH": weigh_input, "SMOOTH": True, **limits},
    )


def expand_fwd(
    smoothed: Tensor, chunk: Tensor, slot: Tensor, residual: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """What the positions receive, (total, dim), from chunks that are smooth already."""
    smoothed, unused = smoothed.contiguous(), smoothed
    options = {"WEIGH": False, "SMOOTH": False, **_limits(None)}
    out, _ = _forward(
        smoothed, unused, chunk, slot, unused, residual, unused, unused, dtype, False, options
    )
    return out


def _forward(
    z: Tensor,
    p: Tensor,
    chunk: Tensor,
    slot: Tensor,
    starts: Tensor,
    residual: Tensor | None,
    states: Tensor,
    through: Tensor,
    dtype: torch.dtype,
    keep_smoothed: bool,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    shared, _, grid, *_ = _launch(z, len(chunk))
    out = z.new_empty(len(chunk), z.shape[1], dtype=dtype)
    smoothed = torch.empty_like(z) if keep_smoothed else z.new_empty(0, z.shape[1])
    with on_device(z):
        dechunk_fwd_kernel[grid](
            z=z,
            p=p,
            chunk=chunk,
            slot=slot,
            starts=starts,
            residual=z if residual is None else residual.contiguous(),
            states=states,
            through=through,
            out=out,
            smoothed=smoothed if keep_smoothed else out,
            HAS_RESIDUAL=residual is not None,
            KEEP=keep_smoothed,
            ROWS=_ROWS_FORWARD,
            STAGES=_STAGES_FORWARD,
            **options,
            **shared,
        )
    return out, smoothed


def dechunk_bwd(
    grad: Tensor,
    z: Tensor,
    smoothed: Tensor,
    p: Tensor,
    chunk: Tensor,
    slot: Tensor,
    starts: Tensor,
    cu_chunks: Tensor,
    *,
    weigh_input: bool,
    clamp: float | None,
    straight_through: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the chunks and, float32 (total,), of P where they open.

    With `straight_through` that of the confidence in each decision is added, in terms of p.
    """
    options = {
        "WEIGH": weigh_input,
        "SMOOTH": True,
        "CONFIDENCE": "of decision" if straight_through else "none",
        **_limits(clamp),
    }
    z, p = z.contiguous(), p.float().contiguous()
    grad_z = torch.empty_like(z)
    return grad_z, _backward(grad, z, smoothed, p, chunk, slot, starts, cu_chunks, grad_z, options)


def expand_bwd(
    grad: Tensor, smoothed: Tensor, chunk: Tensor, slot: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the smoothed chunks and, float32 (total,), of the confidence."""
    smoothed, unused = smoothed.contiguous(), smoothed
    options = {"WEIGH": False, "SMOOTH": False, "CONFIDENCE": "plain", **_limits(None)}
    # Zeros, because a chunk need not have positions.
    grad_smoothed = torch.zeros_like(smoothed)
    every_chunk = chunk.new_full((1,), len(smoothed))
    return grad_smoothed, _backward(
        grad, smoothed, smoothed, unused, chunk, slot, unused, every_chunk, grad_smoothed, options
    )


def _backward(
    grad: Tensor,
    z: Tensor,
    smoothed: Tensor,
    p: Tensor,
    chunk: Tensor,
    slot: Tensor,
    starts: Tensor,
    cu_chunks: Tensor,
    grad_z: Tensor,
    options: dict[str, Any],
) -> Tensor:
    grad, total = grad.contiguous(), len(chunk)
    shared, blocks, grid, states, through = _launch(z, total)
    dots = states.new_empty(grid[0] // blocks, total)
    tensors = {"p": p, "chunk": chunk, "slot": slot, "starts": starts}
    with on_device(z):
        begins_kernel[grid](
            grad=grad,
            states=states,
            through=through,
            low=options["low"],
            high=options["high"],
            SMOOTH=options["SMOOTH"],
            ROWS=_ROWS_BACKWARD,
            **tensors,
            **shared,
        )
        dechunk_bwd_kernel[grid](
            grad=grad,
            z=z,
            smoothed=smoothed,
            cu_chunks=cu_chunks,
            states=states,
            through=through,
            grad_z=grad_z,
            dots=dots,
            B=len(cu_chunks) - 1,
            M=len(z),
            blocks=blocks,
            ROWS=_ROWS_BACKWARD,
            STAGES=_STAGES_BACKWARD,
            **tensors,
            **options,
            **shared,
        )
    return dots[0] if len(dots) == 1 else dots.sum(0)
