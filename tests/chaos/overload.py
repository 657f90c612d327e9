"""Five times the peak: what is answered, what is refused, how fast, and where the cores go."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

import load
import numpy as np
import psutil
from place import MODEL, Check, Serving

from samp_core.control import Control

TIMES = 5
# Of requests of 16 texts five times the peak are few, so that the generator, which has the same
# cores, takes little. Of single texts they are many: stated, no promise.
CASES = (("exact", 16, True), ("fast", 1, False))
# Callers times texts at the peak: four full batches.
IN_FLIGHT = 256
HELD = 0.9
_OURS_OR_TRITONS = re.compile(r"overloaded: |maximum queue size")


@dataclass
class OverHttp:
    """The same tier over HTTP, some times a second: which status a refusal has."""

    address: str
    tier: str
    statuses: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(4)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        text = {"name": "TEXT", "datatype": "BYTES", "shape": [1, 1], "data": ["a fine film"]}
        while not self._ended.wait(0.3):
            connection = http.client.HTTPConnection(self.address, timeout=60)
            path = f"/v2/models/{MODEL}_{self.tier}/infer"
            connection.request("POST", path, json.dumps({"inputs": [text]}))
            answer = connection.getresponse()
            said = "" if answer.status == 200 else answer.read().decode()
            self.statuses[f"{answer.status} {_bare(said)[:120]}".strip()] += 1

    def stop(self) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(90)


def campaign(serving: Serving, seconds: float, judged: bool) -> list[Check]:
    """judged: throughput, too; on a machine that is shared with others it is only stated."""
    return [_overload(serving, tier, rows, judged and of, seconds) for tier, rows, of in CASES]


def _overload(serving: Serving, tier: str, rows: int, judged: bool, seconds: float) -> Check:
    callers = IN_FLIGHT // rows

    def peak() -> tuple[float, dict[str, float]]:
        with _Cores(serving) as cores:
            best = load.peak(serving, tier, 5.0, rows, callers)
        return best, cores.used

    load.peak(serving, tier, 2.0, rows, callers)  # warm
    (first, at_peak), rss = peak(), sum(serving.rss_mb().values())
    counted = _refusals(serving, tier)
    over_http = OverHttp(serving.http, tier)
    begun = time.monotonic()
    with _Cores(serving) as cores:
        sent = asyncio.run(load.opened(serving.grpc, tier, TIMES * first, seconds, rows))
    over_http.stop()
    time.sleep(2.0)  # counters are handed over once a second
    counted = _refusals(serving, tier) - counted
    grown = sum(serving.rss_mb().values()) - rss
    second, _ = peak()
    best = (first + second) / 2
    half = [when for when in sent.when if begun + seconds / 2 <= when <= begun + seconds]
    held = len(half) / (seconds / 2) / best
    offered = (len(sent.answers) + len(sent.refused)) / sent.seconds
    refusals, answers = (1e3 * np.array(x or [np.nan]) for x in (sent.refused, sent.answers))
    words = Counter({_bare(word): 0 for word in sent.words})
    for word, count in sent.words.items():
        words[_bare(word)] += count
    clear = all(word.startswith("UNAVAILABLE") and _OURS_OR_TRITONS.search(word) for word in words)
    clear &= all(said[:3] in ("200", "503") for said in over_http.statuses)
    ours = sum(n for word, n in (words + over_http.statuses).items() if "overloaded" in word)
    every = counted == ours
    code, _ = serving.status()
    at_once = np.median(refusals) < np.median(answers) / 2
    sound = bool(sent.refused) and clear and every and code == 0 and grown < 300 and bool(at_once)
    holds = sound and held >= HELD
    return Check(
        "overload",
        f"{TIMES} times the peak of tier {tier} in requests of {rows}: what is beyond the queues "
        "is refused at once with UNAVAILABLE (HTTP 503), each `overloaded` counted"
        + (f"; throughput at least {HELD:.0%} of its peak" if judged else ""),
        f"peak {best:.0f} a second, offered {offered:.0f}: {len(sent.answers):,} answered, the "
        f"slowest in {max(answers) / 1e3:.1f} s; {len(sent.refused):,} refused, in "
        f"{np.median(refusals):.0f} ms at the median and {np.percentile(refusals, 99):.0f} at the "
        f"99th percentile; {ours:,} of all `overloaded`, {counted:,} counted; throughput "
        f"{held:.0%} of the peak; cores: "
        f"callers {cores.used['callers']:.2f} (at the peak {at_peak['callers']:.2f}), Triton "
        f"{cores.used['triton']:.2f} ({at_peak['triton']:.2f}), tokenizer "
        f"{cores.used['tokenizer']:.2f} ({at_peak['tokenizer']:.2f}), encoder "
        f"{cores.used['encoder']:.2f} ({at_peak['encoder']:.2f}); RSS {grown:+.0f} MB",
        holds if judged else (None if sound else False),
        "make chaos CHAOS='--only overload'",
        {
            "peaks_requests_s": [round(first, 1), round(second, 1)], "rows": rows, "tier": tier,
            "offered_s": round(offered, 1), "words": dict(words),
            "http": dict(over_http.statuses), "counted": counted,
            "share_of_peak": round(held, 3), "status": code,
            "cores": {k: round(v, 3) for k, v in cores.used.items()},
            "cores_at_peak": {k: round(v, 3) for k, v in at_peak.items()},
            "answers_ms": [round(float(np.percentile(answers, p))) for p in (50, 99, 100)],
            "refusals_ms": [round(float(np.percentile(refusals, p)), 1) for p in (50, 99, 100)],
        },
    )  # fmt: skip


class _Cores:
    """Cores that the callers and each process of the server used meanwhile, by role."""

    def __init__(self, serving: Serving) -> None:
        self._processes = [("triton", psutil.Process(serving.triton))]
        for name, pids in serving.stubs().items():
            self._processes += [(name.partition("_")[0], psutil.Process(pid)) for pid in pids]
        self._processes.append(("callers", psutil.Process()))
        self.used: dict[str, float] = {}

    def _seconds(self) -> dict[str, float]:
        total: Counter[str] = Counter()
        for role, process in self._processes:
            times = process.cpu_times()
            total[role] += times.user + times.system  # type: ignore[assignment]
        return dict(total)

    def __enter__(self) -> _Cores:
        self._begun, self._before = time.monotonic(), self._seconds()
        return self

    def __exit__(self, *_: object) -> None:
        passed = time.monotonic() - self._begun
        after = self._seconds()
        self.used = {role: (after[role] - self._before[role]) / passed for role in after}


def _refusals(serving: Serving, tier: str) -> int:
    """What the server has counted as refused for overload, of this tier."""
    lines = Control(serving.facts["metrics"]).text("/metrics").splitlines()
    labels = (f'tier="{tier}"', 'reason="overloaded"')
    found = [
        x for x in lines if x.startswith("samp_refused_total{") and all(y in x for y in labels)
    ]
    return sum(int(float(line.rsplit(" ", 1)[1])) for line in found)


def _bare(words: str) -> str:
    """Without the numbers, which differ from refusal to refusal."""
    return re.sub(r"[\d.]+ s of work", "N s of work", words)
