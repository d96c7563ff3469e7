"""The inside of a Mamba-2 layer on torch, against the oracles one after the other."""

import pytest
import torch
from torch import Tensor

from h_net_dynamic_chunking.ops import Mamba2Parameters, mamba2_inner, reference
from tests.ops.mamba2_cases import mamba2_inputs
from tests.support import (
    DEVICES,
    RAGGED,
    assert_close,
    assert_same_function,
    assert_within_low_precision_budget,
    compiled,
    cumulative,
    randn,
)


def inner(projected: Tensor, *parameters: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    return mamba2_inner(projected, Mamba2Parameters(*parameters), cu_seqlens, chunk_size=8)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lens", RAGGED[:-1])
def test_oracle(lens: list[int], device: str) -> None:
    cu_seqlens = cumulative(lens, device)
    assert_same_function(
        lambda *inputs: inner(*inputs, cu_seqlens=cu_seqlens),
        lambda *inputs: reference.mamba2_inner(*inputs, cu_seqlens),
        mamba2_inputs(sum(lens), device=device),
    )


@pytest.mark.parametrize("shape", [(2, 0), (0, 3), (2, 1), (3, 9)])
def test_padded_rows_are_packed_sequences(shape: tuple[int, int]) -> None:
    cu_seqlens = cumulative([shape[1]] * shape[0])
    assert_same_function(
        lambda projected, *rest: inner(projected.unflatten(0, shape), *rest).flatten(0, 1),
        lambda *inputs: reference.mamba2_inner(*inputs, cu_seqlens),
        mamba2_inputs(shape[0] * shape[1]),
    )


@pytest.mark.parametrize("cu_seqlens", [None, torch.tensor([0, 1, 4, 5])])
def test_gradcheck_and_opcheck(cu_seqlens: Tensor | None) -> None:
    """Over two chunks and a part of a third, without and with resets."""
    positions = (1, 5) if cu_seqlens is None else (5,)
    inputs = mamba2_inputs(*positions, heads=1, head_dim=2, d_state=2)
    assert torch.autograd.gradcheck(lambda *a: inner(*a, cu_seqlens=cu_seqlens), inputs)
    rest = (None, 1e-5, cu_seqlens, 2)
    torch.library.opcheck(torch.ops.h_net.mamba2_inner.default, (*inputs, *rest))
    plain = tuple(x.detach() for x in inputs)
    grad, y, convolved = (randn(*positions, d, seed=d).detach() for d in (2, 2, 6))
    backward = (grad, *plain, *rest, y, convolved, y.new_empty(0, 1, 2, 2))
    torch.library.opcheck(torch.ops.h_net.mamba2_inner_backward.default, backward)
    (gradient,) = torch.autograd.grad(
        inner(*inputs, cu_seqlens=cu_seqlens).sum(), inputs[0], create_graph=True
    )
    with pytest.raises(RuntimeError, match="mamba2_inner_backward has no derivative"):
        gradient.sum().backward()


def test_compiles_once_for_all_lengths() -> None:
    """The first time twice, because a float argument, eps, makes dynamo start again."""
    counts = []
    run, compilations = compiled(lambda *inputs: inner(*inputs[:-1], cu_seqlens=inputs[-1]))
    for lens in ([4, 3], [19, 2], [5, 38]):
        cu_seqlens = cumulative(lens)
        assert_same_function(
            lambda *inputs, cu=cu_seqlens: run(*inputs, cu),
            lambda *inputs, cu=cu_seqlens: reference.mamba2_inner(*inputs, cu),
            mamba2_inputs(sum(lens)),
        )
        counts.append(compilations())
    assert counts == counts[:1] * 3


def test_tail_is_never_read() -> None:
    """Of the gradient neither; zeros come out of it."""
    projected, *parameters = mamba2_inputs(12)
    cu_seqlens = cumulative([3, 0, 6])
    with torch.no_grad():
        projected[9:] = torch.nan
    out = inner(projected, *parameters, cu_seqlens=cu_seqlens)
    weights = torch.ones_like(out)
    weights[9:] = torch.nan
    got = torch.autograd.grad(out, (projected, *parameters), weights)
    short = projected[:9].detach().requires_grad_()
    want = reference.mamba2_inner(short, *parameters, cu_seqlens)
    assert_close("out", out[:9], want)
    assert not out[9:].any()
    assert not got[0][9:].any()
    exact = torch.autograd.grad(want.sum(), (short, *parameters))
    for i, (one, other) in enumerate(zip((got[0][:9], *got[1:]), exact, strict=True)):
        assert_close(f"gradient of input {i}", one, other)


def test_low_precision_budget() -> None:
    """bfloat16 rows beside float32 parameters, as autocast has them, and beside bfloat16 ones."""
    cu_seqlens = cumulative([30, 33])
    rounded = [x.detach().bfloat16() for x in mamba2_inputs(63)]
    weights = randn(63, 6, seed=9).detach().bfloat16()

    def run(op: object, dtype: torch.dtype, parameter_dtype: torch.dtype) -> tuple[Tensor, ...]:
        inputs = [rounded[0].to(dtype), *(x.to(parameter_dtype) for x in rounded[1:])]
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = op(*leaves)  # type: ignore[operator]
        assert out.dtype == dtype
        return (out, *torch.autograd.grad(out, leaves, weights.to(dtype)))

    got = lambda *inputs: inner(*inputs, cu_seqlens=cu_seqlens)  # noqa: E731
    oracle = lambda *inputs: reference.mamba2_inner(*inputs, cu_seqlens)  # noqa: E731
    plain = run(oracle, torch.bfloat16, torch.bfloat16)
    exact = run(oracle, torch.float64, torch.float64)
    for parameter_dtype in (torch.float32, torch.bfloat16):
        results = run(got, torch.bfloat16, parameter_dtype)
        for one, other, true in zip(results, plain, exact, strict=True):
            assert_within_low_precision_budget(one, other, true)


def test_bad_inputs() -> None:
    projected, *parameters = mamba2_inputs(5)
    with pytest.raises(ValueError, match=r"projected must be .* \(total, dim\)"):
        inner(projected[None], *parameters, cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="projected must have 22 channels, got 21"):
        inner(projected[:, 1:], *parameters, cu_seqlens=torch.tensor([0, 5]))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (
            "conv_weight",
            (14, 2, 3),
            r"conv_weight must have shape \(14, 1, taps\), got \(14, 2, 3\)",
        ),
        ("conv_bias", (14, 1), r"conv_bias must have one dimension, got \(14, 1\)"),
        ("conv_bias", (13,), r"conv_bias must have 6 \+ 2 d_state entries, got 13"),
        ("dt_bias", (1,), r"dt_bias must have shape \(2,\), got \(1,\)"),
        ("A_log", (4,), r"A_log must have as many entries as divide 6, got 4"),
        ("D", (3,), r"D must have shape \(2,\), got \(3,\)"),
        ("norm_weight", (), r"norm_weight must have one dimension, got \(\)"),
    ],
)
def test_parameters_that_do_not_fit(name: str, shape: tuple[int, ...], message: str) -> None:
    projected, *parameters = mamba2_inputs(5)
    wrong = Mamba2Parameters(*parameters)._replace(**{name: torch.ones(shape)})
    with pytest.raises(ValueError, match=message):
        mamba2_inner(projected, wrong, torch.tensor([0, 5]))
