"""AdamW with a learning rate per stage, and no decay where decay makes no sense."""

import math
from typing import Any

import torch
from torch import nn

from h_net_dynamic_chunking.training.config import Config
from h_net_dynamic_chunking.training.model import ByteHNet

# Eq. (11) compares with a BPE tokenizer, whose tokens hold 4.6 bytes on average.
BYTES_PER_BPE_TOKEN = 4.6
BETAS = (0.9, 0.95)
GRADIENT_NORM = 1.0


def lr_multipliers(config: Config) -> list[float]:
    """Return the factors on the learning rate of stage 0, stage 1 and the main network.

    Eq. (11): the rate goes with the square root of the positions in a batch, by the target
    ratios, and against the square root of the width.
    """
    positions = 1.0
    factors = []
    for dim, ratio in zip(config.dims, (*config.target_ratio, 1.0), strict=True):
        factors.append(math.sqrt(BYTES_PER_BPE_TOKEN * positions * config.dims[-1] / dim))
        positions /= ratio
    return factors


def parameter_groups(model: ByteHNet, config: Config) -> list[dict[str, Any]]:
    """Split the parameters by stage and by whether they decay; each group has `lr_multiplier`."""
    main = set(model.inner.network.parameters())
    middle = set(model.inner.parameters()) - main
    outer = set(model.parameters()) - middle - main
    groups = []
    for stage, multiplier in zip((outer, middle, main), lr_multipliers(config), strict=True):
        # In the model's order, because that of a set changes from process to process.
        members = [parameter for parameter in model.parameters() if parameter in stage]
        for decays in (True, False):
            groups.append(
                {
                    "params": [p for p in members if (p.ndim > 1) == decays],
                    "weight_decay": config.weight_decay if decays else 0.0,
                    "lr_multiplier": multiplier,
                }
            )
    return groups


def build_optimizer(model: ByteHNet, config: Config) -> torch.optim.AdamW:
    """Return AdamW over the parameter groups of a model."""
    groups = parameter_groups(model, config)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=BETAS, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give each group its multiple of `learning_rate`."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_multiplier"]


def clip_gradients(model: nn.Module) -> None:
    """Scale the gradients of all parameters together to a norm of GRADIENT_NORM at most."""
    nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
