"""Chunks of the state-space recurrence: how a buffer is divided, and the decays inside each chunk.

A buffer is `rows` of `length` positions: one row if it is packed. Each row is divided into chunks
of L positions and its chunks into segments of `span`. What is kept for each chunk and head is laid
out (rows * chunks, heads, L), with zeros for dt where there is no position.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from h_net_dynamic_chunking.ops._triton.common import (
    cdiv,
    halvings,
    launch,
    power_of_2,
    sequence_of,
)
from h_net_dynamic_chunking.ops.ssd import KERNEL_CHUNK_SIZE

# The start of a sequence that positions of none have: no position is at or behind it.
_NOWHERE = tl.constexpr(1 << 30)
_LOG2_E = tl.constexpr(1.4426950408889634)


class Chunks(NamedTuple):
    """One buffer in chunks, all on the device of the buffer."""

    rows: int
    length: int
    size: int
    """L, positions of a chunk."""
    cu: Tensor | None
    dt: Tensor
    """(rows * chunks, heads, L), float32."""
    decay: Tensor
    """(rows * chunks, heads, L), float32: log2 of the decay from before the chunk to there."""
    start: Tensor
    """(rows * chunks, L), int32: where in the row the sequence of each position starts. -1 if the
    state at the start of the row is its own."""

    @property
    def chunks(self) -> int:
        """Of one row."""
        return -(-self.length // self.size)

    @property
    def heads(self) -> int:
        return self.dt.shape[1]

    @property
    def batch(self) -> int:
        """Sequences of a packed buffer."""
        return 0 if self.cu is None else len(self.cu) - 1

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Arguments of every kernel here. Without cu, something in its place that is not read."""
        return {
            "dt": self.dt,
            "decay": self.decay,
            "start": self.start,
            "cu": self.start if self.cu is None else self.cu,
        }

    @property
    def constants(self) -> dict[str, Any]:
        return {"H": self.heads, "L": self.size, "PACKED": self.cu is not None}


@triton.jit
def live_positions(cu, batch, length, PACKED: tl.constexpr):
    """How many positions of a row belong to a sequence."""
    live = length
    if PACKED:
        live = tl.minimum(tl.load(cu + batch).to(tl.int32), length)
    return live


@triton.jit(do_not_specialize=["length", "chunks", "batch", "steps"])
def ssd_chunks_kernel(
    p_dt,
    p_A,
    dt,
    decay,
    start,
    cu,
    length,
    chunks,
    batch,
    steps,
    STRIDE: tl.constexpr,
    CONTINUES: tl.constexpr,
    HEADS: tl.constexpr,
    H: tl.constexpr,
    L: tl.constexpr,
    PACKED: tl.constexpr,
):
    i_c, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_row = i_c // chunks
    o_l = tl.arange(0, L)
    o_t = (i_c % chunks).to(tl.int32) * L + o_l
    o_h = i_h * HEADS + tl.arange(0, HEADS)
    live = live_positions(cu, batch, length, PACKED)
    m_dt = (o_t < live)[:, None] & (o_h < H)[None, :]
    o_row = (i_row * length + o_t)[:, None] * STRIDE
    b_dt = tl.load(p_dt + o_row + o_h[None, :], mask=m_dt, other=0).to(tl.float32)
    b_A = tl.load(p_A + o_h, mask=o_h < H, other=0).to(tl.float32) * _LOG2_E
    o_out = (i_c * H + o_h)[None, :] * L + o_l[:, None]
    m_out = (o_h < H)[None, :] & (o_l >= 0)[:, None]
    tl.store(dt + o_out, b_dt, mask=m_out)
    tl.store(decay + o_out, tl.cumsum(b_dt * b_A[None, :], axis=0), mask=m_out)
    if i_h == 0:
        if PACKED:
            i_b = sequence_of(cu, o_t.to(tl.int64), batch, steps)
            b_start = tl.where(o_t < live, tl.load(cu + i_b).to(tl.int32), _NOWHERE)
        else:
            b_start = tl.zeros([L], tl.int32)
            if CONTINUES:
                b_start -= 1
        tl.store(start + i_c * L + o_l, b_start)


def divide(
    dt: Tensor,
    A: Tensor,
    cu: Tensor | None,
    rows: int,
    dtype: torch.dtype,
    *,
    continues: bool = False,
) -> Chunks:
    """Chunks of a buffer of `dtype`. dt: (rows * length, heads), contiguous in its last dimension.

    continues:  The state at the start of a row need not be zeros.
    """
    total, heads = dt.shape
    length, size = total // max(rows, 1), chunk_size(dtype)
    chunks = cdiv(length, size)
    out_dt = torch.empty(rows * chunks, heads, size, dtype=torch.float32, device=dt.device)
    start = torch.empty(rows * chunks, size, dtype=torch.int32, device=dt.device)
    cu = None if cu is None else cu.contiguous()
    divided = Chunks(rows, length, size, cu, out_dt, torch.empty_like(out_dt), start)
    block = min(32, power_of_2(heads))
    launch(
        ssd_chunks_kernel,
        (rows * chunks, cdiv(heads, block)),
        {
            "p_dt": dt,
            "p_A": A,
            **divided.tensors,
            "length": length,
            "chunks": chunks,
            "batch": divided.batch,
            "steps": halvings(divided.batch),
        },
        {
            "STRIDE": dt.stride(0),
            "CONTINUES": continues,
            "HEADS": block,
            **divided.constants,
        },
        num_warps=4,
    )
    return divided


def chunk_size(dtype: torch.dtype) -> int:
    """L. A long chunk brings few states through memory; and the kernels work by halves of it, whose
    sums over heads fit into registers."""
    return 32 if _is_large(dtype) else KERNEL_CHUNK_SIZE


def stages(dtype: torch.dtype, wanted: int) -> int:
    """Of a loop."""
    return 1 if _is_large(dtype) else wanted


def _is_large(dtype: torch.dtype) -> bool:
    """Of float32 less fits into shared memory."""
    return dtype == torch.float32


def precision(dtype: torch.dtype) -> str:
    """Of matrix products: of float32 as exact as float32 is, by three products of its parts."""
    return "tf32x3" if dtype == torch.float32 else "tf32"
