"""How a caller lays sequences out, and the way from there to the packed layout and back.

Three forms come in at the door: padded `(batch, length, ...)` with or without `lens`, packed
`(total, ...)` with `cu_seqlens`, and jagged nested tensors. Inside, everything is packed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from h_net_dynamic_chunking.ops.compaction import Segmentation, gather_rows
from h_net_dynamic_chunking.ops.packing import (
    check_cu_seqlens,
    cu_seqlens_from_lens,
    cu_seqlens_of_rows,
)
from h_net_dynamic_chunking.ops.places import padded_places


@dataclass(frozen=True, eq=False)
class Layout:
    """The shape of a caller's sequences, and where each position stands when packed."""

    cu_seqlens: Tensor
    """int (batch + 1,): cumulative lengths."""
    shape: tuple[int, ...]
    """The leading sizes of the caller's tensors: (batch, length), or (total,) when packed."""
    index: Tensor | None = None
    """int64 (total,): flat padded place of each packed position; None if they are the same."""
    inverse: Tensor | None = None
    """int64 (batch * length,): packed position of each padded place, -1 at a pad."""
    jagged: bool = False
    """Whether the caller's tensors are nested."""
    has_tail: bool = False
    """Whether packed tensors may have rows that belong to no sequence."""
    max_seqlen: int | None = None
    """Length of the longest sequence, or more, where the host knows it without a read."""

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return self.cu_seqlens.shape[0] - 1

    @property
    def padded(self) -> bool:
        """Whether the caller's tensors have a batch dimension."""
        return len(self.shape) == 2

    @property
    def lens(self) -> Tensor:
        """int64 (batch,): length of each sequence."""
        return self.cu_seqlens.diff().to(torch.int64)

    @property
    def lens_if_ragged(self) -> Tensor | None:
        """`lens` of a padded layout; None where there are no pads."""
        return None if self.inverse is None else self.lens

    @property
    def mask(self) -> Tensor:
        """bool, of the leading shape: True at real positions."""
        if self.inverse is not None:
            return (self.inverse >= 0).view(self.shape)
        total = self.shape[0] * self.shape[1] if self.padded else self.shape[0]
        here = torch.arange(total, device=self.cu_seqlens.device) < self.cu_seqlens[-1]
        return here.view(self.shape)

    def pack(self, x: Tensor) -> Tensor:
        """(batch, length, ...) or jagged -> (total, ...). Pads are not read."""
        if x.is_nested:
            return x.values()
        if not self.padded:
            # A NaN in the tail would reach the weights: their gradient multiplies it by zero.
            return x.where(_like(self.mask, x), 0) if self.has_tail else x
        flat = x.flatten(0, 1)
        if self.index is None or self.inverse is None:
            return flat
        return _gather(flat, self.index, self.inverse)

    def unpack(self, packed: Tensor) -> Tensor:
        """(total, ...) -> the caller's form, with zeros at the pads."""
        if self.jagged:
            nested: Tensor = torch.nested.nested_tensor_from_jagged(packed, self.cu_seqlens)
            return nested
        if self.index is not None and self.inverse is not None:
            packed = _gather(packed, self.inverse, self.index)
        return packed.reshape(*self.shape, *packed.shape[1:]) if self.padded else packed


def layout_of(
    tokens: Tensor,
    lens: Tensor | Sequence[int] | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    static: bool = False,
) -> Layout:
    """The layout of `tokens`, checked.

    `static` keeps room for every pad, so that no shape depends on the lengths, and leaves no length
    to be read later.

    Raises:
        ValueError: both lens and cu_seqlens, or either of the wrong shape, dtype or (where that
            can be read without stopping a device) value; nested tokens with holes.
    """
    if not isinstance(tokens, Tensor):
        raise ValueError(f"tokens must be a tensor, got {type(tokens).__name__}")
    if tokens.is_nested:
        return _jagged_layout(tokens, lens is not None or cu_seqlens is not None)
    if lens is not None and cu_seqlens is not None:
        raise ValueError("lens and cu_seqlens exclude each other: pass one")
    if cu_seqlens is not None:
        return _packed_layout(tokens, _integers("cu_seqlens", cu_seqlens), static)
    if tokens.ndim != 3:
        raise ValueError(
            "tokens must have shape (batch, length, dim), or (total, dim) together with "
            f"cu_seqlens, got {tuple(tokens.shape)}"
        )
    batch, length = tokens.shape[:2]
    if lens is None:
        return Layout(cu_seqlens_of_rows(tokens), (batch, length))
    return _ragged_layout(tokens, _integers("lens", lens), static)


def layout_of_chunks(
    segmentation: Segmentation,
    outer: Layout,
    capped: bool,
    places: tuple[Tensor, Tensor] | None = None,
) -> Layout:
    """The layout of the chunks, in the form that the positions came in.

    `capped` says whether there was a limit on the chunks, so that slots may be empty. `places` are
    those of the chunks in padded rows and their inverse, if they are there already.
    """
    cu_chunks, chunks = segmentation.cu_chunks, segmentation.boundary_positions.shape[0]
    if not outer.padded:
        most = segmentation.most_chunks
        return Layout(cu_chunks, (chunks,), jagged=outer.jagged, has_tail=capped, max_seqlen=most)
    return _grid_layout(cu_chunks, segmentation.most_chunks, chunks, capped, places)


def _grid_layout(
    cu_seqlens: Tensor,
    length: int,
    total: int,
    static: bool = False,
    places: tuple[Tensor, Tensor] | None = None,
) -> Layout:
    """The layout of sequences of which each has a padded row of this length.

    `static` says that `total` is room, which may not be filled. `places` are what `padded_places`
    would give, if that is there already.
    """
    # A compiler does not know the sizes, and so not whether there are pads.
    if not static and not torch.compiler.is_compiling():
        shape = (cu_seqlens.shape[0] - 1, length)
        if shape[0] * shape[1] == total:
            return Layout(cu_seqlens, shape)
    index, inverse = places or padded_places(cu_seqlens, length, total)
    return Layout(cu_seqlens, (cu_seqlens.shape[0] - 1, length), index, inverse)


def padded_view(layout: Layout) -> Layout:
    """The padded layout of packed sequences. Reads the length of the longest one on the host."""
    longest = int(layout.lens.amax()) if layout.batch else 0
    return _grid_layout(layout.cu_seqlens, longest, layout.shape[0])


def _jagged_layout(tokens: Tensor, has_lengths_too: bool) -> Layout:
    if has_lengths_too:
        raise ValueError("tokens is a nested tensor: it holds its lengths, so pass no others")
    if tokens.layout != torch.jagged:
        raise ValueError(f"tokens must be a jagged nested tensor, got layout {tokens.layout}")
    values, offsets, lengths = tokens.values(), tokens.offsets(), tokens.lengths()  # type: ignore[attr-defined]  # jagged tensors only
    if lengths is not None:
        raise ValueError("tokens must be a nested tensor without holes between its sequences")
    return Layout(offsets, (values.shape[0],), jagged=True)


def _packed_layout(tokens: Tensor, cu_seqlens: Tensor, static: bool) -> Layout:
    check_cu_seqlens(cu_seqlens)
    if tokens.ndim != 2:
        raise ValueError(
            f"tokens must have shape (total, dim) with cu_seqlens, got {tuple(tokens.shape)}"
        )
    # A loose bound costs attention some empty programs, and a read would stop the host.
    max_seqlen = tokens.shape[0] if static else None
    if _readable(cu_seqlens):
        values = cu_seqlens.tolist()
        if values[0] != 0 or values != sorted(values) or values[-1] != tokens.shape[0]:
            raise ValueError(
                f"cu_seqlens must rise from 0 to {tokens.shape[0]}, the rows of tokens, "
                f"got {values}"
            )
        max_seqlen = max((end - start for start, end in pairwise(values)), default=0)
    return Layout(cu_seqlens.to(tokens.device), (tokens.shape[0],), max_seqlen=max_seqlen)


def _ragged_layout(tokens: Tensor, lens: Tensor, static: bool) -> Layout:
    batch, length = tokens.shape[:2]
    check_lens(lens, batch, length)
    cu_seqlens = cu_seqlens_from_lens(lens.to(tokens.device))
    total = batch * length if static else int(lens.sum())
    return _grid_layout(cu_seqlens, length, total, static)


def check_lens(lens: Tensor, batch: int, length: int) -> None:
    """Raise ValueError unless `lens` is int (batch,), in 0 .. length where that can be read."""
    if not isinstance(lens, Tensor):
        raise ValueError(f"lens must be a tensor, got {type(lens).__name__}")
    if lens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"lens must be int32 or int64, got {lens.dtype}")
    if lens.shape != (batch,):
        raise ValueError(f"lens must have shape ({batch},), got {tuple(lens.shape)}")
    if _readable(lens) and batch and not 0 <= int(lens.min()) <= int(lens.max()) <= length:
        raise ValueError(f"lens must be in 0 .. {length}, got {lens.tolist()}")


def _integers(name: str, values: Tensor | Sequence[int]) -> Tensor:
    """The values as an integer tensor."""
    if isinstance(values, Tensor) and values.dtype in (torch.int32, torch.int64):
        return values
    try:
        tensor = torch.as_tensor(values)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{name} must be integers, got {values!r}") from error
    if tensor.numel() == 0:
        return tensor.to(torch.int64)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{name} must be integers, got {tensor.dtype}")
    return tensor.to(torch.int64)


def same_rows(nested: Tensor, cu_seqlens: Tensor) -> bool:
    """Whether a jagged tensor has these row lengths, as far as that can be read."""
    offsets: Tensor = nested.offsets()  # type: ignore[attr-defined]  # jagged tensors only
    if offsets.shape != cu_seqlens.shape or not _readable(offsets):
        return offsets.shape == cu_seqlens.shape
    return torch.equal(offsets.to(torch.int64), cu_seqlens.to(torch.int64))


def _readable(values: Tensor) -> bool:
    """Whether reading them neither stops a device nor breaks a compiled graph."""
    return values.device.type == "cpu" and not torch.compiler.is_compiling()


def _like(mask: Tensor, x: Tensor) -> Tensor:
    """The mask with as many dimensions as x."""
    return mask.view(*mask.shape, *[1] * (x.ndim - mask.ndim))


def _gather(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """`gather_rows` for any number of trailing dimensions."""
    if x.ndim == 2:  # without views, of which each is a node of autograd
        return gather_rows(x, index, inverse)
    trailing = x.shape[1:]
    rows = gather_rows(x.reshape(x.shape[0], trailing.numel()), index, inverse)
    return rows.reshape(index.shape[0], *trailing)
