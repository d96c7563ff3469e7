"""The norm of gated rows on torch, against its oracle."""

import pytest
import torch
from torch import Tensor

from h_net_dynamic_chunking.ops import gated_norm, reference
from tests.support import (
    DEVICES,
    assert_close,
    assert_rounded_once,
    assert_same_function,
    compiled,
    cumulative,
    randn,
)


def norm_inputs(*shape: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """y, z and the weight; the last number is the width."""
    y, z = randn(*shape, device=device), randn(*shape, seed=1, device=device)
    return y, z, randn(shape[-1], seed=2, device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("total", [0, 1, 11])
def test_oracle(total: int, device: str) -> None:
    inputs = norm_inputs(total, 6, device=device)
    cu_seqlens = cumulative([total], device)
    assert_same_function(lambda *a: gated_norm(*a, cu_seqlens), reference.gated_norm, inputs)
    assert_same_function(
        lambda y, z, w: gated_norm(y[None], z[None], w)[0], reference.gated_norm, inputs
    )


@pytest.mark.parametrize("cu_seqlens", [None, torch.tensor([0, 1, 3])])
def test_gradcheck_and_opcheck(cu_seqlens: Tensor | None) -> None:
    y, z, weight = norm_inputs(*((2, 2) if cu_seqlens is None else (4,)), 3)
    run = lambda *inputs: gated_norm(*inputs, cu_seqlens)  # noqa: E731
    assert torch.autograd.gradcheck(run, (y, z, weight))
    torch.library.opcheck(torch.ops.h_net.gated_norm.default, (y, z, weight, 1e-5, cu_seqlens))
    plain = (y.detach(), z.detach(), weight.detach())
    backward = (torch.ones_like(plain[0]), *plain, 1e-5, cu_seqlens)
    torch.library.opcheck(torch.ops.h_net.gated_norm_backward.default, backward)
    (gradient,) = torch.autograd.grad(run(y, z, weight).sum(), y, create_graph=True)
    with pytest.raises(RuntimeError, match="gated_norm_backward has no derivative"):
        gradient.sum().backward()


def test_compiles_once_for_all_lengths() -> None:
    """The first time twice, because a float argument, eps, makes dynamo start again."""
    counts = []
    run, compilations = compiled(gated_norm)
    for total in (7, 21, 43):
        cu_seqlens = cumulative([total])
        assert_same_function(
            lambda *inputs, cu=cu_seqlens: run(*inputs, cu),
            reference.gated_norm,
            norm_inputs(total, 5),
        )
        counts.append(compilations())
    assert counts == counts[:1] * 3


def test_slices_and_tails_of_nan() -> None:
    """Nothing of the tail is used, of the gradient neither; zeros come out of it."""
    wide, y, cu_seqlens = randn(7, 9), randn(7, 4, seed=1), cumulative([3, 2])
    weight = randn(4, seed=2)
    with torch.no_grad():
        wide[5:], y[5:] = torch.nan, torch.nan
    out = gated_norm(y, wide[:, 3:7], weight, cu_seqlens)
    weights = torch.ones_like(out)
    weights[5:] = torch.nan
    got = torch.autograd.grad(out, (y, wide, weight), weights)
    short = [x[:5].detach().requires_grad_() for x in (y, wide)]
    want = reference.gated_norm(short[0], short[1][:, 3:7], weight)
    assert_close("out", out[:5], want)
    assert not out[5:].any()
    exact = torch.autograd.grad(want.sum(), (*short, weight))
    for one, other in zip(got[:2], exact[:2], strict=True):
        assert_close("gradient", one[:5], other)
        assert not one[5:].any()
    assert_close("gradient of the weight", got[2], exact[2])


def test_rounds_once() -> None:
    y, z, weight = (x.detach().bfloat16() for x in norm_inputs(50, 64))
    exact = reference.gated_norm(y.double(), z.double(), weight.double())
    assert_rounded_once("out", gated_norm(y, z, weight, cumulative([50])), exact)


def test_bad_inputs() -> None:
    y, z, weight = norm_inputs(4, 5)
    with pytest.raises(ValueError, match=r"y must be .* \(total, dim\)"):
        gated_norm(y[None], z[None], weight, torch.tensor([0, 4]))
    with pytest.raises(ValueError, match=r"z must be torch.float64 of shape \(4, 5\)"):
        gated_norm(y, z[:3], weight, torch.tensor([0, 4]))
    with pytest.raises(ValueError, match=r"z must be torch\.float64"):
        gated_norm(y, z.float(), weight, torch.tensor([0, 4]))
    with pytest.raises(ValueError, match=r"weight must have shape \(5,\)"):
        gated_norm(y, z, weight[:4], torch.tensor([0, 4]))


def test_results_are_contiguous_whatever_y_is() -> None:
    """As registered, which torch.compile relies on."""
    y = randn(3, 2, 4).transpose(0, 1)
    z, weight = randn(2, 3, 4, seed=1), randn(4, seed=2)
    ops = torch.ops.h_net
    assert ops.gated_norm(y, z, weight, 1e-5, None).is_contiguous()
    arguments = [t.detach() for t in (y.sin(), y, y.cos(), weight)]
    torch.library.opcheck(ops.gated_norm_backward.default, (*arguments, 1e-5, None))
    assert all(g.is_contiguous() for g in ops.gated_norm_backward(*arguments, 1e-5, None))
