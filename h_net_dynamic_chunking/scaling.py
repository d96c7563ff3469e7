"""What depends on how deep in the hierarchy a weight stands: its start and its learning rate.

Levels run from the outside in; the main network is the last.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from h_net_dynamic_chunking.config_checks import check_amount
from h_net_dynamic_chunking.layers import Isotropic, parse_layout

INIT_STD = 0.02
# Projections onto the residual stream: of mixers, of the MLP, and of other libraries' attention.
_ONTO_STREAM = ("out_proj", "fc2", "to_out")
# Eq. (11) compares with a BPE tokenizer, whose tokens hold 4.6 bytes on average.
_BYTES_PER_BPE_TOKEN = 4.6


@torch.no_grad()
def init_stacks(levels: Sequence[Sequence[Isotropic]], std: float = INIT_STD) -> None:
    """Initialise the linear layers of all stacks as the official code does.

    N(0, std), divided for a projection onto the residual stream by the root of the additions that
    the stream has met, counted over all levels from the outside in.
    """
    additions = 0
    for stacks in levels:
        additions += sum(residual_additions(stack.layout) for stack in stacks)
        for stack in stacks:
            for name, module in stack.named_modules():
                if isinstance(module, nn.Linear):
                    shrink = math.sqrt(additions) if name.endswith(_ONTO_STREAM) else 1.0
                    nn.init.normal_(module.weight, std=std / shrink)


def residual_additions(layout: str) -> int:
    """What a stack adds to its residual stream: upper case adds a mixer and an MLP.

    >>> residual_additions("T1m4")
    6
    """
    return sum(count * (2 if letter.isupper() else 1) for letter, count in parse_layout(layout))


def lr_multipliers(widths: Sequence[int], target_ratios: Sequence[float]) -> list[float]:
    """Factors on the learning rate of each level, eq. (11).

    The rate goes with the square root of the positions in a batch, by the target ratios, and
    against the square root of the width.

    >>> [round(factor, 3) for factor in lr_multipliers([1024, 1536], [6.0])]
    [2.627, 0.876]
    """
    factors, positions = [], 1.0
    for width, ratio in zip(widths, (*target_ratios, 1.0), strict=True):
        factors.append(math.sqrt(_BYTES_PER_BPE_TOKEN * positions * widths[-1] / width))
        positions /= ratio
    return factors


def parameter_groups(
    levels: Iterable[Sequence[nn.Parameter]], multipliers: Sequence[float], weight_decay: float
) -> list[dict[str, Any]]:
    """Groups for an optimizer, by level and by whether they decay; each has `lr_multiplier`.

    Norms, biases, A_log, D, dt_bias and pad vectors do not decay: all that has one dimension.

    Raises:
        ValueError: weight_decay is no finite number of at least 0.
    """
    check_amount("weight_decay", weight_decay)
    return [
        {
            "params": [p for p in members if (p.ndim > 1) == decays],
            "weight_decay": weight_decay if decays else 0.0,
            "lr_multiplier": multiplier,
        }
        for members, multiplier in zip(levels, multipliers, strict=True)
        for decays in (True, False)
    ]
