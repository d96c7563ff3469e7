"""RMSNorm between a wide residual stream and narrower weights: x / sqrt(mean(x^2) + 1e-5) * w.

The residual stream is float32 whatever the dtype of a model's weights. When the two differ,
torch.nn.RMSNorm leaves its fused kernel and says so once, in a UserWarning: "Mismatch dtype between
input and weight" (torch 2.13, CPU). Only the dtypes are settled here.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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
