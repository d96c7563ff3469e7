"""Boundary probability of one position of each row, eq. (4); the packed form is `ops.boundary`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from h_net_dynamic_chunking.ops._triton.keep_step import Keep, keep_arguments, where_to
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
    wait_for_inputs,
)


@triton.jit
def unit(x):
    """x / |x|, and zeros where |x| is zero."""
    norm = tl.sqrt_rn(tl.sum(x * x, 0))
    return x * tl.where(norm > 0, tl.div_rn(1.0, tl.where(norm > 0, norm, 1.0)), 0.0)


@triton.jit
def route_step_kernel(
    queries_keys_ptr,
    previous_key_ptr,
    chunks_ptr,
    seen_ptr,
    given_ptr,
    active_ptr,
    p_ptr,
    boundary_ptr,
    encoded_ptr,
    kept_encoded_ptr,
    waits_ptr,
    inward_ptr,
    leaves_ptr,
    around_ptrs,
    queries_keys_stride,
    threshold,
    width,
    encoded_stride,
    DIM: tl.constexpr,
    HAS_GIVEN: tl.constexpr,
    HAS_ACTIVE: tl.constexpr,
    KEPT: tl.constexpr,
    GO_IN: tl.constexpr,
    INNERMOST: tl.constexpr,
    AROUND: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_KEPT: tl.constexpr,
    INTERPRETED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One row."""
    let_next_start(OVERLAP)
    wait_for_inputs(OVERLAP)
    i_m = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK)
    mask = o_d < DIM
    live = load_flag(active_ptr + i_m, HAS_ACTIVE)
    row = queries_keys_ptr + i_m * queries_keys_stride
    p_previous = previous_key_ptr + i_m * DIM + o_d
    q = tl.load(row + o_d, mask, 0).to(tl.float32)
    k = tl.load(row + DIM + o_d, mask, 0).to(tl.float32)
    previous = tl.load(p_previous, mask, 0).to(tl.float32)
    chunks, seen = tl.load(chunks_ptr + i_m), tl.load(seen_ptr + i_m)
    if KEPT:
        o_w = tl.arange(0, BLOCK_KEPT)
        m_w = (o_w < width) & live
        encoded = tl.load(encoded_ptr + i_m * encoded_stride + o_w, m_w, 0)
        waits = load_flag(waits_ptr + i_m, True)

    p = 0.5 - 0.5 * tl.sum(unit(q) * unit(previous), 0)
    # A NaN stays one, and is no boundary.
    p = tl.where(p < 0, 0.0, tl.where(p > 1, 1.0, p))
    p = tl.where(chunks == 0, 1.0, p)
    opens = p > threshold
    if HAS_GIVEN:
        opens = tl.load(given_ptr + i_m) | (chunks == 0)
    opens = opens & live
    tl.store(chunks_ptr + i_m, chunks + opens.to(tl.int64))
    tl.store(seen_ptr + i_m, seen + live)
    k = rounded(k, previous_key_ptr.dtype.element_ty, INTERPRETED)
    tl.store(p_previous, k, mask & live)
    if KEPT:
        tl.store(p_ptr + i_m, p, live)
        tl.store(kept_encoded_ptr + i_m * width + o_w, encoded, m_w)
        where_to(
            i_m,
            opens,
            waits,
            live,
            waits_ptr,
            inward_ptr,
            leaves_ptr,
            around_ptrs,
            GO_IN,
            INNERMOST,
            AROUND,
        )
    else:
        tl.store(p_ptr + i_m, tl.where(live, p, 0.0))
        tl.store(boundary_ptr + i_m, opens)


@on_its_device
def route_step(
    queries_keys: Tensor,
    previous_key: Tensor,
    chunks: Tensor,
    seen: Tensor,
    threshold: float,
    active: Tensor | None = None,
    given: Tensor | None = None,
    keep: Keep | None = None,
) -> tuple[Tensor, Tensor]:
    """p = (1 - cos(q, previous key)) / 2 of each row, and whether it lies above the threshold.

    queries_keys:   (rows, 2 * dim), float: query and key of the position
    previous_key:   (rows, dim), float: the key before; replaced by the new one in place
    chunks:         int64 (rows,): chunks so far; counts on in place. Where there is none, this is
                    the first position of its row: p = 1, and a chunk opens
    seen:           int64 (rows,): positions so far; counts on in place
    threshold:      in (0, 1); a boundary needs p strictly above it
    active:         bool (rows,), or None for all. The others open no chunk, keep their previous
                    key to the bit, and have p = 0
    given:          bool (rows,): boundaries to use in place of the threshold's
    keep:           what else happens to the rows, for which `active` must be given
    out:            p, float32 (rows,), and the boundaries, bool (rows,); with `keep`, which has p,
                    bool (rows,) twice: rows that leave, and rows that go in

    Norms and products are float32. A zero vector has p = 0.5; see `ops.boundary`.

    Raises:
        ValueError: shapes or dtypes off the contract.
    """
    if previous_key.ndim != 2:
        raise ValueError(f"previous_key must be (rows, dim), got {tuple(previous_key.shape)}")
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must be in (0, 1), got {threshold}")
    rows, dim = previous_key.shape
    check_shape("queries_keys", queries_keys, rows, 2 * dim)
    check_contiguous("previous_key", previous_key, rows, dim)
    for name, counted in (("chunks", chunks), ("seen", seen)):
        check_contiguous(name, counted, rows)
        check_dtype(name, counted, torch.int64)
    if given is not None:
        check_contiguous("given", given, rows)
        check_dtype("given", given, torch.bool)
    check_active(active, rows)
    if keep is not None:
        if active is None:
            raise ValueError("active must be given with keep")
        keep.check(rows)
    boundary = queries_keys.new_empty(rows, dtype=torch.bool)
    p = queries_keys.new_empty(rows, dtype=torch.float32) if keep is None else keep.kept_probs
    inward = boundary if keep is None else torch.empty_like(boundary)
    route_step_kernel[(rows,)](
        queries_keys_ptr=queries_keys,
        previous_key_ptr=previous_key,
        chunks_ptr=chunks,
        seen_ptr=seen,
        given_ptr=boundary if given is None else given,
        active_ptr=boundary if active is None else active,
        p_ptr=p,
        boundary_ptr=boundary,
        queries_keys_stride=queries_keys.stride(0),
        threshold=threshold,
        DIM=dim,
        HAS_GIVEN=given is not None,
        HAS_ACTIVE=active is not None,
        BLOCK=triton.next_power_of_2(dim),
        num_warps=4,
        **keep_arguments(keep, boundary, inward, queries_keys),
        **launch_options(queries_keys),
    )
    return (p, boundary) if keep is None else (boundary, inward)
