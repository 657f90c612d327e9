"""Plans that run everywhere in one precision, and what floats of 16 bits lose in a search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from samp_core.chain import Node, plan_of
from samp_core.errors import SampError
from samp_core.plan import HALVES, Plan
from samp_core.workbench import Split, Workbench


def everywhere(base: Plan, nodes: Sequence[Node], precision: str) -> Plan:
    """Every site in this precision: in fp16 the baseline of SAMP's paper.

    A node that lacks it, as attention lacks fp8, runs the first float of 16 bits, else fp32.
    """
    choice = [
        names.index(precision) if precision in names else int(names[:2][-1] in HALVES)
        for names in (node.labels for node in nodes)
    ]
    return replace(plan_of(base, nodes, choice), mode=precision)


def finite(
    bench: Workbench, base: Plan, nodes: Sequence[Node], halves: Sequence[str], split: Split
) -> tuple[str, ...]:
    """Those in which this model does not overflow: fp16 ends at 65,504."""
    able = []
    for half in halves:
        try:
            bench.logits(everywhere(base, nodes, half), split, f"search: {half}")
        except SampError as error:
            if error.code != "not_finite":
                raise
            continue
        able.append(half)
    return tuple(able)


def losses(
    bench: Workbench, base: Plan, nodes: Sequence[Node], halves: Sequence[str], split: Split
) -> list[float]:
    """What one node loses in each: an even share of what the whole model does, measured."""
    exact = plan_of(base, nodes, [0] * len(nodes))
    reference = bench.logits(exact, split, "search: float")
    found = []
    for half in halves:
        logits = bench.logits(everywhere(base, nodes, half), split, f"search: {half}")
        found.append(max(bench.divergence(reference, logits), 0.0) / len(nodes))
    return found
