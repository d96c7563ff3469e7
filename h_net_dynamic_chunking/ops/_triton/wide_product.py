"""y = x W^T of bfloat16 vectors in float32, W as a sum of bfloat16 parts, as exact as in float32.

Tensor cores (H200) add 16 products at a time to a sum: all are cut off 2 bits behind the last of
the largest, and the result is cut to float32. All cuts go toward zero, so that their errors add up:
over 256 terms it was 4 times the error of float32, over 1024 it is 9 times (emulated, which repeats
the 256 bit by bit). So a sum there is of PIECE terms, and is rounded when it joins y.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from h_net_dynamic_chunking.ops._triton.common import cdiv, launch

# Terms of a sum in the tensor cores. Over 256 terms the largest error was 1.1 times that of float32
# with 64 and 1.8 with 128 (emulated), of 4 that it was with all.
PIECE = 64
_STAGES = 3


@triton.jit(do_not_specialize=["rows"])
def wide_product_kernel(
    x,
    high,
    middle,
    low,
    bias,
    y,
    rows,
    BIASED: tl.constexpr,
    SPLIT: tl.constexpr,
    X_ROW: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """SPLIT: the weight is high + middle + low; else it is high."""
    # The tiles of the same rows are neighbours: x is read once, the weight stays in L2.
    tiles: tl.constexpr = (OUT + BLOCK_N - 1) // BLOCK_N
    i_m, i_n = tl.program_id(0).to(tl.int64) // tiles, tl.program_id(0) % tiles
    o_m, o_n = i_m * BLOCK_M + tl.arange(0, BLOCK_M), i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m, m_n = (o_m < rows)[:, None], (o_n < OUT)[None, :]
    x, o_row = x + o_m[:, None] * X_ROW, o_n[None, :] * IN
    HALF: tl.constexpr = PIECE // 2
    b_y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in tl.range(0, IN, PIECE, num_stages=STAGES):
        # A piece begins with one product and ends with another: the sum of y and of one alone
        # Triton would leave to the tensor cores. The small parts come first.
        if SPLIT:
            o_k = i + tl.arange(0, PIECE)
            b_x = _tile(x, o_k[None, :], m_m & (o_k < IN)[None, :], INTERPRETED)
            o, m = o_row + o_k[:, None], m_n & (o_k < IN)[:, None]
            b_sum = tl.dot(b_x, _tile(low, o, m, INTERPRETED))
            b_sum = tl.dot(b_x, _tile(middle, o, m, INTERPRETED), b_sum)
            b_y += tl.dot(b_x, _tile(high, o, m, INTERPRETED), b_sum)
        else:
            o_k = i + tl.arange(0, HALF)
            b_x = _tile(x, o_k[None, :], m_m & (o_k < IN)[None, :], INTERPRETED)
            o, m = o_row + o_k[:, None], m_n & (o_k < IN)[:, None]
            b_sum = tl.dot(b_x, _tile(high, o, m, INTERPRETED))
            m_k = o_k < IN - HALF
            b_x = _tile(x + HALF, o_k[None, :], m_m & m_k[None, :], INTERPRETED)
            b_y += tl.dot(b_x, _tile(high + HALF, o, m_n & m_k[:, None], INTERPRETED), b_sum)
    if BIASED:
        b_y += tl.load(bias + o_n, mask=o_n < OUT, other=0).to(tl.float32)[None, :]
    tl.store(y + o_m[:, None] * OUT + o_n[None, :], b_y, mask=m_m & m_n)


@triton.jit
def _tile(pointer, offsets, mask, INTERPRETED: tl.constexpr):
    b_tile = tl.load(pointer + offsets, mask=mask, other=0)
    if INTERPRETED:  # which multiplies the bits of bfloat16
        b_tile = b_tile.to(tl.float32)
    return b_tile


def wide_product(x: Tensor, parts: list[Tensor], bias: Tensor | None) -> Tensor:
    """y (rows, out) in float32.

    x:      (rows, in), bfloat16
    parts:  one or three of (out, in), bfloat16, contiguous, the largest first: W is their sum
    bias:   (out,), float, or None
    """
    rows, features = x.shape
    outputs = len(parts[0])
    x = x if x.stride(1) == 1 else x.contiguous()
    y = torch.empty(rows, outputs, dtype=torch.float32, device=x.device)
    block_m, block_n, warps = (64, 32, 4) if rows <= 64 else (128, 128, 8)
    of_piece = PIECE * (block_m + len(parts) * block_n) * x.element_size()
    launch(
        wide_product_kernel,
        cdiv(rows, block_m) * cdiv(outputs, block_n),
        {
            "x": x,
            "high": parts[0],
            "middle": parts[len(parts) // 2],
            "low": parts[-1],
            "bias": y if bias is None else bias.contiguous(),
            "y": y,
            "rows": rows,
        },
        {
            "BIASED": bias is not None,
            "SPLIT": len(parts) > 1,
            "X_ROW": x.stride(0),
            "IN": features,
            "OUT": outputs,
            "PIECE": PIECE,
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "STAGES": max(1, min(_STAGES, _shared_memory(x.device) // of_piece)),
            "INTERPRETED": not x.is_cuda,
        },
        num_warps=warps,
    )
    return y


@cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that a program may have; of the smallest GPU where there is none."""
    if device.type != "cuda":
        return 99 << 10
    utilities = triton.runtime.driver.active.utils
    return int(utilities.get_device_properties(device.index)["max_shared_mem"])
