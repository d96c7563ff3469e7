"""The whole chunker, one sequence and one position at a time, from the equations of the paper."""

from collections.abc import Callable

import torch
from torch import Tensor

from h_net_dynamic_chunking import DynamicSequenceChunker
from h_net_dynamic_chunking.ops import reference


def chunk_one_sequence(
    chunker: DynamicSequenceChunker,
    x: Tensor,
    inner: Callable[[Tensor], Tensor],
    given: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, probabilities, boundaries and chunk vectors of one sequence x (length, dim)."""
    cu = torch.tensor([0, len(x)])
    queries, keys = (x @ chunker.to_queries_keys.weight.T).chunk(2, -1)
    p = reference.boundary_probability(queries, keys, cu)
    mask = (p > chunker.boundary_threshold) if given is None else given.clone()
    mask[:1] = True
    chunks, chunk_of_position = reference.compact(x, mask, cu)
    smoothed, _ = reference.ema_smooth(inner(chunks), p[mask], torch.tensor([0, len(chunks)]))
    confidence = torch.where(mask, p, 1 - p)
    residual = None
    if chunker.residual_proj is not None:
        residual = x @ chunker.residual_proj.weight.T + chunker.residual_proj.bias
    out = reference.expand(smoothed, torch.tensor(chunk_of_position), confidence, residual)
    return out, p, mask, chunks


def ratio_loss(boundary: Tensor, p: Tensor, n: float) -> Tensor:
    """The identity of the ratio loss, for pooled positions."""
    f, g = boundary.double().mean(), p.mean()
    return 1 + n**2 / (n - 1) * (f - 1 / n) * (g - 1 / n)
