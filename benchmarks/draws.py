"""What each strategy would serve if other rows had verified its plans.

    make bench-draws BENCH="--data FOLDER --checkpoints FOLDER"
    python benchmarks/draws.py --only banking77

At a promise that a few texts decide, one set of verification rows tells little of a strategy. So
the sequence of plans that each strategy would test (it follows from the search rows alone) is run
over all rows that no search saw, and verified on DRAWS sets of as many rows as a build verifies
with, drawn from these with replacement. Builds are those of benchmarks/tasks.py, whose cache is
used; all plans are timed together, so what a strategy serves on a draw has a time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import limits
import machine
import numpy as np
import tasks
from tasks import ALPHA

DRAWS = 1000
FEW_DRAWS = 200
"""Of a metric whose every test is a bootstrap of its own."""
STRATEGIES = ("milp", "samp", "greedy")


class Drawn:
    """The sequences of one pair, and every plan in them: texts under it, milliseconds."""

    def __init__(self, pair: tasks.Pair, how: Any) -> None:
        self.pair = pair
        files = tasks.parted(pair, tasks.OUT / pair.name / "rows", None)
        self.sequences: dict[tuple[str, float], list[str]] = {}
        plans: dict[str, Any] = {}
        for strategy in STRATEGIES:
            plans |= self._built(tasks.fields(pair, files, strategy, how), strategy)
        self._measure(plans, files, tasks.fields(pair, files, "samp", how))

    def _built(self, fields: Mapping[str, Any], strategy: str) -> dict[str, Any]:
        """Keeps the sequences; the plans in them by their keys."""
        import samp_core
        from samp_core.show import progress

        with progress() as bars:
            made = samp_core.build(fields, bars)
        found = {}
        for choice in made.choices.values():
            if choice.spec.drop is not None:
                keys = [made.plans[name].key() for name in choice.sequence]
                self.sequences[strategy, choice.spec.drop] = keys
                found |= {made.plans[name].key(): made.plans[name] for name in choice.sequence}
        return found

    def _measure(
        self, plans: dict[str, Any], files: Mapping[str, Any], fields: Mapping[str, Any]
    ) -> None:
        from samp_core import build, metrics
        from samp_core.config import load_config
        from samp_core.data import read_rows
        from samp_core.show import progress

        with progress() as bars:
            bench = build.open_workbench(load_config(None, fields), bars)
            self.metric = metrics.of(bench.task, bench.checkpoint.labels)
            self.exact = bench.base_plan().key()
            plans = {self.exact: bench.base_plan(), **plans}
            splits = [
                bench.split(read_rows(files[name], task=bench.task))
                for name in ("verification", "fresh")
            ]
            self.n = splits[0].rows.n
            ms = bench.latencies(plans, splits[0], "draws: all plans together", ("1",))
            self.ms = {key: each["1"] for key, each in ms.items()}
            self.texts = {}
            for key, plan in plans.items():
                logits = [bench.logits(plan, split, f"draws: {key[:8]}") for split in splits]
                measured = map(self.metric.measure, logits, splits)
                self.texts[key] = np.concatenate(list(measured))
            bench.close()

    def served(self, sequences: Mapping[Any, Sequence[str]], draws: int) -> dict[Any, list[str]]:
        """What each sequence (its key ends with its promise in points) serves on each draw.

        As a build does: of the plans that passed the fastest, or float's.
        """
        control = self.texts[self.exact]
        random = np.random.default_rng(0)
        found: dict[Any, list[str]] = {key: [] for key in sequences}
        for _ in range(draws):
            rows = random.integers(0, len(control), self.n)
            bounds: dict[str, float] = {}
            for key, sequence in sequences.items():
                passed = [self.exact]
                for plan in sequence:
                    if plan not in bounds:
                        texts = self.texts[plan][rows]
                        bounds[plan] = self.metric.test(control[rows], texts, 1.0, ALPHA).bound
                    if bounds[plan] > key[-1] / 100.0:
                        break
                    passed.append(plan)
                found[key].append(min(passed, key=lambda plan: self.ms[plan]))
        return found

    def rows(self) -> list[dict[str, Any]]:
        """A row a promise."""
        from samp_core.metrics import Accuracy
        from samp_core.rivals import HARDLY

        draws = DRAWS if isinstance(self.metric, Accuracy) else FEW_DRAWS
        served = self.served(self.sequences, draws)
        control = self.metric.value(self.texts[self.exact])
        lost = {key: control - self.metric.value(texts) for key, texts in self.texts.items()}
        made = []
        for promise in self.pair.drops:
            row: dict[str, Any] = {
                "model": self.pair.name, "promise": promise, "n": self.n,
                "pool": len(self.texts[self.exact]), "draws": draws,
                "float_ms": self.ms[self.exact],
            }  # fmt: skip
            times = {
                strategy: np.array([self.ms[plan] for plan in served[strategy, promise]])
                for strategy in STRATEGIES
            }
            for strategy in STRATEGIES:
                ms, plans = times[strategy], served[strategy, promise]
                row[strategy] = {
                    "plans": len(self.sequences[strategy, promise]),
                    "mean_ms": float(ms.mean()), "mean_error_ms": float(ms.std() / draws**0.5),
                    "median_ms": float(np.median(ms)),
                    "broken": float(np.mean([lost[plan] > promise / 100.0 for plan in plans])),
                }  # fmt: skip
            for other in STRATEGIES[1:]:
                ratio = times[other] / times["milp"]
                row[other] |= {
                    "times_milp": float(times[other].mean() / times["milp"].mean()),
                    "milp_slower": float(np.mean(ratio < 1.0 - HARDLY)),
                    "milp_faster": float(np.mean(ratio > 1.0 + HARDLY)),
                }
            made.append(row)
        return made


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """A Markdown table, as docs/plan_search.md has it."""
    print(
        "| pair | promise | milp, samp, greedy: mean ms of one text | milp beside samp: faster, "
        "slower on | beside greedy |\n|---|---|---|---|---|"
    )
    for row in rows:
        means = ", ".join(f"{row[strategy]['mean_ms']:.3g}" for strategy in STRATEGIES)
        beside = " | ".join(
            f"{row[other]['times_milp']:.2f}x; {row[other]['milp_faster']:.0%}, "
            f"{row[other]['milp_slower']:.0%}"
            for other in STRATEGIES[1:]
        )
        print(f"| {row['model']} | {row['promise']:g} | {means} | {beside} |")


def main() -> None:
    how = tasks.arguments()
    machine.require_quiet(how.force)
    every = tasks.pairs(how.data, how.checkpoints)
    order = [pair.name for pair in every]
    for pair in every:
        why = tasks.missing(pair)
        if why or (how.only and pair.name not in how.only):
            tasks.say(f"skipped: {why or pair.name}")
            continue
        watched = machine.Bystanders([])
        rows = Drawn(pair, how).rows()
        show(rows)
        rows += [r for r in tasks.earlier(how.results, "draws") if r["model"] != pair.name]
        path = machine.write_result(
            "draws", threads=how.threads,
            rows=sorted(json.loads(json.dumps(rows)), key=lambda row: order.index(row["model"])),
            not_run=[name for name in order if all(row["model"] != name for row in rows)],
            found_limits=limits.limits(how.threads), found_versions=machine.versions(),
            folder=how.results,
        )  # fmt: skip
        machine.report(path, watched.share())


if __name__ == "__main__":
    main()
