"""SwiGLU: which half is the gate, how widths are rounded, bad arguments."""

import pytest
import torch

from h_net_dynamic_chunking.layers import SwiGLU


def test_second_half_of_fc1_is_the_gate() -> None:
    torch.manual_seed(0)
    mlp = SwiGLU(8).double()
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    value, gate = x @ mlp.fc1.weight[:128].T, x @ mlp.fc1.weight[128:].T
    torch.testing.assert_close(mlp(x), (value * gate * gate.sigmoid()) @ mlp.fc2.weight.T)


@pytest.mark.parametrize(
    ("d_model", "d_intermediate", "width"),
    [(1024, None, 2816), (1536, None, 4096), (2048, None, 5504), (64, 1, 128), (64, 129, 256)],
)
def test_width_is_a_multiple_of_128(d_model: int, d_intermediate: int | None, width: int) -> None:
    """The first three are the widths of the published models."""
    with torch.device("meta"):
        mlp = SwiGLU(d_model, d_intermediate)
    assert mlp.fc1.weight.shape == (2 * width, d_model)
    assert mlp.fc2.weight.shape == (d_model, width)


@pytest.mark.parametrize("arguments", [{"d_model": 0}, {"d_model": 8, "d_intermediate": 0}])
def test_bad_arguments(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{list(arguments)[-1]} must be .* got 0"):
        SwiGLU(**arguments)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="x must have shape"):
        SwiGLU(8)(torch.randn(2, 3, 7))


def test_position_wise() -> None:
    """Padded, packed and single steps are the same rows."""
    mlp, x = SwiGLU(8).double(), torch.randn(2, 3, 8, dtype=torch.float64)
    torch.testing.assert_close(mlp(x.flatten(0, 1)), mlp(x).flatten(0, 1))
    torch.testing.assert_close(mlp(x[:, 0]), mlp(x)[:, 0])
