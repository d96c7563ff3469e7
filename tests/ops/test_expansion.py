"""Expansion against its oracle: repeats, straight-through gradient, residual."""

import pytest
import torch

from h_net_dynamic_chunking.ops import expand, expand_step, reference, segment
from tests.support import (
    DEVICES,
    RAGGED,
    assert_close,
    assert_rounded_once,
    assert_same_function,
    boundaries,
    compiled,
    cumulative,
    probabilities,
    randn,
)


def _chunk_of_position(lens: list[int], share: float = 0.4, device: str = "cpu") -> torch.Tensor:
    return segment(boundaries(sum(lens), share), cumulative(lens)).chunk_of_position.to(device)


def test_by_hand() -> None:
    smoothed = torch.tensor([[1.0], [2.0]], requires_grad=True)
    confidence = torch.tensor([1.0, 0.6, 0.9], requires_grad=True)
    out = expand(smoothed, torch.tensor([0, 0, 1]), confidence, torch.ones(3, 1))
    assert out.flatten().tolist() == [2.0, 2.0, 3.0]
    (out.flatten() * torch.tensor([1.0, 10.0, 100.0])).sum().backward()
    assert smoothed.grad is not None
    assert confidence.grad is not None
    assert smoothed.grad.flatten().tolist() == [11.0, 100.0]
    assert confidence.grad.tolist() == [1.0, 10.0, 200.0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lens", RAGGED)
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_oracle(lens: list[int], share: float, device: str) -> None:
    chunk_of_position = _chunk_of_position(lens, share, device)
    total, chunks = sum(lens), int(chunk_of_position.max()) + 1 if sum(lens) else 0
    smoothed, residual = randn(chunks, 5, device=device), randn(total, 5, seed=1, device=device)
    confidence = probabilities(total, device=device)
    for inputs in ((smoothed,), (smoothed, confidence), (smoothed, confidence, residual)):
        assert_same_function(
            lambda s, *rest: expand(s, chunk_of_position, *rest),
            lambda s, *rest: reference.expand(s, chunk_of_position, *rest),
            inputs,
        )


def test_tiles_meet() -> None:
    chunk_of_position = _chunk_of_position([40])
    smoothed, confidence = randn(int(chunk_of_position[-1]) + 1, 3000), probabilities(40)
    assert_same_function(
        lambda s, c: expand(s, chunk_of_position, c),
        lambda s, c: reference.expand(s, chunk_of_position, c),
        (smoothed, confidence),
    )


def test_gradcheck_and_opcheck() -> None:
    """The numerical gradient sees no confidence, whose effect is only on the backward pass."""
    chunk_of_position = _chunk_of_position([3, 0, 4])
    smoothed, residual = randn(int(chunk_of_position[-1]) + 1, 5), randn(7, 5, seed=1)
    assert torch.autograd.gradcheck(
        lambda s, r: expand(s, chunk_of_position, None, r), (smoothed, residual)
    )
    for rest in ((None, None), (probabilities(7), residual)):
        torch.library.opcheck(torch.ops.h_net.expand.default, (smoothed, chunk_of_position, *rest))
    backward = (residual.detach(), smoothed.detach(), chunk_of_position)
    torch.library.opcheck(torch.ops.h_net.expand_backward.default, backward)


def test_compiles_once_for_all_lengths() -> None:
    run, compilations = compiled(lambda s, chunk, c, r: expand(s, chunk, c, r))
    for lens in ([4, 3], [9, 2], [5, 8]):
        chunk_of_position, total = _chunk_of_position(lens), sum(lens)
        inputs = randn(int(chunk_of_position[-1]) + 1, 5), probabilities(total), randn(total, 5)
        assert_same_function(
            lambda s, c, r, chunk=chunk_of_position: run(s, chunk, c, r),
            lambda s, c, r, chunk=chunk_of_position: reference.expand(s, chunk, c, r),
            inputs,
        )
    assert compilations() == 1


def test_strided_input() -> None:
    chunk_of_position = torch.tensor([0, 0, 1, 2])
    assert_same_function(
        lambda s, r: expand(s[::2, 1::2], chunk_of_position, None, r[:, ::2]),
        lambda s, r: reference.expand(s[::2, 1::2], chunk_of_position, None, r[:, ::2]),
        (randn(6, 8), randn(4, 8, seed=1)),
    )


def test_tail_receives_the_residual_and_sends_nothing() -> None:
    smoothed, confidence = randn(2, 3), probabilities(4)
    out = expand(smoothed, torch.tensor([0, 1, -1, -1]), confidence)
    assert not out[2:].any()
    out.sum().backward()
    assert smoothed.grad is not None
    assert confidence.grad is not None
    assert smoothed.grad.tolist() == [[1.0] * 3] * 2
    assert not confidence.grad[2:].any()


def test_step() -> None:
    smoothed, residual = randn(1, 3), randn(1, 3, seed=1)
    assert torch.equal(
        expand_step(smoothed, residual), expand(smoothed, torch.tensor([0]), None, residual)
    )
    assert torch.equal(expand_step(smoothed), smoothed)


def test_low_precision_gradient_sums_in_float32() -> None:
    chunk_of_position = torch.zeros(500, dtype=torch.int64)
    smoothed = randn(1, 8).detach().to(torch.bfloat16).requires_grad_()
    weights = randn(500, 8, seed=1).detach().to(torch.bfloat16)
    (got,) = torch.autograd.grad((expand(smoothed, chunk_of_position) * weights).sum(), smoothed)
    assert_rounded_once("gradient", got[0], weights.double().sum(0))


def test_low_precision_sum_with_the_residual_is_rounded_once() -> None:
    smoothed = randn(1, 512).detach().to(torch.bfloat16)
    residual = randn(1, 512, seed=1).detach()
    out = expand(smoothed, torch.tensor([0]), None, residual.float())
    assert_close("output", out, smoothed.double() + residual)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3), torch.tensor([0])), "smoothed must be"),
        ((torch.zeros(3, 2), torch.tensor([0.0])), "chunk_of_position must be int64"),
        ((torch.zeros(3, 2), torch.tensor([0]), torch.zeros(2)), "confidence must have as many"),
        (
            (torch.zeros(3, 2), torch.tensor([0]), None, torch.zeros(1, 3)),
            "residual must be as wide as smoothed",
        ),
    ],
)
def test_bad_input(arguments: tuple[torch.Tensor, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expand(*arguments)
