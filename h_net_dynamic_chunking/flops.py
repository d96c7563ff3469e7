"""Forward FLOPs of an HNetLM, counted as in appendix B of the paper.

Two departures, without which the paper's own table does not come out: the output projection of
Mamba-2 is charged at its true width, `expand * d_model`, and the products of the router and the
residual are counted. Attention is not halved for causality.

The appendix does not say how attention with a window of W is charged. Each of n positions reads W
others, n W in all, and so it is counted here. The paper's table seems to charge W W, as if a
sequence had one window: LlamaByte and SpaceByte, the two models with windows at every byte, have
0.42 and 0.41 GFLOPs a byte there; they come out at 0.421 and 0.407 by W W, at 0.480 and 0.452 by
n W. In an H-Net it matters little, 0.697 against 0.700 for hnet_2stage_XL. `window_squared` counts
as the table seems to.
"""

import math
from collections.abc import Sequence

from h_net_dynamic_chunking.config import HNetConfig
from h_net_dynamic_chunking.config_checks import MAMBA_HEAD_DIM, check_integer
from h_net_dynamic_chunking.layers import parse_layout
from h_net_dynamic_chunking.layers.mlp import swiglu_width


def flops_per_byte(
    config: HNetConfig,
    seq_len: int = 8192,
    positions_per_chunk: Sequence[float] | None = None,
    *,
    window_squared: bool = False,
) -> float:
    """Forward FLOPs for each byte of a sequence.

    Args:
        config: of the model.
        seq_len: bytes of the sequence; attention costs more in longer ones.
        positions_per_chunk: what each stage reaches, outermost first; its target by default.
        window_squared: charge attention with a window as the paper's table seems to; see above.

    Raises:
        ValueError: seq_len is no integer of at least 1, or positions_per_chunk has not one finite
            entry of at least 1 for each stage.

    >>> config = HNetConfig.preset("hnet_1stage_L")
    >>> round(flops_per_byte(config, positions_per_chunk=[4.8]) / 1e9, 2)
    0.43
    """
    check_integer("seq_len", seq_len, 1)
    ratios = config.target_ratio if positions_per_chunk is None else tuple(positions_per_chunk)
    if len(ratios) != config.stages or not all(1 <= ratio < math.inf for ratio in ratios):
        raise ValueError(
            f"positions_per_chunk must have {config.stages} entries of at least 1, "
            f"got {list(ratios)}"
        )
    total = 2.0 * 2 * seq_len * config.vocab_size * config.d_model[0]
    positions = float(seq_len)
    for level, layouts in enumerate(config.levels()):
        width = config.d_model[level]
        for layout in layouts:
            total += _stack(config, level, layout, positions, window_squared)
        if level < config.stages:
            router_and_residual = 2 * positions * width * 3 * width
            total += router_and_residual
            positions /= ratios[level]
    return total / seq_len


def _stack(
    config: HNetConfig, level: int, layout: str, positions: float, window_squared: bool
) -> float:
    width = config.d_model[level]
    total = 0.0
    for letter, count in parse_layout(layout):
        if letter.lower() == "m":
            layer = _mamba(config, level, positions)
        else:
            layer = _attention(config, level, positions, window_squared)
        if letter.isupper():
            inner = swiglu_width(width, config.d_intermediate[level])
            layer += positions * width * (6 * inner + 5)
        total += count * layer
    return total


def _mamba(config: HNetConfig, level: int, positions: float) -> float:
    ssm, width = config.ssm_cfg, config.d_model[level]
    inner = ssm.expand * width
    projections = (
        2 * width * (2 * inner + 2 * ssm.d_state + inner // MAMBA_HEAD_DIM) + 2 * inner * width
    )
    scan = 6 * inner * ssm.d_state
    return positions * (projections + scan + 2 * width * ssm.d_conv + 5 * width)


def _attention(config: HNetConfig, level: int, positions: float, window_squared: bool) -> float:
    attention, width = config.attn_cfg, config.d_model[level]
    window = attention.window_size[level]
    context = positions if window < 0 else min(positions, window + 1)
    readers = context if window_squared else positions
    scores_and_values = readers * context * (4 * width + 3 * attention.num_heads[level])
    return positions * 8 * width * width + scores_and_values
