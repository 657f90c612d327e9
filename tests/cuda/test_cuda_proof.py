"""The short check that `auto` makes of a GPU's kernels before it takes them: the real one, in its
child process, through the emulator; with right kernels, wrong ones, and ones that die or hang."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import samp_kernels.cuda
from emulated import needs_compiler
from samp_kernels.cuda import proven
from separable import make_small

from samp_core import doctor, gpu_proof
from samp_core.backends import choose_backend, cpu_backend, doubts, unused_gpu
from samp_core.build import build
from samp_core.config import load_config

pytestmark = needs_compiler
DEVICE = "emulated sm_80"
# What a kernel's GELU calls in place of erff.
WRONG, DIES, HANGS = "tanhf(x)", "(std::abort(), 0.0f)", '({ for (;;) asm volatile(""); 0.0f; })'


@pytest.fixture(autouse=True)
def stands_for_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMP_CUDA", "automatic:sm_80")
    monkeypatch.setenv("SAMP_PROVEN", str(tmp_path / "proven.json"))
    monkeypatch.setattr(proven, "_remembered", {})
    samp_kernels.cuda.missing.cache_clear()
    yield
    samp_kernels.cuda.missing.cache_clear()


@pytest.fixture
def kernels_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """The kernels compiled with another function in the place of erff."""

    def compile_with(text: str) -> None:
        header = tmp_path / "changed.h"
        header.write_text(f"#include <cmath>\n#include <cstdlib>\n#define erff(x) {text}\n")
        monkeypatch.setenv("SAMP_EMULATED_FLAGS", f"-O0 -include {header}")
        monkeypatch.setenv("SAMP_EMULATED", str(tmp_path / "made"))

    return compile_with


class Stages:
    """What was shown: titles, and how many of them ended."""

    def __init__(self) -> None:
        self.titles: list[str] = []
        self.ended = 0

    def __call__(self, title: str, steps: int) -> Callable[[], None]:
        self.titles.append(title)
        return self.end

    def end(self) -> None:
        self.ended += 1


def noted() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(proven.files()[0].read_text())[DEVICE]
    return found


def test_right_kernels_pass_once_and_are_taken() -> None:
    stages = Stages()
    assert choose_backend("auto", 32, stages) == "cuda"
    assert (stages.titles, stages.ended) == ([gpu_proof.TITLE], 1)
    assert noted()["passed"] is True
    assert noted()["by"] == gpu_proof.NAME
    assert noted()["checks"] > 60
    assert choose_backend("auto", 64, stages) == "cuda"
    assert choose_backend("auto", 48, stages) == cpu_backend()
    assert doubts(stages) == unused_gpu() == ""
    assert "`auto` takes them: the short check passed" in doctor.check_cuda(stages).found
    assert len(stages.titles) == 1


def test_a_wrong_kernel_leaves_the_cpu(kernels_with: Any, tmp_path: Path) -> None:
    """GELU is a little off; a build says so and goes on, and asks no second time."""
    kernels_with(WRONG)
    made = make_small(tmp_path / "model", layers=1, rows=90)
    fields = {"tiers": {}, "rows": {"calibration": 8, "search": 24}, "out": str(tmp_path / "out")}
    yaml = made.yaml(tmp_path / "build.yaml", **fields, data={"data": str(made.data)}, threads=1)
    stages = Stages()
    found = build(load_config(yaml, {}), stages).report
    assert stages.titles[0] == gpu_proof.TITLE
    (warning,) = (line for line in found["warnings"] if "GPU" in line)
    assert warning.startswith(
        f"backend {cpu_backend()}: the GPU is not used, the short check failed"
    )
    assert "gelu" in warning
    assert "gelu" in noted()["why"]
    assert noted()["passed"] is False
    assert choose_backend("auto", 32, stages) == cpu_backend()
    assert "failed" in doubts(stages)
    assert stages.titles.count(gpu_proof.TITLE) == 1
    # `samp doctor` tries again, and says the same in its table.
    command = [sys.executable, "-m", "samp_core", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    rows = {row["item"]: row for row in json.loads(done.stdout)}
    assert "not taken by `auto`: the short check failed" in rows["cuda kernels"]["found"]
    assert gpu_proof.TITLE in done.stderr


def test_a_kernel_that_dies_ends_the_child_alone(
    kernels_with: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Also where the result cannot be noted, this process asks once only."""
    kernels_with(DIES)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("SAMP_PROVEN", str(tmp_path / "file" / "proven.json"))
    stages = Stages()
    assert choose_backend("auto", None, stages) == cpu_backend()
    assert "it died (signal SIGABRT) after gemm int8" in unused_gpu()
    assert "is not noted" in capsys.readouterr().err
    assert choose_backend("auto", None, stages) == cpu_backend()
    assert len(stages.titles) == 1


def test_a_kernel_that_hangs_is_killed(kernels_with: Any) -> None:
    kernels_with(HANGS)
    assert "did not end within 20 s" in gpu_proof.why_not(limit_s=20.0)
    left = [one.cmdline() for one in psutil.Process().children(recursive=True)]
    assert not [words for words in left if "samp_core.gpu_proof" in words]
    assert choose_backend("auto") == cpu_backend()


def test_a_child_that_cannot_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMP_EMULATED", os.devnull)
    wrong, facts = gpu_proof.check(60.0)
    assert "check_gemms: FileExistsError" in wrong
    assert facts["checks"] == 1
