"""The report's sections, in the order of the page: each says in words what its chart shows.

A section takes the facts and the figures made so far, adds its own, and returns HTML.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from samp_core import report_charts as charts
from samp_core import report_front, report_maps
from samp_core import report_words as say
from samp_core.latency import foretold
from samp_core.report_facts import EXACT, Facts, TierFacts
from samp_core.report_figure import names_of, precision_colour, tier_colours, unit_of
from samp_core.report_html import Html, join, table, tag

Figures = dict[str, Any]

LINKS = (
    ("front", "Speed and accuracy"),
    ("promises", "Promises"),
    ("latency", "Latency"),
    ("plans", "Plans"),
    ("sites", "Sites"),
    ("errors", "Error by layer"),
    ("sizes", "Sizes"),
    ("origin", "Where this comes from"),
)


def top(facts: Facts, figures: Figures) -> Html:
    """What each tier gives and what it costs, in words."""
    manifest, exact = facts.manifest, facts.exact
    device = exact.plan.device
    where = f"{device.get('cpu', 'this machine')}, {say.counted(device.get('threads'), 'thread')}"
    return join(
        [
            tag("h1", f"{manifest.model}: what each tier gives, and what it costs"),
            tag("p", f"{manifest.task}, {where}; build {manifest.folder.name}", cls="under"),
            tag("p", _lead(facts), cls="lead"),
            tag("div", *(_card(facts, group) for group in facts.groups()), cls="cards"),
            _notes(facts),
            tag("nav", *(tag("a", words, href=f"#{key}") for key, words in LINKS)),
        ]
    )


def _lead(facts: Facts) -> str:
    exact = facts.exact
    timed = [t for t in facts.tiers if facts.weigh(t.latency_ms) is not None]
    if not timed or facts.weigh(exact.latency_ms) is None or exact.value is None:
        return (
            "These tiers were written from plans, without a search: nothing was measured, and "
            "nothing is promised."
        )
    slow = facts.weigh(exact.latency_ms) or 0.0
    quick = min(timed, key=lambda t: facts.weigh(t.latency_ms) or 0.0)
    if quick.is_float:
        return (
            f"Every tier serves exact's plan, fp32 everywhere: {say.ms(slow)} for "
            f"{say.batch(facts)}, {say.value(facts, exact.value)}. No faster plan was found that "
            "keeps what was promised."
        )
    fast = facts.weigh(quick.latency_ms) or 0.0
    same = next(g for g in facts.groups() if quick in g)
    names = " and ".join(t.name for t in same)
    lost, bound = 100 * (exact.value - (quick.value or 0.0)), 100 * (quick.bound or 0.0)
    verb = "It loses" if lost >= 0 else "Measured, it gains"
    most = "and at most" if lost >= 0 else "and loses at most"
    speed = f"{say.ms(fast)} instead of exact's {say.ms(slow)}: {slow / fast:.1f} times as fast"
    rows = f"{facts.rows:,} rows" if facts.rows else "rows"
    return (
        f"The fastest tier, {names}, answers {say.batch(facts)} in {speed}. {verb} "
        f"{abs(lost):.2f} points of {facts.metric}, {most} {bound:.2f} "
        f"({say.level(facts)} bound, {rows} that the search never saw)."
    )


def _card(facts: Facts, group: Sequence[TierFacts]) -> Html:
    tier, exact = group[0], facts.exact
    colour = tier_colours(facts)[tier.name]
    ms, slow = facts.weigh(tier.latency_ms), facts.weigh(exact.latency_ms)
    parts: list[object] = [
        tag("h3", names_of(group)),
        tag("p", tier.plan.summary(), cls="plan"),
    ]
    if ms is not None:
        parts.append(tag("p", say.ms(ms), cls="big"))
        faster = "" if tier is exact or not slow else f", {slow / ms:.2f} times as fast as exact"
        parts.append(tag("p", f"for {say.batch(facts)}{faster}", cls="quiet"))
    if tier.value is not None:
        ends = f" [{say.interval(tier.ci95)}]" if tier.ci95 else ""
        parts.append(tag("p", tag("b", say.value(facts, tier.value)), ends))
    if tier.name != EXACT and tier.value is not None and exact.value is not None:
        lost = 100 * (exact.value - tier.value)
        words = f"{abs(lost):.2f} points {'lost' if lost >= 0 else 'gained'}"
        bound = f"{100 * (tier.bound or 0.0):.2f}"
        parts.append(tag("p", f"{words}; lost at most {bound} ({say.level(facts)} bound)"))
    for one in group:
        if one.wish:
            parts.append(tag("p", f"{one.name} promises {say.wish(one)}: ", say.met(one)))
        elif one.name != EXACT and one.value is not None:
            parts.append(tag("p", f"{one.name}: recommended where the loss begins to grow faster"))
    saved = 100 * (1 - tier.size_mb / exact.size_mb)
    smaller = f", {saved:.0f}% less than exact" if saved >= 1 else ""
    parts.append(tag("p", f"{tier.size_mb:.1f} MB of weights{smaller}", cls="quiet"))
    return tag("article", *parts, cls="card", style=f"--tier: {colour}")


def _notes(facts: Facts) -> Html:
    notes = [str(note) for note in facts.record.get("warnings") or []]
    missing = [f"not in this build: {words}" for words in facts.missing]
    if not notes and not missing:
        return Html("")
    items = [tag("li", note) for note in (*missing, *notes)]
    return tag("div", tag("b", "To know"), tag("ul", *items), cls="notes")


def front(facts: Facts, figures: Figures) -> Html:
    """The accuracy-latency front."""
    made = report_front.front(facts)
    parts: list[object] = [tag("h2", "Speed against what may be lost", id="front")]
    if made is None:
        return join([*parts, say.absent("no plan was measured")])
    figures["chart-front"] = made
    rows = f"{facts.rows:,}" if facts.rows else "the"
    parts += [
        tag(
            "p",
            "Up is more accurate, left is faster. A large marker is a tier on the "
            f"{rows} verification rows; its whisker leads from the loss that was measured to its "
            f"{say.level(facts)} bound, which has to stay above the dotted line of its promise. "
            "Small markers are the other plans that were looked at, on the search rows: they show "
            "the bound to expect on fresh rows, and the grey line joins those that no other beats. "
            "SAMP's modes quantize the first k layers, ffn_only their feed-forward part alone.",
        ),
        tag(
            "div",
            tag("button", f"{say.level(facts)} bound", type="button", data_figure="chart-front",
                data_view="bound", aria_pressed="true"),
            tag("button", "as measured", type="button", data_figure="chart-front",
                data_view="measured", aria_pressed="false"),
            cls="views", role="group", aria_label="What the chart shows",
        ),
        _below(facts),
        say.chart("chart-front", f"Points of {facts.metric} lost against latency, by plan"),
        _hidden_plans(facts),
    ]  # fmt: skip
    return join(parts)


def _below(facts: Facts) -> Html:
    """How many plans lose too much to be seen beside the promises."""
    foot = report_front.reach(facts)
    count = sum(bound > foot for bound in report_front.expected_bounds(facts).values())
    if not count:
        return Html("")
    words = (
        f"{say.counted(count, 'plan')} that may lose more than {foot:.2g} points: below the chart."
    )
    return tag("p", words, cls="quiet")


def _hidden_plans(facts: Facts) -> Html:
    """The same in figures, for who cannot see the chart."""
    if not facts.candidates:
        return Html("")
    summaries = facts.record.get("plans") or {}
    foretold = facts.search.get("modelled") or {}
    rows = []
    for c in sorted(facts.candidates, key=lambda c: c.latency_ms):
        told = facts.weigh((foretold.get(c.name) or {}).get("latency_ms") or {})
        rows.append(
            (
                c.name,
                summaries.get(c.name, "-"),
                say.ms(c.latency_ms) if c.timed else "not timed",
                "-" if told is None else say.ms(told),
                f"{100 * c.accuracy:.2f}",
                say.signed(100 * c.drop),
            )
        )
    heads = (
        "plan", "what it quantizes", "measured", "foretold", facts.metric or "metric",
        "points lost, search rows",
    )  # fmt: skip
    return tag(
        "details",
        tag("summary", f"All {len(rows)} plans in figures"),
        table(heads, rows, caption="Fastest first; on the search rows.", words=2),
    )


def promises(facts: Facts, figures: Figures) -> Html:
    """Promises with their intervals, and every verification test."""
    level = say.level(facts)
    parts: list[object] = [tag("h2", "Promises, and the tests behind them", id="promises")]
    measured = [tier for tier in facts.tiers if tier.value is not None]
    if not measured:
        return join([*parts, say.absent("no promise was tested")])
    n = f"{facts.rows:,}" if facts.rows else "-"
    rows = []
    for tier in measured:
        bound = "-" if tier.name == EXACT else f"{100 * (tier.bound or 0.0):.2f}"
        b, c = tier.plan.measured.get("changed", (0, 0))
        rows.append(
            (
                say.named(facts, tier),
                say.wish(tier) or "-",
                f"{100 * (tier.value or 0.0):.2f}{unit_of(facts.metric)}",
                say.interval(tier.ci95) if tier.ci95 else "not recorded",
                "-" if tier.name == EXACT else say.signed(say.points_lost(facts, tier)),
                bound,
                "-" if tier.name == EXACT else f"{b} / {c}",
                say.met(tier),
            )
        )
    heads = (
        "tier", "promise", facts.metric, "95% interval", "points lost", f"{level} bound",
        "worse / better", "outcome",
    )  # fmt: skip
    caption = f"On {n} verification rows; worse / better: texts that change against exact."
    parts += [table(heads, rows, caption=caption, words=2), *_tests(facts, figures)]
    return join(parts)


def _tests(facts: Facts, figures: Figures) -> list[object]:
    made = charts.tests(facts)
    if made is None:
        return [say.absent("no plan was tested: no tier promises a drop")]
    figures["chart-tests"] = made
    rows = [
        (
            say.named(facts, tier),
            test["plan"],
            f"{test['b']} / {test['c']} of {test['n']:,}",
            say.signed(100 * test["drop"]),
            f"{100 * test['bound']:.2f}",
            f"{100 * test['promise']:g}",
            say.verdict(bool(test["passed"]), "held", "failed, and ended the sequence"),
        )
        for tier in facts.tiers
        for test in tier.tests
    ]
    heads = (
        "tier", "plan tested", "worse / better", "points lost", f"{say.level(facts)} bound",
        "promise", "outcome",
    )  # fmt: skip
    return [
        tag("h3", "Every test"),
        tag(
            "p",
            "The candidates of a tier are tested in an order that was fixed before the "
            "verification rows were seen, safest first, up to the first failure; the last that "
            "held is served.",
        ),
        say.chart("chart-tests", "Drop and bound of every verification test"),
        table(heads, rows, caption="Tests in the order in which they were made.", words=2),
    ]


def latency(facts: Facts, figures: Figures) -> Html:
    """What a tier takes, by batch; what was foretold."""
    parts: list[object] = [tag("h2", "Latency", id="latency")]
    buckets = list(facts.exact.latency_ms)
    timed = [tier for tier in facts.tiers if tier.latency_ms]
    if not buckets or not timed:
        return join([*parts, say.absent("no latency was measured")])
    rows = []
    for tier in timed:
        cells: list[object] = [say.named(facts, tier)]
        for bucket in buckets:
            ms, slow = tier.latency_ms.get(bucket), facts.exact.latency_ms[bucket]
            ratio = "" if tier.name == EXACT or ms is None else f" ({slow / ms:.2f}x)"
            cells.append("-" if ms is None else f"{say.ms(ms)}{ratio}")
        told = facts.weigh(foretold(tier.plan.modelled))
        again = facts.weigh(tier.latency_ms)
        off = "-"
        if told is not None and again:
            off = f"{say.ms(told)} ({100 * (told / again - 1):+.0f}%)"
        rows.append((*cells, off))
    heads = ["tier", *(f"{b} text" + ("s" if b != "1" else "") for b in buckets), "foretold"]
    caption = (
        "Encoder and head in process, without a server; medians of whole passes, the plans taking "
        f"turns. Foretold: for {say.batch(facts)}, before the plan was "
        "chosen, at the pace that other plans had in the same turns."
    )
    return join([*parts, table(heads, rows, caption=caption), *_foretelling(facts)])


def _foretelling(facts: Facts) -> list[Html]:
    """How well the model of the device foretells whole plans, where that was looked at."""
    return [
        tag(
            "p",
            f"Batch of {bucket}: of {found['plans']:.0f} whole plans each is foretold by the "
            f"others within {100 * found['largest']:.1f}% (median {100 * found['median']:.1f}%); "
            f"by time stamps of single sites alone within {100 * found['stamped_largest']:.1f}%.",
            cls="quiet",
        )
        for bucket, found in (facts.search.get("misses") or {}).items()
    ]


def plans(facts: Facts, figures: Figures) -> Html:
    """The plan of each tier as a map, and what really ran."""
    maps, used = [], set()
    for place, group in enumerate(facts.groups()):
        tier = group[0]
        key = f"chart-plan-{place}"
        figures[key] = report_maps.plan_map(facts, tier)
        used |= {entry.precision for entry in tier.plan.sites.values()}
        name = names_of(group)
        maps.append(
            tag(
                "figure",
                tag("figcaption", name, " ", tag("span", tier.plan.summary())),
                say.chart(key, f"Precision of every site of {name}: {tier.plan.summary()}"),
            )
        )
    keys = [
        tag("span", tag("i", style=f"--tier: {precision_colour(p)}"), p)
        for p in sorted(used, key=lambda p: (p != "fp32", p))
    ]
    return join(
        [
            tag("h2", "Plans: what runs at which precision", id="plans"),
            tag(
                "p",
                "Each row is a layer, each cell one matrix product of it: qkv, the attention's "
                "scores and context, its output, and the two of the feed-forward part. A number is "
                "how many of its input channels stay in fp32. Point at a cell for its recipe and "
                "the reason.",
            ),
            tag("div", *keys, cls="keys"),
            tag("div", *maps, cls="maps"),
            tag("h3", "What really ran"),
            _executed(facts),
        ]
    )


def _executed(facts: Facts) -> Html:
    rows = []
    for group in facts.groups():
        tier = group[0]
        if tier.executed is None:
            continue
        counts: dict[str, int] = {}
        for precision in tier.executed.values():
            counts[precision] = counts.get(precision, 0) + 1
        wrong = [s for s, p in tier.executed.items() if p != tier.plan.precision(s)]
        ran = ", ".join(f"{n} {p}" for p, n in sorted(counts.items(), key=lambda kv: -kv[1]))
        outcome = say.verdict(not wrong, "as planned", f"not as planned: {', '.join(wrong)}")
        names = join([say.named(facts, one) for one in group], " = ")
        rows.append((names, f"{ran}, of {len(tier.executed)} sites", outcome))
    if not rows:
        return say.absent("which kernels ran was not recorded")
    caption = f"As the kernels themselves said; backend {facts.exact.plan.backend}."
    return table(("tier", "sites that ran", "beside the plan"), rows, caption=caption, words=3)


def sites(facts: Facts, figures: Figures) -> Html:
    """What each site loses, and what it costs."""
    parts: list[object] = [tag("h2", "What each site loses, and what it takes", id="sites")]
    loss = report_maps.sensitivity_map(facts)
    if loss is None:
        why = "the search per site was not made"
        if facts.strategy == "samp":
            why = "strategy samp tries SAMP's modes whole and looks at no site by itself"
        return join([*parts, say.absent(why)])
    figures["chart-loss"] = loss
    search = facts.search
    rank = search["rank_correlation"].get("fisher")
    agreed = "" if rank is None else f" (rank correlation {rank:.2f} with what was measured)"
    kind8 = say.quantized(search)
    alone = f"nats of KL divergence, alone in {kind8}"
    maps = [
        tag(
            "figure",
            tag("figcaption", "Loss ", tag("span", alone)),
            say.chart("chart-loss", f"KL divergence of each site alone in {kind8}"),
        )
    ]
    for bucket, pair in report_maps.time_maps(facts).items():
        texts = f"{bucket} text" + ("s" if bucket != "1" else "")
        for kind, figure, title, words in zip(
            ("time", "saved"), pair, ("Time in fp32 ", f"Saved by {kind8} "),
            (f"µs, {texts}", f"µs, {texts}; red costs time"), strict=True,
        ):  # fmt: skip
            key = f"chart-{kind}-{bucket}"
            figures[key] = figure
            caption = tag("figcaption", title, tag("span", words))
            maps.append(tag("figure", caption, say.chart(key, f"{title}of each site, {words}")))
    return join(
        [
            *parts,
            tag(
                "p",
                f"{search['measured']} of {search['nodes']} sites were measured one by one on "
                f"{search.get('rows') or 'the'} search rows; the others (~) are estimated from "
                f"gradients{agreed}. Times are stamps inside whole passes. A site is worth "
                "quantizing where it saves much and loses little. scores and context are one "
                "decision, attention: one kernel runs both.",
            ),
            tag("div", *maps, cls="maps"),
        ]
    )


def errors(facts: Facts, figures: Figures) -> Html:
    """How the error grows from layer to layer."""
    made = charts.layer_error(facts)
    parts: list[object] = [tag("h2", "Error by layer", id="errors")]
    if made is None:
        why = "every tier runs in float"
        if any(not tier.is_float for tier in facts.tiers):
            why = "this build did not record it; build again to see it"
        return join([*parts, say.absent(why)])
    figures["chart-errors"] = made
    seen = facts.record.get("observed") or {}
    texts = max((entry.get("rows", 0) for entry in seen.values()), default=0)
    return join(
        [
            *parts,
            tag(
                "p",
                "Root mean square of what a layer puts out less what float does, over that of "
                f"float's, on {texts} search texts; of the last layer at what the head reads. It "
                "says where noise enters; what the answers lose is under Promises.",
            ),
            say.chart("chart-errors", "Relative error of each layer's output"),
        ]
    )
