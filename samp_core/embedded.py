"""Which Triton to run: the one on PATH, else the one inside the package nvidia-pytriton.

The embedded server is used as a binary. Its backend folder is put together once per user and
Python version, because the wheel keeps one stub for each Python beside the backend.
"""

from __future__ import annotations

import contextlib
import ctypes.util
import hashlib
import importlib.util
import os
import shutil
import stat
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from samp_core.errors import SampError

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
INSTALL = "pip install --no-deps nvidia-pytriton==0.7.0"
# The last wheel whose stubs speak the numpy 1 ABI alone (release 24.10).
NUMPY_1_WHEELS = (0, 7)
STUB = "triton_python_backend_stub"


@dataclass(frozen=True)
class Triton:
    """A server binary, and what it needs around it. `backends` is None for one on PATH."""

    binary: Path
    embedded: bool
    backends: Path | None = None
    library_path: tuple[Path, ...] = ()

    def command(self) -> list[str]:
        """The binary with the options that belong to where it comes from."""
        options = [] if self.backends is None else [f"--backend-directory={self.backends}"]
        return [str(self.binary), *options]

    def environment(self, base: Mapping[str, str]) -> dict[str, str]:
        """`base` changed so that every stub runs this interpreter with this environment's packages.

        One thread for each library by default: the encoder raises its own in `initialize`.
        """
        env = dict(base)
        folders = [str(folder) for folder in self.library_path]
        if folders:
            env["LD_LIBRARY_PATH"] = _joined(folders, env.get("LD_LIBRARY_PATH"))
        env["PATH"] = _joined([str(Path(sys.executable).parent)], env.get("PATH"))
        if sys.prefix != sys.base_prefix:
            env["VIRTUAL_ENV"] = sys.prefix
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            env[name] = "1"
        env["OMP_WAIT_POLICY"] = "passive"
        env["TOKENIZERS_PARALLELISM"] = "false"
        return env


def find_triton(cache: Path | None = None) -> Triton:
    """The Triton to run. Raises SampError: none, no stub for this Python, numpy 2, no libpython."""
    on_path = shutil.which("tritonserver")
    if on_path is not None:
        return Triton(Path(on_path), embedded=False)
    spec = importlib.util.find_spec("pytriton")  # finds the folder, imports nothing
    folders = list(spec.submodule_search_locations or ()) if spec else []
    root = Path(folders[0]) / "tritonserver" if folders else None
    if root is None or not (root / "bin" / "tritonserver").is_file():
        raise SampError(
            "no_triton",
            "there is no tritonserver on PATH and no package nvidia-pytriton",
            "NVIDIA Triton, or the package's embedded one",
            INSTALL,
        )
    check_numpy()
    stub = root / "python_backend_stubs" / PYTHON / STUB
    if not stub.is_file():
        there = sorted(p.name for p in (root / "python_backend_stubs").iterdir())
        raise SampError(
            "no_python_stub",
            f"the embedded Triton has no stub for Python {PYTHON}",
            "Python " + ", ".join(there),
            "make the environment with one of them",
        )
    interpreter = libpython_folder()
    libraries = root.parent.parent / "nvidia_pytriton.libs"
    paths = (*((interpreter,) if interpreter else ()), libraries)
    backends = assemble_backends(root, stub, cache or cache_folder())
    return Triton(root / "bin" / "tritonserver", True, backends, paths)


def check_numpy() -> None:
    """Raise SampError where the embedded stub would die at the first text (numpy 2)."""
    numpy = metadata.version("numpy")
    try:
        wheel = tuple(int(part) for part in metadata.version("nvidia-pytriton").split(".")[:2])
    except (metadata.PackageNotFoundError, ValueError):
        return
    if int(numpy.split(".")[0]) >= 2 and wheel <= NUMPY_1_WHEELS:
        raise SampError(
            "numpy_too_new",
            f"numpy {numpy}: the embedded Triton's Python stub dies with it at the first text",
            "numpy 1.26 with the embedded Triton (a newer Triton on PATH takes numpy 2)",
            'pip install "numpy>=1.26,<2"',
        )


def libpython_folder() -> Path | None:
    """The folder of the running interpreter's shared library; None where ld.so finds one itself.

    The stub links it, and would otherwise take the system's, of another patch version.
    """
    name = f"libpython{PYTHON}.so.1.0"
    libdir = sysconfig.get_config_var("LIBDIR") or ""
    multiarch = sysconfig.get_config_var("MULTIARCH") or ""
    candidates = [Path(libdir), Path(libdir, multiarch), Path(sys.base_prefix, "lib")]
    for folder in candidates:
        if folder.is_absolute() and (folder / name).exists():
            return folder
    if ctypes.util.find_library(f"python{PYTHON}") is None:
        raise SampError(
            "no_libpython",
            f"{name} is not on this machine, and Triton's Python stub links it",
            "a Python with a shared library",
            f"apt-get install libpython{PYTHON}, or a Python built with --enable-shared",
        )
    return None


def assemble_backends(root: Path, stub: Path, cache: Path) -> Path:
    """`<cache>/backends-<key>/python` = the backend and the stub of this Python, made once.

    Written under another name and renamed, so that concurrent starts never see half of it.
    """
    backend = root / "backends" / "python"
    sources = [backend / "libtriton_python.so", backend / "triton_python_backend_utils.py", stub]
    missing = [path.name for path in sources if not path.is_file()]
    if missing:
        raise SampError(
            "damaged_triton", f"{root} has no {', '.join(missing)}", "the whole package", INSTALL
        )
    facts = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in sources]
    key = hashlib.sha256(repr((PYTHON, facts)).encode()).hexdigest()[:16]
    target = cache / f"backends-{key}"
    if target.is_dir():
        return target
    partial = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=cache))
    (partial / "python").mkdir()
    for path in sources:
        shutil.copy2(path, partial / "python" / path.name)
    try:
        partial.rename(target)
    except OSError:  # another start was first
        shutil.rmtree(partial)
        if not target.is_dir():
            raise
    return target


def cache_folder() -> Path:
    """A folder of this user's own: in XDG_CACHE_HOME or HOME, else in the temporary folder."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    preferred = Path(home, "samp")
    if preferred.is_absolute():
        with contextlib.suppress(OSError):
            preferred.mkdir(parents=True, exist_ok=True, mode=0o700)
            if os.access(preferred, os.W_OK | os.X_OK):
                return preferred
    fallback = Path(tempfile.gettempdir(), f"samp-{os.getuid()}")
    fallback.mkdir(exist_ok=True, mode=0o700)
    found = fallback.lstat()
    # Binaries are started from here: a folder that another user made is no place for them.
    if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode) or found.st_mode & 0o022:
        raise SampError(
            "unsafe_cache",
            f"{fallback} is not this user's own folder",
            "a private folder",
            "set XDG_CACHE_HOME to one",
        )
    return fallback


def _joined(first: list[str], rest: str | None) -> str:
    return os.pathsep.join([*first, *([rest] if rest else [])])
