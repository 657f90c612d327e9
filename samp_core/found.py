"""What a search found: plans, their candidates, and what is foretold of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from samp_core import costs, rivals
from samp_core.allocate import Candidate
from samp_core.chain import Node, choice_of
from samp_core.plan import Plan

ANCHORS = 3
"""Plans that tell the pace of the machine when those served are measured again, less one."""


@dataclass
class Found:
    """Every plan looked at, by name, with its measured candidate; the record goes to build.json.

    modelled: name -> what the search foretold: `latency_ms` by bucket, `kl` as a sum over nodes.
    """

    plans: dict[str, Plan]
    candidates: dict[str, Candidate]
    modelled: dict[str, dict[str, Any]] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    greedy: rivals.Found | None = None
    """What greedy's search would have found by itself, where it is followed."""
    table: costs.CostTable | None = None
    """What modelled latencies are foretold by, and of what nodes."""
    nodes: tuple[Node, ...] = ()

    def anchors(self) -> list[str]:
        """Plans between the slowest and the fastest that tell the pace of later turns."""
        if self.table is None:
            return []
        timed = [c for c in self.candidates.values() if c.timed]
        low, high = (end(c.latency_ms for c in timed) for end in (min, max))
        wanted = [low + (high - low) * place / ANCHORS for place in range(ANCHORS + 1)]
        near = (min(timed, key=lambda c: abs(c.latency_ms - ms)).name for ms in wanted)
        return list(dict.fromkeys(near))

    def paces(self, measured: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
        """name -> bucket -> how much slower than modelled it is in these turns, by the others."""
        if self.table is None:
            return {}
        choices = {name: choice_of(self.plans[name], self.nodes) for name in measured}
        told = costs.foretold(self.table, self.nodes, choices, measured)
        return {
            name: {b: ms / self.modelled[name]["latency_ms"][b] for b, ms in each.items()}
            for name, each in told.items()
        }
