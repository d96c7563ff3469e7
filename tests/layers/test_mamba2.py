"""The Mamba-2 layer around `ops.mamba2`."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from h_net_dynamic_chunking.layers import Mamba2
from h_net_dynamic_chunking.ops import reference
from tests.support import assert_within_low_precision_budget


def test_mixer_equals_its_equations() -> None:
    """The module against its definition written channel by channel on three tokens."""
    torch.manual_seed(0)
    mixer = Mamba2(4, d_state=3, d_conv=2, expand=2, head_dim=4, chunk_size=2).double()
    mixer.norm.weight.data.uniform_(0.5, 2)
    x = torch.randn(1, 3, 4, dtype=torch.float64)
    z, conv_in, dt = (x[0] @ mixer.in_proj.weight.T).split([8, 14, 2], dim=-1)
    taps, bias = mixer.conv1d.weight[:, 0], mixer.conv1d.bias
    before = torch.cat([conv_in.new_zeros(1, 14), conv_in])
    conv_out = F.silu(before[:-1] * taps[:, 0] + before[1:] * taps[:, 1] + bias)
    values, B, C = conv_out.split([8, 3, 3], dim=-1)
    y = reference.ssd(
        values.view(3, 2, 4),
        (1 + (dt + mixer.dt_bias).exp()).log(),
        -mixer.A_log.exp(),
        B,
        C,
        mixer.D,
        torch.tensor([0, 3]),
    ).view(3, 8)
    gated = y * z * torch.sigmoid(z)
    normed = gated / (gated.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.weight
    torch.testing.assert_close(mixer(x)[0], normed @ mixer.out_proj.weight.T)


def test_initial_parameters() -> None:
    """softplus(dt_bias) spans [1e-3, 0.1], A spans [-16, -1], D is one."""
    mixer = Mamba2(1024, d_state=8, head_dim=4)
    dt = F.softplus(mixer.dt_bias)
    assert 0.99e-3 < dt.min() < 2e-3
    assert 0.05 < dt.max() < 0.101
    # Log-uniform: the median is the geometric mean of the ends.
    assert 0.008 < dt.median() < 0.0125
    assert 1 <= mixer.A_log.exp().min() < 1.5
    assert 15.5 < mixer.A_log.exp().max() <= 16.001
    assert (mixer.D == 1).all()


def test_official_names_and_shapes() -> None:
    """Keys and shapes of the layer in the published 1-stage L model."""
    shapes = {name: tuple(value.shape) for name, value in Mamba2(1024).state_dict().items()}
    assert shapes == {
        "dt_bias": (32,),
        "A_log": (32,),
        "D": (32,),
        "in_proj.weight": (4384, 1024),
        "conv1d.weight": (2304, 1, 4),
        "conv1d.bias": (2304,),
        "norm.weight": (2048,),
        "out_proj.weight": (1024, 2048),
    }


@pytest.mark.parametrize("shape", [(2, 0, 32), (0, 3, 32), (2, 1, 32)])
def test_empty_and_single(shape: tuple[int, ...]) -> None:
    """No positions, no rows, one position; a backward pass reaches every parameter."""
    mixer = Mamba2(32, d_state=8, head_dim=16)
    out = mixer(torch.randn(shape))
    assert out.shape == shape
    out.sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None, name


def test_a_tail_that_is_known_to_be_zero() -> None:
    mixer = Mamba2(32, d_state=8, head_dim=16).double()
    x, cu_seqlens = torch.randn(9, 32, dtype=torch.float64), torch.tensor([0, 3, 7])
    x[7:] = 0
    assert torch.equal(mixer(x, cu_seqlens, tail_is_zero=True), mixer(x, cu_seqlens))


@pytest.mark.parametrize("packed", [False, True])
def test_autocast(packed: bool) -> None:
    """Values and gradients: at most twice the error of the layer that is bfloat16 throughout."""
    torch.manual_seed(0)
    mixer = Mamba2(32, d_state=8, head_dim=16).bfloat16()
    x = torch.randn(2, 40, 32).bfloat16()
    x, cu_seqlens = (x.flatten(0, 1), torch.tensor([0, 30, 80])) if packed else (x, None)
    weights = torch.randn(x.shape).bfloat16()

    def run(dtype: torch.dtype, autocast: bool) -> list[Tensor]:
        module = copy.deepcopy(mixer).to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = module(x.to(dtype), cu_seqlens)
        gradients = torch.autograd.grad(out, list(module.parameters()), weights.to(out.dtype))
        assert all(gradient.dtype == dtype for gradient in gradients)
        return [out, *gradients]

    cast, plain = run(torch.float32, True), run(torch.bfloat16, False)
    assert cast[0].dtype == torch.bfloat16
    for got, other, exact in zip(cast, plain, run(torch.float64, False), strict=True):
        assert_within_low_precision_budget(got, other, exact)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"d_model": 0}, "d_model must be an integer of at least 1, got 0"),
        ({"d_state": -1}, "d_state must be"),
        ({"d_conv": 0}, "d_conv must be"),
        ({"expand": 1.5}, r"expand must be an integer of at least 1, got 1\.5"),
        ({"head_dim": 48}, "head_dim must divide expand \\* d_model = 64, got 48"),
        ({"chunk_size": 0}, "chunk_size must be"),
    ],
)
def test_bad_arguments(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mamba2(**{"d_model": 32, **arguments})


def test_bad_inputs() -> None:
    with pytest.raises(
        ValueError, match=r"x must have shape \(batch, length, 32\), got \(2, 5, 31\)"
    ):
        Mamba2(32, head_dim=16)(torch.randn(2, 5, 31))


def _norm_replaced(mixer: Mamba2) -> None:
    mixer.norm = torch.nn.LayerNorm(64, dtype=torch.float64)  # type: ignore[assignment]
    mixer.norm.bias.data.normal_()


def _convolution_normed(mixer: Mamba2) -> None:
    torch.nn.utils.parametrizations.weight_norm(mixer.conv1d)
    mixer.conv1d.parametrizations.weight.original0.data.mul_(2)  # type: ignore[index, union-attr]


def _convolution_without_bias(mixer: Mamba2) -> None:
    mixer.conv1d.bias = None


def _forward_replaced(mixer: Mamba2) -> None:
    mixer.norm.forward = lambda x: 2 * x  # type: ignore[method-assign]


CHANGES = [_norm_replaced, _convolution_normed, _convolution_without_bias, _forward_replaced]


@pytest.mark.parametrize("change", CHANGES)
def test_changed_parts_are_called(change: Callable[[Mamba2], None]) -> None:
    """Padded, packed with a tail of NaN and step by step: one layer, and not the unchanged one."""
    torch.manual_seed(0)
    mixer = Mamba2(32, d_state=8, head_dim=16).double()
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    before = mixer(x)
    change(mixer)
    padded = mixer(x)
    assert (padded - before).abs().max() > 1e-3
    cache = mixer.allocate_inference_cache(2, 5)
    steps = torch.stack([mixer.step(x[:, t], cache) for t in range(5)], dim=1)
    torch.testing.assert_close(padded, steps)
    tail = torch.full((2, 32), torch.nan, dtype=torch.float64)
    packed = mixer(torch.cat([x[0], x[1], tail]), torch.tensor([0, 5, 5, 10]))
    torch.testing.assert_close(packed[:10], padded.flatten(0, 1))
    assert not packed[10:].any()
    assert mixer(x[:, :0]).shape == (2, 0, 32)


def test_hooks_on_the_parts_are_called_and_change_nothing() -> None:
    mixer, seen = Mamba2(32, d_state=8, head_dim=16).double(), []
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    x.requires_grad_()
    plain = mixer(x)
    for part in (mixer.conv1d, mixer.norm):
        part.register_forward_hook(lambda module, *_: seen.append(module))
    watched = mixer(x)
    assert seen == [mixer.conv1d, mixer.norm]
    torch.testing.assert_close(watched, plain)
    inputs = [x, *mixer.parameters()]
    got, want = (torch.autograd.grad(out.sin().sum(), inputs) for out in (watched, plain))
    torch.testing.assert_close(got, want)
