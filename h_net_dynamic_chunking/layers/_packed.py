"""What the mixers need to know about packed sequences besides `ops.packing`."""

import torch
from torch import Tensor

from h_net_dynamic_chunking.ops.packing import in_some_sequence


def zero_tail(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """`x` (total, ...) with zeros in the rows of no sequence, which get no gradient.

    A tail of zeros stays one: norms, gates and projections without bias all map it to zeros.
    """
    inside = in_some_sequence(cu_seqlens, x.shape[0])
    return torch.where(inside.view(-1, *[1] * (x.ndim - 1)), x, 0)


def longest(cu_seqlens: Tensor) -> int:
    """Length of the longest sequence. Reads it on the host, which stops the host of a GPU."""
    return int(cu_seqlens.diff().amax()) if cu_seqlens.shape[0] > 1 else 0
