"""Zeros in the tail, on torch."""

import pytest
import torch

from h_net_dynamic_chunking.ops import zero_tail
from tests.support import compiled, cumulative, randn


@pytest.mark.parametrize("lens", [[], [0, 0], [3, 0, 2], [7]])
def test_values_and_gradients(lens: list[int]) -> None:
    """Neither the tail nor its gradient is read."""
    x, live = randn(7, 2, 3), sum(lens)
    with torch.no_grad():
        x[live:] = torch.nan
    out = zero_tail(x, cumulative(lens))
    weights = torch.where(torch.arange(7)[:, None, None] < live, 2.0, torch.nan).expand(7, 2, 3)
    (gradient,) = torch.autograd.grad(out, x, weights.double())
    assert torch.equal(out[:live], x[:live])
    assert not out[live:].any()
    assert (gradient[:live] == 2).all()
    assert not gradient[live:].any()


def test_gradcheck_opcheck_and_compile() -> None:
    x, cu_seqlens = randn(5, 2), torch.tensor([0, 3])
    assert torch.autograd.gradcheck(lambda x: zero_tail(x, cu_seqlens), x)
    torch.library.opcheck(torch.ops.h_net.zero_tail.default, (x, cu_seqlens))
    run, compilations = compiled(zero_tail)
    for total in (5, 8):
        x = randn(total, 2)
        assert torch.equal(run(x, cu_seqlens), zero_tail(x, cu_seqlens))
    assert compilations() == 1


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"x must have shape \(total, \.\.\.\), got \(\)"):
        zero_tail(torch.ones(()), torch.tensor([0]))
    with pytest.raises(ValueError, match="cu_seqlens must be int32 or int64"):
        zero_tail(torch.ones(3), torch.tensor([0.0, 3.0]))
