"""A linear layer on few rows, with what stands around it in a step: y = f(x) W^T.

Every weight is read once, which is what a step costs; the rest must hide behind it. A norm needs no
pass of its own: its scale is one number a row, so that the product runs on x times the weights of
the norm, and the sum of squares beside it.

    one row     each program owns a few outputs, and has their weights under way before it waits for
                the kernel before
    more rows   each program owns a block of outputs for all rows, and multiplies tiles on the
                matrix units
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from h_net_dynamic_chunking.ops._triton.step_common import (
    check_contiguous,
    check_dtype,
    check_shape,
    launch_options,
    let_next_start,
    prefetch,
    rounded,
    silu,
    wait_for_inputs,
)

_MAX_ROWS = 128
_ROW_INPUTS = 4096  # that a program for one row reads at once
_NORM_BLOCK = 512  # inputs that four warps square at once, 16 bytes a thread in float32


@triton.jit
def load_gated(x_ptr, gate_ptr, x_offset, gate_offset, mask, GATED: tl.constexpr):
    """x silu(gate), or x, in float32."""
    x = tl.load(x_ptr + x_offset, mask, 0).to(tl.float32)
    if GATED:
        x *= silu(tl.load(gate_ptr + gate_offset, mask, 0).to(tl.float32))
    return x


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
    let_next_start(OVERLAP)
    wait_for_inputs(OVERLAP)
    i_m = tl.program_id(0)
    x_ptr += i_m.to(tl.int64) * x_stride
    gate_ptr += i_m.to(tl.int64) * gate_stride
    out_ptr += i_m.to(tl.int64) * width
    scale = 1.0
    if NORMED:
        squares = tl.zeros((BLOCK_K,), tl.float32)
        for k in range(0, width, BLOCK_K):
            o_k = k + tl.arange(0, BLOCK_K)
            x = load_gated(x_ptr, gate_ptr, o_k, o_k, o_k < width, GATED)
            squares += x * x
        scale = tl.rsqrt(tl.sum(squares, 0) / width + eps)
    for k in range(0, width, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        x = load_gated(x_ptr, gate_ptr, o_k, o_k, o_k < width, GATED)
        if NORMED:
            x = x * scale * tl.load(norm_ptr + o_k, o_k < width, 0).to(tl.float32)
        x = rounded(x, out_ptr.dtype.element_ty, INTERPRETED)
        tl.store(out_ptr + o_k, x, o_k < width)


@triton.jit
def one_row_kernel(
    x_ptr,
    gate_ptr,
    norm_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    in_features,
    out_features,
    eps,
    GATED: tl.constexpr,
    NORMED: tl.constexpr,
    SWIGLU: tl.constexpr,
    BIASED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    let_next_start(OVERLAP)
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_i = tl.arange(0, BLOCK_K)
    m_n = o_n < out_features
    p_value = weight_ptr + o_n.to(tl.int64)[:, None] * in_features + o_i[None, :]
    p_gate = p_value + out_features.to(tl.int64) * in_features
    m_w = m_n[:, None] & (o_i < in_features)[None, :]
    value = tl.load(p_value, m_w, 0)
    if SWIGLU:
        value_gate = tl.load(p_gate, m_w, 0)
    wait_for_inputs(OVERLAP)

    y = tl.zeros((BLOCK_N,), tl.float32)
    y_gate = tl.zeros((BLOCK_N,), tl.float32)
    squares = tl.zeros((BLOCK_K,), tl.float32)
    for k in range(0, in_features, BLOCK_K):
        o_k = k + o_i
        x = load_gated(x_ptr, gate_ptr, o_k, o_k, o_k < in_features, GATED)
        if NORMED:
            squares += x * x
            x *= tl.load(norm_ptr + o_k, o_k < in_features, 0).to(tl.float32)
        y += tl.sum(value.to(tl.float32) * x[None, :], 1)
        if SWIGLU:
            y_gate += tl.sum(value_gate.to(tl.float32) * x[None, :], 1)
        m_w = m_n[:, None] & (o_k + BLOCK_K < in_features)[None, :]
        value = tl.load(p_value + k + BLOCK_K, m_w, 0)
        if SWIGLU:
            value_gate = tl.load(p_gate + k + BLOCK_K, m_w, 0)

    if NORMED:
        scale = tl.rsqrt(tl.sum(squares, 0) / in_features + eps)
        y *= scale
        y_gate *= scale
    if BIASED:
        y += tl.load(bias_ptr + o_n, m_n, 0).to(tl.float32)
    if SWIGLU:
        if BIASED:
            y_gate += tl.load(bias_ptr + out_features + o_n, m_n, 0).to(tl.float32)
        y *= silu(y_gate)
    if RESIDUAL:
        y += tl.load(out_ptr + o_n, m_n, 0)
    tl.store(out_ptr + o_n, rounded(y, out_ptr.dtype.element_ty, INTERPRETED), m_n)


@triton.jit
def add_product(y, x, w, INTERPRETED: tl.constexpr):
    """y + x @ w in float32."""
    if INTERPRETED:  # it would take the bits of bfloat16 for integers
        x, w = x.to(tl.float32), w.to(tl.float32)
    return tl.dot(x, w, y, input_precision="ieee")


@triton.jit
def prefetch_rows(weight_ptr, o_n, in_features, out_features, LINE: tl.constexpr):
    """Bring the rows o_n of the weights to L2, LINE elements being 128 bytes."""
    rows = weight_ptr + tl.minimum(o_n, out_features - 1).to(tl.int64) * in_features
    for k in range(0, in_features, 16 * LINE):
        o_k = tl.minimum(k + tl.arange(0, 16) * LINE, in_features - 1)
        prefetch(rows[:, None] + o_k[None, :])


# Not compiled anew for a batch of a multiple of 16.
@triton.jit(do_not_specialize=["rows"])
def rows_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    rows,
    in_features,
    out_features,
    x_stride,
    out_stride,
    SWIGLU: tl.constexpr,
    BIASED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    let_next_start(OVERLAP)
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    line: tl.constexpr = 1024 // dtype.primitive_bitwidth
    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m, m_n = o_m < rows, o_n < out_features
    p_value = weight_ptr + o_n.to(tl.int64)[None, :] * in_features
    p_gate = p_value + out_features.to(tl.int64) * in_features
    if OVERLAP:
        prefetch_rows(weight_ptr, o_n, in_features, out_features, line)
        if SWIGLU:
            gate_rows = weight_ptr + out_features.to(tl.int64) * in_features
            prefetch_rows(gate_rows, o_n, in_features, out_features, line)
    wait_for_inputs(OVERLAP)

    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    y_gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, in_features, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        m_k = o_k < in_features
        m_x, m_w = m_m[:, None] & m_k[None, :], m_k[:, None] & m_n[None, :]
        p_x = x_ptr + o_m[:, None] * x_stride + o_k[None, :]
        x = rounded(tl.load(p_x, m_x, 0).to(tl.float32), dtype, INTERPRETED)
        y = add_product(y, x, tl.load(p_value + o_k[:, None], m_w, 0), INTERPRETED)
        if SWIGLU:
            y_gate = add_product(y_gate, x, tl.load(p_gate + o_k[:, None], m_w, 0), INTERPRETED)

    if BIASED:
        y += tl.load(bias_ptr + o_n, m_n, 0).to(tl.float32)[None, :]
    if SWIGLU:
        if BIASED:
            y_gate += tl.load(bias_ptr + out_features + o_n, m_n, 0).to(tl.float32)[None, :]
        y *= silu(y_gate)
    p_out = out_ptr + o_m[:, None] * out_stride + o_n[None, :]
    m_out = m_m[:, None] & m_n[None, :]
    if RESIDUAL:
        y += tl.load(p_out, m_out, 0)
    tl.store(p_out, rounded(y, out_ptr.dtype.element_ty, INTERPRETED), m_out)


class Blocks(NamedTuple):
    """How a launch is cut up."""

    outputs: int
    """That a program owns."""
    inputs: int
    """That it reads at once."""
    warps: int
    stages: int
    """Reads under way at a time."""


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
    blocks: Blocks | None = None,
) -> Tensor:
    """f(x) @ weight.T of up to 128 rows; f is gate, then norm, each where it is given.

    x:            (rows, in), float
    weight:       (out, in), float32, bfloat16 or float16; with swiglu (2 * out, in), values first
    norm_weight:  (in,): RMSNorm of x, in float32
    gate:         (rows, in): x silu(gate) stands for x
    residual:     (rows, out), float32: y is added to it in place, and it is what comes back
    swiglu:       y = value * silu(gate) of the two halves of the product
    bias:         (out,); with swiglu (2 * out,)
    out:          (rows, out), where y is written; else it is allocated, in `out_dtype`, or in the
                  dtype of `weight`
    blocks:       for measurements; None takes what was measured

    Products are exact in float32 and summed in it (float32 weights without tf32); y is rounded
    once, and with several rows so is f(x). x, gate, residual and out may be views with any stride
    between their rows. A row's bits do not depend on the other rows, but on how many there are.

    Raises:
        ValueError: no rows or more than 128, shapes or dtypes off the contract.
    """
    rows, in_features, out_features = _check(x, weight, norm_weight, gate, bias, swiglu)
    out = _output(x, weight, residual, out, out_dtype, (rows, out_features))
    # With several rows f(x) is too much for every program to compute for itself.
    if rows > 1 and (norm_weight is not None or gate is not None):
        x, gate, norm_weight = prepare_rows(x, gate, norm_weight, weight.dtype, eps), None, None
    blocks = blocks or _blocks(rows, in_features, out_features, weight.dtype, swiglu)
    options = {
        "x_ptr": x,
        "weight_ptr": weight,
        "bias_ptr": x if bias is None else bias,
        "out_ptr": out,
        "in_features": in_features,
        "out_features": out_features,
        "SWIGLU": swiglu,
        "BIASED": bias is not None,
        "RESIDUAL": residual is not None,
        "BLOCK_N": blocks.outputs,
        "BLOCK_K": blocks.inputs,
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
        **launch_options(x),
    }
    grid = (triton.cdiv(out_features, blocks.outputs),)
    if rows == 1:
        one_row_kernel[grid](
            **options,
            gate_ptr=x if gate is None else gate,
            norm_ptr=x if norm_weight is None else norm_weight,
            eps=eps,
            GATED=gate is not None,
            NORMED=norm_weight is not None,
        )
    else:
        rows_kernel[grid](
            **options,
            rows=rows,
            x_stride=x.stride(0),
            out_stride=out.stride(0),
            BLOCK_M=max(16, triton.next_power_of_2(rows)),
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
        num_warps=4,
        **launch_options(x),
    )
    return prepared


def _blocks(
    rows: int, in_features: int, out_features: int, dtype: torch.dtype, swiglu: bool
) -> Blocks:
    """Near the best of some tens, for the products of hnet_1stage_L on one H200 (bfloat16)."""
    if dtype == torch.float32:
        return Blocks(4, 1024, 4, 1) if rows == 1 else Blocks(16, 32, 4, 2)
    if rows == 1:
        if out_features > 2048:  # enough programs, each with less under way
            return Blocks(8 // (1 + swiglu), 512, 4 // (1 + swiglu), 1)
        return Blocks(4, min(_ROW_INPUTS, triton.next_power_of_2(in_features)), 4, 1)
    if out_features <= 2048:
        return Blocks(32, 256, 4, 4) if rows <= 32 else Blocks(16, 128, 4, 4 if rows > 64 else 6)
    return Blocks(32 if swiglu or rows != 64 else 64, 128, 4, 3 if rows > 64 else 4)


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
