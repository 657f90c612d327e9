"""Load on a real Triton: headless runs, plain locust, and its web page."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import gevent.monkey
import psutil
import pytest
from calls import counted
from conftest import Served
from forked import forks
from samp_client import BadRequest, BatchTooLarge, Unavailable, UnknownTier, connect
from samp_loadtest.run import run_loadtest

LOCUSTFILE = Path(__file__).resolve().parents[2] / "loadtest/locustfile.py"
KEYS = [
    "requests",
    "failures",
    "rps",
    "p50",
    "p95",
    "p99",
    "server_queue_ms",
    "server_compute_ms",
]


def left_behind() -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process().children(recursive=True)
        if any("locustfile" in word for word in child.cmdline())
    ]


def test_a_run_counts_what_the_server_counted(served: Served) -> None:
    encoder = f"encoder_{served.model}_fast"
    steps: list[tuple[float, float]] = []
    with connect(served.grpc) as client:
        before = counted(lambda: client.statistics()[encoder].requests)
        found = run_loadtest(
            served.grpc,
            "fast",
            users=2,
            seconds=3,
            texts=served.texts[:50],
            progress=lambda *step: steps.append(step),
        )
        after = counted(lambda: client.statistics()[encoder].requests)
    assert list(found) == ["fast"]
    figures = found["fast"]
    assert list(figures) == KEYS
    assert figures["failures"] == 0
    assert figures["requests"] == after - before
    assert figures["rps"] == pytest.approx(figures["requests"] / 3, rel=0.35)
    assert 0 < figures["p50"] <= figures["p95"] <= figures["p99"]
    assert 0 < figures["server_compute_ms"] < figures["p99"]
    assert 0 <= figures["server_queue_ms"] < figures["p99"]
    assert steps == sorted(steps)
    assert steps[-1][1] == 3
    assert not gevent.monkey.is_anything_patched()
    assert not left_behind()


def test_a_mix_over_http_with_several_texts_a_request(served: Served) -> None:
    found = run_loadtest(
        served.http, {"fast": 3, "exact": 1}, protocol="http", users=2, seconds=3, rows=3
    )
    assert list(found) == ["fast", "exact"]
    assert found["fast"]["requests"] > found["exact"]["requests"] > 0
    assert all(one["failures"] == 0 for one in found.values())
    assert all(one["server_compute_ms"] > 0 for one in found.values())


def test_what_cannot_be_tested_is_said_at_once(served: Served, tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(UnknownTier, match="exact, fast"):
        run_loadtest(served.grpc, "slow")
    with pytest.raises(UnknownTier, match="exact, fast"):
        run_loadtest(served.grpc, "fast=1,slow=1")
    with pytest.raises(BatchTooLarge, match="takes 64"):
        run_loadtest(served.grpc, "fast", rows=65)
    with pytest.raises(BadRequest, match="No such file"):
        run_loadtest(served.grpc, "fast", texts=tmp_path / "none.jsonl")
    with pytest.raises(BadRequest, match="empty list"):
        run_loadtest(served.grpc, "fast", texts=[])
    with pytest.raises(Unavailable, match="cannot be reached"):
        run_loadtest("127.0.0.1:1", "fast")
    assert time.monotonic() - start < 5


def test_an_interrupted_run_leaves_no_process(served: Served) -> None:
    def interrupt(gone_s: float, _: float) -> None:
        if gone_s > 1.0:
            assert left_behind()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_loadtest(served.grpc, "fast", users=2, seconds=60, progress=interrupt)
    assert not left_behind()


def test_two_workers_offer_a_rate_and_lengths_of_a_file(served: Served, tmp_path: Path) -> None:
    lengths = tmp_path / "lengths.txt"
    lengths.write_text("4 1\n12 1\n")
    found = run_loadtest(
        served.grpc,
        "fast",
        users=8,
        seconds=4,
        workers=2,
        rate=25.0,
        warm_s=1.0,
        lengths=lengths,
        texts=served.texts[:50],
    )
    figures = found["fast"]
    assert figures["failures"] == 0
    # Poisson arrivals of 25 a second for 3 s: five standard deviations around 75.
    assert 31 <= figures["requests"] <= 119
    assert figures["p50"] > 0
    assert not left_behind()


def test_the_highest_rate_within_a_target_is_found_and_drawn(
    served: Served, tmp_path: Path
) -> None:
    curve = tmp_path / "curve.png"
    done = forks().samp(
        *("loadtest", "--tier", "fast", "--url", served.grpc, "--slo", "p95=2000ms"),
        *("--seconds", 1, "--budget", 10, "--users", 16, "--png", curve, "--json"),
    )
    found = done.json
    points = found["points"]
    assert (done.code == 0) == found["confirmed"]
    assert len(points) >= 2
    assert points[0]["holds"], points
    assert all(point["p95"] <= 2000 for point in points if point["holds"])
    assert found["rate"] == max(p["rate"] for p in points if p["holds"] or p["confirms"])
    assert curve.read_bytes().startswith(b"\x89PNG")
    refused = forks().samp("loadtest", "--slo", "p90=1ms", "--url", served.grpc)
    assert (refused.code, len(refused.lines)) == (1, 1)


def locust(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), *arguments],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_plain_locust_finds_the_protocol_of_its_host(served: Served, protocol: str) -> None:
    """Options may come from the environment; users of the other protocol are left out."""
    host = served.grpc if protocol == "grpc" else served.http
    process = locust(
        *("--headless", "--only-summary", "-u", "2", "-r", "2", "-t", "2s", "--host", host),
        SAMP_TIERS="fast",
    )
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert f"{protocol}:fast" in output
    assert f"encoder_{served.model}_fast" in output
    other = "http" if protocol == "grpc" else "grpc"
    assert f"{other}:fast" not in output
    assert "Traceback" not in output


def test_plain_locust_says_what_is_wrong_in_a_line(served: Served) -> None:
    process = locust("--headless", "-t", "20s", "--host", served.grpc, "--tiers", "slow")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2, output
    assert "has no tier 'slow'; allowed: exact, fast" in output
    assert "Traceback" not in output


def call(url: str, form: dict[str, Any] | None = None) -> str:
    data = None if form is None else urllib.parse.urlencode(form).encode()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, data), timeout=10) as answer:
        return str(answer.read().decode())


def test_the_web_page_starts_shows_and_stops_a_test(served: Served) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page = f"http://127.0.0.1:{port}"
    process = locust("--web-host", "127.0.0.1", "--web-port", str(port))
    try:
        end = time.monotonic() + 30
        while True:
            try:
                front = call(f"{page}/")
                break
            except OSError:
                assert process.poll() is None
                assert time.monotonic() < end
                time.sleep(0.2)
        for word in ("tiers", "think_time", "extended_tabs"):
            assert word in front
        form = {"user_count": 2, "spawn_rate": 2, "host": served.grpc, "tiers": "fast"}
        assert json.loads(call(f"{page}/swarm", form))["success"]
        time.sleep(3.5)
        shown = json.loads(call(f"{page}/stats/requests"))
        counts = {row["name"]: row["num_requests"] for row in shown["stats"]}
        assert counts["grpc:fast"] > 0
        rows = {row["name"]: row for row in shown["extended_stats"][0]["data"]}
        assert rows["fast"]["compute"] > 0
        assert rows[f"fast: encoder_{served.model}_fast"]["requests"] > 0
        assert json.loads(call(f"{page}/stop", {}))["success"]
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=30)
        assert process.returncode == 0, output
        assert "server" in output
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
