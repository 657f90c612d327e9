"""Compile every kernel and tile to cubins: `python -m samp_kernels.cuda.build`, or `make kernels`.

NVRTC through cuda.core (packages of the extra gpu-build), else nvcc. Neither needs a GPU or a
driver. A cubin's name holds the hash of what it was made from; built.json says by which compiler.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

from samp_kernels.cuda.units import (
    ARCHITECTURES,
    SOURCES,
    Unit,
    check_unit,
    cubin_name,
    defines_of,
    source_text,
    units_by_name,
    units_of,
)
from samp_kernels.interface import KernelError

COMMAND = "make kernels (python -m samp_kernels.cuda.build)"
MEND = "pip install 'samp-triton[gpu-build]', or install a CUDA toolkit 12.2 or newer"


class MissingKernel(KernelError):
    """A cubin is not there. Serving never compiles."""


def folder() -> Path:
    """Where the cubins lie: SAMP_CUBINS, else beside the sources."""
    return Path(os.environ.get("SAMP_CUBINS") or Path(__file__).parent / "cubins")


def find_cubin(unit: Unit, architecture: str) -> Path:
    check_unit(unit, architecture)
    path = folder() / cubin_name(unit, architecture)
    if not path.is_file():
        got = f"no {unit.name} for {architecture} in {folder()}"
        raise MissingKernel("cuda", got, f"run: {COMMAND} --arch {architecture}")
    return path


@cache
def nvrtc() -> str:
    """The version of the NVRTC that cuda.core compiles with here; "" where one of both is missing.

    Neither needs a driver. cuda.bindings says what it found: the package's, a toolkit's."""
    try:
        bindings = import_module("cuda.bindings.nvrtc")
        import_module("cuda.core")
        _, major, minor = bindings.nvrtcVersion()
    except (ImportError, RuntimeError):  # No such package, or no such library.
        return ""
    return f"{major}.{minor}"


def compiler() -> str:
    """Name and version of what compiles here; "" where nothing does."""
    if nvrtc():
        return f"nvrtc {nvrtc()}"
    nvcc = find_nvcc()
    if not nvcc:
        return ""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    return "nvcc " + said.partition("release ")[2].partition(",")[0]


def find_nvcc() -> str:
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc") or ""


def compile_unit(unit: Unit, architecture: str) -> bytes:
    """The cubin's bytes. Raises KernelError with the compiler's own words."""
    if nvrtc():
        return _with_nvrtc(unit, architecture)
    nvcc = find_nvcc()
    if not nvcc:
        raise KernelError("compile", "neither NVRTC nor nvcc", MEND)
    defines = [f"-D{name}={value}" for name, value in defines_of(unit, architecture).items()]
    with tempfile.TemporaryDirectory() as work:
        out = Path(work, "out.cubin")
        command = [nvcc, "-cubin", f"-arch={architecture}", "-std=c++17", *defines]
        command += ["-o", str(out), str(SOURCES / unit.source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise KernelError("compile", f"{unit.name}: {done.stderr.strip()}", "a clean compile")
        return out.read_bytes()


def _with_nvrtc(unit: Unit, architecture: str) -> bytes:
    core = import_module("cuda.core")
    options = core.ProgramOptions(
        name=unit.source,
        arch=architecture,
        std="c++17",
        include_path=str(SOURCES),
        define_macro=[(name, str(value)) for name, value in defines_of(unit, architecture).items()],
    )
    try:
        program = core.Program(source_text(unit.source), "c++", options)
        return bytes(program.compile("cubin").code)
    except Exception as error:  # cuda.core's own kind, which it does not export.
        raise KernelError("compile", f"{unit.name}: {error}", "a clean compile") from None


def build(
    architectures: Sequence[str] = ARCHITECTURES, *, again: bool = False, quiet: bool = False
) -> list[Path]:
    """Compile what is missing or was made by another compiler; all paths, in a fixed order."""
    made_by = compiler()
    if not made_by:
        raise KernelError("compile", "neither NVRTC nor nvcc", MEND)
    place = folder()
    place.mkdir(parents=True, exist_ok=True)
    notes_file = place / "built.json"
    try:
        notes = json.loads(notes_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        notes = {}
    wanted = [(unit, arch) for arch in architectures for unit in units_of(arch)]
    names = [cubin_name(unit, arch) for unit, arch in wanted]
    todo = [
        (unit.name, arch)
        for (unit, arch), name in zip(wanted, names, strict=True)
        if again or notes.get(name) != made_by or not (place / name).is_file()
    ]
    # Processes, since NVRTC compiles one program at a time in each.
    workers = max(1, min(len(os.sched_getaffinity(0)), len(todo)))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(_make, *job) for job in todo]
        for done, job in enumerate(as_completed(jobs), 1):
            name, error = job.result()
            if error:
                for other in jobs:
                    other.cancel()
                raise KernelError("compile", error, "a clean compile")
            notes[name] = made_by
            if not quiet and (done % 10 == 0 or done == len(todo)):
                print(f"kernels: {done} of {len(todo)} compiled ({made_by})", flush=True)
    if set(architectures) == set(ARCHITECTURES):
        for old in place.glob("*.cubin"):
            if old.name not in names:
                old.unlink()  # Of sources that are no more.
    kept = {name: by for name, by in notes.items() if (place / name).is_file()}
    aside = notes_file.with_suffix(f".{os.getpid()}")
    aside.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(aside, notes_file)
    if not quiet:
        print(f"kernels: {len(names)} cubins in {place}")
    return [place / name for name in names]


def _make(name: str, architecture: str) -> tuple[str, str]:
    """One cubin, written aside and renamed; its file's name, or what went wrong."""
    unit = units_by_name()[name]
    try:
        data = compile_unit(unit, architecture)
    except KernelError as error:
        return "", error.got
    path = folder() / cubin_name(unit, architecture)
    aside = path.with_suffix(f".{os.getpid()}")
    aside.write_bytes(data)
    os.replace(aside, path)
    return path.name, ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="default: all")
    parser.add_argument("--again", action="store_true", help="also what is there already")
    options = parser.parse_args()
    try:
        build(options.arch or ARCHITECTURES, again=options.again)
    except KernelError as error:
        print(f"kernels: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
