"""One position of causal attention between its two projections; see `layers.attention`.

The slots in use are split over some programs for each row and head, so that one row with a long
context keeps a device busy; a second kernel merges them. How they are split depends on the
position of the row, on the size of the cache and on how many rows there are.
"""

import math
from typing import NamedTuple

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
    prefetch,
    rest,
    rounded,
    wait_for_inputs,
)

# Slots of the cache for each program: of a row alone, and of several rows. For fewer the second
# kernel takes longer than it saves.
_SLOTS_A_SPLIT_ALONE = 1024
_SLOTS_A_SPLIT = 32
# With fewer rows and heads than keep a device busy, the slots of a head are split.
_PROGRAMS = 256
_MOST_SPLITS = 16


@triton.jit
def rotation(o_d, position, ROTARY_DIM: tl.constexpr, LOG2_BASE: tl.constexpr):
    """Cosine and signed sine by which each channel and its partner count."""
    half: tl.constexpr = ROTARY_DIM // 2
    # In float64, because a position multiplies the error of its frequency.
    exponent = (o_d % half).to(tl.float64) * (-2.0 / ROTARY_DIM * LOG2_BASE)
    angle = position.to(tl.float32) * tl.exp2(exponent).to(tl.float32)
    sine = tl.sin(angle)
    return tl.cos(angle), tl.where(o_d < half, -sine, sine)


@triton.jit
def load_rotated(row, o_d, m_d, cosine, sine, ROTARY_DIM: tl.constexpr, INTERPRETED: tl.constexpr):
    """One head of q or k, turned, rounded to its dtype."""
    x = tl.load(row + o_d, m_d, 0)
    if ROTARY_DIM > 0:
        half: tl.constexpr = ROTARY_DIM // 2
        turned = o_d < ROTARY_DIM
        o_pair = tl.where(o_d < half, o_d + half, o_d - half)
        pair = tl.load(row + o_pair, turned, 0).to(tl.float32)
        y = rounded(x.to(tl.float32) * cosine + pair * sine, x.dtype, INTERPRETED)
        x = tl.where(turned, y, x)
    return x


@triton.jit
def _attended(k, v, m_s, q, greatest, total, mixed):
    """Sums of each slot of a tile, and its greatest score so far, with this tile as well."""
    score = tl.where(m_s, tl.sum(k.to(tl.float32) * q[None, :], 1), -float("inf"))
    higher = tl.maximum(greatest, score)
    weight, kept = tl.exp2(score - higher), tl.exp2(greatest - higher)
    return higher, total * kept + weight, mixed * kept[:, None] + weight[:, None] * v.to(tl.float32)


@triton.jit
def _is_kept(o_s, slot, slots, reach, end, RING: tl.constexpr):
    """Which slots hold positions that the new one sees. It comes last, and is not among them."""
    age = slot - o_s
    if RING:
        age = tl.where(age < 0, age + slots, age)
    return (o_s < end) & (age > 0) & (age <= reach)


@triton.jit
def attention_step_kernel(
    qkv_ptr,
    keys_ptr,
    values_ptr,
    position_ptr,
    active_ptr,
    out_ptr,
    sums_ptr,
    qkv_stride,
    slots,
    heads,
    scale,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    LOG2_BASE: tl.constexpr,
    RING: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_ACTIVE: tl.constexpr,
    ALONE: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INTERPRETED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One split of one head of one row; tiles are (slot, channel).

    The new key and value come from qkv: the first split writes them, and none reads them back.
    out is the result where there is one split; else the sum of values, and sums the greatest score
    and the sum of weights, in base 2. Each slot of a tile has a sum of its own until the end, so
    that no tile has to be reduced before the next.
    """
    i_m, i_h, i_s = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < HEAD_DIM
    part = (i_m * heads + i_h) * SPLITS + i_s
    # Before the wait: what is as it was when the stack began.
    if not load_flag(active_ptr + i_m, HAS_ACTIVE):
        o_rest = out_ptr + part * HEAD_DIM + o_d
        rest(o_rest, m_d & (SPLITS == 1), part == 0, ALONE, OVERLAP)
        return
    position = tl.load(position_ptr + i_m, cache_modifier=".cg")
    slot = (position % slots if RING else position).to(tl.int32)
    used = tl.minimum(position + 1, slots).to(tl.int32)
    # How far back from the new position, and from which slot on.
    reach = (tl.minimum(position, WINDOW) if WINDOW >= 0 else position).to(tl.int32)
    first = 0 if RING else slot - reach
    share = tl.cdiv(tl.cdiv(used - first, SPLITS), BLOCK_S) * BLOCK_S
    start = first + i_s * share
    end = tl.minimum(start + share, used)
    slot_stride = heads * HEAD_DIM
    head = i_m * slots * slot_stride + i_h * HEAD_DIM
    o_t = tl.arange(0, BLOCK_S)
    # The first tile, and lines of those behind it.
    tile = head + (start + o_t).to(tl.int64)[:, None] * slot_stride + o_d[None, :]
    m_s = _is_kept(start + o_t, slot, slots, reach, end, RING)
    k = tl.load(keys_ptr + tile, m_s[:, None] & m_d[None, :], 0, cache_modifier=".cg")
    v = tl.load(values_ptr + tile, m_s[:, None] & m_d[None, :], 0, cache_modifier=".cg")
    if OVERLAP:
        line: tl.constexpr = 1024 // keys_ptr.dtype.element_ty.primitive_bitwidth
        lines = tl.arange(0, (BLOCK_D + line - 1) // line) * line
        for s in range(start + BLOCK_S, tl.minimum(end, start + 4 * BLOCK_S), BLOCK_S):
            o_s = tl.minimum(s + o_t, slots - 1).to(tl.int64)
            behind = head + o_s[:, None] * slot_stride + tl.minimum(lines, HEAD_DIM - 1)[None, :]
            prefetch(keys_ptr + behind)
            prefetch(values_ptr + behind)
    cosine, sine = 1.0, 0.0
    if ROTARY_DIM > 0:
        cosine, sine = rotation(o_d, position, ROTARY_DIM, LOG2_BASE)
    let_next_start(OVERLAP)
    wait_for_inputs(OVERLAP)

    q_row = qkv_ptr + i_m * qkv_stride + i_h * HEAD_DIM
    q = load_rotated(q_row, o_d, m_d, cosine, sine, ROTARY_DIM, INTERPRETED)
    q = q.to(tl.float32) * scale
    greatest = tl.full((BLOCK_S,), -1e30, tl.float32)  # below any score, and yet finite
    total = tl.zeros((BLOCK_S,), tl.float32)
    mixed = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    greatest, total, mixed = _attended(k, v, m_s, q, greatest, total, mixed)
    for s in tl.range(start + BLOCK_S, end, BLOCK_S, num_stages=STAGES):
        tile = head + (s + o_t).to(tl.int64)[:, None] * slot_stride + o_d[None, :]
        m_s = _is_kept(s + o_t, slot, slots, reach, end, RING)
        k = tl.load(keys_ptr + tile, m_s[:, None] & m_d[None, :], 0)
        v = tl.load(values_ptr + tile, m_s[:, None] & m_d[None, :], 0)
        greatest, total, mixed = _attended(k, v, m_s, q, greatest, total, mixed)

    top = tl.max(greatest, 0)
    new_weight = 0.0
    new_value = tl.zeros((BLOCK_D,), tl.float32)
    if i_s == 0:
        k_row = q_row + slot_stride
        new_key = load_rotated(k_row, o_d, m_d, cosine, sine, ROTARY_DIM, INTERPRETED)
        v_new = tl.load(k_row + slot_stride + o_d, m_d, 0)
        m_new = tl.where(slot < slots, m_d, False)
        new = head + slot.to(tl.int64) * slot_stride + o_d
        tl.store(keys_ptr + new, new_key, m_new)
        tl.store(values_ptr + new, v_new, m_new)
        score_new = tl.sum(q * new_key.to(tl.float32), 0)
        top = tl.maximum(top, score_new)
        new_weight = tl.exp2(score_new - top)
        new_value = v_new.to(tl.float32)
    weight = tl.exp2(greatest - top)
    of_all = tl.sum(weight * total, 0) + new_weight
    out = tl.sum(weight[:, None] * mixed, 0) + new_weight * new_value
    if SPLITS == 1:
        out = out / of_all
    else:
        tl.store(sums_ptr + 2 * part, top)
        tl.store(sums_ptr + 2 * part + 1, of_all)
    out = rounded(out, out_ptr.dtype.element_ty, INTERPRETED)
    tl.store(out_ptr + part * HEAD_DIM + o_d, out, m_d)


@triton.jit
def merge_splits_kernel(
    parts_ptr,
    sums_ptr,
    active_ptr,
    out_ptr,
    heads,
    HEAD_DIM: tl.constexpr,
    HAS_ACTIVE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INTERPRETED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One head of one row; tiles are (split, channel)."""
    let_next_start(OVERLAP)
    wait_for_inputs(OVERLAP)
    i_m = tl.program_id(0).to(tl.int64)
    head = i_m * heads + tl.program_id(1)
    o_s, o_d = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    m_d = o_d < HEAD_DIM
    p_out = out_ptr + head * HEAD_DIM + o_d
    if not load_flag(active_ptr + i_m, HAS_ACTIVE):
        tl.store(p_out, tl.zeros((BLOCK_D,), tl.float32), m_d)
        return
    sums = sums_ptr + 2 * (head * SPLITS + o_s)
    greatest, total = tl.load(sums), tl.load(sums + 1)
    tile = (head * SPLITS + o_s)[:, None] * HEAD_DIM + o_d[None, :]
    parts = tl.load(parts_ptr + tile, m_d[None, :], 0)
    weight = tl.exp2(greatest - tl.max(greatest, 0))
    out = tl.sum(weight[:, None] * parts, 0) / tl.sum(weight * total, 0)
    tl.store(p_out, rounded(out, out_ptr.dtype.element_ty, INTERPRETED), m_d)


class Tile(NamedTuple):
    """How a program walks over slots."""

    slots: int
    """That it reads at once."""
    stages: int
    """Tiles under way at once."""
    warps: int


@on_its_device
def attention_step(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    *,
    rotary_dim: int,
    rotary_base: float = 10000.0,
    ring: bool,
    window_size: int = -1,
    active: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Turn q and k, put k and v into their slot, and attend to the slots in use.

    qkv:            (rows, 3 * d_model), float: all q, all k, all v, each (head, channel)
    keys, values:   (rows, slots, heads, head_dim), dtype of `qkv`; one slot of each row is written
    position:       int64 (rows,): positions that each row has seen; not advanced here
    ring:           whether position t stands in slot t modulo slots; else t must be below slots,
                    and nothing is written for a row that has none left
    window_size:    positions to the left that are kept besides the own one; -1 for all
    active:         bool (rows,), or None for all. The others keep their caches to the bit
    tile:           for measurements; None takes what was measured
    out:            (rows, d_model), dtype of `qkv`; means nothing where one of several rows
                    is not active, and is zero where the only one is not

    Turned q and k are rounded to the dtype of `qkv`, as in the layer; all else is float32, and the
    result rounded once.

    Raises:
        ValueError: shapes or dtypes off the contract.
    """
    _check(qkv, keys, values, position, rotary_dim, window_size, active)
    rows, slots, heads, head_dim = keys.shape
    alone = rows == 1
    if alone:
        splits = slots // _SLOTS_A_SPLIT_ALONE
    else:
        splits = min(slots // _SLOTS_A_SPLIT, _PROGRAMS // (rows * heads))
    splits = triton.next_power_of_2(max(1, min(splits, _MOST_SPLITS)))
    tile = tile or _usual(slots, alone)
    block_d = triton.next_power_of_2(head_dim)
    out = qkv.new_empty(rows, heads * head_dim)
    parts, sums = out, out
    if splits > 1:
        parts = qkv.new_empty(rows, heads, splits, head_dim, dtype=torch.float32)
        sums = qkv.new_empty(rows, heads, splits, 2, dtype=torch.float32)
    options = launch_options(qkv)
    attention_step_kernel[(rows, heads, splits)](
        qkv_ptr=qkv,
        keys_ptr=keys,
        values_ptr=values,
        position_ptr=position,
        active_ptr=position if active is None else active,
        out_ptr=parts,
        sums_ptr=sums,
        qkv_stride=qkv.stride(0),
        slots=slots,
        heads=heads,
        scale=head_dim**-0.5 * math.log2(math.e),
        HEAD_DIM=head_dim,
        ROTARY_DIM=rotary_dim,
        LOG2_BASE=math.log2(rotary_base),
        RING=ring,
        WINDOW=window_size,
        HAS_ACTIVE=active is not None,
        ALONE=alone,
        SPLITS=splits,
        STAGES=tile.stages,
        BLOCK_S=tile.slots,
        BLOCK_D=block_d,
        num_warps=tile.warps,
        **options,
    )
    if splits > 1:
        merge_splits_kernel[(rows, heads)](
            parts_ptr=parts,
            sums_ptr=sums,
            active_ptr=position if active is None else active,
            out_ptr=out,
            heads=heads,
            HEAD_DIM=head_dim,
            HAS_ACTIVE=active is not None,
            SPLITS=splits,
            BLOCK_D=block_d,
            num_warps=4,
            **options,
        )
    return out


def _usual(slots: int, alone: bool) -> Tile:
    """Near the best of some, for 24 and 43 of 64 rows with 60 to 400 positions (H200).

    With few slots the first tile, which is under way before the wait, is most of it.
    """
    if alone:
        return Tile(64, 2, 8)
    if slots <= 160:
        return Tile(64, 1, 4)
    return Tile(32, 4 if slots <= 512 else 2, 4)


def _check(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    rotary_dim: int,
    window_size: int,
    active: Tensor | None,
) -> None:
    if keys.ndim != 4 or 0 in keys.shape:
        raise ValueError(f"keys must be (rows, slots, heads, head_dim), got {tuple(keys.shape)}")
    rows, _, heads, head_dim = keys.shape
    check_shape("qkv", qkv, rows, 3 * heads * head_dim)
    for name, tensor in (("keys", keys), ("values", values)):
        check_contiguous(name, tensor, *keys.shape)
        check_dtype(name, tensor, qkv.dtype)
    check_contiguous("position", position, rows)
    check_dtype("position", position, torch.int64)
    if rotary_dim % 2 or not 0 <= rotary_dim <= head_dim:
        raise ValueError(f"rotary_dim must be even and in 0 .. {head_dim}, got {rotary_dim}")
    if window_size < -1:
        raise ValueError(f"window_size must be -1 (no window) or more, got {window_size}")
    check_active(active, rows)
