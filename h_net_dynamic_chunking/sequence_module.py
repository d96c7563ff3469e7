"""The protocol by which HNet calls its parts: any module, told about lengths if it asks for them.

A module takes `(batch, length, dim)` and returns hidden states of that shape, or anything in which
`hidden_states` finds them. Parameters of its `forward` with these names are filled in when the
sequences have different lengths; a module without them is called with the tensor alone:

    lens        int64 (batch,): real positions of each row, which stand on the left
    mask        bool (batch, length): True at real positions
    cu_seqlens  int (batch + 1,): cumulative lengths; the module then gets and returns packed
                (total, dim) and no pads. Offered only when the input itself is packed.

Pads stand on the right and hold zeros on the way in. So a causal module needs none of the three,
and what a module leaves in the pads reaches no real position.
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor, nn

from h_net_dynamic_chunking.layout import Layout, padded_view
from h_net_dynamic_chunking.outputs import hidden_states

# They see one position at a time, so that packed input needs no lengths.
_POSITION_WISE = (nn.Identity, nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Dropout)


def call_module(module: nn.Module, x: Tensor, layout: Layout) -> tuple[Tensor, Any]:
    """Run `module` on sequences laid out as `layout` says.

    Args:
        module: See the top of this file.
        x: (batch, length, dim), or packed (total, dim).
        layout: of x.

    Returns:
        The hidden states, laid out as x, and the whole of what the module returned.
    """
    accepted = accepted_lengths(module)
    if layout.padded:
        result = module(x, **_padded_lengths(layout, accepted))
        return hidden_states(result), result
    if "cu_seqlens" in accepted:
        result = module(x, cu_seqlens=layout.cu_seqlens)
        return hidden_states(result), result
    if isinstance(module, _POSITION_WISE):
        return module(x), None
    padded = padded_view(layout)
    result = module(padded.unpack(x), **_padded_lengths(padded, accepted))
    return padded.pack(hidden_states(result)), result


def accepted_lengths(module: nn.Module) -> frozenset[str]:
    """Which of `lens`, `mask` and `cu_seqlens` the module's forward names."""
    module = getattr(module, "_orig_mod", module)  # torch.compile hides the signature behind *args
    return _accepted_by(type(module).forward)


@cache
def _accepted_by(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters) & {"lens", "mask", "cu_seqlens"}


def _padded_lengths(layout: Layout, accepted: frozenset[str]) -> dict[str, Tensor]:
    if layout.inverse is None:
        return {}
    offers = {"lens": layout.lens, "mask": layout.mask}
    return {name: offers[name] for name in offers.keys() & accepted}
