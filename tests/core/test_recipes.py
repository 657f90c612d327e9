"""Recipes by site: what they cost, how they are compared, and what a named one does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from separable import small

from samp_core import calibrate, recipes
from samp_core.build import open_workbench, read_splits
from samp_core.chain import PLAIN, SPLIT
from samp_core.config import load_config
from samp_core.errors import UsageError
from samp_core.plan import Recipe, SitePlan, mode_plan
from samp_core.workbench import Split, Workbench, silent


class Opened:
    """The small model on the reference backend, which can do all that a recipe says."""

    def __init__(self, folder: Path, **fields: Any) -> None:
        self.config = load_config(
            small().yaml(
                folder / "b.yaml", out=str(folder / "out"),
                **{"backend": "reference", "calibrator": "auto", **fields},
            ),
            {},
        )  # fmt: skip
        self.bench: Workbench = open_workbench(self.config, silent)
        splits = read_splits(self.config, [])
        self.calibration: Split = self.bench.split(splits.calibration)
        self.search: Split = self.bench.split(splits.search)

    def choose(self) -> recipes.Chosen:
        return recipes.choose(self.config, self.bench, self.calibration, self.search)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return Opened(tmp_path_factory.mktemp("recipes"))


@pytest.fixture(scope="module")
def chosen(opened: Opened) -> recipes.Chosen:
    return opened.choose()


def test_the_choice_is_the_least_and_no_uniform_recipe_beats_it(chosen: recipes.Chosen) -> None:
    record = chosen.record
    trials = {t["name"]: t["kl"] + record["kl_per_ms"] * t["latency_ms"] for t in record["trials"]}
    assert record["chosen"] == min(trials, key=lambda name: trials[name])
    assert {recipes.PER_SITE} <= set(trials)
    by_site = {recipes.PER_SITE, recipes.PER_TOKEN, recipes.DEAR, recipes.EVERYWHERE}
    assert set(trials) - by_site <= set(recipes.uniform()), "one uniform recipe stands beside them"
    sites = {f"layer.{i}.{s}" for i in range(3) for s in ("qkv", "scores", "context", "out")}
    assert sites < set(record["errors"])
    scales = chosen.scaled.scales
    assert all(np.isfinite(list(scales.values())))
    assert len(scales) == 3 * (4 + 2 + 2), "of every site, so that any plan can be made"


class Steps:
    """A stop after so many questions."""

    def __init__(self, left: int) -> None:
        self.left = left

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


def test_without_time_nothing_is_compared(tmp_path: Path) -> None:
    opened = Opened(tmp_path)
    found = recipes.choose(
        opened.config, opened.bench, opened.calibration, opened.search, lambda: True
    )
    assert found.recipes == recipes.UNCOMPARED
    assert set(found.record["left_out"]) == {*recipes.uniform(), recipes.PER_SITE}
    assert len(found.scaled.scales) == 3 * (4 + 2 + 2)
    assert not list((tmp_path / "out" / "cache").glob("errors-*")), "a part is not kept"
    (note,) = recipes.stopped_note(found.record)
    assert "percentile 99.99 is in use" in note


def test_the_best_so_far_is_taken(opened: Opened, chosen: recipes.Chosen) -> None:
    """Whenever the time ends, what was compared decides, and the rest is named."""
    most = len(recipes.uniform()) + 7
    sizes = []
    for steps in range(most):
        found = recipes.choose(
            opened.config, opened.bench, opened.calibration, opened.search, Steps(steps)
        )
        record = found.record
        done = {trial["name"] for trial in record["trials"]}
        assert record["chosen"] in (done or {recipes.PER_SITE})
        assert not done & set(record["left_out"])
        assert bool(recipes.stopped_note(record)) == bool(record["left_out"])
        rate = record["kl_per_ms"]
        cost = {t["name"]: t["kl"] + rate * t["latency_ms"] for t in record["trials"]}
        assert not done or cost[record["chosen"]] == min(cost.values())
        sizes.append(len(record["left_out"]))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 0 < sizes[0]
    assert found.record == chosen.record


def test_a_cost_is_near_the_measured_divergence(opened: Opened) -> None:
    """Of sites whose loss is not noise, the second order is within a factor of three of the KL."""
    bench, coarse = opened.bench, Recipe(calibrator="percentile", percentile=60.0)
    ranges = bench.ranges(opened.calibration)
    errors = recipes.measured_errors(bench, opened.calibration, ranges, {"coarse": coarse})
    scaled = replace(bench.base_plan(), scales=calibrate.scales(ranges, coarse))
    reference = bench.logits(bench.base_plan(), opened.calibration, "float")
    ratios = []
    for site in sorted(errors, key=lambda site: -errors[site]["coarse"])[:6]:
        plan = replace(scaled, sites={**scaled.sites, site: SitePlan("int8", coarse)})
        logits = bench.logits(plan, opened.calibration, site)
        ratios.append(errors[site]["coarse"] / bench.divergence(reference, logits))
    assert 1 / 3 < float(np.median(ratios)) < 3, ratios


def test_per_site_and_where_dear() -> None:
    static = {name: Recipe(calibrator=name) for name in ("minmax", "mse")}
    extra = {
        recipes.TOKEN: Recipe(activation="token"),
        recipes.OUTLIERS: Recipe(calibrator="mse", outliers=4),
    }
    errors = {
        "layer.0.qkv": {"minmax": 9.0, "mse": 8.0, "token": 1.0, "mse 4 outliers": 2.0},
        "layer.0.scores": {"minmax": 1.0, "mse": 2.0, "token": 0.0, "mse 4 outliers": 2.0},
        "layer.0.ffn_out": {"minmax": 5.0, "mse": 6.0, "token": 0.0, "mse 4 outliers": 1.0},
        "layer.0.ffn_in": {"minmax": 0.1, "mse": 0.1, "token": 0.0, "mse 4 outliers": 0.0},
    }
    best = recipes.per_site(errors, static)
    assert [best[site].calibrator for site in errors] == ["mse", "minmax", "minmax", "minmax"]
    dear = recipes.where_dear(errors, static, extra)
    # A scale per token exists at qkv and ffn_in only; 0.1 of 14.1 is not worth its time.
    assert {site: recipes.title(r) for site, r in dear.items() if not site.endswith("scores")} == {
        "layer.0.qkv": "minmax token",
        "layer.0.ffn_out": "mse 4 outliers",
    }


def test_outliers_everywhere_meet_the_others(opened: Opened) -> None:
    """Of a model whose every GEMM has loud channels they leave next to nothing."""
    record = opened.choose().record
    names = {trial["name"] for trial in record["trials"]} | set(record["left_out"])
    assert recipes.EVERYWHERE in names


def test_variants_of_a_site(opened: Opened, chosen: recipes.Chosen) -> None:
    """More channels apart than the main recipe has, and none where it has some or token scales."""
    sites = opened.bench.quantizable()
    token, split = Recipe(activation="token"), Recipe(calibrator="mse", outliers=4)
    main = {"layer.0.qkv": token, "layer.0.out": split, "layer.0.ffn_in": Recipe("tensor")}
    made = {**dict(chosen.recipes), **main}
    ranges = opened.bench.ranges(opened.calibration)
    scaled = recipes.with_scales(chosen.scaled, ranges, made)
    full = mode_plan(scaled, "full", 3, sites, made)
    record, config = chosen.record, opened.config
    found, carrier = recipes.variants(config, opened.bench, opened.calibration, full, record)
    labels = {site: [variant.label for variant in some] for site, some in found.items()}
    assert labels["layer.0.qkv"] == labels["layer.0.out"] == [SPLIT, PLAIN]
    assert labels["layer.0.ffn_in"] == [SPLIT]
    assert not any("scores" in site or "context" in site for site in labels)
    assert carrier.key() == full.key(), "what the main recipes run is as it was"
    for site, some in found.items():
        for variant in some:
            entry = SitePlan("int8", variant.recipe)
            alone = recipes.with_scales(full, ranges, {site: variant.recipe})
            assert variant.scale == alone.scales[f"{site}.input_scale"]
            plan = replace(carrier, sites={**full.sites, site: entry})
            assert plan.split_channels(site) == sorted(alone.outliers.get(site, []))
    more = [v.scale for v in found["layer.0.out"]]
    assert more[0] < full.scales["layer.0.out.input_scale"], "louder channels are apart"
    for fields in ({"calibrator": "mse"}, {"activation": "static"}):
        asked = config.model_copy(update=fields)
        assert recipes.variants(asked, opened.bench, opened.calibration, full, record)[0] == {}
    assert recipes.variants(config, opened.bench, opened.calibration, full, {})[0] == {}


@pytest.mark.parametrize(
    ("fields", "title"),
    [
        ({"calibrator": "entropy"}, "entropy"),
        ({"calibrator": "mse", "activation": "token"}, "mse token"),
        ({"calibrator": "percentile", "percentile": 99.5}, "percentile 99.5"),
    ],
)
def test_a_named_calibrator_is_taken_as_it_is(
    fields: dict[str, Any], title: str, tmp_path: Path
) -> None:
    found = Opened(tmp_path, **fields).choose()
    assert found.record == {"chosen": title}
    assert recipes.stopped_note(found.record) == []
    assert isinstance(found.recipes, Recipe)
    assert recipes.title(found.recipes) == title


def test_no_scales_per_token_on_onednn(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="activation token on backend onednn; allowed: auto or st"):
        Opened(tmp_path, backend="onednn", activation="token").choose()
