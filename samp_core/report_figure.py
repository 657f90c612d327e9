"""What every chart of the report shares: colours, axes, and plotly's check of each figure.

A figure is `{data, layout, phone[, views]}`; phone: what the layout changes on a narrow screen;
views: other readings of the same chart.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from samp_core.report_facts import EXACT, Facts, TierFacts

FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif'
INK, QUIET, LINE, EDGE = "#1f2937", "#5b6472", "#e3e7ed", "#b8c0cc"
# Okabe and Ito's colours, told apart by colour-blind eyes too; grey is exact.
TIER_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b5578f", "#8a6d00", "#2b8cbe", "#5b3a8c")
EXACT_COLOUR = "#4b5563"
PRECISION_COLOURS = {
    "fp32": "#e5e8ee", "fp16": "#c9d3f2", "bf16": "#b9c8ee", "fp8": "#f0c95c", "int8": "#3b4cc0",
}  # fmt: skip
BITS_COLOUR = "#8e5bb5"

Figure = dict[str, Any]


def tier_colours(facts: Facts) -> dict[str, str]:
    """Each tier's colour; tiers that serve one plan share that of the first of them."""
    found, used = {}, 0
    for group in facts.groups():
        colour = EXACT_COLOUR
        if group[0].name != EXACT:
            colour = TIER_COLOURS[used % len(TIER_COLOURS)]
            used += 1
        found.update({tier.name: colour for tier in group})
    return found


def precision_colour(precision: str) -> str:
    return PRECISION_COLOURS.get(precision, BITS_COLOUR)


def unit_of(metric: str) -> str:
    """Shares are told in percent, correlations in hundredths."""
    return "%" if metric == "accuracy" or metric.endswith("F1") else ""


def names_of(group: Sequence[TierFacts]) -> str:
    """Tiers that serve one plan, as one name."""
    return " = ".join(tier.name for tier in group)


def axis(title: str = "", **more: Any) -> dict[str, Any]:
    return {
        "title": {"text": title, "font": {"size": 13}, "standoff": 8},
        "gridcolor": LINE, "linecolor": EDGE, "zerolinecolor": "#9aa3b0", "zeroline": False,
        "automargin": True, "fixedrange": True, **more,
    }  # fmt: skip


def layout(**more: Any) -> dict[str, Any]:
    hover = {"bgcolor": "#fff", "bordercolor": EDGE, "font": {"color": INK}, "align": "left"}
    return {
        "template": {},
        "font": {"family": FONT, "size": 13, "color": INK},
        "margin": {"l": 60, "r": 16, "t": 16, "b": 48},
        "paper_bgcolor": "#fff",
        "plot_bgcolor": "#fff",
        "dragmode": False,
        "hoverlabel": hover,
        **more,
    }


def figure(traces: Sequence[Any], shape: Mapping[str, Any], **phone: Any) -> Figure:
    """Checked by plotly's own graph objects."""
    made = json.loads(go.Figure(data=list(traces), layout=dict(shape)).to_json())
    return {"data": made["data"], "layout": made["layout"], "phone": phone}
