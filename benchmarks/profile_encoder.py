"""Where a pass of our CPU encoder goes: every op beside its floor, and what each thread waited.

    python benchmarks/profile_encoder.py [--rows bert-base/1x128 ...] [--precision int8+attention]

An op's floor is its arithmetic at the peak that this run measures. Norms and the embedding have
none: all of theirs counts as lost. Then the same pass with one thing changed at a time, in turns
with the pass itself: one thread, all layers with the weights of the first, ReLU for GELU.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import encoder_models
import limits
import machine
import numpy as np
import store
from encoder_models import Inputs, Model
from interleave import Contender, Pace, measure
from rich.console import Console
from rich.table import Table
from samp_kernels.cpu.backend import CpuBackend
from samp_kernels.cpu.session import NativeSession
from samp_kernels.interface import GEMM_SITES, Batch

from samp_core.quantize import export_weights

THREADS = len(os.sched_getaffinity(0))
ROWS = ("bert-base/1x128", "bert-base/8x128")
OPS = ("embed", "qkv", "attention", "out", "norms", "ffn_in", "ffn_out")


@dataclass
class Arm:
    """One way of running the pass: its session, and what each timed pass said."""

    session: NativeSession
    batch: Batch
    passes: list[tuple[float, list[dict[str, float]]]] = field(default_factory=list)

    def run(self) -> None:
        passed, threads = self.session.profile_threads(self.batch, "tokens")
        self.passes.append((passed, [by_op(one) for one in threads]))

    def pass_ms(self) -> float:
        return 1000 * statistics.median(passed for passed, _ in self.passes)

    def op_ms(self, op: str) -> list[float]:
        """Of each thread, the median over passes."""
        count = len(self.passes[0][1])
        return [
            1000 * statistics.median(threads[i].get(op, 0.0) for _, threads in self.passes)
            for i in range(count)
        ]

    def waited_ms(self) -> list[float]:
        count = len(self.passes[0][1])
        return [
            1000
            * statistics.median(
                passed - sum(threads[i].values()) for passed, threads in self.passes
            )
            for i in range(count)
        ]


def by_op(timings: list[tuple[str, str, float]]) -> dict[str, float]:
    """Seconds by OPS, all layers together."""
    found: dict[str, float] = defaultdict(float)
    for op, site, seconds in timings:
        name = {"embed_layernorm": "embed", "add_layernorm": "norms"}.get(op)
        found[name or site.rsplit(".", 1)[-1]] += seconds
    return dict(found)


def floors_ms(
    model: Model, inputs: Inputs, precision: str, found: Mapping[str, float]
) -> dict[str, float]:
    """Milliseconds of an op's products at the peak of all cores."""
    c, tokens = model.checkpoint.config, sum(inputs.lengths)
    sites = encoder_models.PRECISIONS[precision]
    sizes = {"qkv": 3 * c.hidden**2, "out": c.hidden**2, "ffn_in": c.hidden * c.ffn}
    sizes["ffn_out"] = sizes["ffn_in"]
    rate = {True: found["vnni_gops"], False: found["f32_gflops"]}
    floors = {
        site: 2e-6 * tokens * size * c.layers / rate[site in sites] for site, size in sizes.items()
    }
    squares = sum(length**2 for length in inputs.lengths)
    floors["attention"] = sum(
        2e-6 * squares * c.hidden * c.layers / rate[site in sites] for site in ("scores", "context")
    )
    return floors


class Same(dict[Any, Any]):
    """Packed weights of which every layer finds the first's."""

    def _key(self, key: tuple[str, str, str]) -> tuple[str, str, str]:
        return (key[0].rsplit(".", 1)[-1], *key[1:])

    def __contains__(self, key: object) -> bool:
        return super().__contains__(self._key(key))  # type: ignore[arg-type]

    def __getitem__(self, key: tuple[str, str, str]) -> Any:
        return super().__getitem__(self._key(key))

    def __setitem__(self, key: tuple[str, str, str], value: Any) -> None:
        super().__setitem__(self._key(key), value)


def arms(model: Model, inputs: Inputs, precision: str, level: str, threads: int) -> dict[str, Arm]:
    """The pass itself first; then what is changed -> the same with that change."""
    backend = CpuBackend(threads, level)
    plan = encoder_models.plan(model, precision, "cpu", threads)
    tensors = export_weights(model.checkpoint.tensors, plan, model.quantized)
    config, batch = model.checkpoint.config, inputs.batch()
    packs: dict[Any, Any] = {}
    made = {}
    for name, one, count, shared in (
        ("", config, threads, packs),
        ("one thread", config, 1, packs),
        ("one layer's weights in all", config, threads, Same()),
        ("ReLU for GELU", replace(config, act="relu"), threads, packs),
    ):
        if name == "one thread" and threads == 1:
            continue
        session = backend.prepare(one, tensors, plan, threads=count, packs=shared)
        made[name] = Arm(session, batch)
    return made


def profile(
    model: Model, inputs: Inputs, options: argparse.Namespace, found: Mapping[str, float]
) -> dict[str, Any]:
    made = arms(model, inputs, options.precision, options.level, options.threads)
    contenders = [Contender(name, "", arm.run, lambda: np.zeros((1, 1), np.float32))
                  for name, arm in made.items()]  # fmt: skip
    measure(contenders, Pace(rounds=options.rounds, turn_s=options.seconds), 0)
    itself = made[""]
    floors = floors_ms(model, inputs, options.precision, found)
    passed = itself.pass_ms()
    rows = []
    for op in OPS:
        threads = itself.op_ms(op)
        mean = statistics.mean(threads)
        floor = floors.get(op, 0.0)
        rows.append({"op": op, "floor_ms": floor, "ms": mean, "threads_ms": threads,
                     "lost_ms": mean - floor})  # fmt: skip
    waited = itself.waited_ms()
    rows.append({"op": "waiting", "floor_ms": 0.0, "ms": statistics.mean(waited),
                 "threads_ms": waited, "lost_ms": statistics.mean(waited)})  # fmt: skip
    rows.append({"op": "pass", "floor_ms": sum(floors.values()), "ms": passed, "threads_ms": [],
                 "lost_ms": passed - sum(floors.values())})  # fmt: skip
    changed = {}
    for name, arm in made.items():
        if name:
            ms = arm.pass_ms() / (options.threads if name == "one thread" else 1)
            ops = {op: statistics.mean(arm.op_ms(op)) for op in GEMM_SITES}
            if name == "one thread":
                ops = {op: taken / options.threads for op, taken in ops.items()}
            changed[name] = {"ms": ms, "ops_ms": ops}
        arm.session.close()
    return {"model": model.name, "row": inputs.name, "precision": options.precision,
            "ops": rows, "changed": changed}  # fmt: skip


def show(result: Mapping[str, Any], console: Console) -> None:
    title = f"{result['model']}, {result['row']}, {result['precision']}"
    table = Table("op", "floor ms", "ms", "share", "lost ms", "each thread", title=title)
    for row in result["ops"]:
        share = f"{row['floor_ms'] / row['ms']:.0%}" if row["floor_ms"] else "-"
        threads = ", ".join(f"{one:.2f}" for one in row["threads_ms"])
        table.add_row(
            row["op"], f"{row['floor_ms']:.2f}", f"{row['ms']:.2f}", share,
            f"{row['lost_ms']:.2f}", threads,
        )  # fmt: skip
    console.print(table)
    table = Table("with", "ms", *GEMM_SITES, title="one thing changed")
    ops = {row["op"]: row["ms"] for row in result["ops"]}
    base = {"ms": ops["pass"], "ops_ms": ops}
    for name, one in {"nothing changed": base, **result["changed"]}.items():
        if name == "one thread":
            name = "one thread, divided"
        table.add_row(
            name, f"{one['ms']:.2f}", *(f"{one['ops_ms'][site]:.2f}" for site in GEMM_SITES)
        )
    console.print(table)


def main() -> None:
    options = parse()
    machine.require_quiet(options.force)
    found = limits.limits(options.threads)
    console = Console(width=100)
    bystanders = machine.Bystanders(())
    results = []
    for row in options.rows:
        name, _, inputs = row.partition("/")
        model = encoder_models.load(name)
        results.append(profile(model, encoder_models.inputs(inputs), options, found))
        show(results[-1], console)
    others = bystanders.share()
    path = machine.write_result(
        "encoder-profile", threads=options.threads, rows=results, not_run=[], found_limits=found,
        found_versions=store.installed(("samp-triton", "numpy")), folder=options.results,
        others_share=round(others, 3),
    )  # fmt: skip
    console.print(
        f"limits: int8 {found['vnni_gops']:.0f} GOP/s, fp32 {found['f32_gflops']:.0f}, "
        f"memory {found['gbps']:.1f} GB/s"
    )
    machine.report(path, others)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", metavar="MODEL/ROW", default=list(ROWS))
    parser.add_argument("--precision", choices=["int8", "int8+attention"], default="int8+attention")
    parser.add_argument("--level", default="", help="a dispatch level; default: the best")
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="timed in a turn")
    parser.add_argument("--results", type=Path, default=store.FOLDER / "results")
    parser.add_argument("--force", action="store_true", help="measure on a busy machine too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
