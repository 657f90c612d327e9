"""A plan as a chain of decisions: the nodes that a search sets, in the order in which they run.

A node is one GEMM, or `scores` and `context` of a layer together: one kernel runs both. Its
neighbours matter because an op writes its result in the type that the next node reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from samp_core.plan import QUANTIZED, Plan, Recipe, Recipes, SitePlan, recipe_of

FLOAT = SitePlan("fp32")


@dataclass(frozen=True)
class Node:
    """One decision: an option maps each site to what it runs.

    `options[0]` is fp32 everywhere; quantized ones come last, the main one behind the others.
    """

    name: str
    layer: int
    sites: tuple[str, ...]
    options: tuple[Mapping[str, SitePlan], ...]

    @property
    def precisions(self) -> tuple[str, ...]:
        """What each option is called: the precision of the sites that it changes."""
        return tuple(
            next((e.precision for e in option.values() if e.precision != "fp32"), "fp32")
            for option in self.options
        )

    def up_to(self, precision: str) -> Node:
        """The same with that precision for its last option; without it, with no quantized one."""
        names = self.precisions
        if precision in names:
            return replace(self, options=self.options[: names.index(precision) + 1])
        kept = [o for o, name in zip(self.options, names, strict=True) if name not in QUANTIZED]
        return replace(self, options=tuple(kept))

    @property
    def quantizable(self) -> bool:
        """Whether the last option is a quantized one."""
        return any(entry.precision in QUANTIZED for entry in self.options[-1].values())


def chain(
    layers: int,
    sites: Sequence[str],
    recipe: Recipes,
    halves: Sequence[str] = (),
    fp8: Sequence[str] = (),
    fp8_recipe: Recipes | None = None,
) -> tuple[Node, ...]:
    """The nodes of an encoder; `sites` are the kinds that plans may have in int8, `halves` the
    floats beside fp32 that the backend can run everywhere, `fp8` the kinds that may be in fp8.
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
            for precision, able, recipes in quantized:
                if any(kind in able for kind in kinds):
                    options.append(
                        {
                            site: SitePlan(precision, recipe_of(recipes, site))
                            if kind in able
                            else FLOAT
                            for site, kind in zip(full, kinds, strict=True)
                        }
                    )
            nodes.append(Node(f"layer.{layer}.{name}", layer, full, tuple(options)))
    return tuple(nodes)


def plan_of(base: Plan, nodes: Sequence[Node], choice: Sequence[int]) -> Plan:
    """The plan in which each node runs the option of that place."""
    sites: dict[str, SitePlan] = {}
    for node, option in zip(nodes, choice, strict=True):
        sites.update(node.options[option])
    return replace(base, sites=sites, mode=None)


def choice_of(plan: Plan, nodes: Sequence[Node]) -> tuple[int, ...]:
    """The options that a plan runs. ValueError if one of its sites runs something else."""
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
        chosen.append(found[0])
    return tuple(chosen)


def path_cost(edges: Sequence[Sequence[Sequence[float]]], choice: Sequence[int]) -> float:
    """What the edges of a choice add up to, from the single start to the single end."""
    path = (0, *choice, 0)
    steps = zip(edges, path[:-1], path[1:], strict=True)
    return float(sum(edge[before][after] for edge, before, after in steps))
