"""What the mixers need to know about packed sequences besides `ops.packing`."""

from torch import Tensor


def longest(cu_seqlens: Tensor) -> int:
    """Length of the longest sequence. Reads it on the host, which stops the host of a GPU."""
    return int(cu_seqlens.diff().amax()) if cu_seqlens.shape[0] > 1 else 0
