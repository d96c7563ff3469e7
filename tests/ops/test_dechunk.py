"""Dechunking against the oracles of its parts, in value and gradient, on both backends."""

from typing import Any

import pytest
import torch
from torch import Tensor

from h_net_dynamic_chunking.ops import Segmentation, dechunk, reference, segment
from tests.support import (
    DEVICES,
    RAGGED,
    assert_same_function,
    boundaries,
    compiled,
    cumulative,
    probabilities,
    randn,
)


def oracle(
    z: Tensor,
    probs: Tensor,
    segmentation: Segmentation,
    residual: Tensor | None = None,
    *,
    straight_through: bool = True,
    weigh_input: bool = True,
    clamp: float | None = None,
) -> Tensor:
    """Eq. (5) to (9), one position at a time."""
    p = probs[segmentation.boundary_positions]
    p = p if clamp is None else p.clamp(clamp, 1 - clamp)
    smoothed, _ = reference.ema_smooth(z, p, segmentation.cu_chunks, weigh_input=weigh_input)
    confidence = probs.where(segmentation.boundary_mask, 1 - probs) if straight_through else None
    return reference.expand(smoothed, segmentation.chunk_of_position, confidence, residual)


def case(lens: list[int], share: float, device: str) -> tuple[Segmentation, list[Tensor]]:
    """A segmentation, and z, probs and residual."""
    total = sum(lens)
    segmentation = segment(boundaries(total, share, device=device), cumulative(lens, device))
    chunks = len(segmentation.boundary_positions)
    z, residual = randn(chunks, 5, device=device), randn(total, 5, seed=4, device=device)
    return segmentation, [z, probabilities(total, device=device), residual]


def test_by_hand() -> None:
    probs = torch.tensor([1.0, 0.2, 0.5, 0.4], requires_grad=True)
    z = torch.tensor([[2.0], [4.0]], requires_grad=True)
    segmentation = segment(torch.tensor([True, False, True, False]), torch.tensor([0, 4]))
    out = dechunk(z, probs, segmentation, torch.ones(4, 1))
    assert out.flatten().tolist() == [3.0, 3.0, 4.0, 4.0]
    (out.flatten() * torch.tensor([1.0, 10.0, 100.0, 1000.0])).sum().backward()
    # 11 + 0.5 * 1100 for the first chunk; 0.5 * 1100 for the second.
    assert z.grad is not None
    assert probs.grad is not None
    assert z.grad.flatten().tolist() == [561.0, 550.0]
    # Smoothing: 561 * 2 and 1100 * (4 - 2); confidence: g s at boundaries, -g s between.
    assert probs.grad.tolist() == [1122.0 + 2.0, -20.0, 2200.0 + 300.0, -3000.0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lens", RAGGED)
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_oracle(lens: list[int], share: float, device: str) -> None:
    segmentation, inputs = case(lens, share, device)
    for tensors in (inputs, inputs[:2]):
        assert_same_function(
            lambda z, p, *r: dechunk(z, p, segmentation, *r),
            lambda z, p, *r: oracle(z, p, segmentation, *r),
            tensors,
        )


@pytest.mark.parametrize(
    "options",
    [{"straight_through": False}, {"weigh_input": False}, {"clamp": 0.1}],
)
def test_options(options: dict[str, Any]) -> None:
    segmentation, inputs = case([3, 0, 1, 40], 0.4, "cpu")
    assert_same_function(
        lambda z, p, r: dechunk(z, p, segmentation, r, **options),
        lambda z, p, r: oracle(z, p, segmentation, r, **options),
        inputs,
    )


def test_gradcheck_and_opcheck() -> None:
    """The numerical gradient sees no confidence, whose effect is only on the backward pass."""
    segmentation, (z, p, residual) = case([3, 0, 4], 0.4, "cpu")
    p = (0.1 + 0.8 * p).detach().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z, p, r: dechunk(z, p, segmentation, r, straight_through=False), (z, p, residual)
    )
    indices = (
        segmentation.chunk_of_position,
        segmentation.slot_of_position,
        segmentation.boundary_positions,
        segmentation.starts,
        segmentation.cu_chunks,
    )
    projection = randn(5, 5, seed=5), randn(5, seed=6)
    none = None, None
    for options in (
        (residual, *none, torch.float64, True, True),
        (residual, *projection, torch.float64, True, True),
        (None, *none, torch.float32, False, False),
    ):
        rest = *indices, *options, 0.1, True, False
        torch.library.opcheck(torch.ops.h_net.dechunk.default, (z, p, *rest))
    plain = z.detach(), p.detach(), z.detach()
    torch.library.opcheck(
        torch.ops.h_net.dechunk_backward.default,
        (residual.detach(), *plain, *indices, True, True, 0.1, False),
    )


def test_compiles_once_for_all_lengths() -> None:
    run, compilations = compiled(lambda z, p, r, *s: dechunk(z, p, Segmentation(*s, 0), r))
    for lens in ([14, 3], [19, 2], [5, 38]):
        segmentation, inputs = case(lens, 0.4, "cpu")
        assert_same_function(
            lambda z, p, r, s=segmentation: run(z, p, r, *s[:-1]),
            lambda z, p, r, s=segmentation: oracle(z, p, s, r),
            inputs,
        )
    assert compilations() == 1


def test_the_sum_is_rounded_to_the_dtype_asked_for() -> None:
    segmentation, (z, p, residual) = case([7], 0.4, "cpu")
    out = dechunk(z, p, segmentation, residual, dtype=torch.bfloat16)
    assert torch.equal(out, oracle(z, p, segmentation, residual).to(torch.bfloat16))
    assert dechunk(z.float(), p, segmentation, residual).dtype == torch.float64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": torch.zeros(3)}, "z must be"),
        ({"z": torch.zeros(9, 2)}, "z must have as many rows as segmentation.boundary_positions"),
        ({"probs": torch.zeros(3)}, "probs must have as many rows as segmentation.starts"),
        ({"residual": torch.zeros(4, 3)}, r"residual must have shape \(4, 2\)"),
        ({"clamp": 0.5}, r"clamp must be None or in \[0, 0.5\), got 0.5"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    segmentation = segment(torch.ones(4, dtype=torch.bool), torch.tensor([0, 4]))
    arguments = {"z": torch.zeros(4, 2), "probs": torch.zeros(4), **change}
    with pytest.raises(ValueError, match=message):
        dechunk(segmentation=segmentation, **arguments)
