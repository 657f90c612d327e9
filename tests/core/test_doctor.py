"""`samp doctor`: each check on this machine, and on files that describe others."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
from pathlib import Path

import pytest
from samp_kernels.onednn import has_vnni

from samp_core import doctor

ITEMS = [
    "python",
    "libpython",
    "glibc",
    "triton on PATH",
    "embedded triton",
    "numpy",
    "torch",
    "oneDNN int8",
    "cpu",
    "cpu kernels",
    "cores",
    "memory",
    "/dev/shm",
    "disk",
    "gpu",
    "cupy",
    "cuda kernels",
    "compiler",
    "locust",
]


@pytest.fixture(scope="module")
def checks() -> dict[str, doctor.Check]:
    found = doctor.examine()
    assert [check.item for check in found] == ITEMS
    return {check.item: check for check in found}


def script(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_the_environment_of_the_tests_is_complete(checks: dict[str, doctor.Check]) -> None:
    for item in ("python", "libpython", "glibc", "embedded triton", "numpy", "torch", "locust"):
        assert checks[item].ok, checks[item]
        assert checks[item].found != "absent"


def test_json_has_the_promised_keys(checks: dict[str, doctor.Check]) -> None:
    rows = json.loads(json.dumps([dataclasses.asdict(check) for check in checks.values()]))
    assert all(list(row) == ["item", "ok", "found", "fix"] for row in rows)
    assert all(row["fix"] for row in rows if not row["ok"] or row["found"] == "absent")


def test_int8_really_ran_where_the_cpu_has_vnni(checks: dict[str, doctor.Check]) -> None:
    expected = "an int8 GEMM ran and its sums are exact" if has_vnni() else "absent"
    assert checks["oneDNN int8"] == dataclasses.replace(
        checks["oneDNN int8"], ok=True, found=expected
    )


@pytest.mark.parametrize(
    ("version", "ok"),
    [("2.35", True), ("2.36", True), ("3.0", True), ("2.34", False), ("2.4", False), ("", False)],
)
def test_glibc_is_compared_as_numbers(version: str, ok: bool) -> None:
    check = doctor.check_glibc(version)
    assert check.ok is ok
    assert bool(check.fix) is not ok


def test_cpu_flags_are_whole_words(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu avx2 avx512_vnni_not\n\nprocessor\t: 1\n")
    flags = doctor.cpu_flags(cpuinfo)
    assert flags == {"fpu", "avx2", "avx512_vnni_not"}
    assert "int8 needs" in doctor.check_isa(flags).fix
    assert doctor.check_isa(flags).found == "avx2"
    assert doctor.check_isa(frozenset({"avx_vnni"})).fix == ""
    assert doctor.cpu_flags(tmp_path / "nothing") == frozenset()


def test_a_containers_limits_are_seen(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9000000 kB\nMemAvailable: 8000000 kB\n")
    assert doctor.cpu_quota(tmp_path) is None
    assert doctor.available_memory(meminfo, tmp_path) == 8_000_000 * 1024
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "memory.max").write_text("2000000\n")
    (tmp_path / "memory.current").write_text("500000\n")
    assert doctor.cpu_quota(tmp_path) == 1.5
    assert doctor.available_memory(meminfo, tmp_path) == 1_500_000
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert doctor.cpu_quota(tmp_path) is None
    assert doctor.available_memory(meminfo, tmp_path) == 8_000_000 * 1024


def test_too_little_room_is_named_with_its_mend(tmp_path: Path) -> None:
    small = doctor.check_shm(tmp_path, least=1 << 60)
    assert not small.ok
    assert "--shm-size" in small.fix
    assert doctor.check_shm(tmp_path / "nothing").found == "absent"
    full = doctor.check_disk(tmp_path, least=1 << 60)
    assert not full.ok
    assert "--out" in full.fix
    assert doctor.check_disk(tmp_path, least=1).ok


def test_gpu_is_what_the_driver_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.check_gpu().found == "none: CPU tiers only"
    script(tmp_path, "nvidia-smi", "echo 'NVIDIA L4, 575.57'")
    assert doctor.check_gpu().found == "NVIDIA L4, 575.57"
    script(tmp_path, "nvidia-smi", "echo 'driver mismatch' >&2; exit 18")
    assert "look at" in doctor.check_gpu().fix


def test_a_triton_on_path_is_the_one_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(tmp_path, "tritonserver", "exit 0")
    monkeypatch.setenv("PATH", str(tmp_path) + os.pathsep + os.environ["PATH"])
    on_path, embedded = doctor.check_triton()
    assert on_path.found == str(tmp_path / "tritonserver")
    assert embedded.ok
    assert "unused" in embedded.found


@pytest.mark.parametrize(
    ("answer", "ok", "found"),
    [
        ((0, "2.13.0\n", ""), [True, True], "exact"),
        ((1, "2.13.0\n", "no VNNI\n"), [True, True], "absent"),
        ((1, "2.13.0\n", "Traceback\nRuntimeError: no primitive\n"), [True, False], "no primitive"),
        ((-4, "2.13.0\n", ""), [True, False], "ended with -4"),
        ((1, "", "ImportError: libgomp.so.1\n"), [False], "libgomp"),
    ],
)
def test_each_end_of_the_probe(answer: tuple[int, str, str], ok: list[bool], found: str) -> None:
    checks = doctor.finish_probe(lambda: answer)
    assert [check.ok for check in checks] == ok
    assert found in checks[-1].found
