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
def product_step_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    rows,
    in_features,
    out_features,
    x_stride,
    SPLITS: tl.constexpr,
    SWIGLU: tl.constexpr,
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
    # Outputs and rows that are not there repeat the last, and are not stored.
    row = weight_ptr + tl.minimum(o_n, out_features - 1).to(tl.int64)[:, None] * in_features
    gate_row = row + out_features.to(tl.int64) * in_features
    x_row = x_ptr + tl.minimum(o_m, rows - 1).to(tl.int64)[:, None] * x_stride
    if PREFETCH:
        lines = tl.arange(0, BLOCK_K // 64) * 64
        for k in range(start, end, BLOCK_K):
            o_line = tl.minimum(k + lines, in_features - 1)[None, :]
            prefetch(row + o_line)
            if SWIGLU:
                prefetch(gate_row + o_line)
    let_next_start(OVERLAP)
    wait_for_inputs(OVERLAP)

    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    y_gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(start, end, BLOCK_K):
        mask = (k + o_k < end)[None, :]
        x = tl.load(x_row + (k + o_k)[None, :], mask, 0)
        if INTERPRETED:  # which multiplies the bits of bfloat16
            x = x.to(tl.float32)
        y = tl.dot(x, tl.load(row + (k + o_k)[None, :], mask, 0).to(x.dtype).trans(), y)
        if SWIGLU:
            gate = tl.load(gate_row + (k + o_k)[None, :], mask, 0).to(x.dtype)
            y_gate = tl.dot(x, gate.trans(), y_gate)
    if SWIGLU:
        y *= silu(y_gate)
    p_out = out_ptr + (i_s * rows + o_m)[:, None].to(tl.int64) * out_features + o_n[None, :]
    y = rounded(y, out_ptr.dtype.element_ty, INTERPRETED)
    tl.store(p_out, y, (o_m < rows)[:, None] & (o_n < out_features)[None, :])


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
    x: Tensor, weight: Tensor, *, swiglu: bool = False, split: bool = False, cut: Cut | None = None
) -> Tensor:
    """x @ weight.T of at most 64 rows; with swiglu, value * silu(gate) of its two halves.

    x:       (rows, in), dtype of `weight`; any stride between its rows that is a multiple of 8
    weight:  (out, in), bfloat16 or float16, in a multiple of 8; with swiglu (2 * out, in), values
             first
    split:   whether the inputs may be split; then out is float32 (splits, rows, out), to be added
             up over the splits
    cut:     for measurements; None takes what was measured
    out:     (rows, out), dtype of `weight`

    Summed in float32, and rounded once.

    Raises:
        ValueError: shapes or dtypes off the contract.
    """
    rows, in_features, out_features = _check(x, weight, swiglu)
    cut = cut or _usual(in_features, out_features, swiglu, split)
    if cut.splits > 1 and not split:
        raise ValueError(f"cut must not split the inputs unless `split`, got {cut.splits}")
    if split:
        out = x.new_empty(cut.splits, rows, out_features, dtype=torch.float32)
    else:
        out = x.new_empty(rows, out_features)
    product_step_kernel[(triton.cdiv(out_features, cut.outputs), cut.splits)](
        x_ptr=x,
        weight_ptr=weight,
        out_ptr=out,
        rows=rows,
        in_features=in_features,
        out_features=out_features,
        x_stride=x.stride(0),
        SPLITS=cut.splits,
        SWIGLU=swiglu,
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
    half = weight.dtype in (torch.bfloat16, torch.float16) and x.dtype == weight.dtype
    return half and x.shape[0] <= MOST_ROWS and x.shape[1] % 8 == 0 and weight.is_contiguous()


def _usual(in_features: int, out_features: int, swiglu: bool, split: bool) -> Cut:
    if swiglu or not split:
        return Cut(outputs=32, inputs=128, splits=1, stages=4, warps=4)
    splits = max(1, min(8, 144 * 32 // out_features, in_features // 256))
    return Cut(outputs=32, inputs=128, splits=splits, stages=4, warps=4)


def _check(x: Tensor, weight: Tensor, swiglu: bool) -> tuple[int, int, int]:
    """Rows, inputs and outputs, if all fit together; else ValueError."""
    if weight.ndim != 2 or 0 in weight.shape or (swiglu and weight.shape[0] % 2):
        wanted = "(2 * out, in)" if swiglu else "(out, in)"
        raise ValueError(f"weight must have shape {wanted}, got {tuple(weight.shape)}")
    if weight.dtype not in (torch.bfloat16, torch.float16) or x.dtype != weight.dtype:
        raise ValueError(
            f"x and weight must be both bfloat16 or float16, got {x.dtype} and {weight.dtype}"
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
