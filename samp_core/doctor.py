"""What this machine has for building and serving, what is missing, and what mends it.

A check is `ok` when nothing that the product needs is missing. Something optional that is absent
is ok too: its `found` says "absent" and its `fix` what having it gains.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from samp_core import gpu_proof
from samp_core.embedded import INSTALL, check_numpy, find_triton, libpython_folder
from samp_core.errors import SampError

MIB = 1 << 20
GIB = 1 << 30
MIN_GLIBC = (2, 35)
MIN_MEMORY = 3 * GIB
MIN_SHM = 64 * MIB
MIN_DISK = 2 * GIB
# Flags of /proc/cpuinfo that decide which int8 instructions there are, best first.
ISA = ("amx_int8", "avx512_vnni", "avx_vnni", "avx512f", "avx2")
VNNI = ISA[:3]

# In a process of its own: an illegal instruction shall end the probe, not the doctor. One GEMM of
# the backend that serves, against the same sum in integers.
_INT8_PROBE = """
import numpy as np, torch
from samp_kernels.interface import Out, Weight
from samp_kernels.onednn import OneDnnBackend
print(torch.__version__, flush=True)
backend = OneDnnBackend(threads=1)
if ("gemm", "int8", "static") not in backend.capabilities():
    raise SystemExit("no VNNI")
rng = np.random.default_rng(0)
w = rng.integers(-127, 128, (32, 64)).astype(np.int8)
x = rng.integers(-127, 128, (5, 64)).astype(np.float32)
packed = backend.pack(Weight(w, np.ones(32, dtype=np.float32)), "int8")
quantized = backend.quantize(backend.array(x), Out("int8", 1.0))
zeros = backend.array(np.zeros(32))
y = backend.to_host(backend.gemm(quantized, packed, zeros, out=Out("fp32")))
if not np.array_equal(y, x @ w.T.astype(np.float32)):
    raise SystemExit("int8 GEMM gives wrong sums")
"""


@dataclass(frozen=True)
class Check:
    """One line of `samp doctor`."""

    item: str
    ok: bool
    found: str
    fix: str = ""


def examine(progress: gpu_proof.Progress = gpu_proof.silent) -> list[Check]:
    """All checks, in the order in which they are best read. About two seconds, and up to a minute
    more on a GPU whose kernels nobody has checked."""
    probe = _start_probe()
    return [
        check_python(),
        check_libpython(),
        check_glibc(),
        *check_triton(),
        check_numpy_abi(),
        *finish_probe(probe),
        check_isa(cpu_flags()),
        check_native(),
        check_cores(),
        check_memory(),
        check_shm(),
        check_disk(Path.cwd()),
        check_gpu(),
        _optional("cupy", ("cupy-cuda13x", "cupy-cuda12x", "cupy"), "backend cuda", "gpu"),
        check_cuda(progress),
        check_compiler(),
        _optional("locust", ("locust",), "`samp loadtest`", "loadtest"),
    ]


def check_python() -> Check:
    """The interpreter that the models will run in."""
    return Check("python", True, f"{platform.python_version()} in {sys.prefix}")


def check_libpython() -> Check:
    """The shared library of this interpreter, which Triton's Python stub links."""
    try:
        folder = libpython_folder()
    except SampError as error:
        return Check("libpython", False, "absent", error.fix)
    return Check("libpython", True, str(folder) if folder else "the system's")


def check_glibc(version: str | None = None) -> Check:
    """The C library: the embedded Triton is built against 2.35."""
    found = version if version is not None else platform.libc_ver()[1]
    try:
        number = tuple(int(part) for part in found.split(".")[:2])
    except ValueError:
        number = (0, 0)
    if number >= MIN_GLIBC:
        return Check("glibc", True, found)
    fix = "use a newer system (Debian 12, Ubuntu 22.04) or NVIDIA's Triton container"
    return Check("glibc", False, found or "no glibc", fix)


def check_triton() -> list[Check]:
    """The Triton on PATH, the embedded one, and which of them would be started."""
    on_path = shutil.which("tritonserver")
    try:
        package = metadata.version("nvidia-pytriton")
    except metadata.PackageNotFoundError:
        package = ""
    checks = [
        Check(
            "triton on PATH",
            True,
            on_path or "absent",
            "" if on_path else "none needed with the embedded one; NVIDIA's container has a newer",
        )
    ]
    if not package:
        ok = on_path is not None
        return [*checks, Check("embedded triton", ok, "absent", INSTALL)]
    try:
        found = find_triton()
    except SampError as error:
        return [*checks, Check("embedded triton", False, f"{package}: {error.given}", error.fix)]
    use = "" if found.embedded else ", unused: the one on PATH is taken"
    return [*checks, Check("embedded triton", True, f"nvidia-pytriton {package}{use}")]


def check_numpy_abi() -> Check:
    """numpy's major version against the embedded stub's."""
    version = metadata.version("numpy")
    if shutil.which("tritonserver") is None:
        try:
            check_numpy()
        except SampError as error:
            return Check("numpy", False, version, error.fix)
    return Check("numpy", True, version)


def check_isa(flags: frozenset[str]) -> Check:
    """The int8 instructions of this CPU."""
    found = [name for name in ISA if name in flags]
    text = ", ".join(found) or f"none of {', '.join(ISA)}"
    if any(name in flags for name in VNNI):
        return Check("cpu", True, text)
    return Check("cpu", True, text, "tiers stay fp32: int8 needs a CPU with VNNI or AMX")


def check_native() -> Check:
    """The native CPU kernels and the dispatch level that they run at."""
    from samp_kernels.cpu import MEND, level, missing

    why = missing()
    if why:
        return Check("cpu kernels", True, f"absent: {why}", f"{MEND}; `onednn` goes on")
    if level() == "portable":
        return Check("cpu kernels", True, "portable: slow", "AVX2 or better makes them fast")
    return Check("cpu kernels", True, level())


def check_cores() -> Check:
    """Cores that this process may use (its affinity and the container's quota)."""
    cores = len(os.sched_getaffinity(0))
    quota = cpu_quota()
    if quota is None or quota >= cores:
        return Check("cores", True, str(cores))
    fix = f"give the encoder at most {max(1, int(quota))} threads, or raise the quota"
    return Check("cores", True, f"{cores}, held to {quota:g} by the container", fix)


def check_memory() -> Check:
    """Memory that is free to use, or the container's limit where that is lower."""
    amount = available_memory()
    found = f"{amount / GIB:.1f} GiB available"
    if amount < MIN_MEMORY:
        return Check("memory", False, found, f"a build wants {MIN_MEMORY // GIB} GiB")
    return Check("memory", True, found)


def check_shm(folder: Path = Path("/dev/shm"), least: int = MIN_SHM) -> Check:
    """Shared memory: every model process of Triton's Python backend takes a region of it."""
    try:
        size = shutil.disk_usage(folder)
    except OSError:
        return Check("/dev/shm", False, "absent", "mount a tmpfs on /dev/shm")
    found = f"{size.free // MIB:,} MiB free of {size.total // MIB:,}"
    if size.free < least:
        fix = "docker run --shm-size=1g, or mount -o remount,size=1g /dev/shm"
        return Check("/dev/shm", False, found, fix)
    return Check("/dev/shm", True, found)


def check_disk(folder: Path, least: int = MIN_DISK) -> Check:
    """Room for builds and their cache below the working folder."""
    free = shutil.disk_usage(folder).free
    found = f"{free / GIB:.1f} GiB free in {folder}"
    fix = f"a demo build wants {least // GIB} GiB: make room or give --out"
    return Check("disk", free >= least, found, fix if free < least else "")


def check_gpu() -> Check:
    """The NVIDIA GPUs that the driver shows."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    if shutil.which(query[0]) is None:
        return Check("gpu", True, "none: CPU tiers only", "")
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=2, check=True)
    except (OSError, subprocess.SubprocessError):
        return Check("gpu", True, "nvidia-smi fails: CPU tiers only", "look at the GPU's driver")
    return Check("gpu", True, "; ".join(answer.stdout.strip().splitlines()) or "none")


def check_cuda(progress: gpu_proof.Progress = gpu_proof.silent) -> Check:
    """Whether backend cuda can run here, and whether `auto` takes it: what was never checked on
    this GPU, or failed in the short check, is checked now."""
    from samp_kernels import cuda
    from samp_kernels.cuda.proven import COMMAND, entry

    item, why = "cuda kernels", cuda.missing()
    if why:
        return Check(item, True, f"absent: {why}", cuda.MEND)
    if cuda.for_tests():
        return Check(item, True, f"emulated: {cuda.emulated()}, for tests")
    why = gpu_proof.why_not(None, progress, again=True)
    if why:
        return Check(item, True, f"there, not taken by `auto`: {why}", f"{COMMAND} says more")
    facts = entry(cuda.device_key()) or {}
    found = f"`auto` takes them: {facts.get('by')} passed on {facts.get('date')}"
    full = "" if facts.get("by") == COMMAND else f"the full proof, with times: {COMMAND}"
    return Check(item, True, found, full)


def check_compiler() -> Check:
    """A C++ compiler, for native CPU kernels."""
    for name in (os.environ.get("CXX") or "c++", "g++", "clang++"):
        path = shutil.which(name)
        if path is not None:
            return Check("compiler", True, path)
    return Check("compiler", True, "absent", "apt-get install g++: to build the native CPU kernels")


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Instruction sets that the kernel names for the first core."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def cpu_quota(cgroup: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Cores' worth of CPU time that the control group grants; None without a limit."""
    try:
        limit, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if limit == "max" else int(limit) / int(period)


def available_memory(
    meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")
) -> int:
    """Bytes that can be taken without swapping, within the control group's limit."""
    amount = 0
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            amount = int(line.split()[1]) * 1024
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
    except (OSError, ValueError):
        return amount
    return amount if limit == "max" else min(amount, max(0, int(limit) - used))


def finish_probe(probe: Callable[[], tuple[int, str, str]]) -> list[Check]:
    """What the int8 probe's process says, as the lines for torch and for its int8."""
    install = "pip install -e '.[build]'"
    code, output, error = probe()
    if not output:
        said = (error.strip().splitlines() or [f"ended with {code}"])[-1]
        absent = importlib.util.find_spec("torch") is None
        return [Check("torch", False, "absent" if absent else said, install)]
    checks = [Check("torch", True, output.split()[0])]
    if code == 0:
        return [*checks, Check("oneDNN int8", True, "an int8 GEMM ran and its sums are exact")]
    said = (error.strip().splitlines() or [f"ended with {code}"])[-1]
    if said == "no VNNI":
        return [*checks, Check("oneDNN int8", True, "absent", "int8 needs VNNI or AMX")]
    return [*checks, Check("oneDNN int8", False, said, f"{install} (the tested torch)")]


def _start_probe() -> Callable[[], tuple[int, str, str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", _INT8_PROBE],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )

    def finish() -> tuple[int, str, str]:
        try:
            output, error = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return 1, "", "no answer in 60 s"
        return process.returncode, output, error

    return finish


def _optional(item: str, packages: tuple[str, ...], gain: str, extra: str) -> Check:
    for package in packages:
        try:
            return Check(item, True, metadata.version(package))
        except metadata.PackageNotFoundError:
            continue
    return Check(item, True, "absent", f"pip install -e '.[{extra}]': {gain}")
