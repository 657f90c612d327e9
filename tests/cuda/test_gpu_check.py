"""`make gpu-check` and its bundle without a GPU: from their files alone, through the emulator."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from emulated import needs_compiler
from samp_kernels.cuda.backend import CudaBackend
from samp_kernels.cuda.build import find_cubin
from samp_kernels.cuda.emulator import CpuLauncher
from samp_kernels.cuda.units import ARCHITECTURES, cubin_name, units_by_name, units_of
from samp_kernels.interface import SITES
from samp_kernels.reference import ReferenceBackend

from samp_core import gpu_checks
from samp_core.build import open_workbench
from samp_core.config import BuildConfig, DataSpec
from samp_core.data import read_rows
from samp_core.encoder import LoopSession
from samp_core.workbench import silent

ROOT = Path(__file__).parents[2]
BUNDLE = ROOT / "build" / "gpu"
# Neither samp_kernels nor samp_core of the environment: only what was carried.
ALONE = (
    "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)];"
    "sys.path[:] = [p for p in sys.path if 'editable' not in p]\n"
)


@pytest.fixture(scope="module")
def benchmarks() -> Any:
    """The scripts' modules by name."""

    def module(name: str) -> Any:
        sys.path.insert(0, str(ROOT / "benchmarks"))
        try:
            return importlib.import_module(name)
        finally:
            sys.path.remove(str(ROOT / "benchmarks"))

    return module


@pytest.fixture(scope="module")
def bundler(benchmarks: Any) -> Any:
    return benchmarks("gpu_bundle")


@pytest.fixture(scope="module")
def carried(bundler: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's own files of a bundle, in an empty folder."""
    folder: Path = tmp_path_factory.mktemp("carried")
    for path in bundler.own_files():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes((ROOT / path).read_bytes())
    (folder / "sitecustomize.py").write_text(ALONE)
    return folder


def check(folder: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    """gpu_check of that folder: exit status, result, output."""
    out = folder / "result.json"
    out.unlink(missing_ok=True)
    script = str(folder / "benchmarks" / "gpu_check.py")
    environment = {
        **os.environ,
        "SAMP_EMULATED": str(ROOT / "kernels" / "cuda" / "emulated"),
        "PYTHONPATH": str(folder),
    }
    done = subprocess.run(
        [sys.executable, script, "--out", str(out), *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    facts = json.loads(out.read_text()) if out.is_file() else {}
    return done.returncode, facts, done.stdout[-3000:] + done.stderr[-3000:]


@needs_compiler
def test_the_script_runs_from_its_files_alone(carried: Path) -> None:
    code, facts, said = check(carried, "--emulate", "--only", "ops", "--only", "encoder")
    assert code == 0, said
    assert "emulated" in facts["device"]
    checks = [c for step in facts["steps"].values() for c in step["checks"]]
    assert len(checks) > 60
    assert all(check["ok"] for check in checks)
    assert sum("fp8" in check["name"] for check in checks) > 20


@needs_compiler
def test_a_real_triton_serves_its_tiers(carried: Path) -> None:
    if importlib.util.find_spec("pytriton") is None:
        pytest.skip("no embedded Triton: make venv")
    code, facts, said = check(carried, "--emulate", "--only", "serving")
    assert code == 0, said
    step = facts["steps"]["serving"]
    names = [check["name"] for check in step["checks"]]
    assert sum("SCORES" in name for name in names) == 5
    assert sum("load on" in name for name in names) == 5
    assert sum("locust on" in name for name in names) == 5
    assert step["ab"]["n"] == 48
    assert {tier["name"] for tier in step["tiers"]} == {"cpu", "exact", "half", "fast", "narrow"}


@needs_compiler
def test_a_search_by_its_own_latencies(carried: Path) -> None:
    """The emulator's are no speed, but a build measures them, chooses by them and writes tiers."""
    code, facts, said = check(carried, "--emulate", "--only", "search")
    assert code == 0, said
    step = facts["steps"]["search"]
    assert [check["name"] for check in step["checks"]] == ["search on cuda"]
    assert {row["name"] for row in step["search"]["tiers"]} == {
        "exact", "high", "balanced", "fast",
    }  # fmt: skip


@needs_compiler
def test_samps_table(carried: Path) -> None:
    code, facts, said = check(carried, "--emulate", "--only", "table")
    assert code == 0, said
    rows = {row["plan"]: row for row in facts["steps"]["table"]["table"]["rows"]}
    assert set(rows) == {
        "float", "fp16", "ffn_only int8", "full int8", "ffn_only fp8", "full fp8",
    }  # fmt: skip
    assert rows["float"]["agreement"] == 1.0
    assert rows["float"]["accuracy"] == 1.0  # its labels are float's own answers
    losses = [rows[name]["kl"] for name in ("fp16", "ffn_only int8", "ffn_only fp8", "full fp8")]
    assert all(loss > rows["float"]["kl"] for loss in losses)
    assert rows["full fp8"]["kl"] > rows["fp16"]["kl"]


def test_the_carried_checkpoint_is_a_trained_one(
    benchmarks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained here, opened as the table opens it, and better than saying one thing always."""
    accuracy = benchmarks("gpu_checkpoint").train(tmp_path)
    table = benchmarks("gpu_table")
    monkeypatch.setattr(table, "DEMO", tmp_path / "none")
    monkeypatch.setattr(table, "CARRIED", tmp_path)
    folder, rows, name = table.trained()
    assert (folder, name) == (tmp_path / "model", "three layers of 128 on film reviews")
    config = BuildConfig(
        model=folder, name="small", backend="reference", data=DataSpec(data=rows),
        out=tmp_path / "out",
    )  # fmt: skip
    bench = open_workbench(config, silent)
    split = bench.split(read_rows(rows))
    gold = np.asarray(split.gold)
    right = bench.logits(bench.base_plan(), split, "float").argmax(axis=1) == gold
    always = max(float((gold == label).mean()) for label in (0, 1))
    assert abs(right.mean() - accuracy) < 0.005  # Its weights are rounded to fp16.
    assert right.mean() > always + 0.05
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors")) < 4 << 20


def test_real_lengths(benchmarks: Any) -> None:
    shapes = benchmarks("gpu_shapes")
    counted = json.loads((ROOT / "benchmarks" / "lengths.json").read_text())
    for name, mean, longest in (("film reviews", 26.7, 512), ("SQuAD 1.1", 172.0, 384)):
        pairs = counted[name]["counts"]
        assert sum(n for _, n in pairs) == counted[name]["texts"] > 2000
        assert counted[name]["mean"] == mean
        assert pairs[-1][0] <= longest
        drawn = shapes.real_lengths(name, 64)
        assert set(drawn) <= {length for length, _ in pairs}
        assert abs(np.mean(drawn) - mean) < 0.3 * mean
        assert drawn == shapes.real_lengths(name, 64)


def test_without_a_gpu_it_says_so(carried: Path) -> None:
    if importlib.util.find_spec("cupy") is not None:
        pytest.skip("CuPy is here")
    code, facts, said = check(carried)
    assert code == 1
    assert facts == {}
    assert "CuPy is not installed" in said


def test_a_step_that_dies_keeps_what_it_found(
    benchmarks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "dies.py"
    script.write_text(
        "import json, os, pathlib, sys\n"
        "part = pathlib.Path(sys.argv[sys.argv.index('--part') + 1])\n"
        "part.write_text(json.dumps({'checks': [{'name': 'one', 'ok': True, 'detail': ''}]}))\n"
        "os.abort()\n"
    )
    monkeypatch.setattr(benchmarks("gpu_check"), "__file__", str(script))
    found = benchmarks("gpu_check").one_step("ops", 60.0, False)
    assert found["ended"] is False
    assert found["exit_status"] == -6
    assert [check["name"] for check in found["checks"]] == ["one"]
    assert "left_out" in benchmarks("gpu_check").one_step("ops", 3.0, False)


def test_the_whole_ends_within_eight_minutes(benchmarks: Any) -> None:
    """A step is stopped at its limit or where the budget ends, with all that it started."""
    script = benchmarks("gpu_check")
    assert script.BUDGET_S + 15 <= 8 * 60
    assert max(most for _, most in script.STEPS.values()) < script.BUDGET_S
    begun = time.monotonic()
    child = "import subprocess, sys; print('here', flush=True); subprocess.run(['sleep', '60'])"
    code, said = script.run([sys.executable, "-c", child], 2.0)
    assert code is None
    assert said == "here\n", "its output ended only when its own child had ended, too"
    assert time.monotonic() - begun < 30
    assert script.one_step("ops", 14.0, False)["left_out"] == {"ops": "out of time"}


def test_no_step_takes_the_time_of_a_later_one(benchmarks: Any) -> None:
    """Also where each takes all that it may, and unpacking has taken 25 s."""
    script = benchmarks("gpu_check")
    for taken in (0.0, 25.0):
        left, spent = script.BUDGET_S - taken, {}
        for name, (least, most) in script.STEPS.items():
            spent[name] = script.limit_of(name, left)
            assert least <= spent[name] <= most
            left -= spent[name]
        assert left >= 0
    assert script.limit_of("search", 10.0) == 10.0
    assert script.limit_of("ops", 10.0) == 10.0


def test_a_process_that_cannot_be_killed_is_left(
    benchmarks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its child has a session of its own and keeps the pipe open."""
    report, pid = benchmarks("gpu_report"), tmp_path / "pid"
    monkeypatch.setattr(report, "GRACE_S", 0.5)
    child = (
        "import pathlib, subprocess, time;"
        "child = subprocess.Popen(['sleep', '600'], start_new_session=True);"
        f"pathlib.Path({str(pid)!r}).write_text(str(child.pid)); time.sleep(600)"
    )
    begun = time.monotonic()
    assert report.run([sys.executable, "-c", child], 3.0) == (None, "")
    assert time.monotonic() - begun < 300
    os.kill(int(pid.read_text()), signal.SIGKILL)


# torch as the peer


def test_the_peer_computes_the_same_encoder(benchmarks: Any) -> None:
    """One compilation serves all layers, and the whole model is one graph."""
    peer, config = benchmarks("gpu_torch"), gpu_checks.SMALL
    plan = gpu_checks.plan_of(dict.fromkeys(SITES, "fp32"), config.layers)
    tensors = gpu_checks.random_tensors(config, plan)
    lengths = [1, 7, 30]  # As the loop sorts them.
    batch = gpu_checks.batch_of(config, lengths)
    loop = LoopSession(ReferenceBackend(), config, tensors, plan)
    flat, wanted = loop.layer_inputs(batch)[0].hidden, loop.run(batch, output="tokens")
    padded = np.zeros((len(lengths), max(lengths), config.hidden), np.float32)
    places = [(i, slice(0, n)) for i, n in enumerate(lengths)]
    for place, piece in zip(places, np.split(flat, np.cumsum(lengths)[:-1]), strict=True):
        padded[place] = piece
    parts = ("qkv", "out", "attention_ln", "ffn_in", "ffn_out", "output_ln")
    weights = [
        [torch.from_numpy(tensors[f"layer.{i}.{p}.{k}"]) for p in parts for k in ("weight", "bias")]
        for i in range(config.layers)
    ]
    compiled: list[int] = []

    def count(graph: Any, _: Any) -> Any:
        compiled.append(1)
        return graph.forward

    mask = peer.mask_of(lengths, "cpu")
    own = torch.compile(peer.layer, backend=count, dynamic=False, fullgraph=True)
    whole = torch.compile(peer.model_of(config.heads, weights), backend=count, fullgraph=True)
    with torch.inference_mode():
        x = torch.from_numpy(padded).clone()  # As a layer's own output: of this mode.
        results = [
            peer.encode(x, mask, config.heads, weights, peer.layer),
            peer.encode(x, mask, config.heads, weights, own),
            whole(x, mask),
        ]
    assert len(compiled) == 2
    for y in results:
        got = torch.cat([y[place] for place in places]).numpy()
        assert np.abs(got - wanted).max() < 1e-4
    assert peer.mask_of([5, 5], "cpu") is None
    made = peer.random_weights(1, 64, 96, "cpu", torch.float16)
    assert [w.shape for w in made[0]] == [w.shape for w in weights[0]]


def test_the_peer_keeps_what_it_found_when_it_is_stopped(
    benchmarks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peers, config = benchmarks("gpu_peers"), gpu_checks.SMALL
    begins = (
        "import argparse, json, pathlib, time\n"
        "parser = argparse.ArgumentParser()\n"
        "parser.add_argument('--part', type=pathlib.Path)\n"
        "parser.add_argument('--work', type=json.loads)\n"
        "options = parser.parse_args()\n"
        "assert options.work['layers'] == 2 and options.work['heads'] == 2\n"
        "found = {case: {'torch.compile, us': 30.0} for case in options.work['cases']}\n"
    )
    monkeypatch.setattr(peers, "__file__", str(tmp_path / "gpu_peers.py"))
    cases = {"one": [3], "two": [3, 4]}
    for ends, said in (
        ("options.part.write_text(json.dumps(found)); time.sleep(60)", "stopped, out of time"),
        ("raise SystemExit('no CUDA')", "ended with 1: no CUDA\n"),
    ):
        (tmp_path / "gpu_torch.py").write_text(begins + ends)
        found = peers.torch_times(config, cases, 5.0)
        assert {one["torch"] for one in found.values()} == {said}
        assert ("torch.compile, us" in found["two"]) == (said == "stopped, out of time")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert peers.torch_times(config, cases, 5.0)["one"] == {"torch": "not installed"}


@pytest.fixture
def timing(benchmarks: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """gpu_peers as on a GPU, but for the clock and torch: what it times runs, emulated, once."""
    peers = benchmarks("gpu_peers")

    def timed(stream: Any, call: Any, rounds: int = 1) -> float:
        call()
        return 10.0

    def torch_times(config: Any, cases: Any, seconds: float) -> Any:
        return {case: {"torch.compile max-autotune, us": 25.0} for case in cases}

    monkeypatch.setattr(peers, "timed", timed)
    monkeypatch.setattr(peers, "torch_times", torch_times)
    monkeypatch.setattr(peers, "_torch_product", lambda *_: (8.0, 12.0))
    monkeypatch.setattr(peers, "ROUNDS", 1)
    monkeypatch.setattr(CpuLauncher, "stream", None, raising=False)
    return peers


@needs_compiler
def test_the_times_of_encoders_rehearsed(benchmarks: Any, timing: Any, tmp_path: Path) -> None:
    b, config = CudaBackend(CpuLauncher("sm_89")), gpu_checks.SMALL
    report = benchmarks("gpu_report").Report(tmp_path / "part.json", time.monotonic() + 600)

    def make(name: str) -> Any:
        plan = gpu_checks.plan_of(gpu_checks.PLANS[name], config.layers)
        return plan, gpu_checks.random_tensors(config, plan)

    names = ("full int8", "float fp16")
    cases = {"8 x 128": [3, 2], "one": [5]}
    timing.time_encoders(report, b, config, {name: make(name) for name in names}, cases)
    for row in report.facts["encoders"]:
        assert row["full int8, graph us"] == 10.0
        assert row["float fp16, run us"] > 0.0
        assert row["torch.compile / full int8"] == 2.5
    assert report.facts["encoders"][0]["full int8, longest"]
    timing.time_large(report, b, config, make, cases)
    rows = report.facts["large"]
    assert [(row["plan"], row["case"]) for row in rows] == [(n, c) for n in names for c in cases]
    assert rows[0]["sequences/s"] == pytest.approx(2e5)
    assert all(row[f"torch.compile / {row['plan']}"] == 2.5 for row in rows)
    assert json.loads((tmp_path / "part.json").read_text())["large"] == rows


@needs_compiler
def test_the_times_of_products_rehearsed(benchmarks: Any, timing: Any, tmp_path: Path) -> None:
    b = CudaBackend(CpuLauncher("sm_89"))
    report = benchmarks("gpu_report").Report(tmp_path / "part.json", time.monotonic() + 600)
    sites = {"qkv": (48, 16), "out": (16, 16), "ffn_in": (32, 16), "ffn_out": (16, 32)}
    timing.time_gemms(report, b, (17,), sites)
    rows = report.facts["gemms"]
    assert len(rows) == 4 * 3
    assert {row["precision"] for row in rows} == {"int8", "fp16", "fp8"}
    assert all(row["us"] == 10.0 and row["ratio"] == 1.2 for row in rows)
    launched = [one for one in b.launcher.launched if one.op == "gemm"]
    assert {one.ran[0] for one in launched} == {"int8", "fp16", "fp8"}


def test_ratios_are_of_the_fastest_peer(benchmarks: Any) -> None:
    peer = benchmarks("gpu_torch")
    row = {
        "full int8, graph us": 10.0, "float fp16, graph us": 20.0, "full int8, run us": 15.0,
        peer.GRAPHED: 12.0, peer.BY_LAYER: 30.0, peer.WHOLE: "RuntimeError: no",
    }  # fmt: skip
    wanted = {"torch.compile / full int8": 3.0, "torch.compile / float fp16": 1.5}
    assert benchmarks("gpu_peers").ratios(row) == wanted
    del row[peer.BY_LAYER]
    assert benchmarks("gpu_peers").ratios(row) == {}


# the bundle


def test_an_unpacked_bundles_cubins_are_found(
    benchmarks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the processes of the steps are those of its own environment."""
    module, place = benchmarks("gpu_bundle"), tmp_path / "bundle"
    place.mkdir()
    name = cubin_name(units_by_name()["rows"], "sm_80")
    with tarfile.open(place / "site.tar.xz", "w:xz") as archive:
        module.add(archive, f"cubins/{name}", b"as made")
        module.add(archive, "site/samp_numpy.py", b"")
        module.add(archive, "site/carried_alone.py", b"")
        module.add(archive, "locust/flask_of_its_own.py", b"")
        module.add(archive, "locust/numpy.py", b"raise ImportError")
    (place / "bundle.json").write_text(json.dumps({"commit": "abc"}))
    monkeypatch.setattr(benchmarks("gpu_import"), "BUNDLE", place)
    assert benchmarks("gpu_import").commit() == "abc"
    for variable in ("SAMP_PYTHON", "SAMP_CUBINS"):
        monkeypatch.setenv(variable, "")  # Put back afterwards.
    assert benchmarks("gpu_check").prepare({}, True) == ""
    found = find_cubin(units_by_name()["rows"], "sm_80")
    assert found == place / "unpacked" / "cubins" / name
    command = [os.environ["SAMP_PYTHON"], "-c", "import carried_alone, flask_of_its_own, numpy"]
    assert subprocess.run(command, check=False).returncode == 0


def test_what_is_bundled_is_whole_and_small(bundler: Any) -> None:
    if not (BUNDLE / "bundle" / "bundle.json").is_file():
        pytest.skip("no build/gpu: make gpu-bundle (it downloads wheels)")
    assert bundler.size_of(BUNDLE) <= bundler.LIMIT
    listed = json.loads((BUNDLE / "bundle" / "bundle.json").read_text())["files"]
    there = {str(p.relative_to(BUNDLE)): p for p in BUNDLE.rglob("*") if p.is_file()}
    del there["bundle/bundle.json"]
    assert set(there) == set(listed)
    for name, path in there.items():
        assert bundler.sha256(path) == listed[name], name
    with tarfile.open(BUNDLE / "bundle" / "site.tar.xz") as archive:
        names = archive.getnames()
    for needed in (
        "site/samp_numpy.py", "site/pytriton/tritonserver/bin/tritonserver",
        "numpy1/numpy/__init__.py", "site/pydantic/__init__.py", "site/tokenizers/__init__.py",
        "site/tritonclient/__init__.py", "site/grpc/__init__.py", "site/ml_dtypes/__init__.py",
        "checkpoint/model/model.safetensors", "checkpoint/rows.jsonl",
        "locust/locust/main.py", "locust/gevent/__init__.py", "locust/zmq/__init__.py",
    ):  # fmt: skip
        assert needed in names
    for architecture in ARCHITECTURES:
        for unit in units_of(architecture):
            assert f"cubins/{cubin_name(unit, architecture)}" in names, "make gpu-bundle again"
    assert not any(name.endswith("proven.json") for name in [*names, *there])
    stubs = [name for name in names if name.endswith("triton_python_backend_stub")]
    assert len(stubs) == 1
    assert not any("libpython" in name for name in names)
