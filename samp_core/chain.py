"""A plan as a chain of decisions: the nodes that a search sets, in the order in which they run.

A node is one GEMM, or `scores` and `context` of a layer together: one kernel runs both. Its
neighbours matter because an op writes its result in the type that the next node reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from samp_core.plan import QUANTIZED, Plan, Recipe, Recipes, SitePlan, input_scale, recipe_of

FLOAT = SitePlan("fp32")
SPLIT, PLAIN = "int8 split", "int8 plain"
"""Variants of an int8 site: with more of its input channels in fp32, and with none of them."""
VARIANTS = (SPLIT, PLAIN)


class Variant(NamedTuple):
    """Another int8 option of a GEMM than the main one; scale: of its input."""

    label: str
    recipe: Recipe
    scale: float


@dataclass(frozen=True)
class Node:
    """One decision: an option maps each site to what it runs.

    `options[0]` is fp32 everywhere; quantized ones come last, the main one behind the others.
    `variants`: those of the options that are no precision's main one, by place.
    """

    name: str
    layer: int
    sites: tuple[str, ...]
    options: tuple[Mapping[str, SitePlan], ...]
    variants: Mapping[int, Variant] = field(default_factory=dict)

    @property
    def precisions(self) -> tuple[str, ...]:
        """Of each option, that of the sites that it changes."""
        return tuple(
            next((e.precision for e in option.values() if e.precision != "fp32"), "fp32")
            for option in self.options
        )

    @property
    def labels(self) -> tuple[str, ...]:
        """What each option is called: its variant's label, else its precision."""
        names = list(self.precisions)
        for place, variant in self.variants.items():
            names[place] = variant.label
        return tuple(names)

    def up_to(self, label: str) -> Node:
        """The same with that option for its last; without it, with no quantized one."""
        if label in self.labels:
            last = self.labels.index(label)
            some = {place: v for place, v in self.variants.items() if place <= last}
            return replace(self, options=self.options[: last + 1], variants=some)
        kept = zip(self.options, self.precisions, strict=True)
        return replace(self, options=tuple(o for o, p in kept if p not in QUANTIZED), variants={})

    def scales(self, option: int) -> dict[str, float]:
        """Those in which an option differs from the plan that it is put into."""
        variant = self.variants.get(option)
        return {} if variant is None else {input_scale(self.name, "int8"): variant.scale}


def chain(
    layers: int,
    sites: Sequence[str],
    recipe: Recipes,
    halves: Sequence[str] = (),
    fp8: Sequence[str] = (),
    fp8_recipe: Recipes | None = None,
    variants: Mapping[str, Sequence[Variant]] | None = None,
) -> tuple[Node, ...]:
    """The nodes of an encoder; `sites` are the kinds that plans may have in int8, `halves` the
    floats beside fp32 that the backend can run everywhere, `fp8` the kinds that may be in fp8,
    `variants` other int8 options of GEMMs.
    """
    quantized = (("fp8", fp8, fp8_recipe or Recipe()), ("int8", sites, recipe))
    nodes = []
    for layer in range(layers):
        for name, kinds in (
            ("qkv", ("qkv",)),
            ("attention", ("scores", "context")),
            ("out", ("out",)),
            ("ffn_in", ("ffn_in",)),
            ("ffn_out", ("ffn_out",)),
        ):
            full = tuple(f"layer.{layer}.{kind}" for kind in kinds)
            options: list[Mapping[str, SitePlan]] = [dict.fromkeys(full, FLOAT)]
            options += [dict.fromkeys(full, SitePlan(half)) for half in halves]
            others: dict[int, Variant] = {}
            for precision, able, recipes in quantized:
                if any(kind in able for kind in kinds):
                    for variant in (variants or {}).get(full[0], ()) if precision == "int8" else ():
                        others[len(options)] = variant
                        options.append({full[0]: SitePlan(precision, variant.recipe)})
                    options.append(
                        {
                            site: SitePlan(precision, recipe_of(recipes, site))
                            if kind in able
                            else FLOAT
                            for site, kind in zip(full, kinds, strict=True)
                        }
                    )
            nodes.append(Node(f"layer.{layer}.{name}", layer, full, tuple(options), others))
    return tuple(nodes)


def plan_of(base: Plan, nodes: Sequence[Node], choice: Sequence[int]) -> Plan:
    """The plan in which each node runs the option of that place."""
    sites: dict[str, SitePlan] = {}
    scales = dict(base.scales)
    for node, option in zip(nodes, choice, strict=True):
        sites.update(node.options[option])
        scales.update(node.scales(option))
    return replace(base, sites=sites, mode=None, scales=scales)


def choice_of(plan: Plan, nodes: Sequence[Node]) -> tuple[int, ...]:
    """The options that a plan runs, by precision, and of two with one precision by recipe.

    ValueError if one of its sites runs something else.
    """
    chosen = []
    for node in nodes:
        wanted = {site: plan.precision(site) for site in node.sites}
        found = [
            index
            for index, option in enumerate(node.options)
            if {site: entry.precision for site, entry in option.items()} == wanted
        ]
        if not found:
            raise ValueError(f"{node.name}: {wanted} is none of {node.precisions}")
        same = [i for i in found if i in node.variants and _runs(plan, node.options[i])]
        chosen.append((same or found)[0 if same else -1])
    return tuple(chosen)


def _runs(plan: Plan, option: Mapping[str, SitePlan]) -> bool:
    return all(plan.sites.get(site) == entry for site, entry in option.items())


def path_cost(edges: Sequence[Sequence[Sequence[float]]], choice: Sequence[int]) -> float:
    """What the edges of a choice add up to, from the single start to the single end."""
    path = (0, *choice, 0)
    steps = zip(edges, path[:-1], path[1:], strict=True)
    return float(sum(edge[before][after] for edge, before, after in steps))
