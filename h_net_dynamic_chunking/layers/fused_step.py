"""One step of a whole stack on the kernels for few rows: a handful of launches a layer.

    Mamba-2     norm and in_proj | convolution | recurrence | gate, norm, out_proj and residual
    attention   norm and Wqkv | rotary, cache and softmax | out_proj and residual
    SwiGLU      norm, fc1 and gate | fc2 and residual

The numbers are those of the layers' own steps, but for roundings: what a layer adds to the residual
stream is not rounded to the dtype of the weights first.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from h_net_dynamic_chunking.cache import Rows
from h_net_dynamic_chunking.layers.attention import CausalAttention
from h_net_dynamic_chunking.layers.attention_cache import AttentionCache
from h_net_dynamic_chunking.layers.block import Block
from h_net_dynamic_chunking.layers.mamba2 import Mamba2, MambaCache
from h_net_dynamic_chunking.step_kernels import fits_step_kernels


def can_fuse(blocks: Sequence[Block], x: Tensor, norm_weight: Tensor, rows: Rows) -> bool:
    """Whether a stack of these blocks, which ends with such a norm, runs on the kernels.

    Raises:
        ValueError: Triton was asked for by name and cannot run.
    """
    own = all(type(block.mixer) in (Mamba2, CausalAttention) for block in blocks)
    return own and fits_step_kernels(x, norm_weight, rows)


def fused_step(
    blocks: Sequence[Block], norm: nn.RMSNorm, x: Tensor, caches: Sequence[Any], rows: Rows
) -> Tensor:
    """`Isotropic.step`: x (rows, d_model) -> the same shape and dtype."""
    from h_net_dynamic_chunking.ops._triton.linear_step import linear_step, prepare_rows

    h = x.to(torch.float32, copy=True)  # the residual stream, to which the layers add in place
    for block, cache in zip(blocks, caches, strict=True):
        if isinstance(cache, MambaCache):
            _add_mamba(block, h, cache, rows.active)
        else:
            _add_attention(block, h, cache, rows)
        if block.mlp is not None and block.norm2 is not None:
            inner = linear_step(
                h, block.mlp.fc1.weight, norm_weight=block.norm2.weight, swiglu=True
            )
            linear_step(inner, block.mlp.fc2.weight, residual=h)
    _advance([cache for cache in caches if isinstance(cache, AttentionCache)], rows)
    return prepare_rows(h, None, norm.weight, dtype=norm.weight.dtype)


def _add_mamba(block: Block, h: Tensor, cache: MambaCache, active: Tensor | None) -> None:
    from h_net_dynamic_chunking.ops._triton.linear_step import linear_step
    from h_net_dynamic_chunking.ops._triton.mamba_step import mamba_step

    mixer = block.mixer
    assert isinstance(mixer, Mamba2)
    projected = linear_step(h, mixer.in_proj.weight, norm_weight=block.norm1.weight)
    assert mixer.conv1d.bias is not None
    y = mamba_step(
        projected,
        cache.conv,
        cache.state,
        conv_weight=mixer.conv1d.weight,
        conv_bias=mixer.conv1d.bias,
        dt_bias=mixer.dt_bias,
        A_log=mixer.A_log,
        D=mixer.D,
        active=active,
    )
    gate = projected[:, : mixer.d_inner]
    linear_step(y, mixer.out_proj.weight, gate=gate, norm_weight=mixer.norm.weight, residual=h)


def _add_attention(block: Block, h: Tensor, cache: AttentionCache, rows: Rows) -> None:
    from h_net_dynamic_chunking.ops._triton.attention_step import attention_step
    from h_net_dynamic_chunking.ops._triton.linear_step import linear_step

    mixer = block.mixer
    assert isinstance(mixer, CausalAttention)
    cache.reserve(1)
    qkv = linear_step(h, mixer.Wqkv.weight, norm_weight=block.norm1.weight)
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
    linear_step(mixed, mixer.out_proj.weight, residual=h)


def _advance(caches: Sequence[AttentionCache], rows: Rows) -> None:
    """Count one more position in all caches, with one launch."""
    if not caches:
        return
    seen = [cache.position for cache in caches]
    by: Any = 1 if rows.active is None else [rows.active.long()] * len(seen)
    torch._foreach_add_(seen, by)
    for cache in caches:
        cache.positions.bound += 1
