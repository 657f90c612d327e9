"""The Python interface: a build, a pipeline without a server, plans that can be edited by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from forked import forks
from samp_kernels.cpu import level
from samp_kernels.interface import SITES
from separable import LABELS, planted_build, small

import samp_core
from samp_core.chain import VARIANTS
from samp_core.config import load_config
from samp_core.costs import CostTable
from samp_core.errors import SampError, UsageError
from samp_core.explain import explain
from samp_core.plan import PRECISIONS, Plan, Recipe, SitePlan
from samp_core.plan_schema import plan_schema

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Made:
    out: Path
    report: dict[str, Any]

    def plan(self, tier: str) -> dict[str, Any]:
        path = self.out / "current/models" / f"encoder_small_{tier}" / "1" / "plan.json"
        body: dict[str, Any] = json.loads(path.read_text())
        return body


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("api")
    yaml = small().yaml(folder / "b.yaml")
    fields = {**json.loads(yaml.read_text()), "out": folder / "out", "strategy": "milp"}
    fields["tiers"] = {"fast": {"drop": 8.0}, "quick": {"latency": 1000.0}}
    fields["default_tier"] = "fast"
    result = samp_core.build(fields)
    return Made(folder / "out", result.report)


def test_a_build_takes_fields_a_file_or_a_config(made: Made, tmp_path: Path) -> None:
    assert [row["name"] for row in made.report["tiers"]] == ["exact", "fast", "quick"]
    config = load_config(made.out.parent / "b.yaml", {"out": tmp_path, "tiers": {}})
    for given in (config, config.model_dump()):
        report = samp_core.build(given).report
        assert [row["name"] for row in report["tiers"]] == ["exact"]
    with pytest.raises(UsageError, match="no_config"):
        samp_core.build(tmp_path / "none.yaml")
    with pytest.raises(UsageError, match="no data"):
        samp_core.build({"model": "somewhere"})


def test_a_pipeline_without_a_server(made: Made) -> None:
    texts = [row["text"] for row in small().rows[:20]]
    fast = samp_core.load(made.out, "fast")
    answer = fast.predict(texts)
    assert {label.decode() for label in answer["LABEL"][:, 0]} <= set(LABELS)
    np.testing.assert_allclose(answer["SCORES"].sum(axis=1), 1.0, atol=1e-5)
    np.testing.assert_array_equal(samp_core.load(str(made.out)).logits(texts), fast.logits(texts))


def test_the_package_loads_nothing_until_it_is_asked() -> None:
    code = (
        "import sys, samp_core\n"
        "before = set(sys.modules)\n"
        "import samp_core.errors\n"
        "assert not {'numpy', 'torch', 'pydantic', 'scipy'} & set(sys.modules)\n"
        "from samp_core.build import build\n"  # the submodule takes the name's place
        "assert callable(samp_core.build) and callable(samp_core.load)\n"
        "assert samp_core.build.build is build\n"
        "try: samp_core.nothing\n"
        "except AttributeError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "module 'samp_core' has no attribute 'nothing'\n"


# plans


def test_the_documented_schema_is_the_codes_own() -> None:
    text = (ROOT / "docs" / "plan.schema.json").read_text()
    assert json.loads(text) == plan_schema()
    jsonschema.Draft202012Validator.check_schema(plan_schema())


def test_plans_of_a_build_fit_the_schema(made: Made) -> None:
    for tier in ("exact", "fast", "quick"):
        jsonschema.validate(made.plan(tier), plan_schema())


def test_every_plan_that_can_be_written_fits_the_schema() -> None:
    config = {"family": "bert", "layers": 2, "hidden": 8, "heads": 2, "ffn": 16}
    recipe = Recipe("tensor", "static", "percentile", 99.9, outliers=2)
    for precision in PRECISIONS:
        sites = {f"layer.1.{site}": SitePlan(precision, recipe) for site in SITES[:1]}
        plan = Plan("0" * 64, config, "cpu", {}, sites, outliers={"layer.1.qkv": [3, 1]})
        jsonschema.validate(json.loads(plan.to_json()), plan_schema())


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 2},
        {"sites": {"layer.0.qvk": {"precision": "fp32"}}},
        {"sites": {"layer.0.qkv": {"precision": "int9"}}},
        {"sites": {"layer.0.qkv": {"recipe": None}}},
        {"sites": {"layer.0.qkv": {"precision": "int8", "recipe": {"wheight": "channel"}}}},
        {"scales": {"layer.0.qkv.input_scale": 0}},
        {"config": {"layers": 0}},
    ],
)
def test_what_the_schema_refuses_is_refused_on_loading(made: Made, change: Any) -> None:
    body = {**made.plan("fast"), **change}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(body, plan_schema())
    with pytest.raises(SampError):
        Plan.from_json(json.dumps(body))


def test_a_plan_edited_by_hand_is_served(made: Made, tmp_path: Path) -> None:
    body = made.plan("quick")
    site = "layer.1.ffn_in"
    body["sites"][site] = {"precision": "int8", "recipe": {"activation": "static"}}
    body["sites"]["layer.0.qkv"] = {"precision": "fp32"}
    body["scales"] = body["scales"] or made.plan("fast")["scales"]
    if not body["scales"]:
        pytest.skip("no int8 on this CPU")
    (tmp_path / "mine.json").write_text(json.dumps(body))
    out = tmp_path / "out"
    done = forks().samp("generate", "--plan", tmp_path / "mine.json", "--model",
                        small().checkpoint, "--out", out, "--json")  # fmt: skip
    assert done.code == 0, done.err
    pipeline = samp_core.load(out, "mine")
    pipeline.predict([small().rows[0]["text"]])
    executed = pipeline.session.executed()
    assert (executed[site], executed["layer.0.qkv"]) == ("int8", "fp32")


# samp explain


def test_why_each_site_is_as_it_is(made: Made) -> None:
    told = explain(made.out, "quick")
    plan = Plan.from_json(json.dumps(made.plan("quick")))
    record = json.loads((made.out / "current" / "build.json").read_text())["search"]
    assert len(told["sites"]) == record["nodes"] > 0
    table = CostTable({"1": record["costs"]["1"]["edges"]}, {"1": 0.0})
    for site in told["sites"]:
        name = site["site"].replace("attention", "scores")
        assert site["precision"] == plan.precision(name)
        assert site["why"].startswith(f"{site['precision']}")
        assert f"{site['kl']:.1e} nats" in site["why"] or "saves nothing" in site["why"]
    assert sorted(site["rank"] for site in told["sites"]) == list(range(1, len(told["sites"]) + 1))
    dearest = max(told["sites"], key=lambda site: float(site["kl"]))
    assert dearest["rank"] == 1
    assert len(table.edges["1"]) == 3 * 5 + 1
    assert any("batch of 1:" in fact for fact in told["facts"])
    assert told["plan"] == plan.summary()


def test_a_site_in_another_recipe_is_explained_as_that(tmp_path: Path) -> None:
    """Of a build that chose recipes, one replaced by hand: the search knows what it costs."""
    if level() is None:
        pytest.skip("no cpu kernels here")
    yaml = small().yaml(tmp_path / "b.yaml", calibrator="auto", strategy="milp", backend="cpu")
    fields = {**json.loads(yaml.read_text()), "out": tmp_path / "out", "tiers": {"x": {"drop": 8}}}
    made = Made(tmp_path / "out", samp_core.build(fields).report)
    record = json.loads((made.out / "current" / "build.json").read_text())["search"]
    assert set(record["more"]) <= set(VARIANTS)
    assert {label for some in record["variants"].values() for label, _ in some} == set(
        record["more"]
    )
    file = made.out / "current/models/encoder_small_x/1/plan.json"
    for site in ("layer.1.ffn_in", "layer.2.out"):
        for label, recipe in record["variants"][site]:
            body = made.plan("x")
            body["sites"][site] = {"precision": "int8", "recipe": recipe}
            file.write_text(json.dumps(body))
            assert file.read_text() == json.dumps(body)
            told = {one["site"]: one for one in explain(made.out, "x")["sites"]}[site]
            assert told["precision"] == label
            assert told["why"].startswith(label)
            (score,) = (one for one in record["more"][label] if one["node"] == site)
            assert told["kl"] == score["estimate"]


def test_explained_at_the_command_line(made: Made) -> None:
    done = forks().samp("explain", "fast", made.out)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[0].startswith("fast: ")
    assert any(line.startswith("layer.2.ffn_out") for line in lines)
    assert "promised: at most 8 points" in done.out
    as_json = forks().samp("explain", "fast", made.out, "--json").json
    assert as_json == json.loads(json.dumps(explain(made.out, "fast")))
    unknown = forks().samp("explain", "faster", made.out)
    assert unknown.code != 0
    assert "faster" in unknown.err
    assert forks().samp("explain", "fast", made.out / "nothing").code != 0


def test_a_build_of_modes_is_explained_by_its_tests(tmp_path: Path) -> None:
    yaml = small().yaml(tmp_path / "b.yaml", out=str(tmp_path / "out"), tiers={"x": {"drop": 9}})
    assert planted_build(yaml, tmp_path / "out").code == 0
    told = explain(tmp_path / "out", "x")
    assert told["sites"] == []
    assert any(fact.startswith("tested ") for fact in told["facts"])
