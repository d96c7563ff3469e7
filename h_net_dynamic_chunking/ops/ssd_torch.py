"""The recurrence of `ops.ssd` in plain torch, by state-space duality (arXiv 2405.21060, section 6).

Matrix products inside chunks, and a short recurrence over the states between them, forward and
backward. Everything is split into (batch, chunks, size, ...), of which u = dt x; the gradients are
those at the top of `_triton.ssd_backward`.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from h_net_dynamic_chunking.ops.packing import accumulation_dtype


class _Chunks(NamedTuple):
    u: Tensor
    """(batch, chunks, size, heads, head_dim), dtype of x."""
    dt: Tensor
    """(batch, chunks, heads, size), float32 or float64, like every decay."""
    B: Tensor
    C: Tensor
    """(batch, chunks, size, d_state)."""
    products: Tensor
    """(batch, chunks, 1, size, size): C_i . B_j."""
    pairs: Tensor
    """(batch, chunks, heads, size, size): decay from j to i, 0 where i does not see j."""
    to_end: Tensor
    """(batch, chunks, size, heads, 1): decay to the end of the chunk; 0 in sequences that end."""
    from_start: Tensor
    """(batch, chunks, size, heads, 1): from the start; 0 in sequences that start in the chunk."""

    @property
    def through(self) -> Tensor:
        """(batch, chunks, heads): what passes the chunk."""
        return self.from_start[:, :, -1, :, 0]


def ssd_forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    sequence: Tensor | None,
    state: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """y, and the state (batch, d_state, heads, head_dim) after the last position.

    sequence:  int (batch, length): which sequence each position belongs to, neighbours together;
               None: each row is one
    state:     before the first position; None for zeros
    """
    c = _divide(x, dt, A, B, C, sequence, chunk_size)
    written = (c.u * c.to_end).to(x.dtype).flatten(-2)
    entering, state = _entering(c, written, state)
    weights = (c.products * c.pairs).to(x.dtype)
    within = (weights @ c.u.transpose(2, 3)).transpose(2, 3)
    # Every position reads the state that its chunk was entered with.
    across = _heads(c.C @ entering.flatten(-2), x.shape[2])
    y = _join(within + across * c.from_start, x.shape[1]) + D.to(c.dt.dtype)[:, None] * x
    return y.to(x.dtype).contiguous(), state


def entering_states(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, sequence: Tensor | None, chunk_size: int
) -> Tensor:
    """What each chunk is entered with: (batch, chunks, heads, d_state, head_dim), dtype of x."""
    c = _divide(x, dt, A, B, B, sequence, chunk_size)
    written = (c.u * c.to_end).to(x.dtype).flatten(-2)
    return _entering(c, written, None)[0].transpose(2, 3)


def ssd_backward(
    grad: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    sequence: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C and D, where no state was given."""
    # In place wherever it can be: fresh pages cost a CPU more than the arithmetic on them.
    c = _divide(x, dt, A, B, C, sequence, chunk_size)
    dtype, wide, length, heads = x.dtype, c.dt.dtype, x.shape[1], x.shape[2]
    g = _split(grad, c.u.shape[2])
    read = (g * c.from_start).to(dtype).flatten(-2)
    written = (c.u * c.to_end).to(dtype).flatten(-2)
    S, G = _entering(c, written, None)[0].flatten(-2), _leaving_gradient(c, read).flatten(-2)

    # Pairs (i, j) within a chunk; `log`, in the end, is the gradient of the log of a pair's decay.
    by_head, u = g.transpose(2, 3), c.u.transpose(2, 3)
    weights = (c.products * c.pairs).to(dtype)
    grad_u = (weights.mT @ by_head).transpose(2, 3)
    log = c.pairs.mul_(by_head @ u.mT)
    products = log.sum(2).to(dtype)
    log *= c.products
    # No decay stands between a position and itself; without these the two sums below cancel less.
    log.diagonal(dim1=-2, dim2=-1).zero_()
    # By where the pairs end or begin; then those that do so before or behind the chunk, or both.
    grad_log = log.sum(-1) - log.sum(-2)
    grad_log += _sums((c.C @ S).mul_(read), heads, wide).transpose(2, 3)
    from_behind = c.B @ G
    grad_u = torch.addcmul(grad_u.to(wide), _heads(from_behind, heads), c.to_end)
    leaving = _sums(from_behind.mul_(written), heads, wide).transpose(2, 3)
    grad_B = products.mT @ c.C + written @ G.mT
    grad_C = products @ c.B + read @ S.mT
    both = c.through * _sums(G.mul_(S), heads, wide).sum(2)
    # The decay of a position stands between the pairs that begin before it and end at it or behind.
    grad_log = grad_log.flip(-1).cumsum(-1).flip(-1)
    grad_log += leaving.cumsum(-1) - leaving + both[..., None]

    grad_u = _join(grad_u, length)
    grad_x = (D.to(wide)[:, None] * grad).addcmul_(grad_u, dt.to(wide)[..., None])
    grad_dt = grad_u.mul_(x).sum(-1) + A.to(wide) * _join(grad_log.transpose(2, 3), length)
    grad_A = (c.dt * grad_log).sum((0, 1, 3))
    grad_D = (x.to(wide) * grad).sum((0, 1, 3))
    results = grad_x, grad_dt, grad_A, _join(grad_B, length), _join(grad_C, length), grad_D
    gx, gdt, gA, gB, gC, gD = (
        result.to(of.dtype).contiguous()
        for result, of in zip(results, (x, dt, A, B, C, D), strict=True)
    )
    return gx, gdt, gA, gB, gC, gD


def _divide(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, sequence: Tensor | None, chunk_size: int
) -> _Chunks:
    # The tail of the last chunk has dt = 0: it neither writes to the state nor decays it.
    length = x.shape[1]
    size = length if 0 < length < chunk_size else chunk_size
    wide = accumulation_dtype(x.dtype)
    dt = dt.to(wide)
    u = _split((x * dt[..., None]).to(x.dtype), size)
    B, C, dt = _split(B, size), _split(C, size), _split(dt, size).transpose(2, 3)
    # From the start of its chunk up to each position, never rising.
    log = (dt * A.to(wide)[:, None]).cumsum(-1)
    if sequence is None:
        sequence = torch.zeros(1, length, dtype=torch.int64, device=x.device)
    sequence = _split(sequence, size)[:, :, None]  # (batch or 1, chunks, 1, size)
    ends = sequence != sequence[..., -1:]
    # The state that enters a chunk belongs to the sequence in which the chunk before it ended.
    before = F.pad(sequence[:, :-1, :, -1:], (0, 0, 0, 0, 1, 0))
    return _Chunks(
        u,
        dt,
        B,
        C,
        (C @ B.mT)[:, :, None],
        _pairwise_decay(log, sequence),
        (log[..., -1:] - log).masked_fill(ends, -torch.inf).exp().transpose(2, 3)[..., None],
        log.masked_fill(sequence != before, -torch.inf).exp().transpose(2, 3)[..., None],
    )


def _pairwise_decay(log: Tensor, sequence: Tensor) -> Tensor:
    """exp(log_i - log_j) where j <= i in the same sequence, else 0.

    Masked before the exponential, which therefore never sees a positive number.
    """
    same = sequence[..., :, None] == sequence[..., None, :]
    difference = log[..., :, None] - log[..., None, :]
    # In place: this is the largest tensor of all, and each further copy of it costs time.
    return difference.masked_fill_(~same.tril(), -torch.inf).exp_()


def _entering(c: _Chunks, written: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """State that each chunk is entered with, in the dtype of u, and the last one left.

    written:  (batch, chunks, size, heads * head_dim), u decayed to the end of the chunk
    """
    # B and C are common to the heads, so these lie side by side: one wide product a chunk.
    added = _heads(c.B.mT @ written, c.u.shape[3])
    return _carry(added, c.through, state, range(added.shape[1]))


def _leaving_gradient(c: _Chunks, read: Tensor) -> Tensor:
    """Gradient of the state that each chunk is left with, in the dtype of u: the walk back."""
    added = _heads(c.C.mT @ read, c.u.shape[3])
    return _carry(added, c.through, None, reversed(range(added.shape[1])))[0]


def _carry(
    added: Tensor, through: Tensor, state: Tensor | None, order: Iterable[int]
) -> tuple[Tensor, Tensor]:
    """What each chunk finds when all are walked through, and what the last one leaves.

    added, found:  (batch, chunks, d_state, heads, head_dim)
    through:       (batch, chunks, heads)
    state, left:   (batch, d_state, heads, head_dim), dtype of `through`; None for zeros
    """
    # A loop, not one product with a (chunks, chunks) matrix of decays: it stays linear in the
    # length, and at the shapes of `ops.ssd` the recurrence takes 6 to 18 % less time.
    wide = through.dtype
    state = torch.zeros_like(added[:, 0], dtype=wide) if state is None else state.to(wide)
    found = torch.empty_like(added)
    for i in order:
        found[:, i] = state
        state = torch.addcmul(added[:, i].to(wide), state, through[:, i, None, :, None])
    return found, state


def _split(tensor: Tensor, size: int) -> Tensor:
    """`(batch, length, ...)` -> `(batch, chunks, size, ...)`: at least one chunk, zeros behind."""
    chunks = max(1, -(-tensor.shape[1] // size))
    if pad := chunks * size - tensor.shape[1]:
        tensor = F.pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, pad))
    return rearrange(tensor, "b (c q) ... -> b c q ...", c=chunks)


def _join(tensor: Tensor, length: int) -> Tensor:
    """The way back from `_split`."""
    return tensor.flatten(1, 2)[:, :length]


def _heads(tensor: Tensor, heads: int) -> Tensor:
    return tensor.view(*tensor.shape[:-1], heads, tensor.shape[-1] // heads)


def _sums(tensor: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """Over each head: (..., heads * head_dim) -> (..., heads)."""
    return _heads(tensor, heads).sum(-1, dtype=dtype)
