"""Why a tier's plan is as it is, in words: from plan.json and the search's record in build.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from samp_core.chain import VARIANTS, Variant, chain, choice_of
from samp_core.costs import CostTable
from samp_core.errors import SampError
from samp_core.latency import foretold
from samp_core.manifest import read_manifest
from samp_core.plan import QUANTIZED, Plan, Recipe

NARROW = (*QUANTIZED, *VARIANTS)


def explain(out: Path, tier: str) -> dict[str, Any]:
    """`{tier, plan, facts[], sites: [{site, precision, saves_ms, kl, rank, why}]}` of a build.

    saves_ms: what the site's quantized precision saves with its neighbours as they are, changes of
    type included (a float site's: int8, else fp8); kl: what it loses alone, in nats; rank: 1 is the
    dearest. `sites` is empty where no search per site was made.
    """
    manifest = read_manifest(out)
    entry = manifest.tiers[manifest.chosen([tier])[0]]
    path = manifest.folder / "models" / entry.encoder / "1" / "plan.json"
    plan = Plan.from_json(path.read_text(encoding="utf-8"), str(path))
    try:
        record = json.loads((manifest.folder / "build.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SampError(
            "damaged_repository", f"build.json: {error}", "the one that samp build wrote",
            "samp build again",
        ) from None  # fmt: skip
    search = record.get("search") or {}
    sites = _sites(plan, search) if search.get("quantizable") or search.get("fp8") else []
    return {
        "tier": tier,
        "plan": plan.summary(),
        "facts": [*_facts(plan, search), *_totals(sites)],
        "sites": sites,
    }


def _facts(plan: Plan, search: Mapping[str, Any]) -> list[str]:
    """The promise, its tests, and the latencies foretold and measured."""
    wish, measured = plan.search.get("wish", {}), plan.measured
    facts = []
    if not measured:
        return [f"{plan.summary()}; it was not built by a search"]
    value, reference = 100 * measured["value"], 100 * measured["float_value"]
    facts.append(
        f"{measured['metric']} {value:.2f}%, float {reference:.2f}%: "
        f"{reference - value:+.2f} points lost, at most {100 * measured['drop_bound']:.2f} "
        f"({100 * (1 - measured['alpha']):g}% bound, rows that the search never saw)"
    )
    if wish.get("drop"):
        facts.append(f"promised: at most {wish['drop']:g} points")
    if wish.get("latency"):
        facts.append(f"promised: at most {wish['latency']:g} ms")
    for test in measured.get("tests", []):
        word = "held" if test["passed"] else "failed, and ended the sequence"
        facts.append(
            f"tested {test['plan']}: {test['b']} worse, {test['c']} better of {test['n']:,}; bound "
            f"{100 * test['bound']:.2f} points against {100 * test['promise']:g}: {word}"
        )
    for bucket, ms in foretold(plan.modelled).items():
        again = measured["latency_ms"].get(bucket)
        if again:
            facts.append(
                f"batch of {bucket}: {ms:.3f} ms foretold, {again:.3f} ms measured "
                f"({100 * (ms / again - 1):+.1f}%)"
            )
    if search.get("sites"):
        facts.append(
            f"strategy {search['strategy']}: {search['measured']} of {search['nodes']} sites "
            f"measured; rank correlation of the cheap scores with them: "
            + ", ".join(f"{name} {value}" for name, value in search["rank_correlation"].items())
        )
    return facts


def _totals(sites: Sequence[Mapping[str, Any]]) -> list[str]:
    """What quantization brings and what the sites kept in float would."""
    quantized = [site for site in sites if site["precision"] in NARROW]
    kept = [site for site in sites if site not in quantized]
    if not sites:
        return []
    return [
        f"{len(quantized)} of {len(sites)} sites quantized, {sum(s['kl'] for s in quantized):.2g} "
        f"nats added up; the {len(kept)} others would add {sum(s['kl'] for s in kept):.2g}"
    ]


def _sites(plan: Plan, search: Mapping[str, Any]) -> list[dict[str, Any]]:
    halves = search.get("halves", ())
    variants = {
        site: [Variant(label, Recipe(**recipe), 1.0) for label, recipe in some]
        for site, some in (search.get("variants") or {}).items()
    }
    nodes = chain(
        plan.layers, search["quantizable"], Recipe(), halves, search.get("fp8") or (), Recipe(),
        variants,
    )  # fmt: skip
    plain = int(bool(halves))  # int8 is held against fp16 where the device has it
    table = CostTable(
        {bucket: found["edges"] for bucket, found in search["costs"].items()},
        {bucket: found["base_ms"] for bucket, found in search["costs"].items()},
    )
    listed = [search["sites"], *(search.get("more") or {}).values()]
    scores = {(one["node"], one["precision"]): one for part in listed for one in part}
    rank = {
        (one["node"], one["precision"]): place
        for part in listed
        for place, one in enumerate(sorted(part, key=lambda o: -o["estimate"]), start=1)
    }
    choice = choice_of(plan, nodes)
    bucket = next(iter(table.edges))
    whole = table.total([0] * len(nodes), bucket)
    made = []
    for index, node in enumerate(nodes):
        ran = node.labels[choice[index]]
        quantized = ran if ran in NARROW else node.labels[-1]
        key = (node.name, quantized)
        if key not in scores:
            continue
        changed, without = list(choice), list(choice)
        changed[index], without[index] = node.labels.index(quantized), plain
        saves = table.total(without, bucket) - table.total(changed, bucket)
        facts = {
            "site": node.name,
            "precision": ran,
            "saves_ms": saves,
            "kl": scores[key]["estimate"],
            "measured": scores[key]["kl"] is not None,
            "rank": rank[key],
        }
        made.append({**facts, "why": _why(quantized, facts, saves / whole, len(search["sites"]))})
    return made


def _why(quantized: str, facts: Mapping[str, Any], share: float, count: int) -> str:
    """One site in words. `quantized`: what it runs, or what it would run."""
    place = "the dearest" if facts["rank"] == 1 else f"number {facts['rank']}"
    loss = f"{facts['kl']:.1e} nats, {place} of {count}" + (
        "" if facts["measured"] else ", not measured but estimated"
    )
    saving = f"{facts['saves_ms']:.3f} ms ({100 * share:.1f}% of float)"
    if facts["precision"] in NARROW:
        if facts["saves_ms"] <= 0.0:
            return f"{facts['precision']} though it saves nothing by the table; it loses {loss}"
        return f"{facts['precision']}: saves {saving}, loses {loss}"
    if facts["saves_ms"] <= 0.0:
        lost = f"({-facts['saves_ms']:+.3f} ms)"
        return f"{facts['precision']}: {quantized} saves nothing here {lost}"
    return f"{facts['precision']}: {quantized} would save {saving} and lose {loss}"
