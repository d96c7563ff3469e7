"""The step form of every layer: position after position equals the whole sequence at once."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from h_net_dynamic_chunking.cache import Rows, tensors_of
from h_net_dynamic_chunking.layers import CausalAttention, Isotropic, Mamba2
from tests.layers.stacks import D_MODEL, STACKS, small_stack
from tests.support import assert_close, randn


def run_steps(module: Any, x: Tensor, cache: Any) -> Tensor:
    return torch.stack([module.step(position, cache) for position in x.unbind(1)], dim=1)


@pytest.mark.parametrize(("layout", "window_size"), [*STACKS, ("t1", 0), ("T1m2M1", 3)])
def test_steps_equal_forward(layout: str, window_size: int) -> None:
    """In float64, two rows, past the window and over chunks of 8."""
    stack = small_stack(layout, window_size).double()
    x = randn(2, 21, D_MODEL)
    got = run_steps(stack, x, stack.allocate_inference_cache(2, max_seqlen=21))
    assert not got.requires_grad
    assert_close("output", got, stack(x))


@pytest.mark.parametrize("d_conv", [1, 2, 4])
def test_mamba_steps(d_conv: int) -> None:
    """Any number of taps, the mixer by itself."""
    torch.manual_seed(0)
    mixer = Mamba2(D_MODEL, d_state=8, head_dim=16, d_conv=d_conv).double()
    x = randn(2, 6, D_MODEL)
    got = run_steps(mixer, x, mixer.allocate_inference_cache(2, max_seqlen=6))
    assert_close("output", got, mixer(x))


@pytest.mark.parametrize("window_size", [-1, 3])
def test_rows_have_their_own_positions(window_size: int) -> None:
    """A row that is 7 positions ahead goes on from there beside one that begins."""
    torch.manual_seed(0)
    mixer = CausalAttention(D_MODEL, 2, window_size=window_size).double()
    x = randn(2, 12, D_MODEL).detach()
    both = mixer.allocate_inference_cache(2, max_seqlen=12)
    for position in x[:1, :7].unbind(1):
        mixer.step(position, both, Rows(index=torch.tensor([0])))
    got = run_steps(mixer, torch.stack([x[0, 7:], x[1, :5]]), both)
    want = mixer(x)
    assert_close("output", got, torch.stack([want[0, 7:], want[1, :5]]))
    assert both.position.tolist() == [12, 5]


def test_bfloat16_and_autocast() -> None:
    """Both decode near what they give at once, with caches of the weights' dtype."""
    x = torch.randn(2, 12, D_MODEL)
    stack = small_stack("T1m2M1", 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run_steps(stack, x, stack.allocate_inference_cache(2, 12))
        torch.testing.assert_close(got, stack(x), rtol=0.05, atol=0.05)
    stack = stack.bfloat16()
    caches = stack.allocate_inference_cache(2, 12)
    assert caches[0].keys.dtype == caches[1].conv.dtype == torch.bfloat16
    assert caches[1].state.dtype == torch.float32
    got = run_steps(stack, x, caches)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, stack(x), rtol=0.05, atol=0.05)


def test_slots_of_the_attention_cache() -> None:
    """A window keeps window_size + 1 positions, or fewer if no more will come."""

    def slots(window_size: int, max_seqlen: int) -> tuple[int, bool]:
        mixer = CausalAttention(D_MODEL, 2, window_size=window_size)
        cache = mixer.allocate_inference_cache(1, max_seqlen)
        return cache.keys.shape[1], cache.ring

    assert slots(-1, 10) == (10, False)
    assert slots(3, 10) == (4, True)
    assert slots(10, 10) == (10, False)


def test_full_cache_changes_nothing() -> None:
    """The layers before the full one keep their caches; a ring goes on for ever."""
    stack, x = small_stack("m1T1"), torch.randn(2, D_MODEL)
    caches = stack.allocate_inference_cache(2, max_seqlen=2)
    run_steps(stack, x[:, None].expand(-1, 2, -1), caches)
    assert_refused(stack, x, caches, r"cache is full: .* max_seqlen = 2 positions.* \[2, 2\]")
    ring = small_stack("m1T1", window_size=1)
    run_steps(ring, x[:, None].expand(-1, 9, -1), ring.allocate_inference_cache(2, max_seqlen=2))


def test_cache_of_another_batch_or_dtype() -> None:
    """Named before anything changes, also where only a later layer's cache is wrong."""
    stack, x = small_stack("m1T1"), torch.randn(2, D_MODEL)
    caches, others = (stack.allocate_inference_cache(n, 5) for n in (2, 3))
    wide = stack.allocate_inference_cache(2, 5, dtype=torch.float64)
    message = "cache must have the batch size of x, 2, got one of 3"
    assert_refused(stack, x, others, message)
    assert_refused(stack, x, [caches[0], others[1]], message)
    assert_refused(stack, x, [caches[0], wide[1]], r"dtype of x, torch.float32, got .*float64")
    assert_refused(stack, x, caches[:1], "caches must be one for each of the 2 layers, got 1")
    for layer, cache in zip(stack.layers, wide, strict=True):
        assert_refused(layer.mixer, x, cache, r"dtype of x, torch.float32, got .*float64")


def assert_refused(module: Any, x: Tensor, caches: Any, message: str) -> None:
    before = copy.deepcopy(caches)
    with pytest.raises(ValueError, match=message):
        module.step(x, caches)
    torch.testing.assert_close(tensors(caches), tensors(before), rtol=0, atol=0)


def tensors(caches: Any) -> list[Tensor]:
    listed = caches if isinstance(caches, list) else [caches]
    return tensors_of(listed)


class Average(nn.Module):
    """A mixer of somebody else: the mean of what came so far."""

    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> list[Tensor]:
        return []

    def step(self, x: Tensor, cache: list[Tensor]) -> Tensor:
        cache.append(x)
        return torch.stack(cache).mean(0)


def test_other_mixers() -> None:
    """One with the two methods decodes; one without is named."""
    stack = Isotropic("a1A1", D_MODEL, mixers={"a": lambda d_model: Average()})
    x = torch.randn(2, 5, D_MODEL)
    got = run_steps(stack, x, stack.allocate_inference_cache(2, 5))
    torch.testing.assert_close(got, stack(x))

    stack = Isotropic("m1l1", D_MODEL, mixers={"l": lambda d_model: nn.Conv1d(1, 1, 1)})
    with pytest.raises(ValueError, match=r"layer 1 must have .*to decode.*Conv1d has not"):
        stack.allocate_inference_cache(2, 5)


@pytest.mark.parametrize("layout", ["m1", "t1"])
def test_bad_arguments(layout: str) -> None:
    stack = small_stack(layout)
    for module in (stack, stack.layers[0].mixer):
        with pytest.raises(ValueError, match="batch_size must be an integer of at least 1, got 0"):
            module.allocate_inference_cache(0, 5)
        with pytest.raises(ValueError, match="max_seqlen must be an integer of at least 1, got 0"):
            module.allocate_inference_cache(2, 0)
        with pytest.raises(ValueError, match=r"x must have shape \(batch, 32\), got \(2, 1, 32\)"):
            module.step(torch.randn(2, 1, 32), stack.allocate_inference_cache(2, 5))
