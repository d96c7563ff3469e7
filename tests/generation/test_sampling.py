"""Filters against loops, the draw against frequencies, options against their ranges."""

import math

import pytest
import torch
from torch import Tensor

from h_net_dynamic_chunking.sampling import (
    Sampling,
    draw,
    inverse_cdf,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalized,
    row_seeds,
    uniforms,
)
from tests.support import assert_close, generator

CPU = torch.device("cpu")
ROWS, VOCAB = 6, 40


@pytest.fixture
def logits() -> Tensor:
    """float32 (ROWS, VOCAB), with ties, a row of equal numbers and impossible ids."""
    numbers = (3 * torch.randn(ROWS, VOCAB, generator=generator())).round(decimals=0)
    numbers[1] = 2.0
    numbers[2, ::3] = -torch.inf
    return numbers


def by_rank(row: list[float]) -> list[int]:
    """Ids, the largest logit first, the lowest id first of equal ones."""
    return sorted(range(len(row)), key=lambda i: (-row[i], i))


def probabilities(row: list[float]) -> list[float]:
    weights = [math.exp(x - max(row)) for x in row]
    return [weight / sum(weights) for weight in weights]


def loop_top_k(row: list[float], k: int) -> set[int]:
    return set(by_rank(row)[:k])


def loop_top_p(row: list[float], p: float) -> set[int]:
    probs, kept, total = probabilities(row), set(), 0.0
    for i in by_rank(row):
        if total >= p - 1e-7:  # float32 sums on the other side
            break
        kept.add(i)
        total += probs[i]
    return kept


def loop_min_p(row: list[float], p: float) -> set[int]:
    probs = probabilities(row)
    return {i for i, x in enumerate(probs) if x >= p * max(probs)}


@pytest.mark.parametrize(
    ("filtered", "loop", "values"),
    [
        (keep_top_k, loop_top_k, [1, 2, 7, VOCAB, 10 * VOCAB]),
        (keep_top_p, loop_top_p, [1e-6, 0.31, 0.5, 0.9, 0.999]),
        (keep_min_p, loop_min_p, [0.0, 0.02, 0.4, 1.0]),
    ],
    ids=["top_k", "top_p", "min_p"],
)
def test_filters_keep_what_a_loop_keeps(logits, filtered, loop, values) -> None:
    for value in values:
        got = filtered(logits, value)
        # One value a row gives the same as one for all.
        assert torch.equal(got, filtered(logits, torch.full((ROWS, 1), value)))
        for row in range(ROWS):
            possible = {i for i in range(VOCAB) if logits[row, i] > -torch.inf}
            kept = {i for i in range(VOCAB) if got[row, i] > -torch.inf}
            assert kept == loop(logits[row].tolist(), value) & possible, (value, row)
            assert all(got[row, i] == logits[row, i] for i in kept)


def test_penalty_against_a_loop(logits: Tensor) -> None:
    seen = torch.rand(ROWS, VOCAB, generator=generator(1)) < 0.5
    got = penalized(logits, seen, 1.7)
    for row in range(ROWS):
        for i in range(VOCAB):
            x = float(logits[row, i])
            want = (x / 1.7 if x > 0 else x * 1.7) if seen[row, i] else x
            assert float(got[row, i]) == pytest.approx(want)


def test_inverse_cdf_against_a_loop() -> None:
    # Whole numbers, whose sums are exact.
    probs = torch.randint(1, 1000, (200, 7), generator=generator()).float()
    probs[:, 3] = 0.0
    probs[::5, 4:] = 0.0
    probs[::7, :2] = 0.0
    uniform = torch.rand(200, 1, generator=generator(1))
    uniform[:40] = 0.0
    uniform[40:100] = 1 - 2**-24  # the largest that torch.rand gives
    got = inverse_cdf(probs, uniform)
    for row, (shares, u) in enumerate(zip(probs.tolist(), uniform.flatten().tolist(), strict=True)):
        running, want = 0.0, None
        for i, share in enumerate(shares):
            running += share
            if want is None and running > u * sum(shares):
                want = i
        assert int(got[row]) == want, row
        assert probs[row, got[row]] > 0


# The 99.99% points of chi-square.
CRITICAL = {3: 21.1, 5: 25.7, 9: 33.7}


@pytest.mark.parametrize(
    ("sampling", "distribution"),
    [
        (Sampling(), [0.3, 0.05, 0.2, 0.05, 0.15, 0.05, 0.05, 0.05, 0.05, 0.05]),
        (Sampling(temperature=0.5), [9, 0.25, 4, 0.25, 2.25, 0.25, 0.25, 0.25, 0.25, 0.25]),
        (Sampling(top_k=4), [0.3, 0.05, 0.2, 0, 0.15, 0, 0, 0, 0, 0]),
        (Sampling(top_p=0.72), [0.3, 0.05, 0.2, 0.05, 0.15, 0, 0, 0, 0, 0]),
        # Penalised logits are log(p): negative, so that a penalty of 2 squares p of seen ids.
        (Sampling(repetition_penalty=2.0, min_p=0.1), [0.09, 0.05, 0.2, 0.05, 0.15] + [0.05] * 5),
        # Squared first; the largest two of four then have 0.85 of it.
        (Sampling(temperature=0.5, top_k=4, top_p=0.8), [9, 0, 4, 0, 0, 0, 0, 0, 0, 0]),
    ],
    ids=["plain", "temperature", "top_k", "top_p", "penalty and min_p", "in order"],
)
def test_frequencies(sampling: Sampling, distribution: list[float]) -> None:
    """Chi-square at a fixed seed."""
    rows = 40_000
    base = torch.tensor([0.3, 0.05, 0.2, 0.05, 0.15, 0.05, 0.05, 0.05, 0.05, 0.05]).log()
    seen = torch.zeros(rows, 10, dtype=torch.bool)
    seen[:, 0] = True
    uniform = torch.rand(rows, 1, generator=generator())
    got = draw(base.expand(rows, 10), uniform, sampling.parameters(rows, CPU), seen)
    counts = got.ids.bincount(minlength=10).double()
    expected = torch.tensor(distribution).double()
    expected *= rows / expected.sum()
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_square = ((counts - expected)[possible].square() / expected[possible]).sum()
    freedom = int(possible.sum()) - 1
    assert chi_square < CRITICAL.get(freedom, CRITICAL[3]), float(chi_square)
    # Filters leave no trace in the log-probabilities.
    assert_close("logprobs", got.logprobs, base[got.ids])


def test_temperature_0_is_the_lowest_of_the_most_probable(logits: Tensor) -> None:
    uniform = torch.rand(ROWS, 1, generator=generator())
    for sampling in (Sampling(temperature=0), Sampling(0, top_k=3, top_p=0.2, min_p=0.9)):
        got = draw(logits, uniform, sampling.parameters(ROWS, CPU))
        assert got.ids.tolist() == [by_rank(row)[0] for row in logits.tolist()]


def test_tiny_temperatures_are_greedy(logits: Tensor) -> None:
    """Where a division by the temperature alone would overflow."""
    uniform = torch.zeros(ROWS, 1)
    for temperature in (1e-30, 1e-42, 1e-60):
        got = draw(logits, uniform, Sampling(temperature).parameters(ROWS, CPU))
        assert got.ids.tolist() == [by_rank(row)[0] for row in logits.tolist()]


def test_each_row_has_its_own_parameters(logits: Tensor) -> None:
    """Temperature 0 and 1 in one batch give what each gives alone."""
    uniform = torch.rand(ROWS, 1, generator=generator(3))
    mixed = Sampling().parameters(ROWS, CPU)
    mixed.temperature[::2] = 0.0
    got = draw(logits, uniform, mixed).ids
    for start, temperature in ((0, 0.0), (1, 1.0)):
        alone = draw(logits, uniform, Sampling(temperature).parameters(ROWS, CPU)).ids
        assert torch.equal(got[start::2], alone[start::2])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_no_distribution_shows_in_the_log_probability(value: float) -> None:
    broken = torch.full((1, 4), value) if value < 0 else torch.tensor([[0.0, value, 0.0, 0.0]])
    got = draw(broken, torch.zeros(1, 1), Sampling().parameters(1, CPU))
    assert got.logprobs.isnan().all()


def test_uniforms_of_a_row_depend_on_its_seed_alone() -> None:
    three = uniforms([5, 6, 7], 20)
    assert torch.equal(uniforms([6], 300)[:, :20], three[1:2])
    assert not torch.equal(three[0], three[1])
    assert uniforms([], 20).shape == (0, 20)


def test_seeds() -> None:
    assert row_seeds(7, 3) == [7, 8, 9]
    assert row_seeds([3, 3], 2) == [3, 3]
    torch.manual_seed(0)
    first = row_seeds(None, 2)
    assert first[0] != first[1]
    assert row_seeds(None, 2) != first
    torch.manual_seed(0)
    assert row_seeds(None, 2) == first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature must be a finite number of at least 0, got -0.1"),
        ({"temperature": math.nan}, "temperature must be a finite number of at least 0, got nan"),
        ({"temperature": math.inf}, "temperature must be a finite number of at least 0, got inf"),
        ({"temperature": 10**400}, "temperature must be a finite number of at least 0, got 1000"),
        ({"temperature": True}, "temperature must be a finite number of at least 0, got True"),
        ({"top_k": 0}, "top_k must be None or an int of at least 1, got 0"),
        ({"top_k": 2.0}, "top_k must be None or an int of at least 1, got 2.0"),
        ({"top_p": 0.0}, r"top_p must be None or in \(0, 1\], got 0.0"),
        ({"min_p": 1.1}, r"min_p must be None or in \[0, 1\], got 1.1"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a finite number over 0, got 0"),
        ({"repetition_penalty": math.inf}, "penalty must be a finite number over 0, got inf"),
        ({"repetition_penalty": "2"}, "penalty must be a finite number over 0, got '2'"),
    ],
)
def test_bad_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def test_more_than_all_bytes_are_all_of_them() -> None:
    """Also where int64 has no such number."""
    logits, uniform = torch.randn(2, 256), torch.rand(2, 1)
    everything = draw(logits, uniform, Sampling().parameters(2, logits.device)).ids
    most = draw(logits, uniform, Sampling(top_k=2**64).parameters(2, logits.device)).ids
    assert torch.equal(most, everything)


@pytest.mark.parametrize(
    ("seed", "message"),
    [
        (-1, r"be an int in \[0, 2\^63\), got -1"),
        (2**63, r"be an int in \[0, 2\^63\), got 9223372036854775808"),
        (2**63 - 1, r"leave room below 2\^63 for 2 rows, .* got 9223372036854775807"),
        (1.5, "be an int or one for each of 2 rows, got 1.5"),
        (True, "be an int or one for each of 2 rows, got True"),
        ("12", "be an int or one for each of 2 rows, got '12'"),
        ([1], "be an int or one for each of 2 rows, got a list of 1"),
        ([1, 2.0], r"be an int in \[0, 2\^63\), got 2.0"),
        ([1, -2], r"be an int in \[0, 2\^63\), got -2"),
        ([1, True], r"be an int in \[0, 2\^63\), got True"),
    ],
)
def test_bad_seeds_are_named(seed, message: str) -> None:
    with pytest.raises(ValueError, match=f"^seed must {message}$"):
        row_seeds(seed, 2)


def test_the_largest_seeds() -> None:
    assert row_seeds(2**63 - 2, 2) == [2**63 - 2, 2**63 - 1]
    assert row_seeds(2**63 - 1, 1) == row_seeds([2**63 - 1], 1) == [2**63 - 1]
