"""The kernels of boundary probability and of the ratio loss against the torch operations."""

import pytest
import torch

from h_net_dynamic_chunking.ops import boundary_probability_of_pairs, reference, use_backend
from h_net_dynamic_chunking.ops.ratio import (
    _ratio_loss,
    _ratio_loss_backward,
    pooled_ratio_loss,
)
from tests.ops.triton_cases import DEVICE, LENS, assert_kernels_agree
from tests.ops.triton_cases import poisoned_memory as poisoned_memory
from tests.support import assert_close, boundaries, cumulative, probabilities, randn

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:.*deterministic")


@pytest.mark.parametrize(
    ("dim", "index"), [(1, torch.int64), (5, torch.int32), (4100, torch.int64)]
)
def test_agrees(dim: int, index: torch.dtype) -> None:
    """4100 channels are more than the registers of a program hold."""
    for lens in LENS if dim < 10 else [[3, 1]]:
        cu_seqlens = cumulative(lens, DEVICE).to(index)
        assert_kernels_agree(
            lambda x, cu=cu_seqlens: boundary_probability_of_pairs(x, cu),
            randn(sum(lens), 2 * dim),
        )


def test_oracle() -> None:
    pairs, cu_seqlens = randn(12, 10, device=DEVICE).detach().float(), cumulative([4, 8], DEVICE)
    with use_backend("triton"):
        p = boundary_probability_of_pairs(pairs, cu_seqlens)
    wide = pairs.double().chunk(2, dim=1)
    assert_close("p", p, reference.boundary_probability(*wide, cu_seqlens))


def test_strided_input_and_a_tail_of_nan() -> None:
    both = randn(9, 24)
    with torch.no_grad():
        both[7:] = torch.nan
    cu_seqlens = cumulative([2, 5], DEVICE)
    assert_kernels_agree(lambda x: boundary_probability_of_pairs(x[:, ::2], cu_seqlens), both)


def test_norms_out_of_range_are_no_boundary() -> None:
    q = randn(6, 8, device=DEVICE).detach().float()
    for scale in (0.0, 1e-30, 1e25):
        x = (q * scale).requires_grad_()
        with use_backend("triton"):
            p = boundary_probability_of_pairs(x, cumulative([6], DEVICE))
        assert p.tolist() == [1.0, *[0.5] * 5]
        (gradient,) = torch.autograd.grad(p.sum(), x)
        assert not gradient.any()


def test_backward_follows_the_choice_of_the_forward_pass() -> None:
    """Bitwise, though it is called outside of the block."""
    x, cu_seqlens = randn(40, 10, device=DEVICE).detach().float(), cumulative([40], DEVICE)
    gradients = []
    for inside in (True, False):
        leaf = x.clone().requires_grad_()
        with use_backend("triton"):
            p = boundary_probability_of_pairs(leaf, cu_seqlens)
            if inside:
                p.sum().backward()
        if not inside:
            p.sum().backward()
        gradients.append(leaf.grad)
    assert gradients[0] is not None
    assert gradients[1] is not None
    assert torch.equal(gradients[0], gradients[1])


@pytest.mark.parametrize("lens", [*LENS, [5000]])
def test_ratio_loss(lens: list[int]) -> None:
    """With a tail that counts for nothing."""
    total = sum(lens) + 3
    mask, p = boundaries(total).to(DEVICE), probabilities(total)
    with torch.no_grad():
        p[-3:] = torch.nan
    cu_seqlens = cumulative(lens, DEVICE)
    for part in (0, 1):  # plain, and weighted
        assert_kernels_agree(
            lambda p, i=part: pooled_ratio_loss(mask, p, cu_seqlens, 6.0, 0.5)[i], p
        )


def test_ratio_loss_adds_to_the_gradient_of_others() -> None:
    """In the tail too, where it has nothing to add."""
    lens = [5, 0, 5000]
    mask, p = boundaries(5008).to(DEVICE), probabilities(5008).detach().float().to(DEVICE)
    cu_seqlens, others = cumulative(lens, DEVICE), randn(5008, device=DEVICE).detach().float()
    one, results = torch.ones((), device=DEVICE), []
    for backend in ("torch", "triton"):
        with use_backend(backend):  # type: ignore[arg-type]  # of a loop
            _, _, slope = _ratio_loss(mask, p, cu_seqlens, 6.0, 0.5)
            arguments = one, one, slope, p, cu_seqlens, 0.5
            alone = _ratio_loss_backward(*arguments)
            both = _ratio_loss_backward(*arguments, others)
        torch.testing.assert_close(both, alone + others)
        results.append(both)
    torch.testing.assert_close(*results)
