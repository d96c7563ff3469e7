"""The causal convolution on torch, against the sequential oracle."""

import pytest
import torch
from torch import Tensor

from h_net_dynamic_chunking.ops import causal_conv, reference
from tests.support import (
    DEVICES,
    RAGGED,
    assert_close,
    assert_same_function,
    compiled,
    cumulative,
    randn,
)


def conv_inputs(total: int, taps: int = 4, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    x = randn(total, 5, device=device)
    return x, randn(5, 1, taps, seed=1, device=device), randn(5, seed=2, device=device)


def test_by_hand() -> None:
    """Two taps; the second sequence does not see the first."""
    x, weight = torch.tensor([[1.0], [2.0], [-3.0]]), torch.tensor([[[10.0, 1.0]]])
    got = causal_conv(x, weight, torch.tensor([0.5]), torch.tensor([0, 2, 3]))
    assert_close("out", got, torch.nn.functional.silu(torch.tensor([[1.5], [12.5], [-2.5]])))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("taps", [1, 2, 4, 6])
@pytest.mark.parametrize("lens", RAGGED[:-1])
def test_oracle(lens: list[int], taps: int, device: str) -> None:
    cu_seqlens = cumulative(lens, device)
    assert_same_function(
        lambda *inputs: causal_conv(*inputs, cu_seqlens),
        lambda *inputs: reference.causal_conv(*inputs, cu_seqlens),
        conv_inputs(sum(lens), taps, device),
    )


@pytest.mark.parametrize("shape", [(2, 0), (0, 3), (2, 1), (3, 9)])
@pytest.mark.parametrize("taps", [1, 4])
def test_padded_rows_are_packed_sequences(shape: tuple[int, int], taps: int) -> None:
    cu_seqlens = cumulative([shape[1]] * shape[0])
    x, weight, bias = conv_inputs(shape[0] * shape[1], taps)
    assert_same_function(
        lambda x, *rest: causal_conv(x.unflatten(0, shape), *rest).flatten(0, 1),
        lambda *inputs: reference.causal_conv(*inputs, cu_seqlens),
        (x, weight, bias),
    )


@pytest.mark.parametrize("cu_seqlens", [None, torch.tensor([0, 1, 4, 4])])
def test_gradcheck_and_opcheck(cu_seqlens: Tensor | None) -> None:
    x, weight, bias = conv_inputs(6, 3)
    x = x[None] if cu_seqlens is None else x
    x = x.detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda *a: causal_conv(*a, cu_seqlens), (x, weight, bias))
    torch.library.opcheck(torch.ops.h_net.causal_conv.default, (x, weight, bias, cu_seqlens))
    plain = (torch.ones_like(x), x.detach(), weight.detach(), bias.detach(), cu_seqlens)
    torch.library.opcheck(torch.ops.h_net.causal_conv_backward.default, plain)
    (gradient,) = torch.autograd.grad(
        causal_conv(x, weight, bias, cu_seqlens).sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="causal_conv_backward has no derivative"):
        gradient.sum().backward()


def test_compiles_once_for_all_lengths() -> None:
    run, compilations = compiled(causal_conv)
    for lens in ([4, 3], [19, 2], [5, 38]):
        cu_seqlens = cumulative(lens)
        assert_same_function(
            lambda *inputs, cu=cu_seqlens: run(*inputs, cu),
            lambda *inputs, cu=cu_seqlens: reference.causal_conv(*inputs, cu),
            conv_inputs(sum(lens)),
        )
    assert compilations() == 1


def test_slices_and_tails_of_nan() -> None:
    """Nothing of the tail is used, of the gradient neither; zeros come out of it."""
    wide, cu_seqlens = randn(12, 9), cumulative([3, 0, 6])
    with torch.no_grad():
        wide[9:] = torch.nan
    _, weight, bias = conv_inputs(1)
    out = causal_conv(wide[:, 2:7], weight, bias, cu_seqlens)
    weights = torch.ones_like(out)
    weights[9:] = torch.nan
    got = torch.autograd.grad(out, (wide, weight, bias), weights)
    short = wide[:9].detach().requires_grad_()
    want = reference.causal_conv(short[:, 2:7], weight, bias, cu_seqlens)
    assert_close("out", out[:9], want)
    assert not out[9:].any()
    exact = torch.autograd.grad(want.sum(), (short, weight, bias))
    assert_close("gradient of x", got[0][:9], exact[0])
    assert not got[0][9:].any()
    for name, one, other in zip(("weight", "bias"), got[1:], exact[1:], strict=True):
        assert_close(f"gradient of {name}", one, other)


def test_bad_inputs() -> None:
    x, weight, bias = conv_inputs(4)
    with pytest.raises(ValueError, match=r"x must be .* \(total, dim\)"):
        causal_conv(x[None], weight, bias, torch.tensor([0, 4]))
    with pytest.raises(ValueError, match=r"shape \(batch, length, dim\) without cu_seqlens"):
        causal_conv(x, weight, bias)
    with pytest.raises(ValueError, match=r"weight must have shape \(5, 1, taps\)"):
        causal_conv(x[None], weight[:, 0], bias)
    with pytest.raises(ValueError, match=r"bias must have shape \(5,\)"):
        causal_conv(x[None], weight, bias[:4])
    with pytest.raises(ValueError, match="cu_seqlens must be int32 or int64"):
        causal_conv(x, weight, bias, torch.tensor([0.0, 4.0]))
