"""Expansion: every position receives the smoothed vector of its chunk. Eq. (6) to (9).

    c_t = p_t at a boundary, else 1 - p_t           confidence in the decision that was taken
    out_t = STE(c_t) * s_{chunk of t} + residual_t   STE: value 1 forward, gradient 1 backward

Contract
    smoothed:           (chunks, dim), float; packed
    chunk_of_position:  (total,), int64, ascending; -1 in the tail, where out is the residual
    confidence:         (total,), float, or None for no gradient to the router
    residual:           (total, dim), float, or None
    out:                (total, dim), in the dtype of the residual, else of smoothed

The sum with the residual is taken in float32, or float64 for a float64 residual. On the torch path
on CUDA the order of the sums in the backward pass, and so their last bits, vary from run to run.
"""

from typing import Any

import torch
from torch import Tensor

from h_net_dynamic_chunking.ops.backend import chosen_backend, use_backend, uses_triton
from h_net_dynamic_chunking.ops.packing import (
    accumulation_dtype,
    check_packed,
    check_same_length,
    gather_or_zero,
    row_tiles,
)
from h_net_dynamic_chunking.ops.registration import operation


def expand(
    smoothed: Tensor,
    chunk_of_position: Tensor,
    confidence: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Repeat each chunk over its positions; the contract is at the top of this file.

    Raises:
        ValueError: shapes or dtypes off the contract.

    >>> expand(torch.tensor([[1.0], [2.0]]), torch.tensor([0, 0, 1])).flatten()
    tensor([1., 1., 2.])
    """
    check_packed("smoothed", smoothed, 2)
    if chunk_of_position.ndim != 1 or chunk_of_position.dtype != torch.int64:
        raise ValueError(
            f"chunk_of_position must be int64 of shape (total,), "
            f"got {chunk_of_position.dtype} of shape {tuple(chunk_of_position.shape)}"
        )
    if confidence is not None:
        check_packed("confidence", confidence, 1)
        check_same_length("confidence", confidence, "chunk_of_position", chunk_of_position)
    if residual is not None:
        check_packed("residual", residual, 2)
        check_same_length("residual", residual, "chunk_of_position", chunk_of_position)
        if residual.shape[1] != smoothed.shape[1]:
            raise ValueError(
                f"residual must be as wide as smoothed, got {residual.shape[1]} "
                f"and {smoothed.shape[1]}"
            )
    out: Tensor = _expand(smoothed, chunk_of_position, confidence, residual)
    return out


def expand_step(smoothed: Tensor, residual: Tensor | None = None) -> Tensor:
    """One position of each row: `smoothed` `(batch, dim)` is the vector of its current chunk."""
    if residual is None:
        return smoothed
    dtype = accumulation_dtype(residual.dtype)
    return (smoothed.to(dtype) + residual.to(dtype)).to(residual.dtype)


def runs_on_triton(chunks: Tensor, residual: Tensor | None, positions: int) -> bool:
    """Whether the kernels run: torch takes what has no positions, and a residual of float64."""
    if positions == 0 or not uses_triton(chunks):
        return False
    return residual is None or uses_triton(residual)


@operation("expand")
def _expand(
    smoothed: Tensor, chunk_of_position: Tensor, confidence: Tensor | None, residual: Tensor | None
) -> Tensor:
    if runs_on_triton(smoothed, residual, len(chunk_of_position)):
        from h_net_dynamic_chunking.ops._triton.dechunk_forward import expand_fwd

        dtype = smoothed.dtype if residual is None else residual.dtype
        positions = _positions(chunk_of_position, len(smoothed))
        return expand_fwd(smoothed, chunk_of_position.contiguous(), positions, residual, dtype)
    repeated = gather_or_zero(smoothed, chunk_of_position)
    if residual is None:
        return repeated
    dtype = accumulation_dtype(residual.dtype)
    return repeated.to(dtype).add_(residual).to(residual.dtype)


def _positions(chunk_of_position: Tensor, chunks: int) -> Tensor:
    """int64 (chunks,): the first position of each chunk; of the next one, if it has none."""
    owner = chunk_of_position.where(chunk_of_position >= 0, chunks)
    return torch.searchsorted(owner, torch.arange(chunks, device=owner.device))


@_expand.register_fake
def _(
    smoothed: Tensor, chunk_of_position: Tensor, confidence: Tensor | None, residual: Tensor | None
) -> Tensor:
    dtype = smoothed.dtype if residual is None else residual.dtype
    return smoothed.new_empty(chunk_of_position.shape[0], smoothed.shape[1], dtype=dtype)


@operation("expand_backward")
def _expand_backward(
    grad: Tensor, smoothed: Tensor, chunk_of_position: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the smoothed chunks, and of the confidence: <grad_t, s_{chunk of t}>."""
    if runs_on_triton(smoothed, None, len(chunk_of_position)):
        from h_net_dynamic_chunking.ops._triton.dechunk_backward import expand_bwd

        return expand_bwd(grad, smoothed, chunk_of_position.contiguous())
    dtype = accumulation_dtype(smoothed.dtype)
    chunks, dim = smoothed.shape
    # The tail adds to one row behind the last chunk, which is cut off again.
    rows = chunk_of_position.where(chunk_of_position >= 0, chunks)
    grad_smoothed = torch.zeros(chunks + 1, dim, dtype=dtype, device=grad.device)
    grad_smoothed.index_add_(0, rows, grad.to(dtype))
    grad_confidence = torch.zeros(len(rows), dtype=dtype, device=grad.device)
    for tile in row_tiles(grad) if chunks else ():
        repeated = smoothed.index_select(0, rows[tile].clamp(max=chunks - 1))
        torch.sum(repeated.to(dtype).mul_(grad[tile]), -1, out=grad_confidence[tile])
    grad_confidence.masked_fill_(rows == chunks, 0.0)
    return grad_smoothed[:chunks].to(smoothed.dtype), grad_confidence


@_expand_backward.register_fake
def _(grad: Tensor, smoothed: Tensor, chunk_of_position: Tensor) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(smoothed.dtype)
    return smoothed.new_empty(smoothed.shape), grad.new_empty(grad.shape[0], dtype=dtype)


def _setup_context(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, Tensor | None], output: Tensor
) -> None:
    smoothed, chunk_of_position, confidence, residual = inputs
    ctx.confidence_dtype = None if confidence is None else confidence.dtype
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.backend = chosen_backend()
    ctx.save_for_backward(smoothed, chunk_of_position)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor | None, Tensor | None]:
    with use_backend(ctx.backend):
        grad_smoothed, grad_confidence = _expand_backward(grad, *ctx.saved_tensors)
    return (
        grad_smoothed,
        None,
        None if ctx.confidence_dtype is None else grad_confidence.to(ctx.confidence_dtype),
        None if ctx.residual_dtype is None else grad,
    )


_expand.register_autograd(_backward, setup_context=_setup_context)
_expand_backward.refuse_autograd()
