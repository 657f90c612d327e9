"""The report's maps, layers down and sites across: precisions, losses, times."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping
from typing import Any

import plotly.graph_objects as go
from samp_kernels.interface import SITES

from samp_core.report_facts import Facts, TierFacts
from samp_core.report_figure import Figure, figure, layout, precision_colour
from samp_core.report_words import quantized

NODES = ("qkv", "attention", "out", "ffn_in", "ffn_out")

Cell = Callable[[str], tuple[float | None, str, str]]
"""Node -> its colour's value, what stands in it, what is told when it is pointed at."""


def plan_map(facts: Facts, tier: TierFacts) -> Figure:
    """Layers down, sites across, coloured by precision; in a cell its channels kept in fp32."""
    layers = range(tier.plan.layers)
    names = [[f"layer.{layer}.{site}" for site in SITES] for layer in layers]
    precisions = [[tier.plan.precision(name) for name in row] for row in names]
    found = sorted({p for row in precisions for p in row}, key=lambda p: (p != "fp32", p))
    scale: list[list[Any]] = []
    for place, precision in enumerate(found):
        colour = precision_colour(precision)
        scale += [[place / len(found), colour], [(place + 1) / len(found), colour]]
    heat = go.Heatmap(
        z=[[found.index(p) for p in row] for row in precisions],
        x=list(SITES),
        y=[str(layer) for layer in layers],
        zmin=-0.5,
        zmax=len(found) - 0.5,
        colorscale=scale,
        showscale=False,
        xgap=2,
        ygap=2,
        text=[[str(_apart(tier, name) or "") for name in row] for row in names],
        texttemplate="%{text}",
        textfont={"size": 10},
        customdata=[[_site_text(tier, name) for name in row] for row in names],
        hovertemplate="%{customdata}<extra></extra>",
    )
    return figure([heat], _grid(len(layers), 18))


def sensitivity_map(facts: Facts) -> Figure | None:
    """Mean KL divergence of each site alone in int8 (or fp8), on a logarithmic scale."""
    sites = {site["node"]: site for site in facts.search.get("sites") or []}
    if not sites:
        return None
    ranked = sorted(sites, key=lambda name: -sites[name]["estimate"])
    rank = {name: place for place, name in enumerate(ranked, start=1)}
    positive = [s["estimate"] for s in sites.values() if s["estimate"] > 0.0] or [1e-9]
    floor = min(positive)

    def cell(name: str) -> tuple[float | None, str, str]:
        site = sites.get(name)
        if site is None:
            return None, "", f"{name}: not quantizable on this backend"
        kl = site["estimate"]
        measured = site.get("kl") is not None
        text = ("" if measured else "~") + (f"{kl:.0e}".replace("e-0", "e-") if kl > 0 else "0")
        lines = [
            f"<b>{html.escape(name)}</b>",
            f"{kl:.2e} nats, {'measured' if measured else 'estimated, the budget ended before it'}",
            f"number {rank[name]} of {len(sites)}, 1 loses most",
            f"signal to noise {site['sqnr_db']:.1f} dB",
        ]
        return math.log10(max(kl, floor)), text, "<br>".join(lines)

    ticks = list(range(math.floor(math.log10(floor)), math.ceil(math.log10(max(positive))) + 1))
    return _node_map(
        facts, cell, "YlOrBr", {"tickvals": ticks, "ticktext": [f"1e{t}" for t in ticks]}
    )


def time_maps(facts: Facts) -> dict[str, tuple[Figure, Figure]]:
    """Bucket -> what each site takes in fp32, and what int8 (or fp8) saves there, in microseconds.

    Each with its neighbour in the same precision, so that no change of type is in it.
    """
    layers, made = facts.exact.plan.layers, {}
    names = [f"layer.{layer}.{node}" for layer in range(layers) for node in NODES]
    for bucket, found in (facts.search.get("costs") or {}).items():
        if len(found["edges"]) != len(names) + 1:
            continue
        slow = {n: 1e3 * e[0][0] for n, e in zip(names, found["edges"][1:], strict=True)}
        fast = {n: 1e3 * e[-1][-1] for n, e in zip(names, found["edges"][1:], strict=True)}
        made[bucket] = (_time_map(facts, slow, fast, False), _time_map(facts, slow, fast, True))
    return made


def _time_map(
    facts: Facts, slow: Mapping[str, float], fast: Mapping[str, float], saved: bool
) -> Figure:
    shown = {n: slow[n] - fast[n] if saved else slow[n] for n in slow}
    kind = quantized(facts.search)

    def cell(name: str) -> tuple[float | None, str, str]:
        text = (
            f"<b>{name}</b><br>fp32 {slow[name]:.1f} µs<br>{kind} {fast[name]:.1f} µs<br>"
            f"{kind} saves {slow[name] - fast[name]:.1f} µs"
        )
        value = shown[name]
        return value, f"{value:.0f}" if abs(value) >= 10 else f"{value:.1f}", text

    top = max(max(map(abs, shown.values())), 1e-9)
    if saved:  # what costs time instead is red
        scale: Any = [[0, "#b3261e"], [0.5, "#f7f7f5"], [1, "#00603f"]]
        return _node_map(facts, cell, scale, {}, (-top, top))
    return _node_map(facts, cell, "Blues", {}, (0.0, 1.15 * top))


def _node_map(
    facts: Facts, cell: Cell, scale: Any, bar: Mapping[str, Any], reach: Any = (None, None)
) -> Figure:
    """Layers down, what a search decides across: one cell for scores and context."""
    layers = range(facts.exact.plan.layers)
    cells = [[cell(f"layer.{layer}.{node}") for node in NODES] for layer in layers]
    heat = go.Heatmap(
        z=[[c[0] for c in row] for row in cells],
        x=list(NODES),
        y=[str(layer) for layer in layers],
        text=[[c[1] for c in row] for row in cells],
        texttemplate="%{text}",
        textfont={"size": 12},
        customdata=[[c[2] for c in row] for row in cells],
        hovertemplate="%{customdata}<extra></extra>",
        colorscale=scale,
        zmin=reach[0],
        zmax=reach[1],
        showscale=bool(bar),
        colorbar={"thickness": 10, "outlinewidth": 0, "tickfont": {"size": 11}, **bar},
        xgap=2,
        ygap=2,
    )
    return figure([heat], _grid(len(layers), 24))


def _grid(layers: int, row: int) -> dict[str, Any]:
    axis = {"showgrid": False, "ticks": "", "fixedrange": True, "automargin": True}
    return layout(
        height=64 + max(row if layers > 12 else row + 6, 12) * layers,
        xaxis={**axis, "side": "top", "type": "category", "tickangle": 0, "tickfont": {"size": 11}},
        yaxis={
            **axis, "type": "category", "autorange": "reversed", "dtick": 1 if layers <= 24 else 2,
            "title": {"text": "layer", "font": {"size": 11}, "standoff": 4},
            "tickfont": {"size": 11},
        },
        margin={"l": 40, "r": 6, "t": 30, "b": 6},
        plot_bgcolor="#fff",
    )  # fmt: skip


def _apart(tier: TierFacts, name: str) -> int:
    """How many input channels a site multiplies in fp32 beside its int8 product."""
    entry = tier.plan.sites.get(name)
    return entry.recipe.outliers if entry is not None and entry.recipe is not None else 0


def _site_text(tier: TierFacts, name: str) -> str:
    entry = tier.plan.sites.get(name)
    lines = [f"<b>{html.escape(name)}</b>: {html.escape(tier.plan.precision(name))}"]
    if entry is not None and entry.recipe is not None:
        recipe = entry.recipe
        lines.append(
            html.escape(
                f"weights per {recipe.weight}, {recipe.activation} scales, {recipe.calibrator}"
            )
        )
        if _apart(tier, name):
            lines.append(f"{_apart(tier, name)} of its input channels in fp32")
    if tier.executed is not None:
        lines.append(f"ran in {html.escape(str(tier.executed.get(name, 'unknown')))}")
    layer, _, site = name.rpartition(".")
    node = f"{layer}.attention" if site in ("scores", "context") else name
    if node in tier.why:
        lines.append(html.escape(tier.why[node]).replace(", loses", ",<br>loses"))
    return "<br>".join(lines)
