"""A linear layer on one row, with what stands around it in a step: y = f(x) W^T.

Every weight is read once, which is what a step costs; the rest must hide behind it. Each program
owns a few outputs, and has their weights under way before it waits for the kernel before. A norm
needs no pass of its own: its scale is one number, so that the product runs on x times the weights
of the norm, and the sum of squares beside it.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from h_net_dynamic_chunking.ops._triton.conv_step import (
    Convolution,
    convolution_arguments,
    convolved,
    sum_of_window,
)
from h_net_dynamic_chunking.ops._triton.step_common import (
    check_active,
    check_contiguous,
    check_dtype,
    check_shape,
    launch_options,
    let_next_start,
    load_flag,
    load_gated,
    on_its_device,
    rounded,
    silu,
    wait_for_inputs,
)

_MOST_INPUTS = 4096  # that a program reads at once


@triton.jit
def linear_step_kernel(
    x_ptr,
    gate_ptr,
    norm_ptr,
    weight_ptr,
    bias_ptr,
    active_ptr,
    residual_ptr,
    out_ptr,
    window_ptr,
    conv_weight_ptr,
    conv_bias_ptr,
    conv_out_ptr,
    in_features,
    out_features,
    conv_first,
    channels,
    eps,
    GATED: tl.constexpr,
    NORMED: tl.constexpr,
    SWIGLU: tl.constexpr,
    BIASED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    HAS_ACTIVE: tl.constexpr,
    TAPS: tl.constexpr,
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
    if TAPS > 0:
        o_c = o_n - conv_first
        m_c = (o_c >= 0) & (o_c < channels) & load_flag(active_ptr, HAS_ACTIVE)
        window = window_ptr + o_c * (TAPS - 1)
        taps = conv_weight_ptr + o_c * TAPS
        of_window = sum_of_window(window, taps, conv_bias_ptr + o_c, m_c, TAPS)
    wait_for_inputs(OVERLAP)

    y = tl.zeros((BLOCK_N,), tl.float32)
    y_gate = tl.zeros((BLOCK_N,), tl.float32)
    squares = tl.zeros((BLOCK_K,), tl.float32)
    for k in range(0, in_features, BLOCK_K):
        o_k = k + o_i
        x = load_gated(x_ptr, gate_ptr, o_k, o_k < in_features, GATED)
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
        y += tl.load(residual_ptr + o_n, m_n, 0).to(tl.float32)
    y = rounded(y, out_ptr.dtype.element_ty, INTERPRETED)
    if TAPS > 0:
        conv_out = convolved(of_window, y, window, taps, m_c, TAPS)
        tl.store(conv_out_ptr + o_c, conv_out, m_c)
    tl.store(out_ptr + o_n, y, m_n)


class Blocks(NamedTuple):
    """How a launch is cut up."""

    outputs: int
    """That a program owns."""
    inputs: int
    """That it reads at once."""
    warps: int


@on_its_device
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
    convolution: Convolution | None = None,
    active: Tensor | None = None,
    begins: bool = False,
    blocks: Blocks | None = None,
) -> Tensor:
    """f(x) @ weight.T of one row; f is gate, then norm, each where it is given.

    x:            (1, in), float
    weight:       (out, in), float32, bfloat16 or float16; with swiglu (2 * out, in), values first
    norm_weight:  (in,): RMSNorm of x, in float32
    gate:         (1, in): x silu(gate) stands for x
    residual:     (1, out), float: what y is added to, which is float32 and changes in place
                  unless `out` is given
    swiglu:       y = value * silu(gate) of the two halves of the product
    bias:         (out,); with swiglu (2 * out,)
    out:          (1, out), where y is written; else it is allocated, in `out_dtype`, or in the
                  dtype of `weight`
    convolution:  of some of the outputs, in their dtype
    active:       bool (1,), or None: whether it may move its window on
    begins:       whether to start only when all kernels before have ended
    blocks:       for measurements; None takes what was measured

    Everything is float32 (float32 weights without tf32), and y is rounded once.

    Raises:
        ValueError: not one row, shapes or dtypes off the contract.
    """
    in_features, out_features = _check(x, weight, norm_weight, gate, bias, swiglu)
    out = _output(x, weight, residual, out, out_dtype, (1, out_features))
    check_active(active, 1)
    if convolution is not None:
        convolution.check(1, out.dtype, out_features)
    blocks = blocks or _blocks(in_features, out_features, weight.dtype, swiglu)
    linear_step_kernel[(triton.cdiv(out_features, blocks.outputs),)](
        x_ptr=x,
        gate_ptr=x if gate is None else gate,
        norm_ptr=x if norm_weight is None else norm_weight,
        weight_ptr=weight,
        bias_ptr=x if bias is None else bias,
        active_ptr=x if active is None else active,
        residual_ptr=x if residual is None else residual,
        out_ptr=out,
        in_features=in_features,
        out_features=out_features,
        eps=eps,
        GATED=gate is not None,
        NORMED=norm_weight is not None,
        SWIGLU=swiglu,
        BIASED=bias is not None,
        RESIDUAL=residual is not None,
        HAS_ACTIVE=active is not None,
        BLOCK_N=blocks.outputs,
        BLOCK_K=blocks.inputs,
        num_warps=blocks.warps,
        **convolution_arguments(convolution, x),
        **launch_options(x, begins),
    )
    return out


def _blocks(in_features: int, out_features: int, dtype: torch.dtype, swiglu: bool) -> Blocks:
    """Near the best of some tens, for the products of hnet_1stage_L on one H200 (bfloat16)."""
    if dtype == torch.float32:
        return Blocks(4, 1024, 4)
    if out_features > 2048:  # enough programs, each with less under way
        return Blocks(8 // (1 + swiglu), 512, 4 // (1 + swiglu))
    return Blocks(4, min(_MOST_INPUTS, triton.next_power_of_2(in_features)), 4)


def _check(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    gate: Tensor | None,
    bias: Tensor | None,
    swiglu: bool,
) -> tuple[int, int]:
    """Inputs and outputs, if all fit together; else ValueError."""
    if weight.ndim != 2 or 0 in weight.shape or (swiglu and weight.shape[0] % 2):
        wanted = "(2 * out, in)" if swiglu else "(out, in)"
        raise ValueError(f"weight must have shape {wanted}, got {tuple(weight.shape)}")
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"weight must be float32, bfloat16 or float16, got {weight.dtype}")
    outputs, in_features = weight.shape
    check_contiguous("weight", weight, outputs, in_features)
    check_shape("x", x, 1, in_features)
    if gate is not None:
        check_shape("gate", gate, 1, in_features)
    if norm_weight is not None:
        check_contiguous("norm_weight", norm_weight, in_features)
    if bias is not None:
        check_contiguous("bias", bias, outputs)
    return in_features, outputs // 2 if swiglu else outputs


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
        check_shape("residual", residual, *shape)
        if out is None:
            if out_dtype is not None:
                raise ValueError("out_dtype must be None where y is added to a residual in place")
            check_dtype("residual", residual, torch.float32)
            return residual
    if out is None:
        return x.new_empty(shape, dtype=out_dtype or weight.dtype)
    check_shape("out", out, *shape)
    if out_dtype is not None:
        check_dtype("out", out, out_dtype)
    return out
