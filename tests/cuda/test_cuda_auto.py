"""What backend `auto` makes of the notes of checks: `make gpu-check`'s and its own short one's.

This machine stands for one with a GPU as far as a check's child process, which finds none and so
fails; test_cuda_proof.py runs the check itself.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import samp_kernels.cuda
from samp_kernels.cuda import proven

from samp_core import doctor
from samp_core.backends import choose_backend, cpu_backend, unused_gpu
from samp_core.model_config import gpu_of

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty record of proofs, not the machine's own."""
    monkeypatch.delenv("SAMP_CUDA", raising=False)
    monkeypatch.setenv("SAMP_PROVEN", str(tmp_path / "proven.json"))
    monkeypatch.setattr(proven, "_remembered", {})
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
    proven.record(
        "sm_89", {"by": proven.COMMAND, "passed": True}
    )  # A proof alone, carried here, is no GPU.
    if samp_kernels.cuda.missing():
        assert choose_backend("auto") == cpu_backend()
        assert unused_gpu() == ""
    assert choose_backend("cuda") == "cuda"


@pytest.mark.usefixtures("gpu")
def test_a_gpu_is_taken_once_the_check_has_passed(tmp_path: Path, record: Path) -> None:
    assert unused_gpu() == "they have not been checked on sm_89"
    assert choose_backend("auto") == cpu_backend()
    assert "the short check failed on sm_89" in unused_gpu()
    assert "not taken" in doctor.check_cuda().found
    assert passed(tmp_path).startswith("proven on sm_89")
    held = json.loads(record.read_text())["sm_89"]
    assert held["device"] == "NVIDIA L4"
    assert held["checks"] == 3
    assert choose_backend("auto") == "cuda"
    assert unused_gpu() == ""
    assert "make gpu-check passed on 2026-11-28" in doctor.check_cuda().found
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
    assert unused_gpu() == "they have not been checked on sm_90a"
    assert choose_backend("auto") == cpu_backend()
    assert "the short check failed on sm_90a" in unused_gpu()


@pytest.mark.usefixtures("gpu")
def test_changed_kernels_are_not_proven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passed(tmp_path)
    monkeypatch.setattr(proven, "_remembered", {})
    monkeypatch.setattr(proven, "sources", lambda: "0" * 64)
    assert "the kernels changed since an earlier check" in unused_gpu()
    assert choose_backend("auto") == cpu_backend()


def test_what_counts_as_sources() -> None:
    """Every file that a GPU's result depends on; the emulator's are not among them."""
    here = Path(samp_kernels.cuda.__file__).parent
    counted = {path.name for path in (*here.glob("*.py"), *here.glob("src/*.cu*"))}
    assert {"session.py", "ops.py", "tiles.py", "launcher.py", "gemm.cu", "hopper.cuh"} <= counted
    assert len(proven.sources()) == 64


FAILED = {"ended": True, "checks": [{"name": "it", "ok": False}]}
STOPPED = {"ended": False, "exit_status": None, "checks": [{"name": "x", "ok": True}]}


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (
            {"serving": {"ended": True, "left_out": {"serving": "no Triton"}}},
            "serving was not made",
        ),
        ({"large times": STOPPED}, "large times did not come"),
    ],
)
def test_less_than_all_says_nothing(
    tmp_path: Path, record: Path, changes: dict[str, Any], why: str
) -> None:
    said = passed(tmp_path, **changes)
    assert why in said
    assert said.startswith("nothing is noted")
    assert not record.exists()


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"ops": STOPPED}, "ops did not come"),
        ({"large times": {**STOPPED, "exit_status": -6}}, "large times did not come"),
        ({"search": FAILED}, "it failed"),
    ],
)
def test_what_speaks_against_the_kernels(
    tmp_path: Path, record: Path, changes: dict[str, Any], why: str
) -> None:
    """It is noted, and no short check of `auto`'s own is made in its place."""
    assert why in passed(tmp_path, **changes)
    assert choose_backend("auto") == cpu_backend()
    held = json.loads(record.read_text())["sm_89"]
    assert (held["by"], held["passed"]) == (proven.COMMAND, False)
    assert why in held["why"]
    assert "make gpu-check failed on sm_89, 2026-11-28: " in unused_gpu()
    assert "make gpu-check failed" in doctor.check_cuda().found


@pytest.mark.usefixtures("gpu")
def test_a_failure_takes_the_proof_back(tmp_path: Path) -> None:
    passed(tmp_path)
    assert choose_backend("auto") == "cuda"
    assert "not proven" in passed(tmp_path, encoder=FAILED)
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
def test_a_damaged_record_is_no_proof(tmp_path: Path, record: Path) -> None:
    for text in ("", "[]", '{"sm_89": 1}'):
        record.write_text(text)
        assert proven.entry("sm_89") is None
        assert unused_gpu() == "they have not been checked on sm_89"
    assert passed(tmp_path).startswith("proven on sm_89")


@pytest.mark.usefixtures("gpu")
def test_wgmma_switched_off_is_another_proof(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAMP_WGMMA", "0")
    assert passed(tmp_path).startswith("proven on sm_89 without wgmma")
    assert choose_backend("auto") == "cuda"
    monkeypatch.delenv("SAMP_WGMMA")
    assert unused_gpu() == "they have not been checked on sm_89"


@pytest.mark.usefixtures("gpu")
def test_notes_go_where_they_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the cubins, else into the user's cache; a newer note takes the place of an older."""
    monkeypatch.delenv("SAMP_PROVEN")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("SAMP_CUBINS", str(tmp_path / "file" / "cubins"))
    (tmp_path / "file").write_text("no folder")
    assert str(tmp_path / "cache" / "samp" / "proven.json") in passed(tmp_path)
    assert choose_backend("auto") == "cuda"
    monkeypatch.setenv("SAMP_CUBINS", str(tmp_path / "cubins"))
    assert "not proven" in passed(tmp_path, encoder=FAILED)
    assert json.loads((tmp_path / "cubins" / "proven.json").read_text())["sm_89"]["passed"] is False
    assert json.loads((tmp_path / "cache" / "samp" / "proven.json").read_text()) == {}
    assert choose_backend("auto") == cpu_backend()


@pytest.mark.usefixtures("gpu")
def test_dev_null_keeps_auto_from_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMP_PROVEN", os.devnull)
    assert choose_backend("auto") == cpu_backend()
    with pytest.raises(OSError, match="no file"):
        proven.record("sm_89", {"by": proven.COMMAND, "passed": True})
    assert choose_backend("auto") == cpu_backend()
    assert not Path(os.devnull).is_file()


def test_triton_says_which_gpu_an_instance_has() -> None:
    assert gpu_of({"model_instance_kind": "GPU", "model_instance_device_id": "3"}) == 3
    assert gpu_of({"model_instance_kind": "CPU", "model_instance_device_id": "0"}) == 0
