"""Everything that gpu_check.py needs on a machine with a GPU and no network, in one folder.

    make gpu-bundle                    (benchmarks/gpu_bundle.py [--python 3.12] [--out build/gpu])

The machine has Python of that version, CuPy, NumPy 2 and torch. The folder holds the repository's
own files and bundle/site.tar.xz: the cubins, the embedded Triton without what is not needed of it,
the packages that the model processes import, and a small trained checkpoint. There,
`python3 benchmarks/gpu_check.py` unpacks them beside itself. bundle/bundle.json names every file
with its SHA-256.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpu_checkpoint
import gpu_import

ROOT = gpu_import.ROOT
LIMIT = 64 << 20
OWN = (
    "benchmarks/closed_loop.py", "benchmarks/gpu_*.py", "benchmarks/lengths.json", "client",
    "kernels", "loadtest", "samp_core", "model_repository/templates", "LICENSE", "README.md",
)  # fmt: skip
# What model processes and the client import; versions are those of constraints.txt.
WHEELS = (
    "annotated-types", "grpcio", "ml-dtypes", "packaging", "protobuf", "pydantic", "pydantic-core",
    "python-rapidjson", "safetensors", "tokenizers", "tritonclient", "typing-extensions",
    "typing-inspection", "urllib3",
)  # fmt: skip
# locust without what a headless run does not import; the machine's own come first.
LOCUST = (
    "blinker", "brotli", "certifi", "charset-normalizer", "click", "configargparse", "flask",
    "flask-cors", "flask-login", "gevent", "geventhttpclient", "greenlet", "idna", "itsdangerous",
    "jinja2", "locust", "markupsafe", "msgpack", "psutil", "pyzmq", "requests", "werkzeug",
    "zope-event", "zope-interface",
)  # fmt: skip
# The embedded Triton's stub reads texts by the numpy 1 ABI; CuPy, in the encoder, wants numpy 2.
NUMPY = "numpy"
NUMPY1 = '''"""numpy 1 for the model processes that read and write texts."""
import os
import sys

with open("/proc/self/cmdline", "rb") as stream:
    words = stream.read().split(b"\\0")
if words[0].endswith(b"triton_python_backend_stub"):
    models = [os.path.basename(os.path.dirname(os.path.dirname(word))) for word in words[1:]]
    if any(name.startswith((b"tokenizer_", b"head_")) for name in models):
        sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(__file__)), "numpy1"))
'''
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux1")


def unpack() -> Path:
    """On the machine with the GPU: the packages beside the bundle, and a Python that has them and
    all that the running one has. An environment, since Triton's stub heeds no PYTHONPATH."""
    place = gpu_import.BUNDLE / "unpacked"
    python = place / "venv" / "bin" / "python"
    if python.exists():
        return python
    shutil.rmtree(place, ignore_errors=True)
    with tarfile.open(gpu_import.BUNDLE / "site.tar.xz") as archive:
        known: Any = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Not in 3.11.2.
        archive.extractall(place, **known)
    command = [sys.executable, "-m", "venv", "--without-pip", str(place / "venv")]
    subprocess.run(command, check=True)
    (place / "links").mkdir()
    for name, folder in gpu_import.LINKS.items():
        (place / "links" / name).symlink_to(ROOT / folder)
    paths = sysconfig.get_paths()
    own = sorted({paths["purelib"], paths["platlib"]})
    lines = [str(place / "site"), str(place / "links"), "import samp_numpy"]
    lines += [f"import site; site.addsitedir({folder!r})" for folder in own]
    lines += [str(place / "locust")]
    (packages,) = (place / "venv" / "lib").glob("python*/site-packages")
    (packages / "samp.pth").write_text("\n".join(lines) + "\n")
    return python


def make(out: Path, python: str, wheels: Path) -> None:
    """Write the bundle anew. SystemExit for what is missing."""
    if out.exists():
        shutil.rmtree(out)
    for path in own_files():
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, out / path)
    cubins = sorted((ROOT / "kernels" / "cuda" / "cubins").glob("*.cubin"))
    if not cubins:
        raise SystemExit("gpu_bundle: no cubins; run: make kernels")
    (out / "bundle").mkdir()
    with tarfile.open(out / "bundle" / "site.tar.xz", "w:xz", preset=6) as archive:
        add(archive, "site/samp_numpy.py", NUMPY1.encode())
        for wheel in fetch(python, wheels):
            place = place_of(wheel)
            for name, data in wheel_files(wheel):
                add(archive, f"{place}/{name}", data)
        for path, name in triton_files(python):
            add(archive, f"site/{name}", path.read_bytes(), os.access(path, os.X_OK))
        for path in cubins:  # Many are alike, and are packed well together.
            add(archive, f"cubins/{path.name}", path.read_bytes())
        for name, data in checkpoint_files():
            add(archive, f"checkpoint/{name}", data)
    listed = {str(p.relative_to(out)): sha256(p) for p in sorted(out.rglob("*")) if p.is_file()}
    facts = {"python": python, "commit": gpu_import.commit(), "files": listed}
    (out / "bundle" / "bundle.json").write_text(json.dumps(facts, indent=1) + "\n")


def own_files() -> list[Path]:
    """The repository's files that travel: those that git tracks or would, and no others."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *OWN],
        cwd=ROOT, capture_output=True, check=True,
    )  # fmt: skip
    paths = [Path(os.fsdecode(name)) for name in listed.stdout.split(b"\0") if name]
    return [path for path in paths if (ROOT / path).is_file()]


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {name.lower().replace("_", "-"): version for name, version in pairs}


def fetch(python: str, folder: Path) -> list[Path]:
    """The wheels, downloaded again where others are wanted."""
    versions = pinned()
    folder.mkdir(parents=True, exist_ok=True)
    names = (*WHEELS, NUMPY, *LOCUST)
    wanted = [f"{n}=={versions[n]}" if n in versions else n for n in names]
    wanted[wanted.index("pydantic-core")] = core_of(versions["pydantic"])
    complete = folder / "complete"
    if not complete.is_file() or complete.read_text().split() != wanted:
        for old in folder.glob("*.whl"):
            old.unlink()
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", folder]
        command += ["--only-binary", ":all:", "--implementation", "cp", "--python-version", python]
        for name in PLATFORMS:
            command += ["--platform", f"{name}_x86_64"]
        done = subprocess.run([*command, *wanted], check=False)
        if done.returncode:
            raise SystemExit("gpu_bundle: the wheels could not be downloaded")
        complete.write_text("\n".join(wanted) + "\n")
    return sorted(folder.glob("*.whl"))


def place_of(wheel: Path) -> str:
    """The folder of the archive that a wheel is installed into."""
    name = wheel.name.partition("-")[0].lower().replace("_", "-").replace(".", "-")
    if name == NUMPY:
        return "numpy1"
    return "locust" if name in LOCUST else "site"


def core_of(version: str) -> str:
    """The pydantic-core that the installed pydantic of this version names."""
    from importlib.metadata import requires
    from importlib.metadata import version as installed

    if installed("pydantic") != version:
        raise SystemExit(f"gpu_bundle: pydantic {version} is not installed; run: make venv")
    found = [r for r in requires("pydantic") or () if r.startswith("pydantic-core")]
    return found[0].partition(";")[0].strip()


def wheel_files(wheel: Path) -> Iterator[tuple[str, bytes]]:
    """What a wheel installs, but for tests and type stubs."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            parts = Path(name).parts
            if name.endswith(("/", ".pyi")) or "tests" in parts or ".data" in parts[0]:
                continue
            yield name, archive.read(name)


def triton_files(python: str) -> Iterator[tuple[Path, str]]:
    """The server, the Python backend with the one stub, and the libraries that they link."""
    spec = importlib.util.find_spec("pytriton")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders:
        raise SystemExit("gpu_bundle: no package nvidia-pytriton; run: make venv")
    site = Path(folders[0]).parent
    root = site / "pytriton" / "tritonserver"
    for part in ("bin/tritonserver", "backends/python", f"python_backend_stubs/{python}"):
        for path in sorted([root / part, *(root / part).rglob("*")]):
            if path.is_file() and "__pycache__" not in path.parts:
                yield path, str(path.relative_to(site))
    for path in sorted((site / "nvidia_pytriton.libs").iterdir()):
        if not path.name.startswith("libpython"):  # Another Python's; ours is the machine's own.
            yield path, str(path.relative_to(site))


def checkpoint_files() -> Iterator[tuple[str, bytes]]:
    """A small trained checkpoint, made once."""
    made = ROOT / "build" / "gpu-checkpoint"
    if not (made / "rows.jsonl").is_file():
        gpu_checkpoint.train(made)
    for path in sorted(made.rglob("*")):
        if path.is_file():
            yield str(path.relative_to(made)), path.read_bytes()


def add(archive: tarfile.TarFile, name: str, data: bytes, executable: bool = False) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o755 if executable else 0o644
    archive.addfile(info, io.BytesIO(data))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", default="3.12", help="of the machine with the GPU")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu")
    parser.add_argument("--wheels", type=Path, help="default: build/gpu-wheels-<python>")
    options = parser.parse_args()
    wheels = options.wheels or ROOT / "build" / f"gpu-wheels-{options.python}"
    make(options.out, options.python, wheels)
    size = size_of(options.out)
    print(f"{options.out}: {size / 2**20:.1f} MiB of {LIMIT / 2**20:.0f}")
    return 0 if size <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
