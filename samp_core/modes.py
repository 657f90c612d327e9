"""SAMP's modes over a chosen order of layers: ffn_only(k) and full(k), and gemms(k) between them.

gemms(k) is every GEMM of the first k layers of that order, with attention in float: most of what
full(k) saves, where int8 attention is what costs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from samp_kernels.interface import GEMM_SITES

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
