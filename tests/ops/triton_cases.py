"""What the tests of the Triton kernels share: on a GPU if there is one, else in the interpreter."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
import torch.utils.deterministic
from torch import Tensor
from torch._subclasses.fake_utils import CrossRefFakeMode

from h_net_dynamic_chunking.ops import use_backend
from tests.support import (
    Errors,
    assert_close,
    assert_draws_within_low_precision_budget,
    assert_within_low_precision_budget,
    generator,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Over the 32 positions of the smallest block, so that blocks hand on to each other.
LENS = [[1], [3, 0, 1, 7], [0, 4, 0], [70, 9]]
# The interpreter rounds bfloat16 toward zero, where the GPU and torch round to nearest.
LOW_PRECISION = [torch.float16] if DEVICE == "cpu" else [torch.float16, torch.bfloat16]

Op = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """What an operation leaves unwritten is NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def values_and_gradients(
    backend: str, op: Op, inputs: Sequence[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """The output under a backend, and the gradients of the inputs that require one."""
    leaves = [_cast(x, dtype) for x in inputs]
    with use_backend(backend):  # type: ignore[arg-type]
        output = op(*leaves)
        weights = torch.randn(output.shape, generator=generator(9), dtype=torch.float64)
        wanted = [x for x in leaves if x.requires_grad]
        gradients = torch.autograd.grad(
            output, wanted, weights.to(output.device, output.dtype), allow_unused=True
        )
    return [output.detach(), *(g for g in gradients if g is not None)]


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Vectors stay in float32: probabilities are, whatever the dtype of the model."""
    if x.dtype == torch.float64 and dtype != torch.float64:
        x = x.detach().to(dtype if x.ndim == 2 else torch.float32).requires_grad_(x.requires_grad)
    return x


@contextmanager
def as_the_fakes_promise() -> Iterator[None]:
    """Raises where an operation's results are of another shape, dtype or layout than its fake's."""
    with (
        CrossRefFakeMode(
            lambda function: function.namespace != "h_net", only_check_ops_with_meta=False
        ),
        warnings.catch_warnings(),
    ):
        # Fakes of views ask for the gradient of what is no leaf.
        warnings.simplefilter("ignore")
        yield


def assert_kernels_agree(op: Op, *inputs: Tensor, low_precision: bool = True) -> None:
    """In value and gradient: float32 to the table's tolerance, twice in a row to the last bit, laid
    out as the fakes promise to compiled code, and low precision within twice the error of the torch
    operations, which takes more than a few numbers in each: of few the error is a matter of luck.
    """
    inputs = tuple(x.detach().to(DEVICE).requires_grad_(x.requires_grad) for x in inputs)
    exact = values_and_gradients("torch", op, inputs, torch.float64)
    with as_the_fakes_promise():
        got = values_and_gradients("triton", op, inputs, torch.float32)
    for i, (g, e) in enumerate(zip(got, exact, strict=True)):
        assert_close(f"result {i}", g, e)
    if DEVICE == "cuda":
        again = values_and_gradients("triton", op, inputs, torch.float32)
        assert all(map(torch.equal, got, again)), "results differ from run to run"
    for dtype in LOW_PRECISION if low_precision else []:
        for results in low_precision_results(op, inputs, dtype):
            assert_within_low_precision_budget(*results)


def assert_kernels_as_exact(op: Op, draws: Iterable[Sequence[Tensor]]) -> None:
    """The low-precision part of `assert_kernels_agree`, over several draws of the inputs."""
    draws = [[x.detach().to(DEVICE).requires_grad_(x.requires_grad) for x in d] for d in draws]
    for dtype in LOW_PRECISION:
        results = [low_precision_results(op, inputs, dtype) for inputs in draws]
        for i, of_draws in enumerate(zip(*results, strict=True)):
            errors = [Errors.of(*of_draw) for of_draw in of_draws]
            assert_draws_within_low_precision_budget(f"result {i} in {dtype}", errors)


def low_precision_results(
    op: Op, inputs: Sequence[Tensor], dtype: torch.dtype
) -> list[tuple[Tensor, ...]]:
    """Output and gradients but empty ones: the kernels', the torch operations', exact ones."""
    # The exact result of the rounded inputs: their rounding is nobody's error.
    rounded = tuple(_cast(_cast(x, dtype), torch.float64) for x in inputs)
    rounded = tuple(
        r.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
        for r, x in zip(rounded, inputs, strict=True)
    )
    runs = (("triton", dtype), ("torch", dtype), ("torch", torch.float64))
    results = (values_and_gradients(backend, op, rounded, kind) for backend, kind in runs)
    return [of_one for of_one in zip(*results, strict=True) if of_one[0].numel()]
