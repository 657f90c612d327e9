"""What all peers have in common: padded inputs, ways to cut a mixed batch, and one arm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from samp_kernels.interface import F32, Array

GROUP = 8
# How a batch of texts of different lengths can be fed to something that wants rectangles.
WAYS = ("padded", f"sorted, groups of {GROUP}", "one by one")

Call = Callable[[], Any]
"""One forward pass over inputs that are bound to it; the hidden states [b, s, H]."""


@dataclass(frozen=True)
class Arm:
    """One way of running a peer. bind(ids, mask, types), int64 [b, s] each, gives a Call.

    fixed: the same compiled for one shape [b, s] only, where the peer can do that.
    """

    column: str
    name: str
    bind: Callable[[Array, Array, Array], Call]
    fixed: Callable[[Sequence[int]], Arm] | None = None


def groups(lengths: Sequence[int], way: str) -> list[list[int]]:
    """The texts of each rectangle."""
    count = len(lengths)
    if way == "padded":
        return [list(range(count))]
    if way == "one by one":
        return [[index] for index in range(count)]
    order = np.argsort(lengths, kind="stable").tolist()
    return [order[start : start + GROUP] for start in range(0, count, GROUP)]


def rectangle(ids: Sequence[Array]) -> tuple[Array, Array, Array]:
    """ids, mask and types, int64 [texts, longest], zeros behind each text."""
    longest = max(len(row) for row in ids)
    padded = np.zeros((len(ids), longest), dtype=np.int64)
    mask = np.zeros_like(padded)
    for index, row in enumerate(ids):
        padded[index, : len(row)] = row
        mask[index, : len(row)] = 1
    return padded, mask, np.zeros_like(padded)


def bind(arm: Arm, ids: Sequence[Array], way: str) -> tuple[Call, Callable[[], F32]]:
    """(run, hidden) over these texts: a pass, and a pass whose rows are [tokens, H], in order."""
    lengths = [len(row) for row in ids]
    parts = groups(lengths, way)
    calls = [arm.bind(*rectangle([ids[index] for index in part])) for part in parts]

    def run() -> object:
        result = None
        for call in calls:
            result = call()
        return result

    def hidden() -> F32:
        rows: list[F32] = [np.empty((0, 0), np.float32)] * len(ids)
        for call, part in zip(calls, parts, strict=True):
            states = np.asarray(call())
            for place, index in enumerate(part):
                rows[index] = np.array(states[place, : lengths[index]], dtype=np.float32)
        return np.concatenate(rows)

    return (calls[0] if len(calls) == 1 else run), hidden
