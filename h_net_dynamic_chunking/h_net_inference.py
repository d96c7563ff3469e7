"""HNet while decoding: the next position of every row, or several at once, from a cache.

One stage, for one position:

    encoded  = encoder(x)
    p, opens = router(encoded)                       against the key of the position before
    smoothed = smoothing(network(encoded))           only in the rows where opens
    output   = decoder(smoothed + residual)

`network` may be a stage again, so that it advances only for rows in which every stage around it
opened a chunk, and each row has its own position at every stage.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from h_net_dynamic_chunking import chunker_inference, step_module
from h_net_dynamic_chunking.boundary_masks import check_mask, check_masks, padded_masks
from h_net_dynamic_chunking.cache import ALL_ROWS, Positions, Rows, check_cache_class
from h_net_dynamic_chunking.chunker import DynamicSequenceChunker
from h_net_dynamic_chunking.chunker_inference import ChunkerCache, NewChunks, Routed
from h_net_dynamic_chunking.layout import Layout, check_lens, layout_of
from h_net_dynamic_chunking.ops.plain import parameter_of
from h_net_dynamic_chunking.outputs import hidden_states
from h_net_dynamic_chunking.sequence_module import unwrapped


@dataclass(eq=False)
class HNetCache:
    """What one stage, and all inside it, remember between steps."""

    positions: Positions
    """How many positions each row has seen at this stage."""
    chunker: ChunkerCache
    encoder: Any
    network: Any
    decoder: Any


class Decision(NamedTuple):
    """What the router of one stage decided while decoding."""

    probs: Tensor
    """float32 (rows,) after a step, else (rows, length): boundary probabilities; 0 where the stage
    saw no position."""
    boundary_mask: Tensor
    """bool, of the same shape: whether a chunk opened; False where the stage saw no position."""


@dataclass(frozen=True, eq=False)
class HNetStep:
    """What HNet returns for new positions of a sequence that it remembers."""

    output: Tensor
    """(rows, dim) after a step, else (rows, length, dim)."""
    stages: tuple[Decision, ...]
    """What each router decided, outermost first. After a step, the rows are those of the
    outermost stage; else the positions of a stage are the chunks of the one around it."""


class Entered(NamedTuple):
    """One position of each row on its way in, at one stage."""

    encoded: Tensor
    """(rows, dim): what the encoder made of it."""
    probs: Tensor
    """float32 (rows,): probability that it opens a chunk."""
    opens: Tensor
    """bool (rows,): whether it does."""


class HNetInference(nn.Module):
    """The decoding of an HNet, which says what the parts are."""

    encoder: nn.Module
    network: nn.Module
    decoder: nn.Module
    chunker: DynamicSequenceChunker
    width_in: nn.Module
    width_out: nn.Module

    @property
    def num_stages(self) -> int:
        """How many stages there are: this one and those inside it."""
        return 1 + (0 if self._inner is None else self._inner.num_stages)

    @property
    def _inner(self) -> "HNetInference | None":
        """The network, if it is a stage again, whatever wraps it."""
        network = unwrapped(self.network)
        return network if isinstance(network, HNetInference) else None

    def allocate_inference_cache(
        self,
        batch_size: int,
        max_seqlen: int,
        dtype: torch.dtype | None = None,
        state_dtype: torch.dtype | None = None,
    ) -> HNetCache:
        """A cache for `step` and `extend` before the first position.

        Args:
            batch_size: rows, each with its own position at every stage.
            max_seqlen: positions that a row may have at this stage. Inside, caches grow with the
                chunks that are really made.
            dtype: of the tokens to come; that of the weights if None.
            state_dtype: for parts that name it in their own method: in what the states of
                recurrences are kept; see `HNetLM.allocate_inference_cache`.

        Raises:
            ValueError: a size below 1, a dtype that is none of floats, a state_dtype that cannot
                be, a part that cannot decode, or a chunker whose options look ahead.
        """
        for name, size in (("batch_size", batch_size), ("max_seqlen", max_seqlen)):
            if type(size) is not int or size < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {size!r}")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"dtype must be a floating-point torch.dtype or None, got {dtype!r}")
        sizes = (batch_size, max_seqlen, dtype, state_dtype)
        seen = torch.zeros(batch_size, dtype=torch.int64, device=self._device)
        return HNetCache(
            positions=Positions(seen, max_seqlen),
            chunker=chunker_inference.allocate_chunker_cache(self.chunker, batch_size, dtype),
            encoder=step_module.allocate("encoder", self.encoder, *sizes),
            network=step_module.allocate("network", self.network, *sizes),
            decoder=step_module.allocate("decoder", self.decoder, *sizes),
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
        """Raise ValueError unless the cache is one of this HNet for that batch and dtype of x.

        And unless it has room for `new` more positions of these rows, or lens[r] of row r.
        """
        check_cache_class(cache, HNetCache, self)
        encoded = chunker_inference.seen_dtype(self.chunker, dtype)
        chunker_inference.check_chunker_cache(self.chunker, cache.chunker, batch_size, encoded)
        cache.positions.check_room(new, rows, lens)
        # The parts need no room of their own: no stage sees more positions than this one.
        for name, seen in (("encoder", dtype), ("network", encoded), ("decoder", encoded)):
            module, part = getattr(self, name), getattr(cache, name)
            step_module.check_cache(name, module, part, batch_size, seen, 0)

    @torch.no_grad()
    def step(
        self,
        x: Tensor,
        cache: HNetCache,
        rows: Rows = ALL_ROWS,
        *,
        masked: bool = False,
        boundary_masks: Sequence[Tensor | None] = (),
    ) -> HNetStep:
        """The next position of every row; updates `cache` in place. No gradients.

        Args:
            x: (rows, dim).
            cache: of `allocate_inference_cache`.
            rows: which rows of the cache these are; see `cache.Rows`.
            masked: run the network for all rows, and let only those change that opened a chunk:
                static shapes, and no host read. By default the rows that did are gathered.
            boundary_masks: bool (rows,) for each stage, outermost first: boundaries to use in place
                of the router's.

        Raises:
            ValueError: x, masks or a cache that do not fit. Nothing has changed then.
        """
        _check_ndim(x, 2, "(rows, dim)")
        check_masks(boundary_masks, self.num_stages, x.shape[:1], x.shape[:1])
        rows = self._checked(x, cache, 1, rows, None)
        return self._step_stage(x, cache, rows, masked, boundary_masks)

    def _step_stage(
        self,
        x: Tensor,
        cache: HNetCache,
        rows: Rows,
        masked: bool,
        boundary_masks: Sequence[Tensor | None],
    ) -> HNetStep:
        here, *deeper = boundary_masks or (None,)
        entered = self.enter(x, cache, rows, here)
        z, inner = self._step_chunks(entered, cache.network, rows, masked, deeper)
        decoded = self.leave(z, entered, cache, rows)
        return HNetStep(decoded, (Decision(entered.probs, entered.opens), *inner))

    def enter(self, x: Tensor, cache: HNetCache, rows: Rows, given: Tensor | None) -> Entered:
        """The way in, for one position of each row."""
        encoded = self.encode(x, cache, rows)
        probs, opens = chunker_inference.route_step(
            self.chunker, encoded, cache.chunker, cache.positions, rows, given
        )
        return Entered(encoded, probs, opens)

    def encode(self, x: Tensor, cache: HNetCache, rows: Rows) -> Tensor:
        """(rows, dim): what the encoder makes of one position of each row, for the router."""
        encoded = self._step("encoder", x, cache.encoder, rows)
        chunker_inference.check_encoded(self.chunker, encoded)
        return encoded

    def chunks(self, entered: Entered) -> Tensor:
        """(rows, dim_inner): what goes on to the network, in the rows that opened a chunk."""
        chunks = entered.encoded
        if self.chunker.multiply_by_prob:
            chunks = chunks * entered.probs[:, None].to(chunks.dtype)
        inner: Tensor = self.width_in(chunks)
        return inner

    def leave(self, z: Tensor | None, entered: Entered, cache: HNetCache, rows: Rows) -> Tensor:
        """The way out; z (rows, dim_inner) is what the network made of the chunks that opened.

        None where none did.
        """
        expanded = chunker_inference.upsample_step(
            self.chunker,
            entered.encoded if z is None else self.width_out(z),
            Routed(entered.probs, entered.opens),
            entered.encoded,
            cache.chunker,
            rows,
        )
        return self._step("decoder", expanded, cache.decoder, rows)

    def _step_chunks(
        self,
        entered: Entered,
        cache: Any,
        rows: Rows,
        masked: bool,
        boundary_masks: Sequence[Tensor | None],
    ) -> tuple[Tensor, tuple[Decision, ...]]:
        """What the network makes of the chunks (rows, dim_inner), and what it decided."""
        opens, chunks = entered.opens, self.chunks(entered)
        if masked:
            return self._step_network(chunks, cache, rows.only(opens), True, boundary_masks)
        chosen = opens.nonzero().flatten()  # the host read of the compact plan
        if len(chosen) == len(opens):
            return self._step_network(chunks, cache, rows, False, boundary_masks)
        if not len(chosen):
            return torch.zeros_like(chunks), self._no_decisions(opens.shape, entered.probs)
        masks = [None if mask is None else mask[chosen] for mask in boundary_masks]
        some, stages = self._step_network(chunks[chosen], cache, rows.among(chosen), False, masks)
        z = some.new_zeros(chunks.shape).index_copy_(0, chosen, some)
        return z, tuple(spread(stage, chosen, len(opens)) for stage in stages)

    def _step_network(
        self,
        chunks: Tensor,
        cache: Any,
        rows: Rows,
        masked: bool,
        boundary_masks: Sequence[Tensor | None],
    ) -> tuple[Tensor, tuple[Decision, ...]]:
        inner = self._inner
        if inner is None:
            return self._step("network", chunks, cache, rows), ()
        result = inner._step_stage(chunks, cache, rows, masked, boundary_masks)
        return result.output, result.stages

    @torch.no_grad()
    def extend(
        self,
        x: Tensor,
        cache: HNetCache,
        lens: Tensor | None = None,
        rows: Rows = ALL_ROWS,
        *,
        boundary_masks: Sequence[Tensor | None] = (),
    ) -> HNetStep:
        """The next positions of every row at once; updates `cache` in place. No gradients.

        Args:
            x: (rows, length, dim). What stands at pads is not used, and means nothing in the
                output.
            cache: of `allocate_inference_cache`.
            lens: int (rows,): positions of each row, on the left; None: all have `length`.
            rows: which rows of the cache these are; see `cache.Rows`.
            boundary_masks: bool (rows, length) for each stage, as in `forward`; of stages inside,
                where lengths are counts of chunks, also packed (chunks,).

        Raises:
            ValueError: x, lens, masks or a cache that do not fit. Nothing has changed then; but
                whether the mask of a stage inside is as long as its positions shows only when
                these are there, and the cache is of no use after that.
        """
        _check_ndim(x, 3, "(rows, length, dim)")
        if lens is not None:
            check_lens(lens, *x.shape[:2])
        check_masks(boundary_masks, self.num_stages, x.shape[:2])
        rows = self._checked(x, cache, x.shape[1], rows, lens)
        if x.shape[1] == 0:
            nothing = x.new_zeros(x.shape[:2], dtype=torch.float32)
            return HNetStep(x, (Decision(nothing, nothing.bool()),) * self.num_stages)
        return self.extend_stage(x, cache, layout_of(x, lens), rows, boundary_masks)

    def extend_stage(
        self,
        x: Tensor,
        cache: HNetCache,
        layout: Layout,
        rows: Rows,
        boundary_masks: Sequence[Tensor | None],
    ) -> HNetStep:
        """`extend` for x of a padded layout that is known, and what fits together, as checked."""
        here, *deeper = boundary_masks or (None,)
        check_mask(here, layout.shape)
        lens = layout.lens_if_ragged
        x = x if lens is None else x.where(layout.mask[..., None], 0)
        encoded = self._extend("encoder", x, cache.encoder, lens, rows)
        chunker_inference.check_encoded(self.chunker, encoded)
        new = chunker_inference.open_chunks(
            self.chunker,
            encoded,
            layout,
            cache.chunker,
            rows,
            here,
            from_start=cache.positions.bound == 0,
        )
        z, inner = self._extend_network(new, cache, rows, deeper)
        decoded = self._extend("decoder", new.upsample(z), cache.decoder, lens, rows)
        cache.positions.advance(x.shape[1] if lens is None else lens, x.shape[1], rows)
        return HNetStep(decoded, (Decision(*new.routed), *inner))

    def _extend_network(
        self,
        new: NewChunks,
        cache: HNetCache,
        rows: Rows,
        boundary_masks: Sequence[Tensor | None],
    ) -> tuple[Tensor, tuple[Decision, ...]]:
        """What the network makes of the new chunks, packed (chunks, dim), and what it decided."""
        chunks, layout = new.vectors, new.layout
        if not len(chunks):
            probs = new.routed.probs
            return chunks, self._no_decisions((len(probs), 0), probs)
        if boundary_masks and boundary_masks[0] is not None and boundary_masks[0].ndim == 1:
            packed = Layout(layout.cu_seqlens, (len(chunks),))
            boundary_masks = padded_masks(boundary_masks, packed, layout)
        chunks = layout.unpack(self.width_in(chunks))
        stages: tuple[Decision, ...] = ()
        inner = self._inner
        if inner is not None:
            result = inner.extend_stage(chunks, cache.network, layout, rows, boundary_masks)
            stages, z = result.stages, result.output
        else:
            z = self._extend("network", chunks, cache.network, layout.lens_if_ragged, rows)
        return self.width_out(layout.pack(z)), stages

    def _step(self, name: str, x: Tensor, cache: Any, rows: Rows) -> Tensor:
        return hidden_states(step_module.step(name, getattr(self, name), x, cache, rows), name)

    def _extend(self, name: str, x: Tensor, cache: Any, lens: Tensor | None, rows: Rows) -> Tensor:
        module = getattr(self, name)
        return hidden_states(step_module.extend(name, module, x, cache, lens, rows), name)

    def _no_decisions(self, shape: Sequence[int], probs: Tensor) -> tuple[Decision, ...]:
        """For the stages inside, where none of them saw a position."""
        nothing = probs.new_zeros(shape)
        return (Decision(nothing, nothing.bool()),) * (self.num_stages - 1)

    def _checked(
        self, x: Tensor, cache: HNetCache, new: int, rows: Rows, lens: Tensor | None
    ) -> Rows:
        """The rows, for the parts, which need not look at their caches again."""
        if rows.checked:
            return rows
        check_cache_class(cache, HNetCache, self)
        batch_size = x.shape[0] if rows.index is None else cache.positions.seen.shape[0]
        self.check_inference_cache(cache, batch_size, x.dtype, new, rows, lens)
        return replace(rows, checked=True)

    @property
    def _device(self) -> torch.device:
        return parameter_of(self.chunker.to_queries_keys).device


def stages_of(backbone: Any, cache: Any) -> list[tuple[HNetInference, HNetCache]]:
    """The stages of a backbone that have a chunker, and their caches, outermost first."""
    stages = []
    while isinstance(backbone, HNetInference):
        stages.append((backbone, cache))
        backbone, cache = unwrapped(backbone.network), cache.network
    return stages


def spread(decision: Decision, index: Tensor, count: int) -> Decision:
    """The decision of the rows `index`, int64, among `count`."""
    probs, boundary_mask = (part.new_zeros(count).index_copy_(0, index, part) for part in decision)
    return Decision(probs, boundary_mask)


def _check_ndim(x: Tensor, ndim: int, wanted: str) -> None:
    if x.ndim != ndim:
        raise ValueError(f"x must have shape {wanted}, got {tuple(x.shape)}")
