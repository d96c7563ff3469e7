"""How far a run is, and the learning rate that belongs there."""

import math
import time
from dataclasses import dataclass

WARMUP = 0.1  # share of the run, as in the paper: linear warm-up over the first tenth
DECAY = 0.2  # share of the run, as in the paper: inverse square root decay over the last fifth


def warmup_stable_decay(progress: float) -> float:
    """Return the factor on the peak learning rate at a fraction `progress` of the run, 0 to 1."""
    if progress < WARMUP:
        return max(progress, 0.0) / WARMUP
    into_decay = (progress - (1 - DECAY)) / DECAY
    return 1 - math.sqrt(min(max(into_decay, 0.0), 1.0))


@dataclass(frozen=True)
class Limit:
    """Where a run ends: after some steps, some minutes of training, or whichever comes first."""

    steps: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise ValueError("steps and minutes are both missing; one of them has to end the run")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps is {self.steps}; it must be at least 1")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise ValueError(f"minutes is {self.minutes:g}; it must be more than 0 and finite")

    def progress(self, steps: float, seconds: float) -> float:
        """Return the share that is over; given `steps` alone, it is the same on any machine."""
        by_steps = steps / self.steps if self.steps is not None else 0.0
        by_time = seconds / (60 * self.minutes) if self.minutes is not None else 0.0
        return max(by_steps, by_time)


class Stopwatch:
    """Seconds since it was made, on top of those of the earlier parts of a resumed run."""

    def __init__(self, earlier: float = 0.0) -> None:
        self._start = time.perf_counter() - earlier

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start
