"""DynamicSequenceChunker: route, keep the boundaries, hand back the way up.

The dynamic chunking layer of the H-Net (arXiv 2507.07955, sections 2.2 and 2.3) around any inner
network. Defaults are the paper's; what departs from it is an option that is off.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor, nn
from torch.nn import functional

from h_net_dynamic_chunking.intermediates import Intermediates
from h_net_dynamic_chunking.layout import Layout, layout_of, layout_of_chunks
from h_net_dynamic_chunking.losses import ratio_loss
from h_net_dynamic_chunking.ops import (
    Segmentation,
    boundary_probability_of_pairs,
    ema_smooth,
    expand,
    gather_rows,
    segment,
)
from h_net_dynamic_chunking.ops.packing import (
    accumulation_dtype,
    in_some_sequence,
    sequence_starts,
)
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
            the last chunk. Gives static shapes and reads nothing on the host. None: no limit.
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
        multiply_by_prob: Send each chunk inwards multiplied by its probability; the smoothing then
            adds what comes back as it is.

    The last five reproduce options of the chunker that is published under this package's name.

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
        multiply_by_prob: bool = False,
    ) -> None:
        super().__init__()
        dim_queries_keys = dim if dim_queries_keys is None else dim_queries_keys
        _require(dim >= 1, "dim", "at least 1", dim)
        _require(dim_queries_keys >= 1, "dim_queries_keys", "at least 1", dim_queries_keys)
        _require(0 < boundary_threshold < 1, "boundary_threshold", "in (0, 1)", boundary_threshold)
        _require(
            target_avg_token_length > 1,
            "target_avg_token_length",
            "above 1",
            target_avg_token_length,
        )
        _require(max_chunks is None or max_chunks >= 1, "max_chunks", "at least 1", max_chunks)
        _require(pool in get_args(Pool), "pool", f"one of {get_args(Pool)}", pool)
        _require(
            learning_rate_difference > 0,
            "learning_rate_difference",
            "above 0",
            learning_rate_difference,
        )
        self.dim = dim
        self.boundary_threshold = boundary_threshold
        self.target_avg_token_length = target_avg_token_length
        self.ratio_loss_weight = ratio_loss_weight
        self.max_chunks = max_chunks
        self.pool = pool
        self.ratio_loss_per_sequence = ratio_loss_per_sequence
        self.learning_rate_difference = learning_rate_difference
        self.straight_through_frac_vecs = straight_through_frac_vecs
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
            return_only_chunk_lens: Return only the positions in each chunk, int64
                (batch, chunks) with 0 at pads, or packed (chunks,): the chunker as a tokenizer.

        Returns:
            `Outputs`: the chunk vectors, the way back up, and the weighted ratio loss.

        Raises:
            ValueError: shapes, dtypes or lengths that do not fit together.
        """
        layout = layout_of(tokens, lens, cu_seqlens)
        self._check(tokens, boundary_mask, layout)
        packed = layout.pack(tokens)
        probs = self._route(packed, layout.cu_seqlens)
        wanted = self._wanted(probs, boundary_mask, layout)
        segmentation = segment(wanted, layout.cu_seqlens, self.max_chunks)
        chunk_layout = layout_of_chunks(segmentation, layout, capped=self.max_chunks is not None)
        if return_only_chunk_lens:
            return chunk_layout.unpack(segmentation.sum_over_chunks())

        chunks = self._downsample(packed, probs, segmentation, layout.cu_seqlens)
        loss = self._ratio_loss(wanted, probs, layout.cu_seqlens)
        record = Intermediates(tokens, layout, chunk_layout, segmentation, probs, wanted, loss)

        def upsample(inner: Any, apply_scale: bool = True) -> Tensor:
            return self._upsample(inner, record, apply_scale)

        outputs = Outputs(chunk_layout.unpack(chunks), upsample, self.ratio_loss_weight * loss)
        return (outputs, record) if return_intermediates else outputs

    def _check(self, tokens: Tensor, boundary_mask: Tensor | None, layout: Layout) -> None:
        if not tokens.is_floating_point() or tokens.shape[-1] != self.dim:
            raise ValueError(
                f"tokens must be floating point with {self.dim} channels, "
                f"got {tokens.dtype} of shape {tuple(tokens.shape)}"
            )
        if boundary_mask is None:
            return
        flat = boundary_mask.values() if boundary_mask.is_nested else boundary_mask
        if flat.dtype != torch.bool or flat.shape != layout.shape:
            raise ValueError(
                f"boundary_mask must be bool of shape {layout.shape}, "
                f"got {flat.dtype} of shape {tuple(flat.shape)}"
            )

    def _route(self, packed: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Probability of a boundary at each packed position, eq. (4)."""
        queries_keys = self.to_queries_keys(packed)
        start_keys = None
        if self.start_key is not None:
            start_keys = self.start_key.expand(len(cu_seqlens) - 1, -1)
        return boundary_probability_of_pairs(queries_keys, cu_seqlens, start_keys)

    def _wanted(self, probs: Tensor, given: Tensor | None, layout: Layout) -> Tensor:
        """The boundaries before any limit: what the router, or the caller, asks for."""
        asked = probs > self.boundary_threshold if given is None else layout.pack(given)
        total = len(probs)
        starts = sequence_starts(layout.cu_seqlens, total)
        return (asked | starts) & in_some_sequence(layout.cu_seqlens, total)

    def _downsample(
        self, packed: Tensor, probs: Tensor, segmentation: Segmentation, cu_seqlens: Tensor
    ) -> Tensor:
        if self.pool == "select":
            index, inverse = segmentation.boundary_positions, segmentation.slot_of_position
            chunks = gather_rows(packed, index, inverse)
        else:
            chunks = pool_groups(packed, segmentation, cu_seqlens, self.pool)
        if self.multiply_by_prob:
            chunks = chunks * segmentation.at_boundaries(probs)[:, None].to(chunks.dtype)
        chunks = _scale_gradient(chunks, 1 / self.learning_rate_difference)
        if self.length_embed is not None:
            lengths = segmentation.sum_over_chunks()[:, None].to(chunks.dtype)
            chunks = chunks + self.length_embed(lengths)
        return chunks

    def _ratio_loss(self, wanted: Tensor, probs: Tensor, cu_seqlens: Tensor) -> Tensor:
        soft = (probs - self.boundary_threshold).sigmoid()
        return ratio_loss(
            wanted,
            probs,
            self.target_avg_token_length,
            cu_seqlens=cu_seqlens,
            per_sequence=self.ratio_loss_per_sequence,
            soft_boundaries=soft if self.straight_through_frac_vecs else None,
        )

    def _upsample(self, inner: Any, record: Intermediates, apply_scale: bool) -> Tensor:
        """Smoothing, expansion and residual, eq. (3) and (5) to (9)."""
        tokens, segmentation, probs = record.tokens, record.segmentation, record.packed_probs
        z = _checked_chunks(hidden_states(inner), record.chunk_layout)
        residual = None
        if self.residual_proj is not None:
            if z.shape[-1] != self.dim:
                raise ValueError(
                    f"inner must have {self.dim} channels, as the residual that is added to it, "
                    f"got {z.shape[-1]}"
                )
            residual = _linear_in_float32(self.residual_proj, record.layout.pack(tokens))
        smoothed, _ = ema_smooth(
            record.chunk_layout.pack(z),
            segmentation.at_boundaries(probs),
            segmentation.cu_chunks,
            weigh_input=not self.multiply_by_prob,
        )
        confidence = probs.where(segmentation.boundary_mask, 1 - probs) if apply_scale else None
        out = expand(smoothed, segmentation.chunk_of_position, confidence, residual)
        out = _scale_gradient(out.to(tokens.dtype), self.learning_rate_difference)
        return record.layout.unpack(out)


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
        z = z.values()
    if z.ndim != len(chunk_layout.shape) + 1 or tuple(z.shape[:-1]) != chunk_layout.shape:
        raise ValueError(
            f"inner must have shape {(*chunk_layout.shape, 'width')}, as the chunks went in, "
            f"got {tuple(z.shape)}"
        )
    if not z.is_floating_point():
        raise ValueError(f"inner must be floating point, got {z.dtype}")
    return z


def _linear_in_float32(linear: nn.Linear, x: Tensor) -> Tensor:
    """The residual is exact whatever the dtype of the model (paper's official code)."""
    dtype = accumulation_dtype(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        return functional.linear(x.to(dtype), linear.weight.to(dtype), linear.bias.to(dtype))


def _require(holds: bool, name: str, wanted: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{name} must be {wanted}, got {got}")
