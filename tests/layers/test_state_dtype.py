"""States of Mamba-2 that are kept in fewer bits than they are computed in.

The oracle is a wide cache whose states are rounded by hand after each call.
"""

import math

import pytest
import torch
from torch import Tensor, nn

from h_net_dynamic_chunking.cache import Rows
from h_net_dynamic_chunking.layers import Isotropic, Mamba2, MambaCache
from tests.layers.stacks import D_MODEL
from tests.support import assert_close, randn

NARROW = [torch.bfloat16, torch.float16]


def small_mixer(dtype: torch.dtype = torch.float64) -> Mamba2:
    torch.manual_seed(0)
    return Mamba2(D_MODEL, d_state=8, head_dim=16).to(dtype)


def round_by_hand(cache: MambaCache, state_dtype: torch.dtype) -> None:
    cache.state.copy_(cache.state.to(state_dtype))


@pytest.mark.parametrize("state_dtype", NARROW)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_steps_and_pieces_round_once(dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    """A prompt of pads and all, steps, and a step of some rows; to the bit."""
    mixer, x = small_mixer(dtype), randn(3, 12, D_MODEL).detach().to(dtype)
    narrow = mixer.allocate_inference_cache(3, 12, state_dtype=state_dtype)
    wide = mixer.allocate_inference_cache(3, 12)
    assert narrow.state.dtype == state_dtype
    assert narrow.conv.dtype == dtype
    lens = torch.tensor([5, 1, 0])
    some = Rows(active=torch.tensor([True, False, True]))
    chosen = Rows(index=torch.tensor([2, 0]))
    calls = [
        lambda cache: mixer.extend(x[:, :5], cache, lens)[[0, 1], lens[:2] - 1],
        *(lambda cache, t=t: mixer.step(x[:, t], cache) for t in range(5, 9)),
        lambda cache: mixer.step(x[:, 9], cache, some)[[0, 2]],
        lambda cache: mixer.step(x[:2, 10], cache, chosen),
        lambda cache: mixer.extend(x[:2, 10:], cache, rows=chosen),
    ]
    for call in calls:
        want = call(wide)
        round_by_hand(wide, state_dtype)
        assert torch.equal(call(narrow), want)
        assert torch.equal(narrow.state.to(wide.state.dtype), wide.state)
    # It is not what it would be unrounded.
    assert not torch.equal(narrow.state.to(dtype), mixer_state(mixer, x))


def mixer_state(mixer: Mamba2, x: Tensor) -> Tensor:
    cache = mixer.allocate_inference_cache(len(x), x.shape[1])
    mixer.extend(x, cache)
    return cache.state


@pytest.mark.parametrize("state_dtype", NARROW)
def test_rows_at_rest_keep_every_bit(state_dtype: torch.dtype) -> None:
    mixer, x = small_mixer(torch.float32), torch.randn(3, 4, D_MODEL)
    cache = mixer.allocate_inference_cache(3, 9, state_dtype=state_dtype)
    mixer.extend(x, cache)
    before = cache.state.clone()
    x[1] = torch.nan
    active = Rows(active=torch.tensor([True, False, True]))
    mixer.step(x[:, 0], cache, active)
    mixer.extend(x, cache, None, active)
    assert torch.equal(cache.state[1], before[1])
    assert not torch.equal(cache.state[0], before[0])


@pytest.mark.parametrize(
    ("state_dtype", "decay"), [(torch.bfloat16, 2**-11), (torch.float16, 2**-13)]
)
def test_a_slow_head_never_forgets(state_dtype: torch.dtype, decay: float) -> None:
    """Why float32 is the default: what decays by so little a step is rounded back each time.

    dt A = -decay in every head, and nothing is written. After 1 / decay steps float32 has e^-1 of
    what there was, and the narrow dtype has all of it.
    """
    mixer, steps = small_mixer(torch.float32), round(1 / decay)
    with torch.no_grad():
        mixer.conv1d.bias.zero_()
        mixer.A_log.zero_()
        mixer.dt_bias.fill_(math.log(math.expm1(decay)))
    start = torch.randn(1, mixer.num_heads, 16, 8).to(state_dtype)
    nothing = torch.zeros(1, D_MODEL)
    left = []
    for dtype in (None, state_dtype):
        cache = mixer.allocate_inference_cache(1, steps, state_dtype=dtype)
        cache.state.copy_(start)
        for _ in range(steps):
            mixer.step(nothing, cache)
        left.append(cache.state)
    assert_close("float32", left[0], start.float() * math.exp(-1), 1e-3)
    assert torch.equal(left[1], start)


def test_a_float32_state_in_a_float64_model() -> None:
    """Narrower than its arithmetic, too; and the dtype that it names by itself is float64."""
    mixer = small_mixer()
    assert mixer.allocate_inference_cache(1, 2).state.dtype == torch.float64
    cache = mixer.allocate_inference_cache(1, 2, state_dtype=torch.float32)
    mixer.step(randn(1, D_MODEL), cache)
    assert cache.state.dtype == torch.float32


@pytest.mark.parametrize("state_dtype", [torch.int8, torch.float64, torch.float8_e5m2, "bfloat16"])
@pytest.mark.parametrize("layout", ["m1", "t1"])
def test_refused(layout: str, state_dtype: torch.dtype) -> None:
    """By the layer, and by a stack, also of attention."""
    stack = Isotropic(layout, D_MODEL, ssm=None, attention=None)
    message = "state_dtype must be torch.float32, torch.bfloat16, torch.float16 or None"
    with pytest.raises(ValueError, match=message):
        stack.allocate_inference_cache(1, 2, None, state_dtype)
    with pytest.raises(ValueError, match=message):
        small_mixer().allocate_inference_cache(1, 2, None, state_dtype)


def test_a_state_of_another_dtype() -> None:
    mixer = small_mixer(torch.float32)
    cache = mixer.allocate_inference_cache(1, 2)
    cache.state = cache.state.double()
    with pytest.raises(ValueError, match=r"dtype of x, torch.float32, got one of torch.float64"):
        mixer.step(torch.randn(1, D_MODEL), cache)


class Told(nn.Identity):
    """A mixer of somebody else, which remembers what it was told."""

    def allocate_inference_cache(
        self,
        batch_size: int,
        max_seqlen: int,
        dtype: torch.dtype | None = None,
        state_dtype: torch.dtype | None = None,
    ) -> Tensor:
        return torch.zeros(batch_size, dtype=state_dtype)

    def step(self, x: Tensor, cache: Tensor) -> Tensor:
        return x


class Untold(Told):
    def allocate_inference_cache(  # type: ignore[override]
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> Tensor:
        return torch.zeros(batch_size)


def test_mixers_that_name_it_are_told() -> None:
    mixers = {"a": lambda d_model: Told(), "b": lambda d_model: Untold()}
    stack = Isotropic("a1b1", D_MODEL, mixers=mixers)
    told, untold = stack.allocate_inference_cache(2, 5, state_dtype=torch.float16)
    assert told.dtype == torch.float16
    assert untold.dtype == torch.float32
