"""The accuracy-latency front: tiers as verified, every other plan as the search saw it.

Two readings of one chart: what may be lost at most, and what was measured.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from samp_core import allocate
from samp_core.allocate import Candidate
from samp_core.report_facts import EXACT, FLOAT, Facts, TierFacts
from samp_core.report_figure import (
    EDGE,
    QUIET,
    Figure,
    axis,
    figure,
    layout,
    names_of,
    tier_colours,
    unit_of,
)

KINDS = {
    "milp": ("plans of the search", "circle", "#8a94a3"),
    "greedy": ("greedy: dearest site back to fp32", "triangle-up", "#8a6d00"),
    "lower-loss": ("lower-loss", "triangle-down", "#8a6d00"),
    "ffn_only": ("SAMP ffn_only(k)", "square-open", "#8a5a83"),
    "full": ("SAMP full(k)", "diamond-open", "#8a5a83"),
    "gemms": ("gemms(k): full(k), attention in float", "cross-thin-open", "#8a5a83"),
    "": ("other plans", "x-thin-open", "#8a94a3"),
}

View = dict[str, Any]
"""What leads one trace to the other reading."""


def front(facts: Facts) -> Figure | None:
    """Latency against points lost; None where nothing was measured."""
    groups = [g for g in facts.groups() if facts.weigh(g[0].latency_ms) is not None]
    if not groups:
        return None
    bounds = expected_bounds(facts)
    pairs = [*_plans(facts, bounds), *(_tier(facts, group) for group in groups)]
    lowest = reach(facts)
    times = [c.latency_ms for c in facts.candidates]
    times += [facts.weigh(g[0].latency_ms) or 0.0 for g in groups]
    lines, words = _promises(facts)
    made = figure(
        [trace for trace, _ in pairs],
        layout(
            height=470,
            xaxis=axis(title=_time_title(facts), range=[0, 1.08 * max(times)]),
            yaxis=axis(title=AT_MOST, range=[lowest, -0.16 * lowest], zeroline=True),
            legend={"orientation": "h", "y": -0.17, "x": 0, "yanchor": "top"},
            shapes=lines,
            annotations=words,
        ),
        height=440,
        legend={"y": -0.2},
        margin={"l": 46, "r": 8},
    )
    gains = [100 * c.drop for c in facts.candidates] + [_lost(facts, g[0])[0] for g in groups]
    top = min(-0.16 * lowest, 1.15 * min(gains))
    made["views"] = {
        "bound": {
            "traces": [_back(trace) for trace in made["data"]],
            "layout": {"yaxis.title.text": AT_MOST, "yaxis.range": [lowest, -0.16 * lowest]},
        },
        "measured": {
            "traces": [view for _, view in pairs],
            "layout": {"yaxis.title.text": MEASURED, "yaxis.range": [lowest, top]},
        },
    }
    return made


AT_MOST, MEASURED = "points lost at most", "points lost, as measured"


def expected_bounds(facts: Facts) -> dict[str, float]:
    """Plan -> points that it may lose at most on as many fresh rows, as the search expected."""
    n = facts.rows or max((c.n for c in facts.candidates), default=1)
    return {
        c.name: 100 * allocate.predicted_bound(c, n, facts.alpha)
        for c in facts.candidates
        if c.name != FLOAT
    }


def reach(facts: Facts) -> float:
    """The points lost at the foot of the chart: a little more than any promise or any tier."""
    tiers = [1.2 * _lost(facts, tier)[1] for tier in facts.tiers]
    drops = [1.25 * tier.wish["drop"] for tier in facts.tiers if tier.wish.get("drop")]
    return max([*tiers, *drops] if drops else [*tiers, *expected_bounds(facts).values()]) or 1.0


def _plans(facts: Facts, bounds: Mapping[str, float]) -> list[tuple[Any, View]]:
    """The front's line and a trace for each kind of plan."""
    candidates = [c for c in facts.candidates if c.name != FLOAT]
    n = facts.rows or max((c.n for c in candidates), default=1)
    best = allocate.front(candidates, n, facts.alpha)
    made: list[tuple[Any, View]] = []
    if len(best) > 1:
        line = go.Scatter(
            x=[c.latency_ms for c in best],
            y=[bounds[c.name] for c in best],
            mode="lines",
            line={"color": EDGE, "width": 2, "shape": "vh"},
            name="front of the search",
            hoverinfo="skip",
        )
        made.append((line, {"visible": False}))
    for kind, (title, symbol, colour) in KINDS.items():
        mine = [c for c in candidates if _kind(c.name) == kind]
        if not mine:
            continue
        lines = kind in ("ffn_only", "full") and len(mine) > 1
        trace = go.Scatter(
            x=[c.latency_ms for c in mine],
            y=[bounds[c.name] for c in mine],
            mode="lines+markers" if lines else "markers",
            line={"color": "#d6c6d3", "width": 1},
            marker={"symbol": symbol, "color": colour, "size": 8},
            name=title,
            text=[_candidate_text(facts, c, bounds[c.name], n) for c in mine],
            hovertemplate="%{text}<extra></extra>",
        )
        made.append((trace, {"y": [[100 * c.drop for c in mine]]}))
    return made


def _tier(facts: Facts, group: Sequence[TierFacts]) -> tuple[Any, View]:
    """One marker for the tiers that serve one plan; a whisker from the loss to its bound."""
    lost, bound = _lost(facts, group[0])
    colour = tier_colours(facts)[group[0].name]
    ms = facts.weigh(group[0].latency_ms) or 0.0
    slowest = max(facts.weigh(t.latency_ms) or 0.0 for t in facts.tiers)
    name = html.escape(names_of(group))
    halo = ", ".join(["0 0 3px #fff"] * 4)
    trace = go.Scatter(
        x=[ms],
        y=[bound],
        mode="markers+text",
        marker={
            "symbol": "circle", "size": 15, "color": colour,
            "line": {"color": "#fff", "width": 1.5},
        },
        error_y=_whisker(lost, bound, at_bound=True, colour=colour),
        text=[f"<b>{name}</b>"],
        textposition="top left" if ms > 0.6 * slowest else "bottom right",
        textfont={"color": colour, "size": 13, "shadow": halo},
        name=name,
        hovertext=[_tier_text(facts, group)],
        hovertemplate="%{hovertext}<extra></extra>",
        showlegend=False,
        cliponaxis=False,
    )  # fmt: skip
    whisker = _whisker(lost, bound, at_bound=False, colour=colour)
    return trace, {"y": [[lost]], "error_y": [whisker]}


def _promises(facts: Facts) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A dotted line for each promised drop and each ceiling, and what stands beside it."""
    lines, words = [], []
    line = {"color": "#6b7480", "width": 1.2, "dash": "dot"}
    for kind, along, across in (("drop", "x", "y"), ("latency", "y", "x")):
        for limit in sorted({float(t.wish[kind]) for t in facts.tiers if t.wish.get(kind)}):
            names = ", ".join(t.name for t in facts.tiers if t.wish.get(kind) == limit)
            lines.append(
                {
                    "type": "line", f"{along}ref": "paper", f"{along}0": 0, f"{along}1": 1,
                    f"{across}0": limit, f"{across}1": limit, "line": line, "layer": "below",
                }
            )  # fmt: skip
            unit = "points" if kind == "drop" else "ms"
            words.append(
                {
                    # A drop's words stand left, where no plan is: all take some time.
                    f"{along}ref": "paper", along: 0, across: limit,
                    "xanchor": "left" if kind == "drop" else "right",
                    "yanchor": "bottom", "showarrow": False,
                    "font": {"size": 11, "color": QUIET},
                    "text": html.escape(f"promise of {names}: at most {limit:g} {unit}"),
                }
            )  # fmt: skip
    return lines, words


def _back(trace: Mapping[str, Any]) -> dict[str, Any]:
    """What leads a trace back from another view."""
    kept: dict[str, Any] = {"y": [trace["y"]], "visible": True}
    if "error_y" in trace:
        kept["error_y"] = [trace["error_y"]]
    return kept


def _kind(name: str) -> str:
    for kind in KINDS:
        if kind and (name.startswith((f"{kind}-", f"{kind}("))):
            return kind
    return ""


def _lost(facts: Facts, tier: TierFacts) -> tuple[float, float]:
    """Points lost on the verification rows, and their bound; exact loses none by definition."""
    measured = tier.plan.measured
    if tier.name == EXACT or not measured:
        return 0.0, 0.0
    lost = 100 * (measured["float_value"] - measured["value"])
    return lost, 100 * measured["drop_bound"]


def _whisker(lost: float, bound: float, *, at_bound: bool, colour: str) -> dict[str, Any]:
    """From the drop that was measured to its bound, whichever of them the marker shows."""
    length = [max(bound - lost, 0.0)]
    up, down = ([0.0], length) if at_bound else (length, [0.0])
    return {
        "type": "data", "symmetric": False, "array": up, "arrayminus": down, "color": colour,
        "thickness": 2, "width": 6,
    }  # fmt: skip


def _time_title(facts: Facts) -> str:
    mix = facts.mix
    if list(mix) == ["1"]:
        return "ms for one text of median length"
    if len(mix) == 1:
        return f"ms for {next(iter(mix))} texts at once"
    return f"ms, mean over batches of {', '.join(mix)} as weighed"


def _candidate_text(facts: Facts, c: Candidate, bound: float, n: int) -> str:
    metric = html.escape(facts.metric or "accuracy")
    summary = html.escape(str((facts.record.get("plans") or {}).get(c.name, "")))
    lines = [
        f"<b>{html.escape(c.name)}</b>",
        summary.partition(": ")[2] or summary,
        f"{c.latency_ms:.3f} ms",
        f"{metric} {100 * c.accuracy:.2f} on {c.n:,} search rows, {100 * c.drop:+.2f} points lost",
        f"at most {bound:.2f} to expect on {n:,} fresh rows",
    ]
    return "<br>".join(line for line in lines if line)


def _tier_text(facts: Facts, group: Sequence[TierFacts]) -> str:
    tier = group[0]
    lost, bound = _lost(facts, tier)
    lines = [
        f"<b>{html.escape(', '.join(t.name for t in group))}</b>",
        html.escape(tier.plan.summary()),
        f"{facts.weigh(tier.latency_ms):.3f} ms, measured again after the choice",
    ]
    if tier.value is not None:
        lines.append(f"{html.escape(facts.metric)} {100 * tier.value:.2f}{unit_of(facts.metric)}")
    if tier.name != EXACT:
        lines.append(f"{lost:+.2f} points lost, at most {bound:.2f}")
        lines.append("on rows that the search never saw")
    return "<br>".join(lines)
