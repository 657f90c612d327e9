"""The search per node: scores and costs measured, plans proposed, looked at on the search split.

A strategy proposes plans; each is run over the search split and, at the end, those near the front
are timed whole, so that the model of the device proposes and the device decides.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from samp_core import allocate, costs, halves, losses, milp, recipes, rivals, sensitivity
from samp_core.allocate import Candidate
from samp_core.budget import Clock, keep_best
from samp_core.chain import FLOAT as float_site
from samp_core.chain import Node, Variant, chain, choice_of, plan_of
from samp_core.config import BuildConfig
from samp_core.found import Found
from samp_core.metrics import Metric
from samp_core.modes import correlations, layer_order, modes
from samp_core.plan import Plan, SitePlan
from samp_core.tiers import FLOAT
from samp_core.workbench import Split, Workbench

LOOKS = 16
"""Plans of one staircase that are run over the search split."""
WALKING = 0.85
"""Share of the time left that greedy's walk may take before the staircase is looked at; what is
left behind that goes to the rest of the walk."""
STAMPING = 0.15
"""Share of the time left that time stamps may take."""
SHARES = (1.0, 0.85, 0.7)
"""Parts of a promise that the predicted bounds of its candidates shall reach."""


class Search:
    """One search over the nodes of one model; `run` does the whole of it."""

    def __init__(
        self,
        config: BuildConfig,
        bench: Workbench,
        full: Plan,
        split: Split,
        metric: Metric,
        rows_to_come: int,
        clock: Clock,
        variants: Mapping[str, Sequence[Variant]] | None = None,
    ) -> None:
        """full: the plan in which every site that can be is quantized, with its recipes.

        variants: other int8 options of GEMMs, whose channels `full` names.
        """
        self._config, self._bench, self._full = config, bench, full
        self._variants = variants or {}
        self._split, self._metric, self._n, self._clock = split, metric, rows_to_come, clock
        self._base = replace(full, mode=None)
        self._recipes = {site: e.recipe for site, e in full.sites.items() if e.recipe}
        self._fp8 = recipes.fp8_recipe(config)
        self.halves: tuple[str, ...] = bench.halves()
        self.nodes: tuple[Node, ...] = self._chain(self.halves)
        self.lost = losses.Losses()
        self.table: costs.CostTable | None = None
        self._stamped: costs.CostTable | None = None
        self._misses: dict[str, dict[str, float]] = {}
        self._walked: list[str] = []
        self._cut = False
        self._alone: set[str] = set()
        plain = plan_of(self._base, self.nodes, [0] * len(self.nodes))
        self._float = replace(plain, mode=FLOAT, scales={}, outliers={})
        self.modes: dict[str, Plan] = {}
        self.baselines: dict[str, Plan] = {}
        self._names: dict[str, str] = {}
        self._found = Found({}, {})
        self._drop_limits = sorted(
            {spec.drop / 100.0 for spec in config.tiers.values() if spec.drop is not None}
        )

    def run(self) -> Found:
        """Measure, propose, look, time. What the clock forbids is left out, never the timing."""
        self._look(FLOAT, self._float)
        self._metric.check(self._logits(FLOAT), self._split)
        able = halves.finite(self._bench, self._float, self.nodes, self.halves, self._split)
        if able != self.halves:
            self.halves, self.nodes = able, self._chain(able)
        base, nodes = self._base, self.nodes
        self.baselines = {h: halves.everywhere(self._float, nodes, h) for h in able}
        self.baselines |= {p: halves.everywhere(base, nodes, p) for p in self._others()}
        self._clock.reserve(self._to_come())
        strategy, order = self._config.strategy, self._config.order
        if strategy != "samp":
            stop = self._clock.part(STAMPING)
            self.table = costs.measured(
                self._bench, self._base, self.nodes, self._split, self._config.mix, stop
            )
            self._stamped = self.table
        if strategy != "samp" or order == "sensitivity":
            self.lost = losses.measured(
                self._bench, base, self._float, nodes, self.halves, self._split, self._clock,
                self._config.budget_s, strategy,
            )  # fmt: skip
        layers = layer_order(order, self._full.layers, self.lost.scores)
        rest = SitePlan(self.halves[0]) if self.halves else float_site
        self.modes = modes(self._full, layers, "" if order == "first" else order, rest)
        named = {**self.modes, **self.baselines}
        self._names |= {plan.key(): name for name, plan in named.items()}
        {
            "samp": self._samp,
            "milp": self._milp,
            "greedy": self._greedy,
            "lower-loss": self._lower_loss,
        }[strategy]()
        for name, plan in self.baselines.items():
            self._look(name, plan)
        self._time()
        self._found.record = {"order": order, "layers": layers} if strategy == "samp" else {}
        if self.table is not None:
            self._found.record = self._record(self.table)
        self._found.table, self._found.nodes = self.table, self.nodes
        return self._found

    def _to_come(self) -> float:
        """Seconds that verifying and timing will take, by what one row takes in float.

        Each promise tests about three plans that take 0.7 of float's time; the plans served are
        timed in three sizes, about 600 rows each, and all candidates once more.
        """
        row_s = losses.row_seconds(self._bench, self._float, self._split)
        tiers = len(self._config.tiers)
        rows = self._n * (1.0 + 2.1 * len(self._drop_limits)) + 600.0 * (1 + tiers) + 2000.0
        return row_s * rows + 2.0

    def _chain(self, halves: Sequence[str]) -> tuple[Node, ...]:
        int8, fp8 = self._bench.quantizable(), self._bench.quantizable("fp8")
        return chain(self._full.layers, int8, self._recipes, halves, fp8, self._fp8, self._variants)

    def _others(self) -> tuple[str, ...]:
        """Quantized precisions beside the one that the modes are made of."""
        return self._bench.narrow()[1:]

    # measuring

    def _logits(self, name: str) -> Any:
        title = f"search: {name}" + (f" ({self._front()})" if name not in self.modes else "")
        return self._bench.logits(self._found.plans[name], self._split, title)

    def _known(self, plan: Plan) -> bool:
        """Whether it was looked at."""
        return self._names.get(plan.key()) in self._found.candidates

    def _look(self, name: str, plan: Plan) -> Candidate | None:
        """The candidate of a plan by its modelled latency; None where the time is up.

        A plan that is one of SAMP's modes goes by that name, any other by its first.
        """
        name = self._names.setdefault(plan.key(), name)
        plan = {**self.modes, **self.baselines}.get(name, plan)
        found = self._found
        if name in found.candidates:
            return found.candidates[name]
        always = (self._float.key(), self._full.key())
        if self._clock.over() and plan.key() not in always and name not in self.baselines:
            return None
        found.plans[name] = plan
        ms = 0.0
        if self.table is not None:
            found.modelled[name] = self._modelled(plan)
            ms = self._weigh(found.modelled[name]["latency_ms"])
        logits = self._logits(name)
        reference = self._bench.logits(self._float, self._split, f"search: {FLOAT}")
        made = self._metric.candidate(name, ms, reference, logits, self._split)
        kl = max(self._bench.divergence(reference, logits), 0.0)
        found.candidates[name] = replace(made, kl=kl)
        self._keep_best()
        return found.candidates[name]

    def _modelled(self, plan: Plan) -> dict[str, Any]:
        assert self.table is not None
        choice = choice_of(plan, self.nodes)
        latency = {bucket: self.table.total(choice, bucket) for bucket in self.table.edges}
        return {"latency_ms": latency, "kl": milp.lost(self.lost.table, choice)}

    def _weigh(self, ms: Mapping[str, float]) -> float:
        return costs.weigh(ms, self._config.mix)

    def _bound(self, candidate: Candidate) -> float:
        return allocate.predicted_bound(candidate, self._n, self._config.alpha)

    def _safe(self, promise: float) -> float:
        exact = self._found.candidates[FLOAT]
        return allocate.safe_bound(exact, promise, self._n, self._config.alpha)

    def _fits(self, limit: float, candidate: Candidate) -> bool:
        return self._bound(candidate) <= limit

    def _time(self) -> None:
        """Whole plans on the device, all interleaved: the latencies that choices are made with.

        They correct the model of the device too, by which `milp` then solves once more; what that
        adds, or brings back into question, is timed together with all the rest. What another plan
        beats in bound and clearly in modelled time keeps its modelled latency.
        """
        found = self._found
        measured = self._whole()
        if self.table is not None:
            self._correct(measured)
            if self._config.strategy == "milp" and not self._clock.over():
                self._propose(LOOKS // 2)
                if set(found.plans) - self._hopeless(found.plans) - set(measured):
                    measured = self._whole()
                    self._correct(measured)
        found.candidates = self._pooled()
        for name, candidate in found.candidates.items():
            if name in measured:
                ms = self._weigh(measured[name])
                found.candidates[name] = replace(candidate, latency_ms=ms)
            else:
                found.candidates[name] = replace(candidate, timed=False)

    def _pooled(self) -> dict[str, Candidate]:
        return {c.name: c for c in allocate.pooled(list(self._found.candidates.values()))}

    def _whole(self) -> dict[str, dict[str, float]]:
        """name -> bucket -> measured milliseconds, of every plan but hopeless ones."""
        found = self._found
        if self.table is not None:
            self._foretell()
        hopeless: set[str] = set() if self.table is None else self._hopeless(found.plans)
        plans = {name: plan for name, plan in found.plans.items() if name not in hopeless}
        title, mix = "measure latencies", tuple(self._config.mix)
        if not self._walked:
            return self._bench.latencies(plans, self._split, title, mix)
        if not self._alone:
            self._alone = set(self._walked) - self._hopeless(self._walked)
        own = {name: found.plans[name] for name in self._alone}
        measured = self._bench.latencies({**plans, **own}, self._split, title, mix)
        # A greedy build with this cache takes the same readings: a clock shall not part the two.
        theirs = self._bench.latencies(own, self._split, title, mix, measured)
        ms = {name: self._weigh(each) for name, each in theirs.items()}
        walked = [found.candidates[name] for name in self._walked]
        found.greedy = rivals.alone(walked, ms, self._cut)
        return measured

    def _foretell(self) -> None:
        """Every candidate's latency by the table as it is now."""
        found = self._found
        for name, candidate in found.candidates.items():
            found.modelled[name] = self._modelled(found.plans[name])
            ms = self._weigh(found.modelled[name]["latency_ms"])
            found.candidates[name] = replace(candidate, latency_ms=ms)

    def _correct(self, measured: Mapping[str, Mapping[str, float]]) -> None:
        """The stamped table by what whole plans took, and what every plan takes by that."""
        assert self._stamped is not None
        choices = [choice_of(self._found.plans[name], self.nodes) for name in measured]
        whole = {b: [ms[b] for ms in measured.values()] for b in self._config.mix}
        self.table = costs.corrected(self._stamped, self.nodes, choices, whole)
        self._misses = costs.misses(self._stamped, self.nodes, choices, whole)
        self._foretell()

    def _hopeless(self, names: Collection[str]) -> set[str]:
        """Plans that need not be timed; the modes are, where a tier is chosen along them."""
        kept = {FLOAT, *self.baselines, self._names.get(self._full.key(), "")}
        if any(spec.free for spec in self._config.tiers.values()):
            kept |= set(self.modes)
        some = [self._found.candidates[name] for name in names]
        return rivals.hopeless(some, kept, self._n, self._config.alpha)

    # strategies

    def _samp(self) -> None:
        """SAMP's own two modes, over the order of layers that was asked for."""
        for name, plan in self.modes.items():
            if not name.startswith("gemms"):
                self._look(name, plan)

    def _milp(self) -> None:
        """The staircase of fastest plans by loss, and what greedy would look at.

        KL adds up well enough (a plan's is 0.9 to 1.4 times its nodes' on recorded tasks) that
        losses need no correction; each look then tells what a plan really loses.
        """
        assert self.table is not None
        last = self._full.layers
        for name, choice in self._path():
            self._names.setdefault(plan_of(self._base, self.nodes, choice).key(), name)
        whole = [n for n in self.modes if n.split("(")[1].startswith((f"{last})", f"{last},"))]
        for name in whole:
            self._look(name, self.modes[name])
        if self._drop_limits:
            self._walk(self._clock.part(WALKING))
        self._propose(LOOKS)
        if self._drop_limits:
            self._walk(lambda: False)
        # First what is promised, then what a recommendation is made along.
        if any(spec.free for spec in self._config.tiers.values()):
            for name, plan in self.modes.items():
                self._look(name, plan)

    def _propose(self, most: int) -> None:
        """Looks at so many new stairs at most, near promises and ceilings."""
        assert self.table is not None
        edges = self.table.weighted(self._config.mix)
        self.stairs = milp.staircase(edges, self.lost.table)
        left = most

        def look(index: int) -> Candidate | None:
            nonlocal left
            plan = plan_of(self._base, self.nodes, self.stairs[index].choice)
            left -= not self._known(plan)
            if left < 0 and not self._known(plan):
                return None
            return self._look(f"milp-{plan.key()[:8]}", plan)

        limits = [share * promise for share in SHARES for promise in self._drop_limits]
        for limit in [*limits, *map(self._safe, self._drop_limits)]:
            allocate.last_fit(len(self.stairs), look, partial(self._fits, limit))
        ceilings = {s.latency for s in self._config.tiers.values() if s.latency is not None}
        base = self._weigh(self.table.base_ms)
        total = sum(self._config.mix.values())
        for ceiling in sorted(ceilings):
            under = [i for i, s in enumerate(self.stairs) if s.cost / total + base <= ceiling]
            first = under[0] if under else len(self.stairs) - 1
            for index in (first, first + 1, first - 1):
                if 0 <= index < len(self.stairs):
                    look(index)

    def _walk(self, stop: Callable[[], bool]) -> None:
        """Looks at what greedy would, up to where the time ends it."""
        looked = [self._look(name, plan) for name, plan in self.baselines.items()]
        names = [FLOAT, *self._reverted(stop), *(made.name for made in looked if made)]
        self._walked = list(dict.fromkeys(names))

    def _path(self) -> list[tuple[str, tuple[int, ...]]]:
        """Greedy's: names and choices."""
        kl = sensitivity.estimated(self.lost.scores)
        return rivals.reverted(kl, self.nodes, int(bool(self.halves)))  # to fp16 where it is there

    def _greedy(self) -> None:
        """From all int8, give the dearest node back to float until the strictest promise holds.

        As NNCF's accuracy-aware control and Neural Compressor's fallback do; the baseline.
        """
        self._reverted(lambda: False)

    def _reverted(self, stop: Callable[[], bool]) -> list[str]:
        """The plans that `greedy` looks at: known ones, and new ones until `stop` or the clock."""
        enough = self._safe(min(self._drop_limits, default=0.0))
        names = []
        for name, choice in self._path():
            plan = plan_of(self._base, self.nodes, choice)
            late = not self._known(plan) and stop()
            made = None if late else self._look(name, plan)
            self._cut = made is None
            if made is None:
                break
            names.append(made.name)
            if self._drop_limits and self._bound(made) <= enough:
                break
        return names

    def _lower_loss(self) -> None:
        """The nodes whose noise lowers the task's loss to first order (arXiv 2207.10083).

        The k most helpful of them, for up to eight k.
        """
        helpful = {
            name: score.signed_whole
            for name, score in self.lost.scores.items()
            if score.signed_whole is not None and score.signed_whole < 0.0
        }
        order = sorted(helpful, key=lambda name: helpful[name])
        counts = {-(-len(order) * i // 8) for i in range(1, 9)} - {0}
        for count in sorted(counts, reverse=True):
            chosen = set(order[:count])
            back = int(bool(self.halves))
            choice = [len(node.options) - 1 if node.name in chosen else back for node in self.nodes]
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

    def _record(self, table: costs.CostTable) -> dict[str, Any]:
        buckets = table.edges
        return {
            "strategy": self._config.strategy,
            "order": self._config.order,
            "budget_s": self._config.budget_s,
            "spent_s": round(self._clock.spent(), 1),
            "quantizable": self._bench.quantizable(),
            "fp8": self._bench.quantizable("fp8"),
            "halves": self.halves,
            "nodes": len(self.lost.scores),
            "rows": self.lost.rows,
            "variants": {
                site: [[v.label, asdict(v.recipe)] for v in some]
                for site, some in self._variants.items()
            },
            "measured": sum(score.kl is not None for score in self.lost.scores.values()),
            "rank_correlation": correlations(self.lost.scores.values()),
            "sites": sensitivity.listed(self.lost.scores, sensitivity.estimated(self.lost.scores)),
            "more": {
                label: sensitivity.listed(scores, self.lost.kl[label])
                for label, scores in self.lost.more.items()
            },
            "costs": {
                bucket: {"edges": buckets[bucket], "base_ms": table.base_ms[bucket]}
                for bucket in buckets
            },
            "modelled": self._found.modelled,
            "misses": self._misses,
            "greedy": list(self._walked),
        }
