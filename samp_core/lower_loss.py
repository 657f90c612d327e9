"""What the strategy `lower-loss` did to the task's loss, whichever way it came out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from samp_core import evaluate
from samp_core.plan import Plan
from samp_core.tiers import FLOAT
from samp_core.workbench import Split, Workbench


def loss_report(
    bench: Workbench, tried: Mapping[str, Plan], splits: Mapping[str, Split]
) -> dict[str, Any]:
    """Of the plan with every helpful node: what it does to the loss of each split."""
    plans = [name for name in tried if name.startswith("lower-loss")]
    if not plans or bench.task.gold != "label":
        return {}
    name = plans[0]
    float_plan, plan = tried[FLOAT], tried[name]
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
