"""RMSNorm between a wide residual stream and narrower weights: x / sqrt(mean(x^2) + 1e-5) * w.

The residual stream is float32 whatever the dtype of a model's weights. When the two differ,
torch.nn.RMSNorm leaves its fused kernel and says so once, in a UserWarning: "Mismatch dtype between
input and weight" (torch 2.13, CPU). Only the dtypes are settled here.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from h_net_dynamic_chunking.ops.packing import accumulation_dtype
from h_net_dynamic_chunking.ops.plain import is_plain
from h_net_dynamic_chunking.ops.rms_norm import add_rms_norm
from h_net_dynamic_chunking.ops.tail import zero_tail


class RMSNorm(nn.RMSNorm):
    """Normalise over the last dimension in the wider of two dtypes; return the weight's dtype.

    x:    (..., dim), float
    out:  (..., dim), dtype of `weight`; computed in the wider of the dtypes of `x` and `weight`

    >>> norm = RMSNorm(4).bfloat16()
    >>> norm(torch.ones(2, 4)).dtype
    torch.bfloat16
    """

    weight: nn.Parameter

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        normed = F.rms_norm(x.to(dtype), self.normalized_shape, self.weight.to(dtype), self.eps)
        return normed.to(self.weight.dtype)


def add_then_norm(
    norm: nn.Module, h: Tensor, update: Tensor | None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The residual stream h + update, at least float32, and what `norm` makes of it.

    As one operation, `ops.rms_norm`, for an `RMSNorm` as this library has it; anything that stands
    in its place, that is watched by hooks, or whose forward was replaced, is called as a module.

    h, update:   (..., dim), float; None for nothing to add
    cu_seqlens:  with h packed, (total, dim): rows of no sequence count as zeros
    """
    if is_plain(norm, RMSNorm):
        assert isinstance(norm, RMSNorm)
        return add_rms_norm(h, update, norm.weight, norm.eps or 0.0, cu_seqlens)
    h = h.to(accumulation_dtype(h.dtype))
    if update is not None:
        h = h + update
    if cu_seqlens is not None:
        h = zero_tail(h, cu_seqlens)
    return h, norm(h)
