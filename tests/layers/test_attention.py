"""Attention: against a softmax written out, the rotary property, the window, bad arguments."""

import pytest
import torch
from torch import Tensor

from h_net_dynamic_chunking.layers import CausalAttention
from h_net_dynamic_chunking.layers.attention import rotate


def attend_by_hand(mixer: CausalAttention, x: Tensor, window: int) -> Tensor:
    """One row, one head and one position at a time; keys window..0 to the left."""
    q, k, v = (x @ mixer.Wqkv.weight.T).chunk(3, dim=-1)
    heads, head_dim = mixer.num_heads, x.shape[-1] // mixer.num_heads
    position = torch.arange(x.shape[1])
    q, k = (rotate(t.unflatten(-1, (heads, head_dim)), position, mixer.rotary_dim) for t in (q, k))
    v = v.unflatten(-1, (heads, head_dim))
    out = torch.zeros_like(v)
    for row in range(x.shape[0]):
        for head in range(heads):
            for i in range(x.shape[1]):
                kept = slice(max(0, i - window), i + 1)
                scores = k[row, kept, head] @ q[row, i, head] / head_dim**0.5
                out[row, i, head] = scores.softmax(0) @ v[row, kept, head]
    return out.flatten(2) @ mixer.out_proj.weight.T


@pytest.mark.parametrize("window", [-1, 0, 2, 6, 100])
def test_equals_hand_computation(window: int) -> None:
    """Row order of Wqkv, scale, causal mask and window, in float64."""
    torch.manual_seed(0)
    mixer = CausalAttention(16, 2, rotary_dim=4, window_size=window).double()
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), attend_by_hand(mixer, x, 7 if window == -1 else window))


def test_rotary_is_relative() -> None:
    """Scores of two vectors depend on their distance only; later channels are not turned."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 12, dtype=torch.float64).expand(2, 1, 20, 1, 12)
    q_turned, k_turned = (rotate(part, torch.arange(20), 8)[0, :, 0] for part in (q, k))
    scores = q_turned @ k_turned.T
    for distance in (-3, 0, 5):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert not torch.allclose(scores[0, 0], scores[0, 5])
    assert torch.equal(q_turned[:, 8:], q[0, :, 0, 8:])


def test_rotary_pairs_and_angles() -> None:
    """Channel i pairs with i + r/2 and turns by t * base^(-2i/r)."""
    x = torch.zeros(1, 4, 1, 6, dtype=torch.float64)
    x[..., 1] = 1
    turned = rotate(x, torch.arange(4), 4, base=100.0)[0, 3, 0]
    angle = torch.tensor(3 * 100.0 ** (-2 / 4), dtype=torch.float64)
    expected = torch.zeros(6, dtype=torch.float64)
    expected[1], expected[3] = angle.cos(), angle.sin()
    torch.testing.assert_close(turned, expected)


def test_default_rotary_dim_is_half_a_head() -> None:
    assert CausalAttention(1024, 16).rotary_dim == 32
    assert CausalAttention(12, 2).rotary_dim == 2


@pytest.mark.parametrize("shape", [(2, 0, 16), (0, 3, 16), (2, 1, 16)])
@pytest.mark.parametrize("window", [-1, 0])
def test_empty_and_single(shape: tuple[int, ...], window: int) -> None:
    mixer = CausalAttention(16, 2, window_size=window)
    out = mixer(torch.randn(shape))
    assert out.shape == shape
    out.sum().backward()
    assert mixer.Wqkv.weight.grad is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"d_model": 0}, "d_model must be"),
        ({"num_heads": 0}, "num_heads must be an integer of at least 1, got 0"),
        ({"num_heads": 3}, "num_heads must divide d_model = 16, got 3"),
        ({"rotary_dim": 3}, "rotary_dim must be even and at most the head's 8 channels, got 3"),
        ({"rotary_dim": 10}, "rotary_dim must be even"),
        ({"rotary_dim": -2}, "rotary_dim must be even"),
        ({"rotary_base": 0.0}, "rotary_base must be positive, got 0"),
        ({"window_size": -2}, "window_size must be -1 .* or more, got -2"),
    ],
)
def test_bad_arguments(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CausalAttention(**{"d_model": 16, "num_heads": 2, **arguments})


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"x must have shape \(batch, length, 16\), got \(5, 16\)"):
        CausalAttention(16, 2)(torch.randn(5, 16))
