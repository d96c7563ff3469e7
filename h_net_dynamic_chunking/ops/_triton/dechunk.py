"""Smoothing and expansion in one pass, and backward in one: read the chunks, write the positions.

Each program walks over the chunks of a block of positions with a stretch of channels in registers:

    s_k = P_k z_k + (1 - P_k) s_{k-1}

and writes s_k to the positions of chunk k. What it needs of the blocks before comes from a first
kernel: the state at the end of each block, as if nothing had been before, and how much goes through
the block. Both stop looking back where nothing that far away has weight, so that with P above a
half they read a few chunks; with any other P they read as many as there are, and are as exact.
Backward is the same in reverse, with the gradients of the positions in place of the chunks.

A number that is not finite spreads to its channel of the chunks behind it in its sequence, as far
as their gates let through more than `NEGLIGIBLE`, and to nothing else.

The first version scanned tiles of positions with `tl.associative_scan`; it was bound by its 20
instructions an element, where the walk over chunks needs an addition and a share of a store.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from h_net_dynamic_chunking.ops._triton.common import on_device, power_of_2

# One warp with 16 bytes a thread takes 256 channels; no two threads have a channel in common, so
# that a sum over rows needs no exchange.
_BLOCK_D = 256
# Positions that are in flight at a time.
_ROWS = 4
# Chunks that are looked back over at a time.
_CHUNKS = 16


@triton.jit
def _counts(weight, NEGLIGIBLE: tl.constexpr):
    """Whether something of this weight is still to be seen; NaN is."""
    return (weight > NEGLIGIBLE) | (weight != weight)


@triton.jit
def _after(b_x, gate, b_state):
    """x + gate state. A gate of 0 lets nothing through, not even NaN."""
    return tl.where(gate == 0, b_x, gate * b_state + b_x)


@triton.jit
def _opening(p, starts, o_t, m_t, low, high, SMOOTH: tl.constexpr):
    """P of a chunk that opens at position t, and how much of the chunk before passes it."""
    if SMOOTH:
        b_p = tl.load(p + o_t, mask=m_t, other=1)
        b_p = tl.where(b_p < low, low, tl.where(b_p > high, high, b_p))
        b_gate = tl.where(tl.load(starts + o_t, mask=m_t, other=1) != 0, 0.0, 1 - b_p)
    else:
        b_p = tl.zeros_like(o_t).to(tl.float32) + 1
        b_gate = tl.zeros_like(o_t).to(tl.float32)
    return b_p, b_gate


@triton.jit
def _block_of_positions(chunk, i_b, T, block):
    """Positions i_start .. i_stop, without the tail; their first and last chunk, or -1."""
    i_start = i_b * block
    i_stop = tl.minimum(i_start + block, T)
    i_last = tl.load(chunk + i_stop - 1)
    if i_last < 0:
        live = tl.zeros([], tl.int64)
        for i_t in range(i_start, i_stop, 64):
            o_t = i_t + tl.arange(0, 64)
            b_chunk = tl.load(chunk + o_t, mask=o_t < i_stop, other=-1)
            live += tl.sum((b_chunk >= 0).to(tl.int64))
        i_stop = i_start + live
        i_last = tl.load(chunk + tl.maximum(i_stop - 1, 0), mask=live > 0, other=-1)
    return i_start, i_stop, tl.load(chunk + i_start), i_last


@triton.jit
def _carry(
    states, through, i_first, i_end, o_d, m_d, D, STEP: tl.constexpr, NEGLIGIBLE: tl.constexpr
):
    """The state that block `i_first` passes on, from it and all that lie behind it."""
    b_state = tl.zeros(o_d.shape, tl.float32)
    weight = tl.full([], 1.0, tl.float32)
    i_b = i_first
    while (i_b != i_end) & _counts(weight, NEGLIGIBLE):
        b_state += weight * tl.load(states + i_b * D + o_d, mask=m_d, other=0)
        weight *= tl.load(through + i_b)
        i_b += STEP
    return b_state


@triton.jit
def _program(D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Block of positions, stretch of channels, and its offsets; neighbours share the positions."""
    i_p = tl.program_id(0).to(tl.int64)
    i_d = i_p % tl.cdiv(D, BLOCK_D)
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    return i_p // tl.cdiv(D, BLOCK_D), i_d, o_d, o_d < D


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
    i_b, i_d, o_d, m_d = _program(D, BLOCK_D)
    i_t = i_b * block
    # Chunks open in this block from behind `before` up to `i_c`.
    before = tl.load(chunk + i_t - 1, mask=i_t > 0, other=-1)
    i_c = tl.load(chunk + tl.minimum(i_t + block, T) - 1)
    o_back = tl.arange(0, CHUNKS)
    b_state = tl.zeros([BLOCK_D], dtype=tl.float32)
    # Nothing passes into the tail.
    weight = tl.where(i_c >= 0, 1.0, 0.0)
    while (i_c > before) & _counts(weight, NEGLIGIBLE):
        o_c = i_c - o_back
        m_c = o_c > before
        o_open = tl.load(positions + o_c, mask=m_c, other=0)
        b_p, b_gate = _opening(p, starts, o_open, m_c, low, high, True)
        b_gate = tl.where(m_c, b_gate, 1.0)
        m_newer = (o_c + 1 > before) & (o_back > 0)
        o_open = tl.load(positions + o_c + 1, mask=m_newer, other=0)
        _, b_newer_gate = _opening(p, starts, o_open, m_newer, low, high, True)
        b_weight = weight * tl.cumprod(tl.where(m_newer, b_newer_gate, 1.0), axis=0)
        m_counts = m_c & _counts(b_weight, NEGLIGIBLE)
        m_z = m_counts[:, None] & m_d[None, :]
        b_z = tl.load(z + o_c[:, None] * D + o_d[None, :], mask=m_z, other=0).to(tl.float32)
        b_share = b_weight * b_p if WEIGH else b_weight
        b_state += tl.sum(tl.where(m_counts, b_share, 0.0)[:, None] * b_z, axis=0)
        weight = tl.sum(tl.where(o_back == CHUNKS - 1, b_weight * b_gate, 0.0))
        i_c -= CHUNKS
    tl.store(states + i_b * D + o_d, b_state, mask=m_d)
    if i_d == 0:
        tl.store(through + i_b, tl.where(_counts(weight, NEGLIGIBLE), weight, 0.0))


@triton.jit
def _store_rows(
    out,
    residual,
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
            b_out += tl.load(residual + o_row, mask=m_row, other=0).to(tl.float32)
        tl.store(out + o_row, b_out.to(out.dtype.element_ty), mask=m_row)


@triton.jit(do_not_specialize=["T", "block"])
def dechunk_fwd_kernel(
    z,
    p,
    chunk,
    positions,
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
    BLOCK_D: tl.constexpr,
    NEGLIGIBLE: tl.constexpr,
):
    i_b, _, o_d, m_d = _program(D, BLOCK_D)
    i_start, i_stop, i_first, i_last = _block_of_positions(chunk, i_b, T, block)
    b_state = tl.zeros([BLOCK_D], dtype=tl.float32)
    if i_first >= 0:
        if SMOOTH:
            b_state = _carry(states, through, i_b - 1, -1, o_d, m_d, D, -1, NEGLIGIBLE)
        else:
            b_state = tl.load(z + i_first * D + o_d, mask=m_d, other=0).to(tl.float32)
        i_open = tl.load(positions + i_first)
        b_z = tl.load(z + i_first * D + o_d, mask=m_d, other=0)
        for i_c in range(i_first, i_last + 1):
            # The next chunk is on its way while this one is written.
            i_ahead = tl.minimum(i_c + 1, i_last)
            i_next = tl.load(positions + i_ahead)
            b_next_z = tl.load(z + i_ahead * D + o_d, mask=m_d, other=0)
            if i_open >= i_start:
                weight, gate = _opening(p, starts, i_open, i_open >= 0, low, high, SMOOTH)
                b_x = b_z.to(tl.float32)
                if WEIGH:
                    b_x *= weight
                b_state = _after(b_x, gate, b_state)
                if KEEP:
                    b_kept = b_state.to(smoothed.dtype.element_ty)
                    tl.store(smoothed + i_c * D + o_d, b_kept, mask=m_d)
            i_from = tl.maximum(i_open, i_start)
            i_to = tl.where(i_c < i_last, i_next, i_stop)
            _store_rows(out, residual, i_from, i_to, b_state, o_d, m_d, D, HAS_RESIDUAL, ROWS)
            i_open = i_next
            b_z = b_next_z
    b_none = tl.zeros([BLOCK_D], dtype=tl.float32)
    i_end = tl.minimum(i_start + block, T)
    _store_rows(out, residual, i_stop, i_end, b_none, o_d, m_d, D, HAS_RESIDUAL, ROWS)


@triton.jit
def _gate_behind(p, chunk, positions, starts, i_stop, T, low, high, SMOOTH: tl.constexpr):
    """How much of the gradient of position i_stop reaches the position before it."""
    m_t = i_stop < T
    i_c = tl.load(chunk + i_stop, mask=m_t, other=-1)
    i_open = tl.load(positions + i_c, mask=i_c >= 0, other=0)
    _, gate = _opening(p, starts, i_open, i_c >= 0, low, high, SMOOTH)
    return tl.where(i_c < 0, 0.0, tl.where(i_open == i_stop, gate, 1.0))


@triton.jit(do_not_specialize=["T", "block"])
def begins_kernel(
    grad,
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
    SMOOTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NEGLIGIBLE: tl.constexpr,
):
    """What reaches the first position of each block from the block, and how much passes it."""
    i_b, i_d, o_d, m_d = _program(D, BLOCK_D)
    i_from, i_stop, i_c, i_last = _block_of_positions(chunk, i_b, T, block)
    b_state = tl.zeros([BLOCK_D], dtype=tl.float32)
    weight = tl.where(i_c >= 0, 1.0, 0.0)
    while (i_c <= i_last) & _counts(weight, NEGLIGIBLE):
        is_inner = i_c < i_last
        i_next = tl.load(positions + i_c + 1, mask=is_inner, other=0)
        i_to = tl.where(is_inner, i_next, i_stop)
        b_sum = tl.zeros([BLOCK_D], dtype=tl.float32)
        for i_t in range(i_from, i_to, ROWS):
            o_t = i_t + tl.arange(0, ROWS)
            m_row = (o_t < i_to)[:, None] & m_d[None, :]
            b_g = tl.load(grad + o_t[:, None] * D + o_d[None, :], mask=m_row, other=0)
            b_sum += tl.sum(b_g.to(tl.float32), axis=0)
        b_state += weight * b_sum
        _, gate = _opening(p, starts, i_next, is_inner, low, high, SMOOTH)
        weight *= tl.where(is_inner, gate, 1.0)
        i_from = i_next
        i_c += 1
    tl.store(states + i_b * D + o_d, b_state, mask=m_d)
    if i_d == 0:
        weight *= _gate_behind(p, chunk, positions, starts, i_stop, T, low, high, SMOOTH)
        tl.store(through + i_b, tl.where(_counts(weight, NEGLIGIBLE), weight, 0.0))


@triton.jit(do_not_specialize=["T", "B", "M", "block", "blocks"])
def dechunk_bwd_kernel(
    grad,
    z,
    smoothed,
    p,
    chunk,
    positions,
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
    BLOCK_D: tl.constexpr,
    NEGLIGIBLE: tl.constexpr,
):
    """From the last chunk to the first. CONFIDENCE: "none", "plain", or "of decision", which is p
    where a chunk opens and 1 - p elsewhere."""
    i_b, i_d, o_d, m_d = _program(D, BLOCK_D)
    # The last block first: its gradients are what the kernel before has left in the cache.
    i_b = blocks - 1 - i_b
    p_dots = dots + i_d * T
    # Slots behind the last chunk belong to no block: all share in clearing them.
    for i_c in range(tl.load(cu_chunks + B).to(tl.int64) + i_b, M, blocks):
        tl.store(grad_z + i_c * D + o_d, tl.zeros_like(o_d).to(grad_z.dtype.element_ty), mask=m_d)
    i_start, i_stop, i_first, i_last = _block_of_positions(chunk, i_b, T, block)
    for i_t in range(i_stop, tl.minimum(i_start + block, T)):
        tl.store(p_dots + i_t, 0.0)
    if i_first >= 0:
        b_u = _carry(states, through, i_b + 1, blocks, o_d, m_d, D, 1, NEGLIGIBLE)
        gate = _gate_behind(p, chunk, positions, starts, i_stop, T, low, high, SMOOTH)
        i_to = i_stop
        b_s = tl.load(smoothed + i_last * D + o_d, mask=m_d, other=0)
        for i_back in range(0, i_last - i_first + 1):
            i_c = i_last - i_back
            i_open = tl.load(positions + i_c)
            # Here the chunk opens, unless an earlier block has done that, or it has no positions.
            b_open = tl.zeros_like(o_d) + i_open
            m_open = m_d & (b_open >= i_start) & (b_open < i_to)
            b_g_open = tl.load(grad + i_open * D + o_d, mask=m_open, other=0).to(tl.float32)
            b_s_before = tl.load(smoothed + tl.maximum(i_c - 1, 0) * D + o_d, mask=m_d, other=0)
            b_z = tl.load(z + i_c * D + o_d, mask=m_open, other=0).to(tl.float32)
            b_now = b_s.to(tl.float32)
            b_u = _after(b_g_open, gate, b_u)
            for i_t in range(tl.maximum(i_open + 1, i_start), i_to, ROWS):
                o_t = i_t + tl.arange(0, ROWS)
                m_row = (o_t < i_to)[:, None] & m_d[None, :]
                o_row = o_t[:, None] * D + o_d[None, :]
                b_g = tl.load(grad + o_row, mask=m_row, other=0).to(tl.float32)
                b_u += tl.sum(b_g, axis=0)
                if CONFIDENCE != "none":
                    b_dot = tl.sum(b_g * b_now[None, :], axis=1)
                    if CONFIDENCE == "of decision":
                        b_dot = -b_dot
                    tl.store(p_dots + o_t, b_dot, mask=o_t < i_to)
                else:
                    tl.store(p_dots + o_t, tl.zeros([ROWS], tl.float32), mask=o_t < i_to)
            weight, gate = _opening(p, starts, i_open, i_open >= 0, low, high, SMOOTH)
            b_dot = tl.zeros([BLOCK_D], tl.float32)
            if CONFIDENCE != "none":
                b_dot += b_g_open * b_now
            if SMOOTH:
                is_start = tl.load(starts + i_open) != 0
                b_change = -tl.where(is_start, 0.0, b_s_before.to(tl.float32))
                if WEIGH:
                    b_change += b_z
                raw = tl.load(p + i_open)
                b_dot += tl.where((raw < low) | (raw > high), 0.0, b_u * b_change)
            if (i_open >= i_start) & (i_open < i_to):
                tl.store(p_dots + i_open, tl.sum(b_dot, axis=0))
            b_grad_z = b_u * weight if WEIGH else b_u
            tl.store(grad_z + i_c * D + o_d, b_grad_z.to(grad_z.dtype.element_ty), mask=m_open)
            b_s = b_s_before
            i_to = tl.minimum(i_open, i_to)


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
        positions,
        starts,
        residual,
        states,
        through,
        dtype,
        keep_smoothed,
        {"WEIGH": weigh_input, "SMOOTH": True, **limits},
    )


def expand_fwd(
    smoothed: Tensor, chunk: Tensor, positions: Tensor, residual: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """What the positions receive, (total, dim), from chunks that are smooth already."""
    smoothed, unused = smoothed.contiguous(), smoothed
    options = {"WEIGH": False, "SMOOTH": False, **_limits(None)}
    out, _ = _forward(
        smoothed, unused, chunk, positions, unused, residual, unused, unused, dtype, False, options
    )
    return out


def _forward(
    z: Tensor,
    p: Tensor,
    chunk: Tensor,
    positions: Tensor,
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
            positions=positions,
            starts=starts,
            residual=z if residual is None else residual.contiguous(),
            states=states,
            through=through,
            out=out,
            smoothed=smoothed if keep_smoothed else out,
            HAS_RESIDUAL=residual is not None,
            KEEP=keep_smoothed,
            ROWS=_ROWS,
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
    positions: Tensor,
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
    return grad_z, _backward(
        grad, z, smoothed, p, chunk, positions, starts, cu_chunks, grad_z, options
    )


def expand_bwd(
    grad: Tensor, smoothed: Tensor, chunk: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the smoothed chunks and, float32 (total,), of the confidence."""
    smoothed, unused = smoothed.contiguous(), smoothed
    options = {"WEIGH": False, "SMOOTH": False, "CONFIDENCE": "plain", **_limits(None)}
    # Zeros, because a chunk need not have positions.
    grad_smoothed = torch.zeros_like(smoothed)
    every_chunk = chunk.new_full((1,), len(smoothed))
    return grad_smoothed, _backward(
        grad,
        smoothed,
        smoothed,
        unused,
        chunk,
        positions,
        unused,
        every_chunk,
        grad_smoothed,
        options,
    )


def _backward(
    grad: Tensor,
    z: Tensor,
    smoothed: Tensor,
    p: Tensor,
    chunk: Tensor,
    positions: Tensor,
    starts: Tensor,
    cu_chunks: Tensor,
    grad_z: Tensor,
    options: dict[str, Any],
) -> Tensor:
    grad, total = grad.contiguous(), len(chunk)
    shared, blocks, grid, states, through = _launch(z, total)
    dots = states.new_empty(grid[0] // blocks, total)
    tensors = {"p": p, "chunk": chunk, "positions": positions, "starts": starts}
    with on_device(z):
        begins_kernel[grid](
            grad=grad,
            states=states,
            through=through,
            low=options["low"],
            high=options["high"],
            SMOOTH=options["SMOOTH"],
            ROWS=_ROWS,
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
            ROWS=_ROWS,
            **tensors,
            **options,
            **shared,
        )
    return dots[0] if len(dots) == 1 else dots.sum(0)
