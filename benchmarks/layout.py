"""Which layout of threads, instances and queue delays serves best on this machine.

    make bench-layout     or: python benchmarks/layout.py [--tier fast] [--rounds 5] [--quick]

One real Triton for each layout stands ready, and one at a time is called, at 1, 8 and 32 callers
with one text a request. Every round calls every layout, in an order that turns, so that a slow
minute falls on all of them; what is shown are medians over rounds, beside the layout of the builds.
Triton's statistics say how long a request waited for each step and was computed there, and so the
tokenizer's share.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import limits
import machine
import store
from rich.console import Console
from rich.progress import track
from rich.table import Table
from samp_client import StepTime, connect
from serving import Figures, Worker, server_version, spread

from samp_core.manifest import read_manifest
from samp_core.server import Server
from samp_core.stage import Layout

CONSOLE = Console(stderr=True)
Steps = dict[tuple[str, int], list[Sequence[StepTime]]]


@dataclass(frozen=True)
class Arm:
    """One layout: encoder threads, and what differs from the build's configurations."""

    name: str
    threads: int
    layout: Layout = field(default_factory=Layout)

    def facts(self) -> dict[str, Any]:
        return {
            "encoder_threads": self.threads,
            "instances": dict(self.layout.instances),
            "queue_delay_us": dict(self.layout.queue_delay_us),
        }


def arms(cores: int) -> list[Arm]:
    """As built with all cores, then one thing changed at a time."""
    made = [Arm("as built", cores)]
    if cores > 1:
        made.append(Arm("encoder: 1 thread", 1))
        both = Layout(instances={"encoder": 2})
        made.append(Arm("encoder: 2 instances of 1 thread", 1, both))
    for role in ("tokenizer", "head"):
        made.append(Arm(f"{role}: 2 instances", cores, Layout(instances={role: 2})))
    for delay in (100, 300, 1000):
        around = {"tokenizer": delay, "head": delay}
        made.append(Arm(f"tokenizer, head: wait {delay} us", cores, Layout(queue_delay_us=around)))
    for delay in (300, 1000):
        waits = Layout(queue_delay_us={"encoder": delay})
        made.append(Arm(f"encoder: wait {delay} us", cores, waits))
    return made


def measure(
    client: Worker,
    servers: Sequence[tuple[Arm, Server]],
    ensemble: str,
    options: argparse.Namespace,
) -> tuple[dict[tuple[str, int], Figures], Steps]:
    """(arm, callers) -> figures, and the times of the ensemble's steps in each round."""
    found: dict[tuple[str, int], Figures] = {}
    steps: Steps = {}
    jobs = itertools.product(range(options.rounds), options.concurrency, range(len(servers)))
    for turn, callers, index in track(list(jobs), "layouts", console=CONSOLE):
        arm, server = servers[(index + turn) % len(servers)]
        with connect(server.grpc) as triton:
            before = triton.statistics()
            result = client.ask(
                url=server.grpc,
                model=ensemble,
                concurrency=callers,
                seconds=options.seconds,
                warm_s=options.warm,
            )
            times = triton.server_times(options.tier, before, triton.statistics())
        found.setdefault((arm.name, callers), Figures()).add(arm.name, result)
        steps.setdefault((arm.name, callers), []).append(times.steps)
    return found, steps


def step_facts(rounds: Sequence[Sequence[StepTime]]) -> dict[str, Any]:
    """Medians over rounds: ms a request by role, and the tokenizer's share of the computing."""
    made: dict[str, Any] = {"steps_ms": {}}
    for place, step in enumerate(rounds[0]):
        parts = {
            "queue": [steps[place].queue_ms or 0.0 for steps in rounds],
            "compute": [steps[place].compute_ms or 0.0 for steps in rounds],
        }
        role = step.model.partition("_")[0]
        made["steps_ms"][role] = {k: round(statistics.median(v), 4) for k, v in parts.items()}
    computed = {role: times["compute"] for role, times in made["steps_ms"].items()}
    made["tokenizer_share"] = round(computed["tokenizer"] / sum(computed.values()), 4)
    return made


def rows(
    chosen: Sequence[Arm],
    found: Mapping[tuple[str, int], Figures],
    steps: Steps,
    callers: Sequence[int],
) -> list[dict[str, Any]]:
    """One row for each layout and number of callers; ratios to the first layout, round by round."""
    made = []
    for count, arm in itertools.product(callers, chosen):
        figures, base = found[arm.name, count], found[chosen[0].name, count]
        ratios = [a / b for a, b in zip(figures.rps, base.rps, strict=True)]
        made.append(
            {
                "arm": arm.name,
                **arm.facts(),
                "batch": 1,
                "concurrency": count,
                "ours_ms": machine.quantiles(figures.latencies_ms),
                "ours_rps": spread(figures.rps),
                "ratio_as_built": round(statistics.median(ratios), 4),
                "ratio_as_built_range": [round(min(ratios), 4), round(max(ratios), 4)],
                "client_cores": round(statistics.median(figures.client_cores), 3),
                **step_facts(steps[arm.name, count]),
            }
        )
    return made


def show(made: Sequence[Mapping[str, Any]]) -> None:
    table = Table(title="one text a request, gRPC; ratio of texts/s to the layout as built")
    for column in ("callers", "layout"):
        table.add_column(column)
    for column in ("texts/s", "p50 ms", "p95 ms", "ratio", "least", "most", "tokenizer"):
        table.add_column(column, justify="right")
    for row in made:
        low, high = row["ratio_as_built_range"]
        table.add_row(
            str(row["concurrency"]),
            row["arm"],
            f"{row['ours_rps']['median']:.1f}",
            f"{row['ours_ms']['median']:.2f}",
            f"{row['ours_ms']['p95']:.2f}",
            *(f"{value:.3f}" for value in (row["ratio_as_built"], low, high)),
            f"{row['tokenizer_share']:.0%}",
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repository", type=Path, default=Path("model_repository/film-reviews"))
    parser.add_argument("--data", type=Path, default=Path(".demo/film_reviews/verification.jsonl"))
    parser.add_argument("--tier", default="fast")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--warm", type=float, default=0.5, help="seconds before each measurement")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--only", nargs="+", default=[], help="layouts whose name has a word")
    parser.add_argument("--results", type=Path, help="folder; default: results/ for a whole run")
    parser.add_argument("--quick", action="store_true", help="proves that it runs; no figures")
    parser.add_argument("--force", action="store_true", help="measure on a busy machine too")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.seconds, options.warm = 1, 0.5, 0.1
    return options


def main() -> None:
    options = parse()
    if not options.data.is_file():
        raise SystemExit(f"bench: {options.data} is missing; run make demo first")
    build = read_manifest(options.repository)
    (tier,) = build.chosen([options.tier])
    busy = machine.require_quiet(options.force or options.quick)
    load_before = os.getloadavg()
    cores = len(os.sched_getaffinity(0))
    chosen = arms(cores)
    chosen = [
        arm
        for arm in chosen
        if arm is chosen[0] or not options.only or any(word in arm.name for word in options.only)
    ]
    with contextlib.ExitStack() as on:
        servers = []
        for arm in track(chosen, "starting servers", console=CONSOLE):
            server = Server.start(
                options.repository, tiers=[tier], threads=arm.threads, layout=arm.layout
            )
            servers.append((arm, on.enter_context(server)))
        client = on.enter_context(Worker("closed_loop.py", str(options.data)))
        version = server_version(servers[0][1].http)
        bystanders = machine.Bystanders([client.pid, *(server.pid for _, server in servers)])
        found, steps = measure(client, servers, build.tiers[tier].ensemble, options)
        others = bystanders.share()
    made = rows(chosen, found, steps, options.concurrency)
    whole = not (options.quick or options.only)
    plan = models_plan(options.repository, build.tiers[tier].encoder)
    path = machine.write_result(
        "layout",
        threads=cores,
        rows=[{"model": build.model, "tier": tier, "precision": plan, **row} for row in made],
        not_run=["peers: this compares layouts of one server"],
        found_limits=limits.limits(cores),
        found_versions=machine.versions(triton=version),
        folder=options.results or (machine.RESULTS if whole else store.FOLDER / "results"),
        busy_before=round(busy, 3),
        others_share=round(others, 3),
        load_before=load_before,
        load_after=os.getloadavg(),
    )
    show(made)
    machine.report(path, others)


def models_plan(repository: Path, encoder: str) -> str:
    """The plan of an encoder in a line."""
    from samp_core.plan import Plan

    path = read_manifest(repository).folder / "models" / encoder / "1" / "plan.json"
    return Plan.from_json(path.read_text(encoding="utf-8"), str(path)).summary()


if __name__ == "__main__":
    main()
