"""A stack of layers of one width, written as a layout such as "m4", "T22" or "T1m4".

A letter names the mixer (m Mamba-2, t attention), a number how many layers of it follow. Lower case
is the mixer alone; upper case adds a SwiGLU. Every layer is pre-norm, and a norm ends the stack:

    h += mixer(norm1(h));   upper case: h += mlp(norm2(h));   out = rmsnorm(h)
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from h_net_dynamic_chunking import step_module
from h_net_dynamic_chunking.cache import ALL_ROWS, Rows
from h_net_dynamic_chunking.layers._checks import (
    check_extension,
    check_flag,
    check_input,
    check_sizes,
    check_step_input,
)
from h_net_dynamic_chunking.layers._packed import longest
from h_net_dynamic_chunking.layers.attention import CausalAttention
from h_net_dynamic_chunking.layers.block import Block
from h_net_dynamic_chunking.layers.fused_step import can_fuse, fused_step
from h_net_dynamic_chunking.layers.mamba2 import Mamba2
from h_net_dynamic_chunking.layers.mlp import SwiGLU
from h_net_dynamic_chunking.layers.norm import RMSNorm, add_then_norm
from h_net_dynamic_chunking.layers.recomputation import recomputed
from h_net_dynamic_chunking.ops.packing import accumulation_dtype

MixerFactory = Callable[[int], nn.Module]


class Isotropic(nn.Module):
    """Stack layers of one width, as the encoders, decoders and main networks of an H-Net are.

    x:           (batch, length, d_model), float; with cu_seqlens packed, (total, d_model)
    cu_seqlens:  (batch + 1,), int32 or int64: cumulative lengths of packed sequences. Rows from
                 cu_seqlens[-1] on may hold anything and get no gradient
    max_seqlen:  the longest of the packed sequences, or more; None reads it, once for all layers,
                 if a mixer asks for it, which stops the host of a GPU
    has_tail:    False says that there are no rows from cu_seqlens[-1] on, which saves some passes
    out:         shape of x, dtype of `rmsnorm.weight`

    The residual stream is float32 whatever the dtypes of input and weights (float64 stays).
    Position t of the output depends on positions up to t only: finite pads on the right do no harm.

    Args:
        layout: groups of a letter and a count, "T1m4" for one T then four m.
        d_model: width of the stack.
        ssm: options of `Mamba2` for the letter m.
        attention: options of `CausalAttention` for the letter t; 16 heads unless it says otherwise.
        d_intermediate: width of every SwiGLU, see there; only upper-case letters read it.
        mixers: constructors by lower-case letter, each taking d_model and giving a module that maps
            (batch, length, d_model) to the same shape. Replaces m or t, or adds a letter. One whose
            forward names `cu_seqlens` also maps packed input; `step_module` says which decode.
        activation_checkpointing: each layer keeps its input alone, and the backward pass runs the
            layer again for what it needs: less memory for a third more products, same numbers.
            The attribute of this name may be set at any time.

    Raises:
        ValueError: a layout that cannot be read or names an unknown letter, options for a mixer
            that `mixers` replaces, a size out of range, an input of another shape, packed input or
            decoding with a mixer that cannot do it, caches that do not fit (see `step`).

    >>> import torch
    >>> stack = Isotropic("T1m2", 64, ssm={"d_state": 16}, attention={"num_heads": 4})
    >>> stack(torch.randn(2, 10, 64)).shape
    torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        layout: str,
        d_model: int,
        *,
        ssm: Mapping[str, Any] | None = None,
        attention: Mapping[str, Any] | None = None,
        d_intermediate: int | None = None,
        mixers: Mapping[str, MixerFactory] | None = None,
        activation_checkpointing: bool = False,
    ) -> None:
        check_sizes(d_model=d_model)
        check_flag(activation_checkpointing=activation_checkpointing)
        factories = _mixer_factories(ssm, attention, mixers or {})
        letters = _expand_layout(layout, factories)
        super().__init__()
        self.layout, self.d_model = layout, d_model
        self.activation_checkpointing = activation_checkpointing
        self.layers = nn.ModuleList(
            Block(
                factories[letter.lower()](d_model),
                d_model,
                SwiGLU(d_model, d_intermediate) if letter.isupper() else None,
            )
            for letter in letters
        )
        self.rmsnorm = RMSNorm(d_model)

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        has_tail: bool = True,
    ) -> Tensor:
        check_input(x, self.d_model, cu_seqlens)
        if cu_seqlens is not None:
            self._check_packed_mixers()
            if max_seqlen is None and any("max_seqlen" in block.lengths for block in self._blocks):
                max_seqlen = longest(cu_seqlens)
        h, update = x, None
        for layer in self.layers:
            stream = (h, update, cu_seqlens, max_seqlen, has_tail)
            keeps_all = not self.activation_checkpointing
            h, update = layer(*stream) if keeps_all else recomputed(layer, *stream)
        return add_then_norm(self.rmsnorm, h, update, cu_seqlens if has_tail else None)[1]

    def allocate_inference_cache(
        self,
        batch_size: int,
        max_seqlen: int,
        dtype: torch.dtype | None = None,
        state_dtype: torch.dtype | None = None,
    ) -> list[Any]:
        """One cache for each layer, before the first position; see the mixers.

        `dtype` is that of the weights, which is what the mixers will see; None asks them.
        `state_dtype` is for mixers that name it, as `Mamba2` does, which see.

        Raises:
            ValueError: a mixer that cannot decode, a size below 1, a state_dtype that cannot be.
        """
        sizes = (batch_size, max_seqlen, dtype, state_dtype)
        return [
            step_module.allocate(f"layer {number}", block.mixer, *sizes)
            for number, block in enumerate(self._blocks)
        ]

    def check_inference_cache(
        self,
        cache: Any,
        batch_size: int,
        dtype: torch.dtype | None = None,
        new: int = 1,
        rows: Rows = ALL_ROWS,
        lens: Tensor | None = None,
    ) -> None:
        """Raise ValueError unless `cache` is one of this stack for that batch.

        And unless it has room for `new` more positions of these rows, or lens[r] of row r. The
        dtype is that of the weights, which is what the mixers see.
        """
        if not isinstance(cache, Sequence) or len(cache) != len(self._blocks):
            got = len(cache) if isinstance(cache, Sequence) else type(cache).__name__
            raise ValueError(
                f"caches must be one for each of the {len(self._blocks)} layers, got {got}"
            )
        for number, (block, part) in enumerate(zip(self._blocks, cache, strict=True)):
            step_module.check_cache(
                f"layer {number}",
                block.mixer,
                part,
                batch_size,
                block.norm1.weight.dtype,
                new,
                rows,
                lens,
            )

    @torch.no_grad()
    def step(self, x: Tensor, caches: Sequence[Any], rows: Rows = ALL_ROWS) -> Tensor:
        """The next position of every row; updates `caches` in place. No gradients.

        x, out:  (rows, d_model)
        rows:    which rows of the caches these are; see `cache.Rows`

        Raises:
            ValueError: x of another shape, a mixer that cannot decode, caches that are not of this
                stack, are full, or of another batch size or dtype. No cache has changed then.
        """
        check_step_input(x, self.d_model)
        rows = self._checked(caches, x, 1, rows)
        if can_fuse(self._blocks, x, self.rmsnorm.weight, rows):
            return fused_step(self._blocks, self.rmsnorm, x, caches, rows)
        h = x.to(accumulation_dtype(x.dtype))
        for block, cache in zip(self._blocks, caches, strict=True):
            h = block.step(h, cache, rows)
        out: Tensor = self.rmsnorm(h)
        return out

    @torch.no_grad()
    def extend(
        self,
        x: Tensor,
        caches: Sequence[Any],
        lens: Tensor | None = None,
        rows: Rows = ALL_ROWS,
    ) -> Tensor:
        """The next positions of every row at once; updates `caches` in place. No gradients.

        x, out:  (rows, length, d_model); what stands at pads is not used, and means nothing in out
        lens:    int (rows,): positions of each row, on the left; None: all have `length`
        rows:    which rows of the caches these are; see `cache.Rows`

        Raises:
            ValueError: as `step`.
        """
        check_extension(x, self.d_model, lens)
        rows = self._checked(caches, x, x.shape[1], rows, lens)
        h, update = x, None
        if lens is not None:  # whatever the pads hold
            real = torch.arange(x.shape[1], device=x.device) < lens[:, None]
            h = h.where(real[..., None], 0)
        for block, cache in zip(self._blocks, caches, strict=True):
            h, update = block.extend(h, update, cache, lens, rows)
        return add_then_norm(self.rmsnorm, h, update)[1]

    def _checked(
        self,
        caches: Sequence[Any],
        x: Tensor,
        new: int,
        rows: Rows,
        lens: Tensor | None = None,
    ) -> Rows:
        """The rows, for the layers, which need not look at their caches again."""
        # With an index only the stage that made it knows the batch.
        if not rows.checked and rows.index is None:
            self.check_inference_cache(caches, x.shape[0], None, new, rows, lens)
            rows = replace(rows, checked=True)
        return rows

    @property
    def _blocks(self) -> list[Block]:
        return cast(list[Block], list(self.layers))

    def _check_packed_mixers(self) -> None:
        for number, block in enumerate(self._blocks):
            if "cu_seqlens" not in block.lengths:
                raise ValueError(
                    f"cu_seqlens must be None: layer {number} has a {type(block.mixer).__name__}, "
                    "whose forward does not take it; pass x padded"
                )


def _mixer_factories(
    ssm: Mapping[str, Any] | None,
    attention: Mapping[str, Any] | None,
    mixers: Mapping[str, MixerFactory],
) -> dict[str, MixerFactory]:
    """The two mixers of this library with their options, then the caller's over them."""
    for name, letter, options in (("ssm", "m", ssm), ("attention", "t", attention)):
        if options is not None and letter in mixers:
            raise ValueError(
                f"{name} must be None when mixers replaces {letter!r}, which would ignore it; "
                f"got {dict(options)}"
            )
    for letter in mixers:
        if not re.fullmatch("[a-z]", letter):
            raise ValueError(f"mixers must have single lower-case letters as keys, got {letter!r}")
    own: dict[str, MixerFactory] = {
        "m": partial(Mamba2, **(ssm or {})),
        "t": partial(CausalAttention, **{"num_heads": 16, **(attention or {})}),
    }
    return {**own, **mixers}


def parse_layout(layout: str) -> list[tuple[str, int]]:
    """The letters of a layout and how many layers each stands for.

    Raises:
        ValueError: not groups of a letter and a count of at least 1.

    >>> parse_layout("T1m4")
    [('T', 1), ('m', 4)]
    """
    groups = re.findall(r"([A-Za-z])([1-9][0-9]*)", layout)
    if not layout or "".join(letter + count for letter, count in groups) != layout:
        raise ValueError(
            f'layout must be groups of a letter and a count of at least 1, like "T1m4", '
            f"got {layout!r}"
        )
    return [(letter, int(count)) for letter, count in groups]


def _expand_layout(layout: str, known: Mapping[str, MixerFactory]) -> str:
    """ "T1m4" -> "Tmmmm"."""
    groups = parse_layout(layout)
    for letter, _ in groups:
        if letter.lower() not in known:
            raise ValueError(
                f"layout must use the letters {', '.join(sorted(known))} or their capitals, "
                f"got {letter!r} in {layout!r}"
            )
    return "".join(letter * count for letter, count in groups)
