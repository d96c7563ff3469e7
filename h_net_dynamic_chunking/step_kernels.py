"""When a step runs on the kernels that are made for it, `ops._triton.*_step`."""

import torch
from torch import Tensor

from h_net_dynamic_chunking.cache import Rows
from h_net_dynamic_chunking.ops.backend import uses_triton


def fits_step_kernels(x: Tensor, weight: Tensor, rows: Rows) -> bool:
    """Whether x (rows, dim), which a layer of such a weight reads, goes to the kernels.

    They take all rows of a cache, in its order, in the dtype of the weights.

    Raises:
        ValueError: Triton was asked for by name and cannot run.
    """
    if rows.index is not None or x.shape[0] == 0:
        return False
    if x.dtype != weight.dtype or torch.is_autocast_enabled(x.device.type):
        return False
    return uses_triton(x)
