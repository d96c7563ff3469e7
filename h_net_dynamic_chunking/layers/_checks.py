"""The argument checks that every layer makes, so that each has one wording."""

from torch import Tensor


def check_sizes(**sizes: int) -> None:
    """Raise ValueError unless every size, named by its keyword, is an integer of at least 1."""
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {size!r}")


def check_input(x: Tensor, d_model: int) -> None:
    """Raise ValueError unless `x` is `(batch, length, d_model)`."""
    if x.ndim != 3 or x.shape[-1] != d_model:
        raise ValueError(f"x must have shape (batch, length, {d_model}), got {tuple(x.shape)}")
