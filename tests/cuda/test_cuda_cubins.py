"""Every kernel and tile compiles for every architecture, to the instructions that were meant."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path

import pytest
from samp_kernels import cuda
from samp_kernels.cuda import build
from samp_kernels.cuda.units import (
    ARCHITECTURES,
    SOURCES,
    content_key,
    cubin_name,
    number,
    units_by_name,
    units_of,
)
from samp_kernels.interface import KernelError

from samp_core.backends import open_backend
from samp_core.errors import SampError

MMA = r"\b([IHQ]G?MMA\.[0-9x]+(?:\.F32\.(?:BF16|E4M3))?)"
needs_nvrtc = pytest.mark.skipif(not build.compiler(), reason="neither NVRTC nor nvcc")


def most_registers(unit: str, architecture: str) -> int:
    """Of a thread: from sm_80 on 512 threads share a multiprocessor, before that 384; wgmma's have
    it alone, as has on sm_90 the largest tile of bytes that wgmma replaces."""
    if number(architecture) == 90 and unit in ("gemm_int8_128x128", "gemm_fp8_128x128"):
        return 192
    return 168 if "wgmma" in unit or number(architecture) < 80 else 128


def find_disassembler() -> str:
    packaged = Path(sysconfig.get_paths()["purelib"], "nvidia", "cu13", "bin", "nvdisasm")
    return str(packaged) if packaged.is_file() else shutil.which("nvdisasm") or ""


@pytest.fixture(scope="module")
def cubins() -> dict[tuple[str, str], Path]:
    """All of them: compiled where they are not there (under a minute on two cores)."""
    paths = iter(build.build(quiet=True))
    return {(arch, unit.name): next(paths) for arch in ARCHITECTURES for unit in units_of(arch)}


@cache
def disassembled(path: Path) -> str:
    command = [find_disassembler(), "-ndf", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@needs_nvrtc
@pytest.mark.parametrize(
    ("architecture", "unit"),
    [(arch, unit.name) for arch in ARCHITECTURES for unit in units_of(arch)],
)
def test_sass(architecture: str, unit: str, cubins: dict[tuple[str, str], Path]) -> None:
    """The MMA that was meant and no other, no local memory, registers under the cap."""
    path = cubins[architecture, unit]
    assert path.read_bytes()[:4] == b"\x7fELF"
    if not find_disassembler():
        pytest.skip("no nvdisasm (package nvidia-cuda-nvdisasm)")
    text = disassembled(path)
    found = set(re.findall(MMA, text))
    assert found == meant(unit, architecture)
    assert not re.search(r"\b(LDL|STL)\b", text), "a value lives in local memory"
    if "wgmma" in unit:
        assert "UBLKCP" in text, "no bulk copies"
        assert "SYNCS" in text, "no barriers in shared memory"
        # One fence and one wait in the loop, and one behind it: where the compiler finds that sums
        # are touched meanwhile, it waits after every product.
        assert text.count("WARPGROUP.ARRIVE") == 1
        assert text.count("WARPGROUP.DEPBAR") == 2
    elif (unit.startswith("gemm_") and unit != "gemm_fp32") or unit.startswith("attention_fp16"):
        assert "LDSM" in text
    if number(architecture) >= 80 and unit.startswith("gemm_") and unit != "gemm_fp32":
        assert "LDGSTS" in text, "no asynchronous copies"
    for kernel in units_by_name()[unit].kernels:
        assert f".text.{kernel}" in text
    note = r"EIATTR_REGCOUNT.*?index@\((\w+)\).*?\.word\s+(0x[0-9a-f]+)"
    registers = {kernel: int(count, 16) for kernel, count in re.findall(note, text, re.S)}
    assert set(registers) == set(units_by_name()[unit].kernels)
    assert max(registers.values()) <= most_registers(unit, architecture)


@pytest.mark.skipif(not build.find_nvcc(), reason="no nvcc")
@pytest.mark.parametrize(
    ("architecture", "unit"),
    [
        ("sm_75", "rows"),
        ("sm_75", "gemm_int8_64x64"),
        ("sm_80", "gemm_bf16_128x128"),
        ("sm_86", "attention_int8_fp16_64"),
        ("sm_89", "gemm_fp8_16x64"),
        ("sm_90a", "gemm_fp8_wgmma_64x128"),
        ("sm_90a", "gemm_fp16_wgmma_64x64"),
    ],
)
def test_nvcc_where_nvrtc_is_not(
    architecture: str, unit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fallback gives the same instructions."""
    monkeypatch.setattr(build, "nvrtc", lambda: "")
    assert build.compiler().startswith("nvcc ")
    path = tmp_path / "made.cubin"
    path.write_bytes(build.compile_unit(units_by_name()[unit], architecture))
    assert path.read_bytes()[:4] == b"\x7fELF"
    if find_disassembler():
        text = disassembled(path)
        assert set(re.findall(MMA, text)) == meant(unit, architecture)
        assert not re.search(r"\b(LDL|STL)\b", text)


def meant(unit: str, architecture: str) -> set[str]:
    """m16n8k32 of bytes and m16n8k16 of halves from sm_80 on; m8n8k16 and m16n8k8 before. sm_90 has
    no such product of e4m3: the assembler makes two of fp16."""
    if "wgmma" in unit:
        columns = "64" if unit.endswith("64x64") else "128"
        kinds = {
            "int8": f"IGMMA.64x{columns}x32",
            "fp16": f"HGMMA.64x{columns}x16",
            "bf16": f"HGMMA.64x{columns}x16.F32.BF16",
            "fp8": f"QGMMA.64x{columns}x32.F32.E4M3",
        }
        return {kinds[unit.split("_")[1]]}
    sm = number(architecture)
    kinds = {
        "int8": "IMMA.16832" if sm >= 80 else "IMMA.8816",
        "fp16": "HMMA.16816" if sm >= 80 else "HMMA.1688",
        "bf16": "HMMA.16816.F32.BF16",
        "fp8": "QMMA.16832.F32.E4M3" if sm < 90 else "HMMA.16816",
    }
    return {instruction for kind, instruction in kinds.items() if kind in unit.split("_")}


def test_a_missing_cubin_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMP_CUBINS", str(tmp_path))
    with pytest.raises(build.MissingKernel, match=r"no rows for sm_80.*make kernels.*--arch sm_80"):
        build.find_cubin(units_by_name()["rows"], "sm_80")


def test_a_server_without_its_cubins_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine with a GPU, as far as `missing` looks; nothing is compiled at serving time."""
    monkeypatch.delenv("SAMP_CUDA", raising=False)
    monkeypatch.setenv("SAMP_CUBINS", str(tmp_path))
    monkeypatch.setattr(cuda, "find_spec", lambda _: True)
    monkeypatch.setattr(cuda.ctypes, "CDLL", lambda _: None)
    monkeypatch.setattr(cuda, "architecture", lambda: "sm_89")
    monkeypatch.setattr(build, "compile_unit", None)
    cuda.missing.cache_clear()
    try:
        with pytest.raises(SampError) as refused:
            open_backend("cuda")
    finally:
        cuda.missing.cache_clear()
    assert "no cubin rows for sm_89; run: make kernels" in str(refused.value)
    assert not list(tmp_path.iterdir())


@needs_nvrtc
def test_only_what_changed_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMP_CUBINS", str(tmp_path))
    monkeypatch.setattr(build, "units_of", lambda _: (units_by_name()["gemm_fp32"],))
    (path,) = build.build(["sm_80"], quiet=True)
    first = path.stat().st_mtime_ns
    assert build.find_cubin(units_by_name()["gemm_fp32"], "sm_80") == path
    assert build.build(["sm_80"], quiet=True) == [path]
    assert path.stat().st_mtime_ns == first
    build.build(["sm_80"], again=True, quiet=True)
    assert path.stat().st_mtime_ns != first


@needs_nvrtc
def test_a_source_that_does_not_compile_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "source_text", lambda name: "__global__ void f() { wrong }")
    if not build.nvrtc():
        pytest.skip("nvcc reads the file itself")
    with pytest.raises(KernelError, match=r"gemm_f32\.cu.*wrong"):
        build.compile_unit(units_by_name()["gemm_fp32"], "sm_80")


def test_the_key_changes_with_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    unit = units_by_name()["gemm_int8_64x64"]
    keys = {content_key(unit, architecture) for architecture in ARCHITECTURES}
    assert len(keys) == len(ARCHITECTURES)
    assert content_key(unit, "sm_80") != content_key(units_by_name()["gemm_fp16_64x64"], "sm_80")
    assert cubin_name(unit, "sm_80").startswith("gemm_int8_64x64-sm_80-")


def test_ptx_stands_in_three_files() -> None:
    """What stands there has a twin for the CPU; a kernel that wrote PTX itself could not run."""
    with_ptx = {
        path.name
        for path in SOURCES.iterdir()
        if re.search(r"\basm\b", path.read_text()) and path.name != "cuda_on_cpu.h"
    }
    assert with_ptx == {"mma.cuh", "copy.cuh", "hopper.cuh"}


def test_the_command_line_refuses_an_unknown_architecture() -> None:
    command = [sys.executable, "-m", "samp_kernels.cuda.build", "--arch", "sm_42"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "sm_90a" in done.stderr
