"""Backend `auto` takes a GPU by itself only where `make gpu-check` passed with these kernels."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import samp_kernels.cuda
from samp_kernels.cuda import proven

from samp_core import doctor
from samp_core.backends import choose_backend, cpu_backend, unused_gpu

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty record of proofs, not the machine's own."""
    monkeypatch.delenv("SAMP_CUDA", raising=False)
    monkeypatch.setenv("SAMP_PROVEN", str(tmp_path / "proven.json"))
    return tmp_path / "proven.json"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a machine with a GPU and its cubins answers; no kernel is run here."""
    monkeypatch.setattr(samp_kernels.cuda, "missing", lambda: "")
    monkeypatch.setattr(samp_kernels.cuda, "architecture", lambda: "sm_89")


def steps(**changes: Any) -> dict[str, Any]:
    fine = {"ended": True, "checks": [{"name": "one", "ok": True, "detail": ""}]}
    found: dict[str, Any] = dict.fromkeys(("ops", "encoder", "serving"), fine)
    return {**found, "sanitizer": {"ended": True, "left_out": {"it": "not found"}}, **changes}


def script(name: str) -> Any:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def passed(tmp_path: Path, **changes: Any) -> str:
    facts = {"steps": steps(**changes), "device": "NVIDIA L4", "date": "2026-11-28"}
    said: str = script("gpu_check").note(facts, tmp_path / "result.json", 3)
    return said


def test_a_machine_without_a_gpu_takes_the_cpu(record: Path) -> None:
    assert choose_backend("auto") == cpu_backend() != "cuda"
    proven.record("sm_89", {})  # A proof alone, carried here, is no GPU.
    if samp_kernels.cuda.missing():
        assert choose_backend("auto") == cpu_backend()
        assert unused_gpu() == ""
    assert choose_backend("cuda") == "cuda"


@pytest.mark.usefixtures("gpu")
def test_a_gpu_is_taken_once_the_check_has_passed(tmp_path: Path, record: Path) -> None:
    assert choose_backend("auto") == cpu_backend()
    assert "gpu-check has not passed" in unused_gpu()
    assert "not taken" in doctor.check_cuda().found
    assert passed(tmp_path).startswith("proven on sm_89")
    held = json.loads(record.read_text())["sm_89"]
    assert held["device"] == "NVIDIA L4"
    assert held["checks"] == 3
    assert choose_backend("auto") == "cuda"
    assert unused_gpu() == ""
    assert "2026-11-28" in doctor.check_cuda().found
    # For a model that the kernels have no heads for the CPU goes on.
    assert choose_backend("auto", 32) == choose_backend("auto", 64) == "cuda"
    assert choose_backend("auto", 48) == cpu_backend()
    assert "heads of 48; it has heads of 32, 64" in unused_gpu(48)


@pytest.mark.usefixtures("gpu")
def test_another_architecture_is_not_proven(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed(tmp_path)
    monkeypatch.setattr(samp_kernels.cuda, "architecture", lambda: "sm_90a")
    assert choose_backend("auto") == cpu_backend()
    assert "has not passed on sm_90a" in unused_gpu()


@pytest.mark.usefixtures("gpu")
def test_changed_kernels_are_not_proven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passed(tmp_path)
    monkeypatch.setattr(proven, "sources", lambda: "0" * 64)
    assert choose_backend("auto") == cpu_backend()
    assert "kernels changed since" in unused_gpu()


def test_what_counts_as_sources() -> None:
    """Every file that a GPU's result depends on; the emulator's are not among them."""
    here = Path(samp_kernels.cuda.__file__).parent
    counted = {path.name for path in (*here.glob("*.py"), *here.glob("src/*.cu*"))}
    assert {"session.py", "ops.py", "tiles.py", "launcher.py", "gemm.cu", "hopper.cuh"} <= counted
    assert len(proven.sources()) == 64


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (
            {"serving": {"ended": True, "left_out": {"serving": "no Triton"}}},
            "serving was not made",
        ),
        ({"ops": {"ended": False, "checks": [{"name": "x", "ok": True}]}}, "ops did not come"),
        ({"search": {"ended": True, "checks": [{"name": "it", "ok": False}]}}, "it failed"),
    ],
)
def test_less_than_all_proves_nothing(
    tmp_path: Path, record: Path, changes: dict[str, Any], why: str
) -> None:
    assert why in passed(tmp_path, **changes)
    assert not record.exists()
    assert choose_backend("auto") == cpu_backend()


@pytest.mark.usefixtures("gpu")
def test_a_failure_takes_the_proof_back(tmp_path: Path) -> None:
    passed(tmp_path)
    assert choose_backend("auto") == "cuda"
    bad = {"ended": True, "checks": [{"name": "it", "ok": False}]}
    assert "not proven" in passed(tmp_path, encoder=bad)
    assert choose_backend("auto") == cpu_backend()


@pytest.mark.usefixtures("gpu")
def test_a_run_of_one_step_changes_nothing(tmp_path: Path) -> None:
    passed(tmp_path)
    facts = {"steps": {"ops": steps()["ops"]}}
    assert "was not made" in script("gpu_check").note(facts, tmp_path / "result.json", 1)
    assert choose_backend("auto") == "cuda"


@pytest.mark.usefixtures("gpu")
def test_the_emulator_is_never_automatic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passed(tmp_path)
    monkeypatch.setenv("SAMP_CUDA", "emulated")
    assert choose_backend("auto") == cpu_backend()
    assert unused_gpu() == ""


@pytest.mark.usefixtures("gpu")
def test_a_damaged_record_is_no_proof(record: Path) -> None:
    for text in ("", "[]", '{"sm_89": 1}'):
        record.write_text(text)
        assert choose_backend("auto") == cpu_backend()


def test_wgmma_switched_off_proves_nothing(
    tmp_path: Path, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAMP_WGMMA", "0")
    assert "SAMP_WGMMA was set" in passed(tmp_path)
