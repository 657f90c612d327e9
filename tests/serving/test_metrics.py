"""Our own counters in a real Triton's /metrics, and its OpenTelemetry traces at a collector."""

from __future__ import annotations

import http.server
import re
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from calls import classify, infer
from forked import wait_for
from tiny import write_tiny
from tritonclient.utils import InferenceServerException

from samp_core.cli_live import tracing
from samp_core.control import Control, stubs
from samp_core.server import Server


class Collector(http.server.ThreadingHTTPServer):
    """Takes what an OTLP exporter posts."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.posts: list[tuple[str, str, bytes]] = []


class Handler(http.server.BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.posts.append((self.path, self.headers["Content-Type"], body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[Server]:
    out = tmp_path_factory.mktemp("metrics")
    write_tiny(out, seed=1)
    url = f"http://127.0.0.1:{collector.server_port}/v1/traces"
    with Server.start(out, options=tracing(url, 1)) as server:
        yield server


def read(server: Server) -> dict[str, float]:
    """name{labels} -> value, ours only."""
    lines = Control(server.metrics).text("/metrics").splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if line.startswith("samp_"))
    return {name: float(value) for name, value in pairs}


def test_counters(traced: Server) -> None:
    here = '{model="tiny",tier="exact"}'
    texts = ["a b", "a b c d e", "x " * 100]  # 4, 7 and 32 tokens of at most 32
    for _ in range(5):
        classify(traced.grpc, "tiny_exact", texts)
    # They are handed over one after the other, this one last.
    assert wait_for(lambda: read(traced).get(f"samp_batch_tokens_count{here}") == 5, 10)
    found = read(traced)
    assert found[f"samp_texts_total{here}"] == 15
    assert found[f"samp_tokens_total{here}"] == 5 * (4 + 7 + 32)
    assert found[f"samp_padded_tokens_total{here}"] == 5 * 3 * 32
    assert found[f"samp_batch_tokens_sum{here}"] == 5 * 43
    buckets = {
        match[1]: value
        for name, value in found.items()
        if (match := re.match(r'samp_batch_tokens_bucket\{.*le="([^"]+)"', name))
    }
    assert buckets["+Inf"] == buckets["64"] == 5
    assert buckets.get("16", 0) == 0
    # The tokenizer is another process, and hands over in its own second.
    assert wait_for(lambda: read(traced).get('samp_truncated_total{model="tiny"}') == 5, 10)
    sites = {name: value for name, value in found.items() if name.startswith("samp_sites")}
    assert list(sites.values()) == [6.0]  # scores and context, too
    assert 'precision="fp32"' in next(iter(sites))


def test_refused_requests_by_reason_outlive_a_reload(traced: Server) -> None:
    row = np.array([[2, 5, 3]], dtype=np.int32)

    def encode(ids: Any, length: int) -> None:
        lengths = np.array([[length]], dtype=np.int32)
        infer(traced.grpc, "encoder_tiny_exact", IDS=ids, TYPES=row * 0, LENGTHS=lengths)

    for ids, length in ((row, 9), (row + 999, 3), (row + 999, 3)):
        with pytest.raises(InferenceServerException, match="allowed"):
            encode(ids, length)
    with pytest.raises(InferenceServerException, match="UTF-8"):
        classify(traced.grpc, "tiny_exact", [b"\xff"])
    here = 'model="tiny",tier="exact"'
    names = {
        f'samp_refused_total{{{here},reason="length"}}': 1,
        f'samp_refused_total{{{here},reason="range"}}': 2,
        'samp_refused_total{model="tiny",reason="not_utf8"}': 1,
    }
    # Triton writes labels in an order of its own.
    wanted = {frozenset(re.findall(r'\w+="[^"]*"', name)): count for name, count in names.items()}

    def refused() -> dict[frozenset[str], float]:
        return {
            frozenset(re.findall(r'\w+="[^"]*"', name)): value
            for name, value in read(traced).items()
            if name.startswith("samp_refused")
        }

    assert wait_for(lambda: refused() == wanted, 10), refused()
    before, processes = read(traced), stubs(traced.pid)
    for out in traced.builds:
        traced.activate(out, again=True)
    after = stubs(traced.pid)
    assert set(after) == {"tokenizer_tiny", "encoder_tiny_exact", "head_tiny"}
    old = {pid for pids in processes.values() for pid in pids}
    assert all(set(pids) - old for pids in after.values())  # in no order: numbers wrap around
    encode(row, 3)
    total = f"samp_texts_total{{{here}}}"
    assert wait_for(lambda: read(traced)[total] == before[total] + 1, 10)
    assert refused() == wanted


def test_traces_reach_a_collector(traced: Server, collector: Collector) -> None:
    classify(traced.grpc, "tiny_exact", ["abc"])
    names = (b"tiny_exact", b"tokenizer_tiny", b"encoder_tiny_exact", b"head_tiny")
    needed = (*names, b"service.name", b"samp")
    assert wait_for(
        lambda: all(any(name in body for _, _, body in collector.posts) for name in needed), 20
    )
    assert {path for path, _, _ in collector.posts} == {"/v1/traces"}
    assert {kind for _, kind, _ in collector.posts} <= {
        "application/x-protobuf",
        "application/json",
    }
