"""Compaction against its oracle, with and without a limit on the chunks."""

import pytest
import torch

from h_net_dynamic_chunking.ops import compact, gather_rows, reference, segment
from h_net_dynamic_chunking.ops.compaction import _HostRead
from tests.support import (
    DEVICES,
    RAGGED,
    assert_close,
    assert_same_function,
    boundaries,
    compiled,
    cumulative,
    randn,
)


def test_by_hand() -> None:
    x = torch.arange(5.0)[:, None]
    mask = torch.tensor([False, False, True, False, True])
    chunks, segmentation = compact(x, mask, torch.tensor([0, 3, 5]))
    assert chunks.flatten().tolist() == [0, 2, 3, 4]
    assert segmentation.chunk_of_position.tolist() == [0, 0, 1, 2, 3]
    assert segmentation.cu_chunks.tolist() == [0, 2, 4]
    assert segmentation.chunk_grid.tolist() == [[0, 1], [2, 3]]
    assert segmentation.sum_over_chunks().tolist() == [2, 1, 1, 1]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lens", RAGGED)
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_oracle(lens: list[int], share: float, device: str) -> None:
    """One chunk a sequence, some, and every position a boundary."""
    cu_seqlens, mask = cumulative(lens, device), boundaries(sum(lens), share, device=device)
    x = randn(sum(lens), 5, device=device)
    assert_same_function(
        lambda x: compact(x, mask, cu_seqlens)[0],
        lambda x: reference.compact(x, mask, cu_seqlens)[0],
        (x,),
    )
    segmentation = segment(mask, cu_seqlens)
    assert segmentation.chunk_of_position.tolist() == reference.compact(x, mask, cu_seqlens)[1]
    starts = segmentation.cu_chunks.tolist()
    for row, start, end in zip(segmentation.chunk_grid, starts[:-1], starts[1:], strict=True):
        pads = len(row) - (end - start)
        assert row.tolist() == [*range(start, end), *[-1] * pads]


class OnAGpu(torch.Tensor):
    """So it says."""

    is_cuda = True


def test_read_that_a_compiler_began(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has queued no copy; what is left may run without it."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    read = _HostRead(torch.tensor([3, 2]).as_subclass(OnAGpu))
    monkeypatch.undo()
    assert read.wait() == [3, 2]


@pytest.mark.parametrize("limit", [1, 2, 100])
@pytest.mark.parametrize("lens", RAGGED)
def test_limit_keeps_the_first_chunks(lens: list[int], limit: int) -> None:
    cu_seqlens, mask = cumulative(lens), boundaries(sum(lens), 0.7)
    free, capped = segment(mask, cu_seqlens), segment(mask, cu_seqlens, limit)
    counts = free.cu_chunks.diff().clamp(max=limit)
    assert capped.cu_chunks.diff().tolist() == counts.tolist()
    assert capped.boundary_positions.shape == (len(lens) * limit,)
    assert capped.chunk_grid.shape == (len(lens), limit)
    kept = capped.boundary_positions[: int(counts.sum())]
    first = [
        free.boundary_positions[start : start + count]
        for start, count in zip(free.cu_chunks[:-1], counts, strict=True)
    ]
    assert kept.tolist() == torch.cat(first).tolist()
    x = randn(sum(lens), 3)
    chunks, _ = compact(x, mask, cu_seqlens, limit)
    assert not chunks[len(kept) :].any()
    assert int(capped.sum_over_chunks().sum()) == sum(lens)


def test_tail_is_never_read() -> None:
    x = randn(6, 2)
    with torch.no_grad():
        x[4:] = torch.nan
    chunks, segmentation = compact(x, torch.ones(6, dtype=torch.bool), cumulative([1, 3]))
    assert len(chunks) == 4
    assert segmentation.chunk_of_position[4:].tolist() == [-1, -1]
    capped, _ = compact(x, torch.ones(6, dtype=torch.bool), cumulative([1, 3]), 2)
    assert capped.isfinite().all()
    capped.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_gradcheck_and_opcheck() -> None:
    cu_seqlens, mask, x = cumulative([3, 0, 4]), boundaries(7), randn(7, 5)
    for limit in (None, 2):
        assert torch.autograd.gradcheck(lambda x, n=limit: compact(x, mask, cu_seqlens, n)[0], x)
        for asked in ((mask, cu_seqlens, limit), (mask.float(), cu_seqlens, limit, 0.5)):
            torch.library.opcheck(torch.ops.h_net.segment.default, asked)
        segmentation = segment(mask, cu_seqlens, limit)
        index, inverse = segmentation.boundary_positions, segmentation.slot_of_position
        torch.library.opcheck(torch.ops.h_net.gather_rows.default, (x, index, inverse))


@pytest.mark.parametrize("limit", [None, 3])
def test_compiles_with_changing_lengths(limit: int | None) -> None:
    run, compilations = compiled(lambda x, mask, cu: compact(x, mask, cu, limit)[0].square().sum())
    for lens in ([4, 3], [9, 2], [5, 8]):
        x, mask, cu = randn(sum(lens), 5), boundaries(sum(lens)), cumulative(lens)
        assert_same_function(
            lambda x, m=mask, c=cu: run(x, m, c),
            lambda x, m=mask, c=cu: compact(x, m, c, limit)[0].square().sum(),
            (x,),
        )
    assert compilations() == 1


def test_gather_rows_takes_strided_rows_of_any_dtype() -> None:
    x = torch.arange(24).view(4, 6)[:, ::2]
    index, inverse = torch.tensor([2, -1, 0]), torch.tensor([2, -1, 0, -1])
    assert gather_rows(x, index, inverse).tolist() == [[12, 14, 16], [0, 0, 0], [0, 2, 4]]
    wide = randn(4, 6)
    assert_close("strided", gather_rows(wide[:, ::2], index, inverse)[0], wide[2, ::2])


@pytest.mark.parametrize(
    ("mask", "limit", "message"),
    [
        (torch.zeros(3), None, "boundary_mask must be bool"),
        (torch.zeros(3, dtype=torch.bool), 0, "max_chunks must be at least 1"),
        (torch.zeros(2, dtype=torch.bool), None, "boundary_mask must have as many rows as x"),
    ],
)
def test_bad_input(mask: torch.Tensor, limit: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compact(torch.zeros(3, 2), mask, torch.tensor([0, 3]), limit)
