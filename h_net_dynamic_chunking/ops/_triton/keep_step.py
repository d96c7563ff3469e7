"""What a row that waits leaves behind on its way in; see `waiting`."""

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
    leaves_ptr,
    dim,
    encoded_stride,
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
    tl.store(waits_ptr + i_m, waits)
    tl.store(leaves_ptr + i_m, active & (waits == 0))


@on_its_device
def keep_step(
    encoded: Tensor,
    probs: Tensor,
    opens: Tensor,
    active: Tensor,
    kept_encoded: Tensor,
    kept_probs: Tensor,
    waits: Tensor,
) -> Tensor:
    """Keep the rows that are active, and mark those that wait; the last three change in place.

    encoded, kept_encoded:  (rows, dim), float, of one dtype
    probs, kept_probs:      float32 (rows,)
    opens:                  bool (rows,): rows that open a chunk
    active:                 bool (rows,)
    waits:                  bool (rows,): becomes True where a row that is active opens a chunk
    out:                    bool (rows,): active rows that do not wait

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
    leaves = torch.empty_like(waits)
    keep_step_kernel[(rows,)](
        encoded_ptr=encoded,
        probs_ptr=probs,
        opens_ptr=opens,
        active_ptr=active,
        kept_encoded_ptr=kept_encoded,
        kept_probs_ptr=kept_probs,
        waits_ptr=waits,
        leaves_ptr=leaves,
        dim=dim,
        encoded_stride=encoded.stride(0),
        BLOCK=triton.next_power_of_2(dim),
        num_warps=4,
        **launch_options(encoded),
    )
    return leaves
