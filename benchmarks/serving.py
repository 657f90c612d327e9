"""The tiers of a build beside a plain Triton model: throughput and latency at 1, 8, 32 callers.

    make bench        or: python benchmarks/serving.py [--rounds 5] [--seconds 3] ...

Two real Tritons stand ready and one at a time is called, from a third process, over gRPC with one
text a request. Every round calls every arm in turn, so that a slow minute of the machine falls on
all of them; what is shown are medians over rounds. benchmarks/README.md says how to read it.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import limits
import machine
import plain_peer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from samp_core.manifest import Manifest, models_folder, read_manifest
from samp_core.plan import Plan
from samp_core.server import Server

ROOT = machine.ROOT
CONSOLE = Console(stderr=True)
PEER_THREADS = (1, 2)


@dataclass(frozen=True)
class Arm:
    """One thing that is called: a tier of ours, or the peer with some number of threads."""

    name: str
    url: str
    model: str
    plan: str
    ours: bool


@dataclass
class Figures:
    """What the rounds of one arm at one concurrency gave."""

    rps: list[float] = field(default_factory=list)
    latencies_ms: list[float] = field(default_factory=list)
    client_cores: list[float] = field(default_factory=list)

    @property
    def median_rps(self) -> float:
        return statistics.median(self.rps)

    def add(self, who: str, result: Mapping[str, Any]) -> None:
        """One closed loop of closed_loop.py."""
        if result["failures"]:
            raise SystemExit(f"bench: {who} failed: {result['failures'][0]}")
        self.rps.append(result["rps"])
        self.latencies_ms += result["latencies_ms"]
        self.client_cores.append(result["client_cores"])


class Worker:
    """A Python process that answers one JSON line with one JSON line."""

    def __init__(self, script: str, *arguments: str) -> None:
        environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "benchmarks" / script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("bench: a helper process ended; its message is above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, **job: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return self.read()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()


def find_arms(build: Manifest, out: Path, ours: str, peer: str) -> tuple[list[Arm], list[str]]:
    """The arms to call, fast first, and why the others are left out."""
    arms: list[Arm] = []
    left_out: list[str] = []
    plans: dict[str, str] = {}
    order = sorted(build.tiers, key=lambda name: (name != "fast", name != "exact"))
    for name in order:
        tier = build.tiers[name]
        if tier.plan_sha256 in plans:
            left_out.append(f"tier {name}: same plan as {plans[tier.plan_sha256]}")
            continue
        plans[tier.plan_sha256] = name
        path = models_folder(out) / tier.encoder / "1" / "plan.json"
        plan = Plan.from_json(path.read_text(encoding="utf-8"), str(path))
        arms.append(Arm(name, ours, tier.ensemble, plan.summary(), True))
    for threads in PEER_THREADS:
        model = plain_peer.name(threads)
        arms.append(Arm(model, peer, model, f"transformers fp32, {threads} threads", False))
    return arms, left_out


def measure_load(
    client: Worker, arms: Sequence[Arm], options: argparse.Namespace
) -> dict[tuple[str, int], Figures]:
    """(arm, concurrency) -> figures, the arms in turn in every round."""
    found: dict[tuple[str, int], Figures] = {}
    jobs = list(itertools.product(range(options.rounds), options.concurrency, range(len(arms))))
    for turn, concurrency, index in track(jobs, "load", console=CONSOLE):
        arm = arms[(index + turn) % len(arms)]
        result = client.ask(
            url=arm.url,
            model=arm.model,
            concurrency=concurrency,
            seconds=options.seconds,
            warm_s=options.warm,
        )
        found.setdefault((arm.name, concurrency), Figures()).add(arm.name, result)
    return found


def measure_alone(
    client: Worker, in_process: Worker, arms: Sequence[Arm], options: argparse.Namespace
) -> tuple[list[dict[str, Any]], dict[str, list[str]]]:
    """The same texts one by one, served and in process; rows, and the labels of every arm."""
    served: dict[str, list[float]] = {}
    inside: dict[str, list[float]] = {}
    labels: dict[str, list[str]] = {}
    jobs = list(itertools.product(range(options.rounds), range(len(arms))))
    for turn, index in track(jobs, "lone requests", console=CONSOLE):
        arm = arms[(index + turn) % len(arms)]
        answer = client.ask(url=arm.url, model=arm.model, texts=options.texts)
        served.setdefault(arm.name, []).extend(answer["latencies_ms"])
        labels[arm.name] = answer["labels"]
        if arm.ours:
            direct = in_process.ask(tier=arm.name, texts=options.texts)
            inside.setdefault(arm.name, []).extend(direct["latencies_ms"])
            if direct["labels"] != answer["labels"]:
                raise SystemExit(f"bench: tier {arm.name} answers otherwise when it is served")
    rows = []
    for name, values in inside.items():
        # Text by text, so that the spread of lengths does not hide the difference.
        added = [a - b for a, b in zip(served[name], values, strict=True)]
        rows.append(
            {
                "arm": name,
                "what": "lone request: served, in process, and what the ensemble adds",
                "ours_ms": machine.quantiles(served[name]),
                "in_process_ms": machine.quantiles(values),
                "added_ms": machine.quantiles(added),
            }
        )
    return rows, labels


def load_rows(
    arms: Sequence[Arm], found: Mapping[tuple[str, int], Figures], gop: float, peak: float | None
) -> list[dict[str, Any]]:
    """One row for each tier and concurrency, beside the faster of the peers."""
    rows = []
    peers = [arm for arm in arms if not arm.ours]
    for (name, concurrency), figures in found.items():
        arm = next(arm for arm in arms if arm.name == name)
        if not arm.ours:
            continue
        best = max(peers, key=lambda peer: found[peer.name, concurrency].median_rps)
        plain = found[best.name, concurrency]
        row: dict[str, Any] = {
            "arm": name,
            "precision": arm.plan,
            "batch": 1,
            "concurrency": concurrency,
            "ours_ms": machine.quantiles(figures.latencies_ms),
            "ours_rps": spread(figures.rps),
            "torch_fp32_ms": machine.quantiles(plain.latencies_ms),
            "torch_fp32_rps": spread(plain.rps),
            "torch_fp32_arm": best.name,
            "ratio_torch_fp32": round(figures.median_rps / plain.median_rps, 3),
            "client_cores": round(statistics.median(figures.client_cores), 3),
        }
        if ("exact", concurrency) in found:
            exact = found["exact", concurrency].median_rps
            row["ratio_exact"] = round(figures.median_rps / exact, 3)
        if peak:
            row["share_of_limit"] = round(figures.median_rps * gop / peak, 4)
        rows.append(row)
    return sorted(rows, key=lambda row: (row["concurrency"], row["arm"] != "fast", row["arm"]))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least, largest and number of rounds."""
    shown = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {**{key: round(value, 1) for key, value in shown.items()}, "n": len(values)}


def server_version(http: str) -> str:
    """The version that a Triton gives of itself."""
    with urllib.request.urlopen(f"http://{http}/v2", timeout=10) as answer:
        return str(json.load(answer)["version"])


def token_lengths(checkpoint: Path, texts: Sequence[str], max_length: int) -> list[int]:
    """Tokens of each text, specials included."""
    from samp_core.text import TextEncoder

    encodings = TextEncoder.load(checkpoint, max_length).encode(list(texts), offsets=False)
    return [len(encoding.ids) for encoding in encodings]


def gop_a_text(shape: Mapping[str, int], lengths: Sequence[int]) -> float:
    """Mean GOP (a multiply-add is two) of the encoder's products over texts of these lengths."""
    hidden, ffn, layers = shape["hidden"], shape["ffn"], shape["layers"]
    gemms = 2 * (4 * hidden * hidden + 2 * hidden * ffn)
    ops = [layers * (length * gemms + 4 * length * length * hidden) for length in lengths]
    return statistics.fmean(ops) / 1e9


def show(rows: Sequence[Mapping[str, Any]], alone: Sequence[Mapping[str, Any]]) -> None:
    """Both tables on standard output."""
    table = Table(title="one text a request, gRPC; the peer is a plain Triton model, fp32")
    for column in ("callers", "tier", "plan"):
        table.add_column(column)
    for column in ("texts/s", "p50 ms", "p95 ms", "peer texts/s", "peer p50", "ratio", "to exact"):
        table.add_column(column, justify="right")
    for row in rows:
        ours, peer = row["ours_ms"], row["torch_fp32_ms"]
        table.add_row(
            str(row["concurrency"]),
            row["arm"],
            row["precision"].partition(":")[0],
            f"{row['ours_rps']['median']:.1f}",
            f"{ours['median']:.2f}",
            f"{ours['p95']:.2f}",
            f"{row['torch_fp32_rps']['median']:.1f} ({row['torch_fp32_arm']})",
            f"{peer['median']:.2f}",
            f"{row['ratio_torch_fp32']:.2f}x",
            f"{row['ratio_exact']:.2f}x" if "ratio_exact" in row else "",
        )
    lone = Table(title="a lone request, gRPC: p50 in ms")
    for column in ("tier", "served", "in process", "added by the ensemble"):
        lone.add_column(column, justify="left" if column == "tier" else "right")
    for row in alone:
        parts = (row["ours_ms"], row["in_process_ms"], row["added_ms"])
        lone.add_row(row["arm"], *(f"{part['median']:.2f}" for part in parts))
    console = Console(width=None if sys.stdout.isatty() else 130)
    console.print(table)
    console.print(lone)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repository", type=Path, default=Path("model_repository/film-reviews"))
    parser.add_argument("--checkpoint", type=Path, default=Path(".demo/checkpoint"))
    parser.add_argument("--data", type=Path, default=Path(".demo/film_reviews/verification.jsonl"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--warm", type=float, default=0.5, help="seconds before each measurement")
    parser.add_argument("--texts", type=int, default=150, help="of a round of lone requests")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--results", type=Path, default=machine.RESULTS)
    parser.add_argument("--force", action="store_true", help="measure on a busy machine too")
    return parser.parse_args()


@contextlib.contextmanager
def servers(
    options: argparse.Namespace, build: Manifest
) -> Iterator[tuple[Server, tuple[str, int]]]:
    """Our Triton, and the plain one's address and pid; both idle until they are called."""
    with tempfile.TemporaryDirectory(prefix="samp-bench-") as scratch, contextlib.ExitStack() as on:
        folder = Path(scratch) / "models"
        plain_peer.write_repository(
            folder, options.checkpoint, len(build.labels), build.max_length, PEER_THREADS
        )
        CONSOLE.print("bench: starting both servers")
        peer = on.enter_context(plain_peer.serve(folder, Path(scratch) / "plain.log"))
        yield on.enter_context(Server.start(options.repository)), peer


def main() -> None:
    options = parse()
    build = read_manifest(options.repository)
    for path in (options.checkpoint / "config.json", options.data):
        if not path.is_file():
            raise SystemExit(f"bench: {path} is missing; run make demo first")
    busy = machine.require_quiet(options.force)
    load_before = os.getloadavg()
    rows_of_data = [json.loads(line) for line in options.data.read_text().split("\n") if line]
    texts = [row["text"] for row in rows_of_data]
    threads = len(os.sched_getaffinity(0))
    with contextlib.ExitStack() as on:
        server, (peer, peer_pid) = on.enter_context(servers(options, build))
        client = on.enter_context(Worker("closed_loop.py", str(options.data)))
        out = str(options.repository)
        in_process = on.enter_context(Worker("in_process.py", out, str(options.data)))
        in_process.read()
        arms, not_run = find_arms(build, options.repository, server.grpc, peer)
        triton = server_version(server.http)
        pids = (server.pid, peer_pid, client.pid, in_process.pid)
        bystanders = machine.Bystanders(pids)
        alone, labels = measure_alone(client, in_process, arms, options)
        found = measure_load(client, arms, options)
        others = bystanders.share()
    lengths = token_lengths(options.checkpoint, texts, build.max_length)
    peaks = limits.limits(threads)
    shape = json.loads((options.checkpoint / "config.json").read_text())
    keys = {"hidden": "hidden_size", "ffn": "intermediate_size", "layers": "num_hidden_layers"}
    gop = gop_a_text({ours: shape[theirs] for ours, theirs in keys.items()}, lengths)
    rows = load_rows(arms, found, gop, peaks.get("int8_gops"))
    common = {
        "model": build.model,
        "tokens": round(statistics.fmean(lengths), 1),
        "lengths": machine.quantiles(lengths),
    }
    agreement = {
        name: sum(map(str.__eq__, labels[name], labels[plain_peer.name(1)])) / options.texts
        for name in labels
    }
    path = machine.write_result(
        "serving",
        threads=threads,
        rows=[{**common, **row} for row in (*rows, *alone)],
        not_run=[*not_run, "openvino_int8, ort_int8: no serving peers of this suite"],
        found_limits=peaks,
        found_versions=machine.versions(triton=triton),
        folder=options.results,
        busy_before=round(busy, 3),
        others_share=round(others, 3),
        load_before=load_before,
        load_after=os.getloadavg(),
        label_agreement_with_plain=agreement,
        gop_a_text=round(gop, 4),
    )
    show(rows, alone)
    machine.report(path, others)


if __name__ == "__main__":
    main()
