"""Plans: JSON in and out, modes, keys, and what is not a plan."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from samp_kernels.interface import GEMM_SITES, SITES

from samp_core.errors import SampError
from samp_core.plan import CALIBRATORS, PRECISIONS, QUANTIZED, Plan, Recipe, SitePlan, mode_plan

CONFIG = {"family": "bert", "layers": 3, "hidden": 64, "heads": 2, "ffn": 96}
NAMES = [f"layer.{i}.{site}" for i in range(3) for site in SITES]

recipes = st.builds(
    Recipe,
    weight=st.sampled_from(["channel", "tensor"]),
    activation=st.sampled_from(["static", "token"]),
    calibrator=st.sampled_from(CALIBRATORS),
    percentile=st.none() | st.floats(51, 100),
    smooth=st.none() | st.floats(0, 1),
)
quantized = st.builds(SitePlan, st.sampled_from(QUANTIZED), recipes)
floats = st.sampled_from(["fp32", "fp16", "bf16"]).map(SitePlan)
plans = st.builds(
    Plan,
    model_sha256=st.text("0123456789abcdef", min_size=64, max_size=64),
    config=st.just(CONFIG),
    backend=st.sampled_from(["onednn", "reference"]),
    device=st.just({"cpu": "x", "isa": "avx512_vnni", "threads": 2}),
    sites=st.dictionaries(st.sampled_from(NAMES), quantized | floats),
    mode=st.none() | st.just("full(2)"),
    measured=st.just({"latency_ms": {"1": 1.25}, "value": 0.9, "tests": []}),
    scales=st.dictionaries(st.sampled_from(NAMES), st.floats(1e-30, 1e30)),
)


def base() -> Plan:
    return Plan("0" * 64, CONFIG, "onednn", {}, {})


@given(plans)
def test_json_round_trip(plan: Plan) -> None:
    parsed = Plan.from_json(plan.to_json())
    assert parsed == plan
    assert parsed.to_json() == plan.to_json()
    assert parsed.key() == plan.key()
    assert json.loads(plan.to_json())["schema"] == 1


def test_the_key_is_what_an_encoder_computes() -> None:
    plan = mode_plan(
        replace(base(), scales={"layer.0.qkv.input_scale": 0.5}), "full", 1, SITES, Recipe()
    )
    same = [
        plan.with_provenance(measured={"value": 1}, device={"threads": 8}, search={"seed": 1}),
        plan.with_provenance(mode=None, versions={"torch": "9"}, modelled={"latency_ms": {}}),
        replace(plan, sites=dict(reversed(plan.sites.items()))),
    ]
    assert {p.key() for p in same} == {plan.key()}
    other = [
        replace(plan, model_sha256="1" * 64),
        replace(plan, backend="reference"),
        replace(plan, scales={"layer.0.qkv.input_scale": 0.25}),
        replace(plan, sites={**plan.sites, "layer.2.out": SitePlan("int8", Recipe())}),
        mode_plan(plan, "full", 1, SITES, Recipe(weight="tensor")),
        mode_plan(plan, "full", 2, SITES, Recipe()),
    ]
    assert len({p.key() for p in [plan, *other]}) == 1 + len(other)


def test_a_float_plan_has_one_key_whatever_the_scales() -> None:
    plan = mode_plan(base(), "float", 0, (), Recipe())
    assert replace(plan, scales={"x": 1.0}).key() == plan.key()


def test_float_mode_names_every_site() -> None:
    plan = mode_plan(base(), "float", 3, SITES, Recipe())
    assert list(plan.sites) == NAMES
    assert plan.quantized_sites() == []
    assert plan.mode == "float"
    assert mode_plan(base(), "full", 0, SITES, Recipe()).mode == "float"


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("sites", [SITES, GEMM_SITES])
def test_modes(k: int, sites: tuple[str, ...]) -> None:
    recipe = Recipe(calibrator="percentile", percentile=99.9)
    full = mode_plan(base(), "full", k, sites, recipe)
    assert full.mode == f"full({k})"
    wanted = [f"layer.{i}.{site}" for i in range(k) for site in sites]
    assert sorted(full.quantized_sites()) == sorted(wanted)
    assert all(full.sites[site] == SitePlan("int8", recipe) for site in wanted)
    ffn = mode_plan(base(), "ffn_only", k, sites, recipe)
    assert ffn.mode == f"ffn_only({k})"
    assert ffn.quantized_sites() == [
        f"layer.{i}.{site}" for i in range(k) for site in ("ffn_in", "ffn_out")
    ]
    # A mode replaces whatever stood there.
    assert mode_plan(full, "ffn_only", k, sites, recipe) == ffn


def test_ffn_only_of_a_backend_that_quantizes_no_ffn() -> None:
    assert mode_plan(base(), "ffn_only", 3, ("qkv",), Recipe()).quantized_sites() == []


def test_silence_means_fp32() -> None:
    plan = replace(base(), sites={"layer.0.qkv": SitePlan("int8", Recipe())})
    assert plan.precision("layer.0.qkv") == "int8"
    assert plan.precision("layer.2.out") == "fp32"


def test_summary() -> None:
    plan = mode_plan(base(), "full", 1, GEMM_SITES, Recipe())
    assert plan.summary() == "full(1): 8/12 fp32, 4/12 int8 GEMMs"
    assert base().summary() == "12/12 fp32 GEMMs"


def body(**changes: Any) -> str:
    entry = {"precision": "int8", "recipe": {"calibrator": "minmax"}}
    good = {
        "schema": 1,
        "model_sha256": "0",
        "config": CONFIG,
        "backend": "onednn",
        "sites": {"layer.0.qkv": entry},
        "scales": {"layer.0.qkv.input_scale": 1},
    }
    return json.dumps({k: v for k, v in {**good, **changes}.items() if v is not None})


def site(name: str = "layer.0.qkv", **entry: Any) -> dict[str, Any]:
    return {"sites": {name: {"precision": "int8", **entry}}}


def test_a_plan_may_be_short() -> None:
    plan = Plan.from_json(body(scales=None, sites={"layer.2.out": {"precision": "int8"}}))
    assert plan.sites == {"layer.2.out": SitePlan("int8", Recipe())}
    assert Plan.from_json(body()).sites["layer.0.qkv"].recipe == Recipe()


BAD: dict[str, tuple[str, str]] = {
    "not JSON": ("{", "it is not JSON"),
    "empty": ("", "it is not JSON"),
    "a list": ("[]", "schema list; allowed: schema 1"),
    "another schema": (body(schema=2), "schema 2; allowed: schema 1"),
    "no sites": (body(sites=None), "no sites; allowed: model_sha256, config, backend, sites"),
    "config is a list": (body(config=[]), "config is a list; allowed: a JSON object"),
    "sites is a list": (body(sites=["layer.0.qkv"]), "sites is a list"),
    "no layers": (body(config={}), "config.layers None; allowed: a whole number from 1"),
    "layers true": (body(config={"layers": True}), "config.layers True"),
    "layers a text": (body(config={"layers": "3"}), "config.layers '3'"),
    "layers 0": (body(config={"layers": 0}), "config.layers 0"),
    "a layer too far": (body(**site("layer.3.qkv")), "site 'layer.3.qkv'; allowed: layer.<0..2>"),
    "a zero too many": (body(**site("layer.00.qkv")), "site 'layer.00.qkv'"),
    "another digit": (body(**site("layer.\u0662.qkv")), "site 'layer.\u0662.qkv'"),
    "no number": (body(**site("layer.\u00b2.qkv")), "site 'layer.\u00b2.qkv'"),
    "negative layer": (body(**site("layer.-1.qkv")), "site 'layer.-1.qkv'"),
    "an unknown kind": (body(**site("layer.0.ffn")), "site 'layer.0.ffn'; allowed: .*ffn_in"),
    "a part too many": (body(**site("layer.0.qkv.weight")), "site 'layer.0.qkv.weight'"),
    "another precision": (body(**site(precision="int4")), "layer.0.qkv: precision 'int4'; .*int8"),
    "a site of text": (body(sites={"layer.0.qkv": "int8"}), "layer.0.qkv: precision None"),
    "recipe of text": (body(**site(recipe="minmax")), "layer.0.qkv: recipe is a str"),
    "an unknown field": (
        body(**site(recipe={"wight": "x"})),
        "recipe has wight; allowed: .*weight",
    ),
    "a weight": (body(**site(recipe={"weight": "row"})), "weight 'row'; allowed: channel, tensor"),
    "an activation": (body(**site(recipe={"activation": []})), r"activation \[\]; allowed: static"),
    "a percentile of text": (
        body(**site(recipe={"calibrator": "percentile", "percentile": "x"})),
        "percentile 'x'; allowed: a number above 50",
    ),
    "a percentile of NaN": (
        body(**site(recipe={"calibrator": "percentile", "percentile": float("nan")})),
        "percentile nan; allowed: a number above 50",
    ),
    "a calibrator": (body(**site(recipe={"calibrator": "max"})), "calibrator 'max'; .*minmax"),
    "scales is a list": (body(scales=[1]), "scales is a list"),
    "a scale of 0": (body(scales={"a": 0}), "scale a = 0; allowed: a finite number above 0"),
    "a negative scale": (body(scales={"a": -1.5}), "scale a = -1.5"),
    "a scale of NaN": (body(scales={"a": float("nan")}), "scale a = nan"),
    "an infinite scale": (body(scales={"a": float("inf")}), "scale a = inf"),
    "a scale of text": (body(scales={"a": "1"}), "scale a = '1'"),
}


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD)
def test_a_bad_plan_is_one_clear_error(text: str, message: str) -> None:
    with pytest.raises(SampError, match=message) as caught:
        Plan.from_json(text, "my.json")
    assert caught.value.code == "bad_plan"
    assert caught.value.given.startswith("my.json: ")
    assert caught.value.allowed
    assert "\n" not in str(caught.value)


def test_every_precision_has_its_kind() -> None:
    assert set(QUANTIZED) < set(PRECISIONS)
    assert set(PRECISIONS) - set(QUANTIZED) == {"fp32", "fp16", "bf16"}
