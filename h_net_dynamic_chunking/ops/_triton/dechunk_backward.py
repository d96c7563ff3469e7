"""Smoothing and expansion backward: each gradient of a position is read once or twice.

    v_t = grad_t + a_{t+1} v_{t+1}        a: 1 within a chunk, its gate where one opens

At the position where a chunk opens v is the gradient of the smoothed chunk; the same walk, from the
last position to the first, writes those of z, of P and of the confidence.
"""

# Unrolled loops fill tuples, whose type then changes.
# mypy: disable-error-code="assignment, var-annotated"

import torch
import triton
import triton.language as tl
from torch import Tensor

from h_net_dynamic_chunking.ops._triton.common import launch
from h_net_dynamic_chunking.ops._triton.partial_sums import few_sums
from h_net_dynamic_chunking.ops._triton.walk import (
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
# Positions that are loaded at a time: by the walk, one step ahead of their use, and to look ahead.
_ROWS, _AHEAD = 2, 8


@triton.jit
def _gates_into(p, chunk, starts, o_t, m_t, low, high, SMOOTH: tl.constexpr):
    """How much of the gradient of positions t, above 0, reaches the positions before them."""
    b_chunk = tl.load(chunk + o_t, mask=m_t, other=-1)
    b_before = tl.load(chunk + o_t - 1, mask=m_t, other=-1)
    _, b_gate = opening(p, starts, o_t, m_t, low, high, SMOOTH)
    return tl.where(b_chunk < 0, 0.0, tl.where(b_chunk == b_before, 1.0, b_gate))


@triton.jit(do_not_specialize=["T", "block"])
def begins_kernel(
    grad,
    p,
    chunk,
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
    i_start = i_b * block
    i_stop = tl.minimum(i_start + block, T)
    b_state = tl.zeros([BLOCK_D], dtype=tl.float32)
    weight = tl.full([], 1.0, tl.float32)
    i_t = i_start
    while (i_t < i_stop) & counts(weight, NEGLIGIBLE):
        o_t = i_t + tl.arange(0, ROWS)
        m_t = o_t < i_stop
        o_g = o_t[:, None] * D + o_d[None, :]
        b_g = tl.load(grad + o_g, mask=m_t[:, None] & m_d[None, :], other=0).to(tl.float32)
        m_inner = m_t & (o_t > i_start)
        b_gate = _gates_into(p, chunk, starts, o_t, m_inner, low, high, SMOOTH)
        b_gate = tl.where(m_inner, b_gate, 1.0)
        m_nan = b_gate != b_gate
        b_weight = weight * tl.cumprod(tl.where(m_nan, 1.0, b_gate), axis=0)
        m_live = tl.load(chunk + o_t, mask=m_t, other=-1) >= 0
        m_counts = m_live & counts(b_weight, NEGLIGIBLE)
        b_state += tl.sum(tl.where(m_counts[:, None], b_weight[:, None] * b_g, 0.0), axis=0)
        weight = tl.sum(tl.where(tl.arange(0, ROWS) == ROWS - 1, b_weight, 0.0))
        # What passes a gate of NaN is NaN, and there is no more to be seen.
        if tl.sum((m_nan & m_counts).to(tl.int32)) > 0:
            b_state += float("nan")
            weight *= 0.0
        i_t += ROWS
    tl.store(states + i_b * D + o_d, b_state, mask=m_d)
    if i_d == 0:
        gate = _gates_into(p, chunk, starts, i_stop, i_stop < T, low, high, SMOOTH)
        # A weight of 0 lets nothing through, not even NaN.
        m_passes = counts(weight, NEGLIGIBLE) & counts(weight * gate, NEGLIGIBLE)
        tl.store(through + i_b, tl.where(m_passes, weight * gate, 0.0))


@triton.jit
def _chunks(chunk, i_t, T, ROWS: tl.constexpr):
    """The chunks of positions i_t - 1 to i_t + ROWS - 1; -1 where there is none."""
    i_chunks = ()
    for k in tl.static_range(-1, ROWS):
        m_t = (i_t + k >= 0) & (i_t + k < T)
        i_chunks += (tl.load(chunk + i_t + k, mask=m_t, other=-1),)
    return i_chunks


@triton.jit
def _passes(gate, b_v):
    """gate v. A gate of 0 lets nothing through, not even NaN."""
    return tl.where(gate == 0, 0.0, gate * b_v)


@triton.jit
def _where(condition, o_d, m_d):
    """m_d if the condition holds, else nowhere. The interpreter makes no mask of a scalar."""
    return m_d & (tl.zeros_like(o_d) + condition.to(tl.int32) != 0)


@triton.jit
def _rows(
    grad,
    z,
    smoothed,
    p,
    starts,
    i_chunks,
    i_t,
    o_d,
    m_d,
    D: tl.constexpr,
    WEIGH: tl.constexpr,
    SMOOTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """What positions i_t to i_t + ROWS - 1 need. Of what belongs to chunks that is little: what is
    new where they change."""
    rows = ()
    for k in tl.static_range(ROWS):
        i_c, i_before = i_chunks[k + 1], i_chunks[k]
        is_new = i_c != i_before
        is_open = is_new & (i_c >= 0)
        b_g = tl.load(grad + (i_t + k) * D + o_d, mask=_where(i_c >= 0, o_d, m_d), other=0)
        m_before = _where(is_new & (i_before >= 0), o_d, m_d)
        b_before = tl.load(smoothed + i_before * D + o_d, mask=m_before, other=0)
        b_z, raw, is_start = b_before, 1.0, False
        if WEIGH:
            b_z = tl.load(z + i_c * D + o_d, mask=_where(is_open, o_d, m_d), other=0)
        if SMOOTH:
            raw = tl.load(p + i_t + k, mask=is_open, other=1)
            is_start = tl.load(starts + i_t + k, mask=is_open, other=1) != 0
        rows += ((b_g, b_before, b_z, raw, is_start),)
    return rows


@triton.jit(do_not_specialize=["T", "B", "M", "block", "blocks"])
def dechunk_bwd_kernel(
    grad,
    z,
    smoothed,
    p,
    chunk,
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
    """From the last position to the first. CONFIDENCE: "none", "plain", or "of decision", which is
    p where a chunk opens and 1 - p elsewhere."""
    i_b, i_d, o_d, m_d = program(D, BLOCK_D)
    # The last block first: its gradients are what the kernel before has left in the cache.
    i_b = blocks - 1 - i_b
    p_dots = dots + i_d * T
    # Slots behind the last chunk belong to no block: all share in clearing them.
    for i_c in range(tl.load(cu_chunks + B).to(tl.int64) + i_b, M, blocks):
        tl.store(grad_z + i_c * D + o_d, tl.zeros_like(o_d).to(grad_z.dtype.element_ty), mask=m_d)
    i_start = i_b * block
    i_stop = tl.minimum(i_start + block, T)
    # v of the position behind the block, and how much of it comes in.
    b_v = carry(states, through, i_b + 1, blocks, o_d, m_d, D, 1, NEGLIGIBLE)
    b_v = _passes(_gates_into(p, chunk, starts, i_stop, i_stop < T, low, high, SMOOTH), b_v)
    i_groups = tl.cdiv(i_stop - i_start, ROWS)
    i_t = i_start + (i_groups - 1) * ROWS
    i_chunks, i_nexts = _chunks(chunk, i_t, T, ROWS), _chunks(chunk, i_t - ROWS, T, ROWS)
    m_last = _where(i_chunks[ROWS] >= 0, o_d, m_d)
    b_s = tl.load(smoothed + i_chunks[ROWS] * D + o_d, mask=m_last, other=0).to(tl.float32)
    rows = _rows(grad, z, smoothed, p, starts, i_chunks, i_t, o_d, m_d, D, WEIGH, SMOOTH, ROWS)
    for _ in range(i_groups):
        # What the positions before these need is on its way while these are looked at; the last
        # time that is of the block before, and for nothing.
        i_next = i_t - ROWS
        next_rows = _rows(
            grad, z, smoothed, p, starts, i_nexts, i_next, o_d, m_d, D, WEIGH, SMOOTH, ROWS
        )
        i_afters = _chunks(chunk, i_next - ROWS, T, ROWS)
        for k in tl.static_range(ROWS - 1, -1, -1):
            b_g, b_before, b_z, raw, is_start = rows[k]
            i_c = i_chunks[k + 1]
            b_v += b_g.to(tl.float32)
            b_dot = tl.zeros([BLOCK_D], tl.float32)
            if CONFIDENCE != "none":
                b_dot = b_g.to(tl.float32) * b_s
            if i_c != i_chunks[k]:
                weight = 1.0
                gate = 0.0
                b_s = b_before.to(tl.float32)
                if SMOOTH:
                    weight = tl.where(raw < low, low, tl.where(raw > high, high, raw))
                    gate = tl.where(is_start, 0.0, 1 - weight)
                    b_change = -tl.where(is_start, 0.0, b_s)
                    if WEIGH:
                        b_change += b_z.to(tl.float32)
                    m_none = (raw < low) | (raw > high) | (i_c < 0)
                    b_dot += tl.where(m_none, 0.0, b_v * b_change)
                b_grad_z = b_v * weight if WEIGH else b_v
                p_grad_z = grad_z + i_c * D + o_d
                b_grad_z = b_grad_z.to(grad_z.dtype.element_ty)
                tl.store(p_grad_z, b_grad_z, mask=_where(i_c >= 0, o_d, m_d))
                b_v = _passes(gate, b_v)
            dot = tl.sum(b_dot, axis=0)
            if CONFIDENCE == "of decision":
                dot = tl.where(i_c != i_chunks[k], dot, -dot)
            tl.store(p_dots + i_t + k, dot, mask=i_t + k < T)
        i_t, i_chunks, i_nexts, rows = i_next, i_nexts, i_afters, next_rows


def dechunk_bwd(
    grad: Tensor,
    z: Tensor,
    smoothed: Tensor,
    p: Tensor,
    chunk: Tensor,
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
        starts,
        cu_chunks,
        grad_z,
        limits(clamp),
        {"WEIGH": weigh_input, "SMOOTH": True, "CONFIDENCE": confidence},
    )


def expand_bwd(grad: Tensor, smoothed: Tensor, chunk: Tensor) -> tuple[Tensor, Tensor]:
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
    starts: Tensor,
    cu_chunks: Tensor,
    grad_z: Tensor,
    clamped: dict[str, float],
    options: dict[str, object],
) -> Tensor:
    """Fills grad_z, and returns the gradient of each position's p."""
    grad, total = grad.contiguous(), chunk.shape[0]
    walk = divide(z, total, _BLOCK_D)
    passed = passed_on(walk, z)
    dots = passed["states"].new_empty(walk.programs // walk.blocks, total)
    tensors = {"p": p, "chunk": chunk, "starts": starts}
    launch(
        begins_kernel,
        walk.programs,
        {"grad": grad, **tensors, **passed, "T": total, "block": walk.block, **clamped},
        {"SMOOTH": options["SMOOTH"], "ROWS": _AHEAD, **walk.constants},
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
    return few_sums(dots)
