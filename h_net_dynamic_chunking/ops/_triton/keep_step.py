"""What a row that waits leaves behind on its way in, and where rows go; see `waiting`."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from h_net_dynamic_chunking.ops._triton.step_common import (
    check_contiguous,
    check_dtype,
    check_shape,
    load_flag,
)


@triton.jit
def where_to(
    i_m,
    opens,
    waits,
    active,
    waits_ptr,
    inward_ptr,
    leaves_ptr,
    around_ptrs,
    GO_IN: tl.constexpr,
    INNERMOST: tl.constexpr,
    AROUND: tl.constexpr,
):
    """Where one row goes that opens a chunk, waits already, or is active."""
    waits = waits | opens
    leaves = active & (waits == 0)
    if INNERMOST and GO_IN:
        leaves = leaves | waits
    tl.store(inward_ptr + i_m, waits & GO_IN)
    tl.store(waits_ptr + i_m, waits & (not GO_IN))
    tl.store(leaves_ptr + i_m, leaves)
    for i in tl.static_range(AROUND):
        leaves = leaves | load_flag(around_ptrs[i] + i_m, True)
        tl.store(around_ptrs[i] + i_m, leaves)


class Keep(NamedTuple):
    """Keep the rows that are active, and say where they go.

    Rows that open a chunk wait, beside those that do already. They all go in, or go on waiting; the
    other active rows leave. The first tensor is read, the others change in place.
    """

    encoded: Tensor
    """(rows, dim), float: what the encoder made."""
    kept_encoded: Tensor
    """(rows, dim), of the same dtype."""
    kept_probs: Tensor
    """float32 (rows,)."""
    waits: Tensor
    """bool (rows,): rows that wait."""
    go_in: bool
    """Whether those that wait go in now, so that none waits any longer."""
    around: Sequence[Tensor] | None
    """Of the innermost stage that steps: bool (rows,) for each stage around it, innermost first,
    rows that leave it. What goes in is back then, and leaves, and what leaves a stage leaves those
    around it. None of another stage."""

    def check(self, rows: int) -> None:
        """Raise ValueError unless shapes and dtypes fit together."""
        width = self.encoded.shape[-1]
        check_shape("encoded", self.encoded, rows, width)
        check_contiguous("kept_encoded", self.kept_encoded, rows, width)
        check_dtype("kept_encoded", self.kept_encoded, self.encoded.dtype)
        check_contiguous("kept_probs", self.kept_probs, rows)
        check_dtype("kept_probs", self.kept_probs, torch.float32)
        flags = [("around", outer) for outer in self.around or ()]
        for name, flag in (("waits", self.waits), *flags):
            check_contiguous(name, flag, rows)
            check_dtype(name, flag, torch.bool)


def keep_arguments(
    keep: Keep | None, leaves: Tensor, inward: Tensor, unused: Tensor
) -> dict[str, Any]:
    """Keywords of a kernel that may keep rows; where they go is written to the flags given."""
    k = keep or Keep(unused, unused, unused, unused, False, None)
    return {
        "encoded_ptr": k.encoded,
        "kept_encoded_ptr": k.kept_encoded,
        "waits_ptr": k.waits,
        "inward_ptr": inward,
        "leaves_ptr": leaves,
        "around_ptrs": tuple(k.around or [k.waits]),
        "width": k.encoded.shape[-1],
        "encoded_stride": k.encoded.stride(0),
        "KEPT": keep is not None,
        "GO_IN": k.go_in,
        "INNERMOST": k.around is not None,
        "AROUND": len(k.around or ()),
        "BLOCK_KEPT": triton.next_power_of_2(k.encoded.shape[-1]),
    }
