"""What a refused request costs the server, from Triton's own checks up to the queue's bound.

    make bench-refusals                      # after make demo; a quiet machine, about 4 minutes
    python benchmarks/refusals.py --repository DIR --tier T [--rounds 1 --force]

CPU seconds of Triton and of the model processes for each request, one film review over gRPC, 256
in flight from a process of its own that is not counted. Every kind is taken in every round, in
turn; medians of the rounds. Beside the answer of a tier and the refusal of its full queue stand
requests that Triton refuses by itself, at each step on the way to a model, and a Python model that
does nothing but refuse: what ours cannot go below.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plain_peer
import psutil
from machine import ROOT, Bystanders, report, require_quiet, versions, write_result
from rich.console import Console
from rich.table import Table

from samp_core.control import stubs
from samp_core.manifest import read_manifest
from samp_core.model_config import TEXT, ModelConfig, Step, TensorConfig

REVIEWS = ROOT / ".demo" / "film_reviews" / "verification.jsonl"
PEERS = Path(__file__).resolve().parent / "peers" / "refusing"
SERVICE = "/inference.GRPCInferenceService/"
IN_FLIGHT = 256
ROLES = ("triton", "tokenizer", "encoder", "head", "refusing")
OUT = TensorConfig("OUT", "FP32", (1,))
# What fills a tier's queue: requests of a full batch.
FILL_ROWS = 64


@dataclass(frozen=True)
class Kind:
    """One kind of request. status: the gRPC code that each must end with."""

    name: str
    model: str
    status: str
    rows: int = 1
    shape: tuple[int, ...] = (1, 1)
    method: str = "ModelInfer"
    full: bool = False  # while the queues are full


def kinds(model: str, tier: str) -> list[Kind]:
    ensemble = f"{model}_{tier}"
    return [
        Kind("gRPC alone: ServerLive", "", "OK", method="ServerLive"),
        Kind("Triton: unknown model", "nowhere", "NOT_FOUND"),
        Kind("Triton: wrong shape", ensemble, "INVALID_ARGUMENT", shape=(1, 1, 1)),
        Kind("Triton: full queue of a model", "full", "UNAVAILABLE", full=True),
        Kind(
            "Triton: full queue, first step of an ensemble", "full_tier", "UNAVAILABLE", full=True
        ),
        Kind("a Python model that refuses all", "refusing", "UNAVAILABLE"),
        Kind("such a model, first step of an ensemble", "refusing_tier", "UNAVAILABLE"),
        Kind(f"ours: queue of tier {tier} full", ensemble, "UNAVAILABLE", full=True),
        Kind(f"ours: answer of tier {tier}", ensemble, "OK"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repository", type=Path, default=ROOT / "model_repository/film-reviews")
    parser.add_argument("--tier", default="fast")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--force", action="store_true", help="measure on a busy machine too")
    parser.add_argument("--call", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.call:
        asyncio.run(calls(json.loads(asked.call)))
        return
    busy = require_quiet(asked.force)
    manifest = read_manifest(asked.repository)
    chosen = kinds(manifest.model, asked.tier)
    found: dict[str, list[dict[str, float]]] = {kind.name: [] for kind in chosen}
    with tempfile.TemporaryDirectory(prefix="samp-refusals-") as place:
        folder = Path(place)
        hold = folder / "hold"
        write_repository(folder / "models", asked.repository, manifest.model, asked.tier, hold)
        with plain_peer.serve(folder / "models", folder / "log") as (address, triton):
            others = Bystanders([triton])
            for kind in chosen:  # warm, and what comes back is what is meant
                if not kind.full:
                    cost(address, triton, kind, 0.5)
            for _ in range(asked.rounds):
                for kind in chosen:
                    if not kind.full:
                        found[kind.name].append(cost(address, triton, kind, asked.seconds))
                with filled(address, hold, f"{manifest.model}_{asked.tier}"):
                    for kind in chosen:
                        if kind.full:
                            found[kind.name].append(cost(address, triton, kind, asked.seconds))
            share = others.share()
    rows = [{"kind": name, **medians(rounds)} for name, rounds in found.items()]
    Console(width=100).print(table(rows))
    path = write_result(
        "refusals",
        threads=os.cpu_count() or 1,
        rows=rows,
        not_run=[],
        found_limits={},
        found_versions=versions(),
        busy_share=round(max(busy, share), 3),
        in_flight=IN_FLIGHT,
        rounds=asked.rounds,
        seconds=asked.seconds,
    )
    report(path, share)


def medians(rounds: list[dict[str, float]]) -> dict[str, Any]:
    """us of CPU a request by process, and the least and most of the rounds for their sum."""
    totals = [sum(one[role] for role in ROLES) for one in rounds]
    return {
        **{
            f"{role}_us": round(statistics.median(one[role] for one in rounds), 1) for role in ROLES
        },
        "server_us": round(statistics.median(totals), 1),
        "spread_us": [round(min(totals), 1), round(max(totals), 1)],
        "per_second": round(statistics.median(one["per_second"] for one in rounds)),
    }


def table(rows: list[dict[str, Any]]) -> Table:
    made = Table(title="CPU of the server a request, us", header_style="bold")
    for heading in ("request", "server", "of it Triton", "tokenizer", "others", "a second"):
        made.add_column(heading)
    for row in rows:
        rest = row["encoder_us"] + row["head_us"] + row["refusing_us"]
        low, high = row["spread_us"]
        made.add_row(
            row["kind"], f"{row['server_us']:.0f} [{low:.0f}, {high:.0f}]",
            f"{row['triton_us']:.0f}", f"{row['tokenizer_us']:.0f}", f"{rest:.0f}",
            f"{row['per_second']:,}",
        )  # fmt: skip
    return made


def write_repository(models: Path, out: Path, model: str, tier: str, hold: Path) -> None:
    """The build's models, its encoder such that it can be held, and the models that refuse."""
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2 as pb

    names = (f"tokenizer_{model}", f"encoder_{model}_{tier}", f"head_{model}", f"{model}_{tier}")
    for name in names:
        shutil.copytree((out / "current" / "models" / name).resolve(), models / name)
    encoder = models / f"encoder_{model}_{tier}"
    (encoder / "1" / "model.py").rename(encoder / "1" / "encoder.py")
    shutil.copyfile(PEERS / "held.py", encoder / "1" / "model.py")
    hashes = encoder / "1" / "sha256.json"
    listed = json.loads(hashes.read_text())
    listed.pop("model.py", None)
    hashes.write_text(json.dumps(listed))
    config = text_format.Parse((encoder / "config.pbtxt").read_text(), pb.ModelConfig())
    config.parameters["hold"].string_value = str(hold)
    (encoder / "config.pbtxt").write_text(text_format.MessageToString(config))
    for name, size, parameters in (("refusing", 1024, {}), ("full", 1, {"hold": str(hold)})):
        made = ModelConfig(name, (TEXT,), (OUT,), parameters)
        step = Step(name, {"TEXT": "TEXT"}, {"OUT": "OUT"})
        for one in (made, ModelConfig(f"{name}_tier", (TEXT,), (OUT,), steps=(step,))):
            config = text_format.Parse(one.to_pbtxt(), pb.ModelConfig())
            if one is made:
                config.dynamic_batching.default_queue_policy.max_queue_size = size
            (models / one.name / "1").mkdir(parents=True)
            (models / one.name / "config.pbtxt").write_text(text_format.MessageToString(config))
        shutil.copyfile(PEERS / "model.py", models / name / "1" / "model.py")


@contextlib.contextmanager
def filled(address: str, hold: Path, ensemble: str) -> Iterator[None]:
    """Nothing is answered, and the queues of the tier and of the model `full` are full."""
    import grpc

    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary(SERVICE + "ModelInfer")
        hold.touch()
        one = bodies(Kind("", "full", "UNAVAILABLE"))[0]
        waiting = [call.future(one) for _ in range(4)]
        fill = bodies(Kind("", ensemble, "OK", FILL_ROWS, (FILL_ROWS, 1)))[0]
        sent = [call.future(fill)]
        while not any(one.done() for one in sent):
            time.sleep(0.02)
            sent.append(call.future(fill))
        waiting += sent
        try:
            yield
        finally:
            hold.unlink()
            for one in waiting:
                with contextlib.suppress(grpc.RpcError):
                    one.result(120)


def bodies(kind: Kind) -> list[bytes]:
    """The requests, serialized."""
    from tritonclient.grpc import service_pb2 as pb

    if kind.method != "ModelInfer":
        return [b""]
    lines = REVIEWS.read_text(encoding="utf-8").splitlines()[:64]
    texts = [json.loads(line)["text"].encode() for line in lines]
    made = []
    for text in texts:
        request = pb.ModelInferRequest(model_name=kind.model)
        request.inputs.add(name="TEXT", datatype="BYTES", shape=kind.shape)
        request.raw_input_contents.append(kind.rows * (len(text).to_bytes(4, "little") + text))
        made.append(bytes(request.SerializeToString()))
    return made


def cost(address: str, triton: int, kind: Kind, seconds: float) -> dict[str, float]:
    """us of CPU a request by role, and requests a second, of callers that wait for each."""
    job = {"address": address, "seconds": seconds, **kind.__dict__}
    command = [sys.executable, __file__, "--call", json.dumps(job)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as caller:
        assert caller.stdin is not None
        assert caller.stdout is not None
        caller.stdout.readline()  # imported, connected
        before = spent(triton)
        caller.stdin.write("go\n")
        caller.stdin.flush()
        done: Mapping[str, Any] = json.loads(caller.stdout.readline())
        after = spent(triton)
    if set(done["statuses"]) != {kind.status}:
        raise SystemExit(f"bench: {kind.name}: wanted {kind.status} only, got {done}")
    count = done["statuses"][kind.status]
    per = {role: 1e6 * (after[role] - before[role]) / count for role in ROLES}
    return {**per, "per_second": count / done["seconds"]}


def spent(triton: int) -> dict[str, float]:
    """CPU seconds so far by role."""
    found = dict.fromkeys(ROLES, 0.0)
    for name, pids in {"triton": [triton], **stubs(triton)}.items():
        role = name.partition("_")[0]
        for pid in pids:
            times = psutil.Process(pid).cpu_times()
            found[role if role in ROLES else "refusing"] += times.user + times.system
    return found


async def calls(job: Mapping[str, Any]) -> None:
    """The calling process: IN_FLIGHT requests under way for so many seconds."""
    import grpc

    kind = Kind(**{name: job[name] for name in Kind.__dataclass_fields__})
    sent = itertools.cycle(bodies(kind))
    statuses: dict[str, int] = {}
    async with grpc.aio.insecure_channel(job["address"]) as channel:
        await channel.channel_ready()
        call = channel.unary_unary(SERVICE + kind.method)
        print("ready", flush=True)
        sys.stdin.readline()
        begun = time.monotonic()

        async def caller() -> None:
            while time.monotonic() < begun + job["seconds"]:
                try:
                    await call(next(sent), timeout=60)
                    status = "OK"
                except grpc.aio.AioRpcError as error:
                    status = error.code().name
                statuses[status] = statuses.get(status, 0) + 1

        await asyncio.gather(*(caller() for _ in range(IN_FLIGHT)))
        seconds = time.monotonic() - begun
    print(json.dumps({"statuses": statuses, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
