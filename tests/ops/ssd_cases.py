"""Arguments of the recurrence, for its tests on torch and on Triton."""

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.support import randn

NAMES = ("x", "dt", "A", "B", "C", "D")


def ssd_inputs(
    *positions: int,
    heads: int = 3,
    head_dim: int = 4,
    d_state: int = 5,
    seed: int = 0,
    device: str = "cpu",
) -> tuple[Tensor, ...]:
    """float64; positions are (total,) or (batch, length). x, B and C are slices of one buffer."""
    width = heads * head_dim
    wide = randn(*positions, width + 2 * d_state, seed=seed, device=device).detach()
    wide.requires_grad_()
    x, B, C = wide.split([width, d_state, d_state], dim=-1)
    return (
        x.unflatten(-1, (heads, head_dim)),
        F.softplus(
            randn(*positions, heads, seed=seed + 1, device=device).detach() - 2
        ).requires_grad_(),
        (-randn(heads, seed=seed + 2, device=device).detach().exp()).requires_grad_(),
        B,
        C,
        randn(heads, seed=seed + 3, device=device),
    )


def with_tail(inputs: tuple[Tensor, ...], live: int) -> tuple[Tensor, ...]:
    """Detached copies that are NaN from position `live` on, and require gradients."""
    copies = [x.detach().clone() for x in inputs]
    for i in (0, 1, 3, 4):
        copies[i][live:] = torch.nan
    return tuple(x.requires_grad_() for x in copies)
