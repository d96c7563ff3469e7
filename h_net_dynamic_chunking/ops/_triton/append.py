"""Puts keys and values of new positions into the slots of a cache."""

import triton
import triton.language as tl
from torch import Tensor

from h_net_dynamic_chunking.ops._triton.common import launch, power_of_2


@triton.jit(do_not_specialize=["length", "slots"])
def append_kernel(
    key,
    value,
    keys,
    values,
    seen,
    lens,
    length,
    slots,
    RAGGED: tl.constexpr,
    RING: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One position of one row."""
    i_t = tl.program_id(0).to(tl.int64)
    i_row, o_step = i_t // length, i_t % length + tl.arange(0, 1)
    live = tl.zeros([1], tl.int64) + length
    if RAGGED:
        live = tl.load(lens + i_row + tl.arange(0, 1)).to(tl.int64)
    o_slot = tl.load(seen + i_row) + o_step
    kept = o_step < live
    if RING:  # of more positions than slots, the last
        kept = kept & (o_step >= live - slots)
        o_slot = o_slot % slots
    o = tl.arange(0, BLOCK)
    mask = (o < WIDTH) & kept
    o_in, o_out = i_t * WIDTH + o, (i_row * slots + o_slot) * WIDTH + o
    tl.store(keys + o_out, tl.load(key + o_in, mask=mask), mask=mask)
    tl.store(values + o_out, tl.load(value + o_in, mask=mask), mask=mask)


def append(
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    seen: Tensor,
    lens: Tensor | None,
    ring: bool,
) -> None:
    """Write the first lens[r] positions of (rows, length, heads, head_dim), contiguous, to row r.

    keys, values:  (rows, slots, heads, head_dim), contiguous, dtype of key; change in place
    seen:          int64 (rows,): where the first position of each row goes
    lens:          int (rows,); None: all have `length`
    ring:          whether position t goes to slot t % slots; if not, there are slots for all
    """
    rows, length, heads, head_dim = key.shape
    width = heads * head_dim
    launch(
        append_kernel,
        rows * length,
        {
            "key": key,
            "value": value,
            "keys": keys,
            "values": values,
            "seen": seen,
            "lens": seen if lens is None else lens.contiguous(),
            "length": length,
            "slots": keys.shape[1],
        },
        {
            "RAGGED": lens is not None,
            "RING": ring,
            "WIDTH": width,
            "BLOCK": power_of_2(width),
        },
        num_warps=4,
    )
