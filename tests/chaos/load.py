"""Callers that wait for their answers, requests that arrive whatever becomes of them; the soak."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import wire
from http2 import Calls
from place import MODEL, Check, Serving, demo_texts

METHOD = "/inference.GRPCInferenceService/ModelInfer"
# Rows in a request: few requests make a full load, so that the callers cost the server little.
ROWS = 4
# Every call has a deadline of a minute.
GIVEN_UP = 75.0
# What may be added over a soak: a fit through noise of one process, after the warm-up.
GROWTH_MB = 8.0
SHM_MB = 1.0


@dataclass
class Sent:
    """What became of requests: seconds of each answer and refusal, and the words of refusals."""

    answers: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    words: Counter[str] = field(default_factory=Counter)
    when: list[float] = field(default_factory=list)
    seconds: float = 0.0  # in which they were sent

    def add(self, begun: float, error: str | None) -> None:
        now = time.monotonic()
        if error is None:
            self.answers.append(now - begun)
            self.when.append(now)
        else:
            self.refused.append(now - begun)
            self.words[error] += 1

    def join(self, other: Sent) -> None:
        self.answers += other.answers
        self.refused += other.refused
        self.words += other.words
        self.when += other.when
        self.seconds += other.seconds


def bodies_of(tier: str, rows: int) -> list[bytes]:
    """Serialized requests of so many texts."""
    texts = [text.encode() for text in demo_texts(64)]
    made = []
    for start in range(0, len(texts), rows):
        raw = wire.bytes_raw(texts[start : start + rows])
        tensor = wire.Tensor("TEXT", "BYTES", (rows, 1), raw)
        made.append(wire.over_grpc(f"{MODEL}_{tier}", [tensor]))
    return made


def closed(address: str, tier: str, callers: int, seconds: float, rows: int) -> Sent:
    """Each caller sends when its last answer has come."""
    sent, bodies = Sent(), bodies_of(tier, rows)
    end = time.monotonic() + seconds
    with Calls(address, METHOD) as calls:
        begun: dict[int, float] = {}
        made = free = 0

        def send(count: int) -> None:
            nonlocal made
            picked = [bodies[(made + index) % len(bodies)] for index in range(count)]
            made += count
            begun.update(dict.fromkeys(calls.send(picked), time.monotonic()))

        send(callers)
        while calls.open:
            free = _receive(calls, begun, sent, GIVEN_UP)
            if time.monotonic() < end:
                send(free)
    return sent


def opened(address: str, tier: str, rate: float, seconds: float, rows: int) -> Sent:
    """Requests at Poisson moments, whatever became of those before."""
    sent, bodies = Sent(), bodies_of(tier, rows)
    gaps = np.random.default_rng(0).exponential(1 / rate, int(rate * seconds))
    with Calls(address, METHOD) as calls:
        begun: dict[int, float] = {}
        start = time.monotonic()
        moments = (start + np.cumsum(gaps)).tolist()
        made = 0
        while made < len(moments):
            now, due = time.monotonic(), made
            while due < len(moments) and moments[due] <= now:
                due += 1
            picked = [bodies[index % len(bodies)] for index in range(made, due)]
            begun.update(dict.fromkeys(calls.send(picked), now))
            made = due
            # Read once even when it is late, or nothing would be read until all is sent.
            wait = moments[made] - time.monotonic() if made < len(moments) else 0.0
            _receive(calls, begun, sent, max(0.0, wait))
        sent.seconds = time.monotonic() - start
        while calls.open:
            _receive(calls, begun, sent, GIVEN_UP)
    return sent


def _receive(calls: Calls, begun: dict[int, float], sent: Sent, seconds: float) -> int:
    ended = calls.receive(seconds)
    if not ended and seconds == GIVEN_UP:
        raise SystemExit(f"chaos: {len(calls.open)} requests without an answer for {seconds:.0f} s")
    for stream, error in ended:
        sent.add(begun.pop(stream), error)
    return len(ended)


def peak(serving: Serving, tier: str, seconds: float, rows: int = ROWS, callers: int = 16) -> float:
    """Requests a second that callers get who wait for each answer."""
    begun = time.monotonic()
    sent = closed(serving.grpc, tier, callers, seconds, rows)
    return sum(when <= begun + seconds for when in sent.when) / seconds


@dataclass
class Watch:
    """Memory of every process and of /dev/shm, once a second, until it is stopped."""

    serving: Serving
    rows: list[tuple[float, dict[str, float]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(1.0):
            seen = {**self.serving.rss_mb(), "/dev/shm": self.serving.shm_mb()}
            self.rows.append((time.monotonic(), seen))

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def growth(self) -> dict[str, tuple[float, float]]:
        """name -> what a straight line through the last three quarters gains, and the mean, MB."""
        kept = self.rows[len(self.rows) // 4 :]
        at = np.array([when for when, _ in kept])
        found = {}
        for name in kept[0][1]:
            values = np.array([seen[name] for _, seen in kept])
            slope = np.polyfit(at - at[0], values, 1)[0]
            found[name] = (float(slope * (at[-1] - at[0])), float(values.mean()))
        return found


def soak(serving: Serving, seconds: float) -> Check:
    """80% of the peak, with a warm-up; memory must not grow."""
    best = peak(serving, "fast", 6.0)
    watch = Watch(serving)
    sent = opened(serving.grpc, "fast", 0.8 * best, seconds, ROWS)
    watch.stop()
    growth = watch.growth()
    worst = max((name for name in growth if name != "/dev/shm"), key=lambda n: growth[n][0])
    shm = growth["/dev/shm"]
    flat = growth[worst][0] < GROWTH_MB and shm[0] < SHM_MB
    # A machine that is shared may become slower than it was at the peak: then there is too much.
    late = sum(count for word, count in sent.words.items() if "overloaded: " in word)
    return Check(
        "soak",
        f"{seconds:.0f} s at 80% of the measured peak: memory of every process grows less than "
        f"{GROWTH_MB:.0f} MB, /dev/shm less than {SHM_MB:.0f} MB (straight line, warm-up left out)",
        f"{len(sent.answers):,} requests of {ROWS} texts answered, {late} refused as too much, "
        f"{len(sent.refused) - late} not answered; most: "
        f"{worst} {growth[worst][0]:+.1f} MB of {growth[worst][1]:.0f}; /dev/shm {shm[0]:+.1f} MB "
        f"of {shm[1]:.1f}",
        flat and len(sent.refused) == late < len(sent.answers),
        f"make chaos CHAOS='--only soak --soak {seconds:.0f}'",
        {
            "rate": round(0.8 * best, 1), "words": dict(sent.words),
            "growth_mb": {n: [round(g, 2), round(m, 1)] for n, (g, m) in growth.items()},
            "p99_ms": round(1e3 * float(np.percentile(sent.answers, 99)), 1),
        },
    )  # fmt: skip
