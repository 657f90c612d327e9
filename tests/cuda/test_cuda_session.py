"""A whole small encoder on the CUDA kernels, launch by launch without a GPU, and the reference."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from bert import Shape, batch_of, open_session, scaled_plan, write_bert
from bert import backend as cpu_backend
from emulated import backend, launcher, needs_compiler
from samp_kernels.cuda.backend import CudaBackend
from samp_kernels.cuda.emulator import CpuLauncher
from samp_kernels.cuda.session import OUTPUTS, SEQUENCES, CudaSession, token_buckets
from samp_kernels.interface import SITES, Batch, KernelError, UnsupportedPrecision

from samp_core.checkpoint import Checkpoint, load_checkpoint
from samp_core.encoder import LoopSession, check_plan, prepare
from samp_core.plan import Plan, Recipe, SitePlan
from samp_core.quantize import export_weights

pytestmark = needs_compiler
LENGTHS = (7, 1, 12, 30, 3)
# Largest difference in states, which are of size 1 to 4.
TOLERANCE = {"fp32": 2e-5, "fp16": 2e-2, "bf16": 0.15, "int8": 0.3}


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
    """16-bit floats are fp32 to the reference."""
    halves = ("fp16", "bf16")
    sites = {k: SitePlan() if v.precision in halves else v for k, v in plan.sites.items()}
    return replace(plan, sites=sites)


PLANS = {
    "exact": {},
    "fp16": dict.fromkeys(SITES, "fp16"),
    "bf16": dict.fromkeys(SITES, "bf16"),
    "int8": dict.fromkeys(SITES, "int8"),
    "ffn_only": {**dict.fromkeys(SITES, "fp16"), "ffn_in": "int8", "ffn_out": "int8"},
    "int8 beside fp32": {"qkv": "int8", "ffn_in": "int8"},
    "fp16 beside fp32": {"out": "fp16", "ffn_in": "fp16"},
    "int8 beside bf16": {**dict.fromkeys(SITES, "bf16"), "ffn_in": "int8", "ffn_out": "int8"},
    "bf16 beside fp16": {**dict.fromkeys(SITES, "fp16"), "out": "bf16", "ffn_in": "bf16"},
    "int8 scores beside fp32": {"scores": "int8"},
    "int8 context beside fp32": {"context": "int8"},
    "fp32 beside int8 attention": {"scores": "int8", "context": "int8"},
}


@pytest.mark.parametrize("architecture", ["sm_75", "sm_80"])
@pytest.mark.parametrize("name", PLANS)
def test_the_encoder_equals_the_reference(
    name: str, architecture: str, checkpoint: Checkpoint, scaled: Plan
) -> None:
    plan = plan_of(scaled, PLANS[name])
    used = {entry.precision for entry in plan.sites.values()}
    if architecture == "sm_75" and "bf16" in used:
        with pytest.raises(UnsupportedPrecision, match="bf16"):
            session_of(checkpoint, plan, architecture)
        return
    session = session_of(checkpoint, plan, architecture)
    batch = batch_of(LENGTHS)
    kind = next((k for k in ("int8", "bf16", "fp16") if k in used), "fp32")
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


@pytest.mark.parametrize("name", ["fp16", "bf16 beside fp16", "ffn_only"])
def test_on_sm_90a_all_floats_of_16_bits_are_wgmmas(
    name: str, checkpoint: Checkpoint, scaled: Plan
) -> None:
    plan, batch = plan_of(scaled, PLANS[name]), batch_of(LENGTHS)
    session = session_of(checkpoint, plan, "sm_90a")
    wanted = open_session(checkpoint, as_reference(plan), "reference").run(batch)
    kind = {"fp16": "fp16", "ffn_only": "int8"}.get(name, "bf16")
    assert np.abs(session.run(batch) - wanted).max() <= TOLERANCE[kind]
    gemms = [one for one in session.launches(batch) if one.op == "gemm"]
    floats = {one.unit for one in gemms if one.ran != ("int8",)}
    assert floats
    assert all("wgmma" in unit for unit in floats)
    assert all(launcher(backend("sm_90a")).counts(unit).mma > 0 for unit in floats)
    session.close()
    launcher(backend("sm_90a")).check_guards()


@pytest.mark.parametrize(
    ("name", "architecture"),
    [("exact", "sm_80"), ("fp16", "sm_80"), ("int8", "sm_80"), ("fp16", "sm_90a")],
)
def test_alone_equals_in_a_batch(
    name: str, architecture: str, checkpoint: Checkpoint, scaled: Plan
) -> None:
    """Bit for bit, whatever the bucket: in fp32 and fp16, too."""
    session = session_of(checkpoint, plan_of(scaled, PLANS[name]), architecture)
    together = batch_of(LENGTHS)
    for output in ("first", "mean", "tokens"):
        whole = session.run(together, output=output)
        for i in (0, 3):
            begin, end = together.cu_seqlens[i : i + 2].tolist()
            one = Batch(
                together.ids[begin:end],
                together.types[begin:end],
                together.positions[begin:end],
                np.array([0, end - begin], np.int32),
                end - begin,
            )
            rows = slice(begin, end) if output == "tokens" else slice(i, i + 1)
            assert np.array_equal(session.run(one, output=output), whole[rows])


def test_seven_launches_a_layer_under_any_plan(checkpoint: Checkpoint, scaled: Plan) -> None:
    batch = batch_of(LENGTHS)
    for precisions in PLANS.values():
        session = session_of(checkpoint, plan_of(scaled, precisions))
        for output, more in (("first", 1), ("mean", 2)):
            launches = session.launches(batch, output)
            assert len(launches) == 7 * scaled.layers + more
        timed = session.profile(batch)
        assert len(timed) == 7 * scaled.layers + 1
        assert all(seconds > 0 for _, _, seconds in timed)


def test_a_scale_for_each_token(checkpoint: Checkpoint, scaled: Plan) -> None:
    recipe = Recipe(activation="token")
    plan = plan_of(scaled, {"qkv": "int8", "ffn_in": "int8"}, recipe)
    batch = batch_of(LENGTHS)
    wanted = open_session(checkpoint, plan, "reference").run(batch)
    got = session_of(checkpoint, plan).run(batch)
    assert np.abs(got - wanted).max() <= TOLERANCE["int8"]
    static = session_of(checkpoint, plan_of(scaled, {"qkv": "int8", "ffn_in": "int8"})).run(batch)
    assert not np.array_equal(got, static)


def test_a_position_bias(checkpoint: Checkpoint, scaled: Plan) -> None:
    config = replace(checkpoint.config, position_bias=True)
    rng = np.random.default_rng(0)
    bias = rng.normal(0, 1, (config.heads, 2 * 32 - 1)).astype(np.float32)
    batch = batch_of(LENGTHS)
    for name in ("exact", "fp16", "int8"):
        plan = plan_of(scaled, PLANS[name])
        tensors = {**export_weights(checkpoint.tensors, plan), "position_bias": bias}
        other = as_reference(plan)
        wanted = prepare(cpu_backend("reference"), config, tensors, other).run(batch)
        session = CudaSession(backend(), config, tensors, plan, max_tokens=64)
        got = session.run(batch)
        kind = name if name != "exact" else "fp32"
        assert np.abs(got - wanted).max() <= TOLERANCE[kind]


def test_a_batch_beyond_the_buffers_makes_larger_ones(checkpoint: Checkpoint, scaled: Plan) -> None:
    plan = plan_of(scaled, PLANS["int8"])
    small, large = batch_of(LENGTHS), batch_of((30,) * 5)
    session = session_of(checkpoint, plan)
    before = session.run(small)
    grown = session.run(large)
    assert np.array_equal(session.run(small), before)
    assert np.array_equal(session_of(checkpoint, plan).run(large), grown)


def test_a_bad_batch_leaves_the_session_usable(checkpoint: Checkpoint, scaled: Plan) -> None:
    session = session_of(checkpoint, plan_of(scaled, PLANS["int8"]))
    good = batch_of(LENGTHS)
    wanted = session.run(good)
    with pytest.raises(KernelError, match="ids from"):
        session.run(replace(good, ids=good.ids + 100))
    with pytest.raises(KernelError, match="rise from 0"):
        session.run(replace(good, cu_seqlens=good.cu_seqlens[:-1]))
    with pytest.raises(KernelError, match="first, mean, tokens"):
        session.run(good, output="last")  # type: ignore[arg-type]
    assert np.array_equal(session.run(good), wanted)


def test_prepare_takes_the_session_and_refuses_what_it_lacks(
    checkpoint: Checkpoint, scaled: Plan
) -> None:
    plan = plan_of(scaled, PLANS["int8"])
    tensors = export_weights(checkpoint.tensors, plan)
    session = prepare(backend(), checkpoint.config, tensors, plan, max_tokens=64)
    assert session.run(batch_of(LENGTHS)).shape == (len(LENGTHS), 64)
    mixed = plan_of(scaled, {"scores": "fp16"})
    tensors = export_weights(checkpoint.tensors, mixed)
    with pytest.raises(UnsupportedPrecision, match="each int8 or one of fp32"):
        prepare(backend(), checkpoint.config, tensors, mixed)


class Counting(CpuLauncher):
    """The emulator as a device with a stream: what is captured, copied and launched is counted."""

    stream = None

    def __init__(self) -> None:
        super().__init__("sm_80")
        self.captured: list[int] = []
        self.replayed = 0
        self.copies: list[tuple[str, int, bool]] = []
        self.pinned_at: list[range] = []

    def capture(self, launches: Any) -> Any:
        self.captured.append(len(launches))
        whole = super().capture(launches)

        def replay() -> None:
            self.replayed += 1
            whole()

        return replay

    def pinned(self, size: int) -> Any:
        made = super().pinned(size)
        self.pinned_at.append(range(made.ctypes.data, made.ctypes.data + size))
        return made

    def to_device(self, buffer: Any, data: Any, offset: int = 0) -> None:
        self._note("in", data)
        super().to_device(buffer, data, offset)

    def to_host(self, buffer: Any, data: Any, offset: int = 0) -> None:
        self._note("out", data)
        super().to_host(buffer, data, offset)

    def _note(self, way: str, data: Any) -> None:
        pinned = any(data.ctypes.data in place for place in self.pinned_at)
        self.copies.append((way, data.nbytes, pinned))


def test_a_servers_graphs_are_captured_at_start_and_a_batch_is_two_copies(
    checkpoint: Checkpoint, scaled: Plan
) -> None:
    """One graph for each bucket and output; then a pass is one copy in, one replay, one copy out,
    both copies of pinned memory."""
    plan = plan_of(scaled, PLANS["ffn_only"])
    counting = Counting()
    tensors = export_weights(checkpoint.tensors, plan)
    session = CudaSession(CudaBackend(counting), checkpoint.config, tensors, plan, max_tokens=64)
    buckets = token_buckets(64)
    sequences = sum(len({min(n, tokens) for n in SEQUENCES[:2]}) for tokens in buckets)
    assert len(counting.captured) == len(OUTPUTS) * sequences
    assert set(counting.captured) == {7 * scaled.layers + 1, 7 * scaled.layers + 2}
    made = len(counting.captured)
    for lengths in (LENGTHS, (1,), (30, 30)):
        batch = batch_of(lengths)
        for output in OUTPUTS:
            counting.copies.clear()
            counting.launched.clear()
            counting.replayed = 0
            session.run(batch, output=output)  # type: ignore[arg-type]
            assert [(way, pinned) for way, _, pinned in counting.copies] == [
                ("in", True), ("out", True),
            ]  # fmt: skip
            assert counting.replayed == 1
            assert len(counting.launched) in counting.captured
    assert len(counting.captured) == made, "a bucket was met that was not captured at start"


@pytest.mark.parametrize("most", [1, 16, 100, 8192])
def test_buckets_waste_little(most: int) -> None:
    buckets = token_buckets(most)
    assert buckets[-1] >= most
    assert len(buckets) <= 64
    for low, high in itertools.pairwise(buckets):
        assert high - low <= max(16, low / 4)


def test_the_loop_over_ops_runs_on_this_backend(checkpoint: Checkpoint, scaled: Plan) -> None:
    """What calibration and the search use: observed passes, and passes from a layer on."""
    exact, quantized = plan_of(scaled, {}), plan_of(scaled, {"qkv": "int8", "context": "int8"})
    batch = batch_of((3, 7, 12))
    seen: dict[str, list[tuple[int, ...]]] = {}
    results = {}
    for name in ("reference", "cuda"):
        own = cpu_backend(name) if name == "reference" else backend()
        tensors = export_weights(checkpoint.tensors, exact)
        loop = LoopSession(own, checkpoint.config, tensors, exact)
        seen[name] = []

        def observe(site: str, x: Any, name: str = name) -> None:
            seen[name].append(tuple(x[0].shape if isinstance(x, tuple) else x.shape))

        whole = loop.observe(batch, "tokens", observe)
        tensors = export_weights(checkpoint.tensors, quantized)
        other = LoopSession(own, checkpoint.config, tensors, quantized)
        start = loop.layer_inputs(batch)[1]
        results[name] = (whole, loop.run_from(start), other.run_from(start), other.run(batch))
    assert seen["cuda"] == seen["reference"]
    for most, got, wanted in zip(
        (2e-5, 2e-5, 0.3, 0.3), results["cuda"], results["reference"], strict=True
    ):
        assert np.abs(got - wanted).max() <= most
