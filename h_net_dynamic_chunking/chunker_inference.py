"""The chunker while decoding: the next positions of every row, from what it remembers.

    route       eq. (4), against the key of the position before: which positions open a chunk?
    upsample    eq. (3) and (5) to (8): smoothing from the last chunk on, expansion, residual

Each for any number of positions of each row, which `open_chunks` puts together, and as `_step` for
one, with kernels of its own.

The inner network runs between routing and smoothing, on the chunks that were opened. Numbers are
those of `DynamicSequenceChunker.forward` over whole sequences.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from h_net_dynamic_chunking.cache import Positions, Rows, check_cache_class, check_cache_tensor
from h_net_dynamic_chunking.chunker import DynamicSequenceChunker
from h_net_dynamic_chunking.layout import Layout, layout_of_chunks, padded_view
from h_net_dynamic_chunking.ops import boundary_probability_step, ema_smooth, ema_smooth_step
from h_net_dynamic_chunking.ops.expansion import expand, expand_step
from h_net_dynamic_chunking.ops.packing import accumulation_dtype, cu_seqlens_from_lens
from h_net_dynamic_chunking.ops.plain import parameter_of
from h_net_dynamic_chunking.step_kernels import fits_step_kernels, linear_by_kernel

if TYPE_CHECKING:
    from h_net_dynamic_chunking.ops._triton.keep_step import Keep


@dataclass(eq=False)
class ChunkerCache:
    """What the positions so far leave to the next one."""

    previous_key: Tensor
    """(batch, dim_queries_keys): the key of the last position."""
    smoothed: Tensor
    """float32 or float64 (batch, dim): the smoothed vector of the current chunk."""
    chunks: Tensor
    """int64 (batch,): chunks so far; 0 before the first position."""


class Routed(NamedTuple):
    """Where chunks open."""

    probs: Tensor
    """float32 (rows, length): boundary probabilities; 0 at pads and in rows at rest."""
    opens: Tensor
    """bool (rows, length): whether a chunk opens there; False at pads and in rows at rest."""


def allocate_chunker_cache(
    chunker: DynamicSequenceChunker, batch_size: int, dtype: torch.dtype | None
) -> ChunkerCache:
    """A cache before the first position.

    Raises:
        ValueError: an option of the chunker that looks ahead, or pools over positions.
    """
    if chunker.pool != "select":
        raise ValueError(f"pool must be 'select' to decode, got {chunker.pool!r}")
    if chunker.length_embed is not None:
        raise ValueError(
            "embed_chunk_lens must be False to decode: a chunk's length is known only at its end"
        )
    weight = parameter_of(chunker.to_queries_keys)
    dtype = dtype or weight.dtype
    return ChunkerCache(
        previous_key=weight.new_zeros(batch_size, chunker.dim_queries_keys, dtype=dtype),
        smoothed=weight.new_zeros(batch_size, chunker.dim, dtype=accumulation_dtype(dtype)),
        chunks=weight.new_zeros(batch_size, dtype=torch.int64),
    )


def seen_dtype(chunker: DynamicSequenceChunker, dtype: torch.dtype) -> torch.dtype:
    """The dtype of what the chunker sees in a stage whose input has `dtype`.

    It takes that of its weights only, which an encoder of another dtype must lead to; autocast
    leaves any.
    """
    weight = parameter_of(chunker.to_queries_keys)
    return dtype if torch.is_autocast_enabled(weight.device.type) else weight.dtype


def check_encoded(chunker: DynamicSequenceChunker, encoded: Tensor) -> None:
    """Raise ValueError unless the chunker takes the dtype of what the encoder returned."""
    wanted = seen_dtype(chunker, encoded.dtype)
    if encoded.dtype != wanted:
        raise ValueError(f"encoder must return {wanted}, as the chunker, got {encoded.dtype}")


def check_chunker_cache(
    chunker: DynamicSequenceChunker, cache: object, batch_size: int, dtype: torch.dtype
) -> None:
    """Raise ValueError unless the cache is one of this chunker for that batch.

    dtype: of what the encoder makes of the positions; see `seen_dtype`.
    """
    check_cache_class(cache, ChunkerCache, chunker)
    assert isinstance(cache, ChunkerCache)
    weight = parameter_of(chunker.to_queries_keys)
    wide, device = accumulation_dtype(dtype), weight.device
    key_shape, smoothed_shape = (batch_size, chunker.dim_queries_keys), (batch_size, chunker.dim)
    check_cache_tensor("previous_key", cache.previous_key, key_shape, dtype, device)
    check_cache_tensor("smoothed", cache.smoothed, smoothed_shape, wide, device)


class NewChunks(NamedTuple):
    """What some positions of each row open, on its way to the network and back."""

    routed: Routed
    vectors: Tensor
    """(chunks, dim): of all rows, packed."""
    layout: Layout
    """Padded: of the chunks."""
    upsample: Callable[[Tensor], Tensor]
    """From what the network made of them, (chunks, dim), to what goes to the decoder, (rows,
    length, dim). Call it once: the cache remembers the last of each row."""


def open_chunks(
    chunker: DynamicSequenceChunker,
    x: Tensor,
    layout: Layout,
    cache: ChunkerCache,
    rows: Rows,
    given: Tensor | None,
    *,
    from_start: bool,
) -> NewChunks:
    """Cut the next positions x (rows, length, dim), length >= 1; updates `cache` in place.

    Args:
        chunker: whose projections and threshold.
        x: what the encoder made of the positions.
        layout: of x.
        cache: of the chunker.
        rows: of the cache.
        given: bool (rows, length): boundaries to use in place of the router's.
        from_start: whether it is known that no row has seen a position before. Then all is as in
            the chunker's own forward, and on its kernels.
    """
    if from_start and rows.index is None and rows.active is None and chunker.max_chunks is None:
        return _start(chunker, x, layout, cache, given)
    routed = route(chunker, x, cache, layout.lens_if_ragged, rows, given)
    probs, opens = routed
    vectors = x[opens]  # the host read
    if chunker.multiply_by_prob:
        vectors = vectors * probs[opens][:, None].to(vectors.dtype)
    cu_chunks = cu_seqlens_from_lens(opens.sum(1))
    chunk_layout = padded_view(Layout(cu_chunks, (len(vectors),)))
    return NewChunks(
        routed,
        vectors,
        chunk_layout,
        lambda z: upsample(chunker, z, routed, x, cache, rows),
    )


def _start(
    chunker: DynamicSequenceChunker,
    x: Tensor,
    layout: Layout,
    cache: ChunkerCache,
    given: Tensor | None,
) -> NewChunks:
    """`open_chunks` where all rows begin."""
    packed, queries_keys, probs, pending, _ = chunker.route(x, layout, given, with_keys=True)
    assert queries_keys is not None
    ahead = chunker.select_ahead(packed, pending)
    _remember_keys(queries_keys.chunk(2, dim=-1)[1], layout, cache)
    segmentation = pending.finish()
    vectors = chunker.downsample(packed, probs, segmentation, layout.cu_seqlens, ahead)
    cache.chunks.copy_(segmentation.cu_chunks.diff())

    def to_positions(z: Tensor) -> Tensor:
        smoothed, last = ema_smooth(
            z.to(cache.smoothed.dtype),
            _weights(chunker, segmentation.at_boundaries(probs)),
            segmentation.cu_chunks,
            weigh_input=_weighs(chunker),
        )
        cache.smoothed.copy_(last)
        residual = None if chunker.residual_proj is None else chunker.residual(packed)
        expanded = expand(smoothed, segmentation.chunk_of_position, residual=residual)
        return layout.unpack(expanded.to(x.dtype))

    routed = Routed(layout.unpack(probs), layout.unpack(segmentation.boundary_mask))
    chunk_layout = layout_of_chunks(segmentation, layout, capped=False)
    return NewChunks(routed, vectors, chunk_layout, to_positions)


def _remember_keys(keys: Tensor, layout: Layout, cache: ChunkerCache) -> None:
    """The last key of each row that has one; keys are packed (total, dim)."""
    if layout.inverse is None:
        cache.previous_key.copy_(keys.view(*layout.shape, -1)[:, -1])
    elif len(keys):
        last = keys[(layout.cu_seqlens[1:] - 1).clamp(min=0)].to(cache.previous_key.dtype)
        has_one = (layout.lens > 0)[:, None]
        cache.previous_key.copy_(last.where(has_one, cache.previous_key))


def route(
    chunker: DynamicSequenceChunker,
    x: Tensor,
    cache: ChunkerCache,
    lens: Tensor | None,
    rows: Rows,
    given: Tensor | None = None,
) -> Routed:
    """Decide for the next positions x (rows, length, dim), length >= 1, and remember the last key.

    Args:
        chunker: whose projections and threshold.
        x: what the encoder made of the positions.
        cache: of the chunker; changes in place.
        lens: int (rows,): positions of each row, on the left; None: all have `length`.
        rows: of the cache.
        given: bool (rows, length): boundaries to use in place of the router's.
    """
    length = x.shape[1]
    queries, keys = chunker.to_queries_keys(x).chunk(2, dim=-1)
    opened = rows.read(cache.chunks)
    starts = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    starts[:, 0] = opened == 0
    before = torch.cat((rows.read(cache.previous_key)[:, None].to(keys.dtype), keys[:, :-1]), 1)
    if chunker.start_key is not None:
        before = torch.where(starts[..., None], chunker.start_key.to(keys.dtype), before)
    probs = boundary_probability_step(
        queries, before, starts if chunker.start_key is None else None
    )
    opens = (probs > chunker.boundary_threshold if given is None else given) | starts
    if lens is not None:
        real = torch.arange(length, device=x.device) < lens[:, None]
        probs, opens = probs.where(real, 0), opens & real
    if rows.active is not None:
        at_work = rows.active[:, None]
        probs, opens = probs.where(at_work, 0), opens & at_work
    if chunker.max_chunks is not None:
        opens = opens & (opened[:, None] + opens.cumsum(1) <= chunker.max_chunks)

    if lens is None:
        rows.write(cache.previous_key, keys[:, -1])
    else:
        last = (lens - 1).clamp(min=0)[:, None, None].expand(-1, 1, keys.shape[-1])
        rows.only(lens > 0).write(cache.previous_key, keys.gather(1, last)[:, 0])
    rows.write(cache.chunks, opened + opens.sum(1))
    return Routed(probs, opens)


def route_step(
    chunker: DynamicSequenceChunker,
    x: Tensor,
    cache: ChunkerCache,
    positions: Positions,
    rows: Rows,
    given: Tensor | None = None,
) -> Routed:
    """`route` for one position of each row, which it counts.

    x is (rows, dim), given and results are (rows,).
    """
    if not routes_by_kernel(chunker, x, rows):
        given = None if given is None else given[:, None]
        probs, opens = route(chunker, x[:, None], cache, None, rows, given)
        positions.advance(1, 1, rows)
        return Routed(probs[:, 0], opens[:, 0])
    return Routed(*route_by_kernel(chunker, x, cache, positions, rows, given))


def routes_by_kernel(chunker: DynamicSequenceChunker, x: Tensor, rows: Rows) -> bool:
    """Whether `route_step` of x (rows, dim) is one kernel behind its projection."""
    plain = chunker.start_key is None and chunker.max_chunks is None
    return plain and fits_step_kernels(x, parameter_of(chunker.to_queries_keys), rows)


def route_by_kernel(
    chunker: DynamicSequenceChunker,
    x: Tensor,
    cache: ChunkerCache,
    positions: Positions,
    rows: Rows,
    given: Tensor | None = None,
    keep: "Keep | None" = None,
) -> tuple[Tensor, Tensor]:
    """That kernel, which may also keep rows that wait; see there."""
    from h_net_dynamic_chunking.ops._triton.route_step import route_step

    positions.bound += 1
    queries_keys = linear_by_kernel(x, chunker.to_queries_keys)
    return route_step(
        chunker.to_queries_keys(x) if queries_keys is None else queries_keys,
        cache.previous_key,
        cache.chunks,
        positions.seen,
        chunker.boundary_threshold,
        rows.active,
        given,
        keep,
    )


def upsample_step(
    chunker: DynamicSequenceChunker,
    z: Tensor,
    routed: Routed,
    x: Tensor,
    cache: ChunkerCache,
    rows: Rows,
) -> Tensor:
    """What goes to the decoder for one position of each row: (rows, dim) in x's dtype.

    z:  (rows, dim): the new chunks; read only in the rows that opened one
    x:  (rows, dim): what the encoder made of the position
    """
    probs, opens = routed
    if not fits_step_kernels(x, parameter_of(chunker.to_queries_keys), rows):
        opening, old = rows.only(opens), rows.read(cache.smoothed)
        weights = _weights(chunker, probs)
        opening.write(
            cache.smoothed, ema_smooth_step(z, weights, old, weigh_input=_weighs(chunker))
        )
        return _add_residual(chunker, rows.read(cache.smoothed), x)
    from h_net_dynamic_chunking.ops._triton.dechunk_step import dechunk_step

    residual = None
    if chunker.residual_proj is not None:
        residual = linear_by_kernel(x, chunker.residual_proj, torch.float32)
        residual = chunker.residual(x) if residual is None else residual
    return dechunk_step(
        z,
        cache.smoothed,
        probs,
        opens,
        residual,
        x.dtype,
        clamp=chunker.smoothing_clamp,
        weigh_input=_weighs(chunker),
    )


def upsample(
    chunker: DynamicSequenceChunker,
    z: Tensor,
    routed: Routed,
    x: Tensor,
    cache: ChunkerCache,
    rows: Rows,
) -> Tensor:
    """What goes to the decoder for the next positions: (rows, length, dim) in x's dtype.

    z:  (chunks, dim): the new chunks of all rows, packed
    x:  (rows, length, dim): what the encoder made of the positions
    """
    smoothed = _smooth_and_repeat(chunker, z, routed, cache, rows)
    return _add_residual(chunker, smoothed, x)


def _smooth_and_repeat(
    chunker: DynamicSequenceChunker,
    z: Tensor,
    routed: Routed,
    cache: ChunkerCache,
    rows: Rows,
) -> Tensor:
    """Eq. (5) and (8): (rows, length, dim) in the dtype of the cache.

    Positions before the first new chunk of a row are still in its old one.
    """
    probs, opens = routed
    opened = opens.cumsum(1)
    cu_chunks = torch.nn.functional.pad(opened[:, -1].cumsum(0), (1, 0))
    old = rows.read(cache.smoothed)
    smoothed, last = ema_smooth(
        z.to(old.dtype),
        _weights(chunker, probs[opens]),
        cu_chunks,
        old,
        weigh_input=_weighs(chunker),
    )
    row = torch.arange(len(old), device=z.device)[:, None]
    newest = len(old) + cu_chunks[:-1, None] + opened - 1
    repeated = torch.cat((old, smoothed))[newest.where(opened > 0, row)]
    rows.write(cache.smoothed, last)
    return repeated


def _add_residual(chunker: DynamicSequenceChunker, smoothed: Tensor, x: Tensor) -> Tensor:
    """Smoothed chunks (..., dim) and the projection of what the encoder made, in x's dtype."""
    residual = None if chunker.residual_proj is None else chunker.residual(x)
    return expand_step(smoothed, residual).to(x.dtype)


def _weights(chunker: DynamicSequenceChunker, probs: Tensor) -> Tensor:
    """What the smoothing takes for P: the probabilities of the chunks, clamped if asked."""
    clamp = chunker.smoothing_clamp
    return probs if clamp is None else probs.clamp(clamp, 1 - clamp)


def _weighs(chunker: DynamicSequenceChunker) -> bool:
    """Whether the smoothing multiplies a new chunk by its probability."""
    return not chunker.multiply_by_prob
