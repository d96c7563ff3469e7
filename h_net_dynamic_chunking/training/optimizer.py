"""AdamW with a learning rate per stage, and no decay where decay makes no sense."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from h_net_dynamic_chunking import scaling
from h_net_dynamic_chunking.config_checks import check_amount
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
    return adamw(parameter_groups(model, config), config.learning_rate)


def adamw(groups: Iterable[dict[str, Any]], learning_rate: float) -> torch.optim.AdamW:
    """AdamW over the groups of `HNetLM.parameter_groups`, each with its multiple of the rate.

    Fused: a group is a few launches, which read and write each number once.

    Raises:
        ValueError: groups without multiples, or a rate that is no finite number of at least 0.
    """
    groups = list(groups)
    for group in groups:
        if not isinstance(group, dict) or "lr_multiplier" not in group:
            got = sorted(group) if isinstance(group, dict) else type(group).__name__
            raise ValueError(
                "groups must be dicts with an 'lr_multiplier', as HNetLM.parameter_groups gives, "
                f"got {got}"
            )
    check_amount("learning_rate", learning_rate)
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=BETAS, fused=True)
    set_learning_rate(optimizer, learning_rate)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give each group its multiple of `learning_rate`; in place where its rate is a tensor.

    Raises:
        ValueError: a rate that is no finite number of at least 0, or groups without multiples.
    """
    check_amount("learning_rate", learning_rate)
    if not all("lr_multiplier" in group for group in optimizer.param_groups):
        raise ValueError(
            "optimizer must have an 'lr_multiplier' in each group, as one of `adamw` has; "
            f"got a {type(optimizer).__name__} with {sorted(optimizer.param_groups[0])}"
        )
    for group in optimizer.param_groups:
        rate = learning_rate * group["lr_multiplier"]
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def clip_gradients(model: nn.Module) -> None:
    """Scale the gradients of all parameters together to a norm of GRADIENT_NORM at most."""
    nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
