"""Stored int8: error bounds, rounding, saturation, and the tensors that a plan stores."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file as torch_load
from samp_kernels.interface import Array
from tiny import CONFIG, tiny_weights

from samp_core.errors import SampError
from samp_core.plan import Plan, Recipe, SitePlan, input_scale, mode_plan
from samp_core.quantize import export_weights, quantize_weight, restored
from samp_core.tensors import load_tensors, save_tensors

SITES = ("qkv", "scores", "context", "out", "ffn_in", "ffn_out")
NAMES = ("qkv", "out", "ffn_in", "ffn_out")
CHANNEL, TENSOR = Recipe(weight="channel"), Recipe(weight="tensor")


def plan_of(**sites: SitePlan) -> Plan:
    config = {"layers": 1, "hidden": CONFIG.hidden, "heads": CONFIG.heads, "ffn": CONFIG.ffn}
    scales = {f"layer.0.{name}.input_scale": 0.1 * (i + 1) for i, name in enumerate(NAMES)}
    scales |= {f"layer.0.scores.{part}_scale": 0.5 for part in "qk"}
    scales |= {f"layer.0.context.{part}_scale": 0.25 for part in "pv"}
    entries = {f"layer.0.{name}": entry for name, entry in sites.items()}
    return Plan("0", config, "reference", {}, entries, scales=scales)


@settings(max_examples=60)
@given(st.integers(1, 9), st.integers(1, 40), st.integers(-30, 20), st.integers(0, 2**32 - 1))
def test_error_bounds(outputs: int, inputs: int, magnitude: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = 10.0 ** rng.uniform(-3, 3, (outputs, 1)) * 2.0**magnitude
    weight = (rng.standard_normal((outputs, inputs)) * rows).astype(np.float32)
    for recipe in (CHANNEL, TENSOR):
        q, scale = quantize_weight(weight, recipe)
        assert (q.dtype, scale.dtype) == (np.int8, np.float32)
        assert (q.shape, scale.shape) == ((outputs, inputs), (outputs,))
        assert np.abs(q.astype(int)).max() == 127
        error = np.abs(q * scale[:, None].astype(np.float64) - weight)
        assert (error <= 0.5 * scale[:, None] * (1 + 1e-4)).all()
        amax = np.abs(weight).max(axis=1) if recipe is CHANNEL else np.abs(weight).max()
        assert np.allclose(scale * 127, amax, rtol=1e-6)


def test_half_goes_to_even() -> None:
    weight = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]], np.float32)
    q, scale = quantize_weight(weight, CHANNEL)
    assert scale.tolist() == [1.0]
    assert q.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]


def test_the_largest_are_plus_and_minus_127() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((200, 30)).astype(np.float32)
    weight[:, 0] = np.abs(weight).max(axis=1) * np.where(rng.random(200) < 0.5, -1, 1)
    q, _ = quantize_weight(weight, CHANNEL)
    assert (q[:, 0] == 127 * np.sign(weight[:, 0])).all()
    assert q.min() == -127


@pytest.mark.parametrize("recipe", [CHANNEL, TENSOR])
@pytest.mark.parametrize("tiny", [0.0, 1e-45, 1e-39])
@pytest.mark.filterwarnings("error")
def test_a_row_of_nothing(recipe: Recipe, tiny: float) -> None:
    weight = np.full((3, 4), tiny, np.float32)
    q, scale = quantize_weight(weight, recipe)
    assert not q.any()
    assert np.isfinite(scale).all()
    assert (scale > 0).all()
    weight[1] = 5.0
    q, scale = quantize_weight(weight, recipe)
    assert q.tolist() == [[0] * 4, [127] * 4, [0] * 4]


def test_what_a_float_plan_stores() -> None:
    tensors = tiny_weights(0)
    stored = export_weights({k: v.astype(np.float64) for k, v in tensors.items()}, plan_of())
    assert set(stored) == set(tensors)
    assert all(np.array_equal(stored[k], v) for k, v in tensors.items())
    assert {v.dtype for v in stored.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("recipe", [CHANNEL, TENSOR])
def test_what_a_quantized_gemm_stores(name: str, recipe: Recipe) -> None:
    tensors = tiny_weights(0)
    plan = plan_of(**{name: SitePlan("int8", recipe)})
    stored = export_weights(tensors, plan)
    site = f"layer.0.{name}"
    q, scale = quantize_weight(tensors[f"{site}.weight"], recipe)
    assert np.array_equal(stored[f"{site}.weight"], q)
    assert np.array_equal(stored[f"{site}.weight_scale"], scale)
    assert stored[f"{site}.input_scale"].dtype == np.float32
    assert stored[f"{site}.input_scale"] == np.float32(plan.scales[f"{site}.input_scale"])
    assert set(stored) - set(tensors) == {f"{site}.weight_scale", f"{site}.input_scale"}
    for other in set(tensors) - {f"{site}.weight"}:
        assert np.array_equal(stored[other], tensors[other])


def test_token_scales_are_not_stored() -> None:
    plan = replace(plan_of(qkv=SitePlan("int8", Recipe(activation="token"))), scales={})
    stored = export_weights(tiny_weights(0), plan)
    assert "layer.0.qkv.weight_scale" in stored
    assert "layer.0.qkv.input_scale" not in stored


def test_quantized_attention_stores_its_scales() -> None:
    both = {name: SitePlan("int8", Recipe()) for name in ("scores", "context")}
    stored = export_weights(tiny_weights(0), plan_of(**both))
    new = {k: v.tolist() for k, v in stored.items() if k.endswith("_scale")}
    assert new == {
        **{f"layer.0.scores.{part}_scale": [0.5] for part in "qk"},
        **{f"layer.0.context.{part}_scale": [0.25] for part in "pv"},
    }


def test_the_memo_changes_nothing() -> None:
    """Plans of one model share quantized matrices, by granularity."""
    tensors, memo = tiny_weights(0), {}  # type: ignore[var-annotated]
    for recipe in (CHANNEL, TENSOR, CHANNEL):
        plan = mode_plan(plan_of(), "full", 1, NAMES, recipe)
        shared, alone = export_weights(tensors, plan, memo), export_weights(tensors, plan)
        assert shared.keys() == alone.keys()
        assert all(np.array_equal(shared[k], alone[k]) for k in alone)
    assert len(memo) == 2 * len(NAMES)


@pytest.mark.parametrize(
    ("entry", "code"),
    [
        (SitePlan("bits4", Recipe()), "unsupported_precision"),
        (SitePlan("int8", Recipe(smooth=0.5)), "unsupported_recipe"),
        (SitePlan("int8", Recipe(rounding="adaround")), "unsupported_recipe"),
    ],
)
def test_what_has_no_stored_form(entry: SitePlan, code: str) -> None:
    with pytest.raises(SampError, match=f"{code}: layer.0.out") as caught:
        export_weights(tiny_weights(0), plan_of(out=entry))
    assert caught.value.allowed


@pytest.mark.parametrize(
    ("site", "name"),
    [("qkv", "qkv.input_scale"), ("scores", "scores.k_scale"), ("context", "context.p_scale")],
)
def test_a_missing_scale_is_named(site: str, name: str) -> None:
    plan = plan_of(**{site: SitePlan("int8", Recipe())})
    less: dict[str, Any] = {k: v for k, v in plan.scales.items() if k != f"layer.0.{name}"}
    with pytest.raises(SampError, match=f"no_scale: the plan quantizes layer.0.{site} .*{name}"):
        export_weights(tiny_weights(0), replace(plan, scales=less))


def dequantized(stored: dict[str, Array], name: str) -> Array:
    return stored[f"{name}.weight"] * stored[f"{name}.weight_scale"][:, None]


def test_per_channel_is_nearer_than_per_tensor() -> None:
    tensors = tiny_weights(0)
    tensors["layer.0.qkv.weight"][0] *= 50
    errors = []
    for recipe in (CHANNEL, TENSOR):
        stored = export_weights(tensors, plan_of(qkv=SitePlan("int8", recipe)))
        near = dequantized(stored, "layer.0.qkv") - tensors["layer.0.qkv.weight"]
        errors.append(np.abs(near[1:]).max())
    assert errors[0] * 10 < errors[1]


def test_fp8_weights_are_the_nearest_e4m3_numbers(tmp_path: Path) -> None:
    tensors = tiny_weights(0)
    tensors["layer.0.out.weight"][3] = 0.0
    plan = plan_of(qkv=SitePlan("fp8", CHANNEL), out=SitePlan("fp8", Recipe(activation="token")))
    scaled = replace(plan, scales={**plan.scales, input_scale("layer.0.qkv", "fp8"): 0.25})
    with pytest.raises(SampError, match=r"layer.0.qkv .*layer.0.qkv.fp8_input_scale"):
        export_weights(tensors, plan)
    stored = export_weights(tensors, scaled)
    for name in ("layer.0.qkv", "layer.0.out"):
        weight, scale = tensors[f"{name}.weight"], stored[f"{name}.weight_scale"]
        largest = np.abs(weight).max(axis=1)
        assert np.allclose(scale[largest > 0] * 448, largest[largest > 0], rtol=1e-6)
        assert stored[f"{name}.weight"].dtype == np.uint8
        x = torch.from_numpy(weight / scale[:, None])
        wanted = x.to(torch.float8_e4m3fn).float().numpy() * scale[:, None]
        assert np.array_equal(restored(stored[f"{name}.weight"], scale), wanted)
    assert stored["layer.0.qkv.input_scale"] == [0.25]
    assert "layer.0.out.input_scale" not in stored
    # In the file they are F8_E4M3, which other programs read as such.
    file = tmp_path / "weights.safetensors"
    save_tensors(file, stored)
    again = load_tensors(file)
    assert again.keys() == stored.keys()
    for name, array in stored.items():
        assert again[name].dtype == array.dtype
        assert np.array_equal(again[name], array)
    there = torch_load(file)
    held = there["layer.0.qkv.weight"]
    assert held.dtype == torch.float8_e4m3fn
    assert np.array_equal(held.view(torch.uint8).numpy(), stored["layer.0.qkv.weight"])
    assert np.array_equal(there["layer.0.qkv.bias"].numpy(), stored["layer.0.qkv.bias"])
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(SafetensorError):
        load_tensors(file)


def test_a_file_with_fp8_weights_is_read_without_ml_dtypes(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_tensors(
        file, {"w": np.arange(6, dtype=np.uint8).reshape(2, 3), "b": np.ones(1, np.float32)}
    )
    code = (
        "import sys; from pathlib import Path; from samp_core.tensors import load_tensors; "
        f"print(load_tensors(Path({str(file)!r}))['w'].tolist(), 'ml_dtypes' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[[0, 1, 2], [3, 4, 5]] False"


def test_fp8_and_int8_of_a_site_share_nothing() -> None:
    tensors, memo = tiny_weights(0), {}  # type: ignore[var-annotated]
    plan = plan_of(qkv=SitePlan("int8", CHANNEL))
    plan = replace(plan, scales={**plan.scales, "layer.0.qkv.fp8_input_scale": 0.25})
    for kind, stored_as in (("int8", np.int8), ("fp8", np.uint8)):
        one = replace(plan, sites={"layer.0.qkv": SitePlan(kind, CHANNEL)})
        assert export_weights(tensors, one, memo)["layer.0.qkv.weight"].dtype == stored_as
    assert len(memo) == 2
