"""`make demo`: build, serve, call, compare and load the example, then one table."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from samp_core import show
from samp_core.ab import compare
from samp_core.build import build
from samp_core.config import load_config
from samp_core.data import read_rows
from samp_core.errors import SampError
from samp_core.server import Server

CONFIG = Path("examples/film_reviews/build.yaml")
DATA = Path(".demo/film_reviews/verification.jsonl")
AB_TEXTS = 600
USERS = 8
LOAD_SECONDS = 6.0
LONE_TEXTS = 150

Facts = dict[str, dict[str, Any]]


def main() -> int:
    """Run the demo. Exit code 0, or 1 when a promise was not met."""
    begin = time.perf_counter()
    config = load_config(CONFIG, {})
    show.err.rule("1 of 4: build the tiers")
    with show.progress() as progress:
        report = build(config, progress).report
    show.err.rule("2 of 4: serve them")
    show.err.print("starting Triton on loopback ...")
    with Server.start(config.folder) as server:
        ready = f"ready: gRPC {server.grpc}, HTTP http://{server.http}, pid {server.pid}"
        show.err.print(ready)
        texts = [str(text) for text in read_rows(DATA).texts]
        call_both_ways(server, texts)
        served = lone_latencies(server, [t["name"] for t in report["tiers"]], texts)
        show.err.rule("3 of 4: A/B, exact against fast, the same texts to both")
        result = ab(server)
        show.err.rule("4 of 4: load test with locust")
        load = load_tiers(server, [t["name"] for t in report["tiers"]])
    show.ab_table(result)
    table(report, len(texts), served, load)
    print_next(config.folder)
    show.out.print(f"after training: {time.perf_counter() - begin:.0f} s")
    return 0 if all(tier["met"] for tier in report["tiers"]) else 1


def call_both_ways(server: Server, texts: list[str]) -> None:
    """The same texts over gRPC and HTTP; the answers are printed and must be equal."""
    from samp_client import connect

    sample = [text for text in texts if len(text) < 90][:3]
    answers = []
    for protocol, url in (("grpc", server.grpc), ("http", server.http)):
        with connect(url, protocol) as client:  # type: ignore[arg-type]
            answers.append(client.predict(sample, tier="fast"))
    for text, over_grpc, over_http in zip(sample, *answers, strict=True):
        if over_grpc.scores != over_http.scores:
            raise SampError(
                "demo", f"gRPC and HTTP disagree on {text!r}", "one answer", "report it"
            )
        show.out.print(f"  {over_grpc.label:<7} {over_grpc.score:.3f}  {text}", markup=False)
    show.out.print("  (fast; gRPC and HTTP gave the same scores)")


def lone_latencies(server: Server, tiers: list[str], texts: list[str]) -> Facts:
    """p50 and p95 of one caller with one text a request, gRPC, the tiers taking turns."""
    import numpy as np
    from samp_client import connect

    chosen = texts[: LONE_TEXTS + 10]
    samples: dict[str, list[float]] = {tier: [] for tier in tiers}
    with connect(server.grpc) as client, show.progress() as progress:
        step = progress("lone requests over gRPC", len(chosen))
        for index, text in enumerate(chosen):
            for tier in tiers:
                begin = time.perf_counter()
                client.predict([text], tier=tier)
                if index >= 10:
                    samples[tier].append((time.perf_counter() - begin) * 1e3)
            step()
    marks = (("p50", 50), ("p95", 95))
    return {t: {k: float(np.percentile(v, q)) for k, q in marks} for t, v in samples.items()}


def ab(server: Server) -> dict[str, Any]:
    from samp_client import connect

    with connect(server.grpc) as client, show.progress() as progress:
        return compare(client, DATA, "exact", "fast", limit=AB_TEXTS, progress=progress)


def load_tiers(server: Server, tiers: list[str]) -> Facts:
    """Each tier by itself under the same number of users."""
    from samp_loadtest.run import run_loadtest

    found: Facts = {}
    with show.progress() as progress:
        step = progress(f"locust: {USERS} users, {LOAD_SECONDS:g} s a tier", len(tiers))
        for tier in tiers:
            result = run_loadtest(server.grpc, tier, users=USERS, seconds=LOAD_SECONDS, texts=DATA)
            found.update(result)
            step()
    return found


def table(report: Mapping[str, Any], texts: int, served: Facts, load: Facts) -> None:
    """One row a tier: plan, accuracy, promise, size, times, throughput, ratio to exact."""
    exact = load["exact"]["rps"]
    rows = []
    for tier in report["tiers"]:
        name = tier["name"]
        low, high = tier["ci95"]
        rps = load[name]["rps"]
        rows.append(
            (
                name,
                tier["plan"],
                f"{tier['value']:.2f} [{low:.1f}, {high:.1f}]",
                show.promise(tier["promise"], tier["met"]),
                f"{tier['drop_bound']:.2f}",
                f"{tier['size_mb']:.0f}",
                f"{tier['latency_ms']['1']:.2f}",
                f"{served[name]['p50']:.2f} / {served[name]['p95']:.2f}",
                f"{rps:.0f}",
                f"{load[name]['p50']:.1f} / {load[name]['p95']:.1f}",
                f"{rps / exact:.2f}x" if exact and math.isfinite(exact) else "-",
            )
        )
    show.table(
        f"Tiers: accuracy on {texts:,} reviews of films that the search never saw",
        (
            "tier",
            "plan",
            "accuracy % [95%]",
            "promise",
            "bound pt",
            "MB",
            "in-process ms",
            "served p50 / p95 ms",
            f"texts/s, {USERS} users",
            "p50 / p95 ms, loaded",
            "rate to exact",
        ),
        rows,
    )
    for warning in report["warnings"]:
        show.out.print(f"note: {warning}", markup=False, soft_wrap=True)


def print_next(folder: Path) -> None:
    """What to try now."""
    show.out.print(
        f"""
Try next (. .venv/bin/activate):
  samp serve {folder}
  samp report {folder}    # one page: tiers, plans, tests, sites
  samp predict --tier fast "a warm, funny and moving film"
  samp ab --control exact --candidate balanced --data {DATA}
  samp loadtest --tier fast=3,exact=1 --users 16 --seconds 20
  samp build --model YOUR_CHECKPOINT --data YOUR_ROWS.jsonl --tier fast:drop=1pt""",
        markup=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SampError as error:
        print(f"demo: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("demo: stopped; what was measured is kept", file=sys.stderr)
        sys.exit(130)
