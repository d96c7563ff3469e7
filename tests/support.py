"""What the tests share: ragged cases, tolerances by dtype, and comparison against an oracle."""

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

# Empty sequences at both ends and in the middle, single tokens, and lengths over the EMA's block
# of 16 and over the square of it, where its recursion is two deep.
RAGGED = [[5], [1], [0], [3, 0, 1, 7], [0, 4, 0], [1, 1, 1], [0, 0], [40, 3], [300, 17]]

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    ),
]

# Relative to the largest value of the reference.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def cumulative(lens: Sequence[int], device: str = "cpu") -> Tensor:
    """cu_seqlens of the lengths."""
    return torch.tensor([0, *lens], device=device).cumsum(0)


def generator(seed: int = 0) -> torch.Generator:
    """Seeded random numbers that no other test touches."""
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0, device: str = "cpu") -> Tensor:
    """float64 normal numbers that require a gradient."""
    numbers = torch.randn(*shape, generator=generator(seed), dtype=torch.float64)
    return numbers.to(device).requires_grad_()


def probabilities(total: int, seed: int = 1, device: str = "cpu") -> Tensor:
    """float64 numbers in [0, 1], some of them exactly 0 or 1, that require a gradient."""
    p = torch.rand(total, generator=generator(seed), dtype=torch.float64)
    p[::7] = 1.0
    p[3::11] = 0.0
    return p.to(device).requires_grad_()


def boundaries(total: int, share: float = 0.4, seed: int = 2, device: str = "cpu") -> Tensor:
    """A random bool mask."""
    return (torch.rand(total, generator=generator(seed)) < share).to(device)


def assert_close(name: str, got: Tensor, want: Tensor, tolerance: float | None = None) -> None:
    """Fail with the name, the error and where it sits, unless the two agree."""
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, want {tuple(want.shape)}"
    if got.numel() == 0:
        return
    got, want = got.detach(), want.detach()
    tolerance = TOLERANCE[got.dtype] if tolerance is None else tolerance
    error = (got.double() - want.double()).abs()
    bound = tolerance * max(1.0, float(want.double().abs().max()))
    worst = int(torch.where(error.isnan(), torch.inf, error).argmax())
    assert bool((error <= bound).all()), (
        f"{name}: error {float(error.flatten()[worst]):.3g} over {bound:.3g} at flat index {worst}"
    )


def assert_same_function(
    op: Callable[..., Tensor], oracle: Callable[..., Tensor], inputs: Sequence[Tensor]
) -> None:
    """The values and the gradients of all inputs agree, under random weights on the output."""
    got, want = op(*inputs), oracle(*inputs)
    assert_close("output", got, want)
    for i, (g, w) in enumerate(zip(_gradients(got, inputs), _gradients(want, inputs), strict=True)):
        assert_close(f"gradient of input {i}", g, w)


def _gradients(output: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of all inputs under random weights on the output; zeros where there is no path."""
    weights = torch.randn(output.shape, generator=generator(9), dtype=torch.float64)
    loss = (output * weights.to(output.device)).sum()
    # An empty output may hang on no input.
    loss = loss + sum(x.sum() * 0 for x in inputs)
    gradients = torch.autograd.grad(loss, inputs)
    return list(gradients)


class Errors(NamedTuple):
    """The largest errors of one draw of the inputs, against fp64."""

    got: float
    plain: float
    """Of plain low-precision arithmetic."""

    @classmethod
    def of(cls, got: Tensor, plain: Tensor, exact: Tensor) -> "Errors":
        return cls(
            *(float((x.detach().double() - exact.detach()).abs().max()) for x in (got, plain))
        )

    @property
    def ratio(self) -> float:
        """With what float32 leaves of numbers of size 1 on both sides."""
        return max(self.got, 5e-7) / (self.plain + 5e-7)


def assert_within_low_precision_budget(got: Tensor, plain: Tensor, exact: Tensor) -> None:
    """The largest error is at most twice that of plain low-precision arithmetic, against fp64."""
    assert_draws_within_low_precision_budget("result", [Errors.of(got, plain, exact)])


def assert_draws_within_low_precision_budget(
    name: str, draws: Sequence[Errors], times: float = 2
) -> None:
    """The largest errors are at most twice the plain ones, in the geometric mean over the draws.

    For numbers of which the largest error of one draw is luck: few of them, or such that one has
    most of the error, or that are large, so that to round them hides an error or doubles it. Of two
    paths that are as exact as each other one then has twice the other's now and again. The mean
    shows what is worse by more than that more surely than one draw does. Nor is any draw's error
    over twice as many times the largest plain one: a path that fails on rare inputs does not pass.
    """
    mean = statistics.geometric_mean(errors.ratio for errors in draws)
    assert mean <= times, f"{name}: {mean:.3g} times the plain error, allowed {times}; {draws}"
    worst, allowed = max(e.got for e in draws), 2 * times * max(e.plain for e in draws) + 2e-6
    assert worst <= allowed, f"{name}: error {worst:.3g}, allowed {allowed:.3g}; {draws}"


def assert_rounded_once(name: str, got: Tensor, exact: Tensor) -> None:
    """Every number is the exact one in the dtype of `got`, give or take its last bit."""
    exact = exact.detach()
    bound = torch.finfo(got.dtype).eps * exact.abs() + 1e-6 * float(exact.abs().max())
    error = (got.detach().double() - exact).abs()
    assert bool((error <= bound).all()), f"{name}: error {float((error / bound).max()):.3g} bounds"


def compiled(function: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], Callable[[], int]]:
    """The compiled function, and how often it was compiled so far.

    Whole graph, dynamic shapes and traced autograd, but no code generation, which would need a C++
    compiler.
    """
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    run = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    return run, lambda: counter.frame_count
