"""Mamba-2: the chunked form against the sequential oracle, and the oracle against hand sums."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from h_net_dynamic_chunking.layers import Mamba2, ssd_chunked
from h_net_dynamic_chunking.layers.reference import ssd_sequential

NAMES = ("x", "dt", "A", "B", "C", "D")


def ssd_inputs(
    length: int, batch: int = 2, heads: int = 3, head_dim: int = 4, d_state: int = 5
) -> tuple[Tensor, ...]:
    """Float64 arguments of the two functions, the last channels of wider buffers where possible."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = (
        normal(batch, length, heads, 2 * head_dim)[..., head_dim:],
        F.softplus(normal(batch, length, heads)),
        -normal(heads).exp(),
        normal(batch, length, 2 * d_state)[..., d_state:],
        normal(batch, length, 2 * d_state)[..., d_state:],
        normal(heads),
    )
    return tuple(tensor.requires_grad_() for tensor in inputs)


@pytest.mark.parametrize("length", [0, 1, 2, 63, 64, 65, 130])
def test_chunked_equals_sequential(length: int) -> None:
    """Values and every gradient, at lengths around the chunk of 64."""
    inputs = ssd_inputs(length)
    chunked, sequential = ssd_chunked(*inputs), ssd_sequential(*inputs)
    torch.testing.assert_close(chunked, sequential, rtol=1e-10, atol=1e-10)
    if length == 0:
        return
    upstream = torch.randn_like(sequential)
    wanted = torch.autograd.grad(sequential, inputs, upstream)
    for name, got, want in zip(
        NAMES, torch.autograd.grad(chunked, inputs, upstream), wanted, strict=True
    ):
        torch.testing.assert_close(
            got, want, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )


# Lengths of the sequences: starts at, before and after the edges of chunks of 4, two in one chunk,
# a sequence over three chunks, single positions.
RUNS = [[13], [4, 4, 5], [3, 1, 1, 8], [1] * 6 + [7], [5, 2, 6], [1, 12], [12, 1]]


@pytest.mark.parametrize("runs", RUNS)
def test_resets_equal_sequential(runs: list[int]) -> None:
    """Values and gradients with a new state at each start; the second row has others."""
    inputs = ssd_inputs(13)
    sequence = torch.stack(
        [torch.repeat_interleave(torch.tensor(lens)) + 2 for lens in (runs, runs[::-1])]
    )
    got = ssd_chunked(*inputs, chunk_size=4, sequence=sequence)
    want = ssd_sequential(*inputs, sequence)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    upstream = torch.randn_like(want)
    for one, other in zip(
        torch.autograd.grad(got, inputs, upstream),
        torch.autograd.grad(want, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_sequential_resets() -> None:
    """Two sequences in one row are what each is alone."""
    x, dt, A, B, C, D = ssd_inputs(7)
    first, second = (
        ssd_sequential(x[:, part], dt[:, part], A, B[:, part], C[:, part], D)
        for part in (slice(3), slice(3, 7))
    )
    sequence = torch.tensor([[0, 0, 0, 1, 1, 1, 1]]).expand(2, 7)
    together = ssd_sequential(x, dt, A, B, C, D, sequence)
    assert torch.equal(together, torch.cat([first, second], dim=1))


def test_sequential_equals_hand_sums() -> None:
    """Three tokens, two state channels: y_3 written out as the sum over what reaches it."""
    x = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    dt = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    B = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    C = torch.tensor([[1.0, 1.0], [2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    y = ssd_sequential(
        x.view(1, 3, 1, 1),
        dt.view(1, 3, 1),
        torch.tensor([-1.0], dtype=torch.float64),
        B[None],
        C[None],
        torch.tensor([10.0], dtype=torch.float64),
    )
    e = math.exp
    hand = [
        0.5 + 10,
        # C_2.B_1 dt_1 x_1 decayed by dt_2, C_2.B_2 dt_2 x_2, D x_2
        2 * 0.5 * e(-1) + 1 * 1 * -2 - 20,
        1 * 0.5 * e(-3) + 3 * 1 * -2 * e(-2) + 4 * 2 * 3 + 30,
    ]
    torch.testing.assert_close(y.flatten(), torch.tensor(hand, dtype=torch.float64))


@pytest.mark.parametrize("sequence", [None, [[0, 1, 1, 1, 4]]])
def test_gradcheck(sequence: list[list[int]] | None) -> None:
    """Numerical gradients over two chunks and a part of a third, without and with resets."""
    inputs = ssd_inputs(5, batch=1, heads=2, head_dim=2, d_state=2)
    runs = None if sequence is None else torch.tensor(sequence)
    assert torch.autograd.gradcheck(
        lambda *args: ssd_chunked(*args, chunk_size=2, sequence=runs), inputs
    )


def test_strong_decay_stays_finite() -> None:
    """A decay that underflows inside one chunk gives no inf or NaN, forward or backward."""
    x, _, A, B, C, D = (tensor.detach().float() for tensor in ssd_inputs(130))
    dt = torch.full(x.shape[:3], 50.0)
    inputs = tuple(tensor.requires_grad_() for tensor in (x, dt, 20 * A, B, C, D))
    y = ssd_chunked(*inputs)
    for tensor in (y, *torch.autograd.grad(y.sum(), inputs)):
        assert tensor.isfinite().all()


def test_bfloat16_error_budget() -> None:
    """Values and gradients: at most twice the error of the plain recurrence run in bfloat16."""
    exact_inputs = tuple(tensor.detach().bfloat16().double() for tensor in ssd_inputs(130))
    rounded_inputs = tuple(tensor.bfloat16() for tensor in exact_inputs)
    upstream = torch.randn(2, 130, 3, 4).bfloat16()

    def run(ssd: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        leaves = tuple(tensor.clone().requires_grad_() for tensor in inputs)
        y = ssd(*leaves)
        return (y, *torch.autograd.grad(y, leaves, upstream.to(y.dtype)))

    for name, exact, plain, chunked in zip(
        ("y", *NAMES),
        run(ssd_sequential, exact_inputs),
        run(ssd_sequential, rounded_inputs),
        run(ssd_chunked, rounded_inputs),
        strict=True,
    ):
        budget = 2 * (plain - exact).abs().max()
        assert chunked.dtype == torch.bfloat16, name
        assert (chunked - exact).abs().max() <= budget, name


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
    y = ssd_sequential(
        values.view(1, 3, 2, 4),
        (1 + (dt + mixer.dt_bias).exp()).log()[None],
        -mixer.A_log.exp(),
        B[None],
        C[None],
        mixer.D,
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
    x, dt, A, B, C, D = ssd_inputs(3)
    with pytest.raises(ValueError, match=r"dt must have shape \(2, 3, 3\), got \(2, 2, 3\)"):
        ssd_chunked(x, dt[:, :2], A, B, C, D)
    with pytest.raises(ValueError, match="C must have shape"):
        ssd_chunked(x, dt, A, B, C[..., :-1], D)
    with pytest.raises(ValueError, match=r"sequence must have shape \(2, 3\), got \(3,\)"):
        ssd_chunked(x, dt, A, B, C, D, sequence=torch.zeros(3))
    with pytest.raises(ValueError, match="chunk_size must be"):
        ssd_chunked(x, dt, A, B, C, D, 0)
