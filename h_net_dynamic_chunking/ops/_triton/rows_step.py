"""What stands between the matrix products of a step on several rows, each one pass."""

from collections.abc import Sequence

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
    rounded,
    silu,
    wait_for_inputs,
)

_CHANNELS = 1024  # that a program of the SwiGLU handles


@triton.jit
def norm_rows_kernel(
    x_ptr,
    add_ptr,
    mean_square_ptr,
    keep_ptr,
    norm_ptr,
    active_ptr,
    count_ptrs,
    out_ptr,
    width,
    x_stride,
    add_stride,
    mean_square_parts,
    eps,
    ADDED: tl.constexpr,
    SCALED: tl.constexpr,
    KEPT: tl.constexpr,
    COUNTS: tl.constexpr,
    BEGINS: tl.constexpr,
    HAS_ACTIVE: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One row."""
    if BEGINS:
        wait_for_inputs(OVERLAP)
    let_next_start(OVERLAP)
    i_m = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, BLOCK)
    m_k = o_k < width
    p_out = out_ptr + i_m * width + o_k
    live = load_flag(active_ptr + i_m, HAS_ACTIVE)
    weight = tl.load(norm_ptr + o_k, m_k, 0).to(tl.float32)
    wait_for_inputs(OVERLAP)
    if not live:
        tl.store(p_out, tl.zeros((BLOCK,), tl.float32), m_k)
        return
    for i in tl.static_range(COUNTS):
        tl.store(count_ptrs[i] + i_m, tl.load(count_ptrs[i] + i_m) + 1)
    x_ptr += i_m * x_stride
    x = tl.load(x_ptr + o_k, m_k, 0).to(tl.float32)
    if ADDED > 0:
        added = tl.zeros((BLOCK,), tl.float32)
        for part in tl.static_range(ADDED):
            p_add = add_ptr + part * add_stride + i_m * width + o_k
            added += tl.load(p_add, m_k, 0).to(tl.float32)
        if SCALED > 0:
            o_s = tl.arange(0, SCALED)
            row = mean_square_ptr + i_m * mean_square_parts
            squares = tl.load(row + o_s, o_s < mean_square_parts, 0)
            added *= tl.rsqrt(tl.sum(squares, 0) + eps)
        x += added
        tl.store(x_ptr + o_k, x, m_k)
    if KEPT:
        tl.store(keep_ptr + i_m * width + o_k, x, m_k)
    x *= tl.rsqrt(tl.sum(x * x, 0) / width + eps)
    x *= weight
    tl.store(p_out, rounded(x, out_ptr.dtype.element_ty, INTERPRETED), m_k)


@triton.jit
def swiglu_rows_kernel(
    product_ptr,
    out_ptr,
    width,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A block of channels of one row."""
    let_next_start(OVERLAP)
    wait_for_inputs(OVERLAP)
    i_m = tl.program_id(0).to(tl.int64)
    o_k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_k = o_k < width
    product_ptr += i_m * 2 * width
    value = tl.load(product_ptr + o_k, m_k, 0).to(tl.float32)
    y = value * silu(tl.load(product_ptr + width + o_k, m_k, 0).to(tl.float32))
    tl.store(out_ptr + i_m * width + o_k, rounded(y, out_ptr.dtype.element_ty, INTERPRETED), m_k)


@on_its_device
def norm_rows(
    x: Tensor,
    norm_weight: Tensor,
    *,
    add: Tensor | None = None,
    mean_square: Tensor | None = None,
    keep: Tensor | None = None,
    active: Tensor | None = None,
    count: Sequence[Tensor] = (),
    begins: bool = False,
    eps: float = 1e-5,
) -> Tensor:
    """RMSNorm of x + add, in the dtype of `norm_weight`.

    x:            (rows, width), float, with any stride between its rows; float32 with `add`, which
                  is added to it in place
    norm_weight:  (width,)
    add:          (rows, width), float, contiguous; or (parts, rows, width), added up first
    mean_square:  float32 (rows, parts), of `state_step`: `add` is divided by the root of their sum
    keep:         float32 (rows, width): gets x
    active:       bool (rows,), or None for all. The others change nothing
    count:        int64 (rows,) each: become one more in rows that are active
    begins:       whether kernels behind are to start only when all before this one have ended
    out:          (rows, width), rounded once; zeros where a row is not active

    Raises:
        ValueError: shapes or dtypes off the contract.
    """
    rows, width = x.shape
    check_shape("x", x, rows, width)
    check_contiguous("norm_weight", norm_weight, width)
    if add is not None:
        check_contiguous("add", add, *add.shape[:-2], rows, width)
        check_dtype("x", x, torch.float32)
    parts = 0 if mean_square is None else mean_square.shape[-1]
    if mean_square is not None:
        check_contiguous("mean_square", mean_square, rows, parts)
        check_dtype("mean_square", mean_square, torch.float32)
    if keep is not None:
        check_contiguous("keep", keep, rows, width)
        check_dtype("keep", keep, torch.float32)
    for counted in count:
        check_contiguous("count", counted, rows)
        check_dtype("count", counted, torch.int64)
    check_active(active, rows)
    recorded = x.is_cuda and torch.cuda.is_current_stream_capturing()
    out = norm_weight.new_empty(rows, width)
    norm_rows_kernel[(rows,)](
        x_ptr=x,
        add_ptr=x if add is None else add,
        mean_square_ptr=x if mean_square is None else mean_square,
        keep_ptr=x if keep is None else keep,
        norm_ptr=norm_weight,
        active_ptr=x if active is None else active,
        count_ptrs=tuple(count) or (x,),
        out_ptr=out,
        width=width,
        x_stride=x.stride(0),
        add_stride=rows * width,
        mean_square_parts=parts,
        eps=eps,
        ADDED=0 if add is None else add.numel() // (rows * width),
        SCALED=0 if mean_square is None else triton.next_power_of_2(parts),
        KEPT=keep is not None,
        COUNTS=len(count),
        BEGINS=begins,
        HAS_ACTIVE=active is not None,
        BLOCK=triton.next_power_of_2(width),
        num_warps=4,
        **launch_options(x, begins and not recorded),
    )
    return out


@on_its_device
def swiglu_rows(product: Tensor) -> Tensor:
    """value * silu(gate) of the halves of (rows, 2 * width), values first: (rows, width).

    Raises:
        ValueError: not such a contiguous tensor.
    """
    if product.ndim != 2 or product.shape[1] % 2 or not product.is_contiguous():
        raise ValueError(
            f"product must be contiguous (rows, 2 * width), got {tuple(product.shape)}, strides "
            f"{product.stride()}"
        )
    rows, width = product.shape[0], product.shape[1] // 2
    out = product.new_empty(rows, width)
    swiglu_rows_kernel[(rows, triton.cdiv(width, _CHANNELS))](
        product_ptr=product,
        out_ptr=out,
        width=width,
        BLOCK=_CHANNELS,
        num_warps=4,
        **launch_options(product),
    )
    return out
