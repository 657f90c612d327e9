"""The encoders of the CPU benchmark behind a real Triton: how much of their throughput is left.

    python benchmarks/served_encoder.py [--models minilm-l6] [--precision int8] [--quick]

A build of one tier for each model (random classifier) is served whole: tokenizer, encoder, head,
ensemble. At each concurrency and number of texts a request, the server and the same build in one
process (no Triton) are measured in turn, round after round, over the same texts. What the path
costs is read from Triton's statistics and from the CPU time of every process.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import sys
import tempfile
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import encoder_models
import limits
import machine
import numpy as np
import perf_analyzer
import psutil
import store
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from samp_kernels.interface import Array
from serving import Worker, server_version, spread

from samp_core import heads
from samp_core.manifest import read_manifest
from samp_core.quantize import export_weights
from samp_core.repository import TierFiles, build_lock, write_build
from samp_core.server import Server
from samp_core.stage import Layout
from samp_core.text import TextEncoder

CONSOLE = Console(stderr=True)
LABELS = ("negative", "positive")
MAX_LENGTH = 128
# The most rows that Triton makes one batch of.
LARGEST_BATCH = 64
ROLES = ("tokenizer", "encoder", "head")
PERF = ".perf.json"  # beside the texts, as perf_analyzer reads them
CLIENTS = ("perf_analyzer", "closed-loop", "locust")
# (model, texts a request) -> the share of the in-process throughput that issue 5 wants.
# 32 callers of 16 texts each wait for seconds, and none is to be refused.
QUEUE_S = 60.0
TARGETS = {
    ("bert-base", 1): 0.80,
    ("bert-base", 16): 0.80,
    ("minilm-l6", 1): 0.55,
    ("minilm-l6", 16): 0.80,
}


@dataclass(frozen=True)
class Load:
    """One way of calling: callers at once, texts a request."""

    concurrency: int
    rows: int

    @property
    def batch(self) -> int:
        """Texts of the largest batch that these callers can fill."""
        return min(LARGEST_BATCH, self.concurrency * self.rows)


@dataclass
class Found:
    """What the rounds of one load gave; rps are requests a second, costs one dict a round."""

    rps: list[float] = field(default_factory=list)
    latencies_ms: list[float] = field(default_factory=list)
    p95_ms: list[float] = field(default_factory=list)  # where only each round's figures are known
    costs: list[dict[str, Any]] = field(default_factory=list)


class Meter:
    """Triton's counters of every model, and the CPU seconds of every process that takes part."""

    def __init__(self, server: Server, models: Mapping[str, str], client: int | None) -> None:
        self._http = server.http
        self._models = models
        family = psutil.Process(server.pid)
        self._processes = {"triton": family}
        if client is not None:
            self._processes["client"] = psutil.Process(client)
        for process in family.children(recursive=True):
            command = " ".join(process.cmdline())
            for role, model in models.items():
                if f"/{model}/" in command:
                    self._processes[role] = process
        self._before = self._read()

    def _read(self) -> tuple[dict[str, Any], dict[str, float]]:
        counters: dict[str, Any] = {}
        for role, model in self._models.items():
            url = f"http://{self._http}/v2/models/{model}/stats"
            with urllib.request.urlopen(url, timeout=10) as answer:
                counters[role] = json.load(answer)["model_stats"][0]
        cpu = {role: sum(one.cpu_times()[:2]) for role, one in self._processes.items()}
        return counters, cpu

    def cost(self) -> dict[str, Any]:
        """Since the start: for each model its batches, waiting and computing; CPU of everybody."""
        (counters, cpu), (counters_before, cpu_before) = self._read(), self._before
        made: dict[str, Any] = {}
        texts = 0
        for role in self._models:
            now, before = counters[role], counters_before[role]
            texts = now["inference_count"] - before["inference_count"]
            executions = now["execution_count"] - before["execution_count"]
            compute = {
                part: (_batch_ns(now, part) - _batch_ns(before, part)) / 1e6 / texts
                for part in ("compute_input", "compute_infer", "compute_output")
            }
            waits, waits_before = (
                now["inference_stats"]["queue"],
                before["inference_stats"]["queue"],
            )
            waited = waits["count"] - waits_before["count"]
            made[role] = {
                "texts_a_batch": texts / executions,
                "requests_a_batch": waited / executions,
                "queue_ms_a_request": (waits["ns"] - waits_before["ns"]) / 1e6 / waited,
                "compute_ms_a_text": sum(compute.values()),
                **{f"{part}_ms_a_text": value for part, value in compute.items()},
            }
        made["cpu_ms_a_text"] = {
            role: 1000 * (cpu[role] - cpu_before[role]) / texts for role in cpu
        }
        return made


def _batch_ns(statistics_of_model: Mapping[str, Any], part: str) -> int:
    """Nanoseconds of all executions; Triton's other counters count one once for each request."""
    return sum(size[part]["ns"] for size in statistics_of_model["batch_stats"])


def write_repository(name: str, precision: str, backend: str, threads: int) -> Path:
    """A build of one encoder with a random classifier behind it; the folder to serve."""
    model = encoder_models.load(name)
    chosen = encoder_models.plan(model, precision, backend, threads)
    hidden = model.checkpoint.config.hidden
    rng = np.random.default_rng(encoder_models.SEED)

    def random(*shape: int) -> Array:
        numbers: Array = rng.standard_normal(shape) / np.sqrt(hidden)
        return numbers.astype(np.float32)

    out = store.FOLDER / f"served-{name}"
    with build_lock(out):
        write_build(
            out,
            model=name,
            task="classification",
            head=heads.get("classification").name,
            labels=LABELS,
            max_length=MAX_LENGTH,
            text=TextEncoder.load(model.folder, MAX_LENGTH),
            head_weights={
                "pooler.weight": random(hidden, hidden),
                "pooler.bias": random(hidden),
                "classifier.weight": random(len(LABELS), hidden),
                "classifier.bias": random(len(LABELS)),
            },
            encoder_config=model.checkpoint.config,
            tiers={
                tier(precision): TierFiles(chosen, export_weights(model.checkpoint.tensors, chosen))
            },
            default_tier=tier(precision),
            build={},
            threads=threads,
        )
    return out


def tier(precision: str) -> str:
    """A tier's name has no plus sign."""
    return precision.replace("+", "-")


def measure(
    name: str, out: Path, texts: Path, loads: Sequence[Load], options: argparse.Namespace
) -> tuple[list[dict[str, Any]], str]:
    """The rows of one model, and Triton's version."""
    manifest = read_manifest(out)
    chosen = tier(options.precision)
    entry = manifest.tiers[chosen]
    models = dict(zip(ROLES, (f"tokenizer_{name}", entry.encoder, f"head_{name}"), strict=True))
    found = {load: Found() for load in loads}
    inside: dict[int, list[float]] = {}
    with contextlib.ExitStack() as on:
        CONSOLE.print(f"bench: {name}: starting Triton")
        server = on.enter_context(Server.start(out, layout=Layout(queue_s=QUEUE_S)))
        client = on.enter_context(Worker("closed_loop.py", str(texts)))
        arguments = (str(out), chosen, str(options.threads), str(texts))
        process = on.enter_context(Worker("served_inside.py", *arguments))
        process.read()
        version = server_version(server.http)
        turns: list[tuple[str, Any]] = [("served", load) for load in loads]
        turns += [("inside", batch) for batch in sorted({8, 32, *(load.batch for load in loads)})]
        with Progress(console=CONSOLE, transient=True) as progress:
            task = progress.add_task(name, total=options.rounds * len(turns))
            for turn, index in itertools.product(range(options.rounds), range(len(turns))):
                kind, what = turns[(turn + index) % len(turns)]
                if kind == "served":
                    pid = client.pid if options.client == "closed-loop" else None
                    meter = Meter(server, models, pid)
                    one_turn(client, server, entry.ensemble, what, found[what], texts, options)
                    found[what].costs.append(meter.cost())
                else:
                    answer = process.ask(batch=what, seconds=options.seconds, warm_s=options.warm)
                    inside.setdefault(what, []).append(answer["texts_per_s"])
                progress.advance(task)
        python = {load: python_parts(process, load, found[load], options) for load in loads}
    return [row(name, load, found[load], inside, python[load]) for load in loads], version


def one_turn(
    client: Worker,
    server: Server,
    ensemble: str,
    load: Load,
    found: Found,
    texts: Path,
    options: argparse.Namespace,
) -> None:
    if options.client == "locust":
        from samp_loadtest.run import run_loadtest

        reviews = encoder_models.reviews()["verification"]
        figures = run_loadtest(
            server.grpc, tier(options.precision), users=load.concurrency, rows=load.rows,
            seconds=max(3.0, options.seconds), texts=reviews,
        )[tier(options.precision)]  # fmt: skip
        if figures["failures"]:
            raise SystemExit(f"bench: {figures['failures']} requests failed")
        found.rps.append(figures["rps"])
        found.latencies_ms.append(figures["p50"])
        return
    if options.client == "perf_analyzer":
        rps, p50, p95 = perf_analyzer.load(
            server.grpc, ensemble, texts.with_suffix(PERF),
            concurrency=load.concurrency, rows=load.rows, seconds=options.seconds,
        )  # fmt: skip
        found.rps.append(rps)
        found.latencies_ms.append(p50)
        found.p95_ms.append(p95)
        return
    result = client.ask(
        url=server.grpc,
        model=ensemble,
        concurrency=load.concurrency,
        rows=load.rows,
        seconds=options.seconds,
        warm_s=options.warm,
    )
    if result["failures"]:
        raise SystemExit(f"bench: a request failed: {result['failures'][0]}")
    found.rps.append(result["rps"])
    found.latencies_ms += result["latencies_ms"]


def python_parts(
    process: Worker, load: Load, found: Found, options: argparse.Namespace
) -> dict[str, float]:
    """What our own Python takes of each model for batches of the size that the encoder got."""
    requests = statistics.median(cost["encoder"]["requests_a_batch"] for cost in found.costs)
    parts: dict[str, float] = process.ask(
        requests=max(1, round(requests)), rows=load.rows, seconds=min(1.0, options.seconds)
    )
    return parts


def row(
    name: str,
    load: Load,
    found: Found,
    inside: Mapping[int, Sequence[float]],
    python: Mapping[str, float],
) -> dict[str, Any]:
    texts_per_s = [rps * load.rows for rps in found.rps]
    median = statistics.median(texts_per_s)
    same = statistics.median(inside[load.batch])
    best = max(inside, key=lambda batch: statistics.median(inside[batch]))
    share = median / same
    wanted = TARGETS.get((name, load.rows))
    made: dict[str, Any] = {
        "model": name,
        "what": "served",
        "batch": load.rows,
        "concurrency": load.concurrency,
        "ours_ms": machine.quantiles(found.latencies_ms),
        "ours_rps": spread(found.rps),
        "texts_per_s": spread(texts_per_s),
        "in_process_batch": load.batch,
        "in_process_texts_per_s": spread(inside[load.batch]),
        "share_in_process": round(share, 4),
        "in_process_best_batch": best,
        "share_in_process_best": round(median / statistics.median(inside[best]), 4),
        "wall_ms_a_text": round(1000 / median, 4),
        "in_process_ms_a_text": round(1000 / same, 4),
        "path": middle(found.costs),
        "python_ms_a_text": dict(python),
    }
    if found.p95_ms:
        made["ours_ms"]["p95"] = round(statistics.median(found.p95_ms), 3)
    if wanted is not None:
        verdict = {"wanted": wanted, "found": round(share, 4), "met": share >= wanted}
        made["targets"] = {"share_in_process": verdict}
    return made


def middle(costs: Sequence[Any]) -> Any:
    """The median of every number over the rounds, in the shape of one round."""
    if isinstance(costs[0], Mapping):
        return {key: middle([cost[key] for cost in costs]) for key in costs[0]}
    return round(statistics.median(costs), 4)


def show(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    table = Table(title="through the server, gRPC; in process: the same texts without Triton")
    for column in ("model", "callers", "texts a request"):
        table.add_column(column)
    for column in ("texts/s", "p50 ms", "p95 ms", "in process", "share", "wanted", "of best batch"):
        table.add_column(column, justify="right")
    path = Table(title="what a text costs on the way, ms (computing overlaps between processes)")
    for column in ("model", "callers", "texts a request"):
        path.add_column(column)
    heads_of_path = (
        "wall", "in process", "tokenizer", "of it Python", "encoder", "of it Python", "session",
        "head", "of it Python", "texts a batch", "waiting", "CPU triton", "tokenizer", "encoder",
        "head", "client",
    )  # fmt: skip
    for column in heads_of_path:
        path.add_column(column, justify="right")
    for one in rows:
        name = (one["model"], str(one["concurrency"]), str(one["batch"]))
        verdict = one.get("targets", {}).get("share_in_process")
        mark = "met" if verdict and verdict["met"] else "NOT met"
        table.add_row(
            *name, f"{one['texts_per_s']['median']:.0f}", f"{one['ours_ms']['median']:.1f}",
            f"{one['ours_ms']['p95']:.1f}", f"{one['in_process_texts_per_s']['median']:.0f}",
            f"{one['share_in_process']:.0%}", f"{verdict['wanted']:.0%} {mark}" if verdict else "",
            f"{one['share_in_process_best']:.0%} of {one['in_process_best_batch']}",
        )  # fmt: skip
        steps, python, cpu = one["path"], one["python_ms_a_text"], one["path"]["cpu_ms_a_text"]
        cells = [one["wall_ms_a_text"], one["in_process_ms_a_text"]]
        for role in ROLES:
            cells += [steps[role]["compute_ms_a_text"], python[role]]
            cells += [python["session"]] if role == "encoder" else []
        waiting = sum(steps[role]["queue_ms_a_request"] for role in ROLES)
        shown = [f"{cell:.3f}" for cell in cells]
        shown += [f"{steps['encoder']['texts_a_batch']:.1f}", f"{waiting:.1f}"]
        shown += [
            f"{cpu[role]:.3f}" if role in cpu else "" for role in ("triton", *ROLES, "client")
        ]
        path.add_row(*name, *shown)
    console.print(table)
    console.print(path)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = list(encoder_models.NAMES)
    parser.add_argument("--models", nargs="+", default=names, choices=names)
    parser.add_argument("--precision", default="int8", choices=list(encoder_models.PRECISIONS))
    parser.add_argument(
        "--backend", nargs="+", default=["cpu", "onednn"], help="ours: the first that opens"
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--concurrency", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--texts", type=int, nargs="+", default=[1, 16], help="of a request")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--warm", type=float, default=1.0, help="seconds before each measurement")
    parser.add_argument("--client", default="perf_analyzer", choices=CLIENTS)
    parser.add_argument("--results", type=Path, help="folder; default: results/ for a whole run")
    parser.add_argument("--quick", action="store_true", help="proves that it runs; no figures")
    parser.add_argument("--force", action="store_true", help="measure on a busy machine too")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.seconds, options.warm = 1, 0.5, 0.1
    return options


def main() -> None:
    options = parse()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    busy = machine.require_quiet(options.force or options.quick)
    load_before = os.getloadavg()
    found_limits = limits.limits(options.threads)
    backend, not_run = encoder_models.first_backend(options.backend, options.threads)
    loads = [Load(*one) for one in itertools.product(options.concurrency, options.texts)]
    rows: list[dict[str, Any]] = []
    triton = "unknown"
    texts = encoder_models.reviews()["verification"]
    lengths = [len(ids) for ids in encoder_models.tokens(texts)]
    bystanders = machine.Bystanders(())
    with tempfile.TemporaryDirectory(prefix="samp-bench-") as scratch:
        file = Path(scratch) / "texts.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        perf_analyzer.write_texts(texts, file.with_suffix(PERF))
        for name in options.models:
            out = write_repository(name, options.precision, backend.name, options.threads)
            made, triton = measure(name, out, file, loads, options)
            rows += made
    others = bystanders.share()
    common = {
        "precision": options.precision,
        "tokens": round(statistics.fmean(lengths), 1),
        "lengths": machine.quantiles(lengths),
    }
    whole = not options.quick and options.models == list(encoder_models.NAMES)
    path = machine.write_result(
        "served-encoder",
        threads=options.threads,
        rows=[{**common, **one} for one in rows],
        not_run=[*not_run.values(), "peers: the serving benchmark has one"],
        found_limits=found_limits,
        found_versions=machine.versions(triton=triton),
        folder=options.results or (machine.RESULTS if whole else store.FOLDER / "results"),
        backend=backend.name,
        client=options.client,
        busy_before=round(busy, 3),
        others_share=round(others, 3),
        load_before=load_before,
        load_after=os.getloadavg(),
    )
    show(rows, Console(width=None if sys.stdout.isatty() else 220))
    machine.report(path, others)


if __name__ == "__main__":
    main()
