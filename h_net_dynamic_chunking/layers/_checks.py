"""The argument checks that every layer makes, so that each has one wording."""

from torch import Tensor

from h_net_dynamic_chunking.layout import check_lens
from h_net_dynamic_chunking.ops.packing import check_cu_seqlens


def check_sizes(**sizes: int) -> None:
    """Raise ValueError unless every size, named by its keyword, is an integer of at least 1."""
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {size!r}")


def check_flag(**flags: bool) -> None:
    """Raise ValueError unless every flag, named by its keyword, is True or False."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise ValueError(f"{name} must be True or False, got {flag!r}")


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
    if not x.is_floating_point():
        raise ValueError(f"x must be floating-point, got {x.dtype}")


def check_extension(x: Tensor, d_model: int, lens: Tensor | None) -> None:
    """Raise ValueError unless `x` is `(batch, length, d_model)` and `lens` fits it."""
    _check_shape(x, 3, f"(batch, length, {d_model})", d_model)
    if lens is not None:
        check_lens(lens, *x.shape[:2])
