"""The bound of a tier's queue: what passes, and that no death or loss closes it for good."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from samp_core import admission
from samp_core.admission import HARD_LIMIT, LEAST_REQUESTS, LEAST_ROWS, Gate, Gates, Progress

BATCH_S = 0.1


class Clock:
    """time.monotonic of both sides."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.slept: list[float] = []
        monkeypatch.setattr(admission.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(admission.time, "sleep", self._sleep)

    def _sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def run(progress: Progress, clock: Clock, batches: int) -> None:
    """Full batches of 64 rows: 640 rows a second."""
    for _ in range(batches):
        progress.begin(64)
        clock.now += BATCH_S
        progress.end(64)


def admit(gate: Gate, rows: int) -> float | None:
    """One request that came by itself."""
    gate.settle()
    return gate.admit(rows)


def fill(gate: Gate, rows: int) -> int:
    """Rows let through until the first refusal, in requests of `rows`."""
    for count in itertools.count():
        if admit(gate, rows) is not None:
            return count * rows
    raise AssertionError


def test_the_bound_is_seconds_of_measured_work(tmp_path: Path, clock: Clock) -> None:
    reader = Progress(tmp_path / "queue")
    progress = Progress(tmp_path / "queue")
    progress.reset()
    run(progress, clock, 20)
    for limit_s in (0.5, 2.0):
        assert fill(Gate(reader, limit_s), 16) == 640 * limit_s
    gate = Gate(reader, 1.0)
    assert fill(gate, 1) == 640
    run(progress, clock, 1)
    assert fill(gate, 1) == 64  # what a batch took may come again
    waits_s = admit(gate, 1)
    assert waits_s == pytest.approx(1.0)


def test_a_slow_encoder_always_has_its_next_batches(tmp_path: Path, clock: Clock) -> None:
    progress = Progress(tmp_path / "queue")
    run(progress, clock, 20)
    assert fill(Gate(progress, 0.001), 1) == LEAST_ROWS


def test_nothing_is_refused_before_a_rate_is_known(tmp_path: Path) -> None:
    progress = Progress(tmp_path / "queue")
    progress.reset()
    gate = Gate(progress, 0.001)
    assert all(admit(gate, 64) is None for _ in range(1000))


def test_tiers_do_not_refuse_for_each_other(tmp_path: Path, clock: Clock) -> None:
    gates = {}
    for tier in ("exact", "fast"):
        progress = Progress(tmp_path / tier)
        run(progress, clock, 20)
        gates[tier] = Gate(progress, 1.0)
    fill(gates["exact"], 64)
    assert admit(gates["exact"], 1) is not None
    assert admit(gates["fast"], 1) is None


def two_tiers(tmp_path: Path, clock: Clock) -> Gates:
    """Of tiers exact and fast; exact is full."""
    made = {}
    for tier in ("exact", "fast"):
        progress = Progress(tmp_path / tier)
        run(progress, clock, 20)
        made[tier] = Gate(progress, 1.0)
        progress.begin(64)  # it is at work all the while
    fill(made["exact"], 64)
    return Gates(made)


def test_what_comes_together_is_told_apart(tmp_path: Path, clock: Clock) -> None:
    gates = two_tiers(tmp_path, clock)
    waits = gates.admit([("exact", 1), None, ("fast", 600), ("fast", 100), ("exact", 2)])
    assert waits == [pytest.approx(1.6), None, None, None, pytest.approx(1.6)]
    assert clock.slept == []
    assert Gates({}).admit([None, None]) == [None, None]
    assert gates.admit([]) == []


def test_refusals_alone_are_held_until_some_can_go_together(tmp_path: Path, clock: Clock) -> None:
    gates = two_tiers(tmp_path, clock)
    pace = admission.REFUSE_EVERY_S
    assert gates.admit([("exact", 1)]) != [None]
    assert clock.slept == []  # the first goes at once
    clock.now += pace / 4
    gates.admit([("exact", 1), ("exact", 1)])
    assert clock.slept == [pytest.approx(pace * 3 / 4)]
    # What anybody else sent is not held, and holds nothing up.
    for other in (None, ("fast", 1)):
        assert gates.admit([("exact", 1), other])[1] is None
    gates.admit([None])
    assert len(clock.slept) == 1
    clock.now += 2 * pace
    gates.admit([("exact", 1)])
    assert len(clock.slept) == 1


def test_what_never_arrives_is_forgotten(tmp_path: Path, clock: Clock) -> None:
    """Requests that were cancelled between the two: the encoder idles, and the way is open."""
    progress = Progress(tmp_path / "queue")
    run(progress, clock, 20)
    gate = Gate(progress, 1.0)
    fill(gate, 64)
    clock.now += 0.3
    assert fill(gate, 16) == 640


def test_what_never_arrives_is_forgotten_under_load(tmp_path: Path, clock: Clock) -> None:
    """One text of two is refused by the tokenizer, and there is little work: no other one is."""
    progress = Progress(tmp_path / "queue")
    run(progress, clock, 20)
    gate = Gate(progress, 0.1)
    for _ in range(10_000):
        assert admit(gate, 1) is None
        assert admit(gate, 1) is None
        clock.now += 0.006
        progress.begin(1)
        clock.now += 0.004
        progress.end(1)


def test_full_batches_after_a_pause_are_no_empty_queue(tmp_path: Path, clock: Clock) -> None:
    """A busy machine: Triton takes its time, and everything waits."""
    progress = Progress(tmp_path / "queue")
    run(progress, clock, 20)
    gate = Gate(progress, 1.0)
    progress.begin(64)
    fill(gate, 64)
    for _ in range(5):
        clock.now += BATCH_S
        progress.end(64)
        clock.now += 0.1  # longer than any hand-over
        progress.begin(64)
        assert 0 < fill(gate, 64) <= 128
    assert admit(gate, 64) is not None


def test_a_process_that_died_in_a_batch_does_not_close_the_gate(
    tmp_path: Path, clock: Clock
) -> None:
    progress = Progress(tmp_path / "queue")
    run(progress, clock, 20)
    gate = Gate(progress, 1.0)
    progress.begin(64)  # and never ends
    fill(gate, 64)
    clock.now += 5.0
    assert admit(gate, 64) is not None
    clock.now += HARD_LIMIT
    assert admit(gate, 64) is None
    # Another process takes its place and finds the slot as it was left.
    fill(gate, 64)
    Progress(tmp_path / "queue").reset()
    assert admit(gate, 64) is None


def test_direct_calls_of_the_encoder_do_no_harm(tmp_path: Path, clock: Clock) -> None:
    progress = Progress(tmp_path / "queue")
    gate = Gate(progress, 1.0)
    run(progress, clock, 20)  # 1,280 rows that this gate never saw
    assert fill(gate, 16) == 640


def test_a_few_large_requests_may_always_wait(tmp_path: Path, clock: Clock) -> None:
    progress = Progress(tmp_path / "queue")
    run(progress, clock, 20)
    assert fill(Gate(progress, 0.001), 64) == 64 * LEAST_REQUESTS


def test_two_instances_of_each(tmp_path: Path, clock: Clock) -> None:
    """Two encoders are twice as fast; of two tokenizers each lets half of it through."""
    encoders = [Progress(tmp_path / "queue", slot) for slot in (0, 1)]
    for _ in range(20):
        for encoder in encoders:
            encoder.begin(64)
        clock.now += BATCH_S
        for encoder in encoders:
            encoder.end(64)
    gates = [Gate(encoders[0], 1.0, share=0.5) for _ in range(2)]
    assert [fill(gate, 16) for gate in gates] == [640, 640]


def test_it_is_read_across_processes_and_outlives_a_kill(tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from samp_core.admission import Progress\n"
        "progress = Progress(Path(sys.argv[1]))\n"
        "progress.begin(7)\n"
        "print('begun', flush=True)\n"
        "time.sleep(60)\n"
    )
    path = tmp_path / "queue"
    reader = Progress(path)
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    assert reader.taken == 7
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert reader.taken == 7
