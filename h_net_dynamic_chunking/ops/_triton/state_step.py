"""One position of the Mamba-2 recurrence behind its convolution; see `layers.mamba2`.

    S <- exp(dt A) S + dt x B^T,      y = S C + D x,      for each head

What this costs is S, read and written once. The convolution is not in it: the channels of B and C
are shared by all heads, and must be read before the first of them moves on; see `conv_step`. The
gate and the RMSNorm behind it can be, but for the scale: it is one number for a row, which the
kernel behind the next product applies; see `rows_step.norm_rows`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from h_net_dynamic_chunking.ops._triton.step_common import (
    check_active,
    check_contiguous,
    check_dtype,
    check_shape,
    launch_options,
    let_next_start,
    load_flag,
    on_its_device,
    prefetch,
    rest,
    rounded,
    silu,
    wait_for_inputs,
)

# Channels of a head that one program updates, and its warps: of a row alone few, so that it already
# keeps a device busy (32 heads of 64 channels are 256 programs); of several many, because of those
# that rest: 64 rows with none active took 21 us with the one and 6 with the other (H200).
_ALONE = 8, 2
_SEVERAL = 32, 4


@triton.jit
def softplus(x):
    """log(1 + e^x), also where e^x is small beside 1; x itself above 20, as in torch."""
    e = tl.exp(tl.minimum(x, 20))
    u = 1 + e
    # The quotient makes up for what 1 + e has lost of e.
    log1p = tl.where(u > 1, tl.log(u) * (e / tl.where(u > 1, u - 1, 1)), e)
    return tl.where(x > 20, x, log1p)


@triton.jit
def state_step_kernel(
    conv_out_ptr,
    dt_ptr,
    state_ptr,
    dt_bias_ptr,
    A_log_ptr,
    D_ptr,
    active_ptr,
    gate_ptr,
    norm_ptr,
    mean_square_ptr,
    y_ptr,
    channels,
    dt_stride,
    gate_stride,
    heads,
    head_dim,
    d_state,
    HAS_ACTIVE: tl.constexpr,
    ALONE: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INTERPRETED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """BLOCK_P channels of one head of one row; tiles are (channel, state)."""
    i_m, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_p = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
    o_n = tl.arange(0, BLOCK_N)
    m_p, m_n = o_p < head_dim, o_n < d_state
    p_y = y_ptr + (i_m * heads + i_h) * head_dim + o_p
    # Before the wait: flags do not change within a stack.
    live = load_flag(active_ptr + i_m, HAS_ACTIVE)
    if not live:
        is_first = (i_m == 0) & (i_h == 0) & (tl.program_id(2) == 0)
        rest(p_y, m_p, is_first, ALONE, OVERLAP)
        return
    p_state = state_ptr + (i_m * heads + i_h) * head_dim * d_state
    p_state += o_p[:, None] * d_state + o_n[None, :]
    if OVERLAP:
        LINE: tl.constexpr = 1024 // state_ptr.dtype.element_ty.primitive_bitwidth
        lines = tl.arange(0, BLOCK_N // LINE) * LINE
        o_line = tl.minimum(o_p, head_dim - 1)[:, None] * d_state + lines[None, :]
        row = state_ptr + (i_m * heads + i_h) * head_dim * d_state
        prefetch(row + tl.minimum(o_line, head_dim * d_state - 1))
    let_next_start(OVERLAP)
    wait_for_inputs(OVERLAP)

    mask = m_p[:, None] & m_n[None, :]
    state = tl.load(p_state, mask, 0).to(tl.float32)
    dt = tl.load(dt_ptr + i_m * dt_stride + i_h).to(tl.float32)
    dt = softplus(dt + tl.load(dt_bias_ptr + i_h).to(tl.float32))
    A = -tl.exp(tl.load(A_log_ptr + i_h).to(tl.float32))
    row = conv_out_ptr + i_m * channels
    x = tl.load(row + i_h * head_dim + o_p, m_p, 0)
    B = tl.load(row + heads * head_dim + o_n, m_n, 0)
    C = tl.load(row + heads * head_dim + d_state + o_n, m_n, 0)

    state = tl.exp(dt * A) * state + (dt * x)[:, None] * B[None, :]
    tl.store(p_state, rounded(state, state_ptr.dtype.element_ty, INTERPRETED), mask)
    y = tl.sum(state * C[None, :], 1) + tl.load(D_ptr + i_h).to(tl.float32) * x
    if GATED:
        o_c = i_h * head_dim + o_p
        y *= silu(tl.load(gate_ptr + i_m * gate_stride + o_c, m_p, 0).to(tl.float32))
        y = tl.where(m_p, y, 0)
        part = (i_m * heads + i_h) * tl.num_programs(2) + tl.program_id(2)
        tl.store(mean_square_ptr + part, tl.sum(y * y, 0) / (heads * head_dim))
        y *= tl.load(norm_ptr + o_c, m_p, 0).to(tl.float32)
    tl.store(p_y, rounded(y, y_ptr.dtype.element_ty, INTERPRETED), m_p)


class Gated(NamedTuple):
    """A gate and an RMSNorm behind the recurrence, without its scale."""

    gate: Tensor
    """(rows, d_inner), float; any stride between its rows."""
    norm_weight: Tensor
    """(d_inner,)."""
    mean_square: Tensor
    """float32 (rows, parts), see `parts`: gets what adds up to the mean square of y silu(gate), in
    rows that are active. The scale of the norm is 1 / sqrt(mean square + eps)."""


def parts(state: Tensor) -> int:
    """Programs that share a row of such states."""
    rows, heads, head_dim, _ = state.shape
    channels = _channels(rows, head_dim)
    return heads * ((head_dim + channels - 1) // channels)


def _channels(rows: int, head_dim: int) -> int:
    most, _ = _ALONE if rows == 1 else _SEVERAL
    channels: int = triton.next_power_of_2(head_dim)
    return min(most, channels)


@on_its_device
def state_step(
    conv_out: Tensor,
    dt: Tensor,
    state: Tensor,
    *,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    out_dtype: torch.dtype,
    active: Tensor | None = None,
    gated: Gated | None = None,
) -> Tensor:
    """Recurrence and skip of one position; moves `state` on in place.

    conv_out:     float32 (rows, channels), of `conv_step`; channels are x | B | C, which are
                  d_inner, d_state and d_state
    dt:           (rows, heads), float, as `in_proj` has it; any stride between its rows
    state:        (rows, heads, head_dim, d_state), float32, bfloat16 or float16
    dt_bias, A_log, D: (heads,)
    active:       bool (rows,), or None for all. The others keep their state to the bit
    gated:        y silu(gate) norm_weight stands for y
    out:          (rows, d_inner), `out_dtype`; means nothing where one of several rows is
                  not active, and is zero where the only one is not

    Computed in float32; `out`, which is that of the state before it is rounded, and the state are
    rounded once, to the nearest.

    Raises:
        ValueError: shapes or dtypes off the contract.
    """
    _check(conv_out, dt, state, dt_bias, A_log, D, active)
    rows, heads, head_dim, d_state = state.shape
    if gated is not None:
        check_shape("gate", gated.gate, rows, heads * head_dim)
        check_contiguous("norm_weight", gated.norm_weight, heads * head_dim)
        check_contiguous("mean_square", gated.mean_square, rows, parts(state))
        check_dtype("mean_square", gated.mean_square, torch.float32)
    gate, norm_weight, mean_square = gated or (conv_out, D, conv_out)
    channels, (_, warps) = _channels(rows, head_dim), _ALONE if rows == 1 else _SEVERAL
    y = conv_out.new_empty(rows, heads * head_dim, dtype=out_dtype)
    state_step_kernel[(rows, heads, triton.cdiv(head_dim, channels))](
        conv_out_ptr=conv_out,
        dt_ptr=dt,
        state_ptr=state,
        dt_bias_ptr=dt_bias,
        A_log_ptr=A_log,
        D_ptr=D,
        active_ptr=dt if active is None else active,
        gate_ptr=gate,
        norm_ptr=norm_weight,
        mean_square_ptr=mean_square,
        y_ptr=y,
        channels=conv_out.shape[1],
        dt_stride=dt.stride(0),
        gate_stride=gate.stride(0),
        heads=heads,
        head_dim=head_dim,
        d_state=d_state,
        HAS_ACTIVE=active is not None,
        ALONE=rows == 1,
        GATED=gated is not None,
        BLOCK_P=channels,
        BLOCK_N=max(128 // state.element_size(), triton.next_power_of_2(d_state)),
        num_warps=warps,
        **launch_options(conv_out),
    )
    return y


def _check(
    conv_out: Tensor,
    dt: Tensor,
    state: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    active: Tensor | None,
) -> None:
    if state.ndim != 4:
        raise ValueError(
            f"state must be (rows, heads, head_dim, d_state), got {tuple(state.shape)}"
        )
    rows, heads, head_dim, d_state = state.shape
    check_contiguous("state", state, *state.shape)
    if state.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"state must be float32, bfloat16 or float16, got {state.dtype}")
    check_contiguous("conv_out", conv_out, rows, heads * head_dim + 2 * d_state)
    check_dtype("conv_out", conv_out, torch.float32)
    check_shape("dt", dt, rows, heads)
    for name, tensor in (("dt_bias", dt_bias), ("A_log", A_log), ("D", D)):
        check_contiguous(name, tensor, heads)
    check_active(active, rows)
