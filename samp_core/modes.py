"""SAMP's modes over a chosen order of layers: ffn_only(k) and full(k), and gemms(k) between them.

gemms(k) is every GEMM of the first k layers of that order, with attention in float: most of what
full(k) saves, where int8 attention is what costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from samp_kernels.interface import GEMM_SITES

from samp_core import evaluate
from samp_core.chain import FLOAT
from samp_core.plan import Plan, SitePlan
from samp_core.sensitivity import Score

KINDS = ("ffn_only", "gemms", "full")


def layer_order(how: str, layers: int, scores: Mapping[str, Score]) -> list[int]:
    """Layers in the order in which they are quantized: `first`, `last`, or least loss first.

    A layer's loss is the sum of its nodes' cheap scores: fisher, else noise power.
    """
    if how == "first":
        return list(range(layers))
    if how == "last":
        return list(range(layers))[::-1]
    loss = [0.0] * layers
    for name, score in scores.items():
        loss[int(name.split(".")[1])] += score.cheap
    return sorted(range(layers), key=lambda layer: (loss[layer], layer))


def modes(
    full: Plan, order: Sequence[int], title: str = "", rest: SitePlan = FLOAT
) -> dict[str, Plan]:
    """Name -> plan, from `full`, in which every site that can be is quantized.

    `title` names an order that is not first to last: full(2, last). Without attention among the
    sites gemms(k) is full(k) and left out. `rest` is what the other sites run, as in SAMP fp16
    where the device has it.
    """
    able = {site.rsplit(".", 1)[1] for site in full.quantized_sites()}
    kinds = {
        "ffn_only": {site for site in able if site.startswith("ffn_")},
        "gemms": able & set(GEMM_SITES),
        "full": able,
    }
    if not able:
        return {}
    if kinds["gemms"] == able:
        del kinds["gemms"]
    made = {}
    for kind, chosen in kinds.items():
        for k in range(1, len(order) + 1):
            layers = set(order[:k])
            sites = {
                site: entry if _within(site, layers, chosen) else rest
                for site, entry in full.sites.items()
            }
            name = f"{kind}({k}, {title})" if title else f"{kind}({k})"
            made[name] = replace(full, sites=sites, mode=name)
    return made


def _within(site: str, layers: set[int], kinds: set[str]) -> bool:
    _, layer, kind = site.split(".")
    return int(layer) in layers and kind in kinds


def correlations(scores: Iterable[Score]) -> dict[str, float | None]:
    """Spearman's rank correlation of each cheap score with the measured KL; None for too few."""
    kinds: Mapping[str, Callable[[Score], float | None]] = {
        "fisher": lambda s: s.fisher,
        "signed": lambda s: None if s.signed is None else abs(s.signed),
        "signed_whole": lambda s: None if s.signed_whole is None else abs(s.signed_whole),
        "sqnr": lambda s: -s.sqnr_db,
    }
    known = [score for score in scores if score.kl is not None]
    result: dict[str, float | None] = {}
    for name, value in kinds.items():
        pairs = [(a, s.kl or 0.0) for s in known if (a := value(s)) is not None]
        enough = len(pairs) >= 3
        result[name] = round(evaluate.spearman(*zip(*pairs, strict=True)), 4) if enough else None
    return result
