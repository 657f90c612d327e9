"""The outlier split: kept channels in the ops, recipes and plans that name them, its worth."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from bert import backend, batch_of
from close import check, needs, quantized
from hypothesis import given, settings
from hypothesis import strategies as st
from samp_kernels.interface import (
    GEMM_SITES,
    SITES,
    Array,
    EmbeddingTables,
    EncoderConfig,
    KernelError,
    LayerNorm,
    Out,
    UnsupportedPrecision,
    Weight,
)

from samp_core import calibrate
from samp_core.encoder import LoopSession, check_plan, prepare
from samp_core.errors import SampError
from samp_core.plan import Plan, Recipe, SitePlan, mode_plan
from samp_core.quantize import export_weights, quantize_weight

BACKENDS = ("reference", "cpu")
every_backend = pytest.mark.parametrize("name", BACKENDS)
CONFIG = EncoderConfig("bert", 2, 64, 2, 96, 50, 32, 2, 1e-12)
LOUD = {"layer.0.ffn_in": [5, 40], "layer.1.qkv": [7]}
"""Sites whose input has a few channels far beyond the others."""


def weights(seed: int = 0) -> dict[str, Array]:
    """A random encoder whose layer norms make some channels loud."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> Array:
        return (0.2 * rng.standard_normal(shape)).astype(np.float32)

    made = {f"embeddings.{part}": normal(rows, 64)
            for part, rows in (("word", 50), ("position", 32), ("type", 2))}  # fmt: skip
    norms = ["embeddings.ln"]
    for i in range(2):
        norms += [f"layer.{i}.attention_ln", f"layer.{i}.output_ln"]
        shapes = {"qkv": (192, 64), "out": (64, 64), "ffn_in": (96, 64), "ffn_out": (64, 96)}
        for site, shape in shapes.items():
            made[f"layer.{i}.{site}.weight"] = normal(*shape)
            made[f"layer.{i}.{site}.bias"] = normal(shape[0])
    for name in norms:
        made[f"{name}.weight"], made[f"{name}.bias"] = 1 + normal(64), normal(64)
    for site, channels in LOUD.items():
        norm = "layer.0.attention_ln" if site == "layer.0.ffn_in" else "layer.0.output_ln"
        made[f"{norm}.weight"][channels] *= 60
        # What follows does not drown in them.
        made[f"{site}.weight"][:, channels] /= 60
    return made


TENSORS = weights()
FLOAT = mode_plan(
    Plan("0", {"layers": 2, "hidden": 64, "heads": 2, "ffn": 96}, "reference", {}, {}),
    "float",
    0,
    (),
    Recipe(),
)


@pytest.fixture(scope="module")
def ranges() -> dict[str, Array]:
    session = LoopSession(backend("reference"), CONFIG, TENSORS, FLOAT)
    batches = [batch_of(seed=seed) for seed in range(3)]
    return calibrate.observe(session, batches, "tokens", np.asarray)


def plan_of(ranges: dict[str, Array], recipe: Recipe, sites: Any = GEMM_SITES) -> Plan:
    scaled = replace(
        FLOAT,
        scales=calibrate.scales(ranges, recipe),
        outliers=calibrate.outliers(ranges, recipe),
    )
    return mode_plan(scaled, "full", 2, tuple(sites), recipe)


def run(plan: Plan, name: str) -> Array:
    session = prepare(backend(name), CONFIG, export_weights(TENSORS, plan), plan)
    y = session.run(batch_of(), output="tokens")
    assert session.executed() == {site: plan.precision(site) for site in plan.sites}
    return y


# ops


@every_backend
@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([1, 3, 17]),
    st.sampled_from([5, 64, 312]),
    st.sampled_from([1, 31, 64]),
    st.integers(1, 5),
    st.integers(0, 2**32 - 1),
)
def test_gemm_adds_the_kept_channels(
    name: str, t: int, inputs: int, outputs: int, count: int, seed: int
) -> None:
    needs(name, "int8")
    rng = np.random.default_rng(seed)
    b = backend(name)
    q = rng.integers(-127, 128, (t, inputs))
    w = rng.integers(-127, 128, (outputs, inputs))
    channels = rng.permutation(inputs)[:count].astype(np.int32)
    w[:, channels] = 0
    side = rng.standard_normal((outputs, len(channels))).astype(np.float32)
    kept = (30 * rng.standard_normal((t, len(channels)))).astype(np.float32)
    scale = (rng.uniform(0.5, 1.5, outputs) / 1e4).astype(np.float32)
    bias = rng.standard_normal(outputs).astype(np.float32)
    rest = rng.standard_normal((t, outputs)).astype(np.float32)
    wanted = (q @ w.T) * 0.1 * scale.astype(np.float64) + kept @ side.T.astype(np.float64)
    wanted = wanted + bias + rest
    packed = b.pack(Weight(w.astype(np.int8), scale, channels, side), "int8")
    x = replace(quantized(name, q, 0.1), kept=b.array(kept))
    y = b.gemm(x, packed, b.array(bias), residual=b.array(rest), out=Out())
    check(name, y, wanted)
    assert b.ran == ("int8",)


@every_backend
def test_every_op_keeps_the_channels_that_are_named(name: str) -> None:
    rng = np.random.default_rng(0)
    b = backend(name)
    x, qkv = rng.standard_normal((7, 64)), rng.standard_normal((7, 192))
    ln = LayerNorm(b.array(np.ones(64)), b.array(np.zeros(64)), 1e-12)
    cu = np.array([0, 3, 7], np.int32)
    tables = EmbeddingTables(*(b.array(x) for _ in range(3)))
    ids = np.zeros(7, np.int32)
    w = b.pack(Weight(rng.standard_normal((64, 64)).astype(np.float32)), "fp32")
    zeros, keep = b.array(np.zeros(64)), (3, 60, 17)

    def results(out: Out) -> list[Any]:
        return [
            b.quantize(b.array(x), out),
            b.add_layernorm(b.array(x), ln, out=out)[1],
            b.embed_layernorm(ids, ids, ids, tables, ln, out)[1],
            b.gemm(b.array(x), w, zeros, act="gelu", out=out),
            b.attention(b.array(qkv), cu, 4, 2, out=out),
        ]

    made = zip(
        results(Out("int8", 0.02, keep)), results(Out("int8", 0.02)), results(Out()), strict=True
    )
    for kept, plain, floats in made:
        assert plain.kept is None
        np.testing.assert_array_equal(kept.data, plain.data)
        np.testing.assert_array_equal(kept.kept, floats[:, list(keep)])
    with pytest.raises(UnsupportedPrecision, match="quantize"):
        b.quantize(b.array(x), Out("int8", "token", keep))


@every_backend
def test_a_split_that_does_not_fit_is_refused(name: str) -> None:
    b = backend(name)
    data, scale = np.zeros((4, 8), np.int8), np.ones(4, np.float32)
    two, side = np.array([1, 6], np.int32), np.ones((4, 2), np.float32)
    for wrong in (
        Weight(data, scale, two),
        Weight(data, scale, None, side),
        Weight(data, scale, two, side.T),
        Weight(data, scale, np.array([1, 8], np.int32), side),
        Weight(data, scale, np.array([-1, 6], np.int32), side),
        Weight(data.astype(np.float32), None, two, side),
    ):
        with pytest.raises(KernelError, match=r"pack: got .*; allowed: "):
            b.pack(wrong, "fp32" if wrong.scale is None else "int8")
    packed = b.pack(Weight(data, scale, two, side), "int8")
    plain = b.pack(Weight(data, scale), "int8")
    x = quantized(name, np.zeros((3, 8), np.int64), 1.0)
    bias = b.array(np.zeros(4))
    kept = b.array(np.ones((3, 2)))
    assert b.to_host(b.gemm(replace(x, kept=kept), packed, bias, out=Out())).max() == 2
    for weight, given_kept in ((packed, None), (packed, kept[:, :1]), (packed, kept[:2])):
        with pytest.raises(KernelError, match=r"gemm: got kept .*; allowed: kept \[3, 2\]"):
            b.gemm(replace(x, kept=given_kept), weight, bias, out=Out())
    with pytest.raises(KernelError, match=r"gemm: got kept \(3, 2\); allowed: kept \[3, 0\]"):
        b.gemm(replace(x, kept=kept), plain, bias, out=Out())


def test_onednn_has_no_split() -> None:
    b = backend("onednn")
    assert ("gemm", "outliers", "") not in b.capabilities()
    weight = Weight(
        np.zeros((4, 8), np.int8),
        np.ones(4, np.float32),
        np.array([1], np.int32),
        np.ones((4, 1), np.float32),
    )
    with pytest.raises(UnsupportedPrecision, match="int8 with outliers"):
        b.pack(weight, "int8")
    with pytest.raises(UnsupportedPrecision, match="quantize"):
        b.quantize(b.array(np.zeros((2, 4))), Out("int8", 1.0, (1,)))
    plan = mode_plan(FLOAT, "full", 1, ("qkv",), Recipe(outliers=2))
    with pytest.raises(UnsupportedPrecision, match=r"layer.0.qkv int8 with 2 outliers"):
        check_plan(b, CONFIG, plan)


# calibration, storage


def test_the_loudest_channels_are_found(ranges: dict[str, Array]) -> None:
    found = calibrate.outliers(ranges, Recipe(outliers=2))
    assert set(found) == {f"layer.{i}.{site}" for i in range(2) for site in GEMM_SITES}
    for site, channels in LOUD.items():
        assert set(channels) <= set(found[site])
    assert calibrate.outliers(ranges, Recipe()) == {}
    for site, channels in found.items():
        each = ranges[f"{site}.channels"]
        assert [each[c] for c in channels] == sorted(each, reverse=True)[:2]


@pytest.mark.parametrize(
    "recipe", [Recipe(outliers=2), Recipe(calibrator="percentile", percentile=99.9, outliers=2)]
)
def test_the_scale_is_that_of_the_other_channels(recipe: Recipe, ranges: dict[str, Array]) -> None:
    plain = calibrate.scales(ranges, replace(recipe, outliers=0))
    split = calibrate.scales(ranges, recipe)
    assert plain["layer.0.ffn_in.input_scale"] > 5 * split["layer.0.ffn_in.input_scale"]
    for site in SITES:
        for key in (k for k in plain if f".{site}." in k):
            if site in ("scores", "context"):
                assert split[key] == plain[key]
            else:
                third = sorted(ranges[f"{key.removesuffix('.input_scale')}.channels"])[-3]
                assert 0 < split[key] * 127 <= third * (1 + 1e-6)


def test_what_is_stored(ranges: dict[str, Array]) -> None:
    plan = plan_of(ranges, Recipe(outliers=2), SITES)
    stored = export_weights(TENSORS, plan)
    channels = stored["layer.0.ffn_in.outliers"]
    assert (channels.dtype, channels.tolist()) == (np.int32, [5, 40])
    original = TENSORS["layer.0.ffn_in.weight"]
    np.testing.assert_array_equal(stored["layer.0.ffn_in.outlier_weight"], original[:, [5, 40]])
    rest = original.copy()
    rest[:, [5, 40]] = 0
    q, scale = quantize_weight(rest, Recipe())
    np.testing.assert_array_equal(stored["layer.0.ffn_in.weight"], q)
    np.testing.assert_array_equal(stored["layer.0.ffn_in.weight_scale"], scale)
    assert not any("scores" in name and "outlier" in name for name in stored)
    # One memo serves plans with and without the split.
    memo: dict[Any, Any] = {}
    for other in (plan, plan_of(ranges, Recipe()), plan):
        again = export_weights(TENSORS, other, memo)
        alone = export_weights(TENSORS, other)
        assert all(np.array_equal(again[name], alone[name]) for name in alone)


# whole encoders


@every_backend
def test_it_saves_what_the_loud_channels_wreck(name: str, ranges: dict[str, Array]) -> None:
    needs(name, "int8")
    exact = run(FLOAT, "reference")
    split = run(plan_of(ranges, Recipe(outliers=2)), name)
    plain = run(plan_of(ranges, Recipe()), name)
    assert np.abs(split - exact).mean() < 0.5 * np.abs(plain - exact).mean()


@settings(max_examples=10, deadline=None)
@given(
    st.lists(st.sampled_from([f"layer.{i}.{site}" for i in range(2) for site in GEMM_SITES])),
    st.integers(1, 4),
)
def test_backends_agree(sites: list[str], count: int) -> None:
    ranges = calibrate.observe(
        LoopSession(backend("reference"), CONFIG, TENSORS, FLOAT),
        [batch_of()],
        "tokens",
        np.asarray,
    )
    plan = plan_of(ranges, Recipe(outliers=count), SITES)
    entries = {site: plan.sites[site] if site in sites else SitePlan() for site in plan.sites}
    plan = replace(plan, sites=entries, mode=None)
    a, b = (run(plan, name) for name in BACKENDS)
    assert np.abs(a - b).mean() <= 0.01


# plans


def test_a_plan_carries_its_channels(ranges: dict[str, Array]) -> None:
    plan = plan_of(ranges, Recipe(outliers=3), SITES)
    text = plan.to_json()
    assert Plan.from_json(text) == plan
    assert json.loads(text)["schema"] == 1
    assert plan.sites["layer.0.scores"].recipe == Recipe()
    assert plan.sites["layer.0.qkv"].recipe == Recipe(outliers=3)
    assert Plan.from_json(text).key() == plan.key()
    other = {**plan.outliers, "layer.0.qkv": [0, 1, 2]}
    fewer = plan_of(ranges, Recipe(outliers=2), SITES)
    keys = {p.key() for p in (plan, fewer, replace(plan, outliers=other))}
    assert len(keys) == 3


def test_plans_without_a_split_are_as_they_were(ranges: dict[str, Array]) -> None:
    plan = plan_of(ranges, Recipe())
    assert "outliers" not in plan.to_json()
    assert replace(plan, outliers={"layer.0.qkv": [1]}).key() == plan.key()
    simple = Plan(
        "0" * 64, {"layers": 1}, "onednn", {}, {"layer.0.qkv": SitePlan("int8", Recipe())}
    )
    assert simple.key() == "9de328ef16c365f85cc6e4de30a7fcc6249ad7bce1bed56601ce1aea2496e264"


@pytest.mark.parametrize(
    ("site", "recipe", "channels", "message"),
    [
        ("layer.0.qkv", {"outliers": -1}, {}, "outliers -1; allowed: a whole number, 0 to 64"),
        ("layer.0.qkv", {"outliers": 65}, {}, "outliers 65; allowed: a whole number, 0 to 64"),
        ("layer.0.qkv", {"outliers": 1.5}, {}, "outliers 1.5"),
        ("layer.0.qkv", {"outliers": 1, "activation": "token"}, {}, "with a static scale"),
        ("layer.0.scores", {"outliers": 1}, {}, "at qkv, out, ffn_in, ffn_out"),
        ("layer.0.qkv", {"outliers": 1}, {"layer.0.qkv": [-1]}, "different channels, from 0"),
        ("layer.0.qkv", {"outliers": 1}, {"layer.0.qkv": [1, 1]}, "different channels, from 0"),
        ("layer.0.qkv", {"outliers": 1}, {"layer.0.qkv": 4}, "different channels, from 0"),
        ("layer.0.qkv", {"outliers": 1}, [1], "outliers is a list"),
    ],
)
def test_a_wrong_split_is_named(site: str, recipe: Any, channels: Any, message: str) -> None:
    body = {
        "schema": 1,
        "model_sha256": "0",
        "config": {"layers": 2},
        "backend": "cpu",
        "sites": {site: {"precision": "int8", "recipe": recipe}},
        "outliers": channels,
    }
    with pytest.raises(SampError) as caught:
        Plan.from_json(json.dumps(body))
    assert message in f"{caught.value.given}; allowed: {caught.value.allowed}"


def test_channels_that_are_missing_are_asked_for() -> None:
    plan = mode_plan(replace(FLOAT, scales={}), "full", 1, ("qkv",), Recipe(outliers=2))
    assert Plan.from_json(plan.to_json()) == plan
    with pytest.raises(SampError, match=r"no_outliers: layer.0.qkv splits 2 .* the plan names 0"):
        export_weights(TENSORS, plan)
