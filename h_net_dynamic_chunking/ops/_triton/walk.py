"""The walk over the chunks of a block of positions, which dechunking makes in both directions.

    s_k = P_k z_k + (1 - P_k) s_{k-1}

A program takes a block of positions and a stretch of channels. What it needs of the blocks before
comes from a first kernel: the state at the end of each block, as if nothing had been before, and
how much goes through the block. Both stop looking back where nothing that far away has weight, so
that with P above a half they read a few chunks; with any other P they read as many as there are,
and are as exact. Backward is the same in reverse. Where the memory is said to be short, a program
walks what is felt in its block itself.

A number that is not finite spreads to its channel of the chunks behind it in its sequence, as far
as their gates let through more than `NEGLIGIBLE`, and to nothing else.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from h_net_dynamic_chunking.ops._triton.common import cdiv, power_of_2


class Walk(NamedTuple):
    """How positions and channels are divided."""

    block: int
    """Positions of a block."""
    blocks: int
    programs: int
    constants: dict[str, Any]
    """D, BLOCK_D and NEGLIGIBLE, of every kernel."""


# A 256th of what float32 rounds off, and a 500th of what the others do.
_NEGLIGIBLE = {torch.float32: 2.0**-32, torch.float16: 2.0**-20, torch.bfloat16: 2.0**-17}
_SMALLEST_BLOCK = 32


def divide(x: Tensor, total: int, block_d: int, programs: int) -> Walk:
    """Blocks of positions and stretches of channels for chunks x (chunks, dim).

    `programs` are wanted for up to four stretches; narrower channels get more blocks."""
    return _divide(x.shape[1], x.dtype, total, block_d, programs)


@lru_cache
def _divide(dim: int, dtype: torch.dtype, total: int, block_d: int, programs: int) -> Walk:
    block_d = min(power_of_2(dim), block_d)
    # Wider channels than four stretches get more programs, not longer blocks.
    wanted = programs // min(cdiv(dim, block_d), 4)
    block = max(_SMALLEST_BLOCK, power_of_2(cdiv(total, wanted)))
    blocks = cdiv(total, block)
    return Walk(
        block,
        blocks,
        blocks * cdiv(dim, block_d),
        {"D": dim, "BLOCK_D": block_d, "NEGLIGIBLE": _NEGLIGIBLE[dtype]},
    )


def passed_on(walk: Walk, x: Tensor) -> dict[str, Tensor]:
    """Room for what the blocks pass on, float32: `states` (blocks, dim), which is the state at the
    end of a block, or at its beginning in reverse; `through` (blocks,): how much of what comes in
    passes the block."""
    states = x.new_empty(walk.blocks, x.shape[1], dtype=torch.float32)
    return {"states": states, "through": states.new_empty(walk.blocks)}


def limits(clamp: float | None) -> dict[str, float]:
    """Between what the kernels clamp P."""
    if clamp is None:
        return {"low": -float("inf"), "high": float("inf")}
    return {"low": clamp, "high": 1 - clamp}


@triton.jit
def counts(weight, NEGLIGIBLE: tl.constexpr):
    """Whether something of this weight is still to be seen; NaN is."""
    return (weight > NEGLIGIBLE) | (weight != weight)


@triton.jit
def after(b_x, gate, b_state):
    """x + gate state. A gate of 0 lets nothing through, not even NaN."""
    return tl.where(gate == 0, b_x, gate * b_state + b_x)


@triton.jit
def clamped(b_p, low, high):
    """P between the limits; NaN stays."""
    return tl.where(b_p < low, low, tl.where(b_p > high, high, b_p))


@triton.jit
def opening(p, starts, o_t, m_t, low, high, SMOOTH: tl.constexpr):
    """P of a chunk that opens at position t, and how much of the chunk before passes it."""
    if SMOOTH:
        b_p = tl.load(p + o_t, mask=m_t, other=1)
        b_p = clamped(b_p, low, high)
        b_gate = tl.where(tl.load(starts + o_t, mask=m_t, other=1) != 0, 0.0, 1 - b_p)
    else:
        b_p = tl.zeros_like(o_t).to(tl.float32) + 1
        b_gate = tl.zeros_like(o_t).to(tl.float32)
    return b_p, b_gate


@triton.jit
def block_of_positions(chunk, i_b, T, block):
    """Positions i_start .. i_stop, without the tail; their first and last chunk, or -1."""
    i_start = i_b * block
    i_stop = tl.minimum(i_start + block, T)
    i_last = tl.load(chunk + i_stop - 1)
    if i_last < 0:
        live = tl.zeros([], tl.int64)
        for i_t in range(i_start, i_stop, 64):
            o_t = i_t + tl.arange(0, 64)
            b_chunk = tl.load(chunk + o_t, mask=o_t < i_stop, other=-1)
            live += tl.sum((b_chunk >= 0).to(tl.int64))
        i_stop = i_start + live
        i_last = tl.load(chunk + tl.maximum(i_stop - 1, 0), mask=live > 0, other=-1)
    return i_start, i_stop, tl.load(chunk + i_start), i_last


@triton.jit
def carry(
    states, through, i_first, i_end, o_d, m_d, D, STEP: tl.constexpr, NEGLIGIBLE: tl.constexpr
):
    """The state that block `i_first` passes on, from it and all that lie behind it."""
    b_state = tl.zeros(o_d.shape, tl.float32)
    weight = tl.full([], 1.0, tl.float32)
    i_b = i_first
    while (i_b != i_end) & counts(weight, NEGLIGIBLE):
        b_state += weight * tl.load(states + i_b * D + o_d, mask=m_d, other=0)
        weight *= tl.load(through + i_b)
        i_b += STEP
    return b_state


@triton.jit
def program(D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Block of positions, stretch of channels, and its offsets; neighbours share the positions."""
    i_p = tl.program_id(0).to(tl.int64)
    i_d = i_p % tl.cdiv(D, BLOCK_D)
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    if D % BLOCK_D == 0:
        # Known when it is compiled.
        m_d = tl.full([BLOCK_D], 1, tl.int1)
    return i_p // tl.cdiv(D, BLOCK_D), i_d, o_d, m_d
