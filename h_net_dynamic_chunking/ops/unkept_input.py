"""Linear layers whose input is not kept for the backward pass, being cheap to have again.

    y = f(a) W^T

For f autograd keeps a, and for the layer f(a), of which only the gradient of W makes use. So an
operation that is both keeps a and W. Its backward pass takes f(a) from the kernel of f's gradient,
which reads a in any case, and writes f(a) where the gradient of f(a) has been: of memory it takes
no more at its peak.
"""

import torch
from torch import Tensor, nn

from h_net_dynamic_chunking.ops.plain import product_weight
from h_net_dynamic_chunking.ops.registration import is_watched


def weight_to_take(linear: nn.Linear, a: Tensor) -> Tensor | None:
    """The layer's weight, for an operation that is f and the layer.

    None where the layer is to be called itself: if it is no product in the dtype of a and f(a);
    while somebody looks on, who may want to see a product; and if there would be nothing to gain,
    because a would not be kept without the operation, or f(a) would not.
    """
    if not (torch.is_grad_enabled() and a.requires_grad):
        return None
    if not torch.compiler.is_compiling() and is_watched():
        return None
    # A layer that somebody has changed may have anything there, or nothing.
    if not getattr(getattr(linear, "weight", None), "requires_grad", False):
        return None
    return product_weight(linear, a)
