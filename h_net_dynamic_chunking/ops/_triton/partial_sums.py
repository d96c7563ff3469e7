"""Sums of what programs leave behind: the order is fixed, so that the result is always the same."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from h_net_dynamic_chunking.ops._triton.common import cdiv, launch

_ROWS, _COLUMNS = 64, 32
_LONG = 256


@triton.jit(do_not_specialize=["parts"])
def column_sums_kernel(
    partial, out, parts, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    o_d = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    b_sum = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for i in range(0, parts, ROWS):
        o_p = i + tl.arange(0, ROWS)
        m_part = (o_p < parts)[:, None] & (o_d < D)[None, :]
        b_sum += tl.load(partial + o_p[:, None] * D + o_d[None, :], mask=m_part, other=0)
    b_out = tl.sum(b_sum, axis=0).to(out.dtype.element_ty)
    tl.store(out + o_d, b_out, mask=o_d < D)


@triton.jit(do_not_specialize=["T"])
def few_sums_kernel(partial, out, T, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    T = tl.cast(T, tl.int64)
    o_t = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_sum = tl.zeros([BLOCK], dtype=tl.float32)
    for i in tl.static_range(PARTS):
        b_sum += tl.load(partial + i * T + o_t, mask=o_t < T, other=0)
    tl.store(out + o_t, b_sum, mask=o_t < T)


def few_sums(partial: Tensor) -> Tensor:
    """As `column_sums`, float32, of a few long parts; torch's own takes twice the time (H200)."""
    parts, total = partial.shape
    if parts == 1:
        return partial[0]
    out = partial.new_empty(total)
    launch(
        few_sums_kernel,
        cdiv(total, _LONG),
        {"partial": partial, "out": out, "T": total},
        {"PARTS": parts, "BLOCK": _LONG},
        num_warps=2,
    )
    return out


def column_sums(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """(parts, dim) float32 -> (dim,), rounded once."""
    parts, dim = partial.shape
    out = torch.empty(dim, dtype=dtype, device=partial.device)
    launch(
        column_sums_kernel,
        cdiv(dim, _COLUMNS),
        {"partial": partial, "out": out, "parts": parts},
        {"D": dim, "ROWS": _ROWS, "COLUMNS": _COLUMNS},
        num_warps=4,
    )
    return out
