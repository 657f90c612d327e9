"""The search per node: scores and costs measured, plans proposed, looked at on the search split.

A strategy proposes plans; each is run over the search split and, at the end, all are timed whole
beside SAMP's modes, so that the model of the device proposes and the device decides.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from samp_core import allocate, costs, evaluate, milp, sensitivity
from samp_core.allocate import Candidate
from samp_core.chain import Node, chain, choice_of, plan_of
from samp_core.config import BuildConfig
from samp_core.metrics import Metric
from samp_core.plan import Plan
from samp_core.sensitivity import Score
from samp_core.tiers import FLOAT
from samp_core.workbench import Split, Workbench

LOOKS = 20
"""Plans of the staircase that are run over the search split."""
SENSITIVITY = 0.6
"""Share of the time left that measuring sites may take; the rest is for looking at plans."""
SHARES = (1.0, 0.85, 0.7, 0.4)
"""Parts of a promise that the predicted bounds of its candidates shall reach."""


class Clock:
    """What is left of a time budget."""

    def __init__(self, begin: float, budget_s: float) -> None:
        self._end = begin + budget_s
        self._begin = begin

    def reserve(self, seconds: float) -> None:
        """Keep so much of the rest for what comes after the search, at most half of it."""
        left = max(self._end - time.perf_counter(), 0.0)
        self._end -= min(seconds, left / 2)

    def part(self, share: float) -> Callable[[], bool]:
        """Whether this share of what is left now has gone by."""
        now = time.perf_counter()
        end = now + share * max(self._end - now, 0.0)
        return lambda: time.perf_counter() >= end

    def over(self) -> bool:
        return time.perf_counter() >= self._end

    def spent(self) -> float:
        return time.perf_counter() - self._begin


@dataclass
class Found:
    """Every plan looked at, by name, with its measured candidate; the record goes to build.json.

    modelled: name -> what the search foretold: `latency_ms` by bucket, `kl` as a sum over nodes.
    """

    plans: dict[str, Plan]
    candidates: dict[str, Candidate]
    modelled: dict[str, dict[str, Any]] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)


class Search:
    """One search over the nodes of one model; `run` does the whole of it."""

    def __init__(
        self,
        config: BuildConfig,
        bench: Workbench,
        modes: Mapping[str, Plan],
        split: Split,
        metric: Metric,
        rows_to_come: int,
        clock: Clock,
    ) -> None:
        self._config, self._bench, self._modes = config, bench, modes
        self._split, self._metric, self._n, self._clock = split, metric, rows_to_come, clock
        last = list(modes.values())[-1]
        self._base = replace(last, mode=None)
        recipes = {site: entry.recipe for site, entry in last.sites.items() if entry.recipe}
        self.nodes: tuple[Node, ...] = chain(last.layers, bench.quantizable(), recipes)
        self.scores: dict[str, Score] = {}
        self._by_key = {plan.key(): name for name, plan in modes.items()}
        self._found = Found({FLOAT: modes[FLOAT]}, {})

    def run(self) -> Found:
        """Measure, propose, look, time. What the clock forbids is left out, never the timing."""
        begin = time.perf_counter()
        self._look(FLOAT, self._modes[FLOAT])
        self._metric.check(self._logits(FLOAT), self._split)
        share = self._n / max(self._split.rows.n, 1)
        self._clock.reserve((time.perf_counter() - begin) * share * (2 + len(self._config.tiers)))
        self.table = costs.measured(
            self._bench, self._base, self.nodes, self._split, self._config.mix
        )
        self._score()
        self.losses = self._losses()
        {"milp": self._milp, "greedy": self._greedy, "lower-loss": self._lower_loss}[
            self._config.strategy
        ]()
        if self._config.strategy == "milp":
            for name, plan in self._modes.items():
                self._look(name, plan)
        self._time()
        self._found.record = self._record()
        return self._found

    # measuring

    def _score(self) -> None:
        bench, split = self._bench, self._split
        every = self._config.strategy == "lower-loss"
        rows = len(split.encodings) if every else sensitivity.CHEAP_ROWS
        scores = sensitivity.cheap_scores(bench, self._base, self.nodes, split, rows)

        def dearest(name: str) -> tuple[float, float]:
            score = scores[name]
            return (-(score.fisher or 0.0), score.sqnr_db)

        order = sorted(scores, key=dearest)
        stop = self._clock.part(SENSITIVITY)
        found = sensitivity.measured_kl(bench, self._base, self.nodes, split, order, stop)
        self.scores = sensitivity.with_kl(scores, found)

    def _losses(self) -> list[list[float]]:
        kl = sensitivity.estimated(self.scores)
        return [
            [0.0] * (len(node.options) - 1) + [kl[node.name]] if node.name in kl else [0.0]
            for node in self.nodes
        ]

    def _logits(self, name: str) -> Any:
        title = f"search: {name}" + (f" ({self._front()})" if name not in self._modes else "")
        return self._bench.logits(self._found.plans[name], self._split, title)

    def _look(self, name: str, plan: Plan) -> Candidate | None:
        """The candidate of a plan by its modelled latency; None where the time is up.

        A plan that is one of SAMP's modes goes by that name.
        """
        name = self._by_key.setdefault(plan.key(), name)
        plan = self._modes.get(name, plan)
        found = self._found
        if name in found.candidates:
            return found.candidates[name]
        if self._clock.over() and name not in (FLOAT, list(self._modes)[-1]):
            return None
        found.plans[name] = plan
        reference = self._bench.logits(self._modes[FLOAT], self._split, f"search: {FLOAT}")
        ms = 0.0
        if self.scores or name != FLOAT:
            found.modelled[name] = self._modelled(plan)
            ms = self._weigh(found.modelled[name]["latency_ms"])
        made = self._metric.candidate(name, ms, reference, self._logits(name), self._split)
        found.candidates[name] = made
        self._keep_best()
        return made

    def _modelled(self, plan: Plan) -> dict[str, Any]:
        choice = choice_of(plan, self.nodes)
        latency = {bucket: self.table.total(choice, bucket) for bucket in self.table.edges}
        return {"latency_ms": latency, "kl": milp.lost(self.losses, choice)}

    def _weigh(self, ms: Mapping[str, float]) -> float:
        return weigh(ms, self._config.mix)

    def _bound(self, candidate: Candidate) -> float:
        return allocate.predicted_bound(candidate, self._n, self._config.alpha)

    def _fits(self, limit: float, candidate: Candidate) -> bool:
        return self._bound(candidate) <= limit

    def _time(self) -> None:
        """Whole plans on the device, all interleaved: the latencies that choices are made with."""
        found = self._found
        measured = self._bench.latencies(
            found.plans, self._split, "measure latencies", tuple(self._config.mix)
        )
        found.modelled[FLOAT] = self._modelled(found.plans[FLOAT])
        for name, candidate in found.candidates.items():
            ms = self._weigh(measured[name])
            found.candidates[name] = replace(candidate, latency_ms=ms)

    # strategies

    def _milp(self) -> None:
        """Move the budget of KL until each promise's bound fits: by halves, over a staircase."""
        edges = self.table.weighted(self._config.mix)
        self.stairs = milp.staircase(edges, self.losses)
        looked: dict[int, Candidate] = {}

        def look(index: int) -> Candidate | None:
            if index not in looked and len(looked) < LOOKS:
                plan = plan_of(self._base, self.nodes, self.stairs[index].choice)
                made = self._look(f"milp-{plan.key()[:8]}", plan)
                if made is not None:
                    looked[index] = made
            return looked.get(index)

        wishes = self._config.tiers.values()
        for share in SHARES:
            for promise in sorted({spec.drop / 100.0 for spec in wishes if spec.drop is not None}):
                last_fit(len(self.stairs), look, partial(self._fits, share * promise))
        for ceiling in sorted({spec.latency for spec in wishes if spec.latency is not None}):
            base = self._weigh(self.table.base_ms)
            under = [i for i, s in enumerate(self.stairs) if s.cost + base <= ceiling]
            first = under[0] if under else len(self.stairs) - 1
            for index in (first, first + 1, first - 1):
                if 0 <= index < len(self.stairs):
                    look(index)

    def _greedy(self) -> None:
        """From all int8, give the dearest node back to fp32 until the strictest promise holds.

        As NNCF's accuracy-aware control and Neural Compressor's fallback do; the baseline.
        """
        drops = [spec.drop / 100.0 for spec in self._config.tiers.values() if spec.drop is not None]
        kl = sensitivity.estimated(self.scores)
        choice = [len(node.options) - 1 for node in self.nodes]
        place = {node.name: index for index, node in enumerate(self.nodes)}
        for count, name in enumerate([None, *sorted(kl, key=lambda name: -kl[name])]):
            if name is not None:
                choice[place[name]] = 0
            made = self._look(f"greedy({count})", plan_of(self._base, self.nodes, choice))
            if made is None or (drops and self._bound(made) <= SHARES[-1] * min(drops)):
                break

    def _lower_loss(self) -> None:
        """The nodes whose noise lowers the task's loss to first order (arXiv 2207.10083).

        The k most helpful of them, for up to eight k.
        """
        helpful = {
            name: score.signed_whole
            for name, score in self.scores.items()
            if score.signed_whole is not None and score.signed_whole < 0.0
        }
        order = sorted(helpful, key=lambda name: helpful[name])
        counts = {-(-len(order) * i // 8) for i in range(1, 9)} - {0}
        for count in sorted(counts, reverse=True):
            chosen = set(order[:count])
            choice = [int(node.name in chosen) for node in self.nodes]
            self._look(f"lower-loss({count})", plan_of(self._base, self.nodes, choice))

    # what is kept and said

    def _front(self) -> str:
        made = [c for c in self._found.candidates.values() if c.name != FLOAT]
        front = allocate.front(made, self._n, self._config.alpha)
        if not front:
            return "no plan yet"
        return (
            f"front of {len(front)}: {front[0].latency_ms:.2f} to {front[-1].latency_ms:.2f} ms, "
            f"bounds {100 * self._bound(front[0]):.2f} to {100 * self._bound(front[-1]):.2f} pt"
        )

    def _keep_best(self) -> None:
        """For each promised drop the fastest plan, as modelled, whose predicted bound fits."""
        best = {}
        for tier, spec in self._config.tiers.items():
            if spec.drop is not None:
                fits = [
                    c
                    for c in self._found.candidates.values()
                    if c.name != FLOAT and self._bound(c) <= spec.drop / 100.0
                ]
                if fits:
                    name = min(fits, key=lambda c: c.latency_ms).name
                    best[tier] = self._found.plans[name]
        keep_best(self._config.folder, best)

    def _record(self) -> dict[str, Any]:
        kl = sensitivity.estimated(self.scores)
        buckets = self.table.edges
        return {
            "strategy": self._config.strategy,
            "budget_s": self._config.budget_s,
            "spent_s": round(self._clock.spent(), 1),
            "quantizable": self._bench.quantizable(),
            "nodes": len(self.scores),
            "measured": sum(score.kl is not None for score in self.scores.values()),
            "rank_correlation": correlations(self.scores.values()),
            "sites": [{**asdict(s), "estimate": kl[name]} for name, s in self.scores.items()],
            "costs": {
                bucket: {"edges": buckets[bucket], "base_ms": self.table.base_ms[bucket]}
                for bucket in buckets
            },
            "modelled": self._found.modelled,
        }


def keep_best(out: Path, best: Mapping[str, Plan]) -> None:
    """`<out>/best/<tier>.json`: plans that a stopped build leaves, not verified."""
    folder = out / "best"
    for tier, plan in best.items():
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{tier}.partial"
        partial.write_text(plan.to_json(), encoding="utf-8")
        os.replace(partial, folder / f"{tier}.json")


def forget_best(out: Path) -> None:
    """A finished build serves its plans; those on the way to it are no longer needed."""
    shutil.rmtree(out / "best", ignore_errors=True)


def loss_report(bench: Workbench, found: Found, splits: Mapping[str, Split]) -> dict[str, Any]:
    """Of the plan with every helpful node: what it does to the loss of each split."""
    plans = [name for name in found.plans if name.startswith("lower-loss")]
    if not plans or bench.task.gold != "label":
        return {}
    name = plans[0]
    float_plan, plan = found.plans[FLOAT], found.plans[name]
    return {"plan": name} | {
        title: loss_change(bench, float_plan, plan, split) for title, split in splits.items()
    }


def loss_note(report: Mapping[str, Any]) -> list[str]:
    """The held-out part of `loss_report` in words, whichever way it came out."""
    if not report:
        return []
    held = report["verification"]
    return [
        f"{report['plan']}: cross-entropy {held['loss']:.5f} on held-out rows, float "
        f"{held['float_loss']:.5f}; change {held['change']:+.5f} "
        f"[{held['low']:+.5f}, {held['high']:+.5f}], n {held['n']:,}"
    ]


def loss_change(bench: Workbench, reference: Plan, plan: Plan, split: Split) -> dict[str, float]:
    """What a plan does to the mean cross-entropy over a split, with its paired 95% interval."""
    rows = np.arange(len(split.gold))

    def losses(some: Plan, title: str) -> Any:
        logits = bench.logits(some, split, title).astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        return np.log(np.exp(logits).sum(axis=1)) - logits[rows, split.gold]

    before, after = losses(reference, "loss: float"), losses(plan, "loss: the plan")
    change = evaluate.mean_interval(after - before)
    return {
        "n": len(rows),
        "float_loss": float(before.mean()),
        "loss": float(after.mean()),
        "change": change.value,
        "low": change.low,
        "high": change.high,
    }


def weigh(ms: Mapping[str, float], mix: Mapping[str, float]) -> float:
    """Mean of a latency by bucket under the weights of a mix."""
    return sum(mix[bucket] * ms[bucket] for bucket in mix) / sum(mix.values())


def last_fit(
    count: int, look: Callable[[int], Candidate | None], fits: Callable[[Candidate], bool]
) -> int:
    """By halves, the last of `count` places that fits; -1 where none was found to.

    A place that could not be looked at ends the search.
    """
    low, high = -1, count
    middle = count - 1  # the fastest of all may do
    while low < middle < high:
        made = look(middle)
        if made is None:
            break
        if fits(made):
            low = middle
        else:
            high = middle
        middle = (low + high) // 2
    return low


def correlations(scores: Iterable[Score]) -> dict[str, float | None]:
    """Spearman's rank correlation of each cheap score with the measured KL; None for too few."""
    kinds: Mapping[str, Callable[[Score], float | None]] = {
        "fisher": lambda s: s.fisher,
        "signed": lambda s: None if s.signed is None else abs(s.signed),
        "signed_whole": lambda s: None if s.signed_whole is None else abs(s.signed_whole),
        "sqnr": lambda s: -s.sqnr_db,
    }
    known = [score for score in scores if score.kl is not None]
    result: dict[str, float | None] = {}
    for name, value in kinds.items():
        pairs = [(a, s.kl or 0.0) for s in known if (a := value(s)) is not None]
        enough = len(pairs) >= 3
        result[name] = round(evaluate.spearman(*zip(*pairs, strict=True)), 4) if enough else None
    return result
