"""The search over nodes: proposals on a planted device, time budgets, builds that are stopped."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forked import forks, wait_for
from hypothesis import given
from hypothesis import strategies as st
from separable import small

from samp_core import costs, milp, rivals, sensitivity
from samp_core import found as found_module
from samp_core.allocate import drop_sequence, last_fit, predicted_bound, safe_bound
from samp_core.budget import Clock
from samp_core.build import open_workbench, plan_modes, read_splits
from samp_core.chain import PLAIN, Variant, chain, choice_of, path_cost
from samp_core.config import BuildConfig, load_config
from samp_core.costs import CostTable, weigh
from samp_core.evaluate import spearman
from samp_core.found import Found
from samp_core.lower_loss import loss_report
from samp_core.metrics import Accuracy
from samp_core.modes import correlations
from samp_core.plan import Plan, Recipe
from samp_core.search import Search
from samp_core.sensitivity import Score
from samp_core.tiers import FLOAT
from samp_core.workbench import Split, Workbench, silent

N = 800
TIERS = {"high": {"drop": 1.0}, "fast": {"drop": 4.0}}


class Planted:
    """Searches of the small model on a device whose times are made up, edge by edge."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = self.configured("milp")
        self.bench: Workbench = open_workbench(self.config, silent)
        splits = read_splits(self.config, [])
        self.split: Split = self.bench.split(splits.search)
        self.held: Split = self.bench.split(splits.verification)
        calibration = self.bench.split(splits.calibration)
        self.modes: dict[str, Plan] = plan_modes(self.config, self.bench, calibration, self.split)

    def configured(self, strategy: str, **fields: Any) -> BuildConfig:
        yaml = small().yaml(
            self.folder / f"{strategy}.yaml", out=str(self.folder / "out"),
            **{"strategy": strategy, "tiers": TIERS, "backend": "onednn", **fields},
        )  # fmt: skip
        return load_config(yaml, {})

    def searched(
        self,
        strategy: str,
        clock: Clock | None = None,
        variants: dict[str, list[Variant]] | None = None,
        **fields: Any,
    ) -> tuple[Search, Found]:
        made = Search(
            self.configured(strategy, **fields), self.bench, self.modes["full(3)"], self.split,
            Accuracy(), N, clock or Clock(time.perf_counter(), 3600.0), variants,
        )  # fmt: skip
        return made, made.run()


def table(nodes: Any) -> CostTable:
    """Random milliseconds: int8 pays at most nodes, not at all; a change of type costs."""
    rng = np.random.default_rng(7)
    counts = [1, *(len(node.options) for node in nodes), 1]
    edges = []
    for before, after in pairwise(counts):
        edge = rng.uniform(0.5, 1.0, (before, 1))
        edge[1:] = edge[0] * rng.uniform(0.3, 1.2)
        if before == 3:  # a variant
            edge[1] *= 0.8
        change = np.abs(np.subtract.outer(np.arange(before), np.arange(after)))
        edges.append(tuple(map(tuple, (edge + 0.1 * (change > 0)).tolist())))
    return CostTable({"1": tuple(edges)}, {"1": 0.3})


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Planted]:
    made = Planted(tmp_path_factory.mktemp("planted"))
    if len(made.modes) == 1:
        pytest.skip("no int8 on this CPU")
    yield made
    made.bench.close()


@pytest.fixture
def device(planted: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole plans take what the table says, but for a part that no table knows."""

    def latencies(plans: Any, split: Any, title: str, buckets: Any, known: Any = None) -> Any:
        nodes = asked[0]
        made = table(nodes)
        return {
            name: {"1": made.total(choice_of(plan, nodes), "1") * 1.01}
            for name, plan in plans.items()
        }

    def measured(bench: Any, base: Any, nodes: Any, split: Any, mix: Any, stop: Any) -> CostTable:
        asked.append(nodes)
        return table(nodes)

    asked: list[Any] = [chain(3, planted.bench.quantizable(), Recipe())]
    monkeypatch.setattr(costs, "measured", measured)
    monkeypatch.setattr(planted.bench, "latencies", latencies)


@pytest.mark.usefixtures("device")
def test_milp_is_as_fast_as_any_other_strategy_at_every_promise(planted: Planted) -> None:
    _, found = planted.searched("milp")
    _, greedy = planted.searched("greedy")
    _, samp = planted.searched("samp")
    others = {"samp": list(samp.candidates.values()), "greedy": list(greedy.candidates.values())}
    gained = 0
    for promise in (0.01, 0.04):
        best = {
            who: min(c.latency_ms for c in some if c.timed and predicted_bound(c, N) <= promise)
            for who, some in {**others, "milp": list(found.candidates.values())}.items()
        }
        assert best["milp"] <= min(best["samp"], best["greedy"])
        gained += best["milp"] < min(best["samp"], best["greedy"])
    assert gained, "the instance is so easy that the test shows nothing"


@pytest.mark.usefixtures("device")
def test_milp_looks_at_what_greedy_would_and_tests_what_it_would(planted: Planted) -> None:
    _, found = planted.searched("milp")
    _, greedy = planted.searched("greedy")
    assert found.greedy is not None
    assert not found.greedy.cut
    assert found.greedy.candidates == greedy.candidates
    assert len(greedy.candidates) > 4
    assert set(greedy.candidates) < set(found.candidates)
    for name, candidate in greedy.candidates.items():
        assert found.plans[name].key() == greedy.plans[name].key()
        assert found.candidates[name].timed >= candidate.timed
    assert found.record["greedy"][0] == FLOAT
    reference, every = found.candidates[FLOAT], list(found.candidates.values())
    for promise in (0.01, 0.04):
        theirs = drop_sequence(list(greedy.candidates.values()), reference, promise, N)
        ours = rivals.sequence(found.greedy, every, reference, promise, N)
        assert [c.name for c in ours[: len(theirs)]] == [c.name for c in theirs]
        assert len(ours) <= len(theirs) + 2


@pytest.mark.usefixtures("device")
def test_greedys_plans_that_the_time_left_out_are_known_to_be(planted: Planted) -> None:
    """Its walk stops where a look comes too late, and goes on from there when there is time."""
    made, found = planted.searched("milp")
    made._found = Found({FLOAT: found.plans[FLOAT]}, {FLOAT: found.candidates[FLOAT]})
    looks, look = [], made._look

    def late(name: str, plan: Plan) -> Any:
        looks.append(name)
        return None if len(looks) == 4 else look(name, plan)

    made._look = late  # type: ignore[method-assign]
    first = made._reverted(lambda: False)
    assert first == [name if name != "greedy(0)" else "full(3)" for name in looks[:3]]
    assert made._cut
    made._look = look  # type: ignore[method-assign]
    before = len(made._found.plans)
    assert made._reverted(lambda: True) == first
    assert made._cut
    assert len(made._found.plans) == before
    whole = made._reverted(lambda: False)
    assert whole[:3] == first
    assert whole == [name for name in found.plans if name in whole]
    assert not made._cut
    assert len(whole) > 4


@pytest.mark.usefixtures("device")
def test_a_greedy_build_takes_the_readings_of_the_clock_that_milp_took(
    planted: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    plain = planted.bench.latencies

    def latencies(plans: Any, split: Any, title: str, buckets: Any, known: Any = None) -> Any:
        asked.append({"plans": set(plans), "known": known})
        return plain(plans, split, title, buckets)

    monkeypatch.setattr(planted.bench, "latencies", latencies)
    planted.searched("milp")
    kept = [call for call in asked if call["known"] is not None]
    assert kept
    assert all(call["plans"] <= set(call["known"]) for call in kept)
    asked.clear()
    planted.searched("greedy")
    (own,) = (call["plans"] for call in asked)
    assert all(call["plans"] == own for call in kept)


@pytest.mark.usefixtures("device")
def test_no_plan_of_the_same_loss_is_modelled_faster(planted: Planted) -> None:
    made, found = planted.searched("milp")
    edges = made.table.weighted({"1": 1.0})
    _, greedy = planted.searched("greedy")
    for name, plan in {**greedy.plans, **planted.modes}.items():
        choice = choice_of(plan, made.nodes)
        best = milp.solve(edges, made.lost.table, milp.lost(made.lost.table, choice) * (1 + 1e-9))
        assert best.cost <= path_cost(edges, choice) + 1e-6, name
    proposed = [name for name in found.plans if name.startswith("milp-")]
    assert len(proposed) >= 4
    for name in proposed:
        # What whole plans take on this device, a hundredth more than its table says.
        expected = table(made.nodes).total(choice_of(found.plans[name], made.nodes), "1") * 1.01
        assert found.modelled[name]["latency_ms"]["1"] == pytest.approx(expected, rel=5e-3)
        candidate = found.candidates[name]
        assert candidate.latency_ms == pytest.approx(
            expected, rel=1e-6 if candidate.timed else 2e-3
        )


@pytest.mark.usefixtures("device")
def test_milp_chooses_among_variants_and_greedy_does_not(planted: Planted) -> None:
    """A calibrator that clips more, and a time of its own."""
    recipe = Recipe(calibrator="percentile", percentile=99.0)
    full = planted.modes["full(3)"]
    variants = {
        site: [Variant(PLAIN, recipe, 0.7 * full.scales[f"{site}.input_scale"])]
        for site in full.quantized_sites()
    }
    made, found = planted.searched("milp", None, variants)
    assert {label for node in made.nodes for label in node.labels} == {"fp32", PLAIN, "int8"}
    assert set(made.lost.more) == {PLAIN}
    proposed = [name for name in found.plans if name.startswith("milp-")]
    mixed = 0
    for name in proposed:
        plan, choice = found.plans[name], choice_of(found.plans[name], made.nodes)
        for node, option in zip(made.nodes, choice, strict=True):
            if node.labels[option] == PLAIN:
                assert plan.sites[node.name].recipe == recipe
                assert plan.scales[f"{node.name}.input_scale"] == variants[node.name][0].scale
        told = found.modelled[name]["kl"]
        assert told == pytest.approx(milp.lost(made.lost.table, choice))
        ran = {n.labels[option] for n, option in zip(made.nodes, choice, strict=True)}
        mixed += ran == {"fp32", PLAIN, "int8"}
    assert mixed, "no plan has all three: the test shows nothing"
    assert found.record["variants"]["layer.0.qkv"] == [[PLAIN, asdict(recipe)]]
    _, greedy = planted.searched("greedy", None, variants)
    for plan in greedy.plans.values():
        assert all(entry.recipe in (None, Recipe()) for entry in plan.sites.values())


@pytest.mark.usefixtures("device")
def test_plans_measured_again_tell_each_others_pace(planted: Planted) -> None:
    made, found = planted.searched("milp")
    anchors = found.anchors()
    assert FLOAT in anchors
    assert min(found.candidates.values(), key=lambda c: c.latency_ms).name in anchors
    assert 3 <= len(anchors) <= found_module.ANCHORS + 1
    told = {name: found.modelled[name]["latency_ms"]["1"] for name in anchors}
    paces = found.paces({name: {"1": 1.3 * ms} for name, ms in told.items()})
    assert set(paces) == set(anchors)
    for name in anchors:
        assert paces[name]["1"] == pytest.approx(1.3, rel=0.05)
    _, samp = planted.searched("samp")
    assert samp.anchors() == []
    assert samp.paces({FLOAT: {"1": 1.0}}) == {}
    assert made.table is found.table


@pytest.mark.usefixtures("device")
def test_greedy_gives_the_dearest_sites_back_one_by_one(planted: Planted) -> None:
    made, found = planted.searched("greedy")
    kl = {s.node: s.kl for s in made.lost.scores.values()}
    order = sorted(kl, key=lambda name: -(kl[name] or 0.0))
    steps = [found.plans["full(3)"], *(p for n, p in found.plans.items() if n[:6] == "greedy")]
    assert len(steps) >= 3
    for count, plan in enumerate(steps):
        chosen = choice_of(plan, made.nodes)
        fp32 = {n.name for n, o in zip(made.nodes, chosen, strict=True) if o == 0}
        assert fp32 & set(kl) == set(order[:count])
    logits = [planted.bench.logits(p, planted.split, "") for p in (planted.modes[FLOAT], steps[-1])]
    last = Accuracy().candidate("", 0.0, *logits, planted.split)
    enough = safe_bound(found.candidates[FLOAT], 0.01, N)
    assert predicted_bound(last, N) <= enough or len(steps) == len(order) + 1


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("order", ["first", "last", "sensitivity"])
def test_samp_over_an_order_of_layers(planted: Planted, order: str) -> None:
    made, found = planted.searched("samp", order=order)
    title = "" if order == "first" else f", {order}"
    names = [f"{kind}({k}{title})" for kind in ("ffn_only", "full") for k in (1, 2, 3)]
    whole = f"full(3{title})"
    assert list(found.candidates) == [FLOAT, *names]
    layers = found.record["layers"]
    wanted = {"first": [0, 1, 2], "last": [2, 1, 0]}.get(order, layers)
    assert layers == wanted
    assert sorted(layers) == [0, 1, 2]
    for k in (1, 2, 3):
        sites = found.plans[f"full({k}{title})"].quantized_sites()
        assert {int(site.split(".")[1]) for site in sites} == set(layers[:k])
    assert found.plans[whole].key() == planted.modes["full(3)"].key()
    if order == "sensitivity":
        scores = made.lost.scores
        loss = [sum(s.cheap for n, s in scores.items() if f".{i}." in n) for i in range(3)]
        assert layers == sorted(range(3), key=lambda layer: loss[layer])
    assert all(c.timed for c in found.candidates.values())


@pytest.mark.usefixtures("device")
def test_a_tier_without_a_wish_sees_every_mode(planted: Planted) -> None:
    _, found = planted.searched("milp", tiers={"free": {}})
    assert set(planted.modes) <= {name for name, c in found.candidates.items() if c.timed}


@pytest.mark.usefixtures("device")
def test_only_plans_that_another_beats_clearly_are_not_timed(planted: Planted) -> None:
    _, found = planted.searched("milp")
    candidates = list(found.candidates.values())
    untimed = [c for c in candidates if not c.timed]
    assert untimed, "every plan was timed: the test shows nothing"
    for hopeless in untimed:
        assert any(
            c.timed
            and predicted_bound(c, N) <= predicted_bound(hopeless, N)
            and c.latency_ms < 0.92 * hopeless.latency_ms
            for c in candidates
        )
    kls = {name: c.kl for name, c in found.candidates.items()}
    assert kls[FLOAT] == 0.0
    assert all(kl > 0.0 for name, kl in kls.items() if name != FLOAT)


@pytest.mark.usefixtures("device")
def test_lower_loss_takes_the_sites_that_help(planted: Planted) -> None:
    made, found = planted.searched("lower-loss")
    helpful = {n for n, s in made.lost.scores.items() if (s.signed_whole or 0.0) < 0.0}
    proposed = [name for name in found.plans if name.startswith("lower-loss")]
    assert 0 < len(helpful) < len(made.lost.scores)
    assert proposed[0] == f"lower-loss({len(helpful)})"
    for name in proposed:
        chosen = choice_of(found.plans[name], made.nodes)
        int8 = {n.name for n, o in zip(made.nodes, chosen, strict=True) if o}
        assert int8 <= helpful
        assert name == f"lower-loss({len(int8)})"
    # With a gradient over the very rows, the loss falls there as it was foretold.
    report = loss_report(
        planted.bench, found.plans, {"search": planted.split, "held": planted.held}
    )
    one = min(helpful, key=lambda n: made.lost.scores[n].signed_whole or 0.0)
    assert report["search"]["n"] == len(planted.split.gold)
    assert report["held"]["n"] == len(planted.held.gold)
    for part in ("search", "held"):
        facts = report[part]
        assert facts["low"] < facts["change"] < facts["high"]
        assert facts["change"] == pytest.approx(facts["loss"] - facts["float_loss"])
    foretold = sum(made.lost.scores[n].signed_whole or 0.0 for n in helpful)
    assert foretold <= (made.lost.scores[one].signed_whole or 0.0) < 0.0


@pytest.mark.usefixtures("device")
def test_without_time_there_is_still_a_plan(
    planted: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []

    def none(*args: Any) -> dict[str, float]:
        measured.extend(name for name in args[4] if not args[5]())
        return {}

    monkeypatch.setattr(sensitivity, "measured_kl", none)
    _, found = planted.searched("milp", Clock(time.perf_counter() - 10.0, 5.0))
    assert set(found.candidates) == {"float", "full(3)"}
    assert measured == []
    assert found.record["measured"] == 0
    assert found.record["rank_correlation"]["fisher"] is None
    assert {s["node"] for s in found.record["sites"]} == {
        f"layer.{i}.{k}" for i in range(3) for k in ("qkv", "out", "ffn_in", "ffn_out")
    }
    assert found.candidates["full(3)"].latency_ms > 0


def test_what_is_reserved_is_not_spent() -> None:
    now = time.perf_counter()
    clock = Clock(now, 1000.0)
    assert not clock.over()
    assert not clock.part(0.5)()
    assert clock.part(0.0)()
    clock.reserve(10_000.0)  # at most half
    assert not clock.over()
    assert Clock(now - 600.0, 1000.0).spent() >= 600.0
    late = Clock(now - 600.0, 1000.0)
    late.reserve(100.0)
    assert not late.over()
    assert Clock(now - 1000.0, 1000.0).over()


@given(st.integers(1, 60), st.integers(-1, 60))
def test_halves_find_the_last_place_that_fits(count: int, last: int) -> None:
    looked: list[int] = []

    def look(place: int) -> Any:
        looked.append(place)
        return place

    def fits(place: Any) -> bool:
        return bool(place <= last)

    assert last_fit(count, look, fits) == min(last, count - 1)
    assert len(looked) <= math.log2(count) + 2
    assert len(set(looked)) == len(looked)
    assert last_fit(count, lambda place: None, fits) == -1


def test_a_mix_is_a_weighted_mean() -> None:
    assert weigh({"1": 2.0, "8": 6.0, "32": 1e9}, {"1": 3.0, "8": 1.0}) == 3.0


def test_rank_correlations_need_three_measured_sites() -> None:
    scores = [
        Score(f"s{i}", "int8", fisher, sqnr, signed=-fisher, kl=kl)
        for i, (fisher, sqnr, kl) in enumerate([(1, 30, 1), (2, 10, 3), (3, 20, 2), (9, 1, None)])
    ]
    found = correlations(scores)
    assert found["fisher"] == round(spearman([1, 2, 3], [1, 3, 2]), 4) == 0.5
    assert found["signed"] == 0.5
    assert found["sqnr"] == 1.0
    assert found["signed_whole"] is None
    assert correlations(scores[:2])["fisher"] is None


# whole builds


def entries(out: Path, kind: str) -> set[str]:
    return {path.name for path in (out / "cache").glob(f"{kind}-*")}


def written(folder: Path, out: Path, **more: Any) -> Path:
    fields = {"strategy": "milp", "tiers": TIERS, "out": str(out), **more}
    return small().yaml(folder / "build.yaml", **fields)


def test_a_build_by_milp(tmp_path: Path) -> None:
    out = tmp_path / "out"
    yaml = written(tmp_path, out)
    done = forks().samp("build", "-c", yaml, "--json")
    assert done.code == 0, done.err
    record = json.loads((out / "current" / "build.json").read_text())["search"]
    assert record["strategy"] == "milp"
    assert record["measured"] == record["nodes"] == len(record["sites"]) >= 12
    assert record["rank_correlation"]["fisher"] > 0.8
    assert set(record["costs"]) == {"1"}
    for tier in TIERS:
        text = (out / "current/models" / f"encoder_small_{tier}" / "1/plan.json").read_text()
        plan = json.loads(text)
        assert plan["search"]["strategy"] == "milp"
        assert plan["search"]["budget_s"] == 600.0
        assert plan["modelled"]["latency_ms"]["1"] > 0
        assert plan["modelled"]["kl"] >= 0
        exact, own = (
            next(row for row in done.json["tiers"] if row["name"] == name)["latency_ms"]["1"]
            for name in ("exact", tier)
        )
        assert own < exact or Plan.from_json(text).quantized_sites() == []
    assert not (out / "best").exists()
    assert done.json["search"]["rank_correlation"] == record["rank_correlation"]
    again = forks().samp("build", "-c", yaml, "--json")
    assert again.json["cache"]["misses"] == again.json["forwards"] == 0
    assert again.json["tiers"] == done.json["tiers"]


@pytest.mark.parametrize("strategy", ["greedy", "lower-loss"])
def test_other_strategies_build(strategy: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = forks().samp("build", "-c", written(tmp_path, out), "--strategy", strategy, "--json")
    assert done.code == 0, done.err
    record = json.loads((out / "current" / "build.json").read_text())
    names = [c["name"] for c in record["candidates"]]
    assert names[0] == "float"
    if strategy == "greedy":
        assert any(name.startswith("greedy(") for name in names)
        assert "ffn_only(1)" not in names
    else:
        held = record["search"]["loss"]["verification"]
        assert held["low"] < held["change"] < held["high"]
        note = next(w for w in done.json["warnings"] if w.startswith("lower-loss("))
        assert f"change {held['change']:+.5f}" in note


def test_stopped_and_resumed(tmp_path: Path) -> None:
    """No measurement is made twice; the best plans so far lie there, and can be written."""
    out = tmp_path / "out"
    yaml = written(tmp_path, out)
    running = forks().start("build", "-c", yaml, "--json")
    assert wait_for(lambda: (out / "best" / "fast.json").exists(), 90)
    running.kill(signal.SIGINT)
    stopped = running.wait()
    assert stopped.code == 130
    assert stopped.out == ""
    assert "best so far, not verified: samp generate --plan" in stopped.err
    kept = {path.name for path in (out / "cache").iterdir()}
    sites = entries(out, "kl")
    assert len(sites) >= 12
    best = out / "best" / "fast.json"
    assert Plan.from_json(best.read_text()).quantized_sites()
    done = forks().samp("generate", "--plan", f"fast={best}", "--model", small().checkpoint,
                        "--out", tmp_path / "made", "--json")  # fmt: skip
    assert done.code == 0, done.err
    done = forks().samp("build", "-c", yaml, "--json")
    assert done.code == 0, done.err
    assert entries(out, "kl") == sites
    new = {path.name for path in (out / "cache").iterdir()} - kept
    assert done.json["cache"]["misses"] == len(new)
    assert not (out / "best").exists()


def test_a_short_budget_still_builds(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = forks().samp("build", "-c", written(tmp_path, out), "--budget", "0.001s", "--json")
    assert done.code == 0, done.err
    record = json.loads((out / "current" / "build.json").read_text())
    assert [c["name"] for c in record["candidates"]] == ["float", "full(3)"]
    assert record["search"]["measured"] == 0
    assert record["search"]["budget_s"] == 0.001
    done = forks().samp("build", "-c", written(tmp_path, out), "--budget", "10m", "--json")
    record = json.loads((out / "current" / "build.json").read_text())
    assert record["search"]["measured"] == record["search"]["nodes"]


@pytest.mark.parametrize(
    ("given_as", "seconds"), [("90s", 90.0), ("10m", 600.0), ("1.5h", 5400.0), ("45", 45.0)]
)
def test_budgets(given_as: str, seconds: float) -> None:
    from samp_core.config import parse_budget

    assert parse_budget(given_as) == seconds


@pytest.mark.parametrize("wrong", ["", "m", "ten", "-3s", "0", "nan", "inf", "10d"])
def test_budgets_that_are_none(wrong: str) -> None:
    from samp_core.config import parse_budget
    from samp_core.errors import UsageError

    with pytest.raises(UsageError, match="bad_budget: --budget"):
        parse_budget(wrong)
