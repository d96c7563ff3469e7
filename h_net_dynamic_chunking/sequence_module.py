"""The protocol by which HNet calls its parts: any module, told about lengths if it asks for them.

A module takes `(batch, length, dim)` and returns hidden states of that shape, or anything in which
`hidden_states` finds them. Parameters of its `forward` with these names are filled in when the
sequences have different lengths; a module without them is called with the tensor alone:

    lens                   int64 (batch,): real positions of each row, which stand on the left
    mask                   bool (batch, length): True at real positions
    src_key_padding_mask,  bool (batch, length): True at pads, as torch.nn's own modules have it;
    key_padding_mask       `mask` means something else there and is left to its default
    cu_seqlens             int (batch + 1,): cumulative lengths; the module then gets and returns
                           packed (total, dim). Offered only when the input itself is packed, and
                           with it:
    max_seqlen             the longest of those sequences, or more; left to its default where the
                           host would have to wait for it
    has_tail               bool: whether rows may lie behind the last sequence, cu_seqlens[-1]

Pads stand on the right and hold zeros on the way in. So a causal module needs none of these, and
what a module leaves in the pads reaches no real position. A module that is not causal, and asks for
none of these, attends to the pads like to anything else. A wrapper such as nn.Sequential names none
of them, whatever it holds.
"""

import inspect
from typing import Any

from torch import Tensor, nn

from h_net_dynamic_chunking.layout import Layout, padded_view
from h_net_dynamic_chunking.outputs import hidden_states

_POSITION_WISE = (
    nn.Identity,
    nn.Linear,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.Dropout,
    nn.ReLU,
    nn.GELU,
    nn.SiLU,
    nn.Tanh,
    nn.Sigmoid,
)


def call_module(
    name: str, module: nn.Module, x: Tensor, layout: Layout, width: int | None = None
) -> tuple[Tensor, Any]:
    """Run `module` on sequences laid out as `layout` says.

    Args:
        name: what to call the module in an error.
        module: See the top of this file.
        x: (batch, length, dim), or packed (total, dim).
        layout: of x.
        width: what the hidden states must have; None for any.

    Returns:
        The hidden states, laid out as x, and the whole of what the module returned.

    Raises:
        ValueError: the module returned no hidden states, or changed their length, batch or width.
    """
    accepted = accepted_lengths(module)
    if layout.padded:
        result = module(x, **_padded_lengths(layout, accepted))
        return _checked(name, result, layout, width), result
    if "cu_seqlens" in accepted:
        result = module(x, cu_seqlens=layout.cu_seqlens, **_packed_lengths(layout, accepted))
        return _checked(name, result, layout, width), result
    if is_position_wise(module):
        return _checked(name, module(x), layout, width), None
    padded = padded_view(layout)
    result = module(padded.unpack(x), **_padded_lengths(padded, accepted))
    return padded.pack(_checked(name, result, padded, width)), result


def _checked(name: str, result: Any, layout: Layout, width: int | None) -> Tensor:
    """The hidden states in `result`, if they have the shape that is wanted."""
    hidden = hidden_states(result, name)
    shape = tuple(hidden.shape)
    if shape[:-1] != layout.shape or (width is not None and shape[-1] != width):
        wanted = (*layout.shape, "width" if width is None else width)
        raise ValueError(f"{name} must return hidden states of shape {wanted}, got {shape}")
    return hidden


def is_position_wise(module: nn.Module) -> bool:
    """Whether it sees one position at a time, so that it needs no lengths and no cache."""
    module = unwrapped(module)
    if isinstance(module, nn.Sequential):
        return all(map(is_position_wise, module))
    return isinstance(module, _POSITION_WISE)


def accepted_lengths(module: nn.Module) -> frozenset[str]:
    """Which of the parameters at the top of this file the module's forward names."""
    module = unwrapped(module)
    if type(module) not in _ACCEPTED:
        names = set(_NAMES)
        if type(module).__module__.startswith("torch.nn"):
            names.remove("mask")
        found = names & inspect.signature(type(module).forward).parameters.keys()
        _ACCEPTED[type(module)] = frozenset(found)
    return _ACCEPTED[type(module)]


_NAMES = (
    "lens",
    "mask",
    "src_key_padding_mask",
    "key_padding_mask",
    "cu_seqlens",
    "max_seqlen",
    "has_tail",
)

# Filled when an HNet is made, so that a compiled graph only looks up.
_ACCEPTED: dict[type[nn.Module], frozenset[str]] = {}


# Where torch's wrappers keep the module whose signature and class they hide. By name, because the
# classes would have to be imported for it.
_WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "module",
}


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside torch.compile, activation checkpointing or data parallelism."""
    while type(module).__name__ in _WRAPPERS:
        module = getattr(module, _WRAPPERS[type(module).__name__])
    return module


def _packed_lengths(layout: Layout, accepted: frozenset[str]) -> dict[str, int]:
    """What goes with cu_seqlens."""
    offers = {"max_seqlen": layout.max_seqlen, "has_tail": layout.has_tail}
    return {name: offer for name, offer in offers.items() if name in accepted and offer is not None}


def _padded_lengths(layout: Layout, accepted: frozenset[str]) -> dict[str, Tensor]:
    if layout.inverse is None:
        return {}
    offers = {
        "lens": layout.lens,
        "mask": layout.mask,
        "src_key_padding_mask": ~layout.mask,
        "key_padding_mask": ~layout.mask,
    }
    return {name: offer for name, offer in offers.items() if name in accepted}
