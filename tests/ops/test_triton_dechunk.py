"""The kernels of smoothing and expansion against the torch operations."""

from typing import Any

import pytest
import torch

from h_net_dynamic_chunking.ops import dechunk, ema_smooth, expand, segment, use_backend
from tests.ops.triton_cases import DEVICE, LENS, assert_kernels_agree
from tests.ops.triton_cases import poisoned_memory as poisoned_memory
from tests.support import assert_close, boundaries, cumulative, probabilities, randn

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:.*deterministic")


@pytest.mark.parametrize("lens", LENS)
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_dechunk(lens: list[int], share: float) -> None:
    """One chunk a sequence, some, and every position a boundary."""
    total = sum(lens)
    segmentation = segment(boundaries(total, share, device=DEVICE), cumulative(lens, DEVICE))
    z = randn(len(segmentation.boundary_positions), 5)
    assert_kernels_agree(
        lambda z, p: dechunk(z, p, segmentation, short_memory=True),
        z,
        probabilities(total).detach() * 0.5 + 0.5,
    )
    assert_kernels_agree(
        lambda z, p, r: dechunk(z, p, segmentation, r), z, probabilities(total), randn(total, 5)
    )


@pytest.mark.parametrize(
    "options",
    [
        {"straight_through": False},
        {"weigh_input": False},
        {"clamp": 0.1},
        {"clamp": 0.1, "short_memory": True},
    ],
)
@pytest.mark.parametrize("limit", [None, 2])
def test_options(options: dict[str, Any], limit: int | None) -> None:
    lens = [3, 0, 1, 40]
    segmentation = segment(boundaries(44, device=DEVICE), cumulative(lens, DEVICE), limit)
    z = randn(len(segmentation.boundary_positions), 5)
    assert_kernels_agree(lambda z, p: dechunk(z, p, segmentation, **options), z, probabilities(44))


def test_memory_that_reaches_over_many_blocks() -> None:
    """P near zero, as only boundaries from outside have it: nothing may be cut off."""
    total, lens = 150, [150]
    segmentation = segment(boundaries(total, device=DEVICE), cumulative(lens, DEVICE))
    p = (probabilities(total).detach() * 0.01).requires_grad_()
    z = randn(len(segmentation.boundary_positions), 3)
    for short_memory in (False, True):
        assert_kernels_agree(
            lambda z, p, s=short_memory: dechunk(z, p, segmentation, short_memory=s), z, p
        )


def test_a_short_memory_over_many_blocks() -> None:
    """Where the walk begins before its block, which must keep nothing of what it finds there."""
    segmentation = segment(boundaries(200, device=DEVICE), cumulative([200], DEVICE))
    z = randn(len(segmentation.boundary_positions), 3)
    p = (probabilities(200).detach() * 0.1 + 0.5).requires_grad_()
    assert_kernels_agree(lambda z, p: dechunk(z, p, segmentation, short_memory=True), z, p)


@pytest.mark.parametrize("programs", [1, 1024])
def test_more_positions_than_the_lanes_of_a_warp_know(
    programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a block of the walk backward, or behind it as far as anything is felt there."""
    from h_net_dynamic_chunking.ops._triton import dechunk_backward

    monkeypatch.setattr(dechunk_backward, "_PROGRAMS", programs)
    mask = boundaries(600, device=DEVICE)
    mask[100:400] = False
    segmentation = segment(mask, cumulative([600], DEVICE))
    z = randn(len(segmentation.boundary_positions), 2)
    assert dechunk_backward._LONG * len(z) >= 600
    p = (probabilities(600).detach() * 0.1 + 0.5).requires_grad_()
    assert_kernels_agree(lambda z, p: dechunk(z, p, segmentation, short_memory=True), z, p)


def test_a_short_memory_needs_no_kernel_of_its_own_backward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from h_net_dynamic_chunking.ops._triton import dechunk_backward

    monkeypatch.delattr(dechunk_backward, "begins_kernel")
    segmentation = segment(boundaries(20, 0.4, device=DEVICE), cumulative([20], DEVICE))
    z = randn(len(segmentation.boundary_positions), 2, device=DEVICE).detach().float()
    z.requires_grad_()
    p = torch.full((20,), 0.6, device=DEVICE)
    with use_backend("triton"):
        dechunk(z, p, segmentation, short_memory=True).sum().backward()
        with pytest.raises(NameError, match="begins_kernel"):
            dechunk(z, p, segmentation).sum().backward()


@pytest.mark.parametrize("short_memory", [False, True])
@pytest.mark.parametrize("behind", [0, 1, 5])
def test_a_gate_of_nan_reaches_the_blocks_before(short_memory: bool, behind: int) -> None:
    """As far as in torch: a number that is not finite has no weight under which it is cut off."""
    segmentation = segment(boundaries(64, 0.4, device=DEVICE), cumulative([64], DEVICE))
    chunks = len(segmentation.boundary_positions)
    at = int(segmentation.chunk_of_position[32]) + behind
    p = torch.full((64,), 0.5, device=DEVICE)
    p[segmentation.boundary_positions[at]] = torch.nan
    found = []
    for backend in ("torch", "triton"):
        z = randn(chunks, 2, device=DEVICE).detach().float().requires_grad_()
        with use_backend(backend):
            out = dechunk(z, p, segmentation, short_memory=short_memory)
            found.append(torch.autograd.grad(out, z, torch.ones_like(out))[0].isnan())
    assert torch.equal(*found)


def test_a_gradient_of_float64() -> None:
    """As a result of that dtype has one, while the chunks are for the kernels."""
    segmentation = segment(boundaries(20, device=DEVICE), cumulative([12, 8], DEVICE))
    z = randn(len(segmentation.boundary_positions), 3, device=DEVICE).detach().float()
    z.requires_grad_()
    p = probabilities(20).detach().float().to(DEVICE)
    results = []
    for backend in ("torch", "triton"):
        with use_backend(backend):
            out = dechunk(z, p, segmentation, dtype=torch.float64)
            results.append(torch.autograd.grad(out.square().sum(), z)[0])
    torch.testing.assert_close(*results)


def test_rows_that_are_no_words() -> None:
    """Of an odd width, or that begin in the middle of 32 bits."""
    segmentation = segment(boundaries(20, device=DEVICE), cumulative([12, 8], DEVICE))
    chunks = len(segmentation.boundary_positions)
    p = probabilities(20).detach().to(DEVICE).requires_grad_()
    for dim, offset in ((3, 0), (4, 1)):
        results = []
        for backend in ("torch", "triton"):
            storage = randn(offset + 20 * dim, device=DEVICE).detach().bfloat16()
            grad = storage[offset:].view(20, dim)
            z = randn(chunks, dim, device=DEVICE).detach().bfloat16().requires_grad_()
            with use_backend(backend):
                results.append(torch.autograd.grad(dechunk(z, p, segmentation), (z, p), grad))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("parts", [1, 3])
def test_few_sums(parts: int) -> None:
    """Longer than a program."""
    from h_net_dynamic_chunking.ops._triton.partial_sums import few_sums

    partial = randn(parts, 700, device=DEVICE).detach().float()
    torch.testing.assert_close(few_sums(partial), partial.sum(0))


def test_wider_than_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    from h_net_dynamic_chunking.ops._triton import dechunk_backward, dechunk_forward

    monkeypatch.setattr(dechunk_forward, "_BLOCK_D", 4)
    monkeypatch.setattr(dechunk_backward, "_ROW", 16)
    segmentation = segment(boundaries(9, device=DEVICE), cumulative([4, 5], DEVICE))
    z = randn(len(segmentation.boundary_positions), 10)
    assert_kernels_agree(lambda z, p: dechunk(z, p, segmentation), z, probabilities(9))


@pytest.mark.parametrize("short_memory", [False, True])
def test_strided_input_and_tails_of_nan(short_memory: bool) -> None:
    """Of positions, and of the slots that a limit leaves unused."""
    mask, cu_seqlens = boundaries(70, device=DEVICE), cumulative([3, 60], DEVICE)
    segmentation = segment(mask, cu_seqlens, 30)
    kept = int(segmentation.cu_chunks[-1])
    z, p = randn(60, 12), probabilities(70)
    with torch.no_grad():
        z[kept:], p[63:] = torch.nan, torch.nan
    assert_kernels_agree(
        lambda z, p: dechunk(z[:, ::2], p, segmentation, short_memory=short_memory), z, p
    )


def test_slots_without_any_position() -> None:
    """As a limit on the chunks leaves them where all sequences are empty."""
    segmentation = segment(boundaries(0, device=DEVICE), cumulative([0, 0], DEVICE), 3)
    assert_kernels_agree(lambda z, p: dechunk(z, p, segmentation), randn(6, 5), probabilities(0))


def test_a_residual_of_float64_is_for_torch() -> None:
    """The kernels would round it to float32."""
    segmentation = segment(boundaries(4, device=DEVICE), cumulative([4], DEVICE))
    chunks, p = len(segmentation.boundary_positions), torch.ones(4, device=DEVICE)
    z, residual = torch.zeros(chunks, 2, device=DEVICE), randn(4, 2, device=DEVICE)
    assert torch.equal(dechunk(z, p, segmentation, residual), residual)
    assert torch.equal(expand(z, segmentation.chunk_of_position, None, residual), residual)
    for call in (
        lambda: dechunk(z, p, segmentation, residual),
        lambda: expand(z, segmentation.chunk_of_position, None, residual),
    ):
        with use_backend("triton"), pytest.raises(ValueError, match="not float64"):
            call()


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_what_is_not_finite_stays_in_its_sequence_and_its_future(bad: float) -> None:
    lens = [70, 80, 70]
    segmentation = segment(boundaries(220, device=DEVICE), cumulative(lens, DEVICE))
    z = randn(len(segmentation.boundary_positions), 3, device=DEVICE).detach().float()
    p = torch.full((220,), 0.5, device=DEVICE)
    at = int(segmentation.cu_chunks[1]) + 10
    with use_backend("triton"):
        clean = dechunk(z, p, segmentation)
        z[at, 1] = bad
        dirty = dechunk(z, p, segmentation)
    first = int(segmentation.boundary_positions[at])
    assert not dirty[first, 1].isfinite()
    same = torch.ones_like(clean, dtype=torch.bool)
    same[first:150, 1] = False
    assert torch.equal(dirty[same], clean[same])


@pytest.mark.parametrize(
    ("behind", "options"),
    [
        (-1, {}),
        (-1, {"weigh_input": False}),
        (-1, {"short_memory": True}),
        (0, {"weigh_input": False}),
    ],
)
def test_a_probability_of_nan_stays_in_its_sequence_and_its_future(
    behind: int, options: dict[str, Any]
) -> None:
    """Forward in its future, backward in its past as well; at both ends of its sequence too."""
    segmentation = segment(boundaries(110, device=DEVICE), cumulative([30, 60, 20], DEVICE))
    edges = segmentation.cu_chunks.tolist()
    at = range(edges[1], edges[2])[behind]
    first = int(segmentation.boundary_positions[at])
    z = randn(edges[-1], 3, device=DEVICE).detach().float().requires_grad_()
    results = []
    for value in (0.5, torch.nan):
        p = torch.full((110,), 0.5, device=DEVICE)
        p[first] = value
        p.requires_grad_()
        with use_backend("triton"):
            out = dechunk(z, p, segmentation, **options)
            results.append((out, *torch.autograd.grad(out, (z, p), torch.ones_like(out))))
    clean, dirty = results
    # The first chunk does not depend on its P unless it is weighed.
    unused = behind == 0
    assert dirty[0][first:90].isnan().all() != unused
    for got, want, starts, ends in zip(
        dirty, clean, (first, edges[1], 30), (90, edges[2], 90), strict=True
    ):
        assert torch.equal(got[:starts], want[:starts])
        assert torch.equal(got[ends:], want[ends:])


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("weigh_input", [True, False])
def test_smoothing_alone(with_state: bool, weigh_input: bool) -> None:
    lens = [3, 0, 1, 70]
    cu_chunks = cumulative(lens, DEVICE)
    state = [randn(len(lens), 5, seed=3)] if with_state else []
    for part in (0, 1):
        assert_kernels_agree(
            lambda z, p, *s, i=part: ema_smooth(z, p, cu_chunks, *s, weigh_input=weigh_input)[i],
            randn(74, 5),
            probabilities(74),
            *state,
        )


def test_expansion_alone() -> None:
    chunk = segment(boundaries(90), cumulative([3, 0, 1, 86])).chunk_of_position.to(DEVICE)
    smoothed = randn(int(chunk[-1]) + 1, 5)
    assert_kernels_agree(
        lambda s, c, r: expand(s, chunk, c, r), smoothed, probabilities(90), randn(90, 5)
    )
    with use_backend("triton"):
        leaf = smoothed.detach().float().to(DEVICE).requires_grad_()
        # A tail that receives nothing, and a chunk that has no positions.
        out = expand(leaf, torch.tensor([0, 0, 2, -1, -1], device=DEVICE))
        out.sum().backward()
    assert not out[3:].any()
    assert leaf.grad is not None
    assert_close("gradient", leaf.grad[:4, 0].cpu(), torch.tensor([2.0, 0, 1, 0]).double())
