"""A whole small encoder on the CUDA kernels, launch by launch without a GPU, and the reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from bert import Shape, batch_of, open_session, scaled_plan, write_bert
from emulated import backend, launcher, needs_compiler
from samp_kernels.cuda.session import CudaSession
from samp_kernels.interface import SITES

from samp_core.checkpoint import Checkpoint, load_checkpoint
from samp_core.encoder import check_plan
from samp_core.plan import Plan, Recipe, SitePlan
from samp_core.quantize import export_weights

pytestmark = needs_compiler
LENGTHS = (7, 1, 12, 30, 3)
# Largest difference in states, which are of size 1 to 4.
TOLERANCE = {"fp32": 2e-5, "fp16": 2e-2, "int8": 0.3}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("bert")
    write_bert(folder, Shape(layers=2, hidden=64, heads=2, ffn=96, classifier=True))
    return load_checkpoint(folder)


@pytest.fixture(scope="module")
def scaled(checkpoint: Checkpoint) -> Plan:
    return scaled_plan(checkpoint)


def plan_of(scaled: Plan, precisions: Any, recipe: Recipe | None = None) -> Plan:
    """`precisions`: site kind -> precision, in every layer."""
    sites = {
        f"layer.{layer}.{kind}": SitePlan(
            precision, (recipe or Recipe()) if precision == "int8" else None
        )
        for layer in range(scaled.layers)
        for kind, precision in precisions.items()
    }
    return replace(scaled, sites=sites, mode=None)


def session_of(
    checkpoint: Checkpoint, plan: Plan, architecture: str = "sm_80", **more: Any
) -> CudaSession:
    own = backend(architecture)
    check_plan(own, checkpoint.config, plan)
    tensors = export_weights(checkpoint.tensors, plan)
    return CudaSession(own, checkpoint.config, tensors, plan, max_tokens=64, **more)


def as_reference(plan: Plan) -> Plan:
    """fp16 is fp32 to the reference."""
    sites = {k: SitePlan() if v.precision == "fp16" else v for k, v in plan.sites.items()}
    return replace(plan, sites=sites)


PLANS = {
    "exact": {},
    "fp16": dict.fromkeys(SITES, "fp16"),
    "int8": dict.fromkeys(SITES, "int8"),
    "ffn_only": {**dict.fromkeys(SITES, "fp16"), "ffn_in": "int8", "ffn_out": "int8"},
    "int8 beside fp32": {"qkv": "int8", "ffn_in": "int8"},
    "fp16 beside fp32": {"out": "fp16", "ffn_in": "fp16"},
    "fp32 beside int8 attention": {"scores": "int8", "context": "int8"},
}


@pytest.mark.parametrize("architecture", ["sm_75", "sm_80"])
@pytest.mark.parametrize("name", PLANS)
def test_the_encoder_equals_the_reference(
    name: str, architecture: str, checkpoint: Checkpoint, scaled: Plan
) -> None:
    plan = plan_of(scaled, PLANS[name])
    session = session_of(checkpoint, plan, architecture)
    batch = batch_of(LENGTHS)
    used = {entry.precision for entry in plan.sites.values()}
    kind = "int8" if "int8" in used else "fp16" if "fp16" in used else "fp32"
    for output in ("first", "mean", "tokens"):
        wanted = open_session(checkpoint, as_reference(plan), "reference").run(batch, output=output)
        got = session.run(batch, output=output)
        assert got.dtype == np.float32
        assert got.shape == wanted.shape
        assert np.abs(got - wanted).max() <= TOLERANCE[kind]
        assert np.array_equal(got, session.run_eagerly(batch, output))
    for layer in range(scaled.layers):
        for site in SITES:
            expected = PLANS[name].get(site, "fp32")
            assert session.executed()[f"layer.{layer}.{site}"] == expected
    session.close()
    launcher(backend(architecture)).check_guards()
