"""Mamba-2 mixer, for any device and length: the paper's layer M without its MLP.

What stands between its two projections is in `ops.mamba2`. `Mamba2.step` and `Mamba2.extend` are
the same layer one or more positions at a time, from a cache. Parameters are named as in the
official H-Net checkpoints.
"""

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from h_net_dynamic_chunking.cache import (
    ALL_ROWS,
    STATE_DTYPES,
    Rows,
    check_cache_class,
    check_cache_tensor,
    check_state_dtype,
)
from h_net_dynamic_chunking.layers._checks import (
    check_extension,
    check_input,
    check_sizes,
    check_step_input,
)
from h_net_dynamic_chunking.layers.norm import RMSNorm
from h_net_dynamic_chunking.ops.causal_conv import spread_rows
from h_net_dynamic_chunking.ops.mamba2 import (
    Mamba2Parameters,
    Mamba2Sizes,
    mamba2_continued,
    mamba2_inner,
)
from h_net_dynamic_chunking.ops.packing import accumulation_dtype
from h_net_dynamic_chunking.ops.plain import is_plain, parameter_of
from h_net_dynamic_chunking.ops.ssd import CHUNK_SIZE, ssd, ssd_continued
from h_net_dynamic_chunking.ops.tail import zero_tail
from h_net_dynamic_chunking.ops.unkept_input import weight_to_take
from h_net_dynamic_chunking.step_kernels import fits_step_kernels


@dataclass(eq=False)
class MambaCache:
    """What the positions so far leave to the next one."""

    conv: Tensor
    """(batch, channels, d_conv - 1): the last inputs of the convolution, oldest first."""
    state: Tensor
    """(batch, heads, head_dim, d_state): S_t, in the dtype of the arithmetic, which is float32 or
    float64, or rounded to a narrower one of `cache.STATE_DTYPES`."""


class Mamba2(nn.Module):
    """Mix positions with a causal short convolution and a gated state-space recurrence.

    x:           (batch, length, d_model), float; with cu_seqlens packed, (total, d_model)
    cu_seqlens:  (batch + 1,), int32 or int64: cumulative lengths of packed sequences. Rows from
                 cu_seqlens[-1] on may hold anything and come out as zeros
    tail_is_zero: whether x is known to hold zeros behind the last sequence, which saves a copy
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
    `conv1d`, `norm` and, where gradients are wanted, `out_proj` hold parameters for one operation
    and are not called by `forward`, unless somebody has replaced them, changed them or watches them
    with hooks.

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
        chunk_size: int = CHUNK_SIZE,
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

    def forward(
        self, x: Tensor, cu_seqlens: Tensor | None = None, tail_is_zero: bool = False
    ) -> Tensor:
        check_input(x, self.d_model, cu_seqlens)
        if cu_seqlens is not None and not tail_is_zero:
            # The gradient of the weights multiplies whatever is there by zero.
            x = zero_tail(x, cu_seqlens)
        if not self._is_plain():
            return self._forward_by_parts(x, cu_seqlens)
        projected = self.in_proj(x)
        out_weight = weight_to_take(self.out_proj, projected)
        out = mamba2_inner(
            projected,
            self._parameters_inside(),
            cu_seqlens,
            out_weight=out_weight,
            eps=self.norm.eps or 0.0,
            chunk_size=self.chunk_size,
        )
        if out_weight is None:
            out = self.out_proj(out)
        return out

    def _is_plain(self) -> bool:
        """Whether the operation, which takes only their weights, may stand for the parts."""
        conv1d = self.conv1d
        return (
            is_plain(conv1d, nn.Conv1d) and conv1d.bias is not None and is_plain(self.norm, RMSNorm)
        )

    def _forward_by_parts(self, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """`forward` through the modules, whatever they are."""
        gate, conv_in, dt = self._project(x)
        rows, row = spread_rows(conv_in, cu_seqlens, self.d_conv)
        # One zero more in front, so that no positions still are a legal input.
        convolved = F.silu(self.conv1d(F.pad(rows.mT, (self.d_conv, 0)))[..., 1:]).mT
        if row is not None:
            convolved = convolved[0].index_select(0, row)
        values, B, C = self._sizes.split_conv(convolved)
        y = ssd(values, dt, self._A(), B, C, self.D, cu_seqlens, chunk_size=self.chunk_size)
        out = self._gated(y, gate)
        return out if cu_seqlens is None else zero_tail(out, cu_seqlens)

    def allocate_inference_cache(
        self,
        batch_size: int,
        max_seqlen: int,
        dtype: torch.dtype | None = None,
        state_dtype: torch.dtype | None = None,
    ) -> MambaCache:
        """A cache for `step` before the first position. `max_seqlen` changes nothing here.

        Args:
            batch_size: rows.
            max_seqlen: of no consequence.
            dtype: of the x to come; the weights' if None.
            state_dtype: of S between calls, one of `cache.STATE_DTYPES`; None for that of the
                arithmetic, float32 or float64. A narrower one is rounded to, to the nearest, at the
                end of every call. `HNetLM.allocate_inference_cache` says what that costs.

        Raises:
            ValueError: a size below 1, another state_dtype.
        """
        check_sizes(batch_size=batch_size, max_seqlen=max_seqlen)
        check_state_dtype(state_dtype)
        weight = parameter_of(self.in_proj)
        dtype = dtype or weight.dtype
        state_shape = (batch_size, self.num_heads, self.head_dim, self.d_state)
        return MambaCache(
            conv=weight.new_zeros(
                batch_size, self.conv1d.in_channels, self.d_conv - 1, dtype=dtype
            ),
            state=weight.new_zeros(state_shape, dtype=state_dtype or accumulation_dtype(dtype)),
        )

    def check_inference_cache(
        self,
        cache: Any,
        batch_size: int,
        dtype: torch.dtype,
        new: int = 1,
        rows: Rows = ALL_ROWS,
        lens: Tensor | None = None,
    ) -> None:
        """Raise ValueError unless the cache is one of this layer for that batch and dtype."""
        check_cache_class(cache, MambaCache, self)
        channels, device = self.conv1d.in_channels, parameter_of(self.in_proj).device
        conv_shape = (batch_size, channels, self.d_conv - 1)
        state_shape = (batch_size, self.num_heads, self.head_dim, self.d_state)
        check_cache_tensor("conv", cache.conv, conv_shape, dtype, device)
        kept = cache.state.dtype
        state_dtype = kept if kept in STATE_DTYPES else accumulation_dtype(dtype)
        check_cache_tensor("state", cache.state, state_shape, state_dtype, device)

    @torch.no_grad()
    def step(self, x: Tensor, cache: MambaCache, rows: Rows = ALL_ROWS) -> Tensor:
        """The next position of every row; updates `cache` in place. No gradients.

        x, out:  (rows, d_model)
        rows:    which rows of the cache these are; see `cache.Rows`

        Raises:
            ValueError: x of another shape, a cache of another layer, batch size or dtype.
        """
        check_step_input(x, self.d_model)
        self._check_cache(cache, x, rows)
        gate, conv_in, dt = self._project(x)
        # (rows, channels, d_conv)
        window = torch.cat([rows.read(cache.conv), conv_in[..., None]], dim=-1)
        values, B, C = self._sizes.split_conv(F.silu(self.conv1d(window)[..., 0]))

        # Everything as (rows, heads, head_dim, d_state), in float32 or float64.
        write = (dt[..., None] * values)[..., None] * B[:, None, None]
        decay = (dt * self._A()).exp()[..., None, None]
        state = rows.read(cache.state) * decay + write
        y = (state * C[:, None, None]).sum(-1) + self.D[:, None] * values

        rows.write(cache.conv, window[..., 1:])
        rows.write(cache.state, state)
        return self._gated(y.to(values.dtype), gate)

    @torch.no_grad()
    def extend(
        self, x: Tensor, cache: MambaCache, lens: Tensor | None = None, rows: Rows = ALL_ROWS
    ) -> Tensor:
        """The next positions of every row at once; updates `cache` in place. No gradients.

        x, out:  (rows, length, d_model); what stands at pads is not used, and means nothing in out
        lens:    int (rows,): positions of each row, on the left; None: all have `length`
        rows:    which rows of the cache these are; see `cache.Rows`

        Raises:
            ValueError: x of another shape, a cache of another layer, batch size or dtype.
        """
        check_extension(x, self.d_model, lens)
        self._check_cache(cache, x, rows)
        if self._is_plain() and fits_step_kernels(x, parameter_of(self.in_proj), rows):
            mixed = mamba2_continued(
                self.in_proj(x),
                self._parameters_inside(),
                cache.conv,
                cache.state,
                rows.lens(lens, x.shape[:2]),
                eps=self.norm.eps or 0.0,
            )
            if mixed is not None:
                out: Tensor = self.out_proj(mixed)
                return out
        length, taps_back = x.shape[1], self.d_conv - 1
        steps = torch.arange(length, device=x.device)
        if lens is None:
            lens = steps.new_full(x.shape[:1], length)
            gate, conv_in, dt = self._project(x)
        else:
            real = (steps < lens[:, None])[..., None]
            gate, conv_in, dt = self._project(x.where(real, 0))
            # With dt = 0 a pad neither writes to the state nor decays it.
            dt = dt.where(real, 0)
        window = torch.cat([rows.read(cache.conv).mT, conv_in], dim=1)
        # One zero more in front, so that no new positions still are a legal input.
        convolved = F.silu(self.conv1d(F.pad(window.mT, (1, 0)))[..., 1:]).mT
        values, B, C = self._sizes.split_conv(convolved)
        before = rows.read(cache.state)
        y, state = ssd_continued(
            values, dt, self._A(), B, C, self.D, before, chunk_size=self.chunk_size
        )
        last = lens[:, None] + torch.arange(taps_back, device=x.device)
        newest = window.gather(1, last[..., None].expand(-1, -1, window.shape[-1]))
        rows.write(cache.conv, newest.mT)
        rows.write(cache.state, state)
        return self._gated(y, gate)

    def _check_cache(self, cache: MambaCache, x: Tensor, rows: Rows) -> None:
        if rows.checked:
            return
        # How many rows an index stands for is not known here.
        batch_size = x.shape[0] if rows.index is None else cache.conv.shape[0]
        self.check_inference_cache(cache, batch_size, x.dtype)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gate (..., d_inner), input of the convolution (..., channels), dt (..., heads)."""
        gate, conv_in, raw = self._sizes.split(self.in_proj(x))
        wide = accumulation_dtype(raw.dtype)
        return gate, conv_in, F.softplus(raw.to(wide) + self.dt_bias.to(wide))

    @property
    def _sizes(self) -> Mamba2Sizes:
        return Mamba2Sizes(self.d_inner, self.d_state, self.num_heads)

    def _parameters_inside(self) -> Mamba2Parameters:
        return Mamba2Parameters(
            self.conv1d.weight,
            cast(Tensor, self.conv1d.bias),
            self.dt_bias,
            self.A_log,
            self.D,
            self.norm.weight,
        )

    def _A(self) -> Tensor:
        return -self.A_log.to(accumulation_dtype(self.A_log.dtype)).exp()

    def _gated(self, y: Tensor, gate: Tensor) -> Tensor:
        # Gate first, then one norm over all heads together: official checkpoints depend on it.
        projected: Tensor = self.out_proj(self.norm(y.flatten(-2) * F.silu(gate)))
        return projected


def _initial_dt_bias(num_heads: int) -> Tensor:
    """Bias whose softplus is log-uniform in [1e-3, 0.1]."""
    dt = torch.empty(num_heads).uniform_(math.log(1e-3), math.log(0.1)).exp()
    return dt + (-torch.expm1(-dt)).log()  # inverse of softplus
