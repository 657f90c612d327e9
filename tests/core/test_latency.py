"""Buckets of texts, and medians on a clock that the test turns."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from samp_kernels.interface import Batch

from samp_core import latency
from samp_core.errors import SampError
from samp_core.latency import Bucket, buckets, measure
from samp_core.text import Encoding


def encoding(length: int) -> Encoding:
    return Encoding(np.full(length, length, np.int32), np.zeros(length, np.int32), False, None)


def lengths(bucket: Bucket) -> list[int]:
    return np.diff(bucket.batch.cu_seqlens).tolist()


@pytest.mark.parametrize(("count", "names"), [(1, "1"), (7, "1"), (8, "1 8"), (32, "1 8 32")])
def test_buckets_by_how_many_texts_there_are(count: int, names: str) -> None:
    made = buckets([encoding(5)] * count)
    assert [bucket.name for bucket in made] == names.split()
    assert [bucket.batch.sequences for bucket in made] == [int(name) for name in names.split()]
    assert [bucket.tokens for bucket in made] == [5 * int(name) for name in names.split()]
    assert all(bucket.rounds >= 1 for bucket in made)


def test_buckets_cover_the_lengths() -> None:
    rng = np.random.default_rng(0)
    single, eight, many = buckets([encoding(int(n)) for n in rng.permutation(np.arange(1, 101))])
    assert single.name == latency.SINGLE
    assert lengths(single) == [51]
    assert lengths(eight) == [7, 19, 32, 44, 57, 69, 82, 94]
    assert np.mean(lengths(many)) == pytest.approx(50.5, abs=1)
    assert [many.batch.ids[i] for i in many.batch.cu_seqlens[:-1]] == lengths(many)


def test_no_texts_no_buckets() -> None:
    assert buckets([]) == []


def test_the_position_offset_reaches_the_batch() -> None:
    (bucket,) = buckets([encoding(3)], position_offset=2)
    assert bucket.batch.positions.tolist() == [2, 3, 4]


class Clock:
    """perf_counter that moves only when a call says how long it took."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        self.calls: list[str] = []
        monkeypatch.setattr(latency.time, "perf_counter", lambda: self.now)

    def call(self, name: str, ms: Callable[[int], float]) -> Callable[[Batch], object]:
        def run(batch: Batch) -> object:
            self.calls.append(name)
            self.now += ms(self.calls.count(name)) / 1e3
            return None

        return run


BUCKET = Bucket("1", buckets([encoding(3)])[0].batch, rounds=5)


def test_medians_in_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    calls = {"a": clock.call("a", lambda n: 2.0), "b": clock.call("b", lambda n: float(n))}
    result = measure(calls, BUCKET)
    assert result["a"] == pytest.approx(2.0)
    # Twenty calls in five turns; the first of each warms the caches, the best of the rest counts.
    assert result["b"] == pytest.approx(np.median([2, 6, 10, 14, 18]))


def test_a_slow_moment_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    calls = {"a": clock.call("a", lambda n: 1000.0 if n % 4 == 1 or n == 7 else 1.0)}
    assert measure(calls, BUCKET)["a"] == pytest.approx(1.0)


def test_two_heaps_do_not_change_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most calls are disturbed, not by turns: the median call would be one of those."""
    clock = Clock(monkeypatch)
    calls = {"a": clock.call("a", lambda n: 1.0 if n % 4 == 0 else 2.0)}
    assert measure(calls, BUCKET)["a"] == pytest.approx(1.0)


def test_turns_are_interleaved_and_shuffled(monkeypatch: pytest.MonkeyPatch) -> None:
    def order(seed: int) -> list[str]:
        clock = Clock(monkeypatch)
        measure({name: clock.call(name, lambda n: 1.0) for name in "abcd"}, BUCKET, seed=seed)
        return clock.calls

    calls = order(0)
    rounds = [calls[i : i + 16] for i in range(0, len(calls), 16)]
    assert len(rounds) == BUCKET.rounds
    for turn in rounds:
        assert all(turn[i : i + 4] == [turn[i]] * 4 for i in range(0, 16, 4))
        assert sorted(turn[::4]) == list("abcd")
    assert len({tuple(turn[::4]) for turn in rounds}) > 1
    assert order(0) == calls
    assert order(1) != calls


def test_progress_by_round(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    clock = Clock(monkeypatch)
    measure({"a": clock.call("a", lambda n: 1.0)}, BUCKET, progress=lambda: steps.append(1))
    assert len(steps) == BUCKET.rounds


def test_nothing_to_measure() -> None:
    with pytest.raises(SampError, match="nothing_to_measure: no plans"):
        measure({}, BUCKET)


def test_a_plan_is_foretold_at_the_pace_of_its_turns() -> None:
    modelled = {"latency_ms": {"1": 2.0, "8": 8.0}, "pace": {"1": 1.5, "8": 1.5}}
    assert latency.foretold(modelled) == {"1": 3.0, "8": 12.0}
    assert latency.foretold({"latency_ms": {"1": 2.0}}) == {"1": 2.0}, "a mode of SAMP's has none"
    assert latency.foretold({}) == {}
