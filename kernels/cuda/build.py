"""Compile every kernel and tile to cubins: `python -m samp_kernels.cuda.build`, or `make kernels`.

NVRTC (package nvidia-cuda-nvrtc, or a CUDA toolkit's), else nvcc. Neither needs a GPU. A cubin's
name holds the hash of what it was made from; built.json says by which compiler.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

from samp_kernels.cuda.units import (
    ARCHITECTURES,
    SOURCES,
    Unit,
    check_unit,
    cubin_name,
    defines_of,
    headers,
    source_text,
    units_by_name,
    units_of,
)
from samp_kernels.interface import KernelError

COMMAND = "make kernels (python -m samp_kernels.cuda.build)"
MEND = "pip install 'nvidia-cuda-nvrtc>=13,<14', or install a CUDA toolkit 12.2 or newer"


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
def nvrtc() -> ctypes.CDLL | None:
    """NVRTC of the newest major version that is found, or None."""
    places: list[Path] = []
    for package in ("nvidia.cu13", "nvidia.cuda_nvrtc"):
        try:
            spec = find_spec(package)
        except ModuleNotFoundError:
            continue
        for place in (spec.submodule_search_locations or ()) if spec else ():
            places.append(Path(place, "lib"))
    for name in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if name:
            places.append(Path(name, "lib64"))
    for soname in ("libnvrtc.so.13", "libnvrtc.so.12"):
        for path in (*(str(place / soname) for place in places), soname):
            try:
                for builtins in sorted(Path(path).parent.glob("libnvrtc-builtins.so.*")):
                    ctypes.CDLL(str(builtins))  # NVRTC looks for it by name alone.
                return ctypes.CDLL(path)
            except OSError:
                continue
    return None


def compiler() -> str:
    """Name and version of what compiles here; "" where nothing does."""
    library = nvrtc()
    if library is not None:
        major, minor = ctypes.c_int(), ctypes.c_int()
        library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        return f"nvrtc {major.value}.{minor.value}"
    nvcc = find_nvcc()
    if not nvcc:
        return ""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    return "nvcc " + said.partition("release ")[2].partition(",")[0]


def find_nvcc() -> str:
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc") or ""


def compile_unit(unit: Unit, architecture: str) -> bytes:
    """The cubin's bytes. Raises KernelError with the compiler's own words."""
    defines = [f"-D{name}={value}" for name, value in defines_of(unit, architecture).items()]
    library = nvrtc()
    if library is not None:
        return _with_nvrtc(library, unit, architecture, defines)
    nvcc = find_nvcc()
    if not nvcc:
        raise KernelError("compile", "neither NVRTC nor nvcc", MEND)
    with tempfile.TemporaryDirectory() as work:
        out = Path(work, "out.cubin")
        command = [nvcc, "-cubin", f"-arch={architecture}", "-std=c++17", *defines]
        command += ["-o", str(out), str(SOURCES / unit.source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise KernelError("compile", f"{unit.name}: {done.stderr.strip()}", "a clean compile")
        return out.read_bytes()


def _with_nvrtc(
    library: ctypes.CDLL, unit: Unit, architecture: str, defines: Sequence[str]
) -> bytes:
    names = headers()
    texts = (ctypes.c_char_p * len(names))(*(source_text(name).encode() for name in names))
    known = (ctypes.c_char_p * len(names))(*(name.encode() for name in names))
    program = ctypes.c_void_p()
    source, title = source_text(unit.source).encode(), unit.source.encode()
    code = library.nvrtcCreateProgram(
        ctypes.byref(program), source, title, len(names), texts, known
    )
    if code:
        raise KernelError("compile", f"{unit.name}: nvrtcCreateProgram gave {code}", "0")
    options = [f"--gpu-architecture={architecture}", "--std=c++17", *defines]
    given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    try:
        if library.nvrtcCompileProgram(program, len(options), given):
            said = _read(library, program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog")
            raise KernelError("compile", f"{unit.name}: {said.decode()}", "a clean compile")
        return _read(library, program, "nvrtcGetCUBINSize", "nvrtcGetCUBIN")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _read(library: ctypes.CDLL, program: ctypes.c_void_p, size: str, content: str) -> bytes:
    count = ctypes.c_size_t()
    getattr(library, size)(program, ctypes.byref(count))
    text = ctypes.create_string_buffer(count.value)
    getattr(library, content)(program, text)
    return text.raw


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
