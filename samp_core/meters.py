"""Counters of the served models in Triton's /metrics: cheap on the way, handed over once a second.

One increment is a call between two processes and takes 15 to 80 us, a batch of a small encoder 250:
so a batch only adds to a dict here, and a thread hands the sums over. Counters of one name and
labels add up over processes and outlive a reload; a histogram is written as its own counters, whose
names are those that Prometheus gives to a histogram's.
"""

from __future__ import annotations

import bisect
import threading
import time
from collections.abc import Mapping
from typing import Any

FLUSH_S = 1.0
TOKEN_BUCKETS = (16, 64, 256, 1024, 4096, 16384)
FAMILIES = {
    "samp_texts_total": "Texts (rows, or pairs) that a tier's encoder ran",
    "samp_tokens_total": "Tokens that a tier's encoder ran: specials and windows' overlaps, too",
    "samp_padded_tokens_total": "Tokens it would have run with rows padded to the batch's longest",
    "samp_truncated_total": "Texts that were cut to the model's length, of all tiers",
    "samp_refused_total": "Requests that a model refused, by reason",
    "samp_batch_tokens_bucket": "Batches of up to `le` tokens",
    "samp_batch_tokens_sum": "Tokens of all batches",
    "samp_batch_tokens_count": "Batches that a tier's encoder ran",
    "samp_sites": "Sites of the loaded plan by the precision of the kernel that ran",
}
Key = tuple[str, tuple[tuple[str, str], ...]]


class Meters:
    """The counters of one model process. `backend` is triton_python_backend_utils."""

    def __init__(self, backend: Any, labels: Mapping[str, str], flush_s: float = FLUSH_S) -> None:
        self._backend = backend
        self._labels = dict(labels)
        self._pending: dict[Key, float] = {}
        self._lock = threading.Lock()
        self._flushing = threading.Lock()
        # Kept as long as the process: a family that is gone takes its metrics along.
        self._families: dict[str, Any] = {}
        self._metrics: dict[Key, Any] = {}
        self._bounds = [(("le", str(bound)),) for bound in TOKEN_BUCKETS] + [(("le", "+Inf"),)]
        # A daemon: it keeps what it refers to alive to the very end of the process, so that no
        # counter is taken out of Triton while another process of the model adds to it.
        threading.Thread(target=self._run, args=(flush_s,), daemon=True).start()

    @classmethod
    def start(cls, backend: Any, args: Mapping[str, str], tier: str | None = None) -> Meters:
        """Those of the model that Triton names in `args`; an encoder's have its tier."""
        name = args["model_name"].removeprefix("next.").partition("_")[2]
        if tier is None:
            return cls(backend, {"model": name})
        return cls(backend, {"model": name.removesuffix(f"_{tier}"), "tier": tier})

    def add(self, name: str, value: float = 1.0, extra: tuple[tuple[str, str], ...] = ()) -> None:
        key = (name, extra)
        with self._lock:
            self._pending[key] = self._pending.get(key, 0.0) + value

    def batch(self, rows: int, tokens: int, padded: int) -> None:
        """What one batch of an encoder held; padded: its tokens as a rectangle."""
        bound = self._bounds[bisect.bisect_left(TOKEN_BUCKETS, tokens)]
        with self._lock:
            pending = self._pending
            for key, value in (
                (("samp_texts_total", ()), rows),
                (("samp_tokens_total", ()), tokens),
                (("samp_padded_tokens_total", ()), padded),
                (("samp_batch_tokens_sum", ()), tokens),
                (("samp_batch_tokens_count", ()), 1),
                (("samp_batch_tokens_bucket", bound), 1),
            ):
                pending[key] = pending.get(key, 0.0) + value

    def gauge(self, name: str, value: float, extra: tuple[tuple[str, str], ...]) -> None:
        """Set at once."""
        with self._flushing:
            self._metric(name, extra, self._backend.MetricFamily.GAUGE).set(value)

    def flush(self) -> None:
        """Hand over what was counted since the last time."""
        with self._flushing:
            with self._lock:
                pending, self._pending = self._pending, {}
            for (name, extra), value in self._cumulated(pending):
                self._metric(name, extra, self._backend.MetricFamily.COUNTER).increment(value)

    def _cumulated(self, pending: Mapping[Key, float]) -> list[tuple[Key, float]]:
        """A batch of 20 tokens is one of up to 64, 256, ... tokens too."""
        made = []
        total = 0.0
        name = "samp_batch_tokens_bucket"
        for bound in self._bounds:
            total += pending.get((name, bound), 0.0)
            if total:
                made.append(((name, bound), total))
        return [*made, *((key, value) for key, value in pending.items() if key[0] != name)]

    def _metric(self, name: str, extra: tuple[tuple[str, str], ...], kind: Any) -> Any:
        key = (name, extra)
        if key not in self._metrics:
            if name not in self._families:
                self._families[name] = self._backend.MetricFamily(
                    name=name, description=FAMILIES[name], kind=kind
                )
            labels = {**self._labels, **dict(extra)}
            self._metrics[key] = self._families[name].Metric(labels=labels)
        return self._metrics[key]

    def _run(self, flush_s: float) -> None:
        while True:
            time.sleep(flush_s)
            if self._pending:
                self.flush()
