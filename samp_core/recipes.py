"""Which recipe each site gets: compared by what it does to a site's output, then to the model's.

`auto` makes a plan with each site's own best calibrator, one with scales per token where they lose
less, one with these or split outliers at the dearest sites and one with them everywhere, and puts
them beside every uniform recipe on search rows. The least KL + rate * milliseconds wins: what costs
time has to bring more than that time buys elsewhere. Other recipes of a site stay with `milp` as
variants, to choose among one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from samp_kernels.interface import GEMM_SITES

from samp_core import calibrate, chain
from samp_core.config import BuildConfig
from samp_core.errors import UsageError
from samp_core.plan import TOKEN_SITES, Plan, Recipe, Recipes, input_scale, mode_plan
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
EVERYWHERE = "per site, token or outliers everywhere"
SPLIT = Recipe(calibrator="mse", outliers=8)
"""The recipe of the variant chain.SPLIT."""
UNCOMPARED = Recipe(calibrator="percentile", percentile=99.99)
"""What every site gets where there was no time to compare anything."""
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


def choose(
    config: BuildConfig,
    bench: Workbench,
    calibration: Split,
    search: Split,
    stop: Callable[[], bool] = lambda: False,
) -> Chosen:
    """The recipes of a build: those asked for, or with `auto` what loses least for its time.

    After `stop` nothing more is compared: `left_out` of the record names what was not. Where plans
    may choose fp8 the float plan has its scales, too; without int8 its recipe is the only one.
    """
    ranges = bench.ranges(calibration)
    base = replace(bench.base_plan(), versions=versions())
    if not bench.quantizable("fp8"):
        return _int8(config, bench, ranges, base, calibration, search, stop)
    own = fp8_recipe(config)
    chosen = Chosen(own, base, {"chosen": title(own)})
    if bench.quantizable():
        chosen = _int8(config, bench, ranges, base, calibration, search, stop)
    scales = {**chosen.scaled.scales, **calibrate.fp8_scales(ranges, own)}
    record = {**chosen.record, "fp8": title(own)}
    return replace(chosen, scaled=replace(chosen.scaled, scales=scales), record=record)


def fp8_recipe(config: BuildConfig) -> Recipe:
    """One for every site: e4m3's steps are relative, so that the scale has little to gain."""
    able = config.calibrator in calibrate.FP8_CALIBRATORS
    return Recipe(
        activation="token" if config.activation == "token" else "static",
        calibrator=config.calibrator if able else "minmax",
        percentile=config.percentile if config.calibrator == "percentile" else None,
    )


def _int8(
    config: BuildConfig,
    bench: Workbench,
    ranges: calibrate.Ranges,
    base: Plan,
    calibration: Split,
    search: Split,
    stop: Callable[[], bool],
) -> Chosen:
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
    errors = measured_errors(bench, calibration, ranges, {**static, **extra}, stop)
    if not errors:
        return _uncompared(config, base, ranges, static)
    made = per_site(errors, static)
    found: dict[str, Recipes] = {PER_SITE: made}
    if TOKEN in extra:
        wins = per_site(errors, {**static, TOKEN: extra[TOKEN]})
        found[PER_TOKEN] = {**made, **{site: wins[site] for site in token_sites(list(wins))}}
    if extra:
        dear = {**made, **where_dear(errors, static, extra, SAVING)}
        found[DEAR] = dear
        found[EVERYWHERE] = {**made, **where_dear(errors, static, extra, 0.0)}
    if config.activation == "token":
        sites = dict.fromkeys(token_sites(list(made)), extra[TOKEN])
        found, static = {PER_TOKEN: {**made, **sites}}, {}
    trials = _Trials(config, bench, base, ranges, search, stop)
    best, rate = trials.best(static, found)
    record = {
        "chosen": best.name,
        "kl_per_ms": rate,
        "trials": [{"name": t.name, "kl": t.kl, "latency_ms": t.ms} for t in trials.made],
        "errors": errors,
        "left_out": trials.left_out,
    }
    return Chosen(best.recipes, with_scales(base, ranges, best.recipes), record)


def variants(
    config: BuildConfig,
    bench: Workbench,
    calibration: Split,
    full: Plan,
    record: Mapping[str, Any],
) -> tuple[dict[str, list[chain.Variant]], Plan]:
    """What `milp` may run at each GEMM beside its main recipe, by full name, and the plan with all
    their channels: more outliers, and where the recipe costs time a static scale without any.

    record: of `choose`. None where recipes were asked for or nothing was compared.
    """
    able = ("gemm", "outliers", "") in bench.backend.capabilities()
    errors: Errors = record.get("errors", {})
    if not able or not errors or config.calibrator != "auto" or config.activation != "auto":
        return {}, full
    main = {
        site: entry.recipe
        for site, entry in full.sites.items()
        if entry.precision == "int8" and entry.recipe and site.rsplit(".", 1)[1] in GEMM_SITES
    }
    ranges = bench.ranges(calibration)
    found: dict[str, list[chain.Variant]] = {site: [] for site in main}
    channels = dict(full.outliers)
    static = per_site(errors, uniform())
    for label, recipes in (
        (chain.SPLIT, {s: SPLIT for s, r in main.items() if r.outliers < SPLIT.outliers}),
        (chain.PLAIN, {s: static[s] for s, r in main.items() if costly(r)}),
    ):
        scales = calibrate.scales(ranges, recipes)
        channels |= calibrate.outliers(ranges, recipes)
        for site, recipe in recipes.items():
            scale = scales[input_scale(site, "int8")]
            found[site].append(chain.Variant(label, recipe, scale))
    return found, replace(full, outliers=channels)


def costly(recipe: Recipe) -> bool:
    """Whether it takes more time than a static scale."""
    return recipe.outliers > 0 or recipe.activation == "token"


def stopped_note(record: Mapping[str, Any]) -> list[str]:
    """What the time budget left uncompared, in words."""
    left = record.get("left_out")
    if not left:
        return []
    return [
        f"the time budget ended the comparison of calibrators: {record['chosen']} is in use, not "
        f"compared on all search rows: {', '.join(left)}"
    ]


def _uncompared(
    config: BuildConfig, base: Plan, ranges: calibrate.Ranges, static: Mapping[str, Recipe]
) -> Chosen:
    recipe = replace(UNCOMPARED, activation="token" if config.activation == "token" else "static")
    record = {"chosen": title(recipe), "left_out": [*static, PER_SITE]}
    return Chosen(recipe, with_scales(base, ranges, recipe), record)


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
    errors: Errors,
    static: Mapping[str, Recipe],
    extra: Mapping[str, Recipe],
    saving: float = SAVING,
) -> dict[str, Recipe]:
    """The best of `extra` at the sites where it takes off that share of what all sites cost."""
    best = {site: min(each[name] for name in static) for site, each in errors.items()}
    least = saving * sum(best.values())
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


class _Trials:
    """Everything in int8 under one choice of recipes after another, over the search rows."""

    def __init__(
        self,
        config: BuildConfig,
        bench: Workbench,
        base: Plan,
        ranges: calibrate.Ranges,
        search: Split,
        stop: Callable[[], bool],
    ) -> None:
        self._config, self._bench, self._base, self._ranges = config, bench, base, ranges
        self._search, self._stop = search, stop
        self._kl: dict[str, float] = {}
        self._plans: dict[str, Plan] = {}
        self.made: list[Trial] = []
        self.left_out: list[str] = []

    def best(
        self, static: Mapping[str, Recipe], found: Mapping[str, Recipes]
    ) -> tuple[Trial, float]:
        """Of the choices by site and the best uniform recipe the one to take, and the rate.

        rate: what KL a millisecond buys on average, from float to everything in int8. Choices by
        site come first: they nearly always win, and the time may end.
        """
        for name, recipes in found.items():
            self._compare(name, recipes)
        some = screening(self._bench, self._search)
        screened: dict[str, float] = {}
        for name, recipe in static.items():
            if self._stop():
                self.left_out.append(name)
            else:
                screened[name] = self._divergence(self._full(recipe), some, name)
        named = dict(found)
        if screened:
            first = min(screened, key=lambda name: screened[name])
            self._compare(first, static[first])
            named[first] = static[first]
        if not self._kl:
            name, recipes = next(iter(found.items()))
            return Trial(name, recipes, 0.0, 0.0), 0.0
        times, rate = self._times()
        self.made = [Trial(n, named[n], kl, times[n]) for n, kl in self._kl.items() if n in times]
        return min(self.made, key=lambda trial: trial.kl + rate * trial.ms), rate

    def _compare(self, name: str, recipes: Recipes) -> None:
        """Its KL over all search rows, once for equal plans, while there is time."""
        plan = self._full(recipes)
        if any(plan.key() == other.key() for other in self._plans.values()):
            return
        if self._stop():
            self.left_out.append(name)
            return
        self._plans[name] = plan
        self._kl[name] = self._divergence(plan, self._search, name)

    def _times(self) -> tuple[dict[str, float], float]:
        """Milliseconds of each choice, and the rate; without the time for it, of the plain alone.

        A static scale's value costs nothing: plans that differ in it alone have one time.
        """
        plans = self._plans
        timed = {_shape(plan): plan for plan in plans.values()}
        plain = min(plans, key=lambda name: len(_shape(plans[name])))
        if len(timed) == 1:
            return dict.fromkeys(plans, 0.0), 0.0
        if self._stop():
            same = [name for name in plans if _shape(plans[name]) == _shape(plans[plain])]
            self.left_out += [name for name in plans if name not in same]
            return dict.fromkeys(same, 0.0), 0.0
        each = {"float": self._base, **timed}
        mix = self._config.mix
        ms = self._bench.latencies(
            each, self._search, "what scales per token and outliers cost", tuple(mix)
        )
        weighed = {name: _weigh(found, mix) for name, found in ms.items()}
        times = {name: weighed[_shape(plan)] for name, plan in plans.items()}
        saved = weighed["float"] - times[plain]
        return times, self._kl[plain] / saved if saved > 0.0 else 0.0

    def _full(self, recipes: Recipes) -> Plan:
        scaled = with_scales(self._base, self._ranges, recipes)
        return mode_plan(scaled, "full", self._base.layers, self._bench.quantizable(), recipes)

    def _divergence(self, plan: Plan, split: Split, name: str) -> float:
        reference = self._bench.logits(self._bench.base_plan(), split, "search: float")
        logits = self._bench.logits(plan, split, f"compare calibrators: {name}")
        return self._bench.divergence(reference, logits)


def screening(bench: Workbench, search: Split) -> Split:
    """Up to SCREENED rows of a split, evenly spread."""
    rows: Rows = search.rows
    if rows.n <= SCREENED:
        return search
    places = np.linspace(0, rows.n - 1, SCREENED).astype(int).tolist()
    texts, labels = ([part[i] for i in places] for part in (rows.texts, rows.labels))
    return bench.split(make_rows(texts, labels, rows.source))


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
