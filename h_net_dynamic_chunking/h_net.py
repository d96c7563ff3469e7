"""HNet: an encoder, a chunker, a network on the chunks, and a decoder. Paper, section 2.1.

encoded = encoder(tokens)
chunks  = downsample(encoded)                      the chunker's way down
inner   = width_out(network(width_in(chunks)))     `network` may be an HNet
output  = decoder(upsample(inner) + residual)      the chunker's way up, eq. (3)
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from h_net_dynamic_chunking.boundary_masks import padded_masks
from h_net_dynamic_chunking.chunker import DynamicSequenceChunker
from h_net_dynamic_chunking.h_net_inference import HNetCache, HNetInference
from h_net_dynamic_chunking.intermediates import Intermediates
from h_net_dynamic_chunking.layout import Layout, layout_of, padded_view
from h_net_dynamic_chunking.sequence_module import accepted_lengths, call_module

WidthChange = Literal["linear", "pad"]


@dataclass(frozen=True, eq=False)
class HNetOutput:
    """What HNet returns. Unpacks as `output, loss`."""

    output: Tensor
    """(batch, length, dim), packed (total, dim) or jagged, as the tokens. Pads hold what the
    decoder left there."""
    loss: Tensor
    """float32 scalar (float64 for float64 tokens): the weighted ratio losses of this HNet and of
    all inside it."""
    intermediates: tuple[Intermediates, ...]
    """One record for each stage, outermost first; `absolute_chunk_lens` counts positions of the
    outermost stage."""
    next_cache: HNetCache | None = None
    """The cache that came in, which has seen the tokens now; None without one."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.output, self.loss))

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Tensor:
        return (self.output, self.loss)[index]


class HNet(HNetInference):
    """One stage of the hierarchy around any modules. `HNetInference` has its decoding.

    Args:
        encoder: Runs on the tokens, width `dim`. How modules are called, and told about lengths,
            is described in `sequence_module`.
        network: Runs on the chunks, width `dim_inner`. May be an HNet, to any depth.
        decoder: Runs on the tokens again, width `dim`.
        dim: Width of the tokens.
        dim_inner: Width of the chunks; `dim` by default.
        width_change: How the widths meet if they differ: "linear" has a projection each way;
            "pad" appends one learned vector on the way in and drops those channels on the way out
            (section 2.1.2).
        **chunker_options: Passed to `DynamicSequenceChunker`. `handle_residual_proj` is True.

    Raises:
        ValueError: an argument out of its range.

    >>> inner = HNet(nn.Identity(), nn.Identity(), nn.Identity(), dim=16)
    >>> net = HNet(nn.Identity(), inner, nn.Identity(), dim=8, dim_inner=16)
    >>> output, loss = net(torch.randn(2, 32, 8))
    >>> output.shape
    torch.Size([2, 32, 8])
    """

    dim: int

    def __init__(
        self,
        encoder: nn.Module,
        network: nn.Module,
        decoder: nn.Module,
        dim: int,
        dim_inner: int | None = None,
        *,
        width_change: WidthChange = "linear",
        **chunker_options: Any,
    ) -> None:
        super().__init__()
        dim_inner = dim if dim_inner is None else dim_inner
        if dim_inner < 1:
            raise ValueError(f"dim_inner must be at least 1, got {dim_inner}")
        _check_module("encoder", encoder, dim)
        _check_module("network", network, dim_inner)
        _check_module("decoder", decoder, dim)
        if width_change not in get_args(WidthChange):
            raise ValueError(
                f"width_change must be one of {get_args(WidthChange)}, got {width_change!r}"
            )
        if width_change == "pad" and dim_inner < dim:
            raise ValueError(
                f"dim_inner must be at least dim, {dim}, with width_change='pad', got {dim_inner}"
            )
        self.dim, self.dim_inner = dim, dim_inner
        self.encoder = encoder
        self.network = network
        self.decoder = decoder
        self.chunker = DynamicSequenceChunker(
            dim, **{"handle_residual_proj": True, **chunker_options}
        )
        self.width_in: nn.Module = nn.Identity()
        self.width_out: nn.Module = nn.Identity()
        if dim_inner != dim and width_change == "linear":
            self.width_in, self.width_out = nn.Linear(dim, dim_inner), nn.Linear(dim_inner, dim)
        elif dim_inner != dim:
            self.width_in, self.width_out = PadWidth(dim_inner - dim), SliceWidth(dim)

    def forward(
        self,
        tokens: Tensor,
        lens: Tensor | Sequence[int] | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        boundary_masks: Sequence[Tensor | None] = (),
        cache: HNetCache | None = None,
    ) -> HNetOutput:
        """Run the hierarchy.

        Args:
            tokens: float (batch, length, dim); or packed (total, dim) with `cu_seqlens`; or a
                jagged nested tensor (batch, *, dim).
            lens: int (batch,): real positions of each row. What lies behind them is never read.
            cu_seqlens: int (batch + 1,): cumulative lengths of packed tokens.
            boundary_masks: Boundaries to use in place of the router's, outermost stage first, each
                over the positions of its stage; None, or none left, lets the router choose.
            cache: The tokens go on where it stands, and it remembers them; see `extend`, which
                this calls. There is no loss and there are no intermediates then.

        Raises:
            ValueError: shapes, dtypes or lengths that do not fit together.
        """
        if isinstance(boundary_masks, Tensor):
            raise ValueError(
                "boundary_masks must be a sequence of masks, one a stage, got a tensor"
            )
        if cache is not None:
            return self._go_on(tokens, layout_of(tokens, lens, cu_seqlens), boundary_masks, cache)
        layout = layout_of(tokens, lens, cu_seqlens, static=self.chunker.max_chunks is not None)
        if not tokens.is_nested:
            return self._run(tokens, layout, boundary_masks)
        packed = replace(layout, jagged=False)
        result = self._run(tokens.values(), packed, boundary_masks)
        return replace(result, output=layout.unpack(result.output))

    def _run(
        self, tokens: Tensor, layout: Layout, boundary_masks: Sequence[Tensor | None]
    ) -> HNetOutput:
        """The hierarchy on tokens whose layout is known, padded or packed."""
        tokens = _zero_pads(tokens, layout)
        here, *deeper = boundary_masks or (None,)
        encoded, encoder_result = call_module("encoder", self.encoder, tokens, layout, self.dim)
        (chunks, upsample, loss), record = self.chunker.run(encoded, layout, here)
        chunks = _zero_pads(self.width_in(chunks), record.chunk_layout)
        if isinstance(self.network, HNet):
            network_result = self.network._run(chunks, record.chunk_layout, deeper)
            inner = network_result.output
        else:
            if deeper:
                raise ValueError(
                    f"boundary_masks must have one entry a stage at most, got {len(deeper)} more"
                )
            inner, network_result = call_module(
                "network", self.network, chunks, record.chunk_layout, self.dim_inner
            )
        expanded = upsample(self.width_out(inner))
        decoded, decoder_result = call_module("decoder", self.decoder, expanded, layout)

        for result in (encoder_result, network_result, decoder_result):
            if isinstance(result, HNetOutput):
                loss = loss + result.loss
        return HNetOutput(decoded, loss, (record, *_in_outer_positions(record, network_result)))

    def _go_on(
        self,
        tokens: Tensor,
        layout: Layout,
        boundary_masks: Sequence[Tensor | None],
        cache: HNetCache,
    ) -> HNetOutput:
        """`extend`, for tokens in any form."""
        padded = layout if layout.padded else padded_view(layout)
        if not layout.padded:
            tokens = padded.unpack(layout.pack(tokens))
            boundary_masks = padded_masks(boundary_masks, layout, padded)
        lens = None if padded.inverse is None else padded.lens
        result = self.extend(tokens, cache, lens, boundary_masks=boundary_masks)
        output = result.output
        output = output if layout.padded else layout.unpack(padded.pack(output))
        return HNetOutput(output, output.new_zeros((), dtype=torch.float32), (), cache)


class PadWidth(nn.Module):
    """Appends one learned vector of `extra` channels, the same at every position."""

    def __init__(self, extra: int) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(extra))

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim + extra)."""
        return torch.cat((x, self.vector.to(x.dtype).expand(*x.shape[:-1], -1)), dim=-1)


class SliceWidth(nn.Module):
    """Keeps the first `dim` channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim + extra) -> (..., dim)."""
        return x[..., : self.dim]


def _zero_pads(x: Tensor, layout: Layout) -> Tensor:
    """x with zeros where there is no position.

    A NaN in a pad would reach the weights, because their gradient multiplies it by zero.
    """
    if layout.inverse is None and not layout.has_tail:
        return x
    return x.where(layout.mask[..., None], 0)


def _check_module(name: str, module: object, dim: int) -> None:
    if not isinstance(module, nn.Module):
        raise ValueError(f"{name} must be a torch.nn.Module, got {type(module).__name__}")
    if isinstance(module, HNet) and module.dim != dim:
        raise ValueError(f"{name} must be an HNet of dim {dim}, got one of dim {module.dim}")
    accepted_lengths(module)


def _in_outer_positions(record: Intermediates, inner: Any) -> tuple[Intermediates, ...]:
    """The inner stages' records, which count chunk lengths in positions of this stage."""
    if not isinstance(inner, HNetOutput):
        return ()
    records, outer = [], record
    for stage in inner.intermediates:
        outer = replace(stage, outer=outer)
        records.append(outer)
    return tuple(records)
