"""Causal convolution of a few taps, bias and SiLU over packed rows: a walk down the time.

A program keeps the last rows of its channels in registers, so that each input is read once and each
pre-activation computed once. As tiles of shifted loads the backward pass would take four sigmoids a
number. Masks of positions are blocks of one, because Triton's interpreter cannot combine blocks and
scalars.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from h_net_dynamic_chunking.ops._triton.common import cdiv, launch, sigmoid, silu

# Rows that can be kept: a convolution of more taps goes to torch.
MAX_TAPS = 4
# Channels of a program, positions that it walks, positions that are read ahead, warps.
_FORWARD = (256, 64, 4, 1)
_BACKWARD = (128, 64, 4, 1)


@triton.jit
def _tap(weight, o_c, m_c, K: tl.constexpr, BACK: tl.constexpr):
    """The tap of what stands BACK positions before; zero if there is no such tap."""
    if BACK < K:
        b_tap = tl.load(weight + o_c * K + (K - 1 - BACK), mask=m_c, other=0).to(tl.float32)
    else:
        b_tap = tl.zeros(o_c.shape, dtype=tl.float32)
    return b_tap


@triton.jit
def _taps(weight, o_c, m_c, K: tl.constexpr):
    return (
        _tap(weight, o_c, m_c, K, 0),
        _tap(weight, o_c, m_c, K, 1),
        _tap(weight, o_c, m_c, K, 2),
        _tap(weight, o_c, m_c, K, 3),
    )


@triton.jit
def _sequence(sequence, i_t, T):
    """Sequence of position t, and -1 outside of the buffer."""
    return tl.load(sequence + i_t, mask=(i_t >= 0) & (i_t < T), other=-1)


@triton.jit
def _rows_ahead(p_row, m_c, left, STRIDE: tl.constexpr, AHEAD: tl.constexpr):
    """A tuple of AHEAD rows, of which `left` are there; on their way together."""
    rows = ()
    for u in tl.static_range(AHEAD):
        m_row = m_c & (tl.arange(0, 1) + u < left)
        b_row = tl.load(p_row + u * STRIDE, mask=m_row, other=0)
        rows = rows + (b_row,)  # type: ignore[assignment]  # noqa: RUF005  (no other way in Triton)
    return rows


@triton.jit
def _sequences_ahead(sequence, i_t, T, AHEAD: tl.constexpr):
    sequences = ()
    for u in tl.static_range(AHEAD):
        i_s = _sequence(sequence, i_t + u, T)
        sequences = sequences + (i_s,)  # type: ignore[assignment]  # noqa: RUF005
    return sequences


@triton.jit
def _earlier(x, sequence, i_t, o_c, m_c, T, B, X_ROW: tl.constexpr, BACK: tl.constexpr):
    """Row t - BACK if it is in the sequence of row t - 1, else zeros."""
    i_last = _sequence(sequence, i_t - 1, T)
    is_same = (_sequence(sequence, i_t - BACK, T) == i_last) & (i_last < B)
    m_row = m_c & (i_t - BACK + tl.arange(0, 1) >= 0)
    b_x = tl.load(x + (i_t - BACK) * X_ROW + o_c, mask=m_row, other=0).to(tl.float32)
    return tl.where(is_same, b_x, 0.0)


@triton.jit
def _before(x, sequence, i_t, o_c, m_c, T, B, X_ROW: tl.constexpr):
    """The three rows before t, and their sequences, the last first."""
    past = (
        _earlier(x, sequence, i_t, o_c, m_c, T, B, X_ROW, 1),
        _earlier(x, sequence, i_t, o_c, m_c, T, B, X_ROW, 2),
        _earlier(x, sequence, i_t, o_c, m_c, T, B, X_ROW, 3),
    )
    ids = (
        _sequence(sequence, i_t - 1, T),
        _sequence(sequence, i_t - 2, T),
        _sequence(sequence, i_t - 3, T),
    )
    return past, ids


@triton.jit
def _go_on(i_before, i_last, B):
    """Whether all rows up to one of sequence `i_last` go on with the sequence before them.

    Most do, and then cost less: without CHECK in what follows. These kernels are short of
    instructions.
    """
    return (i_last == i_before) & (i_before >= 0) & (i_before < B)


@triton.jit
def _mix(b_row, past, i_0, i_1, taps, b_bias, B, CHECK: tl.constexpr):
    """The sum before the SiLU at row t; row t, and those before it if they are of its sequence."""
    b_x0 = b_row.to(tl.float32)
    b_x1, b_x2, b_x3 = past
    if CHECK:
        b_x0 = tl.where((i_0 >= 0) & (i_0 < B), b_x0, 0.0)
        b_x1 = tl.where(i_0 == i_1, b_x1, 0.0)
        b_x2 = tl.where(i_0 == i_1, b_x2, 0.0)
        b_x3 = tl.where(i_0 == i_1, b_x3, 0.0)
    b_sum = b_bias + taps[0] * b_x0 + taps[1] * b_x1 + taps[2] * b_x2 + taps[3] * b_x3
    return b_sum, (b_x0, b_x1, b_x2, b_x3)


@triton.jit(do_not_specialize=["T", "B"])
def conv_fwd_kernel(
    x,
    weight,
    bias,
    sequence,
    out,
    T,
    B,
    X_ROW: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    AHEAD: tl.constexpr,
):
    i_p = tl.program_id(0).to(tl.int64)
    o_c = (i_p % tl.cdiv(C, BLOCK_C)) * BLOCK_C + tl.arange(0, BLOCK_C)
    i_t = (i_p // tl.cdiv(C, BLOCK_C)) * ROWS
    m_c = o_c < C
    taps = _taps(weight, o_c, m_c, K)
    b_bias = tl.load(bias + o_c, mask=m_c, other=0).to(tl.float32)
    past, ids = _before(x, sequence, i_t, o_c, m_c, T, B, X_ROW)
    i_1 = ids[0]
    o_one = tl.arange(0, 1)
    for _ in range(0, ROWS, AHEAD):
        rows = _rows_ahead(x + i_t * X_ROW + o_c, m_c, T - i_t, X_ROW, AHEAD)
        sequences = _sequences_ahead(sequence, i_t, T, AHEAD)
        p_out = out + i_t * C + o_c
        if _go_on(i_1, sequences[AHEAD - 1], B):
            for u in tl.static_range(AHEAD):
                b_sum, window = _mix(rows[u], past, i_1, i_1, taps, b_bias, B, False)
                b_out = silu(b_sum)
                tl.store(p_out + u * C, b_out.to(out.dtype.element_ty), mask=m_c)
                past = (window[0], window[1], window[2])
        else:
            for u in tl.static_range(AHEAD):
                i_0 = sequences[u]
                b_sum, window = _mix(rows[u], past, i_0, i_1, taps, b_bias, B, True)
                b_out = tl.where(i_0 < B, silu(b_sum), 0.0)
                m_row = m_c & (i_t + u + o_one < T)
                tl.store(p_out + u * C, b_out.to(out.dtype.element_ty), mask=m_row)
                past = (window[0], window[1], window[2])
                i_1 = i_0
        i_t += AHEAD


@triton.jit
def _row_before(x, state, i_t, o_c, m_c, X_ROW: tl.constexpr, K: tl.constexpr, BACK: tl.constexpr):
    """Row t - BACK of x, and before its first row what the state holds, if the taps reach it."""
    b_x = tl.zeros(o_c.shape, dtype=tl.float32)
    if BACK < K:
        m_x = m_c & (i_t - BACK + tl.arange(0, 1) >= 0)
        m_state = m_c & (i_t - BACK + tl.arange(0, 1) < 0)
        p_state = state + o_c * (K - 1) + (K - 1 + i_t - BACK)
        b_x += tl.load(x + (i_t - BACK) * X_ROW + o_c, mask=m_x, other=0).to(tl.float32)
        b_x += tl.load(p_state, mask=m_state, other=0).to(tl.float32)
    return b_x


@triton.jit(do_not_specialize=["length", "blocks"])
def conv_continued_kernel(
    x,
    weight,
    bias,
    state,
    lens,
    out,
    length,
    blocks,
    RAGGED: tl.constexpr,
    X_ROW: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """A block of positions of one row. The first, which alone reads the state, renews it too."""
    i_p = tl.program_id(0).to(tl.int64)
    o_c = (i_p % tl.cdiv(C, BLOCK_C)) * BLOCK_C + tl.arange(0, BLOCK_C)
    i_block = i_p // tl.cdiv(C, BLOCK_C)
    i_row, i_first = i_block // blocks, (i_block % blocks) * ROWS
    m_c, o_one = o_c < C, tl.arange(0, 1)
    live = tl.zeros([1], tl.int64) + length
    if RAGGED:
        live = tl.load(lens + i_row + o_one).to(tl.int64)
    x, out, state = (
        x + i_row * length * X_ROW,
        out + i_row * length * C,
        state + i_row * C * (K - 1),
    )
    taps = _taps(weight, o_c, m_c, K)
    b_bias = tl.load(bias + o_c, mask=m_c, other=0).to(tl.float32)
    b_1 = _row_before(x, state, i_first, o_c, m_c, X_ROW, K, 1)
    b_2 = _row_before(x, state, i_first, o_c, m_c, X_ROW, K, 2)
    b_3 = _row_before(x, state, i_first, o_c, m_c, X_ROW, K, 3)
    past, i_t = (b_1, b_2, b_3), i_first
    for _ in range(0, ROWS, AHEAD):
        rows = _rows_ahead(x + i_t * X_ROW + o_c, m_c, live - i_t, X_ROW, AHEAD)
        for u in tl.static_range(AHEAD):
            b_sum, window = _mix(rows[u], past, 0, 0, taps, b_bias, 0, False)
            b_out = tl.where(i_t + u < live, silu(b_sum), 0.0)
            m_row = m_c & (i_t + u + o_one < length)
            tl.store(out + (i_t + u) * C + o_c, b_out.to(out.dtype.element_ty), mask=m_row)
            past = (window[0], window[1], window[2])
        i_t += AHEAD
    if i_first == 0:
        for k in tl.static_range(K - 1):
            o_last = live - (K - 1) + k
            b_last = tl.load(x + o_last * X_ROW + o_c, mask=m_c & (o_last >= 0), other=0)
            b_last = tl.where(o_last == -1, b_1, b_last.to(tl.float32))
            b_last = tl.where(o_last == -2, b_2, b_last)
            b_last = tl.where(o_last == -3, b_3, b_last)
            p_last = state + o_c * (K - 1) + k
            tl.store(p_last, b_last.to(state.dtype.element_ty), mask=m_c)


@triton.jit
def _backward_row(b_row, b_grad, i_0, past, ids, due, sums, taps, b_bias, B, CHECK: tl.constexpr):
    """One row on: what is known now of row t - 3, and past, ids, due and sums for the next row.

    past, ids:  the three rows before t, and their sequences, the last first
    due:        what the gradients of those rows have got so far
    sums:       the gradients of taps and bias
    """
    b_sum, window = _mix(b_row, past, i_0, ids[0], taps, b_bias, B, CHECK)
    b_sigmoid = sigmoid(b_sum)
    b_grad = b_grad.to(tl.float32) * (b_sigmoid + b_sum * b_sigmoid * (1 - b_sigmoid))
    b_to_1, b_to_2, b_to_3 = b_grad, b_grad, b_grad
    if CHECK:
        b_grad = tl.where((i_0 >= 0) & (i_0 < B), b_grad, 0.0)
        b_to_1 = tl.where(i_0 == ids[0], b_grad, 0.0)
        b_to_2 = tl.where(i_0 == ids[1], b_grad, 0.0)
        b_to_3 = tl.where(i_0 == ids[2], b_grad, 0.0)
    b_done = due[2] + taps[3] * b_to_3
    due = (taps[0] * b_grad, due[0] + taps[1] * b_to_1, due[1] + taps[2] * b_to_2)
    sums = (
        sums[0] + b_grad * window[0],
        sums[1] + b_grad * window[1],
        sums[2] + b_grad * window[2],
        sums[3] + b_grad * window[3],
        sums[4] + b_grad,
    )
    return b_done, (window[0], window[1], window[2]), (i_0, ids[0], ids[1]), due, sums


@triton.jit(do_not_specialize=["T", "B"])
def conv_bwd_kernel(
    grad,
    x,
    weight,
    bias,
    sequence,
    grad_x,
    partial,
    T,
    B,
    X_ROW: tl.constexpr,
    GRAD_X_ROW: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Row t is known when the walk is at t + 3. `partial`: taps and bias of each block of rows."""
    i_p = tl.program_id(0).to(tl.int64)
    i_block = i_p // tl.cdiv(C, BLOCK_C)
    o_c = (i_p % tl.cdiv(C, BLOCK_C)) * BLOCK_C + tl.arange(0, BLOCK_C)
    i_first = i_block * ROWS
    i_t = i_first
    m_c, o_one = o_c < C, tl.arange(0, 1)
    dtype = grad_x.dtype.element_ty
    taps = _taps(weight, o_c, m_c, K)
    b_bias = tl.load(bias + o_c, mask=m_c, other=0).to(tl.float32)
    past, ids = _before(x, sequence, i_t, o_c, m_c, T, B, X_ROW)
    b_zero = tl.zeros([BLOCK_C], dtype=tl.float32)
    due, sums = (b_zero, b_zero, b_zero), (b_zero, b_zero, b_zero, b_zero, b_zero)
    for _ in range(0, ROWS, AHEAD):
        rows = _rows_ahead(x + i_t * X_ROW + o_c, m_c, T - i_t, X_ROW, AHEAD)
        grads = _rows_ahead(grad + i_t * C + o_c, m_c, T - i_t, C, AHEAD)
        sequences = _sequences_ahead(sequence, i_t, T, AHEAD)
        p_done = grad_x + (i_t - 3) * GRAD_X_ROW + o_c
        if _go_on(ids[2], sequences[AHEAD - 1], B):
            for u in tl.static_range(AHEAD):
                b_done, past, ids, due, sums = _backward_row(
                    rows[u], grads[u], ids[0], past, ids, due, sums, taps, b_bias, B, False
                )
                m_done = m_c & (i_t + u - 3 + o_one >= i_first)
                tl.store(p_done + u * GRAD_X_ROW, b_done.to(dtype), mask=m_done)
        else:
            for u in tl.static_range(AHEAD):
                b_done, past, ids, due, sums = _backward_row(
                    rows[u], grads[u], sequences[u], past, ids, due, sums, taps, b_bias, B, True
                )
                o_done = i_t + u - 3 + o_one
                m_done = m_c & (o_done >= i_first) & (o_done < T)
                tl.store(p_done + u * GRAD_X_ROW, b_done.to(dtype), mask=m_done)
        i_t += AHEAD
    p_partial = partial + i_block * (K + 1) * C + o_c
    for i in tl.static_range(K):
        tl.store(p_partial + (K - 1 - i) * C, sums[i], mask=m_c)
    tl.store(p_partial + K * C, sums[4], mask=m_c)
    # Three rows of the next block, which counts them for taps and bias.
    rows = _rows_ahead(x + i_t * X_ROW + o_c, m_c, T - i_t, X_ROW, 3)
    grads = _rows_ahead(grad + i_t * C + o_c, m_c, T - i_t, C, 3)
    sequences = _sequences_ahead(sequence, i_t, T, 3)
    for u in tl.static_range(3):
        b_done, past, ids, due, sums = _backward_row(
            rows[u], grads[u], sequences[u], past, ids, due, sums, taps, b_bias, B, True
        )
        o_done = i_t + u - 3 + o_one
        p_done = grad_x + (i_t + u - 3) * GRAD_X_ROW + o_c
        tl.store(p_done, b_done.to(dtype), mask=m_c & (o_done >= i_first) & (o_done < T))


def conv_fwd(x: Tensor, weight: Tensor, bias: Tensor, sequence: Tensor, batch: int) -> Tensor:
    """The convolution of x (total, channels), whose rows may be a slice of wider ones.

    sequence:  int32 (total,): which sequence each position is in, `batch` in the tail
    """
    total, channels = x.shape
    block_c, rows, ahead, warps = _FORWARD
    out = x.new_empty(total, channels)
    launch(
        conv_fwd_kernel,
        cdiv(total, rows) * cdiv(channels, block_c),
        {
            "x": x,
            "weight": weight.contiguous(),
            "bias": bias.contiguous(),
            "sequence": sequence,
            "out": out,
            "T": total,
            "B": batch,
        },
        {
            "X_ROW": x.stride(0),
            "C": channels,
            "K": weight.shape[-1],
            "BLOCK_C": block_c,
            "ROWS": rows,
            "AHEAD": ahead,
        },
        num_warps=warps,
    )
    return out


def conv_continued(
    x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, lens: Tensor | None
) -> Tensor:
    """The convolution of rows x (batch, length, channels) that go on, out of slices of wider ones.

    Pads come out as zeros.

    state:  (batch, channels, taps - 1), contiguous: the rows before, oldest first; changes in place
    lens:   int (batch,): positions of each row, on the left; None: all have `length`
    """
    batch, length, channels = x.shape
    block_c, rows, ahead, warps = _FORWARD
    blocks = cdiv(length, rows)
    out = x.new_empty(batch, length, channels)
    launch(
        conv_continued_kernel,
        batch * blocks * cdiv(channels, block_c),
        {
            "x": x,
            "weight": weight.contiguous(),
            "bias": bias.contiguous(),
            "state": state,
            "lens": state if lens is None else lens.contiguous(),
            "out": out,
            "length": length,
            "blocks": blocks,
        },
        {
            "RAGGED": lens is not None,
            "X_ROW": x.stride(1),
            "C": channels,
            "K": weight.shape[-1],
            "BLOCK_C": block_c,
            "ROWS": rows,
            "AHEAD": ahead,
        },
        num_warps=warps,
    )
    return out


def conv_bwd(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    sequence: Tensor,
    batch: int,
    grad_x: Tensor,
) -> tuple[Tensor, Tensor]:
    """Write the gradient of x to `grad_x`, which may be a slice; return those of the parameters."""
    total, channels = x.shape
    taps = weight.shape[-1]
    block_c, rows, ahead, warps = _BACKWARD
    blocks = cdiv(total, rows)
    partial = torch.empty(blocks, taps + 1, channels, dtype=torch.float32, device=x.device)
    launch(
        conv_bwd_kernel,
        blocks * cdiv(channels, block_c),
        {
            "grad": grad,
            "x": x,
            "weight": weight.contiguous(),
            "bias": bias.contiguous(),
            "sequence": sequence,
            "grad_x": grad_x,
            "partial": partial,
            "T": total,
            "B": batch,
        },
        {
            "X_ROW": x.stride(0),
            "GRAD_X_ROW": grad_x.stride(0),
            "C": channels,
            "K": taps,
            "BLOCK_C": block_c,
            "ROWS": rows,
            "AHEAD": ahead,
        },
        num_warps=warps,
    )
    summed = partial.sum(0)
    # Copied, so that they are laid out as the parameters, and share no memory.
    grad_weight, grad_bias = weight.new_empty(weight.shape), bias.new_empty(bias.shape)
    grad_weight.view(channels, taps).copy_(summed[:taps].t())
    return grad_weight, grad_bias.copy_(summed[taps])
