"""Smoothing: an exponential moving average over chunks. Eq. (5) of the paper.

    s_k = P_k z_k + (1 - P_k) s_{k-1},        s before the first chunk of a sequence: `state`

Contract
    z:           (chunks, dim), float; packed
    p:           (chunks,), float: P_k, in [0, 1]
    cu_chunks:   (batch + 1,), int32 or int64
    state:       (batch, dim), float, or None for zeros
    out:         smoothed (chunks, dim) in z.dtype, and the next state (batch, dim)

Accumulates in float32 (float64 for float64). In the tail the result is undefined. From a row
that is not finite on, or a p that is not, the rest of its sequence is NaN (on Triton: its channel
is not finite, as far as the gates pass on more than a trace); no earlier row, no other sequence is
touched.

The recurrence runs in blocks: within a block it is a product with a small lower-triangular matrix
of decays, and the ends of the blocks obey the same recurrence, so the function calls itself. On 2
cores of an AMD EPYC (torch 2.13.0, float32), forward and backward take 7.6 ms for 1550 x 512, where
assoc-scan 0.0.6 takes 10.5 ms, and 0.29 s for 100,000 x 256 against 1.06 s (benchmarks/ema.py).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from h_net_dynamic_chunking.ops.backend import chosen_backend, use_backend, uses_triton
from h_net_dynamic_chunking.ops.packing import (
    accumulation_dtype,
    check_cu_seqlens,
    check_packed,
    check_same_length,
    dot_rows,
    fill_rows_,
    in_some_sequence,
    row_tiles,
    sequence_starts,
    zero_rows_,
)
from h_net_dynamic_chunking.ops.registration import operation

# Between 8 and 64 the time changes little; 16 was the best at 1550 x 512 and near it at 100k x 256.
_BLOCK = 16
# Up to this length one block is cheaper than one more level of recursion.
_ONE_BLOCK = 128


class Smoothed(NamedTuple):
    """What `ema_smooth` returns."""

    chunks: Tensor
    """(chunks, dim): the smoothed chunks."""
    state: Tensor
    """(batch, dim): the last smoothed chunk of each sequence; the state before, if it is empty."""


def ema_smooth(
    z: Tensor,
    p: Tensor,
    cu_chunks: Tensor,
    state: Tensor | None = None,
    *,
    weigh_input: bool = True,
) -> Smoothed:
    """Smooth the chunks of each sequence; the contract is at the top of this file.

    With `weigh_input=False` the new chunk enters as it is, `s_k = z_k + (1 - P_k) s_{k-1}`, for
    chunks that were multiplied by their probability before.

    Raises:
        ValueError: shapes or dtypes off the contract.

    >>> z, p = torch.tensor([[2.0], [4.0]]), torch.tensor([1.0, 0.5])
    >>> ema_smooth(z, p, torch.tensor([0, 2])).chunks.flatten()
    tensor([2., 3.])
    """
    check_packed("z", z, 2)
    check_packed("p", p, 1)
    check_same_length("p", p, "z", z)
    check_cu_seqlens(cu_chunks, "cu_chunks")
    batch = cu_chunks.shape[0] - 1
    if state is not None and state.shape != (batch, z.shape[1]):
        raise ValueError(f"state must have shape {(batch, z.shape[1])}, got {tuple(state.shape)}")
    smoothed: Tensor = _ema(z, p, cu_chunks, state, weigh_input)
    return Smoothed(smoothed, _last_rows(smoothed, cu_chunks.to(torch.int64), state))


def ema_smooth_step(z: Tensor, p: Tensor, state: Tensor, *, weigh_input: bool = True) -> Tensor:
    """One chunk of each row: `z`, `state` (batch, dim), `p` (batch,) -> the new state (batch, dim).

    The state comes back in float32 (float64 for float64), so that steps round no more than a scan.
    """
    dtype = accumulation_dtype(z.dtype)
    weight = p.to(dtype)[:, None]
    entering = z.to(dtype) * weight if weigh_input else z.to(dtype)
    return entering + (1 - weight) * state.to(dtype)


def _last_rows(smoothed: Tensor, cu_chunks: Tensor, state: Tensor | None) -> Tensor:
    if smoothed.shape[0] == 0:
        return (
            state
            if state is not None
            else smoothed.new_zeros(len(cu_chunks) - 1, smoothed.shape[1])
        )
    last = smoothed[(cu_chunks[1:] - 1).clamp(min=0)]
    empty = (cu_chunks[1:] == cu_chunks[:-1])[:, None]
    return torch.where(empty, 0.0 if state is None else state.to(last.dtype), last)


def _in_blocks(values: Tensor, scale: Tensor | None = None) -> Tensor:
    """(length, ...) -> (blocks, block, ...), times `scale` (length,), with zeros behind the end."""
    length = values.shape[0]
    block = _BLOCK if length > _ONE_BLOCK else length
    blocks = -(-length // block)
    padded = values.new_empty(blocks * block, *values.shape[1:])
    rows = padded[:length]
    for tile in row_tiles(values):
        rows[tile] = values[tile] if scale is None else values[tile] * scale[tile, None]
    padded[length:] = 0
    return padded.view(blocks, block, *values.shape[1:])


def _decays(gates: Tensor) -> Tensor:
    """(blocks, block, block): the share of x_j in h_k, which is gates_{j+1} * ... * gates_k."""
    # A running product rather than differences of logarithms, so that a gate of 0 is exact.
    step = torch.arange(gates.shape[1], device=gates.device)
    later = step[:, None] > step[None, :]
    running = torch.where(later, gates[:, :, None], 1.0).cumprod(1)
    return running.masked_fill_(later.T, 0.0)


def _add_carried(h: Tensor, share: Tensor, carried: Tensor) -> None:
    """h[b, k] += share[b, k] * carried[b], in place."""
    for tile in row_tiles(h.flatten(1)):
        h[tile].addcmul_(share[tile, :, None], carried[tile, None])


def _scan(x: Tensor, gates: Tensor) -> Tensor:
    """h_k = gates_k h_{k-1} + x_k from zero, for blocks x (blocks, block, dim) and their gates."""
    h = torch.bmm(_decays(gates), x)
    if len(x) > 1:
        through = gates.cumprod(1)
        ends = _scan(_in_blocks(h[:-1, -1]), _in_blocks(through[:-1, -1])).flatten(0, 1)
        _add_carried(h[1:], through[1:], ends)
    return h


def _scan_reversed(x: Tensor, gates: Tensor) -> Tensor:
    """u_k = x_k + gates_{k+1} u_{k+1} from zero at the end: the adjoint of `_scan`."""
    decays = _decays(gates)
    u = torch.bmm(decays.transpose(1, 2), x)
    if len(x) > 1:
        # How much of the first row of the next block reaches each row of this one.
        through = decays[:-1, -1] * gates[1:, :1]
        # Gate k takes start k to start k - 1; there is none before the first.
        into_block = torch.nn.functional.pad(through[1:, 0], (1, 0))
        starts = _scan_reversed(_in_blocks(u[1:, 0]), _in_blocks(into_block)).flatten(0, 1)
        _add_carried(u[:-1], through, starts)
    return u


def _gates(p: Tensor, cu_chunks: Tensor, dtype: torch.dtype) -> Tensor:
    """1 - p, with zeros at sequence starts, which cut the recurrence, and in the tail.

    And where p is not finite: products of gates would carry that over a start.
    """
    cut = sequence_starts(cu_chunks, len(p)) | ~in_some_sequence(cu_chunks, len(p)) | ~p.isfinite()
    return (1 - p.to(dtype)).masked_fill_(cut, 0.0)


def _take_out_non_finite(x: Tensor) -> Tensor:
    """Zero the rows of x that are not finite, in place; bool (rows,): which they were.

    The products below multiply every row of a block by every other, if only by zero, and zero times
    infinity is NaN.
    """
    bad: Tensor = ~torch.linalg.vector_norm(x, torch.inf, dim=-1).isfinite()
    zero_rows_(x, bad)
    return bad


def _spread(bad: Tensor, starts: Tensor) -> Tensor:
    """Bool (rows,): whether there is a bad row before, or here, in the same sequence."""
    step = torch.arange(len(bad), device=bad.device)
    last_bad = torch.where(bad, step, -1).cummax(0).values
    last_start = torch.where(starts, step, 0).cummax(0).values
    return last_bad >= last_start


def _spread_back(bad: Tensor, starts: Tensor) -> Tensor:
    """Bool (rows,): whether there is a bad row behind, or here, in the same sequence."""
    ends = torch.nn.functional.pad(starts[1:], (0, 1), value=True)
    return _spread(bad.flip(0), ends.flip(0)).flip(0)


def _first_chunks(cu_chunks: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """First chunk of each sequence, int64 (batch,), and whether it has one, bool (batch,)."""
    cu_chunks = cu_chunks.to(torch.int64)
    return cu_chunks[:-1].clamp(max=total - 1), cu_chunks[1:] > cu_chunks[:-1]


@operation("ema")
def _ema(
    z: Tensor, p: Tensor, cu_chunks: Tensor, state: Tensor | None, weigh_input: bool
) -> Tensor:
    if z.shape[0] == 0:
        return torch.empty_like(z)
    if uses_triton(z):
        return _ema_on_triton(z, p, cu_chunks, state, weigh_input)
    dtype = accumulation_dtype(z.dtype)
    p = p.to(dtype)
    x = _in_blocks(z.to(dtype), p if weigh_input else None)
    rows = x.flatten(0, 1)[: len(z)]
    zero_rows_(rows, ~in_some_sequence(cu_chunks, len(p)))
    if state is not None:
        first, has_one = _first_chunks(cu_chunks, len(z))
        entering = (1 - p[first, None]) * state.to(dtype)
        rows.index_add_(0, first, entering.where(has_one[:, None], 0.0))
    bad = _take_out_non_finite(rows) | ~p.isfinite()
    h = _scan(x, _in_blocks(_gates(p, cu_chunks, dtype))).flatten(0, 1)[: len(z)]
    h = h.to(z.dtype)
    fill_rows_(h, _spread(bad, sequence_starts(cu_chunks, len(z))), torch.nan)
    return h


@_ema.register_fake
def _(z: Tensor, p: Tensor, cu_chunks: Tensor, state: Tensor | None, weigh_input: bool) -> Tensor:
    return z.new_empty(z.shape)


@operation("ema_backward")
def _ema_backward(
    grad: Tensor,
    z: Tensor,
    p: Tensor,
    cu_chunks: Tensor,
    state: Tensor | None,
    smoothed: Tensor,
    weigh_input: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(z.dtype)
    grad_state = z.new_zeros(len(cu_chunks) - 1, z.shape[1])
    if z.shape[0] == 0:
        return torch.empty_like(z), torch.empty_like(p), grad_state
    if uses_triton(z):
        grad_z, grad_p = _ema_backward_on_triton(
            grad, z, p, cu_chunks, state, smoothed, weigh_input, grad_state
        )
        return grad_z, grad_p.to(p.dtype), grad_state
    dead = ~in_some_sequence(cu_chunks, len(p))
    weight = p.to(dtype).masked_fill(dead, 0.0)
    x = _in_blocks(grad.to(dtype))
    zero_rows_(x.flatten(0, 1)[: len(z)], dead)
    bad = _take_out_non_finite(x.flatten(0, 1)[: len(z)]) | ~weight.isfinite()
    starts = sequence_starts(cu_chunks, len(p))
    # u_k = dL/ds_k summed over every later chunk that s_k reaches.
    u = _scan_reversed(x, _in_blocks(_gates(weight, cu_chunks, dtype)))
    u = u.flatten(0, 1)[: len(z)]
    fill_rows_(u, _spread_back(bad, starts), torch.nan)
    # ds_k/dP_k = z_k - s_{k-1}, or - s_{k-1} where the input is not weighed.
    grad_p = dot_rows(u, z) if weigh_input else u.new_zeros(len(p))
    memory = dot_rows(u[1:], smoothed[:-1])
    grad_p[1:] -= memory.masked_fill_(starts[1:], 0.0)
    if state is not None:
        first, has_one = _first_chunks(cu_chunks, len(z))
        at_start = u[first].where(has_one[:, None], 0.0)
        grad_p.index_add_(0, first, -dot_rows(at_start, state))
        grad_state.copy_((1 - weight[first, None]) * at_start)
    if weigh_input:
        for tile in row_tiles(u):
            u[tile] *= weight[tile, None]
    return u.to(z.dtype), grad_p.masked_fill_(dead, 0.0).to(p.dtype), grad_state


@_ema_backward.register_fake
def _(
    grad: Tensor,
    z: Tensor,
    p: Tensor,
    cu_chunks: Tensor,
    state: Tensor | None,
    smoothed: Tensor,
    weigh_input: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return z.new_empty(z.shape), p.new_empty(p.shape), z.new_empty(len(cu_chunks) - 1, z.shape[1])


# The kernels smooth and expand at once; to smooth alone, every position is a chunk of its own. They
# know no state: it is added to the first chunk of each sequence, weighted.


def _every_position_a_chunk(cu_chunks: Tensor, chunks: int) -> tuple[Tensor, Tensor]:
    """Chunk of each position, int64 (chunks,), -1 in the tail; and the starts, bool (chunks,)."""
    live = in_some_sequence(cu_chunks, chunks)
    numbers = torch.arange(chunks, device=cu_chunks.device).where(live, -1)
    return numbers, sequence_starts(cu_chunks, chunks)


def _ema_on_triton(
    z: Tensor, p: Tensor, cu_chunks: Tensor, state: Tensor | None, weigh_input: bool
) -> Tensor:
    from h_net_dynamic_chunking.ops._triton.dechunk_forward import dechunk_fwd

    numbers, starts = _every_position_a_chunk(cu_chunks, len(z))
    dtype, p = z.dtype, p.float()
    if state is not None:
        z = z.float() * p[:, None] if weigh_input else z.to(torch.float32, copy=True)
        weigh_input = False
        first, has_one = _first_chunks(cu_chunks, len(z))
        entering = ((1 - p[first, None]) * state.float()).where(has_one[:, None], 0.0)
        # A sequence without chunks points at one of another: it adds zero, if in an order.
        z.index_put_((first,), entering, accumulate=True)
    smoothed, _ = dechunk_fwd(
        z,
        p,
        numbers,
        numbers,
        starts,
        None,
        None,
        dtype,
        weigh_input=weigh_input,
        clamp=None,
        keep_smoothed=False,
        short_memory=False,
    )
    return smoothed


def _ema_backward_on_triton(
    grad: Tensor,
    z: Tensor,
    p: Tensor,
    cu_chunks: Tensor,
    state: Tensor | None,
    smoothed: Tensor,
    weigh_input: bool,
    grad_state: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of z and p; that of the state is written to `grad_state`."""
    from h_net_dynamic_chunking.ops._triton.dechunk_backward import dechunk_bwd

    numbers, starts = _every_position_a_chunk(cu_chunks, len(z))

    def run(z: Tensor, weigh_input: bool) -> tuple[Tensor, Tensor]:
        return dechunk_bwd(
            grad,
            z,
            smoothed,
            p,
            numbers,
            starts,
            cu_chunks,
            weigh_input=weigh_input,
            clamp=None,
            straight_through=False,
            short_memory=False,
        )

    if state is None:
        return run(z, weigh_input)
    # The kernel's gradient of chunks that are not weighed is u, in full precision.
    u, grad_p = run(z.float(), False)
    first, has_one = _first_chunks(cu_chunks, len(z))
    at_start = u[first].where(has_one[:, None], 0.0)
    grad_p.index_put_((first,), -dot_rows(at_start, state), accumulate=True)
    weight = p.float()[:, None]
    grad_state.copy_((1 - weight[first]) * at_start)
    if not weigh_input:
        return u.to(z.dtype), grad_p
    dead = numbers < 0
    grad_p += dot_rows(u, z).masked_fill(dead, 0.0)
    return (u * weight).masked_fill(dead[:, None], 0.0).to(z.dtype), grad_p


def _setup_context(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None, bool], output: Tensor
) -> None:
    z, p, cu_chunks, state, ctx.weigh_input = inputs
    ctx.backend = chosen_backend()
    ctx.save_for_backward(z, p, cu_chunks, state, output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, Tensor | None, None]:
    z, p, cu_chunks, state, smoothed = ctx.saved_tensors
    with use_backend(ctx.backend):
        grad_z, grad_p, grad_state = _ema_backward(
            grad, z, p, cu_chunks, state, smoothed, ctx.weigh_input
        )
    return grad_z, grad_p, None, None if state is None else grad_state.to(state.dtype), None


_ema.register_autograd(_backward, setup_context=_setup_context)
_ema_backward.refuse_autograd()
