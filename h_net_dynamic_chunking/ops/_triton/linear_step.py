"""A linear layer on few rows, with what stands around it in a step: y = f(x) W^T.

Every weight is read once, which is what a step costs; the rest hides behind it. Each program owns
BLOCK_N outputs for all rows. The inputs are cut into SPLIT spans, one for each warp, so that four
short chains of matrix instructions run side by side in place of one that would be slower than the
memory; the four sums are added at the end, always in the same order. Nothing in the order of the
sums of a row depends on the other rows or on how many there are.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from h_net_dynamic_chunking.ops._triton.step_common import (
    check_contiguous,
    check_dtype,
    check_shape,
    launch_options,
    prefetch,
    rounded,
    silu,
    wait_for_inputs,
)

_MAX_ROWS = 128
_SPLIT = 4  # spans of the inputs, and warps
_NORM_BLOCK = 512  # inputs that the four warps square at once, 16 bytes a thread in float32
# Up to so many rows every program computes f(x) for itself. With more that costs more traffic
# between L2 and the programs than a kernel that writes f(x) once.
_FUSED_ROWS = 4


@triton.jit
def load_gated(x_ptr, gate_ptr, x_offset, gate_offset, mask, GATED: tl.constexpr):
    """x silu(gate), or x, in float32."""
    x = tl.load(x_ptr + x_offset, mask, 0).to(tl.float32)
    if GATED:
        x *= silu(tl.load(gate_ptr + gate_offset, mask, 0).to(tl.float32))
    return x


@triton.jit
def rms_scale(
    x_ptr,
    gate_ptr,
    o_m,
    m_m,
    x_stride,
    gate_stride,
    width,
    eps,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """1 / sqrt(mean(x^2) + eps) of the rows o_m; the same bits for any BLOCK_M."""
    squares = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for k in range(0, width, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        mask = m_m[:, None] & (o_k < width)[None, :]
        x_offset = o_m[:, None] * x_stride + o_k[None, :]
        gate_offset = o_m[:, None] * gate_stride + o_k[None, :]
        x = load_gated(x_ptr, gate_ptr, x_offset, gate_offset, mask, GATED)
        squares += x * x
    return tl.rsqrt(tl.sum(squares, 1) / width + eps)


@triton.jit
def add_product(y, x, w, INTERPRETED: tl.constexpr):
    """y + x @ w in float32."""
    if INTERPRETED:  # it would take the bits of bfloat16 for integers
        x, w = x.to(tl.float32), w.to(tl.float32)
    return tl.dot(x, w, y, input_precision="ieee")


@triton.jit
def prefetch_rows(
    weight_ptr, o_n, in_features, out_features, LINE: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Bring the rows o_n of the weights to L2, LINE elements being 128 bytes."""
    rows = weight_ptr + tl.minimum(o_n, out_features - 1).to(tl.int64) * in_features
    for k in range(0, in_features, 16 * LINE):
        o_k = tl.minimum(k + tl.arange(0, 16) * LINE, in_features - 1)
        prefetch(rows[:, None] + o_k[None, :])


@triton.jit
def prepare_rows_kernel(
    x_ptr,
    gate_ptr,
    norm_ptr,
    out_ptr,
    width,
    x_stride,
    gate_stride,
    eps,
    GATED: tl.constexpr,
    NORMED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """f(x) of one row, in the dtype of the output."""
    wait_for_inputs(OVERLAP)
    i_m = tl.program_id(0)
    x_ptr += i_m.to(tl.int64) * x_stride
    gate_ptr += i_m.to(tl.int64) * gate_stride
    out_ptr += i_m.to(tl.int64) * width
    o_m = tl.zeros((1,), tl.int32)
    if NORMED:
        scale = rms_scale(x_ptr, gate_ptr, o_m, o_m == 0, 0, 0, width, eps, GATED, 1, BLOCK_K)[
            :, None
        ]
    for k in range(0, width, BLOCK_K):
        o_k = (k + tl.arange(0, BLOCK_K))[None, :]
        x = load_gated(x_ptr, gate_ptr, o_k, o_k, o_k < width, GATED)
        if NORMED:
            x = x * scale * tl.load(norm_ptr + o_k, o_k < width, 0).to(tl.float32)
        x = rounded(x, out_ptr.dtype.element_ty, INTERPRETED)
        tl.store(out_ptr + o_k, x, o_k < width)


@triton.jit
def linear_step_kernel(
    x_ptr,
    gate_ptr,
    norm_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    rows,
    in_features,
    out_features,
    span,
    x_stride,
    gate_stride,
    out_stride,
    eps,
    GATED: tl.constexpr,
    NORMED: tl.constexpr,
    SWIGLU: tl.constexpr,
    BIASED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    EXACT: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NORM_BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Tiles are (span, row, input) for x and (span, input, output) for the weights.

    EXACT: the spans are whole blocks and none reaches past the inputs.
    """
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    line: tl.constexpr = 1024 // dtype.primitive_bitwidth
    o_m, o_s = tl.arange(0, BLOCK_M), tl.arange(0, SPLIT) * span
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m, m_n = o_m < rows, o_n < out_features
    gate_rows = weight_ptr + out_features.to(tl.int64) * in_features
    if OVERLAP:
        prefetch_rows(weight_ptr, o_n, in_features, out_features, line, BLOCK_N)
        if SWIGLU:
            prefetch_rows(gate_rows, o_n, in_features, out_features, line, BLOCK_N)
    wait_for_inputs(OVERLAP)

    if NORMED:
        scale = rms_scale(
            x_ptr, gate_ptr, o_m, m_m, x_stride, gate_stride, in_features, eps,
            GATED, BLOCK_M, NORM_BLOCK,
        )[None, :, None]  # fmt: skip
    p_n = o_n.to(tl.int64)[None, None, :] * in_features
    y = tl.zeros((SPLIT, BLOCK_M, BLOCK_N), tl.float32)
    y_gate = tl.zeros((SPLIT, BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, span, BLOCK_K):
        o_i = k + tl.arange(0, BLOCK_K)
        o_k = o_s[:, None] + o_i[None, :]
        m_x, m_w = m_m[None, :, None], m_n[None, None, :]
        if not EXACT:
            m_k = (o_i < span)[None, :] & (o_k < in_features)
            m_x, m_w = m_x & m_k[:, None, :], m_w & m_k[:, :, None]
        x_offset = o_m[None, :, None] * x_stride + o_k[:, None, :]
        if GATED or NORMED:
            gate_offset = o_m[None, :, None] * gate_stride + o_k[:, None, :]
            x = load_gated(x_ptr, gate_ptr, x_offset, gate_offset, m_x, GATED)
            if NORMED:
                m_k = o_k < in_features
                x = x * scale * tl.load(norm_ptr + o_k, m_k, 0).to(tl.float32)[:, None, :]
        else:
            x = tl.load(x_ptr + x_offset, m_x, 0)
        x = rounded(x.to(tl.float32), dtype, INTERPRETED)
        o_w = p_n + o_k[:, :, None]
        y = add_product(y, x, tl.load(weight_ptr + o_w, m_w, 0), INTERPRETED)
        if SWIGLU:
            y_gate = add_product(y_gate, x, tl.load(gate_rows + o_w, m_w, 0), INTERPRETED)

    out = tl.sum(y, 0)
    if BIASED:
        out += tl.load(bias_ptr + o_n, m_n, 0).to(tl.float32)[None, :]
    if SWIGLU:
        gate = tl.sum(y_gate, 0)
        if BIASED:
            gate += tl.load(bias_ptr + out_features + o_n, m_n, 0).to(tl.float32)[None, :]
        out *= silu(gate)
    p_out = out_ptr + o_m[:, None] * out_stride + o_n[None, :]
    m_out = m_m[:, None] & m_n[None, :]
    if RESIDUAL:
        out += tl.load(p_out, m_out, 0)
    tl.store(p_out, rounded(out, out_ptr.dtype.element_ty, INTERPRETED), m_out)


def linear_step(
    x: Tensor,
    weight: Tensor,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 1e-5,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    swiglu: bool = False,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """f(x) @ weight.T of up to 128 rows; f is gate, then norm, each where it is given.

    x:            (rows, in), float
    weight:       (out, in), float32, bfloat16 or float16; with swiglu (2 * out, in), values first
    norm_weight:  (in,): RMSNorm of x, in float32, rounded to the dtype of `weight`
    gate:         (rows, in): x silu(gate) stands for x
    residual:     (rows, out), float32: y is added to it in place, and it is what comes back
    swiglu:       y = value * silu(gate) of the two halves of the product
    bias:         (out,); with swiglu (2 * out,)
    out:          (rows, out), where y is written; else it is allocated, in `out_dtype`, or in the
                  dtype of `weight`

    Products are exact in float32 and summed in it (float32 weights without tf32); y is rounded
    once. x, gate, residual and out may be views with any stride between their rows.

    Raises:
        ValueError: no rows or more than 128, shapes or dtypes off the contract.
    """
    rows, in_features, out_features = _check(x, weight, norm_weight, gate, bias, swiglu)
    out = _output(x, weight, residual, out, out_dtype, (rows, out_features))
    if rows > _FUSED_ROWS and (norm_weight is not None or gate is not None):
        x, gate, norm_weight = prepare_rows(x, gate, norm_weight, weight.dtype, eps), None, None

    block_m, block_n, block_k, stages = _blocks(rows, out_features, weight.dtype, swiglu)
    span = triton.cdiv(in_features, 16 * _SPLIT) * 16
    linear_step_kernel[(triton.cdiv(out_features, block_n),)](
        x_ptr=x,
        gate_ptr=x if gate is None else gate,
        norm_ptr=x if norm_weight is None else norm_weight,
        weight_ptr=weight,
        bias_ptr=x if bias is None else bias,
        out_ptr=out,
        rows=rows,
        in_features=in_features,
        out_features=out_features,
        span=span,
        x_stride=x.stride(0),
        gate_stride=0 if gate is None else gate.stride(0),
        out_stride=out.stride(0),
        eps=eps,
        GATED=gate is not None,
        NORMED=norm_weight is not None,
        SWIGLU=swiglu,
        BIASED=bias is not None,
        RESIDUAL=residual is not None,
        EXACT=span * _SPLIT == in_features and span % block_k == 0,
        SPLIT=_SPLIT,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        NORM_BLOCK=_NORM_BLOCK,
        num_warps=_SPLIT,
        num_stages=stages,
        **launch_options(x),
    )
    return out


def prepare_rows(
    x: Tensor,
    gate: Tensor | None,
    norm_weight: Tensor | None,
    dtype: torch.dtype,
    eps: float = 1e-5,
) -> Tensor:
    """f(x) of `linear_step` by itself, in `dtype`: a norm, a gated norm, or a gate."""
    rows, width = x.shape
    prepared = x.new_empty(rows, width, dtype=dtype)
    prepare_rows_kernel[(rows,)](
        x_ptr=x,
        gate_ptr=x if gate is None else gate,
        norm_ptr=x if norm_weight is None else norm_weight,
        out_ptr=prepared,
        width=width,
        x_stride=x.stride(0),
        gate_stride=0 if gate is None else gate.stride(0),
        eps=eps,
        GATED=gate is not None,
        NORMED=norm_weight is not None,
        BLOCK_K=_NORM_BLOCK,
        num_warps=_SPLIT,
        **launch_options(x),
    )
    return prepared


def _blocks(
    rows: int, out_features: int, dtype: torch.dtype, swiglu: bool
) -> tuple[int, int, int, int]:
    """BLOCK_M, BLOCK_N, BLOCK_K and stages; none of them changes the order of the sums."""
    block_m = max(16, triton.next_power_of_2(rows))
    # With few rows more programs than multiprocessors, which together ask for weights all the time;
    # with many rows, all of which each program reads, no more programs than that takes.
    programs = 256 if rows <= 16 else 64
    # Accumulators of 128 rows, and of both halves of a SwiGLU, must fit into the registers.
    block_n = 32 // (1 + swiglu) // (1 + (rows > 64))
    while block_n > 8 and triton.cdiv(out_features, block_n) < programs:
        block_n //= 2
    if dtype == torch.float32:
        return block_m, min(block_n, 16), 32, 2
    return block_m, block_n, 64 if rows <= 32 else 32, 4


def _check(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    gate: Tensor | None,
    bias: Tensor | None,
    swiglu: bool,
) -> tuple[int, int, int]:
    """Rows, inputs and outputs, if all fit together; else ValueError."""
    if weight.ndim != 2 or 0 in weight.shape or (swiglu and weight.shape[0] % 2):
        wanted = "(2 * out, in)" if swiglu else "(out, in)"
        raise ValueError(f"weight must have shape {wanted}, got {tuple(weight.shape)}")
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"weight must be float32, bfloat16 or float16, got {weight.dtype}")
    outputs, in_features = weight.shape
    check_contiguous("weight", weight, outputs, in_features)
    if x.ndim != 2 or not 1 <= x.shape[0] <= _MAX_ROWS:
        raise ValueError(f"x must have 1 to {_MAX_ROWS} rows (rows, in), got {tuple(x.shape)}")
    rows = x.shape[0]
    check_shape("x", x, rows, in_features)
    if gate is not None:
        check_shape("gate", gate, rows, in_features)
    if norm_weight is not None:
        check_contiguous("norm_weight", norm_weight, in_features)
    if bias is not None:
        check_contiguous("bias", bias, outputs)
    return rows, in_features, outputs // 2 if swiglu else outputs


def _output(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    out: Tensor | None,
    out_dtype: torch.dtype | None,
    shape: tuple[int, int],
) -> Tensor:
    """What y is written or added to."""
    if residual is not None:
        if out is not None or out_dtype is not None:
            raise ValueError("out and out_dtype must be None where y is added to a residual")
        check_shape("residual", residual, *shape)
        check_dtype("residual", residual, torch.float32)
        return residual
    if out is None:
        return x.new_empty(shape, dtype=out_dtype or weight.dtype)
    check_shape("out", out, *shape)
    if out_dtype is not None:
        check_dtype("out", out, out_dtype)
    return out
