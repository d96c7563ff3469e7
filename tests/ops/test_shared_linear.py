"""A linear layer whose input goes elsewhere too: the same values and gradients as by itself."""

import copy

import pytest
import torch
from torch import Tensor, nn

from h_net_dynamic_chunking.ops import gather_rows
from h_net_dynamic_chunking.ops.shared_linear import shared_linear
from tests.support import DEVICES, randn


def with_a_gather(shared: bool, linear: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor]:
    """The layer, and two rows of x."""
    y, x = shared_linear(x, linear) if shared else (linear(x), x)
    index, inverse = torch.tensor([0, 2]), torch.tensor([0, -1, 1])
    return y, gather_rows(x, index.to(x.device), inverse.to(x.device))


def layer(device: str = "cpu") -> tuple[nn.Linear, Tensor]:
    linear = nn.Linear(4, 6, bias=False, dtype=torch.float64, device=device)
    return linear, randn(3, 4, device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)])
def test_gradients(used: tuple[int, ...], device: str) -> None:
    """Whichever of the two results is used."""
    linear, x = layer(device)
    gradients = []
    for shared in (True, False):
        outputs = with_a_gather(shared, linear, x)
        loss = sum((outputs[i] ** 2).sum() for i in used)
        assert isinstance(loss, Tensor)
        for _ in range(2):  # the second time over the same graph
            got = torch.autograd.grad(
                loss, (x, linear.weight), retain_graph=True, allow_unused=True
            )
        gradients.append(got)
    for got, want in zip(*gradients, strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want)


def test_gradcheck_and_second_derivative() -> None:
    linear, x = layer()
    inputs = x, linear.weight

    def run(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return with_a_gather(True, linear, x)

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_a_layer_that_somebody_has_changed_runs_itself() -> None:
    linear, x = layer()
    hooked = copy.deepcopy(linear)
    hooked.register_forward_hook(lambda module, inputs, output: output * 2)
    for changed, factor in ((hooked, 2), (nn.Sequential(linear), 1)):
        y, same = shared_linear(x, changed)  # type: ignore[arg-type]
        assert same is x
        torch.testing.assert_close(y, factor * linear(x))


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_layer_that_keeps_a_plain_tensor_for_a_parameter(name: str) -> None:
    """As some wrappers leave it, with a view in its place."""
    linear, x = layer()
    shape = linear.weight.shape if name == "weight" else linear.weight.shape[:1]
    delattr(linear, name)
    setattr(linear, name, randn(*shape))
    y, same = shared_linear(x, linear)
    assert same is x
    assert torch.equal(y, linear(x))


def test_autocast() -> None:
    """In its dtype, or by the layer itself."""
    linear, x = layer()
    linear, x = linear.float(), x.detach().float()
    for dtype in (torch.float32, torch.bfloat16):
        leaf = x.to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y, same = shared_linear(leaf, linear)
            assert (same is leaf) == (dtype == torch.float32)
            assert torch.equal(y, linear(leaf))
        (weight_gradient,) = torch.autograd.grad(y.float().sum(), linear.weight)
        assert weight_gradient.dtype == torch.float32
