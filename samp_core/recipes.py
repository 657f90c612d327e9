"""Which recipe each site gets: compared by what it does to a site's output, then to the model's.

`auto` makes a plan with each site's own best calibrator, one with scales per token where they lose
less, one with these or split outliers at the dearest sites, and puts them beside every uniform
recipe on search rows. The least KL + rate * milliseconds wins: what costs time has to bring more
than that time buys elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from samp_core import calibrate
from samp_core.config import BuildConfig
from samp_core.errors import UsageError
from samp_core.plan import TOKEN_SITES, Plan, Recipe, Recipes, mode_plan
from samp_core.rows import Rows, make_rows
from samp_core.site_errors import Errors, measured_errors
from samp_core.workbench import Split, Workbench, versions

PERCENTILES = (99.9, 99.97, 99.99, 99.995, 99.999)
SCREENED = 256
"""Search rows on which uniform recipes are compared; the best of them meets the rest on all."""
TOKEN = "token"
OUTLIERS = "mse 4 outliers"
PER_SITE = "per site"
PER_TOKEN = "per site and token"
DEAR = "per site, token or outliers where dear"
SAVING = 0.03
"""Share of the whole cost that a token scale or split channels have to take off at a site."""


@dataclass(frozen=True)
class Chosen:
    """The recipe of every site, the float plan with their scales, and how it came about."""

    recipes: Recipes
    scaled: Plan
    record: dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """Everything in int8 under these recipes: kl in nats a row, ms by the mix of the build."""

    name: str
    recipes: Recipes
    kl: float
    ms: float


def uniform(percentiles: Sequence[float] = PERCENTILES) -> dict[str, Recipe]:
    """Every calibrator with static scales, by the name that reports use."""
    made = [Recipe(calibrator="minmax")]
    made += [Recipe(calibrator="percentile", percentile=p) for p in percentiles]
    made += [Recipe(calibrator="mse"), Recipe(calibrator="entropy")]
    return {title(recipe): recipe for recipe in made}


def title(recipe: Recipe) -> str:
    """A recipe in two or three words."""
    words = [recipe.calibrator, *([f"{recipe.percentile:g}"] if recipe.percentile else [])]
    words += ["token"] if recipe.activation == "token" else []
    return " ".join(words + ([f"{recipe.outliers} outliers"] if recipe.outliers else []))


def choose(config: BuildConfig, bench: Workbench, calibration: Split, search: Split) -> Chosen:
    """The recipes of a build: those asked for, or with `auto` what loses least for its time."""
    ranges = bench.ranges(calibration)
    base = replace(bench.base_plan(), versions=versions())
    if config.activation == "token" and not per_token(bench):
        raise UsageError(
            "bad_config", f"activation token on backend {bench.backend_name}", "auto or static",
            "choose a backend with scales per token: cpu or reference",
        )  # fmt: skip
    if config.calibrator != "auto":
        asked = Recipe(
            activation="token" if config.activation == "token" else "static",
            calibrator=config.calibrator,
            percentile=config.percentile if config.calibrator == "percentile" else None,
        )
        return Chosen(asked, with_scales(base, ranges, asked), {"chosen": title(asked)})
    static = uniform()
    extra = {}
    if per_token(bench) and config.activation != "static":
        extra[TOKEN] = Recipe(activation="token")
    if config.activation == "auto" and ("gemm", "outliers", "") in bench.backend.capabilities():
        extra[OUTLIERS] = Recipe(calibrator="mse", outliers=4)
    errors = measured_errors(bench, calibration, ranges, {**static, **extra})
    made = per_site(errors, static)
    found: dict[str, Recipes] = {PER_SITE: made}
    if TOKEN in extra:
        wins = per_site(errors, {**static, TOKEN: extra[TOKEN]})
        found[PER_TOKEN] = {**made, **{site: wins[site] for site in token_sites(list(wins))}}
    if extra:
        found[DEAR] = {**made, **where_dear(errors, static, extra)}
    if config.activation == "token":
        sites = dict.fromkeys(token_sites(list(made)), extra[TOKEN])
        found, static = {PER_TOKEN: {**made, **sites}}, {}
    trials, rate = _trials(config, bench, base, ranges, search, static, found)
    best = min(trials, key=lambda trial: trial.kl + rate * trial.ms)
    record = {
        "chosen": best.name,
        "kl_per_ms": rate,
        "trials": [{"name": t.name, "kl": t.kl, "latency_ms": t.ms} for t in trials],
        "errors": errors,
    }
    return Chosen(best.recipes, with_scales(base, ranges, best.recipes), record)


def with_scales(base: Plan, ranges: calibrate.Ranges, recipes: Recipes) -> Plan:
    """The float plan with the scales and the split channels of these recipes."""
    scales, outliers = calibrate.scales(ranges, recipes), calibrate.outliers(ranges, recipes)
    return replace(base, scales=scales, outliers=outliers)


def per_site(errors: Errors, options: Mapping[str, Recipe]) -> dict[str, Recipe]:
    """The option of the least error at each site; the first of equals."""
    return {
        site: options[min(options, key=lambda name: each[name])] for site, each in errors.items()
    }


def where_dear(
    errors: Errors, static: Mapping[str, Recipe], extra: Mapping[str, Recipe]
) -> dict[str, Recipe]:
    """The best of `extra` at the sites where it takes off SAVING of what all sites cost."""
    best = {site: min(each[name] for name in static) for site, each in errors.items()}
    least = SAVING * sum(best.values())
    found = {}
    for site, each in errors.items():
        able = [n for n in extra if n != TOKEN or token_sites([site])]
        name = min(able, key=lambda n: each[n], default=None)
        if name is not None and best[site] - each[name] > least:
            found[site] = extra[name]
    return found


def token_sites(sites: Sequence[str]) -> list[str]:
    """The full names at which an activation scale per token can be."""
    return [site for site in sites if site.rsplit(".", 1)[1] in TOKEN_SITES]


def per_token(bench: Workbench) -> bool:
    """Whether the backend has activation scales per token."""
    return ("gemm", "int8", "token") in bench.backend.capabilities()


def _trials(
    config: BuildConfig,
    bench: Workbench,
    base: Plan,
    ranges: calibrate.Ranges,
    search: Split,
    static: Mapping[str, Recipe],
    found: Mapping[str, Recipes],
) -> tuple[list[Trial], float]:
    """The best uniform recipe and every choice by site over all search rows, and the rate.

    rate: what KL a millisecond buys on average, from float to everything in int8.
    """
    some = screening(bench, search)
    screened = {
        name: _kl(bench, _full(bench, base, ranges, recipe), some, name)
        for name, recipe in static.items()
    }
    first = min(screened, key=lambda name: screened[name]) if screened else None
    named: dict[str, Recipes] = {**({first: static[first]} if first else {}), **found}
    plans = {name: _full(bench, base, ranges, recipes) for name, recipes in named.items()}
    plans = {name: p for name, p in plans.items() if _first_of_equals(plans, name)}
    kl = {name: _kl(bench, plan, search, name) for name, plan in plans.items()}
    times = dict.fromkeys(plans, 0.0)
    rate = 0.0
    if len({_shape(plan) for plan in plans.values()}) > 1:
        # A static scale's value costs nothing: plans that differ in it alone have one time.
        timed = {_shape(plan): plan for plan in plans.values()}
        each = {"float": base, **timed}
        ms = bench.latencies(
            each, search, "what scales per token and outliers cost", tuple(config.mix)
        )
        weighed = {name: _weigh(found, config.mix) for name, found in ms.items()}
        times = {name: weighed[_shape(plan)] for name, plan in plans.items()}
        plain = min(plans, key=lambda name: len(_shape(plans[name])))
        saved = weighed["float"] - times[plain]
        rate = kl[plain] / saved if saved > 0.0 else 0.0
    return [Trial(name, named[name], kl[name], times[name]) for name in plans], rate


def screening(bench: Workbench, search: Split) -> Split:
    """Up to SCREENED rows of a split, evenly spread."""
    rows: Rows = search.rows
    if rows.n <= SCREENED:
        return search
    places = np.linspace(0, rows.n - 1, SCREENED).astype(int).tolist()
    texts, labels = ([part[i] for i in places] for part in (rows.texts, rows.labels))
    return bench.split(make_rows(texts, labels, rows.source))


def _full(bench: Workbench, base: Plan, ranges: calibrate.Ranges, recipes: Recipes) -> Plan:
    scaled = with_scales(base, ranges, recipes)
    return mode_plan(scaled, "full", base.layers, bench.quantizable(), recipes)


def _kl(bench: Workbench, plan: Plan, split: Split, name: str) -> float:
    reference = bench.logits(bench.base_plan(), split, "search: float")
    logits = bench.logits(plan, split, f"compare calibrators: {name}")
    return bench.divergence(reference, logits)


def _first_of_equals(plans: Mapping[str, Plan], name: str) -> bool:
    return next(n for n, plan in plans.items() if plan.key() == plans[name].key()) == name


def _shape(plan: Plan) -> str:
    """The sites with scales per token or split channels: what tells two plans' times apart."""
    found = {
        site: (entry.recipe.activation, entry.recipe.outliers)
        for site, entry in plan.sites.items()
        if entry.recipe is not None
    }
    return ", ".join(f"{site} {kind}" for site, kind in found.items() if kind != ("static", 0))


def _weigh(ms: Mapping[str, float], mix: Mapping[str, float]) -> float:
    return sum(mix[bucket] * ms[bucket] for bucket in mix) / sum(mix.values())
