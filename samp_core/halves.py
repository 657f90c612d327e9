"""Floats of 16 bits in a search: the plans that run everywhere in one, and what they lose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from samp_core.chain import Node, plan_of
from samp_core.errors import SampError
from samp_core.plan import Plan
from samp_core.workbench import Split, Workbench


def everywhere(base: Plan, nodes: Sequence[Node], half: str) -> Plan:
    """Every site in this float: for fp16 the baseline of SAMP's paper."""
    choice = [node.precisions.index(half) for node in nodes]
    return replace(plan_of(base, nodes, choice), mode=half)


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
