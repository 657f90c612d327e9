"""A plan: site -> precision and recipe, for one model and one device. Frozen; JSON in and out."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from samp_kernels.interface import GEMM_SITES, SITES

from samp_core.errors import SampError

SCHEMA = 1
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8", *(f"bits{i}" for i in range(1, 9)))
HALVES = ("fp16", "bf16")
"""Floats that a plan may choose beside fp32; they need no scales."""
QUANTIZED = ("int8", "fp8", *(f"bits{i}" for i in range(1, 9)))
CALIBRATORS = ("minmax", "percentile", "mse", "entropy")
MOST_OUTLIERS = 64
TOKEN_SITES = ("qkv", "ffn_in")
"""Where an activation scale per token can be: elsewhere no op that writes it holds a whole row."""
_RECIPE_WORDS = {
    "weight": ("channel", "tensor"),
    "activation": ("static", "token"),
    "calibrator": CALIBRATORS,
}


@dataclass(frozen=True)
class Recipe:
    """How a quantized site is made."""

    weight: Literal["channel", "tensor"] = "channel"
    activation: Literal["static", "token"] = "static"
    calibrator: str = "minmax"
    percentile: float | None = None
    smooth: float | None = None
    rounding: str = "nearest"
    outliers: int = 0
    """Input channels of the largest magnitude, multiplied in fp32 beside the int8 product."""


UNMEASURED = (
    "quantizes sites and was measured by no build: what it loses is unknown, and calibrators and "
    "split outliers decide it (docs/calibration.md); samp build measures it"
)


def input_scale(site: str, precision: str) -> str:
    """Where a plan's `scales` hold the static scale of a GEMM's input: each precision has its own,
    since a plan can be edited from one to the other."""
    return f"{site}.input_scale" if precision == "int8" else f"{site}.{precision}_input_scale"


Recipes = Recipe | Mapping[str, Recipe]
"""One recipe for every site, or one for each full site name."""


def recipe_of(recipes: Recipes, site: str) -> Recipe:
    """The recipe of a site, as that site can run it; Recipe() where a mapping is silent.

    Attention multiplies activations, so that no channel is apart there; and a scale per token
    exists only where a layer norm or the embedding writes the input (qkv, ffn_in).
    """
    recipe = recipes if isinstance(recipes, Recipe) else recipes.get(site, Recipe())
    kind = site.rsplit(".", 1)[-1]
    if kind not in GEMM_SITES:
        recipe = replace(recipe, outliers=0)
    if kind not in TOKEN_SITES:
        recipe = replace(recipe, activation="static")
    return recipe


@dataclass(frozen=True)
class SitePlan:
    """The precision of one site; `recipe` only where it is quantized."""

    precision: str = "fp32"
    recipe: Recipe | None = None


@dataclass(frozen=True)
class Plan:
    """One plan with its provenance; `sites` is what an encoder runs, the rest says why."""

    model_sha256: str
    config: Mapping[str, Any]
    backend: str
    device: Mapping[str, Any]
    sites: Mapping[str, SitePlan]
    mode: str | None = None
    search: Mapping[str, Any] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)
    modelled: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    scales: Mapping[str, float] = field(default_factory=dict)
    """Static activation scales by stored name, of every site, so that a plan needs no data."""
    outliers: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Site -> its input channels of the largest magnitude, for recipes that split them off."""

    def precision(self, site: str) -> str:
        """The precision of a full site name; fp32 where the plan is silent."""
        entry = self.sites.get(site)
        return entry.precision if entry else "fp32"

    @property
    def layers(self) -> int:
        return int(self.config["layers"])

    def quantized_sites(self) -> list[str]:
        return [site for site, entry in self.sites.items() if entry.precision in QUANTIZED]

    def split_channels(self, site: str) -> list[int]:
        """The input channels that the site's recipe splits off, ascending."""
        entry = self.sites.get(site)
        count = entry.recipe.outliers if entry is not None and entry.recipe is not None else 0
        channels = self.outliers.get(site, ())
        if count > len(channels):
            raise SampError(
                "no_outliers",
                f"{site} splits {count} channels off and the plan names {len(channels)}",
                "as many in `outliers`, as samp build writes",
                "give --data, so that they are calibrated",
            )
        return sorted(channels[:count])

    def with_provenance(self, **fields: Any) -> Plan:
        return replace(self, **fields)

    def key(self) -> str:
        """SHA-256 of what the encoder computes: model, backend, sites, scales; no measurements."""
        sites = {k: _site_body(v) for k, v in sorted(self.sites.items())}
        payload = {
            "model": self.model_sha256,
            "backend": self.backend,
            "sites": sites,
            "scales": dict(sorted(self.scales.items())) if self.quantized_sites() else {},
        }
        split = {site: self.split_channels(site) for site in sorted(self.sites)}
        if any(split.values()):
            payload["outliers"] = {site: channels for site, channels in split.items() if channels}
        return hashlib.sha256(json.dumps(payload, sort_keys=True).encode()).hexdigest()

    def summary(self) -> str:
        """The plan in one line: its mode, or how many sites run at which precision."""
        counts: dict[str, int] = {}
        for layer in range(self.layers):
            for site in GEMM_SITES:
                precision = self.precision(f"layer.{layer}.{site}")
                counts[precision] = counts.get(precision, 0) + 1
        total = sum(counts.values())
        parts = [f"{n}/{total} {p}" for p, n in sorted(counts.items(), key=lambda kv: -kv[1])]
        text = ", ".join(parts) + " GEMMs"
        return f"{self.mode}: {text}" if self.mode else text

    def to_json(self) -> str:
        body = {"schema": SCHEMA, **asdict(self)}
        body["sites"] = {name: _site_body(entry) for name, entry in self.sites.items()}
        for entry in body["sites"].values():
            if entry["recipe"] is not None:
                entry["recipe"] = {k: v for k, v in entry["recipe"].items() if v is not None}
        if not self.outliers:
            del body["outliers"]
        return json.dumps(body, indent=1) + "\n"

    @staticmethod
    def from_json(text: str, source: str = "plan") -> Plan:
        """Parse and check a plan. Raises SampError that names the site and what is allowed."""
        try:
            body = json.loads(text)
        except json.JSONDecodeError as error:
            raise _bad(
                source, f"it is not JSON ({error})", "the JSON that samp build writes"
            ) from None
        if not isinstance(body, dict) or body.get("schema") != SCHEMA:
            got = body.get("schema") if isinstance(body, dict) else type(body).__name__
            raise _bad(source, f"schema {got}", f"schema {SCHEMA}")
        missing = [k for k in ("model_sha256", "config", "backend", "sites") if k not in body]
        if missing:
            raise _bad(source, f"no {', '.join(missing)}", "model_sha256, config, backend, sites")
        for key in ("config", "sites", "scales", "outliers"):
            if not isinstance(body.get(key, {}), dict):
                raise _bad(source, f"{key} is a {type(body[key]).__name__}", "a JSON object")
        layers = body["config"].get("layers")
        if type(layers) is not int or layers < 1:
            raise _bad(source, f"config.layers {layers!r}", "a whole number from 1")
        sites = {}
        for name, entry in body["sites"].items():
            _check_site(source, name, layers)
            sites[name] = _parse_site(source, name, entry)
        for name, scale in body.get("scales", {}).items():
            if type(scale) not in (int, float) or not 0.0 < scale < math.inf:
                raise _bad(source, f"scale {name} = {scale!r}", "a finite number above 0")
        return Plan(
            model_sha256=body["model_sha256"],
            config=body["config"],
            backend=body["backend"],
            device=body.get("device", {}),
            sites=sites,
            mode=body.get("mode"),
            search=body.get("search", {}),
            measured=body.get("measured", {}),
            modelled=body.get("modelled", {}),
            versions=body.get("versions", {}),
            scales=body.get("scales", {}),
            outliers=_parse_outliers(source, body.get("outliers", {})),
        )


def _site_body(entry: SitePlan) -> dict[str, Any]:
    """One site as JSON; a recipe without outliers does not name them."""
    body = asdict(entry)
    if body["recipe"] is not None and not body["recipe"]["outliers"]:
        del body["recipe"]["outliers"]
    return body


def _parse_outliers(source: str, found: Mapping[str, Any]) -> dict[str, list[int]]:
    for name, channels in found.items():
        good = isinstance(channels, list) and all(type(c) is int and c >= 0 for c in channels)
        if not good or len(set(channels)) != len(channels):
            raise _bad(source, f"outliers of {name}: {channels!r}", "different channels, from 0")
    return dict(found)


def _bad(source: str, given: str, allowed: str) -> SampError:
    return SampError("bad_plan", f"{source}: {given}", allowed, "correct the plan, or build again")


def _check_site(source: str, name: str, layers: int) -> None:
    parts = name.split(".")
    good = (
        len(parts) == 3
        and parts[0] == "layer"
        and parts[1] in map(str, range(layers))
        and parts[2] in SITES
    )
    if not good:
        allowed = f"layer.<0..{layers - 1}>.<{' | '.join(SITES)}>"
        raise _bad(source, f"site {name!r}", allowed)


def _parse_site(source: str, name: str, entry: Any) -> SitePlan:
    precision = entry.get("precision") if isinstance(entry, dict) else None
    if precision not in PRECISIONS:
        raise _bad(source, f"{name}: precision {precision!r}", ", ".join(PRECISIONS))
    raw = entry.get("recipe")
    if raw is None:
        return SitePlan(precision, Recipe() if precision in QUANTIZED else None)
    if not isinstance(raw, dict):
        raise _bad(source, f"{name}: recipe is a {type(raw).__name__}", "a JSON object")
    known = set(Recipe.__dataclass_fields__)
    unknown = sorted(set(raw) - known)
    if unknown:
        raise _bad(source, f"{name}: recipe has {', '.join(unknown)}", ", ".join(sorted(known)))
    recipe = Recipe(**raw)
    for key, allowed in _RECIPE_WORDS.items():
        value = getattr(recipe, key)
        if value not in allowed:
            raise _bad(source, f"{name}: {key} {value!r}", ", ".join(allowed))
    count = recipe.outliers
    if type(count) is not int or not 0 <= count <= MOST_OUTLIERS:
        raise _bad(source, f"{name}: outliers {count!r}", f"a whole number, 0 to {MOST_OUTLIERS}")
    splits = precision == "int8" and recipe.activation == "static"
    if count and not (splits and name.rsplit(".", 1)[1] in GEMM_SITES):
        where = f"int8 with a static scale at {', '.join(GEMM_SITES)}"
        raise _bad(source, f"{name}: outliers", where)
    percent = recipe.percentile
    if percent is not None and (type(percent) not in (int, float) or not 50 < percent <= 100):
        raise _bad(source, f"{name}: percentile {percent!r}", "a number above 50, at most 100")
    return SitePlan(precision, recipe)


def mode_plan(
    base: Plan,
    kind: Literal["float", "ffn_only", "full"],
    k: int,
    sites: tuple[str, ...],
    recipe: Recipes,
    precision: str = "int8",
) -> Plan:
    """SAMP's mode: the first k layers quantized to `precision`, FFN only or every site in `sites`.

    `sites` are the ones that the backend can quantize; `full(k)` means exactly those.
    """
    chosen = tuple(s for s in sites if s.startswith("ffn_")) if kind == "ffn_only" else sites
    plans = {
        f"layer.{layer}.{site}": (
            SitePlan(precision, recipe_of(recipe, f"layer.{layer}.{site}"))
            if kind != "float" and layer < k and site in chosen
            else SitePlan("fp32")
        )
        for layer in range(base.layers)
        for site in SITES
    }
    name = "float" if kind == "float" or k == 0 else f"{kind}({k})"
    return replace(base, sites=plans, mode=name)


def unmeasured(plan: Plan) -> bool:
    """Whether what a plan's quantized sites lose was never measured."""
    return bool(plan.quantized_sites()) and not plan.measured
