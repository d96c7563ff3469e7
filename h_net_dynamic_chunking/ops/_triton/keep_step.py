"""What a row that waits leaves behind on its way in; see `waiting`."""

from collections.abc import Sequence

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
    wait_for_inputs,
)


@triton.jit
def keep_step_kernel(
    encoded_ptr,
    probs_ptr,
    opens_ptr,
    active_ptr,
    kept_encoded_ptr,
    kept_probs_ptr,
    waits_ptr,
    inward_ptr,
    leaves_ptr,
    around_ptrs,
    dim,
    encoded_stride,
    GO_IN: tl.constexpr,
    INNERMOST: tl.constexpr,
    AROUND: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One row."""
    let_next_start(OVERLAP)
    wait_for_inputs(OVERLAP)
    i_m = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK)
    active = load_flag(active_ptr + i_m, True)
    mask = (o_d < dim) & active
    encoded = tl.load(encoded_ptr + i_m * encoded_stride + o_d, mask, 0)
    tl.store(kept_encoded_ptr + i_m * dim + o_d, encoded, mask)
    tl.store(kept_probs_ptr + i_m, tl.load(probs_ptr + i_m), active)
    waits = load_flag(waits_ptr + i_m, True) | (load_flag(opens_ptr + i_m, True) & active)
    leaves = active & (waits == 0)
    if INNERMOST and GO_IN:
        leaves = leaves | waits
    tl.store(inward_ptr + i_m, waits & GO_IN)
    tl.store(waits_ptr + i_m, waits & (not GO_IN))
    tl.store(leaves_ptr + i_m, leaves)
    for i in tl.static_range(AROUND):
        leaves = leaves | load_flag(around_ptrs[i] + i_m, True)
        tl.store(around_ptrs[i] + i_m, leaves)


@on_its_device
def keep_step(
    encoded: Tensor,
    probs: Tensor,
    opens: Tensor,
    active: Tensor,
    kept_encoded: Tensor,
    kept_probs: Tensor,
    waits: Tensor,
    *,
    go_in: bool,
    around: Sequence[Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Keep the rows that are active, and say where they go.

    Rows that open a chunk wait, beside those that do already. They all go in, or go on waiting; the
    other active rows leave. `kept_encoded`, `kept_probs`, `waits` and `around` change in place.

    encoded, kept_encoded:  (rows, dim), float, of one dtype
    probs, kept_probs:      float32 (rows,)
    opens:                  bool (rows,): rows that open a chunk
    active:                 bool (rows,)
    waits:                  bool (rows,): rows that wait
    go_in:                  whether those that wait go in now, so that none waits any longer
    around:                 of the innermost stage that steps: bool (rows,) for each stage around
                            it, from there outwards: rows that leave it. What goes in is back then,
                            and leaves, and what leaves a stage leaves those around it
    out:                    bool (rows,) twice: rows that leave, and rows that go in

    Raises:
        ValueError: shapes or dtypes off the contract.
    """
    rows, dim = encoded.shape
    check_shape("encoded", encoded, rows, dim)
    check_contiguous("kept_encoded", kept_encoded, rows, dim)
    check_dtype("kept_encoded", kept_encoded, encoded.dtype)
    floats = {"probs": probs, "kept_probs": kept_probs}
    for name, tensor in (floats | {"opens": opens, "active": active, "waits": waits}).items():
        check_contiguous(name, tensor, rows)
        check_dtype(name, tensor, torch.float32 if name in floats else torch.bool)
    for outer in around or ():
        check_contiguous("around", outer, rows)
        check_dtype("around", outer, torch.bool)
    leaves, inward = torch.empty_like(waits), torch.empty_like(waits)
    keep_step_kernel[(rows,)](
        encoded_ptr=encoded,
        probs_ptr=probs,
        opens_ptr=opens,
        active_ptr=active,
        kept_encoded_ptr=kept_encoded,
        kept_probs_ptr=kept_probs,
        waits_ptr=waits,
        inward_ptr=inward,
        leaves_ptr=leaves,
        around_ptrs=tuple(around or [waits]),
        dim=dim,
        encoded_stride=encoded.stride(0),
        GO_IN=go_in,
        INNERMOST=around is not None,
        AROUND=len(around or ()),
        BLOCK=triton.next_power_of_2(dim),
        num_warps=4,
        **launch_options(encoded),
    )
    return leaves, inward
