"""What the report shows, read from a build's files; what an older build lacks is named."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from samp_core.allocate import Candidate
from samp_core.errors import SampError
from samp_core.explain import explain
from samp_core.manifest import Manifest, read_manifest
from samp_core.plan import Plan

EXACT = "exact"
FLOAT = "float"


@dataclass(frozen=True)
class TierFacts:
    """One tier. Values and bounds are fractions of the metric; None where the build has none."""

    name: str
    plan: Plan
    plan_name: str
    size_mb: float
    wish: Mapping[str, float]
    tests: Sequence[Mapping[str, Any]]
    latency_ms: Mapping[str, float]
    value: float | None
    bound: float | None
    ci95: tuple[float, float] | None
    met: bool | None
    executed: Mapping[str, str] | None
    layer_error: Sequence[float] | None
    why: Mapping[str, str]
    """Site, or node of a site, -> why it is as it is."""

    @property
    def is_float(self) -> bool:
        return not self.plan.quantized_sites()


@dataclass(frozen=True)
class Facts:
    """A build as the report reads it; `missing` says in words what it does not hold."""

    out: Path
    manifest: Manifest
    record: Mapping[str, Any]
    tiers: Sequence[TierFacts]
    candidates: Sequence[Candidate]
    sizes: Mapping[str, int]
    missing: Sequence[str]

    @property
    def exact(self) -> TierFacts:
        return next((t for t in self.tiers if t.name == EXACT), self.tiers[0])

    @property
    def metric(self) -> str:
        return str(next((t.plan.measured["metric"] for t in self.tiers if t.plan.measured), ""))

    @property
    def alpha(self) -> float:
        found = (t.plan.measured["alpha"] for t in self.tiers if t.plan.measured)
        return float(next(found, 0.05))

    @property
    def config(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.record.get("config") or {}
        return found

    @property
    def mix(self) -> Mapping[str, float]:
        return dict(self.config.get("mix") or {"1": 1.0})

    @property
    def splits(self) -> Mapping[str, Mapping[str, Any]]:
        found: Mapping[str, Mapping[str, Any]] = self.record.get("splits") or {}
        return found

    @property
    def rows(self) -> int | None:
        """How many rows the promises were tested on."""
        return self.splits.get("verification", {}).get("n")

    @property
    def search(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.record.get("search") or {}
        return found

    @property
    def strategy(self) -> str:
        return str(self.search.get("strategy") or self.config.get("strategy") or "")

    def weigh(self, latency_ms: Mapping[str, float]) -> float | None:
        """The latency that plans were chosen by; None where a bucket was not measured."""
        if not set(self.mix) <= set(latency_ms):
            return None
        weights = self.mix
        return sum(w * latency_ms[b] for b, w in weights.items()) / sum(weights.values())

    def groups(self) -> list[list[TierFacts]]:
        """Tiers that serve one plan stand together, in the order of the tiers."""
        found: dict[str, list[TierFacts]] = {}
        for tier in self.tiers:
            found.setdefault(tier.plan.key(), []).append(tier)
        return list(found.values())


def read_facts(out: Path) -> Facts:
    """The current build of an output folder. Raises SampError: no build, or a damaged one."""
    manifest = read_manifest(out)
    missing: list[str] = []
    record = _record(manifest.folder / "build.json")
    for key, words in (
        ("config", "the configuration of the build"),
        ("candidates", "the plans that the search compared"),
        ("splits", "the splits of the data"),
        ("tiers", "the tiers' intervals"),
        ("observed", "what the served plans ran, and each layer's error"),
    ):
        if not record.get(key):
            missing.append(f"{words} (`{key}` of build.json)")
    if "generated_from" in record:
        missing.append("measurements: the tiers were generated from plans, without a search")
    tiers = [_tier(out, manifest, record, name) for name in manifest.tiers]
    return Facts(
        out=out,
        manifest=manifest,
        record=record,
        tiers=tiers,
        candidates=_candidates(record),
        sizes=_sizes(manifest),
        missing=missing,
    )


def _record(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise _damaged(f"build.json: {error}") from None
    if not isinstance(found, dict):
        raise _damaged(f"build.json holds a {type(found).__name__}")
    return found


def _tier(out: Path, manifest: Manifest, record: Mapping[str, Any], name: str) -> TierFacts:
    folder = manifest.folder / "models" / manifest.tiers[name].encoder / "1"
    try:
        text = (folder / "plan.json").read_text(encoding="utf-8")
        size = (folder / "weights.safetensors").stat().st_size
    except OSError as error:
        raise _damaged(f"{error.filename}: {error.strerror}") from None
    plan = Plan.from_json(text, str(folder / "plan.json"))
    said = (record.get("tiers") or {}).get(name) or {}
    tests = plan.measured.get("tests") or []
    passed = [test["plan"] for test in tests if test["passed"]]
    guess = plan.mode or (passed[-1] if passed else f"plan {plan.key()[:8]}")
    plan_name = str(said.get("plan") or guess)
    seen = (record.get("observed") or {}).get(plan_name) or {}
    ci95 = said.get("ci95")
    why: dict[str, str] = {}
    search = record.get("search") or {}
    if search.get("sites") and search.get("costs"):
        with contextlib.suppress(KeyError, ValueError):  # a plan that this search did not make
            why = {site["site"]: site["why"] for site in explain(out, name)["sites"]}
    wish = plan.search.get("wish") or {}
    return TierFacts(
        name=name,
        plan=plan,
        plan_name=plan_name,
        size_mb=size / 1e6,
        wish={key: value for key, value in wish.items() if value is not None},
        tests=tests,
        latency_ms=plan.measured.get("latency_ms") or {},
        value=plan.measured.get("value"),
        bound=plan.measured.get("drop_bound"),
        ci95=(ci95[0], ci95[1]) if ci95 else None,
        met=said.get("met"),
        executed=seen.get("executed"),
        layer_error=seen.get("layer_error"),
        why=why,
    )


def _candidates(record: Mapping[str, Any]) -> list[Candidate]:
    known = {field.name for field in fields(Candidate)}
    made = []
    for row in record.get("candidates") or []:
        with contextlib.suppress(TypeError):  # of another version, with fields that this lacks
            made.append(Candidate(**{key: value for key, value in row.items() if key in known}))
    return made


def _sizes(manifest: Manifest) -> dict[str, int]:
    """Bytes on disk of every served model."""
    found = {}
    for name in manifest.models():
        files = (manifest.folder / "models" / name).rglob("*")
        found[name] = sum(path.stat().st_size for path in files if path.is_file())
    return found


def _damaged(why: str) -> SampError:
    return SampError(
        "damaged_repository", why, "the files that samp build wrote", "samp build again"
    )
