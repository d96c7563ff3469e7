"""Routing in one node of autograd: the values and gradients of its operations by themselves."""

import itertools
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from h_net_dynamic_chunking.ops import boundary_probability_of_pairs, use_backend
from h_net_dynamic_chunking.ops.compaction import PendingSegmentation, begin_segment_above
from h_net_dynamic_chunking.ops.ratio import pooled_ratio_loss
from h_net_dynamic_chunking.ops.routing import Routing, routed
from tests.ops.triton_cases import DEVICE
from tests.support import DEVICES, cumulative, randn

RATIO = 3.0, 0.5
USED = [used for n in (1, 2, 4) for used in itertools.combinations(range(4), n)]


def layer(device: str = "cpu", total: int = 3) -> tuple[nn.Linear, Tensor]:
    linear = nn.Linear(4, 6, bias=False, dtype=torch.float64, device=device)
    return linear, randn(total, 4, device=device)


def cutting(cu_seqlens: Tensor, probs: Tensor) -> PendingSegmentation:
    return begin_segment_above(0.4, probs, cu_seqlens)


def together(
    x: Tensor,
    linear: nn.Linear,
    cu_seqlens: Tensor,
    start_keys: Tensor | None = None,
    ratio: tuple[float, float] | None = RATIO,
) -> Routing:
    return routed(x, linear, cu_seqlens, lambda p: cutting(cu_seqlens, p), start_keys, ratio)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("used", USED)
@pytest.mark.parametrize("has_start_keys", [False, True])
def test_as_by_themselves(used: tuple[int, ...], has_start_keys: bool, device: str) -> None:
    """Whichever of the results is used: probabilities, tokens, loss and weighted loss."""
    linear, x = layer(device, 9)
    cu_seqlens = cumulative([5, 0, 3], device)  # and a tail
    start_keys = randn(3, 3, device=device) if has_start_keys else None
    found = []
    for in_one in (True, False):
        if in_one:
            same, _, p, pending, losses = together(x, linear, cu_seqlens, start_keys)
            assert losses is not None
        else:
            p, same = boundary_probability_of_pairs(linear(x), cu_seqlens, start_keys), x
            pending = cutting(cu_seqlens, p)
            losses = pooled_ratio_loss(pending.wanted, p, cu_seqlens, *RATIO)
        outputs = p, same, *losses
        loss = sum(outputs[i].sin().sum() for i in used)
        assert isinstance(loss, Tensor)
        for _ in range(2):  # the second time over the same graph
            got = torch.autograd.grad(
                loss, (x, linear.weight), retain_graph=True, allow_unused=True
            )
        found.append((p.detach(), pending.wanted, *losses, *got))
    for got, want in zip(*found, strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("part", [0, 1])
def test_a_hook_on_a_loss_that_is_not_asked_for(part: int) -> None:
    """Is not called, as that of a node that the backward pass does not come to."""
    linear, x = layer()
    _, _, p, _, losses = together(x, linear, cumulative([3]))
    assert losses is not None
    seen: list[Tensor] = []
    losses[part].register_hook(lambda grad: seen.append(grad))
    torch.autograd.grad(p.sum(), x, retain_graph=True)
    assert not seen
    torch.autograd.grad(2 * losses[part], x)
    assert seen == [2]


def test_tokens_alone_need_nothing_that_was_kept() -> None:
    """So that a weight may have changed in place since."""
    linear, x = layer()
    same = together(x, linear, cumulative([3])).tokens
    with torch.no_grad():
        linear.weight.zero_()
    (gradient,) = torch.autograd.grad(same.sum(), x)
    assert torch.equal(gradient, torch.ones_like(x))


def test_without_a_loss() -> None:
    linear, x = layer()
    with_loss, without = (
        together(x, linear, cumulative([3]), ratio=ratio) for ratio in (RATIO, None)
    )
    assert without.losses is None
    gradients = [torch.autograd.grad(r.probs.sum(), x)[0] for r in (with_loss, without)]
    assert torch.equal(*gradients)


def test_backward_runs_where_its_forward_did() -> None:
    linear, x = layer()
    with use_backend("torch"):
        _, _, p, _, losses = together(x, linear, cumulative([3]))
    assert losses is not None
    with use_backend("triton"):  # which takes no float64, and would raise
        torch.autograd.grad(p.sum() + losses[0], x)


def test_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """In both directions where the forward pass took them, with the results of torch."""
    pytest.importorskip("triton")
    from h_net_dynamic_chunking.ops._triton import boundary, ratio

    ran = []

    def watch(module: ModuleType, name: str) -> None:
        run = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given: ran.append(name) or run(*given))

    watch(boundary, "boundary_bwd")
    watch(ratio, "ratio_loss_bwd")
    linear, x = layer(DEVICE, 9)
    linear, cu_seqlens = linear.float(), cumulative([5, 0, 3], DEVICE)
    found = []
    for backend in ("triton", "torch"):
        leaf = x.detach().float().requires_grad_()
        with use_backend(backend):  # type: ignore[arg-type]  # of a loop
            same, _, p, _, losses = together(leaf, linear, cu_seqlens)
        assert losses is not None
        loss = p.sin().sum() + same.cos().sum() + losses[1]
        found.append(
            (p.detach(), losses[1].detach(), *torch.autograd.grad(loss, (leaf, linear.weight)))
        )
    assert ran == ["ratio_loss_bwd", "boundary_bwd"]
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


def test_a_second_derivative_is_refused() -> None:
    linear, x = layer()
    _, _, p, _, losses = together(x, linear, cumulative([3]))
    assert losses is not None
    for output in (p.sum(), losses[0]):
        (first,) = torch.autograd.grad(output, x, create_graph=True)
        with pytest.raises(RuntimeError, match="boundary_probability_backward has no derivative"):
            torch.autograd.grad(first.sum(), x)
