"""What stands between the two projections of a Mamba-2 layer, as one operation.

    gate, conv_in, raw = projected,       x, B, C = causal_conv(conv_in)
    y = ssd(x, softplus(raw + dt_bias), -exp(A_log), B, C, D),       out = gated_norm(y, gate)

Contract
    projected:    (total, 2 d_inner + 2 d_state + heads), float, packed: gate, conv_in and raw side
                  by side; or (batch, length, the same)
    conv_weight:  (d_inner + 2 d_state, 1, taps), conv_bias (d_inner + 2 d_state,)
    dt_bias, A_log, D:  (heads,), float
    norm_weight:  (d_inner,), float
    out_weight:   (d_model, d_inner), dtype of projected, or None
    cu_seqlens:   (batch + 1,), int32 or int64; None for the second form of projected, where every
                  row is one sequence
    out:          (total, d_inner) or (batch, length, d_inner), dtype of projected; with out_weight
                  (..., d_model), the product with it, in whose stead the normed rows are not kept

The tail behind the last sequence may hold anything: it comes out as zeros and gets zeros as its
gradient. Steps and decays are float32 (float64 for float64). As one operation the gradients of the
parts are written where they belong, into one buffer. For the backward pass projected, y, the result
of the convolution and, in half precision, the states that enter the recurrence's chunks are kept,
each about d_inner numbers a position, projected twice that: they cost more time to have again than
the memory is worth. Where it is not, `activation_checkpointing` of the layers keeps none of them.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from h_net_dynamic_chunking.ops import ssd_torch
from h_net_dynamic_chunking.ops.backend import chosen_backend, use_backend, uses_triton
from h_net_dynamic_chunking.ops.causal_conv import (
    _causal_conv,
    _causal_conv_backward,
    why_no_conv_kernels,
)
from h_net_dynamic_chunking.ops.gated_norm import (
    _gated_norm,
    _gated_norm_backward,
    why_no_norm_kernels,
)
from h_net_dynamic_chunking.ops.packing import (
    accumulation_dtype,
    check_packed_or_padded,
    cu_seqlens_of_rows,
    flat_rows,
    in_some_sequence,
)
from h_net_dynamic_chunking.ops.registration import operation
from h_net_dynamic_chunking.ops.ssd import (
    CHUNK_SIZE,
    KERNEL_CHUNK_SIZE,
    _as_one_row,
    _ssd,
    _ssd_backward,
    why_no_kernels,
)


class Mamba2Sizes(NamedTuple):
    """What stands side by side in wide rows, and how to take it apart."""

    d_inner: int
    d_state: int
    heads: int

    def split(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Slices (..., d_inner), (..., d_inner + 2 d_state), (..., heads): gate, conv_in, raw."""
        d_inner, d_state, heads = self
        gate, conv_in, raw = torch.split(projected, [d_inner, d_inner + 2 * d_state, heads], dim=-1)
        return gate, conv_in, raw

    def split_conv(self, convolved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Slices (..., heads, head_dim), (..., d_state), (..., d_state): x, B, C."""
        d_inner, d_state, heads = self
        x, B, C = torch.split(convolved, [d_inner, d_state, d_state], dim=-1)
        return x.view(*x.shape[:-1], heads, d_inner // heads), B, C


class Mamba2Parameters(NamedTuple):
    """Those between the projections; shapes in the contract at the top of this file."""

    conv_weight: Tensor
    conv_bias: Tensor
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    norm_weight: Tensor

    @property
    def sizes(self) -> Mamba2Sizes:
        d_inner = len(self.norm_weight)
        return Mamba2Sizes(d_inner, (len(self.conv_bias) - d_inner) // 2, len(self.A_log))


def mamba2_inner(
    projected: Tensor,
    parameters: Mamba2Parameters,
    cu_seqlens: Tensor | None = None,
    *,
    out_weight: Tensor | None = None,
    eps: float = 1e-5,
    chunk_size: int = CHUNK_SIZE,
) -> Tensor:
    """The operation; the contract is at the top of this file.

    Args:
        projected: see the contract.
        parameters: see the contract.
        cu_seqlens: see the contract.
        out_weight: see the contract.
        eps: of the norm.
        chunk_size: As of `ssd`, a matter of speed only.

    Raises:
        ValueError: shapes or dtypes off the contract.
    """
    check_packed_or_padded("projected", projected, cu_seqlens)
    _check_parameters(parameters)
    d_inner, d_state, heads = parameters.sizes
    width = 2 * d_inner + 2 * d_state + heads
    if projected.shape[-1] != width:
        raise ValueError(f"projected must have {width} channels, got {projected.shape[-1]}")
    if out_weight is not None and (
        out_weight.shape[1:] != (d_inner,) or out_weight.dtype != projected.dtype
    ):
        raise ValueError(
            f"out_weight must be {projected.dtype} of shape (d_model, {d_inner}), "
            f"got {out_weight.dtype} of {tuple(out_weight.shape)}"
        )
    out: Tensor = _mamba2_inner(projected, *parameters, out_weight, eps, cu_seqlens, chunk_size)[0]
    return out


def mamba2_continued(
    projected: Tensor,
    parameters: Mamba2Parameters,
    conv: Tensor,
    state: Tensor,
    lens: Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> Tensor | None:
    """`mamba2_inner` of rows that go on, if there are kernels for them; else None. No gradients.

    projected:  (batch, length, ...); what stands at pads is not used
    conv:       (batch, d_inner + 2 d_state, taps - 1), dtype of projected: the last inputs of the
                convolution, oldest first; changes in place
    state:      (batch, heads, head_dim, d_state), float32, or rounded to bfloat16 or float16: S;
                changes in place
    lens:       int (batch,): positions of each row, on the left; None: all have `length`
    out:        (batch, length, d_inner); means nothing at pads
    """
    changed = conv.is_contiguous() and state.is_contiguous()
    if not changed or not _runs_on_triton(projected, parameters) or not uses_triton(state):
        return None
    from h_net_dynamic_chunking.ops._triton.mamba2 import mamba2_continued

    return mamba2_continued(projected, parameters, eps, conv, state, lens)


def _check_parameters(parameters: Mamba2Parameters) -> None:
    """Raise ValueError, with the name of the one to blame, unless they fit each other."""
    for name in ("conv_bias", "A_log", "norm_weight"):
        shape = getattr(parameters, name).shape
        if len(shape) != 1:
            raise ValueError(f"{name} must have one dimension, got {tuple(shape)}")
    d_inner, d_state, heads = parameters.sizes
    channels = len(parameters.conv_bias)
    if d_state < 1 or channels != d_inner + 2 * d_state:
        raise ValueError(f"conv_bias must have {d_inner} + 2 d_state entries, got {channels}")
    if heads < 1 or d_inner % heads:
        raise ValueError(f"A_log must have as many entries as divide {d_inner}, got {heads}")
    weight = tuple(parameters.conv_weight.shape)
    if len(weight) != 3 or weight[:2] != (channels, 1) or weight[2] < 1:
        raise ValueError(f"conv_weight must have shape ({channels}, 1, taps), got {weight}")
    for name in ("dt_bias", "D"):
        shape = getattr(parameters, name).shape
        if shape != (heads,):
            raise ValueError(f"{name} must have shape ({heads},), got {tuple(shape)}")


def _sizes_fit(parameters: Mamba2Parameters) -> bool:
    """All kernels."""
    d_inner, d_state, heads = parameters.sizes
    unfit = (
        why_no_conv_kernels(parameters.conv_weight.shape[2])
        or why_no_kernels(d_inner // heads, d_state)
        or why_no_norm_kernels(d_inner)
    )
    return unfit is None


def _runs_on_triton(projected: Tensor, parameters: Mamba2Parameters) -> bool:
    """Whether all kernels take these; if not, each of the parts chooses for itself."""
    return _sizes_fit(parameters) and uses_triton(projected)


class Mamba2Kept(NamedTuple):
    """Results of the forward pass that the backward pass reads."""

    y: Tensor
    """(..., d_inner), of the recurrence."""
    convolved: Tensor
    """(..., d_inner + 2 d_state)."""
    states: Tensor
    """(chunks, heads, d_state, head_dim), entering the chunks that the kernels make of all the
    positions; none of float32, whose chunks are short, so that there would be many."""


def _new_states(projected: Tensor, parameters: Mamba2Parameters) -> Tensor:
    """Unwritten ones to keep, of a shape that is the same on every backend and device."""
    d_inner, d_state, heads = parameters.sizes
    chunks = 0
    if projected.dtype in (torch.bfloat16, torch.float16) and _sizes_fit(parameters):
        positions = math.prod(projected.shape[:-1])
        chunks = (positions + KERNEL_CHUNK_SIZE - 1) // KERNEL_CHUNK_SIZE
    return projected.new_empty(chunks, heads, d_state, d_inner // heads)


@operation("mamba2_inner")
def _mamba2_inner(
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    out_weight: Tensor | None,
    eps: float,
    cu_seqlens: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The result, and what `Mamba2Kept` names."""
    parameters = Mamba2Parameters(conv_weight, conv_bias, dt_bias, A_log, D, norm_weight)
    out, kept = _normed_rows(projected, parameters, eps, cu_seqlens, chunk_size)
    return out if out_weight is None else F.linear(out, out_weight), *kept


@_mamba2_inner.register_fake
def _(
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    out_weight: Tensor | None,
    eps: float,
    cu_seqlens: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    parameters = Mamba2Parameters(conv_weight, conv_bias, dt_bias, A_log, D, norm_weight)
    d_inner, d_state, _ = parameters.sizes
    leading = projected.shape[:-1]
    out = projected.new_empty(*leading, d_inner if out_weight is None else len(out_weight))
    y = projected.new_empty(*leading, d_inner)
    convolved = projected.new_empty(*leading, d_inner + 2 * d_state)
    return out, y, convolved, _new_states(projected, parameters)


def _normed_rows(
    projected: Tensor,
    parameters: Mamba2Parameters,
    eps: float,
    cu_seqlens: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Mamba2Kept]:
    """What the product with out_weight is made of, and what is kept."""
    conv_weight, conv_bias, dt_bias, A_log, D, norm_weight = parameters
    if _runs_on_triton(projected, parameters):
        from h_net_dynamic_chunking.ops._triton.mamba2 import mamba2_fwd

        rows = len(projected) if cu_seqlens is None else None
        shape = *projected.shape[:-1], len(norm_weight)
        cu_seqlens = cu_seqlens_of_rows(projected) if cu_seqlens is None else cu_seqlens
        out, y, convolved, states = mamba2_fwd(
            flat_rows(projected), parameters, eps, cu_seqlens, rows
        )
        if projected.dtype == torch.float32:
            states = _new_states(projected, parameters)
        return out.view(shape), Mamba2Kept(y.view(shape), convolved.view(*shape[:-1], -1), states)
    gate, conv_in, raw = parameters.sizes.split(projected)
    convolved = _causal_conv(conv_in, conv_weight, conv_bias, cu_seqlens)
    x, B, C = parameters.sizes.split_conv(convolved)
    dt = F.softplus(_steps(raw, dt_bias, cu_seqlens))
    y = _ssd(x, dt, _decay_rates(A_log), B, C, D, cu_seqlens, chunk_size).flatten(-2)
    out = _gated_norm(y, gate, norm_weight, eps, cu_seqlens)
    states = _new_states(projected, parameters)
    with use_backend("auto"):
        back_on_kernels = _runs_on_triton(projected, parameters)
    if back_on_kernels and len(states):
        # So goes what torch.compile traced, whatever it went forward on.
        states.copy_(_entering_states(x, dt, _decay_rates(A_log), B, cu_seqlens))
    return out, Mamba2Kept(y, convolved, states)


@operation("mamba2_inner_backward")
def _mamba2_inner_backward(
    grad: Tensor,
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    out_weight: Tensor | None,
    eps: float,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    y: Tensor,
    convolved: Tensor,
    states: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of projected and of the parameters, in the order of the arguments; nothing for None."""
    parameters = Mamba2Parameters(conv_weight, conv_bias, dt_bias, A_log, D, norm_weight)
    if _runs_on_triton(projected, parameters):
        from h_net_dynamic_chunking.ops._triton.mamba2 import mamba2_bwd

        rows = len(projected) if cu_seqlens is None else None
        grad_projected = projected.new_empty(projected.shape)
        gradients = mamba2_bwd(
            flat_rows(grad).contiguous(),
            flat_rows(projected),
            parameters,
            eps,
            cu_seqlens_of_rows(projected) if cu_seqlens is None else cu_seqlens,
            rows,
            Mamba2Kept(y, convolved, states),
            flat_rows(grad_projected),
            out_weight,
        )
        return grad_projected, *gradients
    return _backward_by_parts(
        grad, projected, parameters, out_weight, eps, cu_seqlens, chunk_size, y, convolved
    )


@_mamba2_inner_backward.register_fake
def _(
    grad: Tensor,
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    out_weight: Tensor | None,
    eps: float,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    y: Tensor,
    convolved: Tensor,
    states: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    parameters = conv_weight, conv_bias, dt_bias, A_log, D, norm_weight
    a, b, c, d, e, f = (p.new_empty(p.shape) for p in parameters)
    g = projected.new_empty(0 if out_weight is None else out_weight.shape)
    return projected.new_empty(projected.shape), a, b, c, d, e, f, g


def _backward_by_parts(
    grad: Tensor,
    projected: Tensor,
    parameters: Mamba2Parameters,
    out_weight: Tensor | None,
    eps: float,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    y: Tensor,
    convolved: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    conv_weight, conv_bias, dt_bias, A_log, D, norm_weight = parameters
    gate, conv_in, raw = parameters.sizes.split(projected)
    grad_out_weight = grad.new_empty(0)
    if out_weight is not None:
        normed = _gated_norm(y, gate, norm_weight, eps, cu_seqlens)
        grad_out_weight = flat_rows(grad).t() @ flat_rows(normed)
        grad = grad @ out_weight
    grad_y, grad_gate, grad_norm = _gated_norm_backward(grad, y, gate, norm_weight, eps, cu_seqlens)
    x, B, C = parameters.sizes.split_conv(convolved)
    steps, A = _steps(raw, dt_bias, cu_seqlens), _decay_rates(A_log)
    grad_x, grad_dt, grad_A, grad_B, grad_C, grad_D = _ssd_backward(
        grad_y.view(x.shape), x, F.softplus(steps), A, B, C, D, cu_seqlens, chunk_size
    )
    grad_convolved = torch.cat([grad_x.flatten(-2), grad_B, grad_C], dim=-1)
    grad_conv_in, grad_weight, grad_bias = _causal_conv_backward(
        grad_convolved, conv_in, conv_weight, conv_bias, cu_seqlens
    )
    grad_steps = torch.ops.aten.softplus_backward(grad_dt, steps, 1, 20)
    grad_dt_bias = grad_steps.flatten(0, -2).sum(0)
    return (
        torch.cat([grad_gate, grad_conv_in, grad_steps.to(projected.dtype)], dim=-1),
        grad_weight,
        grad_bias,
        grad_dt_bias.to(dt_bias.dtype),
        (grad_A * A).to(A_log.dtype),
        grad_D,
        grad_norm,
        grad_out_weight,
    )


def _entering_states(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, cu_seqlens: Tensor | None
) -> Tensor:
    """`Mamba2Kept.states` on torch."""
    if cu_seqlens is None:
        cu_seqlens = cu_seqlens_of_rows(x)
        x, dt, B = (t.flatten(0, 1) for t in (x, dt, B))
    (x, dt, B), sequence = _as_one_row(cu_seqlens, x, dt, B)
    return ssd_torch.entering_states(x, dt, A, B, sequence, KERNEL_CHUNK_SIZE)[0]


def _steps(raw: Tensor, dt_bias: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """dt before the softplus, (..., heads), finite in the tail."""
    wide = accumulation_dtype(raw.dtype)
    if cu_seqlens is not None:
        raw = raw.where(in_some_sequence(cu_seqlens, len(raw))[:, None], 0)
    return raw.to(wide) + dt_bias.to(wide)


def _decay_rates(A_log: Tensor) -> Tensor:
    return -A_log.to(accumulation_dtype(A_log.dtype)).exp()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.eps, cu_seqlens, ctx.chunk_size = inputs
    ctx.backend = chosen_backend()
    ctx.save_for_backward(*tensors, cu_seqlens, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 11
    *tensors, cu_seqlens, y, convolved, states = ctx.saved_tensors
    with use_backend(ctx.backend):
        *gradients, grad_out_weight = _mamba2_inner_backward(
            grad, *tensors, ctx.eps, cu_seqlens, ctx.chunk_size, y, convolved, states
        )
    has_product = tensors[-1] is not None
    return *gradients, grad_out_weight if has_product else None, None, None, None


_mamba2_inner.register_autograd(_backward, setup_context=_setup_context)
_mamba2_inner_backward.refuse_autograd()
