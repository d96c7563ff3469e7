"""A linear layer on some tens of rows, in a step: y = x W^T.

Every weight is read once, which is what it costs. Each program owns some outputs and a stretch of
the inputs, asks for its weights before it waits for the kernel before, and has the next tiles under
way while it multiplies one. Where the inputs are split, the sums of the stretches are left to the
kernel behind, which adds them up in their order; see `rows_step.norm_rows`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from h_net_dynamic_chunking.ops._triton.step_common import (
    check_active,
    check_contiguous,
    check_shape,
    launch_options,
    let_next_start,
    on_its_device,
    prefetch,
    rounded,
    silu,
    wait_for_inputs,
)

MOST_ROWS = 64  # that a program holds


@triton.jit
def plus_product(y, x, weight, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """y + x weight^T. A weight in float32 is the sum of three numbers of bfloat16.

    Tensor cores cut off what they add to a sum. So that it is as exact as float32, a tile of such a
    weight has a sum of its own there, the smallest numbers first, which is rounded when it joins y.
    """
    if weight.dtype == tl.float32:
        high = rounded(weight, DTYPE, INTERPRETED)
        weight -= high.to(tl.float32)
        middle = rounded(weight, DTYPE, INTERPRETED)
        low = rounded(weight - middle.to(tl.float32), DTYPE, INTERPRETED)
        tile = tl.dot(x, low.to(x.dtype).trans())
        tile = tl.dot(x, middle.to(x.dtype).trans(), tile)
        y += tl.dot(x, high.to(x.dtype).trans(), tile)
    else:
        y = tl.dot(x, weight.to(x.dtype).trans(), y)
    return y


@triton.jit
def product_step_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    active_ptr,
    out_ptr,
    rows,
    in_features,
    out_features,
    x_stride,
    SPLITS: tl.constexpr,
    SWIGLU: tl.constexpr,
    BIASED: tl.constexpr,
    HAS_ACTIVE: tl.constexpr,
    PREFETCH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """BLOCK_N outputs of all rows, from one stretch of the inputs."""
    i_s = tl.program_id(1)
    o_m, o_k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    share = tl.cdiv(tl.cdiv(in_features, BLOCK_K), SPLITS) * BLOCK_K
    start = i_s * share
    end = tl.minimum(start + share, in_features)
    # Outputs that are not there repeat the last, and are not stored.
    row = weight_ptr + tl.minimum(o_n, out_features - 1).to(tl.int64)[:, None] * in_features
    gate_row = row + out_features.to(tl.int64) * in_features
    x_row = x_ptr + o_m.to(tl.int64)[:, None] * x_stride
    m_m, m_n = o_m < rows, o_n < out_features
    # What all programs read again and again is x: of rows that rest, nothing. Before the wait, as
    # in `state_step`.
    live = m_m
    if HAS_ACTIVE:
        live = m_m & tl.load(active_ptr + o_m, m_m, False, cache_modifier=".cg")
    if PREFETCH:
        line: tl.constexpr = 1024 // weight_ptr.dtype.element_ty.primitive_bitwidth
        lines = tl.arange(0, BLOCK_K // line) * line
        for k in range(start, end, BLOCK_K):
            o_line = tl.minimum(k + lines, in_features - 1)[None, :]
            prefetch(row + o_line)
            if SWIGLU:
                prefetch(gate_row + o_line)
    let_next_start(OVERLAP)
    wait_for_inputs(OVERLAP)

    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    y_gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    for k in range(start, end, BLOCK_K):
        mask = (k + o_k < end)[None, :]
        x = tl.load(x_row + (k + o_k)[None, :], mask & live[:, None], 0)
        if INTERPRETED:  # which multiplies the bits of bfloat16
            x = x.to(tl.float32)
        y = plus_product(y, x, tl.load(row + (k + o_k)[None, :], mask, 0), dtype, INTERPRETED)
        if SWIGLU:
            gate = tl.load(gate_row + (k + o_k)[None, :], mask, 0)
            y_gate = plus_product(y_gate, x, gate, dtype, INTERPRETED)
    if BIASED:
        y += tl.load(bias_ptr + o_n, m_n, 0).to(tl.float32)[None, :]
    if SWIGLU:
        y *= silu(y_gate)
    p_out = out_ptr + (i_s * rows + o_m)[:, None].to(tl.int64) * out_features + o_n[None, :]
    y = rounded(y, out_ptr.dtype.element_ty, INTERPRETED)
    tl.store(p_out, y, m_m[:, None] & m_n[None, :])


class Cut(NamedTuple):
    """How a product is cut up."""

    outputs: int
    """That a program owns."""
    inputs: int
    """That it multiplies at once."""
    splits: int
    """Programs that share the inputs of an output."""
    stages: int
    """Tiles under way at once."""
    warps: int
    prefetch: bool = True
    """Whether weights are on their way to L2 before the kernel before has ended."""


@on_its_device
def product_step(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    swiglu: bool = False,
    split: bool = False,
    active: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    cut: Cut | None = None,
) -> Tensor:
    """x @ weight.T of at most 64 rows; with swiglu, value * silu(gate) of its two halves.

    x:            (rows, in), bfloat16 or float16; any stride between its rows that is a multiple
                  of 8
    weight:       (out, in), in a multiple of 8, in the dtype of x, or float32 beside bfloat16; with
                  swiglu (2 * out, in), values first
    bias:         (out,), float; not with swiglu or split
    split:        whether the inputs may be split; then out is float32 (splits, rows, out), to be
                  added up over the splits
    active:       bool (rows,), or None for all. The others have x = 0
    out_dtype:    of a product that is not split; None for the dtype of x
    cut:          for measurements; None takes what was measured
    out:          (rows, out)

    Summed in float32, and rounded once.

    Raises:
        ValueError: shapes or dtypes off the contract.
    """
    rows, in_features, out_features = _check(x, weight, swiglu)
    cut = cut or _usual(in_features, out_features, swiglu, split)
    if not split and cut.splits > 1:
        raise ValueError(f"cut must not split the inputs unless `split`, got {cut.splits}")
    if bias is not None:
        if swiglu or split:
            raise ValueError("bias must be None with swiglu or split")
        check_contiguous("bias", bias, out_features)
    check_active(active, rows)
    if split:
        out = x.new_empty(cut.splits, rows, out_features, dtype=torch.float32)
    else:
        out = x.new_empty(rows, out_features, dtype=out_dtype)
    product_step_kernel[(triton.cdiv(out_features, cut.outputs), cut.splits)](
        x_ptr=x,
        weight_ptr=weight,
        bias_ptr=x if bias is None else bias,
        active_ptr=x if active is None else active,
        out_ptr=out,
        rows=rows,
        in_features=in_features,
        out_features=out_features,
        x_stride=x.stride(0),
        SPLITS=cut.splits,
        SWIGLU=swiglu,
        BIASED=bias is not None,
        HAS_ACTIVE=active is not None,
        PREFETCH=cut.prefetch and x.is_cuda,
        BLOCK_M=max(16, triton.next_power_of_2(rows)),
        BLOCK_N=cut.outputs,
        BLOCK_K=cut.inputs,
        num_warps=cut.warps,
        num_stages=cut.stages,
        **launch_options(x),
    )
    return out


def fits_product_step(x: Tensor, weight: Tensor) -> bool:
    """Whether x (rows, in) and such a weight go to the kernel."""
    fits = x.shape[0] <= MOST_ROWS and x.shape[1] % 8 == 0 and weight.is_contiguous()
    return fits and _fit(x.dtype, weight.dtype)


def _fit(x: torch.dtype, weight: torch.dtype) -> bool:
    if weight == torch.float32:
        return x == torch.bfloat16
    return x == weight and x in (torch.bfloat16, torch.float16)


def _usual(in_features: int, out_features: int, swiglu: bool, split: bool) -> Cut:
    """Near the best of some, for the products of hnet_1stage_L on 43 of 64 rows (H200)."""
    splits = 1
    if split:
        outputs, programs = (64, 120) if in_features > 2048 else (32, 144)
        splits = max(1, min(8, programs * outputs // out_features, in_features // 256))
    elif swiglu:
        outputs = 32
    else:
        outputs = 64 if out_features > 2048 else 32 if out_features > 1024 else 16
    return Cut(outputs, 128, splits, stages=4, warps=4, prefetch=not swiglu)


def _check(x: Tensor, weight: Tensor, swiglu: bool) -> tuple[int, int, int]:
    """Rows, inputs and outputs, if all fit together; else ValueError."""
    if weight.ndim != 2 or 0 in weight.shape or (swiglu and weight.shape[0] % 2):
        wanted = "(2 * out, in)" if swiglu else "(out, in)"
        raise ValueError(f"weight must have shape {wanted}, got {tuple(weight.shape)}")
    if not _fit(x.dtype, weight.dtype):
        raise ValueError(
            "x and weight must be both bfloat16 or float16, or weight float32 beside bfloat16, "
            f"got {x.dtype} and {weight.dtype}"
        )
    outputs, in_features = weight.shape
    check_contiguous("weight", weight, outputs, in_features)
    rows = x.shape[0]
    check_shape("x", x, rows, in_features)
    if not 1 <= rows <= MOST_ROWS:
        raise ValueError(f"x must have 1 to {MOST_ROWS} rows, got {rows}")
    if in_features % 8 or x.stride(0) % 8:
        raise ValueError(f"inputs and strides must be multiples of 8, got {in_features}")
    return rows, in_features, outputs // 2 if swiglu else outputs
