"""The learning rate over a run, and where the run ends."""

import math

import pytest

from h_net_dynamic_chunking.training.schedule import Limit, Stopwatch, warmup_stable_decay


@pytest.mark.parametrize(
    ("progress", "factor"),
    [(0.0, 0.0), (0.05, 0.5), (0.1, 1.0), (0.5, 1.0), (0.8, 1.0), (0.85, 0.5), (1.0, 0.0)],
)
def test_warmup_stable_decay(progress: float, factor: float) -> None:
    assert warmup_stable_decay(progress) == pytest.approx(factor)
    assert warmup_stable_decay(1.2) == 0.0


def test_the_limit_that_comes_first_counts() -> None:
    assert Limit(steps=100).progress(25, 1e9) == 0.25
    assert Limit(minutes=2).progress(25, 30.0) == 0.25
    assert Limit(steps=100, minutes=2).progress(25, 90.0) == 0.75
    assert Limit(steps=100, minutes=2).progress(80, 90.0) == 0.8


@pytest.mark.parametrize(
    ("steps", "minutes"), [(None, None), (0, None), (None, 0.0), (None, math.nan), (5, math.inf)]
)
def test_a_run_must_end_and_must_begin(steps: int | None, minutes: float | None) -> None:
    with pytest.raises(ValueError, match=r"steps|minutes"):
        Limit(steps, minutes)


def test_a_resumed_stopwatch_goes_on() -> None:
    assert 100 <= Stopwatch(100.0).seconds < 110
