"""Forward FLOPs of an HNetLM, counted as in appendix B of the paper.

Two departures, without which the paper's own table does not come out: the output projection of
Mamba-2 is charged at its true width, `expand * d_model`, and the products of the router and the
residual are counted. Attention is not halved for causality; a window bounds its context.
"""

from collections.abc import Sequence

from h_net_dynamic_chunking.config import HNetConfig
from h_net_dynamic_chunking.layers import parse_layout

_HEAD_DIM = 64  # of Mamba-2


def flops_per_byte(
    config: HNetConfig, seq_len: int = 8192, positions_per_chunk: Sequence[float] | None = None
) -> float:
    """Forward FLOPs for each byte of a sequence.

    Args:
        config: of the model.
        seq_len: bytes of the sequence; attention costs more in longer ones.
        positions_per_chunk: what each stage reaches, outermost first; its target by default.

    Raises:
        ValueError: not one entry for each stage, or one below 1.

    >>> config = HNetConfig.preset("hnet_1stage_L")
    >>> round(flops_per_byte(config, positions_per_chunk=[4.8]) / 1e9, 2)
    0.43
    """
    ratios = config.target_ratio if positions_per_chunk is None else tuple(positions_per_chunk)
    if len(ratios) != config.stages or any(ratio < 1 for ratio in ratios):
        raise ValueError(
            f"positions_per_chunk must have {config.stages} entries of at least 1, "
            f"got {list(ratios)}"
        )
    total = 2.0 * 2 * seq_len * config.vocab_size * config.d_model[0]
    positions = float(seq_len)
    for level, layouts in enumerate(config.levels()):
        width = config.d_model[level]
        total += sum(_stack(config, level, layout, positions) for layout in layouts)
        if level < config.stages:
            router_and_residual = 2 * positions * width * 3 * width
            total += router_and_residual
            positions /= ratios[level]
    return total / seq_len


def _stack(config: HNetConfig, level: int, layout: str, positions: float) -> float:
    width = config.d_model[level]
    total = 0.0
    for letter, count in parse_layout(layout):
        mixer = _mamba if letter.lower() == "m" else _attention
        layer = mixer(config, level, positions)
        if letter.isupper():
            layer += positions * width * (6 * config.d_intermediate[level] + 5)
        total += count * layer
    return total


def _mamba(config: HNetConfig, level: int, positions: float) -> float:
    ssm, width = config.ssm_cfg, config.d_model[level]
    inner = ssm.expand * width
    projections = 2 * width * (2 * inner + 2 * ssm.d_state + inner // _HEAD_DIM) + 2 * inner * width
    scan = 6 * inner * ssm.d_state
    return positions * (projections + scan + 2 * width * ssm.d_conv + 5 * width)


def _attention(config: HNetConfig, level: int, positions: float) -> float:
    attention, width = config.attn_cfg, config.d_model[level]
    window = attention.window_size[level]
    context = positions if window < 0 else min(positions, window + 1)
    scores_and_values = 4 * context * width + 3 * attention.num_heads[level] * context
    return positions * (8 * width * width + scores_and_values)
