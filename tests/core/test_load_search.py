"""Arrival times, length mixes and the search for the highest rate: no server needed."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from samp_client import BadRequest
from samp_loadtest.arrivals import SHAPES, Arrivals, due
from samp_loadtest.settings import read_lengths, with_lengths
from samp_loadtest.slo import LOWER, Target, draw, find_rate


@given(
    st.sampled_from(SHAPES),
    st.floats(0.5, 2000),
    st.floats(1, 100),
    st.lists(st.floats(0, 1e4), min_size=2),
)
def test_more_arrivals_take_longer(
    shape: str, rate: float, seconds: float, counts: list[float]
) -> None:
    times = [due(shape, rate, seconds, count) for count in sorted(counts)]
    assert times == sorted(times)
    assert times[0] >= 0


@pytest.mark.parametrize("shape", SHAPES)
def test_as_many_arrive_as_were_offered(shape: str) -> None:
    arrivals = Arrivals(shape, 100.0, 20.0, seed=3)
    times = [arrivals.take() for _ in range(3000)]
    count = sum(time < 20.0 for time in times)
    expected = 1000 if shape == "ramp" else 2000
    assert abs(count - expected) < 5 * math.sqrt(expected)
    first = sum(time < 10.0 for time in times) / expected
    assert first == pytest.approx(0.25 if shape == "ramp" else 0.5, abs=0.06)
    if shape == "bursts":
        assert all(time % 2.0 <= 0.5 + 1e-6 for time in times)
    other = Arrivals(shape, 100.0, 20.0, seed=4)
    assert other.take() != times[0]


def test_lengths_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mix.txt"
    file.write_text("# words weight\n5 3\n20, 1  # long ones\n\n")
    mix = read_lengths(str(file))
    assert mix == {5: 3.0, 20: 1.0}
    texts = with_lengths(("one two three", "four"), mix, count=400)
    words = [len(text.split()) for text in texts]
    assert set(words) == {5, 20}
    assert words.count(5) / 400 == pytest.approx(0.75, abs=0.07)
    assert texts == with_lengths(("one two three", "four"), mix, count=400)
    for bad in ("", "5", "5 0", "0 1", "a b", "5 1 2"):
        file.write_text(bad)
        with pytest.raises(BadRequest):
            read_lengths(str(file))
    with pytest.raises(BadRequest, match="pairs"):
        with_lengths((("a", "b"),), mix)


def queue(rate: float, seconds: float, capacity: float, seed: int) -> dict[str, float]:
    """One server, Poisson arrivals, each request takes 1/capacity: its response times."""
    draw_ = random.Random(seed)
    now = free = 0.0
    times = []
    while now < seconds:
        now += draw_.expovariate(rate)
        free = max(free, now) + 1 / capacity
        times.append(1000 * (free - now))
    times.sort()
    marks = {p: times[int(len(times) * int(p[1:]) / 100)] for p in ("p50", "p95", "p99")}
    return {"requests": len(times), "failures": 0, "rps": len(times) / max(free, seconds), **marks}


@given(st.floats(20, 3000), st.floats(0.05, 40), st.integers(0, 10**6))
def test_the_search_finds_what_a_queue_bears(capacity: float, first: float, seed: int) -> None:
    """p95 of this queue is at most five service times up to about 80% of the capacity."""
    target = Target("p95", 5 * 1000 / capacity)
    found = find_rate(
        lambda rate, seconds: queue(rate, 4000 / capacity, capacity, seed), target, first=first
    )
    assert found["confirmed"]
    assert 0.5 * capacity < found["rate"] < 1.05 * capacity
    best = [p for p in found["points"] if p["confirms"]][-1]
    assert best["holds"]
    assert best["rate"] == found["rate"]


def test_a_target_out_of_reach_is_said() -> None:
    found = find_rate(lambda rate, s: queue(rate, 5, 100.0, 1), Target("p99", 5.0), first=50.0)
    assert (found["rate"], found["confirmed"]) == (None, False)
    assert len(found["points"]) < 20


def test_a_rate_that_holds_once_is_lowered_until_it_holds_twice() -> None:
    def trial(rate: float, seconds: float) -> dict[str, float]:
        worst = 10.0 if rate <= (100 if seconds < 8 else 80) else 99.0
        marks = dict.fromkeys(("p50", "p95", "p99"), worst)
        return {"requests": 1000, "failures": 0, "rps": rate, **marks}

    found = find_rate(trial, Target("p95", 50.0), first=10.0)
    assert found["confirmed"]
    assert 80 * LOWER <= found["rate"] <= 80


def test_targets() -> None:
    assert Target.parse("p95=50ms") == Target("p95", 50.0)
    assert Target.parse("p99 <= 0.2s") == Target("p99", 200.0)
    for bad in ("p90=5ms", "p95=50", "p95=0ms", "fast"):
        with pytest.raises(BadRequest):
            Target.parse(bad)


def test_the_curve_is_drawn(tmp_path: Path) -> None:
    target = Target("p95", 30.0)
    found = find_rate(lambda rate, s: queue(rate, 20, 200.0, 1), target, first=10.0)
    draw(found, target, tmp_path / "curve.png", "fast", ("p50", "p95", "p99"))
    content = (tmp_path / "curve.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 10_000
    assert [path.name for path in tmp_path.iterdir()] == ["curve.png"]
