"""What a build records of the plans that it serves: what ran, and each layer's error."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from samp_kernels.interface import pack_batch
from separable import small

from samp_core import calibrate
from samp_core.build import open_workbench, read_splits
from samp_core.config import load_config
from samp_core.observed import ROWS, observed
from samp_core.plan import Plan, Recipe, mode_plan
from samp_core.workbench import Split, Workbench

LAYERS = 3


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workbench, Split, dict[str, Plan]]:
    folder = tmp_path_factory.mktemp("observed")
    config = load_config(small().yaml(folder / "build.yaml", out=str(folder / "out")), {})
    bench = open_workbench(config, lambda title, steps: lambda: None)
    splits = read_splits(config, [])
    search = bench.split(splits.search)
    recipe = Recipe()
    ranges = bench.ranges(bench.split(splits.calibration))
    base = replace(bench.base_plan(), scales=calibrate.scales(ranges, recipe))
    sites = bench.quantizable()
    plans = {
        f"{kind}({k})": mode_plan(base, kind, k, sites, recipe)
        for kind, k in (("full", 1), ("ffn_only", 3), ("full", 3))
    }
    return bench, search, {"float": bench.base_plan(), **plans}


def test_what_ran_is_what_the_plan_says(
    measured: tuple[Workbench, Split, dict[str, Plan]],
) -> None:
    bench, search, plans = measured
    found = observed(bench, plans, search)
    assert set(found) == set(plans)
    for name, plan in plans.items():
        executed = found[name]["executed"]
        assert len(executed) == 6 * LAYERS
        assert executed == {site: plan.precision(site) for site in executed}
        assert found[name]["rows"] == ROWS
    again = observed(bench, plans, search)
    assert again == found


def test_the_error_begins_where_int8_does(
    measured: tuple[Workbench, Split, dict[str, Plan]],
) -> None:
    bench, search, plans = measured
    found = {n: o["layer_error"] for n, o in observed(bench, plans, search).items()}
    assert found["float"] == [0.0] * LAYERS
    for name in ("full(1)", "ffn_only(3)", "full(3)"):
        assert all(0.0 < error < 2.0 for error in found[name]), name
    # The same first layer, whatever comes after it.
    assert np.isclose(found["full(1)"][0], found["full(3)"][0], rtol=0.05)
    assert found["full(1)"][-1] < found["full(3)"][-1]


def test_the_last_error_is_that_of_the_features(
    measured: tuple[Workbench, Split, dict[str, Plan]],
) -> None:
    """By hand, over whole passes of the served sessions, one text at a time."""
    bench, search, plans = measured
    pieces = bench.pieces(search)
    places = np.unique(np.linspace(0, len(pieces) - 1, ROWS).astype(int)).tolist()
    noise = signal = 0.0
    for place in places:
        batch = pack_batch([pieces[place].ids], [pieces[place].types])
        before = bench.session(plans["float"]).run(batch).astype(float)
        after = bench.session(plans["full(3)"]).run(batch)
        noise += float(((after - before) ** 2).sum())
        signal += float((before**2).sum())
    error = observed(bench, plans, search)["full(3)"]["layer_error"][-1]
    assert np.isclose(error, (noise / signal) ** 0.5, rtol=0.02)


def test_a_text_less_than_asked_for(
    measured: tuple[Workbench, Split, dict[str, Plan]], tmp_path: Path
) -> None:
    bench, search, plans = measured
    few = Split(search.rows, search.encodings[:5], search.gold[:5])
    found = observed(replace(bench, cache=type(bench.cache)(tmp_path)), plans, few)
    assert {entry["rows"] for entry in found.values()} == {5}
