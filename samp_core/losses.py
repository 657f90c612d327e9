"""What each node of the chain loses in each of its options, as far as a time budget goes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from samp_core import halves, sensitivity
from samp_core.budget import Clock
from samp_core.chain import VARIANTS, Node
from samp_core.plan import Plan
from samp_core.sensitivity import Score
from samp_core.workbench import Split, Workbench

MEASURING = 0.5
"""Share of the time left for measuring sites; the rest is for looking at plans."""
SHARE = 0.2
"""Where all sites over all rows would take more than this share of a budget, it is fewer rows."""
SUFFIX = 0.6
"""What one site takes of a whole float pass: on average half of the layers, op by op."""
FEWEST_ROWS = 64


@dataclass(frozen=True)
class Losses:
    """scores: of the main quantized precision, by node; more: of the other options, by their label.

    kl: label of any of them -> node -> what it is taken to lose, in nats a row; table: the same of
    each node's options, floats among them; rows: so many of the search split were run for it.
    """

    scores: dict[str, Score] = field(default_factory=dict)
    more: dict[str, dict[str, Score]] = field(default_factory=dict)
    kl: dict[str, dict[str, float]] = field(default_factory=dict)
    table: list[list[float]] = field(default_factory=list)
    rows: int = 0


def measured(
    bench: Workbench,
    base: Plan,
    exact: Plan,
    nodes: Sequence[Node],
    floats: Sequence[str],
    split: Split,
    clock: Clock,
    budget_s: float,
    strategy: str,
) -> Losses:
    """Cheap scores of every node, and the KL of those that the clock allows.

    base: the plan with all scales; exact: float's; floats: those of 16 bits that nodes may run.
    """
    whole = strategy == "lower-loss"  # chooses by the signed scores, so over all rows
    cheap_rows = len(split.encodings) if whole else sensitivity.CHEAP_ROWS
    precisions = bench.narrow()
    others = [v for v in VARIANTS if any(v in node.labels for node in nodes)]
    asked = [*precisions, *(others if strategy == "milp" else ())]
    made = sensitivity.cheap_scores(bench, base, nodes, asked, split, cheap_rows)
    share = MEASURING / max(len(precisions), 1)
    rows = 0
    for place, precision in enumerate(precisions if strategy != "samp" else ()):
        scores = made[precision]
        row_s = row_seconds(bench, exact, split)
        rows = enough_rows(len(bench.pieces(split)), len(scores), row_s, budget_s)
        order = sorted(scores, key=lambda name: -scores[name].cheap)
        stop = clock.part(share / (1.0 - place * share))
        some = [node.up_to(precision) for node in nodes]
        found = sensitivity.measured_kl(bench, base, some, split, order, stop, rows)
        made[precision] = sensitivity.with_kl(scores, found)
    kl = {precision: sensitivity.estimated(made[precision]) for precision in precisions}
    for label in others:  # where they are in the table of times alone, they lose what int8 does
        kl[label] = sensitivity.beside(made["int8"], made[label]) if label in made else kl["int8"]
    rest = halves.losses(bench, exact, nodes, floats, split)
    known = dict(zip(floats, rest, strict=True))
    table = [
        [kl[p][node.name] if p in kl else known.get(p, 0.0) for p in node.labels] for node in nodes
    ]
    main = made.pop(precisions[0], {}) if made else {}
    return Losses(main, made, kl, table, rows)


def enough_rows(rows: int, nodes: int, row_s: float, budget_s: float) -> int:
    """All rows, or so many that every node can be measured within SHARE of the budget.

    By halves, down to FEWEST_ROWS; of the whole budget, not of what is left of it: a build that
    goes on must ask for the same rows.
    """
    able = rows
    while able > FEWEST_ROWS and able * row_s * nodes * SUFFIX > SHARE * budget_s:
        able = max(able // 2, FEWEST_ROWS)
    return able


def row_seconds(bench: Workbench, exact: Plan, split: Split) -> float:
    """What one row takes in float, in the largest batch timed; found again in the cache."""

    def pace() -> float:
        session, batch = bench.session(exact), bench.shapes(split)[-1].batch
        session.run(batch, output=bench.head.encoder_output)
        begin = time.perf_counter()
        session.run(batch, output=bench.head.encoder_output)
        return (time.perf_counter() - begin) / (len(batch.cu_seqlens) - 1)

    return float(bench.cache.json("pace", bench.key(exact, split), pace))
