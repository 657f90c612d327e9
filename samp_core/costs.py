"""What each node costs on this device, from time stamps inside whole passes.

A GEMM timed in a loop has its weights in cache; here every op is stamped where it runs. An op's
time depends on what its node runs and on what the next node reads (it writes that type), so that
the table is one of edges: edge i leads from node i to node i + 1, with a matrix of milliseconds.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from samp_kernels.interface import Array, Session

from samp_core.chain import Node, path_cost, plan_of
from samp_core.latency import Bucket
from samp_core.plan import Plan
from samp_core.workbench import Split, Workbench

ROUNDS = 3
"""Times the turns of latency.measure: single sites are small beside a machine's moods."""
FEWEST = 6
"""Turns of a bucket that are made even when the time is up."""

NOISE = 0.02
"""What a whole pass is measured wrong by, as a share of it."""
FACTORS = 0.3
"""By how much the factors of kinds of sites differ, as a share of what all have in common."""
LARGEST_SCALE = 0.3
"""Stamped passes and plain ones differ by less."""

Choice = tuple[int, ...]
Edges = tuple[tuple[tuple[float, ...], ...], ...]
"""Edge -> options of the node before it -> options of the node after it -> milliseconds.

The first edge leads from nothing (one option) to the first node, the last to nothing.
"""


@dataclass(frozen=True)
class CostTable:
    """By bucket: the edges, and what a pass costs beside all of them (head included)."""

    edges: Mapping[str, Edges]
    base_ms: Mapping[str, float]

    def total(self, choice: Sequence[int], bucket: str) -> float:
        """Modelled milliseconds of one pass."""
        return self.base_ms[bucket] + path_cost(self.edges[bucket], choice)

    def weighted(self, mix: Mapping[str, float]) -> Edges:
        """One table of edges for a mix of buckets."""
        names = list(mix)
        tables = [self.edges[name] for name in names]
        return tuple(
            tuple(
                tuple(
                    float(sum(mix[n] * v for n, v in zip(names, values, strict=True)))
                    for values in zip(*rows, strict=True)
                )
                for rows in zip(*edge, strict=True)
            )
            for edge in zip(*tables, strict=True)
        )


def covering(sizes: Sequence[int]) -> list[Choice]:
    """Choices in which every pair of neighbours takes every pair of options, K^2 for K options.

    Node i takes (a + b i) mod K for all a and b: the pair at (i, i + 1) determines b, then a.
    """
    most = max(sizes, default=1)
    found = [
        tuple((a + b * place) % most % size for place, size in enumerate(sizes))
        for b in range(most)
        for a in range(most)
    ]
    return list(dict.fromkeys(found))


def measured(
    bench: Workbench,
    base: Plan,
    nodes: Sequence[Node],
    split: Split,
    mix: Mapping[str, float],
    stop: Callable[[], bool] = lambda: False,
) -> CostTable:
    """The table on this device for the buckets of a mix; found again in the cache.

    After `stop` each bucket has FEWEST turns.
    """
    choices = covering([len(node.options) for node in nodes])
    plans = [plan_of(base, nodes, choice) for choice in choices]

    def make() -> dict[str, dict[str, object]]:
        shapes = [shape for shape in bench.shapes(split) if shape.name in mix]
        step = bench.progress("measure each site's time", sum(ROUNDS * s.rounds for s in shapes))
        sessions = [bench.session(plan) for plan in plans]
        result: dict[str, dict[str, object]] = {}
        for shape in shapes:
            stamps, whole = _stamp(bench, sessions, nodes, shape, step, stop)
            edges, base_ms = fit(choices, [len(n.options) for n in nodes], stamps, whole)
            result[shape.name] = {"edges": edges, "base_ms": base_ms}
        return result

    key = {
        "plans": [plan.key() for plan in plans],
        "mix": sorted(mix),
        "rounds": ROUNDS,
        "device": bench.device(),
        **bench.sampled(),
        **bench.key(bench.base_plan(), split),
    }
    made = bench.cache.json("costs", key, make)
    return CostTable(
        {
            name: tuple(tuple(tuple(row) for row in edge) for edge in found["edges"])
            for name, found in made.items()
        },
        {name: found["base_ms"] for name, found in made.items()},
    )


def fit(
    choices: Sequence[Choice],
    sizes: Sequence[int],
    stamps: Sequence[Sequence[float]],
    whole: Sequence[float],
) -> tuple[Edges, float]:
    """Edges from the milliseconds of each choice's nodes (what leads in first), and the rest.

    A pair that several choices took is their mean. Stamps cost time, too: all edges are scaled by
    one factor, which with the rest is the line through the times of whole passes without stamps.
    """
    counts = (1, *sizes, 1)
    sums = [np.zeros((a, b)) for a, b in itertools.pairwise(counts)]
    seen = [np.zeros_like(edge) for edge in sums]
    for choice, times in zip(choices, stamps, strict=True):
        path = (0, *choice, 0)
        for place, ms in enumerate(times):
            sums[place][path[place], path[place + 1]] += ms
            seen[place][path[place], path[place + 1]] += 1
    means = [edge / np.maximum(count, 1) for edge, count in zip(sums, seen, strict=True)]
    totals = np.array([path_cost([edge.tolist() for edge in means], c) for c in choices])
    factor, rest = line(totals, np.asarray(whole))
    edges = tuple(tuple(tuple(map(float, row)) for row in factor * edge) for edge in means)
    return edges, rest


def corrected(
    table: CostTable,
    nodes: Sequence[Node],
    choices: Sequence[Choice],
    whole: Mapping[str, Sequence[float]],
) -> CostTable:
    """The table scaled to whole passes of some plans; whole: bucket -> milliseconds of each.

    Stamps and whole passes differ by kind of site and precision (what stays in cache, what a busy
    machine took), so each such group has one factor, and the rest is fitted, too: ridge
    regression, towards one factor for all. NOISE and FACTORS are its two standard deviations.
    """
    edges, base = {}, {}
    for name, ms in whole.items():
        factors, pace, rest = _factors(table, nodes, choices, np.asarray(ms), name)
        lead, *rows = table.edges[name]
        edges[name] = (
            tuple(tuple(pace * value for value in row) for row in lead),
            *(
                tuple(
                    tuple(factors[group] * value for value in row)
                    for group, row in zip(_groups(node), edge, strict=True)
                )
                for node, edge in zip(nodes, rows, strict=True)
            ),
        )
        base[name] = rest
    return CostTable({**table.edges, **edges}, {**table.base_ms, **base})


def foretold(
    table: CostTable,
    nodes: Sequence[Node],
    choices: Mapping[str, Choice],
    measured: Mapping[str, Mapping[str, float]],
) -> dict[str, dict[str, float]]:
    """name -> bucket -> milliseconds by the table at the pace of the turns in which all of these
    were measured.

    A machine changes its speed from one minute to the next, and that of int8 and of fp32 not
    alike. The other plans of the turns tell by how much; a plan's own time is left out. Empty
    where there are no others.
    """
    if len(set(choices.values())) < 2:
        return {}
    names = list(choices)
    whole = {bucket: [measured[name][bucket] for name in names] for bucket in table.edges}
    every = [choices[name] for name in names]
    found = {name: by_others(table, nodes, every, whole, choices[name]) for name in names}
    return {
        name: {bucket: then.total(choices[name], bucket) for bucket in table.edges}
        for name, then in found.items()
    }


def by_others(
    table: CostTable,
    nodes: Sequence[Node],
    choices: Sequence[Choice],
    whole: Mapping[str, Sequence[float]],
    own: Choice,
) -> CostTable:
    """The table corrected by all of these plans but one."""
    places = [place for place, choice in enumerate(choices) if choice != own]
    others = {bucket: [ms[place] for place in places] for bucket, ms in whole.items()}
    return corrected(table, nodes, [choices[place] for place in places], others)


def misses(
    table: CostTable,
    nodes: Sequence[Node],
    choices: Sequence[Choice],
    whole: Mapping[str, Sequence[float]],
) -> dict[str, dict[str, float]]:
    """Bucket -> by how much of their measured time plans are foretold wrong, median and largest.

    Each by a table that is corrected by the others alone; `stamped_` before any correction, but
    for the pace of the machine.
    """
    found = {}
    for name, ms in whole.items():
        told = np.array([table.total(choice, name) for choice in choices])
        stamped = np.abs(told * np.median(np.asarray(ms) / told) / ms - 1.0)
        errors = []
        for choice, own in zip(choices, ms, strict=True):
            then = by_others(table, nodes, choices, {name: ms}, choice)
            errors.append(abs(then.total(choice, name) / own - 1.0))
        found[name] = {
            "plans": float(len(choices)),
            "median": float(np.median(errors)), "largest": float(np.max(errors)),
            "stamped_median": float(np.median(stamped)),
            "stamped_largest": float(np.max(stamped)),
        }  # fmt: skip
    return found


def _groups(node: Node) -> list[tuple[str, str]]:
    """Of each option of a node the kind of site and the option: what shares a factor."""
    kind = node.name.rsplit(".", 1)[1]
    return [(kind, label) for label in node.labels]


def _factors(
    table: CostTable, nodes: Sequence[Node], choices: Sequence[Choice], ms: Array, bucket: str
) -> tuple[dict[tuple[str, str], float], float, float]:
    """The factor of each group, of what leads in, and the milliseconds beside all edges."""
    from scipy.optimize import lsq_linear

    lead, *rows = table.edges[bucket]
    groups = list(dict.fromkeys(group for node in nodes for group in _groups(node)))
    column = {group: place for place, group in enumerate(groups)}
    x = np.zeros((len(choices), len(groups)))
    start = np.empty(len(choices))
    for place, choice in enumerate(choices):
        start[place] = lead[0][choice[0]]
        for node, edge, option, after in zip(nodes, rows, choice, (*choice[1:], 0), strict=True):
            x[place, column[_groups(node)[option]]] += edge[option][after]
    told = np.maximum(x.sum(axis=1) + start + table.base_ms[bucket], 1e-9)
    pace = float(np.median(ms / told))
    rest = pace * max(table.base_ms[bucket], 0.0)
    # Rows: each plan's relative error; then what is known of factors and rest before.
    measured = np.concatenate([x, np.ones((len(choices), 1))], axis=1) / (NOISE * ms[:, None])
    before = np.diag([*([1 / (FACTORS * pace)] * len(groups)), 1 / (FACTORS * ms.min())])
    wanted = np.concatenate(
        [(1 - pace * start / ms) / NOISE, np.full(len(groups), 1 / FACTORS),
         [rest / (FACTORS * ms.min())]]
    )  # fmt: skip
    low = np.array([*([0.1 * pace] * len(groups)), 0.0])
    solved = lsq_linear(np.concatenate([measured, before]), wanted, (low, np.inf)).x.tolist()
    return dict(zip(groups, solved[:-1], strict=True)), pace, solved[-1]


def line(x: Array, y: Array) -> tuple[float, float]:
    """Slope and intercept of y by least squares; slope 1 where x hardly differs.

    Kept within LARGEST_SCALE of 1: a slope beyond that is a bad moment of the machine.
    """
    spread = float(((x - x.mean()) ** 2).sum())
    slope = 1.0
    if spread > (0.02 * float(x.mean())) ** 2:
        slope = float(((x - x.mean()) * (y - y.mean())).sum()) / spread
    slope = min(max(slope, 1.0 - LARGEST_SCALE), 1.0 + LARGEST_SCALE)
    return slope, float(y.mean() - slope * x.mean())


def _stamp(
    bench: Workbench,
    sessions: Sequence[Session],
    nodes: Sequence[Node],
    bucket: Bucket,
    progress: Callable[[], None],
    stop: Callable[[], bool],
) -> tuple[list[list[float]], list[float]]:
    """Median milliseconds of every node of each session, what leads in first, and of the pass.

    The sessions take turns in a shuffled order; each turn runs once unmeasured first and is the
    fastest of three passes, as in latency.measure: with stamps for the nodes, without for the
    pass, to which the head belongs.
    """
    place = {"embeddings": 0}
    for index, node in enumerate(nodes, start=1):
        place.update(dict.fromkeys((node.name, *node.sites), index))
    head, output = bench.head, bench.head.encoder_output
    generator = np.random.default_rng(0)
    stamps: list[list[list[float]]] = [[] for _ in sessions]
    whole: list[list[float]] = [[] for _ in sessions]
    for turn in range(ROUNDS * bucket.rounds):
        if turn >= FEWEST and stop():
            break
        for index in generator.permutation(len(sessions)).tolist():
            session: Any = sessions[index]
            session.run(bucket.batch, output=output)
            passes, stamped = [], []
            for _ in range(3):
                begin = time.perf_counter()
                head.logits(bench.head_weights, session.run(bucket.batch, output=output))
                passes.append(time.perf_counter() - begin)
                stamped.append(session.profile(bucket.batch, output))
            times = [0.0] * (len(nodes) + 1)
            for _, site, seconds in min(stamped, key=lambda found: sum(s for *_, s in found)):
                if site in place:
                    times[place[site]] += seconds * 1e3
            whole[index].append(min(passes) * 1e3)
            stamps[index].append(times)
        progress()
    medians = [np.median(np.array(rows), axis=0).tolist() for rows in stamps]
    return medians, [float(np.median(values)) for values in whole]


def weigh(ms: Mapping[str, float], mix: Mapping[str, float]) -> float:
    """Mean of a latency by bucket under the weights of a mix."""
    return sum(mix[bucket] * ms[bucket] for bucket in mix) / sum(mix.values())
