"""Whole native encoders at every level: against the reference, in any batch, with any threads."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forked import wait_for
from hypothesis import given, settings
from hypothesis import strategies as st
from native import LEVELS, REFERENCE, backend, every_level
from samp_kernels.cpu import missing
from samp_kernels.interface import (
    GEMM_SITES,
    SITES,
    Array,
    Batch,
    EncoderConfig,
    KernelError,
    OutputKind,
    pack_batch,
)

from samp_core import calibrate
from samp_core.encoder import LoopSession, prepare
from samp_core.encoder_files import save_encoder
from samp_core.plan import Plan, Recipe, SitePlan, mode_plan
from samp_core.quantize import export_weights

SOME = settings(max_examples=8, deadline=None)
OUTPUTS: tuple[OutputKind, ...] = ("first", "mean", "tokens")
# layers, hidden, heads, ffn: heads of 32, 64 and 26.
SHAPES = {
    "head 32": (2, 96, 3, 200),
    "head 64": (1, 128, 2, 312),
    "head 26": (2, 312, 12, 1200),
    "position bias": (2, 128, 2, 200),
}


@cache
def encoder(shape: str) -> tuple[EncoderConfig, dict[str, Array], Plan]:
    """A random encoder and its float plan with the scales and outliers of every site."""
    layers, hidden, heads, ffn = SHAPES[shape]
    config = EncoderConfig("bert", layers, hidden, heads, ffn, 50, 64, 2, 1e-12, "gelu_tanh")
    config = replace(config, position_bias=shape == "position bias")
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Array:
        return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

    tensors = {f"embeddings.{part}": 8 * normal(rows, hidden)
               for part, rows in (("word", 50), ("position", 64), ("type", 2))}  # fmt: skip
    sizes = {"qkv": (3 * hidden, hidden), "out": (hidden, hidden),
             "ffn_in": (ffn, hidden), "ffn_out": (hidden, ffn)}  # fmt: skip
    norms = ["embeddings.ln"]
    for i in range(layers):
        norms += [f"layer.{i}.attention_ln", f"layer.{i}.output_ln"]
        for site, size in sizes.items():
            tensors[f"layer.{i}.{site}.weight"] = normal(*size)
            tensors[f"layer.{i}.{site}.bias"] = normal(size[0])
    for name in norms:
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = 1 + normal(hidden), normal(hidden)
    if config.position_bias:
        tensors["position_bias"] = (3 * rng.standard_normal((heads, 127))).astype(np.float32)
    sizes_of = {"layers": layers, "hidden": hidden, "heads": heads, "ffn": ffn}
    plan = mode_plan(Plan("0", sizes_of, "cpu", {}, {}), "float", 0, (), Recipe())
    session = LoopSession(REFERENCE, config, tensors, plan)
    ranges = calibrate.observe(session, [batch_of([30, 9, 17])], "tokens", np.asarray)
    recipe = Recipe(outliers=3)
    scales, outliers = calibrate.scales(ranges, Recipe()), calibrate.outliers(ranges, recipe)
    return config, tensors, replace(plan, scales=scales, outliers=outliers)


def batch_of(counts: list[int], seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    ids = [rng.integers(0, 50, n).astype(np.int32) for n in counts]
    return pack_batch(ids, [rng.integers(0, 2, n).astype(np.int32) for n in counts])


def plans(draw: Any, plan: Plan) -> Plan:
    """Any precision and recipe at any site."""
    kinds = st.sampled_from(["fp32", "int8", "tensor", "outliers", "token"])
    sites = {}
    for site in plan.sites:
        kind, name = draw(kinds), site.rsplit(".", 1)[1]
        recipe = Recipe()
        if kind == "tensor":
            recipe = Recipe(weight="tensor")
        elif kind == "outliers" and name in GEMM_SITES:
            recipe = Recipe(outliers=3)
        elif kind == "token" and name in ("qkv", "ffn_in"):
            recipe = Recipe(activation="token")
        sites[site] = SitePlan() if kind == "fp32" else SitePlan("int8", recipe)
    return replace(plan, sites=sites, mode=None)


@every_level
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("threads", [1, 2])
def test_float_against_the_reference(level: str, shape: str, threads: int) -> None:
    config, tensors, plan = encoder(shape)
    session = prepare(backend(level), config, tensors, plan, threads=threads)
    exact = prepare(REFERENCE, config, tensors, plan)
    for counts in ([1], [16], [5, 1, 33, 2], [40] * 3):
        for output in OUTPUTS:
            y = session.run(batch_of(counts), output=output)
            wanted = exact.run(batch_of(counts), output=output)
            assert y.shape == wanted.shape
            assert np.abs(y - wanted).max() <= 2e-5
    assert session.executed() == dict.fromkeys(plan.sites, "fp32")


@every_level
@SOME
@given(
    st.data(),
    st.sampled_from(sorted(SHAPES)),
    st.sampled_from(OUTPUTS),
    st.lists(st.integers(1, 30), min_size=1, max_size=4),
)
def test_any_plan(
    level: str, data: st.DataObject, shape: str, output: OutputKind, counts: list[int]
) -> None:
    """Against the reference, and against this level's own loop over ops."""
    config, tensors, plan = encoder(shape)
    plan = plans(data.draw, plan)
    stored = export_weights(tensors, plan)
    b, batch = backend(level), batch_of(counts)
    session = prepare(b, config, stored, plan, threads=2)
    y = session.run(batch, output=output)
    assert session.executed() == {site: plan.precision(site) for site in plan.sites}
    for other in (LoopSession(b, config, stored, plan), prepare(REFERENCE, config, stored, plan)):
        wanted = other.run(batch, output=output)
        # A value on an edge goes to either side, and later layers carry the step on.
        assert np.abs(y - wanted).mean() <= 0.01
        assert np.abs(y - wanted).max() <= 0.3


@every_level
@SOME
@given(st.data(), st.sampled_from(sorted(SHAPES)), st.sampled_from(OUTPUTS))
def test_alone_and_in_a_batch_bit_for_bit(
    level: str, data: st.DataObject, shape: str, output: OutputKind
) -> None:
    config, tensors, plan = encoder(shape)
    plan = plans(data.draw, plan)
    counts = data.draw(st.lists(st.integers(1, 40), min_size=2, max_size=6))
    session = prepare(backend(level), config, export_weights(tensors, plan), plan, threads=2)
    batch = batch_of(counts)
    together = session.run(batch, output=output)
    for i, (begin, end) in enumerate(pairwise(batch.cu_seqlens)):
        rows = slice(begin, end)
        one = pack_batch([batch.ids[rows]], [batch.types[rows]])
        part = together[rows] if output == "tokens" else together[i : i + 1]
        np.testing.assert_array_equal(session.run(one, output=output), part)


@pytest.mark.skipif(bool(missing()), reason=missing())
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_a_worker_does_not_stay_on_the_callers_core() -> None:
    """The scheduler may wake it there again and again, where it gets no turn before the end.

    It is woken elsewhere and may then go where the caller may: no mask outlives a wake-up.
    """
    config, tensors, plan = encoder("head 32")
    here = ctypes.CDLL(None).sched_getcpu
    before = set(os.listdir("/proc/self/task"))
    session = prepare(backend(best()), config, tensors, plan, threads=2)
    session.run(batch_of([9]))
    (worker,) = (int(name) for name in set(os.listdir("/proc/self/task")) - before)
    moved = 0
    for _ in range(40):
        pinned = {here()}
        os.sched_setaffinity(worker, pinned)
        for _ in range(3):  # it runs there, sleeps there, and is told apart before it is woken
            session.run(batch_of([9] * 20))
            time.sleep(0.002)
        # A worker that came too late for its pass takes its mask off when it gets a turn.
        ends = (pinned, os.sched_getaffinity(0))
        assert wait_for(lambda: os.sched_getaffinity(worker) in ends, 10)  # noqa: B023
        moved += os.sched_getaffinity(worker) != pinned
    assert moved
    session.close()


@every_level
@pytest.mark.parametrize("kind", ["float", "full"])
def test_threads_change_nothing(level: str, kind: Any) -> None:
    config, tensors, plan = encoder("head 32")
    plan = mode_plan(plan, kind, 2, SITES, Recipe())
    stored = export_weights(tensors, plan)
    batches = [batch_of(counts) for counts in ([1], [7, 3], [30, 1, 2, 40], [9] * 12)]
    results = []
    for threads in (1, 2, 3, 7):
        session = prepare(backend(level), config, stored, plan, threads=threads)
        results.append([session.run(batch, output="tokens") for batch in batches * 3])
        session.close()
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.skipif(bool(missing()), reason=missing())
def test_sessions_in_any_order_keep_their_buffers_apart() -> None:
    """Small after large, plans in turns: nothing is left over from the pass before."""
    config, tensors, plan = encoder("head 32")
    sessions = []
    for mode in ("float", "ffn_only", "full"):
        made = mode_plan(plan, mode, 2, SITES, Recipe())  # type: ignore[arg-type]
        stored = export_weights(tensors, made)
        sessions.append(prepare(backend(best()), config, stored, made, threads=2))
    batches = [batch_of(counts, i) for i, counts in enumerate(([40] * 9, [1], [3, 20], [50]))]
    first = [[s.run(batch, output=o) for o in OUTPUTS] for batch in batches for s in sessions]
    again = [[s.run(batch, output=o) for o in OUTPUTS] for batch in reversed(batches)
             for s in reversed(sessions)]  # fmt: skip
    for a, b in zip(first, reversed(again), strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.skipif(bool(missing()), reason=missing())
def test_a_bad_batch_is_refused() -> None:
    config, tensors, plan = encoder("head 32")
    session = prepare(backend(best()), config, tensors, plan, threads=1)
    good = batch_of([3, 4])
    for wrong in (
        {"ids": good.ids + 50},
        {"ids": good.ids[:-1]},
        {"types": good.types - 1},
        {"positions": good.positions + 64},
        {"cu_seqlens": np.array([0, 3, 8], np.int32)},
        {"cu_seqlens": np.array([0, 3, 3, 7], np.int32)},
        {"cu_seqlens": np.array([1, 7], np.int32)},
        {"cu_seqlens": np.array([0, 5], np.int32)},
        {"cu_seqlens": np.array([0], np.int32)},
    ):
        with pytest.raises(KernelError):
            session.run(replace(good, **wrong))  # type: ignore[arg-type]
    with pytest.raises(KernelError, match="output 'last'"):
        session.run(good, output="last")  # type: ignore[arg-type]
    assert session.run(good).shape == (2, 96)
    session.close()
    with pytest.raises(KernelError, match="closed"):
        session.run(good)


@pytest.mark.skipif(bool(missing()), reason=missing())
def test_profile_names_every_op() -> None:
    config, tensors, plan = encoder("head 32")
    session = prepare(backend(best()), config, tensors, plan, threads=2)
    timings = session.profile(batch_of([20, 10]))
    names = {site for _, site, _ in timings}
    assert {f"layer.{i}.{site}" for i in range(2) for site in GEMM_SITES} <= names
    assert all(0 <= seconds < 5 for _, _, seconds in timings)


@pytest.mark.skipif(bool(missing()), reason=missing())
def test_profile_by_thread_fits_into_the_pass() -> None:
    config, tensors, plan = encoder("head 32")
    session = backend(best()).prepare(config, tensors, plan, threads=2)
    passed, threads = session.profile_threads(batch_of([20, 10]))
    assert len(threads) == 2
    assert all(sum(seconds for _, _, seconds in one) <= passed for one in threads)
    names = {site for one in threads for _, site, _ in one}
    assert {f"layer.{i}.{site}" for i in range(2) for site in GEMM_SITES} <= names
    session.close()


def best() -> str:
    from samp_kernels.cpu import level

    return level()


# The process of a served encoder

LOAD = """
import json, sys
from pathlib import Path
from samp_core import serving
from samp_core.encoder_files import load_session
import numpy as np
from samp_kernels.interface import pack_batch
session = load_session(Path(sys.argv[1]), 2)
ids = [np.arange(9, dtype=np.int32)]
y = session.run(pack_batch(ids, [np.zeros(9, np.int32)]))
from samp_kernels.cpu import level
print(json.dumps({"modules": sorted(sys.modules), "y": y.tolist(), "level": level(),
                  "executed": session.executed()}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder folder as a build writes it, every site int8."""
    from safetensors.numpy import save_file

    config, tensors, plan = encoder("head 32")
    plan = mode_plan(plan, "full", 2, SITES, Recipe())
    made = tmp_path_factory.mktemp("encoder")
    save_encoder(made, config, plan)
    save_file(export_weights(tensors, plan), made / "weights.safetensors")
    return made


def load(folder: Path, level: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", LOAD, str(folder)],
        env={**os.environ, "SAMP_CPU_LEVEL": level},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@every_level
def test_a_served_process_at_each_level(level: str, folder: Path) -> None:
    """SAMP_CPU_LEVEL picks the level; no torch, and nothing that only a build needs."""
    b = backend(level)
    done = load(folder, level)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["level"] == level
    heavy = {
        "torch",
        "scipy",
        "transformers",
        "pydantic",
        "typer",
        "rich",
        "yaml",
        "safetensors.torch",
    }
    assert not heavy & set(found["modules"])
    assert set(found["executed"].values()) == {"int8"}
    config, tensors, plan = encoder("head 32")
    plan = mode_plan(plan, "full", 2, SITES, Recipe())
    ids = np.arange(9, dtype=np.int32)
    session = prepare(b, config, export_weights(tensors, plan), plan, threads=2)
    np.testing.assert_array_equal(
        np.float32(found["y"]), session.run(pack_batch([ids], [np.zeros(9, np.int32)]))
    )


@pytest.mark.skipif(bool(missing()), reason=missing())
def test_a_level_that_cannot_run_is_refused(folder: Path) -> None:
    done = load(folder, "avx1024")
    assert done.returncode != 0
    last = done.stderr.splitlines()[-1]
    assert "SAMP_CPU_LEVEL avx1024" in last
    assert "portable" in last
    assert not any(level in last for level in LEVELS if level not in ran())


def ran() -> list[str]:
    from samp_kernels.cpu import _native

    return [name for name, state in _native.levels().items() if state == "runs"]
