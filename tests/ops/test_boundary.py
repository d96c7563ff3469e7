"""Boundary probability against its oracle, in value and gradient, at every edge."""

import pytest
import torch

from h_net_dynamic_chunking.ops import (
    boundary_probability,
    boundary_probability_of_pairs,
    boundary_probability_step,
    reference,
)
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


def test_by_hand() -> None:
    """Equal, orthogonal and opposite neighbours: 0, 0.5 and 1; 1 at the starts."""
    x = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, -3.0], [5.0, 5.0]])
    p = boundary_probability(x, x, torch.tensor([0, 4, 5]))
    assert p.tolist() == [1.0, 0.0, 0.5, 1.0, 1.0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lens", RAGGED)
@pytest.mark.parametrize("dim", [1, 5])
def test_oracle(lens: list[int], dim: int, device: str) -> None:
    cu_seqlens = cumulative(lens, device)
    q, k = (randn(sum(lens), dim, seed=s, device=device) for s in (0, 1))
    assert_same_function(
        lambda q, k: boundary_probability(q, k, cu_seqlens),
        lambda q, k: reference.boundary_probability(q, k, cu_seqlens),
        (q, k),
    )


def test_tiles_meet() -> None:
    """A buffer of many tiles, so that the rows on both sides of a seam are used."""
    cu_seqlens = cumulative([19, 21])
    q, k = randn(40, 3000, seed=0), randn(40, 3000, seed=1)
    assert_same_function(
        lambda q, k: boundary_probability(q, k, cu_seqlens),
        lambda q, k: reference.boundary_probability(q, k, cu_seqlens),
        (q, k),
    )


def test_gradcheck_and_opcheck() -> None:
    cu_seqlens = cumulative([3, 0, 4])
    q, k = randn(7, 5, seed=0), randn(7, 5, seed=1)
    assert torch.autograd.gradcheck(lambda q, k: boundary_probability(q, k, cu_seqlens), (q, k))
    pairs = randn(7, 10)
    torch.library.opcheck(torch.ops.h_net.boundary_probability.default, (pairs, cu_seqlens))
    backward = torch.ops.h_net.boundary_probability_backward.default
    p = boundary_probability(q, k, cu_seqlens).detach()
    torch.library.opcheck(backward, (p, pairs.detach(), cu_seqlens))


def test_compiles_once_for_all_lengths() -> None:
    run, compilations = compiled(lambda q, k, cu: boundary_probability(q, k, cu).square())
    for lens in ([4, 3], [9, 2], [5, 8]):
        q, k = randn(sum(lens), 5, seed=0), randn(sum(lens), 5, seed=1)
        cu_seqlens = cumulative(lens)
        assert_same_function(
            lambda q, k, cu=cu_seqlens: run(q, k, cu),
            lambda q, k, cu=cu_seqlens: reference.boundary_probability(q, k, cu).square(),
            (q, k),
        )
    assert compilations() == 1


def test_strided_input() -> None:
    """Queries and keys are the halves of one projection: views with gaps between the rows."""
    both = randn(9, 12)
    cu_seqlens = cumulative([4, 5])
    assert_same_function(
        lambda x: boundary_probability(*x.chunk(2, -1), cu_seqlens),
        lambda x: reference.boundary_probability(*x.chunk(2, -1), cu_seqlens),
        (both,),
    )
    assert_same_function(
        lambda x: boundary_probability_of_pairs(x[:, ::2], cu_seqlens),
        lambda x: reference.boundary_probability(*x[:, ::2].chunk(2, -1), cu_seqlens),
        (both,),
    )


def test_tail_is_never_read() -> None:
    q, k = randn(7, 3, seed=0), randn(7, 3, seed=1)
    with torch.no_grad():
        q[5:], k[5:] = torch.nan, torch.nan
    p = boundary_probability(q, k, cumulative([2, 3]))
    assert p[5:].tolist() == [0, 0]
    p.sum().backward()
    assert q.grad is not None
    assert k.grad is not None
    assert q.grad.isfinite().all()
    assert k.grad.isfinite().all()
    assert not k.grad[4:].any()


def test_zero_vector_is_no_boundary_and_has_no_gradient() -> None:
    x = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    p = boundary_probability(x, x, cumulative([4]))
    assert p.tolist() == [1.0, 0.5, 0.5, 0.5]
    p.sum().backward()
    assert x.grad is not None
    assert not x.grad.any()


def test_scale_does_not_matter() -> None:
    q, k = randn(6, 4, seed=0).float(), randn(6, 4, seed=1).float()
    p = boundary_probability(q, k, cumulative([6]))
    for scale in (1e-18, 1e-12, 1e12, 1e18):
        scaled = (q * scale).detach().requires_grad_(), (k * scale).detach().requires_grad_()
        got = boundary_probability(*scaled, cumulative([6]))
        assert_close(f"scale {scale}", got, p.double())
        gradients = torch.autograd.grad(got.sum(), scaled)
        wanted = torch.autograd.grad(p.sum(), (q, k), retain_graph=True)
        for g, w in zip(gradients, wanted, strict=True):
            assert_close(f"gradient at scale {scale}", g * scale, w.double(), 1e-4)


def test_out_of_range_norms_are_no_boundary_and_no_nan() -> None:
    q = randn(6, 4).detach().float()
    for scale in (1e-30, 1e25):
        x = (q * scale).requires_grad_()
        p = boundary_probability(x, x, cumulative([6]))
        assert p.tolist() == [1.0, *[0.5] * 5]
        p.sum().backward()
        assert x.grad is not None
        assert not x.grad.any()


def test_equal_neighbours_never_have_a_negative_probability() -> None:
    x = randn(1, 700).detach().float().expand(200, 700) * torch.arange(1.0, 201)[:, None]
    p = boundary_probability(x, x, cumulative([200]))
    assert p.min() >= 0
    assert p[1:].max() < 1e-6


def test_start_key_stands_before_the_first_position() -> None:
    """With the last key of an earlier piece, two pieces give what the whole gives."""
    q, k = randn(8, 3, seed=0), randn(8, 3, seed=1)
    whole = boundary_probability(q, k, cumulative([8]))
    second = boundary_probability(q[5:], k[5:], cumulative([3]), start_key=k[4:5])
    assert_close("second piece", second, whole[5:])
    ragged = boundary_probability(
        q, k, cumulative([0, 8, 0]), start_key=randn(3, 3, seed=2).detach()
    )
    assert_close("rest of the sequence", ragged[1:], whole[1:])
    assert 0 < ragged[0] < 1


def test_step() -> None:
    q, k = randn(5, 3, seed=0), randn(5, 3, seed=1)
    p = boundary_probability(q, k, cumulative([5]))
    first = boundary_probability_step(q[:1], k[:1], torch.tensor([True]))
    steps = [boundary_probability_step(q[t : t + 1], k[t - 1 : t]) for t in range(1, 5)]
    assert_close("steps", torch.cat([first, *steps]), p)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_input_is_computed_in_float32(dtype: torch.dtype) -> None:
    q, k = randn(50, 64, seed=0).detach().to(dtype), randn(50, 64, seed=1).detach().to(dtype)
    cu_seqlens = cumulative([20, 30])
    p = boundary_probability(q, k, cu_seqlens)
    assert p.dtype == torch.float32
    assert_close("p", p, reference.boundary_probability(q.double(), k.double(), cu_seqlens))


def test_low_precision_gradient() -> None:
    dtype, cu_seqlens = torch.bfloat16, cumulative([20, 30])
    q, k = (randn(50, 64, seed=s).detach().to(dtype).requires_grad_() for s in (0, 1))
    got = torch.autograd.grad(boundary_probability(q, k, cu_seqlens).sum(), (q, k))
    plain = torch.autograd.grad(reference.boundary_probability(q, k, cu_seqlens).sum(), (q, k))
    wide = q.detach().double().requires_grad_(), k.detach().double().requires_grad_()
    exact = torch.autograd.grad(reference.boundary_probability(*wide, cu_seqlens).sum(), wide)
    for g, p, e in zip(got, plain, exact, strict=True):
        assert_within_low_precision_budget(g, p, e)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3), torch.zeros(3), torch.tensor([0, 3])), "q must be"),
        ((torch.zeros(3, 2), torch.zeros(4, 2), torch.tensor([0, 3])), "k must have the shape"),
        ((torch.zeros(3, 2), torch.zeros(3, 2), torch.tensor([0.0, 3.0])), "cu_seqlens must be"),
        (
            (torch.zeros(3, 2), torch.zeros(3, 2), torch.tensor([0, 3]), torch.zeros(2, 2)),
            "start_key must have shape",
        ),
    ],
)
def test_bad_input(arguments: tuple[torch.Tensor, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        boundary_probability(*arguments)
