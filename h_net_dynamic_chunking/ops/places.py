"""Where the positions of packed sequences stand when each has a row of its own.

Contract
    cu_seqlens:   (batch + 1,), int32 or int64
    length:       of the rows, at least that of the longest sequence
    total:        positions of the packed buffer
    out places:   int64 (total,): row * length + column of each position; -1 in the tail
    out inverse:  int64 (batch * length,): the position in each place, -1 at a pad
"""

import torch
from torch import Tensor

from h_net_dynamic_chunking.ops.backend import uses_triton
from h_net_dynamic_chunking.ops.registration import operation


def padded_places(cu_seqlens: Tensor, length: int, total: int) -> tuple[Tensor, Tensor]:
    """Places and their inverse; the contract is at the top of this file.

    >>> padded_places(torch.tensor([0, 1, 3]), 2, 3)
    (tensor([0, 2, 3]), tensor([ 0, -1,  1,  2]))
    """
    places: Tensor
    inverse: Tensor
    places, inverse = _padded_places(cu_seqlens, length, total)
    return places, inverse


@operation("padded_places")
def _padded_places(cu_seqlens: Tensor, length: int, total: int) -> tuple[Tensor, Tensor]:
    batch, device = cu_seqlens.shape[0] - 1, cu_seqlens.device
    if batch * length > 0 and uses_triton(cu_seqlens, moves_only=True):
        from h_net_dynamic_chunking.ops._triton.places import padded_places

        return padded_places(cu_seqlens, length, total)
    steps = torch.arange(length, device=device)
    grid = cu_seqlens[:-1, None].to(torch.int64) + steps
    inverse = grid.masked_fill_(grid >= cu_seqlens[1:, None], -1).flatten()
    # Every place of a real position writes its own number; the pads write to a spare slot.
    places = torch.full((total + 1,), -1, dtype=torch.int64, device=device)
    numbers = torch.arange(batch * length, device=device)
    places.scatter_(0, inverse.where(inverse >= 0, total), numbers)
    return places[:total].clone(), inverse


@_padded_places.register_fake
def _(cu_seqlens: Tensor, length: int, total: int) -> tuple[Tensor, Tensor]:
    batch = cu_seqlens.shape[0] - 1
    integers = torch.empty_like(cu_seqlens, dtype=torch.int64)
    return integers.new_empty(total), integers.new_empty(batch * length)
