"""The Mamba-2 recurrence in plain torch, by state-space duality (arXiv 2405.21060, section 6).

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T,      y_t = S_t C_t + D x_t,      for each head

Matrix products inside chunks, and a short recurrence over the states between them; the oracle is
`reference.ssd_sequential`.
"""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from h_net_dynamic_chunking.layers._checks import check_sizes
from h_net_dynamic_chunking.ops.packing import accumulation_dtype

# Forward and backward of `ssd_chunked` in ms of CPU time, float32, one thread of a busy AMD EPYC,
# torch 2.13, best of 5, chunks of 32 / 64 / 128. Short chunks waste less of the triangle, best for
# narrow heads; long ones carry fewer states, which tells at the d_state of 128 of the paper's code.
#     batch 8, length 1024, d_model  192, head_dim 32, d_state  64    147 / 156 / 323
#     batch 8, length  512, d_model  384, head_dim 64, d_state  64    121 / 140 / 161
#     batch 4, length  512, d_model 1024, head_dim 64, d_state 128    271 / 215 / 250
CHUNK_SIZE = 64


def ssd_chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    chunk_size: int = CHUNK_SIZE,
    sequence: Tensor | None = None,
) -> Tensor:
    """Run the recurrence at the top of this file over whole chunks at once.

    x:        (batch, length, heads, head_dim), float
    dt:       (batch, length, heads), >= 0
    A:        (heads,), < 0
    B, C:     (batch, length, d_state), dtype of x, shared by all heads
    D:        (heads,)
    sequence: (batch, length), int: which sequence each position belongs to, neighbours together;
              the state is zero at the start of each. None: every row is one sequence
    out:      (batch, length, heads, head_dim), dtype of x

    Decays are accumulated in float32 (float64 for float64 x) and the states are carried in it; the
    matrix products run in the dtype of x. Length may be 0, and need not be a multiple of the chunk.

    Raises:
        ValueError: shapes that do not fit together, or a chunk_size below 1.

    >>> x, dt, BC = torch.randn(2, 5, 4, 8), torch.rand(2, 5, 4), torch.randn(2, 5, 16)
    >>> ssd_chunked(x, dt, -torch.ones(4), BC, BC, torch.ones(4)).shape
    torch.Size([2, 5, 4, 8])
    """
    check_sizes(chunk_size=chunk_size)
    _check_ssd_shapes(x, dt, A, B, C, D, sequence)
    return _ssd(x, dt, A, B, C, D, chunk_size, sequence, None)[0]


def ssd_continued(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state: Tensor,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Tensor, Tensor]:
    """`ssd_chunked` of sequences that go on from `state`; return y and the state after them.

    state:  (batch, heads, head_dim, d_state), float32 or float64: S before the first position

    A position with dt = 0 leaves the state alone, so that pads on the right may have that.

    >>> x, dt, BC = torch.randn(2, 5, 4, 8), torch.rand(2, 5, 4), torch.randn(2, 5, 16)
    >>> A, D, state = -torch.ones(4), torch.ones(4), torch.zeros(2, 4, 8, 16)
    >>> y, state = ssd_continued(x, dt, A, BC, BC, D, state)
    >>> y.shape, state.shape
    (torch.Size([2, 5, 4, 8]), torch.Size([2, 4, 8, 16]))
    """
    check_sizes(chunk_size=chunk_size)
    _check_ssd_shapes(x, dt, A, B, C, D, None)
    wanted = (x.shape[0], *x.shape[2:], B.shape[-1])
    if state.shape != wanted:
        raise ValueError(f"state must have shape {wanted}, got {tuple(state.shape)}")
    y, state = _ssd(x, dt, A, B, C, D, chunk_size, None, rearrange(state, "b h p n -> b n h p"))
    return y, rearrange(state, "b n h p -> b h p n")


def _ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    chunk_size: int,
    sequence: Tensor | None,
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y, and the state after the last position; `state` (batch, d_state, heads, head_dim)."""
    length, heads = x.shape[1:3]
    dtype, wide = x.dtype, accumulation_dtype(x.dtype)

    # The tail of the last chunk has dt = 0: it neither writes to the state nor decays it.
    # A branch, not min(), which torch.compile would carry as a symbol through every shape.
    size = length if 0 < length < chunk_size else chunk_size
    dt = dt.to(wide)
    inputs = _split((x * dt[..., None]).to(dtype), size)  # (batch, chunks, size, heads, head_dim)
    B, C = _split(B, size), _split(C, size)
    # From the start of its chunk up to each position: (batch, chunks, heads, size), never rising.
    log_decay = _split(dt * A.to(wide), size).transpose(2, 3).cumsum(-1)
    if sequence is None:
        sequence = torch.zeros(1, length, dtype=torch.int64, device=x.device)
    sequence = _split(sequence, size)[:, :, None]  # (batch or 1, chunks, 1, size)

    # 1. Inside a chunk, position i reads position j <= i with weight C_i . B_j exp(decay).
    weights = (C @ B.mT)[:, :, None] * _pairwise_decay(log_decay, sequence)
    within = (weights.to(dtype) @ inputs.transpose(2, 3)).transpose(2, 3)

    # 2. What each chunk writes, decayed to its end, is carried on to the chunks after it. B and C
    # are common to the heads, so these lie side by side here and in 3: one wide product a chunk.
    ended = sequence != sequence[..., -1:]
    to_end = (log_decay[..., -1:] - log_decay).masked_fill(ended, -torch.inf).exp()
    to_end = to_end.transpose(2, 3)[..., None]
    written = B.mT @ (inputs * to_end).to(dtype).flatten(-2)  # (batch, chunks, d_state, h * p)
    written = rearrange(written, "b c n (h p) -> b c n h p", h=heads)
    # The state that enters a chunk belongs to the sequence in which the chunk before it ended.
    before = F.pad(sequence[:, :-1, :, -1:], (0, 0, 0, 0, 1, 0))
    from_start = log_decay.masked_fill(sequence != before, -torch.inf).exp()
    entering, state = _carry(written.to(wide), from_start[..., -1], state)

    # 3. Every position reads the state that its chunk was entered with.
    from_start = from_start.transpose(2, 3)[..., None]
    across = rearrange(C @ entering.to(dtype).flatten(-2), "b c q (h p) -> b c q h p", h=heads)

    y = (within + across * from_start).flatten(1, 2)[:, :length] + D.to(wide)[:, None] * x
    return y.to(dtype), state


def _split(tensor: Tensor, size: int) -> Tensor:
    """`(batch, length, ...)` -> `(batch, chunks, size, ...)`: at least one chunk, zeros behind."""
    chunks = max(1, -(-tensor.shape[1] // size))
    if pad := chunks * size - tensor.shape[1]:
        tensor = F.pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, pad))
    return rearrange(tensor, "b (c q) ... -> b c q ...", c=chunks)


def _pairwise_decay(log_decay: Tensor, sequence: Tensor) -> Tensor:
    """exp(log_decay_i - log_decay_j) where j <= i in the same sequence, else 0.

    log_decay:  (batch, chunks, heads, size)
    sequence:   (batch or 1, chunks, 1, size)
    out:        (batch, chunks, heads, size, size)

    Masked before the exponential, which therefore never sees a positive number.
    """
    same = sequence[..., :, None] == sequence[..., None, :]
    difference = log_decay[..., :, None] - log_decay[..., None, :]
    # In place: this is the largest tensor of the layer, and each further copy of it costs time.
    return difference.masked_fill_(~same.tril(), -torch.inf).exp_()


def _carry(written: Tensor, decay: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """State that each chunk is entered with, and the last one left.

    written, entered:  (batch, chunks, d_state, heads, head_dim)
    decay:             (batch, chunks, heads)
    state, left:       (batch, d_state, heads, head_dim); None for zeros
    """
    # A loop, not one product with a (chunks, chunks) matrix of decays: it stays linear in the
    # length, and `ssd_chunked` takes 6 to 18 % less time at the shapes at the top of this file.
    state = torch.zeros_like(written[:, 0]) if state is None else state.to(written.dtype)
    entering = []
    for chunk_written, chunk_decay in zip(written.unbind(1), decay.unbind(1), strict=True):
        entering.append(state)
        state = state * chunk_decay[:, None, :, None] + chunk_written
    return torch.stack(entering, dim=1), state


def _check_ssd_shapes(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    sequence: Tensor | None,
) -> None:
    if x.ndim != 4:
        raise ValueError(f"x must be (batch, length, heads, head_dim), got {tuple(x.shape)}")
    batch, length, heads, _ = x.shape
    wanted = {
        "dt": (dt, (batch, length, heads)),
        "A": (A, (heads,)),
        "B": (B, (batch, length, B.shape[-1])),
        "C": (C, (batch, length, B.shape[-1])),
        "D": (D, (heads,)),
    }
    if sequence is not None:
        wanted["sequence"] = (sequence, (batch, length))
    for name, (tensor, shape) in wanted.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
