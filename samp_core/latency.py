"""What a plan costs on this device: whole passes with the real kernels, interleaved."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from samp_kernels.interface import Batch, pack_batch

from samp_core.errors import SampError
from samp_core.text import Encoding

Call = Callable[[Batch], object]

SINGLE = "1"
"""The bucket of one text of the data's median length; latency targets mean this one."""


@dataclass(frozen=True)
class Bucket:
    """A shape class: `name` says its texts (`8`, or `8x211` with tokens); `rounds`: how often it is
    measured.
    """

    name: str
    batch: Batch
    rounds: int

    @property
    def tokens(self) -> int:
        return self.batch.tokens


def rounds(texts: int) -> int:
    """How often a bucket of so many texts is measured."""
    return 15 if texts < 8 else 8 if texts < 32 else 4


def buckets(encodings: Sequence[Encoding], position_offset: int = 0) -> list[Bucket]:
    """One text of median length, then 8 and 32 texts spread evenly over the lengths found."""
    ordered = sorted(encodings, key=lambda e: len(e.ids))
    made = []
    for count in (1, 8, 32):
        if count > len(ordered):
            break
        places = ((np.arange(count) + 0.5) / count * len(ordered)).astype(int)
        chosen = [ordered[i] for i in places]
        batch = pack_batch(
            [e.ids for e in chosen], [e.types for e in chosen], position_offset=position_offset
        )
        made.append(Bucket(str(count), batch, rounds(count)))
    return made


def measure(
    calls: Mapping[str, Call],
    bucket: Bucket,
    *,
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Median milliseconds of each call on a bucket, over turns.

    The calls take turns in a shuffled order, so that a slow moment of the machine falls on all;
    each turn runs once unmeasured first, so that a plan's own weights are in cache as when it is
    served. A turn is the fastest of three calls: where other processes take the cores now and
    then, single calls lie in two heaps, and their median in either.
    """
    if not calls:
        raise SampError("nothing_to_measure", "no plans", "one plan or more", "report this")
    generator = np.random.default_rng(seed)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for _ in range(bucket.rounds):
        for index in generator.permutation(len(names)).tolist():
            call = calls[names[index]]
            call(bucket.batch)
            fastest = math.inf
            for _ in range(3):
                begin = time.perf_counter()
                call(bucket.batch)
                fastest = min(fastest, time.perf_counter() - begin)
            samples[names[index]].append(fastest * 1e3)
        progress()
    return {name: float(np.median(values)) for name, values in samples.items()}


def foretold(modelled: Mapping[str, Any]) -> dict[str, float]:
    """The latencies of a plan's `modelled` at the pace of the turns that measured it (costs.py)."""
    at = modelled.get("pace", {})
    told = modelled.get("latency_ms", {})
    return {bucket: ms * at.get(bucket, 1.0) for bucket, ms in told.items()}
