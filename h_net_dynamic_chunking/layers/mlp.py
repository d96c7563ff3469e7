"""Gated MLP of the layers T and M in capitals: fc2(value * SiLU(gate)), [value; gate] = fc1(x).

The second half of fc1 is the gate, as in the official checkpoints. No biases.
"""

from torch import Tensor, nn

from h_net_dynamic_chunking.layers._checks import check_sizes
from h_net_dynamic_chunking.ops.swiglu_linear import swiglu_linear

# Widths are rounded up to this, the official choice: whole tiles of a GPU's matrix units.
_WIDTH_MULTIPLE = 128


def swiglu_width(d_model: int, d_intermediate: int | None = None) -> int:
    """The width between the two layers that a `SwiGLU` of these sizes has.

    >>> swiglu_width(1024), swiglu_width(1024, 2700)
    (2816, 2816)
    """
    if d_intermediate is None:
        d_intermediate = -(-8 * d_model // 3)
    check_sizes(d_intermediate=d_intermediate)
    return -(-d_intermediate // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE


class SwiGLU(nn.Module):
    """Apply the gated MLP to each position by itself.

    x:    (..., d_model), float: padded, packed or a single step alike
    out:  (..., d_model), dtype of `fc2`'s result

    Args:
        d_model: width of the input.
        d_intermediate: width between the two layers, 8/3 d_model if None; rounded up to a
            multiple of 128 either way.

    Raises:
        ValueError: a size below 1, an input of another width.

    Where gradients are wanted, `fc2` holds a weight for one operation with the gate and is not
    called, unless somebody has replaced it, changed it or watches it with hooks.

    >>> mlp = SwiGLU(1024)
    >>> mlp.fc1.weight.shape, mlp.fc2.weight.shape
    (torch.Size([5632, 1024]), torch.Size([1024, 2816]))
    """

    def __init__(self, d_model: int, d_intermediate: int | None = None) -> None:
        check_sizes(d_model=d_model)
        width = swiglu_width(d_model, d_intermediate)
        super().__init__()
        self.d_model = d_model
        self.fc1 = nn.Linear(d_model, 2 * width, bias=False)
        self.fc2 = nn.Linear(width, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1:] != (self.d_model,):
            raise ValueError(f"x must have shape (..., {self.d_model}), got {tuple(x.shape)}")
        return swiglu_linear(self.fc1(x), self.fc2)
