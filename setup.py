"""Builds the extension `samp_kernels.cpu._native`; everything else is in pyproject.toml.

Without a C++ compiler, or where compiling fails, the install succeeds without it and says so.

    SAMP_NATIVE=0 | require   leave it out | let the install fail with it
    SAMP_SANITIZE=1           compile for AddressSanitizer and UBSan (`make sanitize`)
    CXX, CXXFLAGS, LDFLAGS    as everywhere
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SOURCES = Path("kernels/cpu/src")
LOST = "samp: backend `cpu` (native kernels, the fastest) is not built: {why}; `onednn` goes on"
MEND = "to get it: apt-get install g++ python3-dev, then install again (in a clone: make native)"

# Each dispatch level is level.cc compiled once; no other file is compiled for more than the
# machine's baseline, since a function that the linker shares would then need these instructions.
VNNI = (
    "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mavx2 -mfma -mprefer-vector-width=512"
)
LEVELS = {
    4: f"{VNNI} -mamx-tile -mamx-int8",
    3: VNNI,
    2: "-mavx2 -mfma -mavxvnni",
    1: "-mavx2 -mfma",
    0: "",
}
FLAGS = "-std=c++17 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wall -pthread"
# gcc 12's own AVX-512 headers leave operands undefined on purpose (gcc bug 105593).
QUIET = "-Wno-uninitialized -Wno-maybe-uninitialized"
FAST = "-O3 -DNDEBUG -DNB_COMPACT_ASSERTIONS -ffunction-sections -fdata-sections"
SANITIZE = "-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined"
NO_RECOVER = "-fno-sanitize-recover=undefined"  # The first finding ends the process.


class Native:
    """One build of the extension: objects in `folder`, each made again only when it must be."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        names = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
        found = [shlex.split(name) for name in names if name and shutil.which(shlex.split(name)[0])]
        if not found:
            raise CompileError("no C++ compiler")
        self.compiler = found[0]
        headers = Path(sysconfig.get_paths()["include"])
        if not (headers / "Python.h").is_file():
            raise CompileError(f"no Python.h in {headers}")
        try:
            import nanobind
        except ImportError:
            raise CompileError("nanobind is not installed beside setuptools") from None
        self.nanobind = Path(nanobind.source_dir())
        places = [headers, nanobind.include_dir(), self.nanobind.parent / "ext/robin_map/include"]
        sanitize = os.environ.get("SAMP_SANITIZE") == "1"
        self.link = [*self.compiler, "-shared", "-pthread"]
        self.link += (SANITIZE if sanitize else "-Wl,--gc-sections").split()
        self.flags = [
            *self.compiler,
            *shlex.split(f"{FLAGS} {f'{SANITIZE} {NO_RECOVER}' if sanitize else FAST}"),
            *(f"-isystem{place}" for place in places),
            *shlex.split(os.environ.get("CXXFLAGS", "")),
        ]

    def build(self, target: Path) -> None:
        """Compile what changed, side by side, and link it as `target`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        levels = [level for level in LEVELS if self.takes(level)]
        have = [f"-DSAMP_HAVE_LEVEL_{level}" for level in levels]
        jobs = [
            (
                SOURCES / "level.cc",
                f"level{level}",
                [f"-DSAMP_LEVEL={level}", *QUIET.split(), *LEVELS[level].split()],
            )
            for level in levels
        ]
        jobs += [(self.nanobind / "nb_combined.cpp", "nanobind", ["-fno-strict-aliasing", "-w"])]
        jobs += [
            (source, source.stem, have)
            for source in sorted(SOURCES.glob("*.cc"))
            if source.name != "level.cc"
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda job: self.compile(*job), jobs))
        names = [str(path) for path, _ in objects]
        if any(fresh for _, fresh in objects) or not target.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            given = shlex.split(os.environ.get("LDFLAGS", ""))
            aside = target.with_suffix(".part")
            run([*self.link, *names, *given, "-o", str(aside)])
            os.replace(aside, target)

    def takes(self, level: int) -> bool:
        """Whether this compiler knows the level's instructions, on this kind of machine."""
        if level and platform.machine().lower() not in ("x86_64", "amd64"):
            return False
        test = [*self.compiler, *LEVELS[level].split(), "-xc++", "-c", "-", "-o", os.devnull]
        # AMX is written as text for the assembler, which may be older than the compiler.
        code = b'void f() { asm("tilerelease"); }' if level == 4 else b""
        return subprocess.run(test, input=code, capture_output=True).returncode == 0

    def compile(self, source: Path, name: str, more: list[str]) -> tuple[Path, bool]:
        """The object of one source, and whether it had to be made."""
        command = [*self.flags, *more, "-MMD", "-c", str(source)]
        key = hashlib.sha256("\0".join(command).encode()).hexdigest()[:12]
        made = self.folder / f"{name}-{key}.o"
        if is_newer(made):
            return made, False
        aside, begun = made.with_suffix(".part"), time.time()
        run([*command, "-MF", str(made.with_suffix(".d")), "-MT", "it", "-o", str(aside)])
        os.utime(aside, (begun, begun))  # What is edited from now on is newer than the object.
        os.replace(aside, made)
        return made, True


def is_newer(made: Path) -> bool:
    """Whether an object is there, and newer than every file that its .d names."""
    try:
        made_at = made.stat().st_mtime
        rule = made.with_suffix(".d").read_text().replace("\\\n", " ")
        return all(Path(name).stat().st_mtime < made_at for name in rule.split()[1:])
    except OSError:
        return False


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if not done.returncode or os.environ.get("SAMP_NATIVE") == "require":
        sys.stderr.write(done.stderr)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error:" in line]
        raise CompileError(errors[0] if errors else f"{command[0]} ended with {done.returncode}")


class BuildNative(build_ext):
    """Compiles as above instead of asking setuptools for it: flags differ from file to file."""

    def build_extension(self, ext: Extension) -> None:
        try:
            Native(Path(self.build_temp) / "native").build(Path(self.get_ext_fullpath(ext.name)))
        except CompileError as error:
            if os.environ.get("SAMP_NATIVE") == "require":
                raise
            print(f"{LOST.format(why=error)}; {MEND}", file=sys.stderr)

    def copy_file(self, infile, outfile, *args, **kwargs):  # type: ignore[no-untyped-def]
        """Into the source folder, at once: a process that loads it never meets a half."""
        aside = Path(f"{outfile}.part")
        shutil.copyfile(infile, aside)
        os.replace(aside, outfile)
        return outfile, 1


if __name__ == "__main__":
    extension = Extension(
        "samp_kernels.cpu._native",
        sources=sorted(str(path) for path in SOURCES.glob("*.cc")),
        depends=sorted(str(path) for path in SOURCES.glob("*.h")),
        language="c++",
        optional=os.environ.get("SAMP_NATIVE") != "require",
    )
    setup(
        ext_modules=[] if os.environ.get("SAMP_NATIVE") == "0" else [extension],
        cmdclass={"build_ext": BuildNative},
    )
