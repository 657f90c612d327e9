"""When requests are due under an offered rate: Poisson arrivals, whatever the server does.

A caller that waits for its answer slows down with the server and hides the queue. Here the times
are drawn beforehand; a request that starts late is counted from when it was due.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

SHAPES = ("constant", "ramp", "bursts")
# Bursts: a quarter of each period at four times the rate, then nothing.
PERIOD_S = 2.0
BURST = 4.0


def due(shape: str, rate: float, seconds: float, count: float) -> float:
    """Seconds from the start until the expected number of arrivals is `count`.

    `rate` is the mean over the run for constant and bursts, and what a ramp ends at: it rises
    from nothing over `seconds`, and stays.
    """
    if shape == "constant":
        return count / rate
    if shape == "ramp":
        whole = rate * seconds / 2
        if count <= whole:
            return math.sqrt(2 * seconds * count / rate)
        return seconds + (count - whole) / rate
    periods, rest = divmod(count, rate * PERIOD_S)
    return periods * PERIOD_S + rest / (BURST * rate)


@dataclass
class Arrivals:
    """The due times of one process, in order. seed: another one for each process."""

    shape: str
    rate: float
    seconds: float
    seed: int = 0

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._count = 0.0

    def take(self) -> float:
        """Seconds from the start of the test to the next request."""
        self._count += self._random.expovariate(1.0)
        return due(self.shape, self.rate, self.seconds, self._count)
