"""One position of the Mamba-2 recurrence between its two projections; see `layers.mamba2`.

    S <- exp(dt A) S + dt x B^T,      y = S C + D x,      for each head

What this costs is S, read and written once. The convolution before it has a kernel of its own: the
channels of B and C are shared by all heads, and must be read before the first of them moves on.
"""

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
    rounded,
    silu,
    wait_for_inputs,
)

_CHANNELS = 128  # a program of the convolution
# Channels of a head that one program updates: small, so that one row already keeps a device busy
# (32 heads of 64 channels are 256 programs).
_HEAD_BLOCK = 8


@triton.jit
def conv_step_kernel(
    projected_ptr,
    conv_ptr,
    weight_ptr,
    bias_ptr,
    active_ptr,
    out_ptr,
    channels,
    projected_stride,
    offset,
    TAPS: tl.constexpr,
    HAS_ACTIVE: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Convolution and SiLU of one row at BLOCK channels; moves their window on."""
    let_next_start(OVERLAP)
    wait_for_inputs(OVERLAP)
    i_m = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (o_c < channels) & load_flag(active_ptr + i_m, HAS_ACTIVE)
    window = conv_ptr + (i_m * channels + o_c) * (TAPS - 1)
    new = tl.load(projected_ptr + i_m * projected_stride + offset + o_c, mask, 0)
    taps = weight_ptr + o_c * TAPS
    out = tl.load(bias_ptr + o_c, mask, 0).to(tl.float32)
    out += new.to(tl.float32) * tl.load(taps + TAPS - 1, mask, 0).to(tl.float32)
    for tap in tl.static_range(TAPS - 1):
        old = tl.load(window + tap, mask, 0)
        out += old.to(tl.float32) * tl.load(taps + tap, mask, 0).to(tl.float32)
        if tap > 0:
            tl.store(window + tap - 1, old, mask)
    if TAPS > 1:
        tl.store(window + TAPS - 2, new, mask)
    tl.store(out_ptr + i_m * channels + o_c, silu(out), mask)


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
    y_ptr,
    channels,
    dt_stride,
    heads,
    head_dim,
    d_state,
    HAS_ACTIVE: tl.constexpr,
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
    # Before the wait: flags do not change within a stack, whose first kernel is one of torch's,
    # which overlaps with none.
    live = load_flag(active_ptr + i_m, HAS_ACTIVE)
    if not live:
        let_next_start(OVERLAP)
        wait_for_inputs(OVERLAP)
        tl.store(p_y, tl.zeros((BLOCK_P,), tl.float32), m_p)
        return
    p_state = state_ptr + (i_m * heads + i_h) * head_dim * d_state
    p_state += o_p[:, None] * d_state + o_n[None, :]
    if OVERLAP:
        lines = tl.arange(0, BLOCK_N // 32) * 32
        o_line = tl.minimum(o_p, head_dim - 1)[:, None] * d_state + lines[None, :]
        row = state_ptr + (i_m * heads + i_h) * head_dim * d_state
        prefetch(row + tl.minimum(o_line, head_dim * d_state - 1))
    let_next_start(OVERLAP)
    wait_for_inputs(OVERLAP)

    mask = m_p[:, None] & m_n[None, :]
    state = tl.load(p_state, mask, 0)
    dt = tl.load(dt_ptr + i_m * dt_stride + i_h).to(tl.float32)
    dt = softplus(dt + tl.load(dt_bias_ptr + i_h).to(tl.float32))
    A = -tl.exp(tl.load(A_log_ptr + i_h).to(tl.float32))
    row = conv_out_ptr + i_m * channels
    x = tl.load(row + i_h * head_dim + o_p, m_p, 0)
    B = tl.load(row + heads * head_dim + o_n, m_n, 0)
    C = tl.load(row + heads * head_dim + d_state + o_n, m_n, 0)

    state = tl.exp(dt * A) * state + (dt * x)[:, None] * B[None, :]
    tl.store(p_state, state, mask)
    y = tl.sum(state * C[None, :], 1) + tl.load(D_ptr + i_h).to(tl.float32) * x
    tl.store(p_y, rounded(y, y_ptr.dtype.element_ty, INTERPRETED), m_p)


@on_its_device
def mamba_step(
    projected: Tensor,
    conv: Tensor,
    state: Tensor,
    *,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    active: Tensor | None = None,
) -> Tensor:
    """Convolution, recurrence and skip of one position; moves `conv` and `state` on in place.

    projected:    (rows, 2 * d_inner + 2 * d_state + heads), float: z | x | B | C | dt of `in_proj`
    conv:         (rows, channels, d_conv - 1), dtype of `projected`; channels are x | B | C
    state:        (rows, heads, head_dim, d_state), float32
    conv_weight:  (channels, d_conv) or, as `conv1d` has it, (channels, 1, d_conv)
    conv_bias:    (channels,)
    dt_bias, A_log, D: (heads,)
    active:       bool (rows,), or None for all. The others keep conv and state to the bit
    out:          (rows, d_inner), dtype of `projected`; zeros where a row is not active. The gate
                  z, the norm and `out_proj` are left to `linear_step`

    Computed in float32 and rounded once, also between the convolution and the recurrence.

    Raises:
        ValueError: shapes or dtypes off the contract.
    """
    rows, channels, taps = _check(
        projected, conv, state, conv_weight, conv_bias, dt_bias, A_log, D, active
    )
    _, heads, head_dim, d_state = state.shape
    d_inner = heads * head_dim
    options = launch_options(projected)

    conv_out = projected.new_empty(rows, channels, dtype=torch.float32)
    conv_step_kernel[(rows, triton.cdiv(channels, _CHANNELS))](
        projected_ptr=projected,
        conv_ptr=conv,
        weight_ptr=conv_weight,
        bias_ptr=conv_bias,
        active_ptr=projected if active is None else active,
        out_ptr=conv_out,
        channels=channels,
        projected_stride=projected.stride(0),
        offset=d_inner,
        TAPS=taps,
        HAS_ACTIVE=active is not None,
        BLOCK=_CHANNELS,
        num_warps=4,
        **options,
    )
    y = projected.new_empty(rows, d_inner)
    state_step_kernel[(rows, heads, triton.cdiv(head_dim, _HEAD_BLOCK))](
        conv_out_ptr=conv_out,
        dt_ptr=projected[:, d_inner + channels :],
        state_ptr=state,
        dt_bias_ptr=dt_bias,
        A_log_ptr=A_log,
        D_ptr=D,
        active_ptr=projected if active is None else active,
        y_ptr=y,
        channels=channels,
        dt_stride=projected.stride(0),
        heads=heads,
        head_dim=head_dim,
        d_state=d_state,
        HAS_ACTIVE=active is not None,
        BLOCK_P=_HEAD_BLOCK,
        BLOCK_N=max(32, triton.next_power_of_2(d_state)),
        num_warps=2,
        **options,
    )
    return y


def _check(
    projected: Tensor,
    conv: Tensor,
    state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    active: Tensor | None,
) -> tuple[int, int, int]:
    """Rows, channels of the convolution and its taps, if all fit together; else ValueError."""
    if state.ndim != 4:
        raise ValueError(
            f"state must be (rows, heads, head_dim, d_state), got {tuple(state.shape)}"
        )
    rows, heads, head_dim, d_state = state.shape
    d_inner = heads * head_dim
    channels, taps = d_inner + 2 * d_state, conv_weight.shape[-1]
    check_contiguous("state", state, *state.shape)
    check_dtype("state", state, torch.float32)
    check_shape("projected", projected, rows, d_inner + channels + heads)
    check_contiguous("conv", conv, rows, channels, taps - 1)
    check_dtype("conv", conv, projected.dtype)
    middle = (1,) if conv_weight.ndim == 3 else ()
    check_contiguous("conv_weight", conv_weight, channels, *middle, taps)
    check_contiguous("conv_bias", conv_bias, channels)
    for name, tensor in (("dt_bias", dt_bias), ("A_log", A_log), ("D", D)):
        check_contiguous(name, tensor, heads)
    check_active(active, rows)
    return rows, channels, taps
