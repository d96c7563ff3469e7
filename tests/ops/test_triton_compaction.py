"""The kernels of compaction against the torch operations: integers, so equal."""

from typing import Literal

import pytest
import torch

from h_net_dynamic_chunking.ops import begin_segment, compact, gather_rows, segment, use_backend
from h_net_dynamic_chunking.ops.compaction import begin_segment_above
from tests.ops.triton_cases import DEVICE, LENS, assert_kernels_agree
from tests.ops.triton_cases import poisoned_memory as poisoned_memory
from tests.support import boundaries, cumulative, probabilities, randn

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:.*deterministic")


@pytest.mark.parametrize("lens", [*LENS, [0, 0, 2049, 5000], [1] * 1500])
@pytest.mark.parametrize("limit", [None, 1, 3])
@pytest.mark.parametrize("tail", [0, 2])
def test_segmentation(lens: list[int], limit: int | None, tail: int) -> None:
    """Over a block of positions, and over a block of sequences."""
    total = sum(lens) + tail
    for share in (0.0, 0.4, 1.0):
        mask = boundaries(total, share, device=DEVICE)
        cu_seqlens = cumulative(lens, DEVICE).to(torch.int32 if share else torch.int64)
        with use_backend("torch"):
            want = segment(mask, cu_seqlens, limit)
        with use_backend("triton"):
            got = segment(mask, cu_seqlens, limit)
        for name, g, w in zip(want._fields, got, want, strict=True):
            assert g == w if isinstance(g, int) else g.tolist() == w.tolist(), name


@pytest.mark.parametrize("limit", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_probabilities_above_a_threshold(
    backend: Literal["torch", "triton"], dtype: torch.dtype, limit: int | None
) -> None:
    """Strictly above it, as the operation of torch compares them; NaN is not."""
    threshold = 0.3  # which float32 and float64 round apart
    p = probabilities(60, device=DEVICE).detach().to(dtype)
    p[:50:5], p[7] = threshold, torch.nan
    cu_seqlens = cumulative([30, 0, 28], DEVICE)
    with use_backend(backend if dtype == torch.float32 else "auto"):
        want = begin_segment(p > threshold, cu_seqlens, limit).finish()
        got = begin_segment_above(threshold, p.requires_grad_(), cu_seqlens, limit).finish()
    for name, g, w in zip(want._fields, got, want, strict=True):
        assert g == w if isinstance(g, int) else torch.equal(g, w), name
    with pytest.raises(ValueError, match="probs must be a floating-point tensor"):
        begin_segment_above(threshold, p > threshold, cu_seqlens, limit)


@pytest.mark.parametrize("limit", [None, 2])
def test_rows(limit: int | None) -> None:
    lens = [3, 0, 1, 7]
    mask, cu_seqlens = boundaries(11, device=DEVICE), cumulative(lens, DEVICE)
    assert_kernels_agree(lambda x: compact(x, mask, cu_seqlens, limit)[0], randn(11, 5))


@pytest.mark.parametrize("room", [1, 8, 11])
def test_rows_before_their_number_is_known(room: int) -> None:
    """With too little room they are gathered when it is; elsewhere, and with a limit, always."""
    mask, cu_seqlens = boundaries(11, device=DEVICE), cumulative([3, 0, 1, 7], DEVICE)
    x = randn(11, 5, device=DEVICE).detach().float().requires_grad_()

    def select(room: int | None) -> list[torch.Tensor]:
        pending = begin_segment(mask, cu_seqlens)
        ahead = None if room is None else pending.select_ahead(x, room)
        assert (ahead is None) == (room is None)
        rows = pending.finish().select(x, ahead)
        return [rows, *torch.autograd.grad(rows.sin().sum(), x)]

    with use_backend("triton"):
        want = select(None)
        assert all(map(torch.equal, select(room), want))
        with torch.no_grad():
            pending = begin_segment(mask, cu_seqlens)
            ahead = pending.select_ahead(x, room)
            assert torch.equal(pending.finish().select(x, ahead), want[0])
        assert begin_segment(mask, cu_seqlens, 3).select_ahead(x, room) is None
    with use_backend("torch"):
        assert begin_segment(mask, cu_seqlens).select_ahead(x, room) is None


@pytest.mark.parametrize("dtype", [torch.bool, torch.int16, torch.float32, torch.float64])
def test_rows_of_any_dtype_are_moved_and_not_changed(dtype: torch.dtype) -> None:
    x = randn(4, 1100, device=DEVICE).detach().to(dtype)[:, ::2]
    index, inverse = torch.tensor([2, -1, 0]), torch.tensor([2, -1, 0, -1])
    with use_backend("triton"):
        rows = gather_rows(x, index.to(DEVICE), inverse.to(DEVICE))
    assert torch.equal(rows, torch.stack((x[2], torch.zeros_like(x[0]), x[0])))
