"""setup.py: what is compiled and when, what happens without a compiler, what a wheel holds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "kernels", "client", "loadtest")
SOURCES = sorted(path.name for path in (ROOT / "kernels/cpu/src").glob("*.[ch]*"))

# Writes what a compiler would and logs what it was asked; REFUSE are flags that it does not know.
COMPILER = r"""#!/bin/sh
echo "$*" >> "$LOG"
for flag in $REFUSE; do
    case " $* " in *" $flag "*) echo "error: $flag is unknown" >&2; exit 1;; esac
done
last=; rule=; source=
while [ $# -gt 0 ]; do
    case "$1" in
        -o) last=$2; shift;;
        -MF) rule=$2; shift;;
        *.cc|*.cpp) source=$1;;
    esac
    shift
done
: > "$last"
if [ -n "$rule" ]; then echo "it: $source kernels/cpu/src/level.h" > "$rule"; fi
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """What a source distribution has, and a compiler `c++` of our own beside it."""
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for part in (*PARTS, "samp_core", "model_repository/templates"):
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, tmp_path / "tree" / part, ignore=ignore)
        else:
            (tmp_path / "tree" / part).parent.mkdir(exist_ok=True)
            shutil.copy(source, tmp_path / "tree" / part)
    (tmp_path / "bin").mkdir()
    compiler = tmp_path / "bin" / "c++"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    return tmp_path / "tree"


def setup(tree: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """One run of setup.py; the only compiler is ours, the shell's own commands are there."""
    bin = tree.parent / "bin"
    for name in ("sh",):
        if not (bin / name).exists():
            (bin / name).symlink_to(str(shutil.which(name)))
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SAMP_", "CXX", "LD"))}
    log = {"LOG": str(tree.parent / "log"), "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        [sys.executable, "setup.py", "--quiet", *words],
        cwd=tree,
        env={**kept, "PATH": str(bin), "CXX": "", **log, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def asked(tree: Path) -> list[str]:
    """The compiler's command lines since the last time, sources and links only."""
    log = tree.parent / "log"
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return [line for line in lines if "-xc++" not in line]


def built(tree: Path) -> list[str]:
    return [path.name for path in (tree / "kernels/cpu").glob("_native*.so")]


def test_each_level_is_compiled_with_its_own_flags(tree: Path) -> None:
    done = setup(tree, "build_ext", "--inplace")
    assert done.returncode == 0, done.stderr
    assert len(built(tree)) == 1
    lines = asked(tree)
    levels = {line.split("-DSAMP_LEVEL=")[1][0]: line for line in lines if "-DSAMP_LEVEL=" in line}
    assert sorted(levels) == ["0", "1", "2", "3", "4"]
    assert "-mamx-int8" in levels["4"]
    assert "-mavx512vnni" in levels["3"]
    assert "amx" not in levels["3"]
    assert "-mavxvnni" in levels["2"]
    assert "avx512" not in levels["2"]
    assert "vnni" not in levels["1"]
    assert "-mavx" not in levels["0"]
    # What the linker may share is compiled for the baseline.
    others = [line for line in lines if "-DSAMP_LEVEL=" not in line]
    assert not any("-mavx" in line or "-mfma" in line for line in others)
    compiled = [name for name in SOURCES if name.endswith(".cc") and name != "level.cc"]
    assert all(sum(f"/{name} " in f"{line} " for line in others) == 1 for name in compiled)
    assert sum("nb_combined.cpp" in line for line in others) == 1
    dispatch = next(line for line in others if "dispatch.cc" in line)
    assert all(f"-DSAMP_HAVE_LEVEL_{level}" in dispatch for level in range(5))


def test_only_what_changed_is_compiled_again(tree: Path) -> None:
    assert setup(tree, "build_ext", "--inplace").returncode == 0
    asked(tree)
    assert setup(tree, "build_ext", "--inplace").returncode == 0
    assert asked(tree) == []
    file = tree / "kernels/cpu/src/team.cc"
    file.write_text(file.read_text() + "\n")
    os.utime(file)
    assert setup(tree, "build_ext", "--inplace").returncode == 0
    lines = asked(tree)
    assert len(lines) == 2
    assert "team.cc" in lines[0]
    assert "-shared" in lines[1]
    os.utime(tree / "kernels/cpu/src/level.h")
    assert setup(tree, "build_ext", "--inplace").returncode == 0
    assert len(asked(tree)) > len(SOURCES) // 3
    # Other flags are other objects.
    assert setup(tree, "build_ext", "--inplace", CXXFLAGS="-g").returncode == 0
    assert all("-g" in line for line in asked(tree) if "-shared" not in line)


def test_a_level_that_the_compiler_does_not_know_is_left_out(tree: Path) -> None:
    done = setup(tree, "build_ext", "--inplace", REFUSE="-mavx512vnni -mavxvnni")
    assert done.returncode == 0, done.stderr
    assert len(built(tree)) == 1
    lines = asked(tree)
    assert not any("-DSAMP_LEVEL=3" in line or "-DSAMP_LEVEL=2" in line for line in lines)
    dispatch = next(line for line in lines if "dispatch.cc" in line)
    found = [level for level in range(4) if f"-DSAMP_HAVE_LEVEL_{level}" in dispatch]
    assert found == [0, 1]


@pytest.mark.parametrize("reason", ["no compiler", "an error"])
def test_an_install_without_it_succeeds_and_says_so(reason: str, tree: Path) -> None:
    refuse = {"REFUSE": "-Wall"} if reason == "an error" else {}
    if reason == "no compiler":
        (tree.parent / "bin" / "c++").unlink()
    done = setup(tree, "build_ext", "--inplace", **refuse)
    assert done.returncode == 0
    assert built(tree) == []
    (line,) = done.stderr.splitlines()
    assert line.startswith("samp: backend `cpu` ")
    assert ("no C++ compiler" if reason == "no compiler" else "-Wall is unknown") in line
    assert "`onednn` goes on" in line
    assert "apt-get install g++" in line
    done = setup(tree, "build_ext", "--inplace", SAMP_NATIVE="require", **refuse)
    assert done.returncode != 0
    assert done.stderr


def test_it_can_be_left_out(tree: Path) -> None:
    done = setup(tree, "build_ext", "--inplace", SAMP_NATIVE="0")
    assert (done.returncode, done.stderr) == (0, "")
    assert built(tree) == []
    assert asked(tree) == []


def test_what_a_wheel_and_a_source_distribution_hold(tree: Path) -> None:
    assert setup(tree, "bdist_wheel").returncode == 0
    (wheel,) = (tree / "dist").glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "any" not in wheel.name.split("-")[-1]
    assert any(name.startswith("samp_kernels/cpu/_native.") and ".so" in name for name in names)
    assert {
        f"samp_kernels/cpu/{name}" for name in ("__init__.py", "backend.py", "_native.pyi")
    } <= names
    assert {f"samp_kernels/cpu/src/{name}" for name in SOURCES} <= names
    assert setup(tree, "sdist").returncode == 0
    (archive,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        held = {name.partition("/")[2] for name in opened.getnames()}
    assert {"setup.py", "pyproject.toml"} <= held
    assert {f"kernels/cpu/src/{name}" for name in SOURCES} <= held
