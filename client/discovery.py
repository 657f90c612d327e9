"""Which models and tiers a server has, read from its repository index and configurations."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from samp_client.answers import KINDS, kind_of
from samp_client.errors import BadRequest, UnknownModel

_ENSEMBLE = re.compile(r"([a-z0-9-]+)_([a-z0-9-]+)")
_INPUTS = (["TEXT"], ["TEXT", "TEXT_PAIR"])


@dataclass(frozen=True)
class TierInfo:
    """One tier as the server describes it.

    steps: the ensemble's models, in its order; promise: the largest drop of its metric that the
    tier was built for, in points, or None; kind: of its answers, a key of answers.KINDS; inputs:
    TEXT, and TEXT_PAIR where a row is two texts.
    """

    tier: str
    ensemble: str
    max_rows: int
    steps: tuple[str, ...]
    promise: float | None = None
    kind: str = "classification"
    inputs: tuple[str, ...] = ("TEXT",)


def tiers_by_model(index: Iterable[Mapping[str, Any]]) -> dict[str, tuple[str, ...]]:
    """Loaded tiers of every served model, sorted.

    `<model>_<tier>` counts when `head_<model>` and `tokenizer_<model>` are loaded beside it, which
    tells it from foreign models and from the parts themselves.
    """
    ready = {entry["name"] for entry in index if entry.get("state") == "READY"}
    found: dict[str, list[str]] = {}
    for name in sorted(ready):
        match = _ENSEMBLE.fullmatch(name)
        if match is None:
            continue
        model, tier = match.groups()
        parts = {f"head_{model}", f"tokenizer_{model}"}
        if name not in parts and parts <= ready:
            found.setdefault(model, []).append(tier)
    return {model: tuple(tiers) for model, tiers in found.items()}


def choose_model(wanted: str | None, tiers: Mapping[str, tuple[str, ...]], address: str) -> str:
    """The wanted model if it is served, or the only one. UnknownModel or BadRequest otherwise."""
    names = ", ".join(sorted(tiers))
    if wanted is not None:
        if wanted not in tiers:
            raise UnknownModel(
                f"{address} does not serve a model {wanted!r}",
                names or "no SAMP model is loaded there",
                "name one of these, or load the model",
            )
        return wanted
    if not tiers:
        raise UnknownModel(
            f"{address} serves no SAMP model",
            "an ensemble <model>_<tier> beside tokenizer_<model> and head_<model>",
            "build and serve one with `samp build` and `samp serve`",
        )
    if len(tiers) > 1:
        raise BadRequest(
            f"no model named, and {address} serves {len(tiers)}", names, "give model=..."
        )
    return next(iter(tiers))


def read_tier(tier: str, config: Mapping[str, Any]) -> TierInfo:
    """A tier from its ensemble's configuration. BadRequest if it is none of ours."""
    outputs = [output["name"] for output in config.get("output", [])]
    inputs = [tensor["name"] for tensor in config.get("input", [])]
    kind = kind_of(outputs)
    if inputs not in _INPUTS or kind is None:
        known = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in KINDS.items())
        raise BadRequest(
            f"{config['name']} takes {', '.join(inputs)} and returns {', '.join(outputs)}",
            f"TEXT and perhaps TEXT_PAIR in; TRUNCATED out, and for {known}",
            "call this task's ensemble with tritonclient",
        )
    steps = config.get("ensemble_scheduling", {}).get("step", [])
    promise = config.get("parameters", {}).get("promise_points", {}).get("string_value")
    return TierInfo(
        tier,
        config["name"],
        max(1, int(config.get("max_batch_size", 0))),
        tuple(step["model_name"] for step in steps),
        None if promise is None else float(promise),
        kind,
        tuple(inputs),
    )


def read_labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Class names in the order of SCORES: the head's parameter `labels`, a JSON list."""
    value = config.get("parameters", {}).get("labels", {}).get("string_value", "[]")
    return tuple(str(label) for label in json.loads(value))
