"""The report's last sections: sizes on disk, and where every figure comes from."""

from __future__ import annotations

import json
from typing import Any

from samp_core.report_facts import Facts
from samp_core.report_html import Html, join, pairs, table, tag


def sizes(facts: Facts, figures: dict[str, Any]) -> Html:
    """Megabytes of every served model that has any."""
    most = max(facts.sizes.values(), default=1)
    rows = [
        (
            name,
            f"{size / 1e6:,.2f}",
            tag("span", cls="bar", style=f"width: {100 * size / most:.1f}%"),
        )
        for name, size in facts.sizes.items()
        if size >= 1e4
    ]
    caption = (
        "Every model of the Triton repository that holds data. A server loads tokenizer, head and "
        "the encoders of the tiers that it serves."
    )
    body = table(("model", "MB on disk", "beside the largest"), rows, caption=caption)
    return join([tag("h2", "Sizes", id="sizes"), body])


def origin(facts: Facts, figures: dict[str, Any]) -> Html:
    """Versions, device, hashes, splits, configuration."""
    plan, manifest, config = facts.exact.plan, facts.manifest, facts.config
    device = plan.device
    search = facts.search
    about: list[tuple[str, object]] = [
        ("model", f"{manifest.model}, {manifest.task}, {_shape(plan.config)}"),
        ("checkpoint", config.get("model", "not recorded")),
        ("its sha256", tag("code", plan.model_sha256)),
        ("labels", ", ".join(manifest.labels) or "none"),
        ("device", ", ".join(f"{key} {value}" for key, value in device.items()) or "not recorded"),
        ("backend", plan.backend),
        ("versions", ", ".join(f"{k} {v}" for k, v in plan.versions.items()) or "not recorded"),
        ("strategy", _strategy(facts)),
        ("seed", config.get("seed", "not recorded")),
        ("built", facts.record.get("made", "not recorded")),
        ("most memory", _megabytes(facts.record.get("peak_mb"))),
        ("build", tag("code", manifest.folder.name)),
    ]  # fmt: skip
    if search.get("rank_correlation"):
        told = {k: v for k, v in search["rank_correlation"].items() if v is not None}
        words = ", ".join(f"{name} {value:.2f}" for name, value in told.items())
        about.insert(
            8, ("cheap scores", f"rank correlation with measured KL: {words or 'too few'}")
        )
    parts: list[object] = [tag("h2", "Where this comes from", id="origin"), pairs(about)]
    if facts.splits:
        rows = [
            (name, _USES.get(name, ""), f"{split['n']:,}", tag("code", split["sha256"]))
            for name, split in facts.splits.items()
        ]
        heads = ("split", "used for", "rows", "sha256")
        caption = "The three splits share no text, and none with the rows that trained the model."
        if not (config.get("data") or {}).get("exclude"):
            caption = "The three splits share no text; no file of training rows was given."
        parts.append(table(heads, rows, caption=caption, words=2))
    parts += [_config(facts), _files(facts)]
    return join(parts)


_USES = {
    "calibration": "ranges of activations",
    "search": "choosing plans",
    "verification": "every accuracy and bound above",
}


def _shape(config: Any) -> str:
    return f"{config.get('layers', '?')} layers, hidden {config.get('hidden', '?')}"


def _megabytes(value: Any) -> str:
    return "not recorded" if value is None else f"{value:,} MB"


def _strategy(facts: Facts) -> str:
    search, words = facts.search, facts.strategy or "none"
    if search.get("spent_s") is not None:
        words += f", {search['spent_s']:g} s of a budget of {search['budget_s']:g} s"
    return words


def _config(facts: Facts) -> Html:
    if not facts.config:
        return Html("")
    given = _without_none(facts.config)
    text = "".join(
        f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in given.items()
    )
    return tag(
        "details",
        tag("summary", "Configuration: the build again"),
        tag("p", "Save it as build.yaml and run ", tag("code", "samp build -c build.yaml"), "."),
        tag("pre", text, id="config"),
    )


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return value


def _files(facts: Facts) -> Html:
    manifest = facts.manifest
    plans = [(name, tag("code", tier.plan_sha256)) for name, tier in manifest.tiers.items()]
    files = [(name, tag("code", sha256)) for name, sha256 in manifest.files.items()]
    return tag(
        "details",
        tag("summary", f"SHA-256 of {len(plans)} plans and {len(files)} files"),
        table(("plan of", "sha256"), plans, caption="What the encoder computes.", words=2),
        table(("file", "sha256"), files, caption="Every served file.", words=2),
    )
