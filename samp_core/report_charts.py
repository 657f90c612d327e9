"""The report's other charts: every verification test, the error by layer."""

from __future__ import annotations

import html

import plotly.graph_objects as go

from samp_core.report_facts import Facts
from samp_core.report_figure import INK, Figure, axis, figure, layout, names_of, tier_colours


def tests(facts: Facts) -> Figure | None:
    """Every verification test: the drop measured, its bound, and the promise it had to hold."""
    rows = [(tier, test) for tier in facts.tiers for test in tier.tests]
    if not rows:
        return None
    names = [html.escape(f"{tier.name}: {test['plan']}") for tier, test in rows]
    labels = [name if names.count(name) == 1 else f"{i}. {name}" for i, name in enumerate(names, 1)]
    level = f"{100 * (1 - facts.alpha):g}%"
    texts = [
        f"<b>{name}</b><br>{100 * test['drop']:+.2f} points lost, at most "
        f"{100 * test['bound']:.2f} ({level} bound)<br>promise: at most "
        f"{100 * test['promise']:g}<br>{'held' if test['passed'] else 'failed'}"
        for name, (_, test) in zip(names, rows, strict=True)
    ]
    traces = []
    for passed, colour, symbol in ((True, "#1b6e4f", "circle"), (False, "#b3261e", "x")):
        mine = [i for i, (_, test) in enumerate(rows) if bool(test["passed"]) is passed]
        if not mine:
            continue
        drops = [100 * rows[i][1]["drop"] for i in mine]
        bounds = [100 * rows[i][1]["bound"] for i in mine]
        traces.append(
            go.Scatter(
                x=drops,
                y=[labels[i] for i in mine],
                mode="markers",
                marker={"color": colour, "symbol": symbol, "size": 10},
                error_x={
                    "type": "data", "symmetric": False, "color": colour, "thickness": 2,
                    "array": [b - d for b, d in zip(bounds, drops, strict=True)],
                    "arrayminus": [0.0] * len(mine),
                },
                name=("held" if passed else "failed") + ": drop, and its bound",
                text=[texts[i] for i in mine],
                hovertemplate="%{text}<extra></extra>",
            )
        )  # fmt: skip
    traces.append(
        go.Scatter(
            x=[100 * test["promise"] for _, test in rows],
            y=labels,
            mode="markers",
            marker={
                "symbol": "line-ns-open", "size": 18, "color": INK, "line": {"width": 2.5},
            },
            name="promise: the bound may reach this",
            text=texts,
            hovertemplate="%{text}<extra></extra>",
        )
    )  # fmt: skip
    shape = layout(
        height=120 + 34 * len(rows),
        xaxis=axis(title="points lost against float", zeroline=True),
        yaxis=axis(
            type="category", categoryorder="array", categoryarray=labels[::-1], automargin=True
        ),
        legend={"orientation": "h", "y": -90 / (60 + 34 * len(rows)), "yanchor": "top"},
        showlegend=True,
    )
    return figure(traces, shape, height=190 + 34 * len(rows))


def layer_error(facts: Facts) -> Figure | None:
    """How far each layer's output is from float's, a line for each quantized plan."""
    groups = [g for g in facts.groups() if g[0].layer_error and not g[0].is_float]
    if not groups:
        return None
    colours = tier_colours(facts)
    traces = []
    for group in groups:
        errors = [100 * error for error in group[0].layer_error or ()]
        name = html.escape(names_of(group))
        traces.append(
            go.Scatter(
                x=[str(layer) for layer in range(len(errors))],
                y=errors,
                mode="lines+markers",
                line={"color": colours[group[0].name], "width": 2},
                marker={"size": 7},
                name=name,
                hovertemplate=f"<b>{name}</b>, layer %{{x}}: %{{y:.2f}} %<extra></extra>",
            )
        )
    shape = layout(
        height=320,
        xaxis=axis(title="layer", type="category"),
        yaxis=axis(title="error, % of float's output", rangemode="tozero"),
        legend={"orientation": "h", "y": -0.22, "yanchor": "top"},
        showlegend=True,
    )
    return figure(traces, shape, height=290)
