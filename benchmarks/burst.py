"""How long a burst takes, with and without a bound on the models' queues.

    python benchmarks/burst.py [--repository DIR --tier T --rounds 5]   # after make demo, a minute

50 requests of 16 texts at once, over gRPC; how long until the last is answered. One server, whose
models are loaded in turns as they are built and with Triton's `max_queue_size`, which nothing here
ever meets. docs/reliability.md says what that shows of Triton 24.10.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

from machine import ROOT, Bystanders, report, require_quiet, versions, write_result
from rich.console import Console
from rich.table import Table
from serving import server_version

from samp_core.manifest import read_manifest
from samp_core.server import Server
from samp_core.stage import Layout

REQUESTS = 50
ROWS = 16
BURSTS = 3
BOUND = 1024
# Nothing is refused as too much for the tier: what waits is to be seen.
QUEUE_S = 60.0
REVIEWS = ROOT / ".demo" / "film_reviews" / "verification.jsonl"
METHOD = "/inference.GRPCInferenceService/ModelInfer"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repository", type=Path, default=ROOT / "model_repository/film-reviews")
    parser.add_argument("--tier", default="exact")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--force", action="store_true", help="measure on a busy machine too")
    asked = parser.parse_args()
    busy = require_quiet(asked.force)
    build = read_manifest(asked.repository)
    (tier,) = build.chosen([asked.tier])
    names = (f"tokenizer_{build.model}", build.tiers[tier].encoder, f"head_{build.model}")
    found: dict[bool, list[float]] = {False: [], True: []}
    layout = Layout(queue_s=QUEUE_S)
    with Server.start(asked.repository, tiers=[tier], layout=layout) as server:
        others = Bystanders([server.pid])
        ensemble = build.tiers[tier].ensemble
        for _ in range(asked.rounds):
            for bounded in found:
                load(server.grpc, names, ensemble, bounded)
                burst(server.grpc, ensemble)  # warm
                found[bounded] += [burst(server.grpc, ensemble) for _ in range(BURSTS)]
        share = others.share()
        version = server_version(server.http)
    rows = [
        {
            "model": build.model, "tier": tier, "max_queue_size": BOUND if bounded else None,
            "requests": REQUESTS, "batch": ROWS, "seconds": [round(one, 3) for one in times],
            "median_s": round(statistics.median(times), 3),
        }
        for bounded, times in found.items()
    ]  # fmt: skip
    table = Table(title=f"{REQUESTS} requests of {ROWS} texts at once, tier {tier}")
    for heading in ("queues", "median s", "least", "most"):
        table.add_column(heading)
    for row in rows:
        times = row["seconds"]
        bound = "bounded" if row["max_queue_size"] else "as built"
        table.add_row(bound, *(f"{one:.2f}" for one in (row["median_s"], min(times), max(times))))
    Console(width=100).print(table)
    path = write_result(
        "burst",
        threads=os.cpu_count() or 1,
        rows=rows,
        not_run=[],
        found_limits={},
        found_versions=versions(triton=version),
        busy_share=round(max(busy, share), 3),
        rounds=asked.rounds,
    )
    report(path, share)


def load(address: str, names: tuple[str, ...], ensemble: str, bounded: bool) -> None:
    """Load the models again, as built or with a bound, and the ensemble over them."""
    import tritonclient.grpc as triton

    with triton.InferenceServerClient(address) as client:
        for name in names:
            config: dict[str, Any] = client.get_model_config(name, as_json=True)["config"]
            config["dynamic_batching"].pop("default_queue_policy", None)
            if bounded:
                config["dynamic_batching"]["default_queue_policy"] = {"max_queue_size": BOUND}
            client.load_model(name, config=json.dumps(config))
        client.load_model(ensemble)


def burst(address: str, ensemble: str) -> float:
    """Seconds until the last of the answers."""
    import grpc
    from tritonclient.grpc import service_pb2 as pb

    lines = REVIEWS.read_text(encoding="utf-8").splitlines()[: REQUESTS * ROWS]
    texts = [json.loads(line)["text"].encode() for line in lines]
    bodies = []
    for start in range(0, REQUESTS * ROWS, ROWS):
        request = pb.ModelInferRequest(model_name=ensemble)
        request.inputs.add(name="TEXT", datatype="BYTES", shape=(ROWS, 1))
        raw = b"".join(len(x).to_bytes(4, "little") + x for x in texts[start : start + ROWS])
        request.raw_input_contents.append(raw)
        bodies.append(request.SerializeToString())
    with grpc.insecure_channel(address) as channel:
        grpc.channel_ready_future(channel).result(10)
        call = channel.unary_unary(METHOD)
        begun = time.monotonic()
        sent = [call.future(body, timeout=60) for body in bodies]
        for one in sent:
            one.result()
        return time.monotonic() - begun


if __name__ == "__main__":
    main()
