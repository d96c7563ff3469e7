"""The embedding of one byte of each row, with which a step begins."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from h_net_dynamic_chunking.ops._triton.step_common import (
    check_contiguous,
    check_dtype,
    launch_options,
    let_next_start,
    on_its_device,
    wait_for_inputs,
)


@triton.jit
def embed_step_kernel(
    weight_ptr,
    ids_ptr,
    out_ptr,
    vocab,
    dim,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One row."""
    let_next_start(OVERLAP)
    wait_for_inputs(OVERLAP)
    i_m = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK)
    number = tl.load(ids_ptr + i_m)
    known = tl.minimum(tl.maximum(number, 0), vocab - 1)
    x = tl.load(weight_ptr + known * dim + o_d, o_d < dim, 0)
    x = tl.where(number == known, x, float("nan"))
    tl.store(out_ptr + i_m * dim + o_d, x, o_d < dim)


@on_its_device
def embed_step(weight: Tensor, ids: Tensor) -> Tensor:
    """Rows of a table by their numbers; see `ops.embedding`.

    weight:  (vocab, dim), float
    ids:     int64 (rows,), each in 0 .. vocab - 1; another one makes a row of NaN
    out:     (rows, dim), dtype of `weight`

    Raises:
        ValueError: shapes or dtypes off the contract.
    """
    check_contiguous("weight", weight, *weight.shape)
    if weight.ndim != 2 or ids.ndim != 1:
        raise ValueError(
            f"weight and ids must be (vocab, dim) and (rows,), got {tuple(weight.shape)} and "
            f"{tuple(ids.shape)}"
        )
    check_contiguous("ids", ids, *ids.shape)
    check_dtype("ids", ids, torch.int64)
    vocab, dim = weight.shape
    out = weight.new_empty(len(ids), dim)
    embed_step_kernel[(len(ids),)](
        weight_ptr=weight,
        ids_ptr=ids,
        out_ptr=out,
        vocab=vocab,
        dim=dim,
        BLOCK=triton.next_power_of_2(dim),
        num_warps=4,
        **launch_options(weight, begins=True),
    )
    return out
