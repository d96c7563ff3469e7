"""Smoothing against its sequential oracle and against assoc-scan, in value and gradient."""

import pytest
import torch
from assoc_scan import AssocScan

from h_net_dynamic_chunking.ops import ema_smooth, ema_smooth_step, reference
from tests.support import (
    DEVICES,
    RAGGED,
    assert_close,
    assert_rounded_once,
    assert_same_function,
    compiled,
    cumulative,
    probabilities,
    randn,
)


def test_by_hand() -> None:
    z = torch.tensor([[2.0], [4.0], [8.0], [6.0]])
    p = torch.tensor([1.0, 0.5, 0.75, 1.0])
    smoothed, state = ema_smooth(z, p, torch.tensor([0, 3, 4]))
    assert smoothed.flatten().tolist() == [2.0, 3.0, 6.75, 6.0]
    assert state.flatten().tolist() == [6.75, 6.0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lens", RAGGED)
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("weigh_input", [True, False])
def test_oracle(lens: list[int], with_state: bool, weigh_input: bool, device: str) -> None:
    cu_chunks, total = cumulative(lens, device), sum(lens)
    inputs = [randn(total, 5, device=device), probabilities(total, device=device)]
    if with_state:
        inputs.append(randn(len(lens), 5, seed=3, device=device))
    for part in (0, 1):
        assert_same_function(
            lambda z, p, *s, i=part: ema_smooth(z, p, cu_chunks, *s, weigh_input=weigh_input)[i],
            lambda z, p, *s, i=part: reference.ema_smooth(
                z, p, cu_chunks, *(s or (None,)), weigh_input
            )[i],
            inputs,
        )


@pytest.mark.parametrize("lens", [[37], [5000]])
def test_assoc_scan_agrees(lens: list[int]) -> None:
    """An independent implementation, at a length where the recursion is three deep."""
    z, p = randn(*lens, 3), probabilities(*lens)
    scanned = AssocScan()(1 - p[None], (p[:, None] * z)[None])[0]
    assert_close("smoothed", ema_smooth(z, p, cumulative(lens)).chunks, scanned)


def test_gradcheck_and_opcheck() -> None:
    cu_chunks = cumulative([2, 0, 17])
    z, p, state = randn(19, 1), probabilities(19), randn(3, 1, seed=3)
    assert torch.autograd.gradcheck(lambda z, p: ema_smooth(z, p, cu_chunks).chunks, (z, p))
    assert torch.autograd.gradcheck(
        lambda *inputs: tuple(ema_smooth(*inputs[:2], cu_chunks, inputs[2])), (z, p, state)
    )
    for arguments in ((z, p, cu_chunks, None, True), (z, p, cu_chunks, state, False)):
        torch.library.opcheck(torch.ops.h_net.ema.default, arguments)
        plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
        smoothed = ema_smooth(*plain[:2], cu_chunks).chunks
        backward = (smoothed, *plain[:4], smoothed, plain[4])
        torch.library.opcheck(torch.ops.h_net.ema_backward.default, backward)


def test_compiles_once_for_all_lengths() -> None:
    run, compilations = compiled(lambda z, p, cu: ema_smooth(z, p, cu).chunks)
    for lens in ([4, 3], [19, 2], [5, 38]):
        cu_chunks, total = cumulative(lens), sum(lens)
        assert_same_function(
            lambda z, p, cu=cu_chunks: run(z, p, cu),
            lambda z, p, cu=cu_chunks: reference.ema_smooth(z, p, cu)[0],
            (randn(total, 5), probabilities(total)),
        )
    assert compilations() == 1


def test_strided_input() -> None:
    cu_chunks = cumulative([4, 15])
    z, p = randn(19, 12), probabilities(38)
    assert_same_function(
        lambda z, p: ema_smooth(z[:, 1::2], p[::2], cu_chunks).chunks,
        lambda z, p: reference.ema_smooth(z[:, 1::2], p[::2], cu_chunks)[0],
        (z, p),
    )


def test_tail_is_never_read() -> None:
    z, p = randn(40, 3), probabilities(40)
    with torch.no_grad():
        z[23:], p[23:] = torch.nan, torch.nan
    smoothed, state = ema_smooth(z, p, cumulative([3, 20]))
    want, want_state = reference.ema_smooth(z[:23], p[:23], cumulative([3, 20]))
    assert_close("smoothed", smoothed[:23], want)
    assert_close("state", state, want_state)
    state.sum().backward()
    for gradient in (z.grad, p.grad):
        assert gradient is not None
        assert gradient.isfinite().all()
        assert not gradient[23:].any()


def test_all_probabilities_one_is_the_identity() -> None:
    z = randn(33, 4)
    p = torch.ones(33, dtype=torch.float64)
    assert torch.equal(ema_smooth(z, p, cumulative([33])).chunks, z)


def test_pieces_and_steps_equal_the_whole() -> None:
    z, p = randn(30, 3), probabilities(30)
    whole = ema_smooth(z, p, cumulative([30])).chunks
    head, state = ema_smooth(z[:19], p[:19], cumulative([19]))
    tail, _ = ema_smooth(z[19:], p[19:], cumulative([11]), state)
    assert_close("pieces", torch.cat([head, tail]), whole)
    state, steps = torch.zeros(1, 3, dtype=torch.float64), []
    for t in range(30):
        state = ema_smooth_step(z[t : t + 1], p[t : t + 1], state)
        steps.append(state)
    assert_close("steps", torch.cat(steps), whole)


def test_low_precision_input_accumulates_in_float32() -> None:
    z = randn(200, 8).detach().to(torch.bfloat16)
    p, cu_chunks = probabilities(200).detach().float(), cumulative([120, 80])
    z.requires_grad_()
    got = ema_smooth(z, p, cu_chunks).chunks
    wide = z.detach().double().requires_grad_()
    exact, _ = reference.ema_smooth(wide, p.double(), cu_chunks)
    assert_rounded_once("smoothed", got, exact)
    weights = torch.ones_like(got)
    (gradient,) = torch.autograd.grad(got, z, weights)
    (exact_gradient,) = torch.autograd.grad(exact, wide, weights.double())
    assert_rounded_once("gradient", gradient, exact_gradient)


def test_low_precision_steps_keep_a_wide_state() -> None:
    z = randn(100, 4).detach().to(torch.bfloat16)
    p = torch.full((100,), 0.05)
    exact, _ = reference.ema_smooth(z.double(), p.double(), cumulative([100]))
    state = torch.zeros(1, 4)
    for t in range(100):
        state = ema_smooth_step(z[t : t + 1], p[t : t + 1], state)
    assert state.dtype == torch.float32
    assert_close("state", state[0], exact[-1])


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("lens", [[10, 20, 10], [300, 100]])
def test_what_is_not_finite_stays_in_its_sequence_and_its_future(
    lens: list[int], bad: float
) -> None:
    z, p = randn(sum(lens), 3), (probabilities(sum(lens)).detach() * 0.9).requires_grad_()
    at = lens[0] // 2
    with torch.no_grad():
        z[at, 1] = bad
    cu_chunks = cumulative(lens)
    smoothed = ema_smooth(z, p, cu_chunks).chunks
    touched = torch.zeros(sum(lens), dtype=torch.bool)
    touched[at : lens[0]] = True
    assert smoothed[touched].isnan().any(1).all()
    clean, _ = reference.ema_smooth(z, p, cu_chunks)
    assert_close("the rest", smoothed[~touched], clean[~touched])
    grad = torch.ones_like(z)
    grad[at, 1] = bad
    (gradient,) = torch.autograd.grad(smoothed, p, grad)
    assert gradient[lens[0] :].isfinite().all()


@pytest.mark.parametrize("weigh_input", [True, False])
@pytest.mark.parametrize("at", [100, 250, 399])
def test_a_probability_of_nan_stays_in_its_sequence_and_its_future(
    at: int, weigh_input: bool
) -> None:
    """Forward in its future, backward in its past as well; at both ends of its sequence too."""
    z, p = randn(500, 3), probabilities(500)
    results = []
    for value in (0.5, torch.nan):
        with torch.no_grad():
            p[at] = value
        smoothed = ema_smooth(z, p, cumulative([100, 300, 100]), weigh_input=weigh_input).chunks
        gradients = torch.autograd.grad(smoothed, (z, p), torch.ones_like(z))
        results.append((smoothed, *gradients))
    (clean, *clean_gradients), (dirty, *gradients) = results
    assert dirty[at:400].isnan().all()
    for rows in (slice(0, at), slice(400, 500)):
        assert_close("smoothed", dirty[rows], clean[rows])
    for rows in (slice(0, 100), slice(400, 500)):
        for got, want in zip(gradients, clean_gradients, strict=True):
            assert_close("gradient", got[rows], want[rows])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3), torch.zeros(3), torch.tensor([0, 3])), "z must be"),
        ((torch.zeros(3, 2), torch.zeros(4), torch.tensor([0, 3])), "p must have as many rows"),
        ((torch.zeros(3, 2), torch.zeros(3), torch.zeros(1, 2)), "cu_chunks must have shape"),
        (
            (torch.zeros(3, 2), torch.zeros(3), torch.tensor([0, 3]), torch.zeros(2, 2)),
            "state must have shape",
        ),
    ],
)
def test_bad_input(arguments: tuple[torch.Tensor, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ema_smooth(*arguments)
