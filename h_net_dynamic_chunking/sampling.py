"""From logits to the next byte: filters in the usual order, then the inverse CDF.

    repetition penalty -> temperature -> top-k -> top-p -> min-p -> draw

Everything here has static shapes and reads nothing on the host, so that it can be captured in a
CUDA graph: options are tensors, one row a sequence, and the random number of each row comes in.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from h_net_dynamic_chunking.config_checks import check_amount

LARGEST_INT64 = 2**63 - 1


class Parameters(NamedTuple):
    """The options of `draw`, each (batch, 1); None leaves a filter out."""

    temperature: Tensor
    """float32; 0 takes the most probable byte."""
    top_k: Tensor | None = None
    """int64."""
    top_p: Tensor | None = None
    """float32."""
    min_p: Tensor | None = None
    """float32."""
    repetition_penalty: Tensor | None = None
    """float32."""

    @property
    def filters_nothing(self) -> bool:
        """Whether the temperature is all there is."""
        return all(part is None for part in self[1:])


@dataclass(frozen=True)
class Sampling:
    """How bytes are drawn, checked.

    Raises:
        ValueError: a number outside its range, by name.
    """

    temperature: float = 1.0
    """At least 0; 0 takes the most probable byte, the lowest of several."""
    top_k: int | None = None
    """At least 1; see `keep_top_k`."""
    top_p: float | None = None
    """In (0, 1]; see `keep_top_p`."""
    min_p: float | None = None
    """In [0, 1]; see `keep_min_p`."""
    repetition_penalty: float = 1.0
    """Over 0; see `penalized`."""

    def __post_init__(self) -> None:
        check_amount("temperature", self.temperature)
        if self.top_k is not None and (
            isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 1
        ):
            raise ValueError(f"top_k must be None or an int of at least 1, got {self.top_k!r}")
        if self.top_p is not None:
            _check("top_p", self.top_p, "None or in (0, 1]", lambda x: 0 < x <= 1)
        if self.min_p is not None:
            _check("min_p", self.min_p, "None or in [0, 1]", lambda x: 0 <= x <= 1)
        _check(
            "repetition_penalty", self.repetition_penalty, "a finite number over 0", lambda x: x > 0
        )

    def parameters(self, batch: int, device: torch.device) -> Parameters:
        """The same options for every row of a batch; those that change nothing are left out."""

        def column(value: float | None, dtype: torch.dtype = torch.float32) -> Tensor | None:
            if value is None:
                return None
            return torch.full((batch, 1), value, dtype=dtype, device=device)

        temperature = column(self.temperature)
        assert temperature is not None
        return Parameters(
            temperature,
            column(None if self.top_k is None else min(self.top_k, LARGEST_INT64), torch.int64),
            column(self.top_p if self.top_p != 1 else None),
            column(self.min_p if self.min_p != 0 else None),
            column(self.repetition_penalty if self.repetition_penalty != 1 else None),
        )


class Draw(NamedTuple):
    """What `draw` returns."""

    ids: Tensor
    """int64 (batch,)."""
    logprobs: Tensor
    """float32 (batch,): log-probabilities of the ids, in nats, under the logits as they came:
    before any filter and at temperature 1. NaN where the logits give no distribution."""


def draw(
    logits: Tensor, uniform: Tensor, parameters: Parameters, seen: Tensor | None = None
) -> Draw:
    """Draw the next id of each row.

    Args:
        logits: float (batch, vocab); computed with in float32.
        uniform: float32 (batch, 1), from torch.rand: the one random number of each row.
        parameters: the filters.
        seen: bool (batch, vocab): ids that the row has read; needed by the repetition penalty.
    """
    logits = logits.float()
    ids = inverse_cdf(distribution(logits, parameters, seen), uniform)
    logprobs = logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    return Draw(ids, logprobs)


def distribution(logits: Tensor, parameters: Parameters, seen: Tensor | None = None) -> Tensor:
    """What `draw` draws from: float32 (batch, vocab), each row with the sum 1.

    Args as there; parameters of one row serve any number. At temperature 0 all is with one id.

    >>> greedy = Sampling(temperature=0).parameters(1, torch.device("cpu"))
    >>> distribution(torch.tensor([[1.0, 3.0, 3.0]]), greedy).tolist()
    [[0.0, 1.0, 0.0]]
    """
    filtered = logits.float()
    if parameters.repetition_penalty is not None:
        assert seen is not None, "a repetition penalty needs to know what was seen"
        filtered = penalized(filtered, seen, parameters.repetition_penalty)
    greedy = filtered.argmax(-1, keepdim=True)  # the first of several
    filtered = tempered(filtered, parameters.temperature)
    if parameters.top_k is not None:
        filtered = keep_top_k(filtered, parameters.top_k)
    if parameters.top_p is not None:
        filtered = keep_top_p(filtered, parameters.top_p)
    if parameters.min_p is not None:
        filtered = keep_min_p(filtered, parameters.min_p)
    probs = filtered.softmax(-1)
    certain = torch.zeros_like(probs).scatter(-1, greedy, 1.0)
    return torch.where(parameters.temperature > 0, probs, certain)


def penalized(logits: Tensor, seen: Tensor, penalty: Tensor | float) -> Tensor:
    """Divide positive logits of seen ids by the penalty, multiply the others of them by it.

    Keskar et al. 2019 (arXiv 1909.05858), section 4.1, with the sign of the logit minded. Over 1
    makes repetition rarer.

    >>> penalized(torch.tensor([2.0, -2.0, 2.0]), torch.tensor([True, True, False]), 2.0).tolist()
    [1.0, -4.0, 2.0]
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def tempered(logits: Tensor, temperature: Tensor) -> Tensor:
    """(logits - largest) / temperature.

    >>> tempered(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.5]])).tolist()
    [[-4.0, 0.0]]
    """
    # From the largest down, so that a temperature near 0 overflows to -inf and never to inf.
    smallest = torch.finfo(temperature.dtype).tiny
    return (logits - logits.amax(-1, keepdim=True)) / temperature.clamp(min=smallest)


def keep_top_k(logits: Tensor, k: Tensor | int) -> Tensor:
    """Keep the k largest, of equal ones the lowest ids; the others become -inf.

    >>> keep_top_k(torch.tensor([1.0, 3.0, 3.0, 3.0]), 2).tolist()
    [-inf, 3.0, 3.0, -inf]
    """
    order = logits.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(logits.shape[-1], device=logits.device).expand_as(order)
    kept = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, places < k)
    return logits.where(kept, -torch.inf)


def keep_top_p(logits: Tensor, p: Tensor | float) -> Tensor:
    """Keep the fewest most probable ids that have probability p together, at least one.

    Holtzman et al. 2019 (arXiv 1904.09751), section 3.1. An id stays if those before it, most
    probable first and of equal ones the lowest, have less than p.

    >>> keep_top_p(torch.tensor([0.1, 0.5, 0.4]).log(), 0.6).exp().tolist()  # doctest: +ELLIPSIS
    [0.0, 0.5, 0.4...]
    """
    order = logits.argsort(dim=-1, descending=True, stable=True)
    probs = logits.softmax(-1).gather(-1, order)
    before = probs.cumsum(-1) - probs
    kept = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before < p)
    return logits.where(kept, -torch.inf)


def keep_min_p(logits: Tensor, p: Tensor | float) -> Tensor:
    """Keep ids at least p times as probable as the most probable one.

    Nguyen et al. 2024 (arXiv 2407.01082), section 3.

    >>> keep_min_p(torch.tensor([0.1, 0.5, 0.4]).log(), 0.5).exp().tolist()  # doctest: +ELLIPSIS
    [0.0, 0.5, 0.4...]
    """
    ratios = (logits - logits.amax(-1, keepdim=True)).exp()
    return logits.where(ratios >= p, -torch.inf)


def inverse_cdf(probs: Tensor, uniform: Tensor) -> Tensor:
    """The first id at which the summed probabilities exceed `uniform`, int64 (batch,).

    Args:
        probs: float32 (batch, vocab): probabilities, up to a common factor.
        uniform: float32 (batch, 1), in [0, 1 - 2^-24], which is what torch.rand gives.

    Never an id of probability 0. The grid of `uniform` shifts probabilities by 2^-24 at most.

    >>> inverse_cdf(torch.tensor([[0.0, 0.5, 0.0, 0.5]]), torch.tensor([[0.5]])).tolist()
    [3]
    """
    # Sums of ids that cannot come are passed over: a parallel scan may round them either way. The
    # product stays below the largest sum, because 1 - 2^-24 is half a unit in the last place away.
    sums = probs.cumsum(-1).where(probs > 0, 0.0)
    return (sums > uniform * sums.amax(-1, keepdim=True)).int().argmax(-1)


def uniforms(seeds: Sequence[int], steps: int) -> Tensor:
    """Random numbers in [0, 1): float32 (rows, steps), on the CPU.

    Those of a row depend on its seed alone; the first n are the same whatever `steps` is.
    """
    rows = [torch.rand(steps, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows) if rows else torch.empty(0, steps)


def row_seeds(seed: int | Sequence[int] | None, rows: int) -> list[int]:
    """The seed of each row: seed + row, or its own entry; None draws from the global generator.

    Raises:
        ValueError: negative or too large seeds, something else than ints, or not one a row.
    """
    if seed is None:
        return torch.randint(LARGEST_INT64, (rows,)).tolist()
    if not isinstance(seed, (int, Sequence)) or isinstance(seed, (bool, str)):
        raise ValueError(f"seed must be an int or one for each of {rows} rows, got {seed!r}")
    if isinstance(seed, int):
        _check_seed(seed)
        if seed + rows - 1 > LARGEST_INT64:
            raise ValueError(
                f"seed must leave room below 2^63 for {rows} rows, whose seeds are seed + row, "
                f"got {seed}"
            )
        return [seed + row for row in range(rows)]
    if len(seed) != rows:
        raise ValueError(
            f"seed must be an int or one for each of {rows} rows, got a list of {len(seed)}"
        )
    for value in seed:
        _check_seed(value)
    return list(seed)


def _check_seed(value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= LARGEST_INT64:
        raise ValueError(f"seed must be an int in [0, 2^63), got {value!r}")


def _check(name: str, value: float, wanted: str, holds: Callable[[float], bool]) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and holds(value)):
        raise ValueError(f"{name} must be {wanted}, got {value!r}")
