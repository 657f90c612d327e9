"""Five times the peak: what is answered, what is refused, how fast, and where the cores go."""

from __future__ import annotations

import http.client
import json
import os
import re
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import load
import numpy as np
import psutil
from place import MODEL, Check, Serving

from samp_core.control import Control

TIMES = 5
# Of requests of 16 texts five times the peak are few: a refusal costs next to nothing of an answer,
# and the generator, which has the same cores, takes little. Of single texts they are many, and what
# Triton takes to hand one over to any Python model is more than the tenth of an answer that is to
# spare, and one generator on the same cores cannot even send them in time (docs/reliability.md):
# there throughput is stated.
CASES = (("exact", 16), ("fast", 16), ("fast", 1))
# Callers times texts at the peak: four full batches.
IN_FLIGHT = 256
HELD = 0.9
ROUNDS = 2
PEAK_S = 5.0
FLOOR_S = 2.0
# Of a stretch so much is not looked at: the queues fill.
LEAD = 0.3
SERVER = ("triton", "tokenizer", "encoder", "head")
# Where others use more of the cores, rates say nothing: then what is compared is what the server
# answered for each second of CPU time that it got. Callers are never counted as the server's.
QUIET = 0.05
_OURS = re.compile(r"overloaded: ")


@dataclass
class OverHttp:
    """The same tier over HTTP, some times a second: which status a refusal has."""

    address: str
    tier: str
    statuses: Counter[str] = field(default_factory=Counter)

    def __enter__(self) -> None:
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

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(90)


def campaign(serving: Serving, seconds: float, judged: bool) -> list[Check]:
    """judged: throughput, too; the short campaign only states it."""
    return [_overload(serving, tier, rows, judged, seconds) for tier, rows in CASES]


@dataclass(frozen=True)
class Phase:
    """What was answered in a stretch of time, and the cores that were used meanwhile, by role."""

    answers_s: float
    cores: Mapping[str, float]

    @property
    def server(self) -> float:
        """Cores that the server used."""
        return sum(self.cores[role] for role in SERVER)

    @staticmethod
    def mean(phases: Sequence[Phase]) -> Phase:
        cores = {role: statistics.mean(p.cores[role] for p in phases) for role in phases[0].cores}
        return Phase(statistics.mean(p.answers_s for p in phases), cores)


def _overload(serving: Serving, tier: str, rows: int, judged: bool, seconds: float) -> Check:
    """Peaks and overloads in turn, so that a slow minute of the machine falls on both."""
    callers = IN_FLIGHT // rows
    peaks: list[Phase] = []
    overs: list[Phase] = []
    sent, at_peaks = load.Sent(), load.Sent()
    over_http = OverHttp(serving.http, tier)
    refused_s: list[float] = []

    def peak() -> None:
        call = partial(load.closed, serving.grpc, tier, callers, PEAK_S, rows)
        phase, made = _phase(serving, call, PEAK_S)
        peaks.append(phase)
        at_peaks.join(made)

    load.peak(serving, tier, 2.0, rows, callers)  # warm
    time.sleep(2.0)  # counters are handed over once a second
    rss, counted = sum(serving.rss_mb().values()), _refusals(serving, tier)
    peak()
    for _ in range(ROUNDS):
        rate = TIMES * peaks[0].answers_s
        call = partial(load.opened, serving.grpc, tier, rate, seconds / ROUNDS, rows)
        with over_http:
            phase, made = _phase(serving, call, seconds / ROUNDS)
        overs.append(phase)
        refused_s.append(len(made.refused) / made.seconds)
        sent.join(made)
        peak()
    time.sleep(2.0)
    counted = _refusals(serving, tier) - counted
    grown = sum(serving.rss_mb().values()) - rss
    at_peak, over = Phase.mean(peaks), Phase.mean(overs)
    held = over.answers_s / at_peak.answers_s
    work = held * at_peak.server / over.server
    # What one refusal took of the server: what its answers do not explain.
    answers_took = over.answers_s * at_peak.server / at_peak.answers_s
    refusal_us = 1e6 * (over.server - answers_took) / max(statistics.mean(refused_s), 1e-9)
    answer_us = 1e6 * at_peak.server / at_peak.answers_s
    unknown_us = _unknown_us(serving, callers)
    cost = f"; CPU of the server: an answer {answer_us:.0f} us"
    if rows == 1:  # beside answers of many texts it is lost in their spread
        cost += (
            f", a refusal {refusal_us:.0f}, a request that Triton itself refuses {unknown_us:.0f}"
        )
    others = max(phase.cores["others"] for phase in (at_peak, over))
    quiet = others <= QUIET * (os.cpu_count() or 1)
    offered = (len(sent.answers) + len(sent.refused)) / sent.seconds
    refusals, answers = (1e3 * np.array(x or [np.nan]) for x in (sent.refused, sent.answers))
    words: Counter[str] = Counter()
    for word, count in (sent.words + at_peaks.words).items():
        words[_bare(word)] += count
    clear = all(word.startswith("UNAVAILABLE") and _OURS.search(word) for word in words)
    clear &= all(said[:3] in ("200", "503") for said in over_http.statuses)
    ours = sum(n for word, n in (words + over_http.statuses).items() if "overloaded" in word)
    code, _ = serving.status()
    sound = bool(sent.refused) and clear and counted == ours and code == 0 and grown < 300
    # A short campaign has too few single texts to tell it of a generator that is late.
    if judged or rows > 1:
        sound &= bool(np.median(refusals) < np.median(answers) / 2)
    judged &= rows > 1
    holds = sound and (held if quiet else work) >= HELD
    promise = f"; throughput at least {HELD:.0%} of the peak's" if judged else ""
    if judged and not quiet:
        promise += " for the CPU time that the server got, as others used this machine"
    cores = ", ".join(
        f"{role} {over.cores[role]:.2f} ({at_peak.cores[role]:.2f})" for role in over.cores
    )
    return Check(
        "overload",
        f"{TIMES} times the peak of tier {tier} in requests of {rows}: what is beyond the queues "
        f"is refused at once with UNAVAILABLE (HTTP 503), each `overloaded` counted{promise}",
        f"peak {at_peak.answers_s:.0f} a second, offered {offered:.0f}: {len(sent.answers):,} "
        f"answered, the slowest in {max(answers) / 1e3:.1f} s; {len(sent.refused):,} refused, in "
        f"{np.median(refusals):.0f} ms at the median and {np.percentile(refusals, 99):.0f} at the "
        f"99th percentile; {ours:,} of all `overloaded`, {counted:,} counted; throughput "
        f"{held:.0%} of the peak's, {work:.0%} for each CPU second of the server{cost}; "
        f"cores (at the peak): {cores}; RSS {grown:+.0f} MB",
        holds if judged else (None if sound else False),
        "make chaos CHAOS='--only overload'",
        {
            "rows": rows, "tier": tier, "offered_s": round(offered, 1), "words": dict(words),
            "http": dict(over_http.statuses), "counted": counted, "status": code,
            "peaks": [_figures(phase) for phase in peaks],
            "overloads": [_figures(phase) for phase in overs],
            "share_of_peak": round(held, 3), "share_by_cpu": round(work, 3), "quiet": quiet,
            "answer_us": round(answer_us), "refusal_us": round(refusal_us),
            "unknown_model_us": round(unknown_us),
            "answers_ms": [round(float(np.percentile(answers, p))) for p in (50, 99, 100)],
            "refusals_ms": [round(float(np.percentile(refusals, p)), 1) for p in (50, 99, 100)],
        },
    )  # fmt: skip


def _unknown_us(serving: Serving, callers: int) -> float:
    """CPU of the server for a request that ends at Triton's first check: its model is not there."""
    before = _cpu_seconds(serving)
    sent = load.closed(serving.grpc, "nowhere", callers, FLOOR_S, 1)
    after = _cpu_seconds(serving)
    if sent.answers or not all("unknown model" in word for word in sent.words):
        raise SystemExit(f"chaos: a model that is not there answered: {dict(sent.words)}")
    return 1e6 * sum(after[role] - before[role] for role in SERVER) / len(sent.refused)


def _figures(phase: Phase) -> dict[str, Any]:
    cores = {role: round(used, 3) for role, used in phase.cores.items()}
    return {"answers_s": round(phase.answers_s, 1), "cores": cores}


def _phase(
    serving: Serving, call: Callable[[], load.Sent], seconds: float
) -> tuple[Phase, load.Sent]:
    """Send, and look at all but the first part, in which the queues fill, and what comes late."""
    seen: list[tuple[float, dict[str, float]]] = []
    begun = time.monotonic()

    def look() -> None:
        for moment in (LEAD * seconds, seconds):
            time.sleep(max(0.0, begun + moment - time.monotonic()))
            seen.append((time.monotonic(), _cpu_seconds(serving)))

    looking = threading.Thread(target=look)
    looking.start()
    sent = call()
    looking.join()
    (first, before), (last, after) = seen
    cores = {role: (after[role] - before[role]) / (last - first) for role in after}
    answered = sum(first <= when < last for when in sent.when)
    return Phase(answered / (last - first), cores), sent


def _cpu_seconds(serving: Serving) -> dict[str, float]:
    """CPU time so far of the server's processes by role, the callers (this process), all others."""
    spent = dict.fromkeys((*SERVER, "callers"), 0.0)
    processes = [("triton", serving.triton), ("callers", os.getpid())]
    for name, pids in serving.stubs().items():
        processes += [(name.partition("_")[0], pid) for pid in pids]
    for role, pid in processes:
        times = psutil.Process(pid).cpu_times()
        spent[role] += times.user + times.system
    whole = psutil.cpu_times()
    busy = sum(whole) - whole.idle - whole.iowait - whole.guest - whole.guest_nice
    return {**spent, "others": busy - sum(spent.values())}


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
