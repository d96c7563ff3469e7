"""Several positions at once from a cache: pieces of any size equal the whole sequence at once."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from h_net_dynamic_chunking.cache import Rows, tensors_of
from h_net_dynamic_chunking.layers import Isotropic
from tests.layers.stacks import D_MODEL, STACKS, small_stack
from tests.support import assert_close, randn

# Each row's share of every piece: rows that end inside a piece, that wait, and that come later.
PIECES = [
    [[21], [21]],
    [[5, 16], [0, 21]],
    [[1, 1, 1, 18], [9, 0, 11, 1]],
    [[0, 0, 21], [20, 1, 0]],
]


def run_pieces(stack: Any, x: Tensor, pieces: list[list[int]], cache: Any) -> Tensor:
    """Feed each row piece by piece, with NaN in the pads."""
    outs: list[list[Tensor]] = [[] for _ in x]
    done = [0] * len(x)
    for lens in zip(*pieces, strict=True):
        rows = []
        for row, (start, n) in enumerate(zip(done, lens, strict=True)):
            pads = x.new_full((max(lens) - n, D_MODEL), torch.nan)
            rows.append(torch.cat((x[row, start : start + n], pads)))
        out = stack.extend(torch.stack(rows), cache, torch.tensor(lens, device=x.device))
        for row, n in enumerate(lens):
            outs[row].append(out[row, :n])
            done[row] += n
    return torch.stack([torch.cat(row) for row in outs])


@pytest.mark.parametrize("pieces", PIECES, ids=str)
@pytest.mark.parametrize(("layout", "window_size"), STACKS)
def test_pieces_equal_forward(layout: str, window_size: int, pieces: list[list[int]]) -> None:
    """In float64, past the window and over chunks of 8."""
    stack = small_stack(layout, window_size).double()
    x = randn(2, 21, D_MODEL).detach()
    got = run_pieces(stack, x, pieces, stack.allocate_inference_cache(2, 21))
    assert_close("output", got, stack(x))


@pytest.mark.parametrize(("layout", "window_size"), STACKS)
def test_steps_and_pieces_mix(layout: str, window_size: int) -> None:
    """Without lens all rows have the whole length; a piece of no positions changes nothing."""
    stack = small_stack(layout, window_size).double()
    x = randn(2, 21, D_MODEL).detach()
    cache = stack.allocate_inference_cache(2, 21)
    outs = [stack.extend(x[:, :9], cache), stack.step(x[:, 9], cache)[:, None]]
    outs += [stack.extend(x[:, 10:10], cache), stack.extend(x[:, 10:], cache)]
    assert_close("output", torch.cat(outs, 1), stack(x))


@pytest.mark.parametrize("masked", [False, True], ids=["index", "active"])
@pytest.mark.parametrize(("layout", "window_size"), STACKS)
def test_some_rows_alone(layout: str, window_size: int, masked: bool) -> None:
    """Rows 2 and 0 step and extend; row 1 keeps every bit, though its input may be NaN."""
    stack = small_stack(layout, window_size).double()
    x = randn(3, 14, D_MODEL).detach()
    cache = stack.allocate_inference_cache(3, 21)
    stack.extend(x[:, :6], cache)
    before = [tensor[1].clone() for tensor in tensors_of(cache)]
    if masked:
        rows, order = Rows(active=torch.tensor([True, False, True])), [0, 1, 2]
        x[1, 6:] = torch.nan
    else:
        rows, order = Rows(index=torch.tensor([2, 0])), [2, 0]
    some = x[order]
    outs = [
        stack.step(some[:, 6], cache, rows)[:, None],
        stack.extend(some[:, 7:], cache, None, rows),
    ]
    got = torch.cat(outs, 1)
    x[1] = 0
    want = stack(x)[:, 6:]
    for place, row in enumerate(order):
        if row != 1:
            assert_close(f"row {row}", got[place], want[row])
    for old, tensor in zip(before, tensors_of(cache), strict=True):
        assert torch.equal(tensor[1], old)


def test_slots_grow_with_the_positions() -> None:
    """A cache for a million positions holds 256 slots at first, and twice as many when needed."""
    stack = small_stack("t1")
    (cache,) = stack.allocate_inference_cache(1, 1_000_000)
    x = torch.randn(1, 300, D_MODEL)
    got = stack.extend(x[:, :256], [cache])
    assert cache.slots == 256
    got = torch.cat((got, stack.step(x[:, 256], [cache])[:, None]), 1)
    assert cache.slots == 512
    got = torch.cat((got, stack.extend(x[:, 257:], [cache])), 1)
    assert_close("output", got, stack(x))


def test_full_caches_change_nothing() -> None:
    """One position too many, of one row, in the last layer."""
    stack = small_stack("m1T1")
    cache = stack.allocate_inference_cache(2, 5)
    stack.extend(torch.randn(2, 4, D_MODEL), cache, torch.tensor([4, 1]))
    before = [tensor.clone() for tensor in tensors_of(cache)]
    with pytest.raises(
        ValueError, match=r"cache is full: .* seen \[4, 1\], and 2 more are to come"
    ):
        stack.extend(torch.randn(2, 2, D_MODEL), cache)
    assert all(map(torch.equal, before, tensors_of(cache)))
    # The row that has room goes on.
    stack.extend(torch.randn(1, 4, D_MODEL), cache, None, Rows(index=torch.tensor([1])))


@pytest.mark.parametrize("layout", ["m1", "t1"])
def test_lens_that_cannot_be(layout: str) -> None:
    stack = small_stack(layout)
    cache = stack.allocate_inference_cache(2, 9)
    for lens in ([-1, 2], [2, 4]):
        with pytest.raises(ValueError, match=r"lens must be in 0 .. 3, got \["):
            stack.extend(torch.randn(2, 3, D_MODEL), cache, torch.tensor(lens))
    assert not any(tensor.any() for tensor in tensors_of(cache))


class SumSoFar(nn.Module):
    """A mixer of somebody else, which knows nothing of rows or of several positions."""

    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(1)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        return {"sum": torch.zeros(batch_size, D_MODEL, dtype=dtype)}

    def step(self, x: Tensor, cache: dict[str, Tensor]) -> Tensor:
        cache["sum"] = cache["sum"] + x
        return cache["sum"]


class TokenList(SumSoFar):
    """One whose cache grows by a tensor a step."""

    def step(self, x: Tensor, cache: dict[str, Tensor]) -> Tensor:
        cache[str(len(cache))] = x
        return x


def test_mixers_of_others() -> None:
    stack = Isotropic("a1A1", D_MODEL, mixers={"a": lambda d_model: SumSoFar()}).double()
    x = randn(2, 9, D_MODEL).detach()
    cache = stack.allocate_inference_cache(2, 9, torch.float64)
    got = run_pieces(stack, x, [[3, 6, 0], [1, 0, 8]], cache)
    assert_close("output", got, stack(x))

    stack = Isotropic("a1", D_MODEL, mixers={"a": lambda d_model: TokenList()}).double()
    cache = stack.allocate_inference_cache(2, 9, torch.float64)
    with pytest.raises(
        ValueError, match="mixer must keep the number and the shapes of the tensors"
    ):
        stack.step(x[:1, 0], cache, Rows(index=torch.tensor([0])))
