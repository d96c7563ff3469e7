"""Dechunking: smoothing, expansion and residual in one operation. Eq. (3), (5) to (9) of the paper.

    out_t = STE(c_t) * s_{chunk of t} + residual_t     with s of `ops.ema` and c of `ops.expansion`

Contract
    z:             (chunks, dim), float; packed, what comes back from the inner network
    probs:         (total,), float: p of each position; P of a chunk is p where it opens
    segmentation:  of the positions
    residual:      (total, dim), float, or None; with a projection (total, any width)
    projection:    weight (dim, any width) and bias (dim,) or None: what is added is
                   `ops.wide_linear` of the residual; or None
    out:           (total, dim), in `dtype`; where there is no chunk, the residual

Accumulates in float32 (float64 for float64), and the kernels round once, at the end. The gradient
of the probabilities has two parts, from the smoothing and from the confidence; both are products
with the smoothed chunks, which wait for the backward pass in the dtype of z. On a GPU what lies
between, (chunks, dim) smoothed, is not written unless the backward pass will want it. The
projection is in here because its backward pass wants the gradient as it comes: between two
operations, autograd would widen it to the float32 of what is added.
"""

from typing import Any

import torch
from torch import Tensor

from h_net_dynamic_chunking.ops.backend import chosen_backend, kernels, use_backend
from h_net_dynamic_chunking.ops.compaction import Segmentation
from h_net_dynamic_chunking.ops.ema import _ema, _ema_backward
from h_net_dynamic_chunking.ops.expansion import _expand, _expand_backward, runs_on_triton
from h_net_dynamic_chunking.ops.packing import check_packed, check_same_length, gather_or_zero
from h_net_dynamic_chunking.ops.registration import operation
from h_net_dynamic_chunking.ops.wide_linear import _wide_linear_backward, check_weight
from h_net_dynamic_chunking.ops.wide_products import product


def dechunk(
    z: Tensor,
    probs: Tensor,
    segmentation: Segmentation,
    residual: Tensor | None = None,
    *,
    projection: tuple[Tensor, Tensor | None] | None = None,
    straight_through: bool = True,
    weigh_input: bool = True,
    clamp: float | None = None,
    dtype: torch.dtype | None = None,
    short_memory: bool = False,
) -> Tensor:
    """Smooth the chunks and repeat them over their positions; the contract is at the top.

    Args:
        z: see the contract.
        probs: see the contract.
        segmentation: see the contract.
        residual: see the contract.
        projection: see the contract.
        straight_through: Whether the confidence takes a gradient, eq. (7) to (9).
        weigh_input: As in `ema_smooth`.
        clamp: The smoothing, and nothing else, clamps P to [clamp, 1 - clamp].
        dtype: Of the result; by default that of the residual, else of z.
        short_memory: Say that every P is above a half, as a router's are, so that the memory
            fades within some twenty chunks. It is a matter of speed only.

    Raises:
        ValueError: shapes or dtypes off the contract, or a clamp that is not in [0, 0.5).

    >>> from h_net_dynamic_chunking.ops import segment
    >>> probs = torch.tensor([1.0, 0.2, 0.5])
    >>> chunks = segment(torch.tensor([True, False, True]), torch.tensor([0, 3]))
    >>> dechunk(torch.tensor([[2.0], [4.0]]), probs, chunks).flatten()
    tensor([2., 2., 3.])
    """
    check_packed("z", z, 2)
    check_packed("probs", probs, 1)
    check_same_length("z", z, "segmentation.boundary_positions", segmentation.boundary_positions)
    check_same_length("probs", probs, "segmentation.starts", segmentation.starts)
    _check_residual(z, probs, residual, projection)
    if clamp is not None and not 0 <= clamp < 0.5:
        raise ValueError(f"clamp must be None or in [0, 0.5), got {clamp}")
    if dtype is None:
        dtype = z.dtype if residual is None else residual.dtype
    needs_grad = torch.is_grad_enabled() and (z.requires_grad or probs.requires_grad)
    out: Tensor
    out, _ = _dechunk(
        z,
        probs,
        segmentation.chunk_of_position,
        segmentation.slot_of_position,
        segmentation.boundary_positions,
        segmentation.starts,
        segmentation.cu_chunks,
        residual,
        *(projection or (None, None)),
        dtype,
        straight_through,
        weigh_input,
        clamp,
        needs_grad,
        short_memory,
    )
    return out


def _check_residual(
    z: Tensor,
    probs: Tensor,
    residual: Tensor | None,
    projection: tuple[Tensor, Tensor | None] | None,
) -> None:
    if residual is None:
        if projection is not None:
            raise ValueError("projection must be None where there is no residual")
        return
    check_packed("residual", residual, 2)
    shape = probs.shape[0], residual.shape[1] if projection else z.shape[1]
    if residual.shape != shape:
        raise ValueError(f"residual must have shape {shape}, got {tuple(residual.shape)}")
    if projection is not None:
        check_weight(residual, *projection)
        if projection[0].shape[0] != z.shape[1]:
            raise ValueError(
                f"projection must make {z.shape[1]} channels, as z has, "
                f"got {projection[0].shape[0]}"
            )


def _gates(probs: Tensor, positions: Tensor, clamp: float | None) -> Tensor:
    """P of each chunk: (chunks,)."""
    gates = gather_or_zero(probs[:, None], positions)[:, 0]
    return gates if clamp is None else gates.clamp(clamp, 1 - clamp)


@operation("dechunk")
def _dechunk(
    z: Tensor,
    probs: Tensor,
    chunk_of_position: Tensor,
    slot_of_position: Tensor,
    positions: Tensor,
    starts: Tensor,
    cu_chunks: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    straight_through: bool,
    weigh_input: bool,
    clamp: float | None,
    keep_smoothed: bool,
    short_memory: bool,
) -> tuple[Tensor, Tensor]:
    """The result, and the smoothed chunks, which are empty unless `keep_smoothed`."""
    if runs_on_triton(z, residual, probs.shape[0]):
        if residual is not None and weight is not None:
            residual = product(residual, weight, rounded_to=dtype)
        results: tuple[Tensor, Tensor] = kernels("dechunk_forward").dechunk_fwd(
            z,
            probs,
            chunk_of_position,
            positions,
            starts,
            residual,
            bias,
            dtype,
            weigh_input=weigh_input,
            clamp=clamp,
            keep_smoothed=keep_smoothed,
            short_memory=short_memory,
        )
        return results
    gates = _gates(probs, positions, clamp)
    smoothed = _ema(z, gates, cu_chunks, None, weigh_input)
    if residual is not None and weight is not None:
        residual = product(residual, weight, bias)
    out = _expand(smoothed, chunk_of_position, None, residual).to(dtype)
    return out, smoothed if keep_smoothed else smoothed.new_empty(0, z.shape[1])


@_dechunk.register_fake
def _(
    z: Tensor,
    probs: Tensor,
    chunk_of_position: Tensor,
    slot_of_position: Tensor,
    positions: Tensor,
    starts: Tensor,
    cu_chunks: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    straight_through: bool,
    weigh_input: bool,
    clamp: float | None,
    keep_smoothed: bool,
    short_memory: bool,
) -> tuple[Tensor, Tensor]:
    return (
        z.new_empty(probs.shape[0], z.shape[1], dtype=dtype),
        z.new_empty(z.shape[0] if keep_smoothed else 0, z.shape[1]),
    )


@operation("dechunk_backward")
def _dechunk_backward(
    grad: Tensor,
    z: Tensor,
    probs: Tensor,
    smoothed: Tensor,
    chunk_of_position: Tensor,
    slot_of_position: Tensor,
    positions: Tensor,
    starts: Tensor,
    cu_chunks: Tensor,
    straight_through: bool,
    weigh_input: bool,
    clamp: float | None,
    short_memory: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of z and, in float32 (float64 for float64), of the probabilities."""
    if runs_on_triton(z, None, probs.shape[0]):
        gradients: tuple[Tensor, Tensor] = kernels("dechunk_backward").dechunk_bwd(
            grad,
            z,
            smoothed,
            probs,
            chunk_of_position,
            starts,
            cu_chunks,
            weigh_input=weigh_input,
            clamp=clamp,
            straight_through=straight_through,
            short_memory=short_memory,
        )
        return gradients
    grad_smoothed, grad_confidence = _expand_backward(grad, smoothed, chunk_of_position)
    gates = _gates(probs, positions, clamp)
    grad_z, grad_gates, _ = _ema_backward(
        grad_smoothed, z, gates, cu_chunks, None, smoothed, weigh_input
    )
    grad_probs = gather_or_zero(grad_gates[:, None], slot_of_position)[:, 0]
    if clamp is not None:
        grad_probs = grad_probs.where((probs >= clamp) & (probs <= 1 - clamp), 0.0)
    if straight_through:
        grad_probs = grad_probs + grad_confidence.where(slot_of_position >= 0, -grad_confidence)
    return grad_z, grad_probs.to(grad_confidence.dtype)


@_dechunk_backward.register_fake
def _(
    grad: Tensor,
    z: Tensor,
    probs: Tensor,
    smoothed: Tensor,
    chunk_of_position: Tensor,
    slot_of_position: Tensor,
    positions: Tensor,
    starts: Tensor,
    cu_chunks: Tensor,
    straight_through: bool,
    weigh_input: bool,
    clamp: float | None,
    short_memory: bool,
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(z.dtype, torch.float32)
    return z.new_empty(z.shape), probs.new_empty(probs.shape, dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    z, probs, *indices, residual, weight, bias = inputs[:-6]
    _, *options, _, short_memory = inputs[-6:]
    ctx.options = *options, short_memory
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.has_bias = bias is not None
    ctx.backend = chosen_backend()
    ctx.save_for_backward(
        z, probs, output[1], *indices, weight, None if weight is None else residual
    )
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    grad_z = grad_probs = None
    of_residual: tuple[Tensor | None, ...] = (None, None, None)
    if grad is not None:
        z, probs, smoothed, *indices, weight, residual = ctx.saved_tensors
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            with use_backend(ctx.backend):
                grad_z, grad_probs = _dechunk_backward(
                    grad, z, probs, smoothed, *indices, *ctx.options
                )
            grad_probs = grad_probs.to(probs.dtype)
        if weight is not None:
            grad_residual, grad_weight, grad_bias = _wide_linear_backward(grad, residual, weight)
            of_residual = grad_residual, grad_weight, grad_bias if ctx.has_bias else None
        elif ctx.residual_dtype is not None:
            of_residual = grad.to(ctx.residual_dtype), None, None
    return grad_z, grad_probs, *[None] * 5, *of_residual, *[None] * 6


_dechunk.register_autograd(_backward, setup_context=_setup_context)
_dechunk_backward.refuse_autograd()
