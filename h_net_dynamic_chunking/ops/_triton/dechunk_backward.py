"""Smoothing and expansion backward: each gradient of a position is read once or twice.

The gradient of a chunk is the sum of those of its positions, plus what the chunk behind it passes
on; the same walk, from the last chunk to the first, writes those of P and of the confidence.
"""

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
    program,
)

# One warp with 16 bytes a thread; 64 and 128 channels were slower (H200).
_BLOCK_D = 256
# Positions in flight at a time; with 8 the last kernel takes 99 us in place of 68 (H200).
_ROWS = 4


@triton.jit
def _gate_behind(p, chunk, positions, starts, i_stop, T, low, high, SMOOTH: tl.constexpr):
    """How much of the gradient of position i_stop reaches the position before it."""
    m_t = i_stop < T
    i_c = tl.load(chunk + i_stop, mask=m_t, other=-1)
    i_open = tl.load(positions + i_c, mask=i_c >= 0, other=0)
    _, gate = opening(p, starts, i_open, i_c >= 0, low, high, SMOOTH)
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
    SMOOTH: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NEGLIGIBLE: tl.constexpr,
):
    """What reaches the first position of each block from the block, and how much passes it."""
    i_b, i_d, o_d, m_d = program(D, BLOCK_D)
    i_from, i_stop, i_c, i_last = block_of_positions(chunk, i_b, T, block)
    b_state = tl.zeros([BLOCK_D], dtype=tl.float32)
    weight = tl.where(i_c >= 0, 1.0, 0.0)
    i_next = tl.load(positions + tl.minimum(i_c + 1, i_last), mask=i_c >= 0, other=0)
    while (i_c <= i_last) & counts(weight, NEGLIGIBLE):
        # Where the chunk after the next opens: on its way while this one is summed.
        i_after = tl.load(positions + tl.minimum(i_c + 2, i_last))
        is_inner = i_c < i_last
        _, gate = opening(p, starts, i_next, is_inner, low, high, SMOOTH)
        i_to = tl.where(is_inner, i_next, i_stop)
        b_sum = tl.zeros([BLOCK_D], dtype=tl.float32)
        for i_t in range(i_from, i_to, ROWS):
            o_t = i_t + tl.arange(0, ROWS)
            m_row = (o_t < i_to)[:, None] & m_d[None, :]
            b_g = tl.load(grad + o_t[:, None] * D + o_d[None, :], mask=m_row, other=0)
            b_sum += tl.sum(b_g.to(tl.float32), axis=0)
        b_state += weight * b_sum
        weight *= tl.where(is_inner, gate, 1.0)
        i_from, i_next = i_next, i_after
        i_c += 1
    tl.store(states + i_b * D + o_d, b_state, mask=m_d)
    if i_d == 0:
        gate = _gate_behind(p, chunk, positions, starts, i_stop, T, low, high, SMOOTH)
        # A weight of 0 lets nothing through, not even NaN.
        m_passes = counts(weight, NEGLIGIBLE) & counts(weight * gate, NEGLIGIBLE)
        tl.store(through + i_b, tl.where(m_passes, weight * gate, 0.0))


@triton.jit
def _sum_rows(
    grad,
    p_dots,
    i_from,
    i_to,
    b_now,
    o_d,
    m_d,
    D: tl.constexpr,
    CONFIDENCE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The sum of the gradients of positions that open nothing; their products with the chunk."""
    o_t = i_from + tl.arange(0, ROWS)
    m_t = o_t < i_to
    o_row = o_t[:, None] * D + o_d[None, :]
    b_g = tl.load(grad + o_row, mask=m_t[:, None] & m_d[None, :], other=0).to(tl.float32)
    b_dot = tl.zeros([ROWS], tl.float32)
    if CONFIDENCE != "none":
        b_dot = tl.sum(b_g * b_now[None, :], axis=1)
        if CONFIDENCE == "of decision":
            b_dot = -b_dot
    tl.store(p_dots + o_t, b_dot, mask=m_t)
    return tl.sum(b_g, axis=0)


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
    WEIGH: tl.constexpr,
    SMOOTH: tl.constexpr,
    CONFIDENCE: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NEGLIGIBLE: tl.constexpr,
):
    """From the last chunk to the first. CONFIDENCE: "none", "plain", or "of decision", which is p
    where a chunk opens and 1 - p elsewhere."""
    i_b, i_d, o_d, m_d = program(D, BLOCK_D)
    # The last block first: its gradients are what the kernel before has left in the cache.
    i_b = blocks - 1 - i_b
    p_dots = dots + i_d * T
    # Slots behind the last chunk belong to no block: all share in clearing them.
    for i_c in range(tl.load(cu_chunks + B).to(tl.int64) + i_b, M, blocks):
        tl.store(grad_z + i_c * D + o_d, tl.zeros_like(o_d).to(grad_z.dtype.element_ty), mask=m_d)
    i_start, i_stop, i_first, i_last = block_of_positions(chunk, i_b, T, block)
    for i_t in range(i_stop, tl.minimum(i_start + block, T)):
        tl.store(p_dots + i_t, 0.0)
    if i_first >= 0:
        b_u = carry(states, through, i_b + 1, blocks, o_d, m_d, D, 1, NEGLIGIBLE)
        gate = _gate_behind(p, chunk, positions, starts, i_stop, T, low, high, SMOOTH)
        i_to = i_stop
        b_s = tl.load(smoothed + i_last * D + o_d, mask=m_d, other=0)
        i_open = tl.load(positions + i_last)
        for i_back in range(0, i_last - i_first + 1):
            i_c = i_last - i_back
            # Where the next one opens: on its way while this one is summed.
            i_before = tl.load(positions + tl.maximum(i_c - 1, 0))
            # Here the chunk opens, unless an earlier block has done that, or it has no positions.
            b_open = tl.zeros_like(o_d) + i_open
            m_open = m_d & (b_open >= i_start) & (b_open < i_to)
            b_g_open = tl.load(grad + i_open * D + o_d, mask=m_open, other=0)
            b_s_before = tl.load(smoothed + tl.maximum(i_c - 1, 0) * D + o_d, mask=m_d, other=0)
            b_z = tl.load(z + i_c * D + o_d, mask=m_open, other=0)
            b_now = b_s.to(tl.float32)
            weight, next_gate = opening(p, starts, i_open, i_open >= 0, low, high, SMOOTH)
            # The first rows are on their way together with the rest of what the chunk needs.
            i_rest = tl.maximum(i_open + 1, i_start)
            b_sum = _sum_rows(grad, p_dots, i_rest, i_to, b_now, o_d, m_d, D, CONFIDENCE, ROWS)
            for i_t in range(i_rest + ROWS, i_to, ROWS):
                b_sum += _sum_rows(grad, p_dots, i_t, i_to, b_now, o_d, m_d, D, CONFIDENCE, ROWS)
            b_u = after(b_g_open.to(tl.float32) + b_sum, gate, b_u)
            gate = next_gate
            b_dot = tl.zeros([BLOCK_D], tl.float32)
            if CONFIDENCE != "none":
                b_dot += b_g_open.to(tl.float32) * b_now
            if SMOOTH:
                is_start = tl.load(starts + i_open) != 0
                b_change = -tl.where(is_start, 0.0, b_s_before.to(tl.float32))
                if WEIGH:
                    b_change += b_z.to(tl.float32)
                raw = tl.load(p + i_open)
                b_dot += tl.where((raw < low) | (raw > high), 0.0, b_u * b_change)
            if (i_open >= i_start) & (i_open < i_to):
                tl.store(p_dots + i_open, tl.sum(b_dot, axis=0))
            b_grad_z = b_u * weight if WEIGH else b_u
            tl.store(grad_z + i_c * D + o_d, b_grad_z.to(grad_z.dtype.element_ty), mask=m_open)
            b_s = b_s_before
            i_to = tl.minimum(i_open, i_to)
            i_open = i_before


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
    z = z.contiguous()
    grad_z = torch.empty_like(z)
    confidence = "of decision" if straight_through else "none"
    return grad_z, _backward(
        grad,
        z,
        smoothed,
        p.float().contiguous(),
        chunk,
        positions,
        starts,
        cu_chunks,
        grad_z,
        limits(clamp),
        {"WEIGH": weigh_input, "SMOOTH": True, "CONFIDENCE": confidence},
    )


def expand_bwd(
    grad: Tensor, smoothed: Tensor, chunk: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the smoothed chunks and, float32 (total,), of the confidence."""
    smoothed = smoothed.contiguous()
    unused = smoothed
    # Zeros, because a chunk need not have positions.
    grad_smoothed = torch.zeros_like(smoothed)
    return grad_smoothed, _backward(
        grad,
        smoothed,
        smoothed,
        unused,
        chunk,
        positions,
        unused,
        chunk.new_full((1,), len(smoothed)),
        grad_smoothed,
        limits(None),
        {"WEIGH": False, "SMOOTH": False, "CONFIDENCE": "plain"},
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
    clamped: dict[str, float],
    options: dict[str, object],
) -> Tensor:
    """Fills grad_z, and returns the gradient of each position's p."""
    grad, total = grad.contiguous(), chunk.shape[0]
    walk = divide(z, total, _BLOCK_D)
    dots = walk.states.new_empty(walk.programs // walk.blocks, total)
    tensors = {"p": p, "chunk": chunk, "positions": positions, "starts": starts}
    passed = {"states": walk.states, "through": walk.through}
    launch(
        begins_kernel,
        walk.programs,
        {"grad": grad, **tensors, **passed, "T": total, "block": walk.block, **clamped},
        {"SMOOTH": options["SMOOTH"], "ROWS": _ROWS, **walk.constants},
        num_warps=1,
    )
    launch(
        dechunk_bwd_kernel,
        walk.programs,
        {
            "grad": grad,
            "z": z,
            "smoothed": smoothed.contiguous(),
            **tensors,
            "cu_chunks": cu_chunks,
            **passed,
            "grad_z": grad_z,
            "dots": dots,
            "T": total,
            "B": cu_chunks.shape[0] - 1,
            "M": z.shape[0],
            "block": walk.block,
            "blocks": walk.blocks,
            **clamped,
        },
        {**options, "ROWS": _ROWS, **walk.constants},
        num_warps=1,
    )
    return dots[0] if len(dots) == 1 else dots.sum(0)
