"""The report's words: how figures, promises and outcomes are written, everywhere alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from samp_core.report_facts import Facts, TierFacts
from samp_core.report_figure import tier_colours, unit_of
from samp_core.report_html import Html, join, safe, tag


def chart(key: str, label: str) -> Html:
    return tag("div", id=key, cls="chart", role="img", aria_label=label)


def absent(why: str) -> Html:
    return tag("p", f"Not shown: {why}.", cls="quiet")


def quantized(search: Mapping[str, Any]) -> str:
    """The precision that a search's scores of sites are of."""
    return next((str(site["precision"]) for site in search.get("sites") or []), "int8")


def named(facts: Facts, tier: TierFacts) -> Html:
    colour = tier_colours(facts)[tier.name]
    return join([tag("span", cls="dot", style=f"--tier: {colour}"), tier.name])


def wish(tier: TierFacts) -> str:
    drop, latency = tier.wish.get("drop"), tier.wish.get("latency")
    parts = [f"at most {drop:g} point{'' if drop == 1 else 's'} lost"] if drop else []
    parts += [f"at most {latency:g} ms"] if latency else []
    return ", ".join(parts)


def met(tier: TierFacts) -> Html:
    if not tier.wish:
        return safe("-")
    if tier.met is None:
        return safe("not recorded")
    return verdict(tier.met, "held", "not met")


def verdict(good: bool, yes: str, no: str) -> Html:
    return tag(
        "span", ("✓ " if good else "✗ ") + (yes if good else no), cls="held" if good else "broken"
    )


def value(facts: Facts, value: float) -> str:
    return f"{facts.metric} {100 * value:.2f}{unit_of(facts.metric)}"


def points_lost(facts: Facts, tier: TierFacts) -> float:
    return 100 * ((facts.exact.value or 0.0) - (tier.value or 0.0))


def signed(points: float) -> str:
    return f"{points:+.2f}".replace("-", "\u2212")


def interval(ends: tuple[float, float] | None) -> str:
    return "" if ends is None else f"{100 * ends[0]:.1f}, {100 * ends[1]:.1f}"


def level(facts: Facts) -> str:
    return f"{100 * (1 - facts.alpha):g}%"


def ms(ms: float) -> str:
    digits = 3 if ms < 1 else 2 if ms < 10 else 1 if ms < 100 else 0
    return f"{ms:,.{digits}f} ms"


def counted(n: Any, word: str) -> str:
    return f"{n} {word}" + ("" if n == 1 else "s")


def batch(facts: Facts) -> str:
    mix: Mapping[str, float] = facts.mix
    if list(mix) == ["1"]:
        return "one text"
    if len(mix) == 1:
        return f"{next(iter(mix))} texts at once"
    return f"batches of {', '.join(mix)} as weighed"
