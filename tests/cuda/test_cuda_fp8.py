"""fp8 plans on the CUDA kernels, without a GPU: whole encoders, mixed plans, refusals, searches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from bert import Shape, batch_of, open_session, scaled_plan, write_bert
from emulated import backend, launcher, needs_compiler
from samp_kernels.cuda.session import CudaSession
from samp_kernels.interface import (
    GEMM_SITES,
    SITES,
    Batch,
    KernelError,
    Out,
    UnsupportedPrecision,
    Weight,
)

from samp_core.checkpoint import Checkpoint, load_checkpoint
from samp_core.encoder import LoopSession, check_plan, prepare
from samp_core.plan import HALVES, QUANTIZED, Plan, Recipe, SitePlan, input_scale
from samp_core.quantize import export_weights

pytestmark = needs_compiler
LENGTHS = (7, 1, 12, 30, 3)
# Largest and mean difference in states of size 1 to 4 from float64 under the same plan. Beside fp32
# the two round to the same e4m3 numbers. A float of 16 bits lets many fall to the neighbour, a step
# of up to an eighth: the plans differ from the float model by 0.05 to 0.08 in the mean.
TOLERANCE = {"fp32": (1e-4, 2e-5), "fp16": (0.4, 0.045), "bf16": (0.5, 0.06), "int8": (0.5, 0.06)}
FLOAT16 = dict.fromkeys(SITES, "fp16")
FP8 = dict.fromkeys(GEMM_SITES, "fp8")
PLANS: dict[str, dict[str, str]] = {
    "fp8 beside fp32": FP8,
    "fp8 beside fp16": {**FLOAT16, **FP8},
    "fp8 beside bf16": {**dict.fromkeys(SITES, "bf16"), **FP8},
    "fp8 with int8 attention": {**dict.fromkeys(SITES, "int8"), **FP8},
    "ffn_only fp8": {**FLOAT16, "ffn_in": "fp8", "ffn_out": "fp8"},
    "all four": {
        "qkv": "fp8", "scores": "int8", "context": "fp32", "out": "int8", "ffn_in": "fp16",
        "ffn_out": "fp8",
    },
    "all four, the other way": {
        "qkv": "int8", "scores": "fp16", "context": "int8", "out": "fp8", "ffn_in": "fp8",
        "ffn_out": "fp32",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("bert")
    write_bert(folder, Shape(layers=2, hidden=64, heads=2, ffn=96, classifier=True))
    return load_checkpoint(folder)


@pytest.fixture(scope="module")
def scaled(checkpoint: Checkpoint) -> Plan:
    """With the scales of both quantized precisions: the same reach over 127 and over 448."""
    plan = scaled_plan(checkpoint)
    fp8 = {
        input_scale(site, "fp8"): plan.scales[input_scale(site, "int8")] * 127 / 448
        for site in (f"layer.{i}.{s}" for i in range(plan.layers) for s in GEMM_SITES)
    }
    return replace(plan, scales={**plan.scales, **fp8})


def plan_of(scaled: Plan, kinds: dict[str, str], recipe: Recipe | None = None) -> Plan:
    sites = {
        f"layer.{i}.{kind}": SitePlan(p, (recipe or Recipe()) if p in QUANTIZED else None)
        for i in range(scaled.layers)
        for kind, p in kinds.items()
    }
    return replace(scaled, sites=sites, mode=None)


def session_of(checkpoint: Checkpoint, plan: Plan, architecture: str, **more: Any) -> CudaSession:
    own = backend(architecture)
    check_plan(own, checkpoint.config, plan)
    tensors = export_weights(checkpoint.tensors, plan)
    return CudaSession(own, checkpoint.config, tensors, plan, max_tokens=64, **more)


def as_reference(plan: Plan) -> Plan:
    sites = {k: SitePlan() if v.precision in HALVES else v for k, v in plan.sites.items()}
    return replace(plan, sites=sites)


def near(got: Any, wanted: Any, kinds: dict[str, str]) -> None:
    other = next((k for k in ("int8", "bf16", "fp16") if k in kinds.values()), "fp32")
    off = np.abs(got - wanted)
    assert off.max() <= TOLERANCE[other][0]
    assert off.mean() <= TOLERANCE[other][1]


@pytest.mark.parametrize("architecture", ["sm_89", "sm_90a"])
@pytest.mark.parametrize("name", PLANS)
def test_the_encoder_equals_the_reference(
    name: str, architecture: str, checkpoint: Checkpoint, scaled: Plan
) -> None:
    kinds = PLANS[name]
    plan = plan_of(scaled, kinds)
    session, batch = session_of(checkpoint, plan, architecture), batch_of(LENGTHS)
    outputs: Any = ("first", "mean", "tokens") if architecture == "sm_89" else ("tokens",)
    for output in outputs:
        wanted = open_session(checkpoint, as_reference(plan), "reference").run(batch, output=output)
        got = session.run(batch, output=output)
        assert got.shape == wanted.shape
        near(got, wanted, kinds)
    ran = {f"layer.{i}.{site}": kinds.get(site, "fp32") for i in (0, 1) for site in SITES}
    assert session.executed() == ran
    used = {one.unit for one in session.launches(batch, "tokens") if one.ran == ("fp8",)}
    word = "gemm_fp8_wgmma" if architecture == "sm_90a" else "gemm_fp8_"
    assert used
    assert all(unit.startswith(word) for unit in used)
    assert all(launcher(backend(architecture)).counts(unit).mma > 0 for unit in used)
    session.close()
    launcher(backend(architecture)).check_guards()


@pytest.mark.parametrize("name", PLANS)
def test_seven_launches_a_layer_under_mixed_plans(
    name: str, checkpoint: Checkpoint, scaled: Plan
) -> None:
    session = session_of(checkpoint, plan_of(scaled, PLANS[name]), "sm_89")
    outputs: dict[Any, int] = {"first": 1, "mean": 2, "tokens": 1}
    for output, more in outputs.items():
        assert len(session.launches(batch_of(LENGTHS), output)) == 7 * scaled.layers + more


def test_layers_of_different_precisions(checkpoint: Checkpoint, scaled: Plan) -> None:
    """Each of the two layers under a plan of its own, so that types change between layers, too."""
    first, second = (plan_of(scaled, PLANS[n]) for n in ("all four", "all four, the other way"))
    sites = {k: (first if k.startswith("layer.0.") else second).sites[k] for k in first.sites}
    plan = replace(scaled, sites=sites)
    batch = batch_of(LENGTHS)
    got = session_of(checkpoint, plan, "sm_89").run(batch, output="tokens")
    wanted = open_session(checkpoint, as_reference(plan), "reference").run(batch, output="tokens")
    near(got, wanted, {"any": "int8"})


@pytest.mark.parametrize("architecture", ["sm_89", "sm_90a"])
def test_alone_equals_in_a_batch(architecture: str, checkpoint: Checkpoint, scaled: Plan) -> None:
    session = session_of(checkpoint, plan_of(scaled, PLANS["fp8 beside fp16"]), architecture)
    together = batch_of(LENGTHS)
    whole = session.run(together)
    for i in (0, 3):
        begin, end = together.cu_seqlens[i : i + 2].tolist()
        one = Batch(
            together.ids[begin:end], together.types[begin:end], together.positions[begin:end],
            np.array([0, end - begin], np.int32), end - begin,
        )  # fmt: skip
        assert np.array_equal(session.run(one), whole[i : i + 1])


def test_scales_per_token(checkpoint: Checkpoint, scaled: Plan) -> None:
    kinds = {"qkv": "fp8", "ffn_in": "fp8"}
    plan = plan_of(scaled, kinds, Recipe(activation="token"))
    batch = batch_of(LENGTHS)
    got = session_of(checkpoint, plan, "sm_89").run(batch)
    near(got, open_session(checkpoint, plan, "reference").run(batch), kinds)
    static = session_of(checkpoint, plan_of(scaled, kinds), "sm_89").run(batch)
    assert not np.array_equal(got, static)


def test_the_loop_over_ops(checkpoint: Checkpoint, scaled: Plan) -> None:
    """What a search measures losses with: passes from a layer on, one op after another."""
    kinds = PLANS["fp8 beside fp32"]
    plan, batch = plan_of(scaled, kinds), batch_of((3, 7, 12))
    tensors = export_weights(checkpoint.tensors, plan)
    loop = LoopSession(backend("sm_89"), checkpoint.config, tensors, plan)
    got = loop.run(batch)
    near(got, open_session(checkpoint, plan, "reference").run(batch), kinds)
    assert loop.executed()["layer.1.ffn_out"] == "fp8"
    near(loop.run_from(loop.layer_inputs(batch)[1]), got, kinds)


@pytest.mark.parametrize("architecture", ["sm_75", "sm_80", "sm_86"])
def test_an_older_gpu_refuses_at_load(
    architecture: str, checkpoint: Checkpoint, scaled: Plan
) -> None:
    plan = plan_of(scaled, {"qkv": "fp8"})
    tensors = export_weights(checkpoint.tensors, plan)
    own = backend(architecture)
    with pytest.raises(UnsupportedPrecision) as refused:
        prepare(own, checkpoint.config, tensors, plan)
    assert refused.value.op == "cuda gemm"
    assert refused.value.got == "layer.0.qkv fp8 static"
    assert "int8 static" in refused.value.allowed
    assert "fp8" not in refused.value.allowed
    weight = Weight(tensors["layer.0.qkv.weight"], tensors["layer.0.qkv.weight_scale"])
    with pytest.raises(UnsupportedPrecision, match=r"fp8 on sm_\d+.*fp8 from sm_89 on"):
        own.pack(weight, "fp8")
    with pytest.raises(UnsupportedPrecision, match="fp8 from sm_89 on"):
        own.quantize(own.array(np.ones((2, 16))), Out("fp8", 0.5))


def test_attention_has_no_fp8(checkpoint: Checkpoint, scaled: Plan) -> None:
    plan = plan_of(scaled, {"scores": "fp8"})
    for own in (backend("sm_89"), backend("sm_90a")):
        with pytest.raises(UnsupportedPrecision, match=r"attention.scores: got layer.0.scores fp8"):
            check_plan(own, checkpoint.config, plan)


def test_the_parts_of_a_product_must_agree() -> None:
    own = backend("sm_89")
    fp8 = own.pack(Weight(np.ones((16, 16), np.uint8), np.ones(16, np.float32)), "fp8")
    x = own.quantize(own.array(np.ones((2, 16))), Out("int8", 0.5))
    with pytest.raises(KernelError, match="int8 activations for fp8 weights"):
        own.gemm(x, fp8, own.array(np.zeros(16)), out=Out())
