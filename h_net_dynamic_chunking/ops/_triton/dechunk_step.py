"""Smoothing and the way up for one position of each row, eq. (5) to (9); see `ops.ema`."""

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
    load_flag,
    on_its_device,
    rounded,
    wait_for_inputs,
)

_CHANNELS = 256  # a program


@triton.jit
def dechunk_step_kernel(
    z_ptr,
    smoothed_ptr,
    p_ptr,
    boundary_ptr,
    residual_ptr,
    out_ptr,
    dim,
    z_stride,
    residual_stride,
    clamp,
    HAS_RESIDUAL: tl.constexpr,
    WEIGH_INPUT: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    let_next_start(OVERLAP)
    wait_for_inputs(OVERLAP)
    i_m = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = o_d < dim
    opens = load_flag(boundary_ptr + i_m, True)
    p = tl.load(p_ptr + i_m).to(tl.float32)
    p = tl.where(p < clamp, clamp, tl.where(p > 1 - clamp, 1 - clamp, p))
    p_smoothed = smoothed_ptr + i_m * dim + o_d
    smoothed = tl.load(p_smoothed, mask, 0)
    z = tl.load(z_ptr + i_m * z_stride + o_d, mask & opens, 0).to(tl.float32)
    if WEIGH_INPUT:
        z *= p
    smoothed = tl.where(opens, z + (1 - p) * smoothed, smoothed)
    tl.store(p_smoothed, smoothed, mask & opens)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + i_m * residual_stride + o_d, mask, 0)
        smoothed += residual.to(tl.float32)
    out = rounded(smoothed, out_ptr.dtype.element_ty, INTERPRETED)
    tl.store(out_ptr + i_m * dim + o_d, out, mask)


@on_its_device
def dechunk_step(
    z: Tensor,
    smoothed: Tensor,
    p: Tensor,
    boundary: Tensor,
    residual: Tensor | None,
    out_dtype: torch.dtype,
    clamp: float | None = None,
    weigh_input: bool = True,
) -> Tensor:
    """s <- p z + (1 - p) s in the rows that open a chunk, in place; returns s + residual of all.

    z:          (rows, dim or more), float: what came back for the chunk; its first dim channels
                count, and only in the rows of a boundary: the others may hold anything, NaN too
    smoothed:   (rows, dim), float32: the vector of the current chunk
    p:          (rows,), float: probability of the boundary
    boundary:   bool (rows,): which rows open a chunk
    residual:   (rows, dim), float, or None
    clamp:      bound p to [clamp, 1 - clamp] here, in [0, 0.5); None for [0, 1]
    weigh_input: whether z is multiplied by p; else s <- z + (1 - p) s
    out:        (rows, dim), `out_dtype`; the sum is taken in float32

    Raises:
        ValueError: shapes, dtypes or a clamp off the contract.
    """
    if smoothed.ndim != 2:
        raise ValueError(f"smoothed must be (rows, dim), got {tuple(smoothed.shape)}")
    rows, dim = smoothed.shape
    check_contiguous("smoothed", smoothed, rows, dim)
    check_dtype("smoothed", smoothed, torch.float32)
    if z.ndim != 2 or z.shape[0] != rows or z.shape[1] < dim:
        raise ValueError(f"z must be ({rows}, {dim} or more), got {tuple(z.shape)}")
    check_shape("z", z, *z.shape)
    check_contiguous("p", p, rows)
    check_contiguous("boundary", boundary, rows)
    check_dtype("boundary", boundary, torch.bool)
    if residual is not None:
        check_shape("residual", residual, rows, dim)
    if clamp is not None and not 0 <= clamp < 0.5:
        raise ValueError(f"clamp must be None or in [0, 0.5), got {clamp}")
    out = smoothed.new_empty(rows, dim, dtype=out_dtype)
    dechunk_step_kernel[(rows, triton.cdiv(dim, _CHANNELS))](
        z_ptr=z,
        smoothed_ptr=smoothed,
        p_ptr=p,
        boundary_ptr=boundary,
        residual_ptr=smoothed if residual is None else residual,
        out_ptr=out,
        dim=dim,
        z_stride=z.stride(0),
        residual_stride=0 if residual is None else residual.stride(0),
        clamp=0.0 if clamp is None else clamp,
        HAS_RESIDUAL=residual is not None,
        WEIGH_INPUT=weigh_input,
        BLOCK=_CHANNELS,
        num_warps=2,
        **launch_options(z),
    )
    return out
