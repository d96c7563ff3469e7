"""A stack of layers of one width, written as a layout such as "m4", "T22" or "T1m4".

A letter names the mixer (m Mamba-2, t attention), a number how many layers of it follow. Lower case
is the mixer alone; upper case adds a SwiGLU. Every layer is pre-norm, and a norm ends the stack:

    h += mixer(norm1(h));   upper case: h += mlp(norm2(h));   out = rmsnorm(h)
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from h_net_dynamic_chunking.layers._checks import check_input, check_sizes
from h_net_dynamic_chunking.layers.attention import CausalAttention
from h_net_dynamic_chunking.layers.mamba2 import Mamba2
from h_net_dynamic_chunking.layers.mlp import SwiGLU
from h_net_dynamic_chunking.layers.norm import RMSNorm
from h_net_dynamic_chunking.ops.packing import accumulation_dtype

MixerFactory = Callable[[int], nn.Module]


class Block(nn.Module):
    """Add a mixer, then perhaps an MLP, to the residual stream; each sees it through its norm.

    h, out: (batch, length, d_model), float32 or float64
    """

    def __init__(self, mixer: nn.Module, d_model: int, mlp: SwiGLU | None = None) -> None:
        super().__init__()
        self.norm1 = RMSNorm(d_model)
        self.mixer = mixer
        # Without an MLP both stay None, and so leave no key in the state dict.
        self.norm2 = RMSNorm(d_model) if mlp is not None else None
        self.mlp = mlp

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.mixer(self.norm1(h))
        if self.norm2 is not None and self.mlp is not None:
            h = h + self.mlp(self.norm2(h))
        return h


class Isotropic(nn.Module):
    """Stack layers of one width, as the encoders, decoders and main networks of an H-Net are.

    x:    (batch, length, d_model), float
    out:  (batch, length, d_model), dtype of `rmsnorm.weight`

    The residual stream is float32 whatever the dtypes of input and weights (float64 stays).
    Position t of the output depends on positions up to t only: finite pads on the right do no harm.

    Args:
        layout: groups of a letter and a count, "T1m4" for one T then four m.
        d_model: width of the stack.
        ssm: options of `Mamba2` for the letter m.
        attention: options of `CausalAttention` for the letter t; 16 heads unless it says otherwise.
        d_intermediate: width of every SwiGLU, see there; only upper-case letters read it.
        mixers: constructors by lower-case letter, each taking d_model and giving a module that maps
            (batch, length, d_model) to the same shape. Replaces m or t, or adds a letter.

    Raises:
        ValueError: a layout that cannot be read or names an unknown letter, options for a mixer
            that `mixers` replaces, a size out of range, an input of another width.

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
    ) -> None:
        check_sizes(d_model=d_model)
        factories = _mixer_factories(ssm, attention, mixers or {})
        letters = _expand_layout(layout, factories)
        super().__init__()
        self.layout, self.d_model = layout, d_model
        self.layers = nn.ModuleList(
            Block(
                factories[letter.lower()](d_model),
                d_model,
                SwiGLU(d_model, d_intermediate) if letter.isupper() else None,
            )
            for letter in letters
        )
        self.rmsnorm = RMSNorm(d_model)

    def forward(self, x: Tensor) -> Tensor:
        check_input(x, self.d_model)
        h = x.to(accumulation_dtype(x.dtype))
        for layer in self.layers:
            h = layer(h)
        out: Tensor = self.rmsnorm(h)
        return out


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


def _expand_layout(layout: str, known: Mapping[str, MixerFactory]) -> str:
    """ "T1m4" -> "Tmmmm"."""
    groups = re.findall(r"([A-Za-z])([1-9][0-9]*)", layout)
    if not layout or "".join(letter + count for letter, count in groups) != layout:
        raise ValueError(
            f'layout must be groups of a letter and a count of at least 1, like "T1m4", '
            f"got {layout!r}"
        )
    for letter, _ in groups:
        if letter.lower() not in known:
            raise ValueError(
                f"layout must use the letters {', '.join(sorted(known))} or their capitals, "
                f"got {letter!r} in {layout!r}"
            )
    return "".join(letter * int(count) for letter, count in groups)
