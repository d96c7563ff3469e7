"""Smoothing and expansion backward, in a walk over positions from the last to the first.

    v_t = grad_t + a_{t+1} v_{t+1}        a: 1 within a chunk, its gate where one opens

At the position where a chunk opens v is the gradient of the smoothed chunk; the same walk writes
those of z, of P and of the confidence. Each gradient is read once, and a few behind each block of
positions twice.
"""

# Unrolled loops fill tuples, whose type then changes.
# mypy: disable-error-code="assignment, var-annotated"

import torch
import triton
import triton.language as tl
from torch import Tensor

from h_net_dynamic_chunking.ops._triton.common import launch
from h_net_dynamic_chunking.ops._triton.look_ahead import (
    begins_kernel,
    gates_into,
    look_ahead,
    passes,
)
from h_net_dynamic_chunking.ops._triton.partial_sums import few_sums
from h_net_dynamic_chunking.ops._triton.tiles import (
    about_positions,
    as_vector,
    chunks_of_lane,
    of_lane,
    row,
    words,
)
from h_net_dynamic_chunking.ops._triton.walk import (
    carry,
    clamped,
    divide,
    limits,
    passed_on,
    program,
)

# Bytes of a row that a program takes: one warp with 16 bytes a thread.
_ROW = 512
# All at once, for rows of up to four stretches: their shared memory is what an H200 has.
_PROGRAMS = 1024
# Positions of a step of the walk, and how deep its loads are pipelined: one step is on its way.
_ROWS, _STAGES = 8, 3
# Positions that are looked at together for how far they are felt; and by the kernel of its own.
_REACH, _AHEAD = 128, 8
# With longer chunks than this the walk had to begin too far behind its block.
_LONG = 8


@triton.jit
def _if_there(i_c, o_d, m_d):
    """m_d for a chunk, nowhere for none. The interpreter makes no mask of a scalar."""
    return m_d & (tl.zeros_like(o_d) + i_c >= 0)


@triton.jit
def _dot(b_x, b_y):
    """The product of two vectors, as numbers that remain to be summed: one a thread."""
    LANES: tl.constexpr = b_x.shape[0] if b_x.shape[0] < 32 else 32
    return tl.sum(tl.reshape(b_x * b_y, [LANES, b_x.shape[0] // LANES]), axis=1)


@triton.jit
def _open(
    b_v,
    b_s,
    b_z,
    i_c,
    raw,
    is_start,
    grad_z,
    o_d,
    m_d,
    low,
    high,
    WEIGH: tl.constexpr,
    SMOOTH: tl.constexpr,
    D: tl.constexpr,
):
    """Where chunk i_c opens, behind one that has b_s: the gradient of z is written. Returns that of
    P, as `_dot` does, and what of v reaches the position before."""
    b_grad_p = tl.zeros_like(_dot(b_v, b_s))
    weight, gate = 1.0, 0.0
    if SMOOTH:
        weight = clamped(raw, low, high)
        gate = tl.where(is_start, 0.0, 1 - weight)
        b_change = -tl.where(is_start, 0.0, b_s)
        if WEIGH:
            b_change += b_z
        m_none = (raw < low) | (raw > high) | (i_c < 0)
        b_grad_p = tl.where(m_none, 0.0, _dot(b_v, b_change))
    b_grad_z = (b_v * weight if WEIGH else b_v).to(grad_z.dtype.element_ty)
    m_c = _if_there(i_c, o_d, m_d)
    tl.store(grad_z + i_c.to(tl.int64) * D + o_d, b_grad_z, mask=m_c)
    return b_grad_p, passes(gate, b_v)


@triton.jit
def _step(
    b_gs,
    b_ss,
    b_zs,
    i_chunks,
    begins,
    b_ps,
    lane,
    b_v,
    b_s,
    grad_z,
    o_d,
    m_d,
    low,
    high,
    WEIGH: tl.constexpr,
    SMOOTH: tl.constexpr,
    CONFIDENCE: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    Z: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
):
    """Over the positions of a lane; G, S and Z are the types of the rows. Returns v, s, and of each
    position the gradient of its p, as `_dot` does."""
    b_dots = ()
    for k in tl.static_range(ROWS - 1, -1, -1):
        b_g = row(b_gs, k, G)
        b_v += b_g
        b_dot = _dot(b_g, b_s) if CONFIDENCE != "none" else tl.zeros_like(_dot(b_g, b_s))
        i_c = i_chunks[k + 1]
        if i_c != i_chunks[k]:
            b_s = row(b_ss, k, S)
            raw = of_lane(b_ps[k], lane).to(tl.float32, bitcast=True) if SMOOTH else 1.0
            is_start = (begins >> k) & 1 != 0
            b_grad_p, b_v = _open(
                b_v,
                b_s,
                row(b_zs, k, Z),
                i_c,
                raw,
                is_start,
                grad_z,
                o_d,
                m_d,
                low,
                high,
                WEIGH,
                SMOOTH,
                D,
            )
            b_dot += b_grad_p
        elif CONFIDENCE == "of decision":
            b_dot = -b_dot
        b_dots += (b_dot,)
    return b_dots, b_v, b_s


@triton.jit
def _walk(
    p_grad,
    z,
    smoothed,
    about,
    lanes,
    b_v,
    b_s,
    grad_z,
    p_dots,
    size,
    i_d,
    o_d,
    m_d,
    low,
    high,
    WEIGH: tl.constexpr,
    SMOOTH: tl.constexpr,
    CONFIDENCE: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Over the positions that the lanes know `about`, of which the first has p_grad and p_dots.
    b_v is what comes in, b_s the vector of the last one's chunk; both are returned for the next."""
    b_before, b_chunks, b_ps, b_begins = about
    for i in tl.range(0, lanes, num_stages=STAGES):
        lane = lanes - 1 - i
        i_chunks = chunks_of_lane(b_before, b_chunks, lane, ROWS)
        b_c, b_c_before = as_vector(i_chunks, 1, ROWS), as_vector(i_chunks, 0, ROWS)
        # Of what belongs to chunks little is loaded: what is new where they change.
        m_c = b_c >= 0
        m_z, m_s = m_c & (b_c != b_c_before), (b_c_before >= 0) & (b_c != b_c_before)
        o_t = lane * ROWS + tl.arange(0, ROWS)
        b_gs = words(p_grad, o_t, m_c, i_d, D, BLOCK_D)
        b_ss = words(smoothed, b_c_before.to(tl.int64), m_s, i_d, D, BLOCK_D)
        b_zs = b_ss
        if WEIGH:
            b_zs = words(z, b_c.to(tl.int64), m_z, i_d, D, BLOCK_D)
        b_dots, b_v, b_s = _step(
            b_gs,
            b_ss,
            b_zs,
            i_chunks,
            of_lane(b_begins, lane),
            b_ps,
            lane,
            b_v,
            b_s,
            grad_z,
            o_d,
            m_d,
            low,
            high,
            WEIGH,
            SMOOTH,
            CONFIDENCE,
            p_grad.dtype.element_ty,
            smoothed.dtype.element_ty,
            z.dtype.element_ty if WEIGH else smoothed.dtype.element_ty,
            ROWS,
            D,
        )
        for k in tl.static_range(ROWS):
            o_t = lane * ROWS + k
            tl.store(p_dots + o_t, tl.sum(b_dots[ROWS - 1 - k], axis=0), mask=o_t < size)
    return b_v, b_s


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
    LOOKS_AHEAD: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    REACH: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NEGLIGIBLE: tl.constexpr,
):
    """From the last position to the first. CONFIDENCE: "none", "plain", or "of decision", which is
    p where a chunk opens and 1 - p elsewhere."""
    TILE: tl.constexpr = 32 * ROWS
    i_b, i_d, o_d, m_d = program(D, BLOCK_D)
    # The last block first: its gradients are what a kernel before this one has left in the cache.
    i_b = blocks - 1 - i_b
    i_start = i_b * block
    i_stop = tl.minimum(i_start + block, T)
    i_tile = i_start + (i_stop - i_start - 1) // TILE * TILE
    about = about_positions(p, chunk, starts, i_tile, i_stop, SMOOTH, ROWS)
    i_last = tl.load(chunk + i_stop - 1)
    m_last = _if_there(i_last, o_d, m_d)
    b_last = tl.load(smoothed + i_last * D + o_d, mask=m_last, other=0)
    if LOOKS_AHEAD:
        b_v = look_ahead(
            grad,
            p,
            chunk,
            starts,
            i_stop,
            T,
            i_d,
            low,
            high,
            ROWS,
            STAGES,
            REACH,
            D,
            BLOCK_D,
            NEGLIGIBLE,
        )
    else:
        # v of the position behind the block, and how much of it comes in.
        b_v = carry(states, through, i_b + 1, blocks, o_d, m_d, D, 1, NEGLIGIBLE)
        b_v = passes(gates_into(p, chunk, starts, i_stop, i_stop < T, low, high, SMOOTH), b_v)
    b_s = b_last.to(tl.float32)
    while i_tile >= i_start:
        size = tl.minimum(i_stop - i_tile, TILE).to(tl.int32)
        b_v, b_s = _walk(
            grad + i_tile * D,
            z,
            smoothed,
            about,
            tl.cdiv(size, ROWS),
            b_v,
            b_s,
            grad_z,
            dots + i_d * T + i_tile,
            size,
            i_d,
            o_d,
            m_d,
            low,
            high,
            WEIGH,
            SMOOTH,
            CONFIDENCE,
            ROWS,
            STAGES,
            D,
            BLOCK_D,
        )
        i_tile -= TILE
        if i_tile >= i_start:
            about = about_positions(p, chunk, starts, i_tile, i_stop, SMOOTH, ROWS)
    # Slots behind the last chunk belong to no block: all share in clearing them.
    for i_c in range(tl.load(cu_chunks + B).to(tl.int64) + i_b, M, blocks):
        tl.store(grad_z + i_c * D + o_d, tl.zeros_like(o_d).to(grad_z.dtype.element_ty), mask=m_d)


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
    short_memory: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the chunks and, float32 (total,), of P where they open.

    With `straight_through` that of the confidence in each decision is added, in terms of p. With
    `short_memory`, and chunks that are not long, each block walks itself over what is felt in it.
    """
    z = z.contiguous()
    grad_z = torch.empty_like(z)
    options: dict[str, object] = {
        "WEIGH": weigh_input,
        "SMOOTH": True,
        "CONFIDENCE": "of decision" if straight_through else "none",
        "LOOKS_AHEAD": short_memory and len(chunk) <= _LONG * len(z),
    }
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
        options,
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
        {"WEIGH": False, "SMOOTH": False, "CONFIDENCE": "plain", "LOOKS_AHEAD": False},
    )


def _in_words(x: Tensor) -> Tensor:
    """x, or a copy in float32 if its rows are no words of 32 bits, or its numbers longer ones."""
    fits = x.itemsize <= 4 and x.shape[1] * x.itemsize % 4 == 0 == x.data_ptr() % 4
    return x if fits else x.float()


def _backward(
    grad: Tensor,
    z: Tensor,
    smoothed: Tensor,
    p: Tensor,
    chunk: Tensor,
    starts: Tensor,
    cu_chunks: Tensor,
    grad_z: Tensor,
    between: dict[str, float],
    options: dict[str, object],
) -> Tensor:
    """Fills grad_z, and returns the gradient of each position's p."""
    grad, smoothed = _in_words(grad.contiguous()), _in_words(smoothed.contiguous())
    z = _in_words(z.contiguous()) if options["WEIGH"] else smoothed
    total = chunk.shape[0]
    widest = max(grad.itemsize, z.itemsize, smoothed.itemsize)
    walk = divide(z, total, _ROW // widest, _PROGRAMS)
    tensors = {"p": p, "chunk": chunk, "starts": starts}
    dots = grad.new_empty(walk.programs // walk.blocks, total, dtype=torch.float32)
    passed = {"states": p, "through": p}
    if not options["LOOKS_AHEAD"]:
        passed = passed_on(walk, z)
        launch(
            begins_kernel,
            walk.programs,
            {"grad": grad, **tensors, **passed, "T": total, "block": walk.block, **between},
            {"SMOOTH": options["SMOOTH"], "ROWS": _AHEAD, **walk.constants},
            num_warps=1,
        )
    launch(
        dechunk_bwd_kernel,
        walk.programs,
        {
            "grad": grad,
            "z": z,
            "smoothed": smoothed,
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
            **between,
        },
        {**options, "ROWS": _ROWS, "STAGES": _STAGES, "REACH": _REACH, **walk.constants},
        num_warps=1,
    )
    return few_sums(dots)
