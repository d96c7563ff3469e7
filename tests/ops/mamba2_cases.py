"""Arguments of what stands between the projections of a Mamba-2 layer."""

from torch import Tensor

from tests.support import randn


def mamba2_inputs(
    *positions: int,
    heads: int = 2,
    head_dim: int = 3,
    d_state: int = 4,
    taps: int = 3,
    seed: int = 0,
    device: str = "cpu",
) -> tuple[Tensor, ...]:
    """float64: the projected rows, (total,) or (batch, length) of them, and the parameters."""
    d_inner = heads * head_dim
    channels = d_inner + 2 * d_state
    shapes = (
        (*positions, d_inner + channels + heads),
        (channels, 1, taps),
        (channels,),
        (heads,),
        (heads,),
        (heads,),
        (d_inner,),
    )
    return tuple(randn(*shape, seed=seed + i, device=device) for i, shape in enumerate(shapes))
