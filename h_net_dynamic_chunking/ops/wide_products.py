"""Products in float32 of vectors that are bfloat16, on a GPU at the speed of bfloat16.

A GPU multiplies float32 matrices some fifteen times slower than bfloat16 ones. Products of bfloat16
numbers are exact in float32, in which the tensor cores add them up; so a float32 weight goes there
as a sum of bfloat16 parts, of 8 bits each: three hold its 24 bits. To what is then rounded to 8 or
11 bits, as the gradient of x is, the third would add nothing. All else, and rows so few that the
splitting takes longer, is multiplied in float32, or float64.

Tensor cores cut off what they add where float32 would round it, which is less exact from some
hundred terms on. So what stays float32 is summed in pieces: y by a kernel, without which it is
multiplied in float32; the gradient of the weight, over the positions of a batch, in a batch of
products.
"""

import math

import torch
from torch import Tensor

from h_net_dynamic_chunking.ops.backend import uses_triton
from h_net_dynamic_chunking.ops.packing import accumulation_dtype

# Rows up to which a product in float32 is as fast: 28 us with 64 rows of 1024, and 5 with one,
# where three parts take 30 (H200).
_FEW = 64
# Pieces of a gradient of a weight that are there at the same time, in float32.
_AT_ONCE = 16


def splits(*factors: Tensor) -> bool:
    """Whether products of such matrices go to the tensor cores: bfloat16, or a float32 weight."""
    first, *others = factors
    if len(first) <= _FEW and any(other.dtype == torch.float32 for other in others):
        return False
    return (
        first.is_cuda
        and torch.version.hip is None
        and all(factor.numel() > 0 for factor in factors)
        and first.dtype == torch.bfloat16
        and all(other.dtype in (torch.bfloat16, torch.float32) for other in others)
    )


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    rounded_to: torch.dtype = torch.float32,
) -> Tensor:
    """y, without autograd, inside an operation; as exact as must be to be rounded to that dtype."""
    rounds = rounded_to.itemsize == 2
    if not splits(x, weight) or not (rounds or uses_triton(x)):
        dtype = accumulation_dtype(x.dtype)
        bias = None if bias is None else bias.to(dtype)
        return torch.nn.functional.linear(x.to(dtype), weight.to(dtype), bias)
    if not rounds:
        from h_net_dynamic_chunking.ops._triton.wide_product import wide_product

        return wide_product(x, _parts(weight.contiguous(), 3), bias)
    # The small part first, so that the large one is added to less rounding.
    y = None
    for part in reversed(_parts(weight, 2)):
        y = _multiply(x, part.t(), y)
    assert y is not None
    return y if bias is None else y.add_(bias)


def gradients(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of x, of the weight, and of a bias in the dtype of the weight; as `product`."""
    dtype = accumulation_dtype(x.dtype)
    grad_bias = grad.sum(0, dtype=dtype).to(weight.dtype)
    if not splits(grad, x) or not splits(x, weight):
        wide = grad.to(dtype)
        grad_weight = wide.t() @ x.to(dtype)
        return (wide @ weight.to(dtype)).to(x.dtype), grad_weight.to(weight.dtype), grad_bias
    high, *low = _parts(weight, 2)
    if low:
        # In float32 until the end: a sum that bfloat16 holds on its way is rounded more than once,
        # which made 1.6 times the least mean square error (H200).
        grad_x = _multiply(grad, high, _multiply(grad, low[0])).to(x.dtype)
    else:
        grad_x = torch.mm(grad, high)
    grad_weight = _sum_of_outer(grad, x) if low else _multiply(grad.t(), x).to(weight.dtype)
    return grad_x, grad_weight, grad_bias


def _parts(weight: Tensor, most: int) -> list[Tensor]:
    """bfloat16 matrices that add up to the weight, or nearly, the largest first."""
    parts = [weight.to(torch.bfloat16)]
    rest = weight
    while weight.dtype != torch.bfloat16 and len(parts) < most:
        rest = rest - parts[-1]
        parts.append(rest.to(torch.bfloat16))
    return parts


def _multiply(a: Tensor, b: Tensor, plus: Tensor | None = None) -> Tensor:
    """a b of bfloat16 matrices, in float32; added to `plus` in place if that is given."""
    if plus is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.addmm(plus, a, b, out_dtype=torch.float32, out=plus)


def _sum_of_outer(a: Tensor, b: Tensor) -> Tensor:
    """a^T b of bfloat16 a (total, m) and b (total, n), in float32 as exact as its sums are."""
    piece = _piece(len(a))
    pieces = len(a) // piece
    if pieces < 2:
        return _multiply(a.t(), b)
    whole = pieces * piece
    first = [x[:whole].view(pieces, piece, x.shape[1]) for x in (a, b)]
    groups = [torch.split(x, _AT_ONCE) for x in first]
    sums = [_multiply_batched(x.transpose(1, 2), y).sum(0) for x, y in zip(*groups, strict=True)]
    product = sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)
    return _multiply(a[whole:].t(), b[whole:], product) if whole < len(a) else product


def _piece(total: int) -> int:
    """Positions that tensor cores add up at a time, of that many: a power of 2.

    Their error is that of a piece, in proportion to its length, where that of float32 grows with
    the root of the total. Of 100 positions, in pieces of 32, to 16384, in pieces of 512, it is 0.7
    to 1.3 times that of four sums in float32 added up (emulated as an H200 adds).
    """
    return 1 << (int(6 * math.sqrt(total)).bit_length() - 1)


def _multiply_batched(a: Tensor, b: Tensor) -> Tensor:
    """a b of batches of bfloat16 matrices, in float32."""
    return torch.bmm(a, b, out_dtype=torch.float32)
