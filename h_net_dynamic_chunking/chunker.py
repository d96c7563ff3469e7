"""DynamicSequenceChunker: route, keep the boundaries, hand back the way up.

The dynamic chunking layer of the H-Net (arXiv 2507.07955, sections 2.2 and 2.3) around any inner
network. Defaults are the paper's; what departs from it is an option that is off.
"""

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor, nn

from h_net_dynamic_chunking.intermediates import Intermediates
from h_net_dynamic_chunking.layout import Layout, layout_of, layout_of_chunks, same_rows
from h_net_dynamic_chunking.losses import ratio_loss
from h_net_dynamic_chunking.ops import (
    Segmentation,
    begin_segment,
    boundary_probability_of_pairs,
    dechunk,
)
from h_net_dynamic_chunking.ops.compaction import PendingSegmentation, begin_segment_above
from h_net_dynamic_chunking.ops.grid import ChunkGrid, grid_ahead
from h_net_dynamic_chunking.ops.packing import accumulation_dtype
from h_net_dynamic_chunking.ops.plain import is_plain, parameter_of
from h_net_dynamic_chunking.ops.ratio import pooled_ratio_loss
from h_net_dynamic_chunking.ops.routing import Routing, routed
from h_net_dynamic_chunking.ops.wide_linear import wide_linear
from h_net_dynamic_chunking.outputs import Outputs, hidden_states
from h_net_dynamic_chunking.pooling import Pool, pool_groups


class DynamicSequenceChunker(nn.Module):
    """Cuts sequences into chunks where neighbours differ, and learns where. Paper, section 2.2.

    Args:
        dim: Width of the tokens.
        dim_queries_keys: Width of the routing projections; `dim` by default.
        boundary_threshold: A boundary needs a probability strictly above it; in (0, 1).
        target_avg_token_length: N of the ratio loss, eq. (10): positions per chunk; above 1.
        ratio_loss_weight: alpha of the ratio loss.
        handle_residual_proj: Add a projection of the tokens on the way up, eq. (3). It starts at
            zero and is computed in float32.
        max_chunks: Chunks a sequence may have, first come first served; what does not fit joins
            the last chunk. Gives static shapes and reads nothing on the host. Room for so many is
            paid for in each sequence, used or not. None: no limit.
        pool: "select" keeps the vector at the boundary; "mean" and "max" pool the positions behind
            the boundary before, up to this one (appendix E.1).
        ratio_loss_per_sequence: Evaluate the ratio loss for each sequence and average, where the
            default pools the whole batch.
        learn_start_key: Compare the first position with a learned key. It is a boundary all the
            same, but with a probability below 1 that shrinks the first chunk.
        learning_rate_difference: Scale the gradient of what comes up by this factor, and that of
            what goes down by its inverse. Parameter groups are the better tool.
        straight_through_frac_vecs: F of the ratio loss takes a gradient, through
            sigmoid(p - boundary_threshold).
        embed_chunk_lens: Add an embedding of the length of each chunk to its vector. Not causal:
            the length of a chunk is known only at its end.
        smoothing_clamp: The smoothing, and nothing else, clamps probabilities to [c, 1 - c]; the
            official code has 1e-4. None for the paper's formula.
        multiply_by_prob: Send each chunk inwards multiplied by its probability; the smoothing then
            adds what comes back as it is.

    `learn_start_key` to `embed_chunk_lens`, and `multiply_by_prob`, are options of the chunker that
    is published under this package's name.

    Raises:
        ValueError: an argument out of its range.

    >>> downsampled, upsample, aux_loss = DynamicSequenceChunker(8)(torch.randn(2, 16, 8))
    >>> upsample(downsampled).shape
    torch.Size([2, 16, 8])
    """

    def __init__(
        self,
        dim: int,
        *,
        dim_queries_keys: int | None = None,
        boundary_threshold: float = 0.5,
        target_avg_token_length: float = 6.0,
        ratio_loss_weight: float = 3e-2,
        handle_residual_proj: bool = False,
        max_chunks: int | None = None,
        pool: Pool = "select",
        ratio_loss_per_sequence: bool = False,
        learn_start_key: bool = False,
        learning_rate_difference: float = 1.0,
        straight_through_frac_vecs: bool = False,
        embed_chunk_lens: bool = False,
        smoothing_clamp: float | None = None,
        multiply_by_prob: bool = False,
    ) -> None:
        super().__init__()
        dim_queries_keys = dim if dim_queries_keys is None else dim_queries_keys
        for name, value in (
            ("dim", dim),
            ("dim_queries_keys", dim_queries_keys),
            ("max_chunks", 1 if max_chunks is None else max_chunks),
        ):
            _require(type(value) is int and value >= 1, name, "an integer of at least 1", value)
        _require(pool in get_args(Pool), "pool", f"one of {get_args(Pool)}", pool)
        _require_number("boundary_threshold", boundary_threshold, lambda x: 0 < x < 1, "in (0, 1)")
        _require_number(
            "target_avg_token_length",
            target_avg_token_length,
            lambda x: 1 < x < math.inf,
            "above 1 and finite",
        )
        _require_number(
            "ratio_loss_weight",
            ratio_loss_weight,
            lambda x: 0 <= x < math.inf,
            "at least 0 and finite",
        )
        _require_number(
            "learning_rate_difference",
            learning_rate_difference,
            lambda x: 0 < x < math.inf,
            "above 0 and finite",
        )
        if smoothing_clamp is not None:
            _require_number(
                "smoothing_clamp", smoothing_clamp, lambda x: 0 <= x < 0.5, "None or in [0, 0.5)"
            )
        self.dim = dim
        self.dim_queries_keys = dim_queries_keys
        self.boundary_threshold = boundary_threshold
        self.target_avg_token_length = target_avg_token_length
        self.ratio_loss_weight = ratio_loss_weight
        self.max_chunks = max_chunks
        self.pool = pool
        self.ratio_loss_per_sequence = ratio_loss_per_sequence
        self.learning_rate_difference = learning_rate_difference
        self.straight_through_frac_vecs = straight_through_frac_vecs
        self.smoothing_clamp = smoothing_clamp
        self.multiply_by_prob = multiply_by_prob

        # One projection for both: the first half of its rows makes queries, the second keys.
        self.to_queries_keys = nn.Linear(dim, 2 * dim_queries_keys, bias=False)
        self.residual_proj = nn.Linear(dim, dim) if handle_residual_proj else None
        self.start_key = (
            nn.Parameter(torch.randn(dim_queries_keys) * 1e-2) if learn_start_key else None
        )
        self.length_embed = (
            nn.Sequential(nn.Linear(1, dim), nn.SiLU(), nn.Linear(dim, dim))
            if embed_chunk_lens
            else None
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Queries and keys start as the tokens themselves, and the residual at zero.

        So p starts as the plain cosine distance of neighbours. Where the projections are narrower
        than the tokens, both start as one random projection, which keeps angles on average.
        """
        queries, keys = self.to_queries_keys.weight.chunk(2)
        if len(queries) >= self.dim:
            nn.init.eye_(queries)
        else:
            nn.init.orthogonal_(queries)
        keys.copy_(queries)
        if self.residual_proj is not None:
            nn.init.zeros_(self.residual_proj.weight)
            nn.init.zeros_(self.residual_proj.bias)

    @overload
    def forward(
        self,
        tokens: Tensor,
        lens: Tensor | Sequence[int] | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        boundary_mask: Tensor | None = None,
        return_intermediates: Literal[False] = False,
        return_only_chunk_lens: Literal[False] = False,
    ) -> Outputs: ...

    @overload
    def forward(
        self,
        tokens: Tensor,
        lens: Tensor | Sequence[int] | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        boundary_mask: Tensor | None = None,
        return_intermediates: Literal[True],
        return_only_chunk_lens: Literal[False] = False,
    ) -> tuple[Outputs, Intermediates]: ...

    @overload
    def forward(
        self,
        tokens: Tensor,
        lens: Tensor | Sequence[int] | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        boundary_mask: Tensor | None = None,
        return_intermediates: bool = False,
        return_only_chunk_lens: Literal[True],
    ) -> Tensor: ...

    def forward(
        self,
        tokens: Tensor,
        lens: Tensor | Sequence[int] | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        boundary_mask: Tensor | None = None,
        return_intermediates: bool = False,
        return_only_chunk_lens: bool = False,
    ) -> Outputs | tuple[Outputs, Intermediates] | Tensor:
        """Cut the tokens into chunks.

        Args:
            tokens: float (batch, length, dim); or packed (total, dim) with `cu_seqlens`; or a
                jagged nested tensor (batch, *, dim).
            lens: int (batch,): real positions of each row. What lies behind them is never read.
            cu_seqlens: int (batch + 1,): cumulative lengths of packed tokens.
            boundary_mask: bool, (batch, length) or (total,): boundaries to use in place of the
                router's. The probabilities remain the router's. The first position of a sequence
                is a boundary all the same.
            return_intermediates: Return `(Outputs, Intermediates)`.
            return_only_chunk_lens: Return nothing else than the positions in each chunk, int64
                (batch, chunks) with 0 at pads, or packed (chunks,): the chunker as a tokenizer.

        Returns:
            `Outputs`: the chunk vectors, the way back up, and the weighted ratio loss.

        Raises:
            ValueError: shapes, dtypes or lengths that do not fit together.
        """
        layout = layout_of(tokens, lens, cu_seqlens, static=self.max_chunks is not None)
        if return_only_chunk_lens:
            segmentation = self.route(tokens, layout, boundary_mask).pending.finish()
            chunk_layout = layout_of_chunks(segmentation, layout, self.max_chunks is not None)
            return chunk_layout.unpack(segmentation.sum_over_chunks())
        outputs, record = self.run(tokens, layout, boundary_mask, shows_probs=return_intermediates)
        return (outputs, record) if return_intermediates else outputs

    def run(
        self,
        tokens: Tensor,
        layout: Layout,
        boundary_mask: Tensor | None = None,
        *,
        shows_probs: bool = True,
    ) -> tuple[Outputs, Intermediates]:
        """`forward` for tokens whose layout is known already, as it is inside an HNet.

        Unless the caller `shows_probs`, which somebody may then want the gradient of, the ratio
        loss need not depend on those of the record, which asks less of the host.
        """
        packed, _, probs, pending, losses = self.route(
            tokens, layout, boundary_mask, with_loss=not shows_probs
        )
        # Queued while the number of chunks is on its way to the host.
        grid = self._grid_ahead(packed, pending) if layout.padded else None
        ahead = None if grid is not None else self.select_ahead(packed, pending)
        if losses is None:
            losses = self._ratio_loss(pending.wanted, probs, layout.cu_seqlens)
        segmentation = pending.finish()
        in_grid = None if grid is None else grid.finish(packed, segmentation)
        capped, given = self.max_chunks is not None, boundary_mask is not None
        if in_grid is not None:
            downsampled, places, inverse = in_grid
            chunk_layout = layout_of_chunks(segmentation, layout, capped, (places, inverse))
        else:
            chunks = self.downsample(packed, probs, segmentation, layout.cu_seqlens, ahead)
            chunk_layout = layout_of_chunks(segmentation, layout, capped)
            downsampled = chunk_layout.unpack(chunks)
        record = Intermediates(tokens, layout, chunk_layout, segmentation, probs, losses[0], given)

        def upsample(inner: Any, apply_scale: bool = True) -> Tensor:
            return self._upsample(inner, record, apply_scale)

        return Outputs(downsampled, upsample, losses[1]), record

    def route(
        self,
        tokens: Tensor,
        layout: Layout,
        boundary_mask: Tensor | None = None,
        *,
        with_keys: bool = False,
        with_loss: bool = False,
    ) -> Routing:
        """The probability of a boundary at each token, eq. (4), and where to cut.

        `with_keys` has the queries and keys returned, too, which otherwise may stay inside one node
        of autograd; so may the ratio loss, `with_loss`.
        """
        router = self.to_queries_keys  # once: a module finds its parts in Python, in 0.5 us
        self._check(tokens, boundary_mask, layout, parameter_of(router).dtype)
        packed, start_keys = layout.pack(tokens), None
        if self.start_key is not None:
            start_keys = self.start_key.expand(layout.batch, -1)

        def cut(probs: Tensor) -> PendingSegmentation:
            limits = layout.cu_seqlens, self.max_chunks
            if boundary_mask is None:
                return begin_segment_above(self.boundary_threshold, probs, *limits)
            return begin_segment(layout.pack(boundary_mask), *limits)

        if self.pool == "select" and not with_keys:
            ratio = self._pooled_ratio() if with_loss else None
            return routed(packed, router, layout.cu_seqlens, cut, start_keys, ratio)
        queries_keys = router(packed)
        probs = boundary_probability_of_pairs(queries_keys, layout.cu_seqlens, start_keys)
        return Routing(packed, queries_keys, probs, cut(probs), None)

    def _check(
        self, tokens: Tensor, boundary_mask: Tensor | None, layout: Layout, dtype: torch.dtype
    ) -> None:
        """Raise ValueError unless these fit together, and a router in that dtype."""
        if not tokens.is_floating_point() or tokens.shape[-1] != self.dim:
            raise ValueError(
                f"tokens must be floating point with {self.dim} channels, "
                f"got {tokens.dtype} of shape {tuple(tokens.shape)}"
            )
        if tokens.dtype != dtype and not torch.is_autocast_enabled(tokens.device.type):
            raise ValueError(f"tokens must be {dtype}, as the chunker, got {tokens.dtype}")
        if layout.jagged and self.max_chunks is not None:
            raise ValueError("tokens must be padded or packed when max_chunks is given, got jagged")
        if boundary_mask is None:
            return
        if not isinstance(boundary_mask, Tensor):
            raise ValueError(f"boundary_mask must be a tensor, got {type(boundary_mask).__name__}")
        if boundary_mask.is_nested and not same_rows(boundary_mask, layout.cu_seqlens):
            raise ValueError("boundary_mask must have rows as long as those of tokens")
        flat = boundary_mask.values() if boundary_mask.is_nested else boundary_mask
        if flat.dtype != torch.bool or flat.shape != layout.shape:
            raise ValueError(
                f"boundary_mask must be bool of shape {layout.shape}, "
                f"got {flat.dtype} of shape {tuple(flat.shape)}"
            )

    def select_ahead(self, packed: Tensor, pending: PendingSegmentation) -> Tensor | None:
        """The chunk vectors before their number is known, if they are not twice as many as aimed.

        That is room for 2 / `target_avg_token_length` of the tokens, which stays allocated.
        """
        if self.pool != "select":
            return None
        return pending.select_ahead(packed, self._room(packed))

    def _grid_ahead(self, packed: Tensor, pending: PendingSegmentation) -> ChunkGrid | None:
        """As `select_ahead`, in padded rows, where the chunks go inwards as they are selected."""
        if (
            self.pool != "select"
            or self.multiply_by_prob
            or self.learning_rate_difference != 1
            or self.length_embed is not None
        ):
            return None
        return grid_ahead(packed, pending, self._room(packed))

    def _room(self, packed: Tensor) -> int:
        return int(2 * packed.shape[0] / self.target_avg_token_length) + 1

    def downsample(
        self,
        packed: Tensor,
        probs: Tensor,
        segmentation: Segmentation,
        cu_seqlens: Tensor,
        ahead: Tensor | None,
    ) -> Tensor:
        """The chunk vectors, packed (chunks, dim)."""
        if self.pool == "select":
            chunks = segmentation.select(packed, ahead)
        else:
            chunks = pool_groups(packed, segmentation, cu_seqlens, self.pool)
        if self.multiply_by_prob:
            chunks = chunks * segmentation.at_boundaries(probs)[:, None].to(chunks.dtype)
        chunks = _scale_gradient(chunks, 1 / self.learning_rate_difference)
        if self.length_embed is not None:
            lengths = segmentation.sum_over_chunks()[:, None]
            embedded = self.length_embed(lengths.to(chunks.dtype))
            chunks = chunks + embedded.where(lengths > 0, 0)
        return chunks

    def _pooled_ratio(self) -> tuple[float, float] | None:
        """N and the weight of a ratio loss that is one operation; None if it is more than that."""
        if self.ratio_loss_per_sequence or self.straight_through_frac_vecs:
            return None
        return float(self.target_avg_token_length), float(self.ratio_loss_weight)

    def _ratio_loss(
        self, wanted: Tensor, probs: Tensor, cu_seqlens: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The loss, before and after its weight."""
        pooled = self._pooled_ratio()
        if pooled is not None:
            return pooled_ratio_loss(wanted, probs, cu_seqlens, *pooled)
        n, weight = self.target_avg_token_length, self.ratio_loss_weight
        soft = None
        if self.straight_through_frac_vecs:
            soft = (probs - self.boundary_threshold).sigmoid()
        loss = ratio_loss(
            wanted,
            probs,
            n,
            cu_seqlens=cu_seqlens,
            per_sequence=self.ratio_loss_per_sequence,
            soft_boundaries=soft,
        )
        return loss, weight * loss

    def _upsample(self, inner: Any, record: Intermediates, apply_scale: bool) -> Tensor:
        """Smoothing, expansion and residual, eq. (3) and (5) to (9)."""
        tokens, segmentation, probs = record.tokens, record.segmentation, record.packed_probs
        z = _checked_chunks(hidden_states(inner), record.chunk_layout)
        residual = projection = None
        if self.residual_proj is not None:
            if z.shape[-1] != self.dim:
                raise ValueError(
                    f"inner must have {self.dim} channels, as the residual that is added to it, "
                    f"got {z.shape[-1]}"
                )
            residual = record.layout.pack(tokens)
            if is_plain(self.residual_proj, nn.Linear):
                projection = self.residual_proj.weight, self.residual_proj.bias
            else:
                residual = self.residual(residual)
        out = dechunk(
            record.chunk_layout.pack(z),
            probs,
            segmentation,
            residual,
            projection=projection,
            straight_through=apply_scale,
            weigh_input=not self.multiply_by_prob,
            clamp=self.smoothing_clamp,
            dtype=tokens.dtype,
            short_memory=self.boundary_threshold >= 0.5 and not record.boundaries_given,
        )
        out = _scale_gradient(out, self.learning_rate_difference)
        return record.layout.unpack(out)

    def residual(self, x: Tensor) -> Tensor:
        """The projection of the residual, in float32 whatever the dtype of x and of autocast.

        A layer that somebody has replaced or changed, by an adapter or a hook say, runs itself,
        outside autocast, on packed tokens in the dtype of its parameters.
        """
        projection, packed = self.residual_proj, x.flatten(0, -2)
        assert projection is not None
        if is_plain(projection, nn.Linear):
            y = wide_linear(packed, projection.weight, projection.bias)
        else:
            wide = accumulation_dtype(x.dtype)
            with torch.autocast(x.device.type, enabled=False):
                y = projection(packed.to(parameter_of(projection, wide).dtype)).to(wide)
        return y.view(*x.shape[:-1], y.shape[-1])


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def _scale_gradient(x: Tensor, factor: float) -> Tensor:
    if factor == 1:
        return x
    scaled: Tensor = _ScaleGradient.apply(x, factor)  # type: ignore[no-untyped-call]  # torch's
    return scaled


def _checked_chunks(z: Tensor, chunk_layout: Layout) -> Tensor:
    if chunk_layout.jagged and z.is_nested:
        if not same_rows(z, chunk_layout.cu_seqlens):
            raise ValueError("inner must have rows as long as those of the chunks that went in")
        z = z.values()
    if z.shape[:-1] != chunk_layout.shape:
        raise ValueError(
            f"inner must have shape {(*chunk_layout.shape, 'width')}, as the chunks went in, "
            f"got {tuple(z.shape)}"
        )
    if not z.is_floating_point():
        raise ValueError(f"inner must be floating point, got {z.dtype}")
    return z


def _require_number(name: str, value: object, holds: Callable[[Any], bool], wanted: str) -> None:
    _require(isinstance(value, Real) and holds(value), name, wanted, value)


def _require(holds: bool, name: str, wanted: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{name} must be {wanted}, got {got!r}")
