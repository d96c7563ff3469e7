"""The argument checks that every layer makes, so that each has one wording."""

import torch
from torch import Tensor

from h_net_dynamic_chunking.ops.packing import check_cu_seqlens


def check_sizes(**sizes: int) -> None:
    """Raise ValueError unless every size, named by its keyword, is an integer of at least 1."""
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {size!r}")


def check_input(x: Tensor, d_model: int, cu_seqlens: Tensor | None = None) -> None:
    """Raise ValueError unless `x` is `(batch, length, d_model)`, or packed with good `cu_seqlens`.

    Values of `cu_seqlens` are not read: on a GPU that would stop the host.
    """
    if cu_seqlens is None:
        _check_shape(x, 3, f"(batch, length, {d_model})", d_model)
    else:
        check_cu_seqlens(cu_seqlens)
        _check_shape(x, 2, f"(total, {d_model}) with cu_seqlens", d_model)


def check_step_input(x: Tensor, d_model: int) -> None:
    """Raise ValueError unless `x` is `(batch, d_model)`."""
    _check_shape(x, 2, f"(batch, {d_model})", d_model)


def _check_shape(x: Tensor, ndim: int, wanted: str, d_model: int) -> None:
    if x.ndim != ndim or x.shape[-1] != d_model:
        raise ValueError(f"x must have shape {wanted}, got {tuple(x.shape)}")


def check_cache_tensor(tensor: Tensor, batch_size: int, dtype: torch.dtype) -> None:
    """Raise ValueError unless a tensor of a cache fits `batch_size` rows of `dtype`."""
    if tensor.shape[0] != batch_size:
        raise ValueError(
            f"cache must have the batch size of x, {batch_size}, got one of {tensor.shape[0]}"
        )
    if tensor.dtype != dtype:
        raise ValueError(f"cache must have the dtype of x, {dtype}, got one of {tensor.dtype}")
