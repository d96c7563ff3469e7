"""Chunks gathered into padded rows ahead of their number against those gathered behind it."""

import pytest
import torch
from torch import Tensor

from h_net_dynamic_chunking.ops import begin_segment, gather_rows, use_backend
from h_net_dynamic_chunking.ops.grid import grid_ahead
from h_net_dynamic_chunking.ops.places import padded_places
from tests.ops.triton_cases import DEVICE
from tests.ops.triton_cases import poisoned_memory as poisoned_memory
from tests.support import boundaries, cumulative, randn

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:.*deterministic")


@pytest.mark.parametrize("lens", [[11], [3, 0, 1, 7], [4, 4, 0], [600, 2, 700]])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_as_behind_it(lens: list[int], share: float) -> None:
    """Values, places, and the first and second derivative."""
    mask, cu_seqlens = boundaries(sum(lens), share, device=DEVICE), cumulative(lens, DEVICE)
    x = randn(sum(lens), 5, device=DEVICE).detach().float().requires_grad_()

    def derivatives(chunks: Tensor) -> list[Tensor]:
        (first,) = torch.autograd.grad(chunks.sin().sum(), x, create_graph=True)
        return [first, *torch.autograd.grad(first.square().sum(), x)]

    with use_backend("triton"):
        pending = begin_segment(mask, cu_seqlens)
        grid = grid_ahead(x, pending, room=len(lens) * max(lens))
        assert grid is not None
        segmentation = pending.finish()
        result = grid.finish(x, segmentation)
        assert result is not None
        chunks, places, inverse = result

        most, count = segmentation.most_chunks, len(segmentation.boundary_positions)
        want_places, want_inverse = padded_places(segmentation.cu_chunks, most, count)
        want = gather_rows(segmentation.select(x), want_inverse, want_places)
        want = want.view(len(lens), most, 5)
        assert torch.equal(places, want_places)
        assert torch.equal(inverse, want_inverse)
        assert torch.equal(chunks, want)
        for got, wanted in zip(derivatives(chunks), derivatives(want), strict=True):
            assert torch.equal(got, wanted)


def test_too_little_room_and_nothing_ahead() -> None:
    mask, cu_seqlens = boundaries(11, 1.0, device=DEVICE), cumulative([3, 1, 7], DEVICE)
    x = randn(11, 5, device=DEVICE).detach().float()
    with use_backend("triton"):
        for room in (21, 20):  # 3 rows of 7
            pending = begin_segment(mask, cu_seqlens)
            grid = grid_ahead(x, pending, room)
            assert grid is not None
            assert (grid.finish(x, pending.finish()) is None) == (room < 21)
        assert grid_ahead(x, begin_segment(mask, cu_seqlens, 3), 21) is None
    with use_backend("torch"):
        assert grid_ahead(x, begin_segment(mask, cu_seqlens), 21) is None
