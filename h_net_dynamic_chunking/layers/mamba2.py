"""Mamba-2 mixer in plain torch, for any device and length: the paper's layer M without its MLP.

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T,      y_t = S_t C_t + D x_t,      for each head

`ssd_chunked` computes this with matrix products inside chunks and a short recurrence over the
states between them (state-space duality, arXiv 2405.21060, section 6); its oracle is
`reference.ssd_sequential`. `Mamba2.step` is the same layer one position at a time. Parameters are
named as in the official H-Net checkpoints.
"""

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from h_net_dynamic_chunking.layers._checks import (
    check_cache_tensor,
    check_input,
    check_sizes,
    check_step_input,
)
from h_net_dynamic_chunking.layers._packed import zero_tail
from h_net_dynamic_chunking.layers.norm import RMSNorm
from h_net_dynamic_chunking.ops.packing import accumulation_dtype, sequence_of_position

# Forward and backward of `ssd_chunked` in ms of CPU time, float32, one thread of a busy AMD EPYC,
# torch 2.13, best of 5, chunks of 32 / 64 / 128. Short chunks waste less of the triangle, best for
# narrow heads; long ones carry fewer states, which tells at the d_state of 128 of the paper's code.
#     batch 8, length 1024, d_model  192, head_dim 32, d_state  64    147 / 156 / 323
#     batch 8, length  512, d_model  384, head_dim 64, d_state  64    121 / 140 / 161
#     batch 4, length  512, d_model 1024, head_dim 64, d_state 128    271 / 215 / 250
_CHUNK_SIZE = 64


def ssd_chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    chunk_size: int = _CHUNK_SIZE,
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
    entering = _carry(written.to(wide), from_start[..., -1])

    # 3. Every position reads the state that its chunk was entered with.
    from_start = from_start.transpose(2, 3)[..., None]
    across = rearrange(C @ entering.to(dtype).flatten(-2), "b c q (h p) -> b c q h p", h=heads)

    y = (within + across * from_start).flatten(1, 2)[:, :length] + D.to(wide)[:, None] * x
    return y.to(dtype)


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


def _carry(written: Tensor, decay: Tensor) -> Tensor:
    """State that each chunk is entered with, from what each writes and how far it decays.

    written, out:  (batch, chunks, d_state, heads, head_dim)
    decay:         (batch, chunks, heads)
    """
    # A loop, not one product with a (chunks, chunks) matrix of decays: it stays linear in the
    # length, and `ssd_chunked` takes 6 to 18 % less time at the shapes at the top of this file.
    state = torch.zeros_like(written[:, 0])
    entering = []
    for chunk_written, chunk_decay in zip(written.unbind(1), decay.unbind(1), strict=True):
        entering.append(state)
        state = state * chunk_decay[:, None, :, None] + chunk_written
    return torch.stack(entering, dim=1)


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


@dataclass
class MambaCache:
    """What the positions so far leave to the next one."""

    conv: Tensor
    """(batch, channels, d_conv - 1): the last inputs of the convolution, oldest first."""
    state: Tensor
    """(batch, heads, head_dim, d_state), float32 or float64: S_t."""

    def check(self, batch_size: int, dtype: torch.dtype) -> None:
        """Raise ValueError unless the cache fits `batch_size` rows of `dtype`."""
        check_cache_tensor(self.conv, batch_size, dtype)


class Mamba2(nn.Module):
    """Mix positions with a causal short convolution and a gated state-space recurrence.

    x:           (batch, length, d_model), float; with cu_seqlens packed, (total, d_model)
    cu_seqlens:  (batch + 1,), int32 or int64: cumulative lengths of packed sequences. Rows from
                 cu_seqlens[-1] on may hold anything and come out as zeros
    out:         shape of x, dtype of `out_proj`'s result

    Args:
        d_model: width of the input.
        d_state: size of the state for each channel.
        d_conv: taps of the depthwise convolution before the recurrence.
        expand: inner width as a multiple of d_model.
        head_dim: channels that share one decay; must divide expand * d_model.
        chunk_size: positions handled by one matrix product; changes speed, not values.

    Raises:
        ValueError: a size below 1, a head_dim that does not divide, an input of another shape, a
            cache of another batch size or dtype.

    Layer equations, and the initialisation, are those of the official H-Net code and its Mamba-2.

    >>> mixer = Mamba2(64, d_state=16, head_dim=32)
    >>> mixer(torch.randn(2, 10, 64)).shape
    torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 128,
        d_conv: int = 4,
        expand: int = 2,
        head_dim: int = 64,
        chunk_size: int = _CHUNK_SIZE,
    ) -> None:
        check_sizes(
            d_model=d_model,
            d_state=d_state,
            d_conv=d_conv,
            expand=expand,
            head_dim=head_dim,
            chunk_size=chunk_size,
        )
        d_inner = expand * d_model
        if d_inner % head_dim:
            raise ValueError(f"head_dim must divide expand * d_model = {d_inner}, got {head_dim}")
        super().__init__()
        self.d_model, self.d_state, self.d_conv = d_model, d_state, d_conv
        self.d_inner, self.head_dim, self.chunk_size = d_inner, head_dim, chunk_size
        self.num_heads = d_inner // head_dim

        d_conv_in = d_inner + 2 * d_state
        self.in_proj = nn.Linear(d_model, d_inner + d_conv_in + self.num_heads, bias=False)
        self.conv1d = nn.Conv1d(d_conv_in, d_conv_in, d_conv, groups=d_conv_in)
        self.dt_bias = nn.Parameter(_initial_dt_bias(self.num_heads))
        self.A_log = nn.Parameter(torch.empty(self.num_heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(self.num_heads))
        self.norm = RMSNorm(d_inner)
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        check_input(x, self.d_model, cu_seqlens)
        if cu_seqlens is None:
            return self._mix(x)
        return self._mix(zero_tail(x, cu_seqlens)[None], cu_seqlens)[0]

    def _mix(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """`(batch, length, d_model)` -> the same; packed sequences are one row."""
        gate, conv_in, dt = self._project(x)
        sequence = None
        if cu_seqlens is None:
            conv_out = self._causal_conv(conv_in)
        else:
            sequence = sequence_of_position(cu_seqlens, x.shape[1])
            conv_out = self._packed_conv(conv_in, sequence, cu_seqlens.shape[0])
            sequence = sequence[None]
        values, B, C = self._split_conv(conv_out)
        y = ssd_chunked(values, dt, self._A(), B, C, self.D, self.chunk_size, sequence)
        return self._gated(y, gate)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> MambaCache:
        """A cache for `step` before the first position. `max_seqlen` changes nothing here.

        `dtype` is that of the x to come; the weights' if None.
        """
        check_sizes(batch_size=batch_size, max_seqlen=max_seqlen)
        weight = self.in_proj.weight
        dtype = dtype or weight.dtype
        state_shape = (batch_size, self.num_heads, self.head_dim, self.d_state)
        return MambaCache(
            conv=weight.new_zeros(
                batch_size, self.conv1d.in_channels, self.d_conv - 1, dtype=dtype
            ),
            state=weight.new_zeros(state_shape, dtype=accumulation_dtype(dtype)),
        )

    @torch.no_grad()
    def step(self, x: Tensor, cache: MambaCache) -> Tensor:
        """The next position of every row; updates `cache` in place. No gradients.

        x, out:  (batch, d_model)

        Raises:
            ValueError: x of another shape, a cache of another batch size or dtype.
        """
        check_step_input(x, self.d_model)
        cache.check(x.shape[0], x.dtype)
        gate, conv_in, dt = self._project(x)
        window = torch.cat([cache.conv, conv_in[..., None]], dim=-1)  # (batch, channels, d_conv)
        values, B, C = self._split_conv(F.silu(self.conv1d(window)[..., 0]))

        # Everything as (batch, heads, head_dim, d_state), in the dtype of the state.
        write = (dt[..., None] * values)[..., None] * B[:, None, None]
        state = cache.state * (dt * self._A()).exp()[..., None, None] + write
        y = (state * C[:, None, None]).sum(-1) + self.D[:, None] * values

        cache.conv.copy_(window[..., 1:])
        cache.state.copy_(state)
        return self._gated(y.to(values.dtype), gate)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gate (..., d_inner), input of the convolution (..., channels), dt (..., heads)."""
        gate, conv_in, dt = torch.split(
            self.in_proj(x), [self.d_inner, self.conv1d.in_channels, self.num_heads], dim=-1
        )
        wide = accumulation_dtype(dt.dtype)
        return gate, conv_in, F.softplus(dt.to(wide) + self.dt_bias.to(wide))

    def _split_conv(self, conv_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values (..., heads, head_dim), B and C (..., d_state)."""
        values, B, C = torch.split(conv_out, [self.d_inner, self.d_state, self.d_state], dim=-1)
        return rearrange(values, "... (h p) -> ... h p", h=self.num_heads), B, C

    def _A(self) -> Tensor:
        return -self.A_log.to(accumulation_dtype(self.A_log.dtype)).exp()

    def _gated(self, y: Tensor, gate: Tensor) -> Tensor:
        # Gate first, then one norm over all heads together: official checkpoints depend on it.
        projected: Tensor = self.out_proj(self.norm(y.flatten(-2) * F.silu(gate)))
        return projected

    def _causal_conv(self, x: Tensor) -> Tensor:
        # One zero more than the taps reach back, and its output dropped again, so that a sequence
        # of length 0 still is a legal input of the convolution.
        padded = F.pad(x.mT, (self.d_conv, 0))
        return F.silu(self.conv1d(padded)[..., 1:]).mT

    def _packed_conv(self, x: Tensor, sequence: Tensor, groups: int) -> Tensor:
        """The same for packed x (1, total, channels), in which `sequence` counts below `groups`."""
        # As many zeros before each sequence (and the tail) as stand before a row of a batch.
        total = x.shape[1]
        row = torch.arange(total, device=x.device) + (sequence + 1) * self.d_conv
        spread = x.new_zeros(1, total + groups * self.d_conv, x.shape[2]).index_copy(1, row, x)
        convolved = self.conv1d(spread.mT).mT
        return F.silu(convolved.index_select(1, row - self.d_conv + 1))


def _initial_dt_bias(num_heads: int) -> Tensor:
    """Bias whose softplus is log-uniform in [1e-3, 0.1]."""
    dt = torch.empty(num_heads).uniform_(math.log(1e-3), math.log(0.1)).exp()
    return dt + (-torch.expm1(-dt)).log()  # inverse of softplus
