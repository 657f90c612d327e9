"""The JSON schema of plan.json, made from the words of plan.py.

`docs/plan.schema.json` is this, written by `python -m samp_core.plan_schema > docs/...`.
"""

from __future__ import annotations

import json
from typing import Any

from samp_kernels.interface import SITES

from samp_core.plan import CALIBRATORS, MOST_OUTLIERS, PRECISIONS, SCHEMA


def plan_schema() -> dict[str, Any]:
    """JSON Schema 2020-12. What only a model can tell (layers, shapes) is checked on loading."""
    number = {"type": "number"}
    scale = {"type": "number", "exclusiveMinimum": 0}
    recipe = {
        "description": "How a quantized site is made; what is left out takes its default.",
        "type": ["object", "null"],
        "additionalProperties": False,
        "properties": {
            "weight": _one_of("a scale for each output channel, or one", "channel", "tensor"),
            "activation": _one_of(
                "a calibrated scale, or one for each token (qkv and ffn_in only)", "static", "token"
            ),
            "calibrator": _one_of("what made the static scale", *CALIBRATORS),
            "percentile": {"type": ["number", "null"], "exclusiveMinimum": 50, "maximum": 100},
            "smooth": {"type": ["number", "null"], "description": "reserved: null"},
            "rounding": {"type": "string", "description": "reserved: nearest"},
            "outliers": {
                "description": "input channels of largest magnitude, kept in fp32",
                "type": "integer",
                "minimum": 0,
                "maximum": MOST_OUTLIERS,
            },
        },
    }
    site = {
        "type": "object",
        "required": ["precision"],
        "additionalProperties": False,
        "properties": {
            "precision": _one_of(
                "fp32 where a site is not named; what a backend lacks is refused. fp8 is E4M3 for "
                "weights and activations, at qkv, out, ffn_in and ffn_out",
                *PRECISIONS,
            ),
            "recipe": recipe,
        },
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "plan.json of SAMP for Triton",
        "description": "Site -> precision and recipe, for one model. To change a plan by hand, "
        "edit `sites` and run `samp generate --plan TIER=FILE --model DIR`; everything that is "
        "not required is provenance, except `scales` and `outliers`.",
        "type": "object",
        "required": ["schema", "model_sha256", "config", "backend", "sites"],
        "properties": {
            "schema": {"const": SCHEMA},
            "model_sha256": {"type": "string", "description": "of the checkpoint it is for"},
            "config": {
                "type": "object",
                "required": ["layers", "hidden", "heads", "ffn"],
                "properties": {
                    "family": {"type": "string"},
                    **{
                        key: {"type": "integer", "minimum": 1}
                        for key in ("layers", "hidden", "heads", "ffn")
                    },
                },
            },
            "backend": {"type": "string"},
            "device": {"type": "object", "description": "what latencies were measured on"},
            "mode": {"type": ["string", "null"], "description": "SAMP's name, like full(4)"},
            "sites": {
                "type": "object",
                "additionalProperties": False,
                "patternProperties": {rf"^layer\.[0-9]+\.({'|'.join(SITES)})$": site},
            },
            "scales": {
                "description": "static activation scales by stored name: reach over 127; over "
                "448 those of fp8, <site>.fp8_input_scale",
                "type": "object",
                "additionalProperties": scale,
            },
            "outliers": {
                "description": "site -> its input channels, largest magnitude first",
                "type": "object",
                "additionalProperties": {
                    "type": "array",
                    "uniqueItems": True,
                    "items": {"type": "integer", "minimum": 0},
                },
            },
            "search": {
                "type": "object",
                "properties": {
                    "strategy": {"type": "string"},
                    "seed": {"type": "integer"},
                    "budget_s": {"type": ["number", "null"]},
                    "wish": {"type": "object", "description": "the tier's drop and latency"},
                    "splits": {"type": "object", "description": "n and sha256 of each split"},
                },
            },
            "measured": {
                "type": "object",
                "description": "on the verification split, after the choice",
                "properties": {
                    "latency_ms": {"type": "object", "additionalProperties": number},
                    "metric": {"type": "string"},
                    "value": number,
                    "float_value": number,
                    "changed": {"type": "array", "items": {"type": "integer"}},
                    "drop_bound": number,
                    "alpha": number,
                    "tests": {"type": "array", "items": {"type": "object"}},
                },
            },
            "modelled": {
                "type": "object",
                "description": "what the search foretold: latency_ms by bucket, kl in nats; pace "
                "by bucket: how much slower other plans say it is in the turns of `measured`",
                "properties": {
                    "latency_ms": {"type": "object", "additionalProperties": number},
                    "pace": {"type": "object", "additionalProperties": number},
                    "kl": number,
                },
            },
            "versions": {"type": "object", "additionalProperties": {"type": "string"}},
        },
    }


def _one_of(description: str, *values: str) -> dict[str, Any]:
    return {"description": description, "enum": list(values)}


if __name__ == "__main__":
    print(json.dumps(plan_schema(), indent=1))
