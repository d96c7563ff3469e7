"""Several positions at once on the kernels, in Triton's interpreter where there is no GPU."""

from typing import Any

import pytest
import torch
from torch import nn

from h_net_dynamic_chunking.cache import Rows, tensors_of
from h_net_dynamic_chunking.layers import Isotropic
from h_net_dynamic_chunking.ops import use_backend
from h_net_dynamic_chunking.ops._triton import append, mamba2
from tests.layers.stacks import D_MODEL
from tests.layers.test_extend import PIECES, run_pieces
from tests.ops.triton_cases import DEVICE
from tests.support import assert_close, randn

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:.*deterministic")


def stack_for_kernels(layout: str, window_size: int = -1, d_conv: int = 4) -> Isotropic:
    """Of sizes that all kernels take."""
    torch.manual_seed(0)
    stack = Isotropic(
        layout,
        D_MODEL,
        ssm={"d_state": 16, "head_dim": 16, "d_conv": d_conv},
        attention={"num_heads": 2, "window_size": window_size},
    )
    return stack.to(DEVICE)


def count_calls(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[int]:
    calls, function = [], getattr(module, name)

    def counting(*arguments: Any) -> Any:
        calls.append(1)
        return function(*arguments)

    monkeypatch.setattr(module, name, counting)
    return calls


@pytest.mark.parametrize("pieces", PIECES, ids=str)
@pytest.mark.parametrize("layout", ["m1", "t1", "m1T1"])
def test_pieces_equal_forward(
    layout: str, pieces: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past a window of 3, with NaN in the pads; the caches end as on torch."""
    calls = [
        count_calls(monkeypatch, mamba2, "mamba2_continued"),
        count_calls(monkeypatch, append, "append"),
    ]
    stack, x = stack_for_kernels(layout, 3), randn(2, 21, D_MODEL).detach().float().to(DEVICE)
    caches = [stack.allocate_inference_cache(2, 21) for _ in range(2)]
    with use_backend("torch"):
        want = stack(x)
        run_pieces(stack, x, pieces, caches[0])
    with use_backend("triton"):
        got = run_pieces(stack, x, pieces, caches[1])
    assert_close("output", got, want, tolerance=1e-4)
    for one, other in zip(*map(tensors_of, caches), strict=True):
        assert_close("cache", one.float(), other.float(), tolerance=1e-4)
    for letter, made in zip("mt", calls, strict=True):
        assert len(made) == (len(pieces[0]) if letter in layout.lower() else 0)


@pytest.mark.parametrize("d_conv", [1, 2, 3])
def test_fewer_taps(d_conv: int) -> None:
    stack = stack_for_kernels("m1", d_conv=d_conv)
    x = randn(2, 21, D_MODEL).detach().float().to(DEVICE)
    with use_backend("torch"):
        want = stack(x)
    with use_backend("triton"):
        got = run_pieces(stack, x, PIECES[2], stack.allocate_inference_cache(2, 21))
    assert_close("output", got, want, tolerance=1e-4)


def test_more_than_a_program_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels and positions of several blocks, chunks of several segments."""
    from h_net_dynamic_chunking.ops._triton import causal_conv, ssd_states

    monkeypatch.setattr(causal_conv, "_FORWARD", (32, 8, 4, 1))
    monkeypatch.setattr(ssd_states, "PROGRAMS", 64)
    stack, x = stack_for_kernels("m1"), randn(2, 110, D_MODEL).detach().float().to(DEVICE)
    with use_backend("torch"):
        want = stack(x)
    with use_backend("triton"):
        cache = stack.allocate_inference_cache(2, 110)
        got = run_pieces(stack, x, [[3, 70, 37], [100, 1, 9]], cache)
    assert_close("output", got, want, tolerance=1e-4)


@pytest.mark.parametrize("layout", ["m1", "t1"])
def test_rows_at_rest_keep_every_bit(layout: str) -> None:
    """Rows 2 and 0 go on; row 1 keeps its cache, whatever its input."""
    stack, x = stack_for_kernels(layout, 3), randn(3, 14, D_MODEL).detach().float().to(DEVICE)
    cache = stack.allocate_inference_cache(3, 21)
    with use_backend("torch"):
        want = stack(x)
    with use_backend("triton"):
        stack.extend(x[:, :6], cache)
        before = [tensor[1].clone() for tensor in tensors_of(cache)]
        x[1, 6:] = torch.nan
        active = torch.tensor([True, False, True], device=DEVICE)
        got = stack.extend(x[:, 6:], cache, None, Rows(active=active))
    for row in (0, 2):
        assert_close(f"row {row}", got[row], want[row, 6:], tolerance=1e-4)
    assert all(torch.equal(t[1], old) for t, old in zip(tensors_of(cache), before, strict=True))


def test_a_layer_that_is_watched_runs_its_parts() -> None:
    stack, seen = stack_for_kernels("m1"), []
    conv1d = stack.get_submodule("layers.0.mixer.conv1d")
    assert isinstance(conv1d, nn.Conv1d)
    conv1d.register_forward_hook(lambda *_: seen.append(1))
    x = randn(2, 9, D_MODEL).detach().float().to(DEVICE)
    with use_backend("torch"):
        want = stack(x)
    with use_backend("triton"):
        got = stack.extend(x, stack.allocate_inference_cache(2, 9))
    assert_close("output", got, want, tolerance=1e-4)
    assert len(seen) == 2
