"""What registration promises of every operation, beside what opcheck looks at."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from h_net_dynamic_chunking.ops import (
    boundary_probability_of_pairs,
    dechunk,
    ema_smooth,
    expand,
    segment,
    use_backend,
)
from h_net_dynamic_chunking.ops.causal_conv import causal_conv
from h_net_dynamic_chunking.ops.cross_entropy import summed_cross_entropy
from h_net_dynamic_chunking.ops.embedding import embedding
from h_net_dynamic_chunking.ops.ratio import pooled_ratio_loss
from h_net_dynamic_chunking.ops.registration import is_autocast_on
from h_net_dynamic_chunking.ops.rms_norm import add_rms_norm
from h_net_dynamic_chunking.ops.rotary import rotary
from h_net_dynamic_chunking.ops.ssd import ssd
from h_net_dynamic_chunking.ops.swiglu import swiglu
from tests.ops.triton_cases import DEVICE
from tests.support import assert_close, boundaries, cumulative, probabilities, randn

CU_SEQLENS, MASK = cumulative([3, 0, 4], DEVICE), boundaries(7, device=DEVICE)
SEGMENTATION = segment(MASK, CU_SEQLENS)

DIFFERENTIABLE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "boundary_probability": lambda x, p: boundary_probability_of_pairs(x, CU_SEQLENS) * p,
    "ema": lambda x, p: ema_smooth(x, p, CU_SEQLENS).chunks,
    "expand": lambda x, p: expand(x, torch.arange(len(x), device=DEVICE), p),
    "dechunk": lambda x, p: dechunk(SEGMENTATION.select(x), p, SEGMENTATION),
    "ratio_loss": lambda x, p: pooled_ratio_loss(MASK, p, CU_SEQLENS, 6.0)[0] * x.sum(),
    "add_rms_norm": lambda x, p: add_rms_norm(x, x.sin(), x[0])[1] * p[:, None],
    "embedding": lambda x, p: embedding(x, MASK.long()) * p[:, None],
    "swiglu": lambda x, p: swiglu(x) * p[:, None],
    "rotary": lambda x, p: rotary(x.repeat(1, 3), 1, 4, 1e4, CU_SEQLENS)[0] * p.sum(),
    "cross_entropy": lambda x, p: summed_cross_entropy(x, MASK.long()) * p.sum(),
}


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_second_derivative_is_refused_and_never_zero(name: str, backend: str) -> None:
    """A first one with create_graph=True is what it is without."""
    if backend == "triton":
        pytest.importorskip("triton")
    inputs = randn(7, 4, device=DEVICE), probabilities(7, device=DEVICE)
    x, p = (i.detach().float().requires_grad_() for i in inputs)
    with use_backend(backend):  # type: ignore[arg-type]
        loss = DIFFERENTIABLE[name](x, p).square().sum()
        plain = torch.autograd.grad(loss, (x, p), retain_graph=True)
        first = torch.autograd.grad(loss, (x, p), create_graph=True)
        for got, want in zip(first, plain, strict=True):
            assert_close("first derivative", got, want.double())
        with pytest.raises(RuntimeError, match=f"h_net::{name}_backward has no derivative"):
            torch.autograd.grad(sum(g.square().sum() for g in first), (x, p))  # type: ignore[arg-type]


class Seen(TorchDispatchMode):
    """Which operations come by."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        self.names.add(str(function))
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_modes_see_operations_and_nothing_else_changes(name: str) -> None:
    x, p = randn(7, 4, device=DEVICE), probabilities(7, device=DEVICE)

    def run() -> list[Tensor]:
        out = DIFFERENTIABLE[name](x, p)
        return [out.detach(), *torch.autograd.grad(out.sum(), (x, p))]

    with Seen() as seen:
        watched = run()
    assert f"h_net.{name}.default" in seen.names
    assert f"h_net.{name}_backward.default" in seen.names
    assert all(map(torch.equal, run(), watched))


def test_subclasses_of_tensors_see_operations() -> None:
    q = TwoTensor(*[randn(7, 4, device=DEVICE).detach().requires_grad_() for _ in range(2)])
    p = boundary_probability_of_pairs(q, TwoTensor(CU_SEQLENS, CU_SEQLENS))
    assert type(p) is TwoTensor
    (grad,) = torch.autograd.grad(p.sum(), q)
    assert type(grad) is TwoTensor


def test_opcheck_of_what_has_no_tests_of_its_own() -> None:
    p, slope = randn(7, device=DEVICE), torch.ones((), dtype=torch.float64, device=DEVICE)
    ops = torch.ops.h_net
    torch.library.opcheck(ops.ratio_loss.default, (MASK, p, CU_SEQLENS, 6.0, 0.03))
    for grads in ((slope, slope), (slope, None), (None, slope)):
        backward = *grads, slope, p.detach(), CU_SEQLENS, 0.03
        torch.library.opcheck(ops.ratio_loss_backward.default, backward)
    sizes = torch.tensor([4, 2], device=DEVICE)
    torch.library.opcheck(ops.trim.default, (SEGMENTATION.boundary_positions, sizes))


def _forward_and_gradients(name: str, autocast: bool) -> list[Tensor]:
    inputs = randn(7, 4, device=DEVICE), probabilities(7, device=DEVICE)
    x, p = (i.detach().float().requires_grad_() for i in inputs)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        out = AUTOCAST[name](x, p)
        return [out.detach(), *torch.autograd.grad(out.sum(), (x, p))]


def _convolved(x: Tensor, p: Tensor) -> Tensor:
    return causal_conv(x, x[:4, None, :3], x[0], CU_SEQLENS) * p[:, None]


def _recurrence(x: Tensor, p: Tensor) -> Tensor:
    return ssd(x[:, None], p[:, None], -p[:1], x, x, p[:1], CU_SEQLENS)


AUTOCAST = {**DIFFERENTIABLE, "causal_conv": _convolved, "ssd": _recurrence}


@pytest.mark.parametrize("name", AUTOCAST)
@pytest.mark.parametrize("watched", [False, True])
def test_autocast_changes_nothing_inside(name: str, watched: bool) -> None:
    """Forward and, inside it too, backward; past torch's dispatcher and through it."""
    with Seen() if watched else nullcontext():
        plain, cast = (_forward_and_gradients(name, autocast) for autocast in (False, True))
    for got, want in zip(cast, plain, strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_forward_mode_derivative_is_refused_and_never_zero(name: str) -> None:
    """Asked for by dual tensors, torch.func.jvp, or under another transform."""
    x, p = (i.detach() for i in (randn(7, 4, device=DEVICE), probabilities(7, device=DEVICE)))
    one = torch.ones((), dtype=x.dtype, device=DEVICE)

    def run(t: Tensor) -> Tensor:
        return DIFFERENTIABLE[name](t * x, t * p).sum()

    refused = pytest.raises(NotImplementedError, match="has no forward-mode derivative")
    with forward_ad.dual_level():
        run(one)
        with refused:
            run(forward_ad.make_dual(one, one))
    with refused:
        torch.func.jvp(run, (one,), (one,))
    with refused:
        torch.func.hessian(run)(one)


def test_autocast_of_a_device_that_torch_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    """MPS is not among those that torch 2.13.0 looks at when asked for any."""
    assert not is_autocast_on()
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "mps")
    assert is_autocast_on()
