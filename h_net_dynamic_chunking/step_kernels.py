"""When a step runs on the kernels that are made for it, `ops._triton.*_step`."""

import torch
from torch import Tensor, nn

from h_net_dynamic_chunking.cache import Rows
from h_net_dynamic_chunking.ops.backend import uses_triton
from h_net_dynamic_chunking.ops.plain import is_plain


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


def linear_by_kernel(
    x: Tensor, linear: nn.Linear, out_dtype: torch.dtype | None = None
) -> Tensor | None:
    """A linear layer of x (rows, in), which `fits_step_kernels`; None if there is no kernel for it.

    In `out_dtype`, or in the dtype of x.
    """
    if not is_plain(linear, nn.Linear):  # one that somebody has changed runs itself
        return None
    from h_net_dynamic_chunking.ops._triton.linear_step import linear_step
    from h_net_dynamic_chunking.ops._triton.product_step import fits_product_step, product_step

    out_dtype = out_dtype or x.dtype
    if len(x) == 1:
        return linear_step(x, linear.weight, bias=linear.bias, out_dtype=out_dtype)
    if fits_product_step(x, linear.weight):
        return product_step(x, linear.weight, bias=linear.bias, out_dtype=out_dtype)
    return None
