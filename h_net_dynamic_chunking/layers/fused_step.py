"""One step of a whole stack on kernels of its own: a handful of launches a layer.

    one row       norm, product, convolution, gate and residual of a linear layer are one kernel
    several rows  a norm, which adds to the residual stream, stands between two products; these are
                  torch's from 65 rows on, and in float32

The recurrence of Mamba-2 and the attention to a cache have their kernels in either case. Rows that
rest cost next to nothing. Numbers are those of the layers' own steps, but for roundings: what a
layer adds to the residual stream is not rounded to the dtype of the weights first.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from h_net_dynamic_chunking.cache import Rows
from h_net_dynamic_chunking.layers.attention import CausalAttention
from h_net_dynamic_chunking.layers.attention_cache import AttentionCache
from h_net_dynamic_chunking.layers.block import Block
from h_net_dynamic_chunking.layers.mamba2 import Mamba2, MambaCache
from h_net_dynamic_chunking.layers.mlp import SwiGLU
from h_net_dynamic_chunking.layers.norm import RMSNorm
from h_net_dynamic_chunking.ops.plain import is_plain
from h_net_dynamic_chunking.step_kernels import fits_step_kernels

if TYPE_CHECKING:
    from h_net_dynamic_chunking.ops._triton.conv_step import Convolution
    from h_net_dynamic_chunking.ops._triton.state_step import Gated

# Off for measurements only: the products of several rows are torch's.
own_products = True

_PLAIN_PARTS = (nn.Linear, nn.Conv1d, RMSNorm)


def can_fuse(blocks: Sequence[Block], x: Tensor, norm_weight: Tensor, rows: Rows) -> bool:
    """Whether a stack of these blocks, which ends with such a norm, runs on the kernels.

    They take the weights of a layer and not the layer, so that one which somebody has replaced or
    changed, by an adapter or a hook say, must run itself.

    Raises:
        ValueError: Triton was asked for by name and cannot run.
    """
    return all(map(_is_plain, blocks)) and fits_step_kernels(x, norm_weight, rows)


def _is_plain(block: Block) -> bool:
    """Whether it is made of this library's layers, as it makes them."""
    mixer, mlp = block.mixer, block.mlp
    if type(mixer) not in (Mamba2, CausalAttention) or (
        mlp is not None and type(mlp) is not SwiGLU
    ):
        return False
    parts = [*mixer.children(), block.norm1, block.norm2, *(mlp.children() if mlp else ())]
    return all(part is None or any(is_plain(part, kind) for kind in _PLAIN_PARTS) for part in parts)


def fused_step(
    blocks: Sequence[Block], norm: nn.RMSNorm, x: Tensor, caches: Sequence[Any], rows: Rows
) -> Tensor:
    """`Isotropic.step`: x (rows, d_model) -> the same shape and dtype."""
    stream = (_OneRow if x.shape[0] == 1 else _SeveralRows)(x, rows.active)
    for block, cache in zip(blocks, caches, strict=True):
        if isinstance(cache, MambaCache):
            _add_mamba(stream, block, cache, rows.active)
        else:
            _add_attention(stream, block, cache, rows)
        if block.mlp is not None and block.norm2 is not None:
            inner = stream.project(block.norm2, block.mlp.fc1, swiglu=True)
            stream.add(inner, block.mlp.fc2)
    attended = [cache for cache in caches if isinstance(cache, AttentionCache)]
    for cache in attended:
        cache.positions.bound += 1
    # Only now, because all kernels of a layer's attention read how many positions it has seen.
    return stream.normed(norm, [cache.position for cache in attended])


class _OneRow:
    """The residual stream (1, d_model): x, and from the first layer on a float32 of its own."""

    def __init__(self, x: Tensor, active: Tensor | None) -> None:
        self._stream, self._active = x, active
        self._begun, self._wide = False, False

    def project(
        self,
        norm: nn.RMSNorm,
        linear: nn.Linear,
        swiglu: bool = False,
        convolution: "Convolution | None" = None,
    ) -> Tensor:
        """A linear layer of the normed stream, and the convolution of some of its outputs."""
        from h_net_dynamic_chunking.ops._triton.linear_step import linear_step

        begins, self._begun = not self._begun, True
        return linear_step(
            self._stream,
            linear.weight,
            norm_weight=norm.weight,
            swiglu=swiglu,
            convolution=convolution,
            active=self._active,
            begins=begins,
        )

    def add(self, x: Tensor, linear: nn.Linear, gated: "Gated | None" = None) -> None:
        """Add a linear layer of x, or of x gated and normed."""
        from h_net_dynamic_chunking.ops._triton.linear_step import linear_step

        self._stream = linear_step(
            x,
            linear.weight,
            gate=None if gated is None else gated.gate,
            norm_weight=None if gated is None else gated.norm_weight,
            residual=self._stream,
            out=None if self._wide else _empty_stream(self._stream),
        )
        self._wide = True

    def normed(self, norm: nn.RMSNorm, count: Sequence[Tensor] = ()) -> Tensor:
        """The stream at the end; rows that are active are counted. See `norm_rows`."""
        from h_net_dynamic_chunking.ops._triton.rows_step import norm_rows

        return norm_rows(
            self._stream, norm.weight, active=self._active, count=count, begins=not self._begun
        )


class _SeveralRows(_OneRow):
    """The residual stream (rows, d_model), to which the next norm adds what came last."""

    def __init__(self, x: Tensor, active: Tensor | None) -> None:
        super().__init__(x, active)
        self._added: Tensor | None = None
        self._mean_square: Tensor | None = None

    def project(
        self,
        norm: nn.RMSNorm,
        linear: nn.Linear,
        swiglu: bool = False,
        convolution: "Convolution | None" = None,
    ) -> Tensor:
        from h_net_dynamic_chunking.ops._triton.conv_step import conv_step
        from h_net_dynamic_chunking.ops._triton.product_step import fits_product_step, product_step
        from h_net_dynamic_chunking.ops._triton.rows_step import swiglu_rows

        x = self.normed(norm)
        if own_products and fits_product_step(x, linear.weight):
            product = product_step(x, linear.weight, swiglu=swiglu, active=self._active)
        else:
            product = F.linear(x, linear.weight)
            product = swiglu_rows(product) if swiglu else product
        if convolution is not None:
            conv_step(product, convolution, self._active)
        return product

    def add(self, x: Tensor, linear: nn.Linear, gated: "Gated | None" = None) -> None:
        """The same, where x is gated, and normed but for the scale."""
        from h_net_dynamic_chunking.ops._triton.product_step import fits_product_step, product_step

        self._mean_square = None if gated is None else gated.mean_square
        if own_products and fits_product_step(x, linear.weight):
            self._added = product_step(x, linear.weight, split=True, active=self._active)
        else:
            self._added = F.linear(x, linear.weight)

    def normed(self, norm: nn.RMSNorm, count: Sequence[Tensor] = ()) -> Tensor:
        from h_net_dynamic_chunking.ops._triton.rows_step import norm_rows

        if not self._begun:
            self._begun = True
            x, self._stream = self._stream, _empty_stream(self._stream)
            return norm_rows(x, norm.weight, keep=self._stream, active=self._active, begins=True)
        added, self._added = self._added, None
        return norm_rows(
            self._stream,
            norm.weight,
            add=added,
            mean_square=self._mean_square,
            active=self._active,
            count=count,
        )


def _empty_stream(x: Tensor) -> Tensor:
    return _empty_float32(x, *x.shape)


def _empty_float32(beside: Tensor, *shape: int) -> Tensor:
    return beside.new_empty(shape, dtype=torch.float32)


def _add_mamba(stream: _OneRow, block: Block, cache: MambaCache, active: Tensor | None) -> None:
    from h_net_dynamic_chunking.ops._triton.conv_step import Convolution
    from h_net_dynamic_chunking.ops._triton.state_step import Gated, parts, state_step

    mixer = block.mixer
    assert isinstance(mixer, Mamba2)
    assert mixer.conv1d.bias is not None
    convolution = Convolution(
        cache.conv,
        mixer.conv1d.weight,
        mixer.conv1d.bias,
        out=_empty_float32(cache.conv, *cache.conv.shape[:2]),
        first=mixer.d_inner,
    )
    projected = stream.project(block.norm1, mixer.in_proj, convolution=convolution)
    rows = len(projected)
    gated = Gated(
        projected[:, : mixer.d_inner],
        mixer.norm.weight,
        mean_square=_empty_float32(cache.conv, rows, parts(cache.state)),
    )
    y = state_step(
        convolution.out,
        projected[:, -mixer.num_heads :],
        cache.state,
        dt_bias=mixer.dt_bias,
        A_log=mixer.A_log,
        D=mixer.D,
        out_dtype=projected.dtype,
        active=active,
        gated=None if rows == 1 else gated,
    )
    stream.add(y, mixer.out_proj, gated)


def _add_attention(stream: _OneRow, block: Block, cache: AttentionCache, rows: Rows) -> None:
    from h_net_dynamic_chunking.ops._triton.attention_step import attention_step

    mixer = block.mixer
    assert isinstance(mixer, CausalAttention)
    cache.reserve(1)
    qkv = stream.project(block.norm1, mixer.Wqkv)
    mixed = attention_step(
        qkv,
        cache.keys,
        cache.values,
        cache.position,
        rotary_dim=mixer.rotary_dim,
        rotary_base=mixer.rotary_base,
        ring=cache.ring,
        window_size=mixer.window_size,
        active=rows.active,
    )
    stream.add(mixed, mixer.out_proj)
