"""NVIDIA's perf_analyzer as a client of the served benchmarks: a C++ closed loop over gRPC.

The binary comes out of a wheel of tritonclient (the last one that carries it), its two libraries
out of the embedded Triton's package; both lie in build/bench afterwards.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import store

VERSION = "2.48.0"
BINARY = f"tritonclient-{VERSION}.data/data/bin/perf_analyzer"
LIBRARIES = {"libb64.so.0d": "libb64-*.so.0d", "libcudart.so.12": "libcudart-*.so.12*"}
# perf_analyzer measures until three windows in a row agree; any three do: rounds are ours.
WINDOWS = 3


def installed() -> Path:
    """The folder with the binary and `lib`. Raises RuntimeError where it cannot be had."""
    return store.made("perf-analyzer", VERSION, _fetch)


def _fetch(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as place:
        command = [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", place),
            *("--platform", "manylinux1_x86_64", "--only-binary", ":all:"),
            f"tritonclient=={VERSION}",
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(place).glob("*.whl"))
        if done.returncode or not wheels:
            raise RuntimeError(f"perf_analyzer: {done.stderr.strip().splitlines()[-1:]}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            (folder / "perf_analyzer").write_bytes(wheel.read(BINARY))
    (folder / "perf_analyzer").chmod(0o755)
    (folder / "lib").mkdir()
    bundled = Path(str(metadata.distribution("nvidia-pytriton").locate_file("")))
    for name, pattern in LIBRARIES.items():
        found = sorted((bundled / "nvidia_pytriton.libs").glob(pattern))
        if not found:
            raise RuntimeError(f"perf_analyzer: nvidia-pytriton carries no {pattern}")
        (folder / "lib" / name).symlink_to(found[0])


def write_texts(texts: Sequence[str], path: Path) -> None:
    """perf_analyzer's input data: one text an entry; `-b` takes the next so many."""
    path.write_text(json.dumps({"data": [{"TEXT": [text]} for text in texts]}), encoding="utf-8")


def load(
    url: str, model: str, texts: Path, *, concurrency: int, rows: int, seconds: float
) -> tuple[float, float, float]:
    """Requests a second over three windows of `seconds` in all; their p50 and p95 in ms."""
    home = installed()
    with tempfile.TemporaryDirectory() as place:
        table = Path(place) / "latency.csv"
        command = [
            *(str(home / "perf_analyzer"), "-m", model, "-i", "grpc", "-u", url),
            *("-b", str(rows), "--input-data", str(texts)),
            *("--concurrency-range", str(concurrency), "--stability-percentage", "999"),
            *("--measurement-interval", str(max(300, round(1000 * seconds / WINDOWS)))),
            *("--max-trials", str(WINDOWS), "-f", str(table)),
        ]
        environment = {**os.environ, "LD_LIBRARY_PATH": str(home / "lib")}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode or not table.is_file():
            said = (done.stdout + done.stderr).strip().splitlines()[-3:]
            raise SystemExit(f"bench: perf_analyzer ended with {done.returncode}: {said}")
        with table.open(encoding="utf-8", newline="") as stream:
            (row,) = csv.DictReader(stream)
    p50, p95 = (float(row[f"p{percent} latency"]) / 1000.0 for percent in (50, 95))
    return float(row["Inferences/Second"]) / rows, p50, p95
