"""The checks of HNetConfig: each names the entry, what came and what was wanted.

Values of one stage are checked only if its layers read them.
"""

import math
import sys
from collections.abc import Sequence
from typing import Any

from h_net_dynamic_chunking.layers.isotropic import parse_layout

MAMBA_HEAD_DIM = 64  # of the official code, which has no option for it


def nested_layout(layout: Any) -> tuple[Any, ...]:
    """A checked copy of a layout, in tuples."""
    if isinstance(layout, str) or not isinstance(layout, Sequence) or len(layout) not in (1, 3):
        raise ValueError(
            f'arch_layout must be ["T9"], or [encoder, inner layout, decoder], got {layout!r}'
        )
    for text in (layout[0], layout[-1]):
        if not isinstance(text, str):
            raise ValueError(f"arch_layout must name its stacks by strings, got {layout!r}")
        _check_stack(text)
    if len(layout) == 1:
        return (layout[0],)
    encoder, inner, decoder = layout
    return (encoder, nested_layout(inner), decoder)


def _check_stack(text: str) -> None:
    try:
        groups = parse_layout(text)
    except ValueError as error:
        raise ValueError(f"arch_layout: {error}") from error
    for letter, _ in groups:
        if letter not in "mMtT":
            raise ValueError(
                f"arch_layout must use the letters m (Mamba-2) and t (attention) or their "
                f"capitals, got {letter!r} in {text!r}"
            )


def one_entry_each(name: str, values: Any, wanted: int, fallback: Any) -> tuple[Any, ...]:
    """`values` as a tuple of `wanted` entries; the fallback everywhere if there are none."""
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise ValueError(f"{name} must be a list, got {values!r}")
    if not values and fallback is not None:
        return (fallback,) * wanted
    if len(values) != wanted:
        raise ValueError(
            f"{name} must have {wanted} entries for this arch_layout, got {list(values)}"
        )
    return tuple(values)


def require(fits: bool, name: str, wanted: str, value: Any) -> None:
    """Raise ValueError unless the value fits."""
    if not fits:
        raise ValueError(f"{name} must be {wanted}, got {value!r}")


def is_number(value: Any) -> bool:
    """Whether this is an int or a float, and finite. A bool is neither."""
    return type(value) in (int, float) and math.isfinite(value)


def check_integer(name: str, value: Any, least: int | None = None) -> None:
    """Neither True nor 2.0 is an integer: both are slips of whoever wrote them."""
    wanted = "an integer" if least is None else f"an integer of at least {least}"
    fits = type(value) is int and (least is None or value >= least)
    require(fits, name, wanted, value)


def check_amount(name: str, value: Any) -> None:
    """A finite number of at least 0, of Python or numpy; True is none."""
    fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    require(fits and 0 <= value <= sys.float_info.max, name, "a finite number of at least 0", value)


def check_integers(name: str, values: Sequence[Any], least: int | None = None) -> None:
    """Each of `values`, named by its place."""
    for place, value in enumerate(values):
        check_integer(f"{name}[{place}]", value, least)


def check_attention(
    stage: int, width: int, num_heads: int, rotary_emb_dim: int, window_size: int
) -> None:
    """What a stage with attention needs."""
    check_integer(f"attn_cfg.num_heads[{stage}]", num_heads, 1)
    wanted = f"a divisor of d_model[{stage}] = {width}"
    require(width % num_heads == 0, f"attn_cfg.num_heads[{stage}]", wanted, num_heads)
    head = width // num_heads
    fits = rotary_emb_dim % 2 == 0 and 0 <= rotary_emb_dim <= head
    wanted = f"even and in 0 .. {head}, the channels of a head"
    require(fits, f"attn_cfg.rotary_emb_dim[{stage}]", wanted, rotary_emb_dim)
    check_integer(f"attn_cfg.window_size[{stage}]", window_size, -1)


def check_mamba(stage: int, width: int, d_state: int, d_conv: int, expand: int) -> None:
    """What a stage with Mamba-2 needs."""
    for name, value in (("d_state", d_state), ("d_conv", d_conv), ("expand", expand)):
        check_integer(f"ssm_cfg.{name}", value, 1)
    wanted = f"a multiple of {MAMBA_HEAD_DIM}, the width of a Mamba-2 head"
    inner = expand * width
    require(inner % MAMBA_HEAD_DIM == 0, f"ssm_cfg.expand * d_model[{stage}]", wanted, inner)
