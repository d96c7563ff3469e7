"""AdamW with a learning rate per stage, and no decay where decay makes no sense."""

from typing import Any

import torch
from torch import nn

from h_net_dynamic_chunking import scaling
from h_net_dynamic_chunking.scaling import lr_multipliers
from h_net_dynamic_chunking.training.config import Config
from h_net_dynamic_chunking.training.model import ByteHNet

BETAS = (0.9, 0.95)
GRADIENT_NORM = 1.0


def parameter_groups(model: ByteHNet, config: Config) -> list[dict[str, Any]]:
    """Split the parameters by stage and by whether they decay; each group has `lr_multiplier`."""
    main = set(model.inner.network.parameters())
    middle = set(model.inner.parameters()) - main
    outer = set(model.parameters()) - middle - main
    # In the model's order, because that of a set changes from process to process.
    levels = [[p for p in model.parameters() if p in stage] for stage in (outer, middle, main)]
    multipliers = lr_multipliers(config.dims, config.target_ratio)
    return scaling.parameter_groups(levels, multipliers, config.weight_decay)


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
