"""The recurrence of Mamba-2 (arXiv 2405.21060), a linear state space whose decay depends on input.

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T,      y_t = S_t C_t + D x_t,      for each head

Contract
    x:           (total, heads, head_dim), float; packed; or (batch, length, heads, head_dim)
    dt:          (total, heads), float, >= 0; or (batch, length, heads)
    A, D:        (heads,), float; A < 0
    B, C:        (total, d_state), dtype of x, shared by all heads; or (batch, length, d_state)
    cu_seqlens:  (batch + 1,), int32 or int64; None for the second forms, where every row is one
                 sequence
    out:         shape and dtype of x

S, (head_dim, d_state), is zero at the start of each sequence. The tail behind the last sequence may
hold anything: it comes out as zeros and gets no gradient. Decays are accumulated in float32
(float64 for float64 x) and states are carried in it; matrix products run in the dtype of x. x, B
and C may be slices of one wider buffer. The kernels take what `why_no_kernels` lets through.
"""

from typing import Any

from torch import Tensor

from h_net_dynamic_chunking.ops import ssd_torch
from h_net_dynamic_chunking.ops.backend import chosen_backend, use_backend, uses_triton
from h_net_dynamic_chunking.ops.packing import (
    accumulation_dtype,
    check_cu_seqlens,
    in_some_sequence,
    sequence_of_position,
)
from h_net_dynamic_chunking.ops.registration import operation

# Forward and backward of the torch path in ms of CPU time, float32, one thread of a busy AMD EPYC,
# torch 2.13, best of 5, chunks of 32 / 64 / 128. Short chunks waste less of the triangle, best for
# narrow heads; long ones carry fewer states, which tells at the d_state of 128 of the paper's code.
#     batch 8, length 1024, d_model  192, head_dim 32, d_state  64    147 / 156 / 323
#     batch 8, length  512, d_model  384, head_dim 64, d_state  64    121 / 140 / 161
#     batch 4, length  512, d_model 1024, head_dim 64, d_state 128    271 / 215 / 250
CHUNK_SIZE = 64
# Of the kernels in half precision.
KERNEL_CHUNK_SIZE = 128


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    chunk_size: int = CHUNK_SIZE,
) -> Tensor:
    """Run the recurrence over whole chunks at once; the contract is at the top of this file.

    Args:
        x: see the contract.
        dt: see the contract.
        A: see the contract.
        B: see the contract.
        C: see the contract.
        D: see the contract.
        cu_seqlens: see the contract.
        chunk_size: Positions that the torch path handles by one matrix product. It is a matter of
            speed only.

    Raises:
        ValueError: shapes or dtypes off the contract, or a chunk_size below 1.

    >>> import torch
    >>> x, dt, BC = torch.randn(2, 5, 4, 8), torch.rand(2, 5, 4), torch.randn(2, 5, 16)
    >>> ssd(x, dt, -torch.ones(4), BC, BC, torch.ones(4)).shape
    torch.Size([2, 5, 4, 8])
    """
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens)
    _check(x, dt, A, B, C, D, 4 if cu_seqlens is None else 3, chunk_size)
    y: Tensor = _ssd(x, dt, A, B, C, D, cu_seqlens, chunk_size)
    return y


def ssd_continued(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state: Tensor,
    *,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Tensor, Tensor]:
    """`ssd` of rows that go on from `state`; return y and the state after them. No gradients.

    state:  (batch, heads, head_dim, d_state), float: S before the first position; after the last it
            is float32, or float64 for float64 x

    A position with dt = 0 leaves the state alone, so that pads on the right may have that.

    Raises:
        ValueError: shapes or dtypes off the contract, or a chunk_size below 1.

    >>> import torch
    >>> x, dt, BC = torch.randn(2, 5, 4, 8), torch.rand(2, 5, 4), torch.randn(2, 5, 16)
    >>> A, D, state = -torch.ones(4), torch.ones(4), torch.zeros(2, 4, 8, 16)
    >>> y, state = ssd_continued(x, dt, A, BC, BC, D, state)
    >>> y.shape, state.shape
    (torch.Size([2, 5, 4, 8]), torch.Size([2, 4, 8, 16]))
    """
    _check(x, dt, A, B, C, D, 4, chunk_size)
    wanted = (x.shape[0], *x.shape[2:], B.shape[-1])
    if state.shape != wanted:
        raise ValueError(f"state must have shape {wanted}, got {tuple(state.shape)}")
    y, state = _ssd_continued(x, dt, A, B, C, D, state, chunk_size)
    return y, state


def why_no_kernels(head_dim: int, d_state: int) -> str | None:
    """Why the kernels do not take such sizes, or None if they do.

    They hold a state in registers, and tiles of it are sides of products.

    >>> why_no_kernels(24, 128)
    'the kernels take a head_dim and d_state that are powers of 2 from 16 to 128, not 24 and 128'
    """
    if all(size in (16, 32, 64, 128) for size in (head_dim, d_state)):
        if head_dim * d_state <= 64 * 128:
            return None
        return f"the kernels take states of up to 64 x 128 for a head, not {head_dim} x {d_state}"
    return (
        "the kernels take a head_dim and d_state that are powers of 2 from 16 to 128, "
        f"not {head_dim} and {d_state}"
    )


def _runs_on_triton(x: Tensor, dt: Tensor, B: Tensor) -> bool:
    return uses_triton(x, unfit=why_no_kernels(x.shape[-1], B.shape[-1])) and uses_triton(dt)


def _flat(packed: bool, *tensors: Tensor) -> list[Tensor]:
    """What the launchers take: one leading dimension, of any stride, and the rest contiguous."""
    flat = [t if packed else t.flatten(0, 1) for t in tensors]
    return [t if t.stride(0) and t[0].is_contiguous() else t.contiguous() for t in flat]


def _as_one_row(cu_seqlens: Tensor, x: Tensor, *others: Tensor) -> tuple[list[Tensor], Tensor]:
    """Packed tensors as one row with zeros in the tail, and the sequence of each position."""
    total = x.shape[0]
    live = in_some_sequence(cu_seqlens, total)
    sequence = sequence_of_position(cu_seqlens, total)[None]
    return [t.where(live.view(-1, *[1] * (t.ndim - 1)), 0)[None] for t in (x, *others)], sequence


@operation("ssd")
def _ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    cu_seqlens: Tensor | None,
    chunk_size: int,
) -> Tensor:
    if _runs_on_triton(x, dt, B):
        from h_net_dynamic_chunking.ops._triton.ssd_forward import ssd_fwd

        packed, shape = cu_seqlens is not None, x.shape
        rows = 1 if packed else shape[0]
        x, dt, B, C = _flat(packed, x, dt, B, C)
        y, _ = ssd_fwd(x, dt, A.contiguous(), B, C, D.contiguous(), cu_seqlens, rows)
        return y.view(shape)
    if cu_seqlens is None:
        return ssd_torch.ssd_forward(x, dt, A, B, C, D, None, None, chunk_size)[0]
    (x, dt, B, C), sequence = _as_one_row(cu_seqlens, x, dt, B, C)
    return ssd_torch.ssd_forward(x, dt, A, B, C, D, sequence, None, chunk_size)[0][0]


@_ssd.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    cu_seqlens: Tensor | None,
    chunk_size: int,
) -> Tensor:
    return x.new_empty(x.shape)


@operation("ssd_backward")
def _ssd_backward(
    grad: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    cu_seqlens: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    if _runs_on_triton(x, dt, B):
        return _ssd_backward_triton(grad, x, dt, A, B, C, D, cu_seqlens)
    if cu_seqlens is None:
        return ssd_torch.ssd_backward(grad, x, dt, A, B, C, D, None, chunk_size)
    (grad, x, dt, B, C), sequence = _as_one_row(cu_seqlens, grad, x, dt, B, C)
    results = ssd_torch.ssd_backward(grad, x, dt, A, B, C, D, sequence, chunk_size)
    grad_x, grad_dt, grad_A, grad_B, grad_C, grad_D = results
    return grad_x[0], grad_dt[0], grad_A, grad_B[0], grad_C[0], grad_D


def _ssd_backward_triton(
    grad: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from h_net_dynamic_chunking.ops._triton.ssd_backward import ssd_bwd

    packed = cu_seqlens is not None
    rows = 1 if packed else x.shape[0]
    results = [t.new_empty(t.shape) for t in (x, dt, B, C)]
    grad, x, dt, B, C = _flat(packed, grad, x, dt, B, C)
    to = dict(zip(("grad_x", "grad_dt", "grad_B", "grad_C"), _flat(packed, *results), strict=True))
    A, D = A.contiguous(), D.contiguous()
    grad_A, grad_D = ssd_bwd(grad, x, dt, A, B, C, D, cu_seqlens, None, rows, **to)
    grad_x, grad_dt, grad_B, grad_C = results
    return grad_x, grad_dt, grad_A.to(A.dtype), grad_B, grad_C, grad_D.to(D.dtype)


@_ssd_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    cu_seqlens: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    gx, gdt, gA, gB, gC, gD = (t.new_empty(t.shape) for t in (x, dt, A, B, C, D))
    return gx, gdt, gA, gB, gC, gD


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.chunk_size = inputs
    ctx.backend = chosen_backend()
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    with use_backend(ctx.backend):
        return *_ssd_backward(grad, *ctx.saved_tensors, ctx.chunk_size), None, None


_ssd.register_autograd(_backward, setup_context=_setup_context)
_ssd_backward.refuse_autograd()


@operation("ssd_continued")
def _ssd_continued(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    if _runs_on_triton(x, dt, B) and uses_triton(state):
        from h_net_dynamic_chunking.ops._triton.ssd_forward import ssd_fwd

        before, shape = state.float().contiguous(), x.shape
        after = before.new_empty(before.shape)
        x, dt, B, C = _flat(False, x, dt, B, C)
        A, D = A.contiguous(), D.contiguous()
        y, _ = ssd_fwd(x, dt, A, B, C, D, None, shape[0], initial=before, final=after)
        return y.view(shape), after
    before = state.permute(0, 3, 1, 2)
    y, after = ssd_torch.ssd_forward(x, dt, A, B, C, D, None, before, chunk_size)
    return y, after.permute(0, 2, 3, 1).contiguous()


@_ssd_continued.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    wide = accumulation_dtype(x.dtype)
    return x.new_empty(x.shape), state.new_empty(state.shape, dtype=wide)


_ssd_continued.refuse_autograd()


def _check(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, ndim: int, chunk_size: int
) -> None:
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size must be an integer of at least 1, got {chunk_size!r}")
    if x.ndim != ndim:
        wanted = "(batch, length, heads, head_dim)" if ndim == 4 else "(total, heads, head_dim)"
        raise ValueError(f"x must be {wanted}, got {tuple(x.shape)}")
    *positions, heads, _ = x.shape
    # Of no dimensions B is off its shape, whatever that is.
    d_state = B.shape[-1] if B.ndim else 1
    shapes = {
        "dt": (dt, (*positions, heads)),
        "A": (A, (heads,)),
        "B": (B, (*positions, d_state)),
        "C": (C, (*positions, d_state)),
        "D": (D, (heads,)),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    for name, tensor in (("x", x), ("dt", dt), ("A", A), ("D", D)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating-point, got {tensor.dtype}")
    for name, tensor in (("B", B), ("C", C)):
        if tensor.dtype != x.dtype:
            raise ValueError(f"{name} must be {x.dtype}, as x is, got {tensor.dtype}")
