"""What the served plans really run, and how far each layer's output is from float's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from samp_kernels.interface import Array, Batch, OutputKind

from samp_core.pipeline import batches
from samp_core.plan import Plan
from samp_core.workbench import Split, Workbench

ROWS = 64
"""Texts, evenly spread over the search split, that the error of a layer is taken over."""


def observed(
    bench: Workbench, plans: Mapping[str, Plan], split: Split
) -> dict[str, dict[str, Any]]:
    """name -> `{executed: {site: precision}, layer_error: [layers], rows}`; found in the cache.

    executed: what the kernels said that they ran, in a pass of the session that is timed and
    served. layer_error: root mean square of a layer's output less float's, over that of float's;
    of the last layer at what the head reads.
    """
    pieces = bench.pieces(split)
    places = np.unique(np.linspace(0, len(pieces) - 1, ROWS).astype(int)).tolist()
    packed = [batch for batch, _ in batches([pieces[place] for place in places])]
    output = bench.head.encoder_output
    step = bench.progress("observe the served plans", len(plans))
    kept: list[list[Array]] = []

    def one(plan: Plan) -> dict[str, Any]:
        if not kept:
            kept.extend(_layers(bench, bench.base_plan(), packed, output))
        session = bench.session(plan)
        session.run(packed[0], output=output)
        return {
            "executed": session.executed(),
            "layer_error": _errors(kept, _layers(bench, plan, packed, output)),
            "rows": len(places),
        }

    found = {}
    for name, plan in plans.items():
        key = bench.key(plan, split) | {"rows": len(places), "output": output}
        found[name] = bench.cache.json("observed", key, lambda: one(plan))  # noqa: B023
        step()
    return found


def _layers(
    bench: Workbench, plan: Plan, packed: list[Batch], output: OutputKind
) -> list[list[Array]]:
    """Batch -> layer -> what leaves it: [tokens, hidden], of the last one what the head reads."""
    session = bench.loop_session(plan)
    made = []
    for batch in packed:
        starts = session.layer_inputs(batch)
        states = [bench.backend.to_host(s.hidden)[: s.tokens] for s in starts[1:]]
        made.append([*states, session.run_from(starts[-1], output)])
    return made


def _errors(reference: list[list[Array]], found: list[list[Array]]) -> list[float]:
    result = []
    for before, after in zip(zip(*reference, strict=True), zip(*found, strict=True), strict=True):
        pairs = [(a.astype(np.float64), b) for a, b in zip(before, after, strict=True)]
        noise = sum(float(np.square(b - a).sum()) for a, b in pairs)
        signal = sum(float(np.square(a).sum()) for a, _ in pairs)
        result.append((noise / max(signal, 1e-300)) ** 0.5)
    return result
