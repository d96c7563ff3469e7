"""The kernels of the recurrence against the torch operations.

float32 is divided into chunks of 32 positions, float16 into longer ones.
"""

import pytest
import torch
from torch import Tensor

from h_net_dynamic_chunking.ops import ssd, ssd_continued, use_backend
from h_net_dynamic_chunking.ops._triton import ssd_backward, ssd_forward, ssd_states
from tests.ops.ssd_cases import NAMES, ssd_inputs, with_tail
from tests.ops.triton_cases import DEVICE, LOW_PRECISION
from tests.ops.triton_cases import poisoned_memory as poisoned_memory
from tests.support import (
    Errors,
    assert_close,
    assert_draws_within_low_precision_budget,
    assert_within_low_precision_budget,
    cumulative,
    randn,
)

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:.*deterministic")

SIZES = {"head_dim": 16, "d_state": 16, "device": DEVICE}


def run(
    backend: str, inputs: tuple[Tensor, ...], cu_seqlens: Tensor | None, dtype: torch.dtype
) -> list[Tensor]:
    """y and the gradients under a backend; vectors over heads stay in float32 or float64."""
    wide = torch.promote_types(dtype, torch.float32)
    leaves = [
        x.detach().to(wide if name in ("dt", "A", "D") else dtype)
        for name, x in zip(NAMES, inputs, strict=True)
    ]
    # Slices again: the launchers take them as they are.
    leaves[3], leaves[4] = torch.cat(leaves[3:5], -1).chunk(2, -1)
    leaves = [x.requires_grad_() for x in leaves]
    with use_backend(backend):  # type: ignore[arg-type]
        y = ssd(*leaves, cu_seqlens)
        weights = randn(*y.shape, seed=9, device=DEVICE).detach().bfloat16()  # exact in all dtypes
        return [y.detach(), *torch.autograd.grad(y, leaves, weights.to(dtype))]


def assert_kernels_agree(
    inputs: tuple[Tensor, ...], cu_seqlens: Tensor | None = None, low_precision: bool = False
) -> None:
    exact = run("torch", inputs, cu_seqlens, torch.float64)
    got = run("triton", inputs, cu_seqlens, torch.float32)
    for name, g, e in zip(("y", *NAMES), got, exact, strict=True):
        # A's gradient is a sum over all positions, of both signs, that nearly cancel; as on torch.
        assert_close(name, g, e, 1e-4 if name == "A" else None)
    for dtype in LOW_PRECISION if low_precision else []:
        rounded = tuple(x.to(dtype).double() if x.ndim != 1 else x for x in inputs)
        results = [
            run(backend, rounded, cu_seqlens, of)
            for backend, of in (("triton", dtype), ("torch", dtype), ("torch", torch.float64))
        ]
        for g, plain, e in zip(*results, strict=True):
            assert_within_low_precision_budget(g, plain, e)


@pytest.mark.parametrize("lens", [[1], [3, 0, 1, 29], [0, 40, 0]])
def test_packed(lens: list[int]) -> None:
    assert_kernels_agree(ssd_inputs(sum(lens), **SIZES), cumulative(lens, DEVICE))


def test_states_through_chunks_and_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences that start and end in chunks and at their edges, one over three segments, which are
    of four chunks in float32."""
    monkeypatch.setattr(ssd_states, "PROGRAMS", 9)
    lens = [20, 240, 28, 4]
    assert_kernels_agree(
        ssd_inputs(sum(lens), **SIZES), cumulative(lens, DEVICE), low_precision=True
    )


def test_rounding_of_decays() -> None:
    """The gradient of A is small beside that of a decay, and may not take on errors of its size."""
    x, dt, _, B, C, D = ssd_inputs(128, heads=3, **SIZES)
    A = torch.tensor([-1.0, -4.0, -16.0], dtype=torch.float64, device=DEVICE)
    for dtype in LOW_PRECISION:
        inputs = tuple(t.to(dtype).double() for t in (x, dt, A, B, C, D))
        got, plain, exact = (
            run(backend, inputs, cumulative([128], DEVICE), of)[1 + NAMES.index("A")]
            for backend, of in (("triton", dtype), ("torch", dtype), ("torch", torch.float64))
        )
        assert_within_low_precision_budget(got, plain, exact)


@pytest.mark.parametrize("rate", [1.0, 64.0])
def test_float32_is_as_exact_as_on_torch(rate: float) -> None:
    """Over several draws. The faster the decay, the smaller its gradient beside what a position has
    to do with itself, which is no part of it and may not leave its rounding there."""
    cu_seqlens = cumulative([40, 3], DEVICE)
    draws = []
    for draw in range(10):
        x, dt, _, B, C, D = (
            t.detach().float().double() for t in ssd_inputs(43, heads=4, seed=7 * draw, **SIZES)
        )
        inputs = x, dt, torch.full_like(D, -rate), B, C, D
        kinds = ("triton", torch.float32), ("torch", torch.float32), ("torch", torch.float64)
        results = (run(backend, inputs, cu_seqlens, dtype) for backend, dtype in kinds)
        draws.append([Errors.of(*of_one) for of_one in zip(*results, strict=True)])
    for name, errors in zip(("y", *NAMES), zip(*draws, strict=True), strict=True):
        assert_draws_within_low_precision_budget(name, errors)


# Segments of heads, at most: of one chunk each, or whole rows.
SEGMENTS = pytest.mark.parametrize("segments", [ssd_states.PROGRAMS, 1])


@SEGMENTS
def test_padded(segments: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssd_states, "PROGRAMS", segments)
    assert_kernels_agree(ssd_inputs(2, 33, heads=2, **SIZES))


def test_groups_of_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three heads in two groups, whose shares of the gradients of B and C are added."""
    for module in (ssd_forward, ssd_backward):
        monkeypatch.setattr(module, "PROGRAMS", 4)
    assert_kernels_agree(ssd_inputs(40, heads=3, **SIZES), cumulative([7, 33], DEVICE))


def test_tail_of_nan() -> None:
    inputs, cu_seqlens = ssd_inputs(50, heads=1, **SIZES), cumulative([3, 30], DEVICE)
    inputs = with_tail(inputs, 33)
    assert_kernels_agree(inputs, cu_seqlens)
    for got in run("triton", inputs, cu_seqlens, torch.float32):
        assert len(got) < 50 or not got[33:].any()


@SEGMENTS
def test_pieces_equal_the_whole(segments: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssd_states, "PROGRAMS", segments)
    x, dt, A, B, C, D = (t.detach().float() for t in ssd_inputs(2, 45, heads=2, **SIZES))
    with use_backend("torch"):
        whole = ssd(x, dt, A, B, C, D)
    state, pieces = torch.zeros(2, 2, 16, 16, device=DEVICE), []
    for part in (slice(0, 40), slice(40, 40), slice(40, 45)):
        with use_backend("triton"):
            y, state = ssd_continued(x[:, part], dt[:, part], A, B[:, part], C[:, part], D, state)
        pieces.append(y)
    assert_close("y", torch.cat(pieces, dim=1), whole)


def test_sizes_that_the_kernels_do_not_take() -> None:
    inputs = [t.detach().float() for t in ssd_inputs(1, 3, head_dim=8, device=DEVICE)]
    with use_backend("triton"), pytest.raises(ValueError, match="not 8 and 5"):
        ssd(*inputs)
