"""Opens every peer that is installed for one checkpoint, and says why the others are not there."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import store
from peers.padded import Arm
from samp_kernels.interface import Array

# Peer -> its module here, and the exporter that writes its models; torch reads the checkpoint.
PEERS = {
    "openvino": ("peers.openvino_peer", "openvino"),
    "onnxruntime": ("peers.onnxruntime_peer", "onnxruntime"),
    "torch": ("peers.torch_peer", None),
}
EXPORTER = Path(__file__).with_name("export.py")


def open_arms(
    name: str,
    checkpoint: Path,
    sha256: str,
    samples: Sequence[Array],
    threads: int,
    wanted: Sequence[str],
    say: Callable[[str], None],
) -> tuple[list[Arm], list[str]]:
    """The arms of the wanted peers over one checkpoint; lines for what is missing."""
    found: list[Arm] = []
    missing: list[str] = []
    for peer in PEERS:
        if peer not in wanted:
            missing.append(f"{name}: {peer} was not asked for")
            continue
        try:
            arms, failed = _open(peer, name, checkpoint, sha256, samples, threads, say)
        except Exception as error:  # a peer is never a reason to stop
            missing.append(f"{name}: {peer}: {_line(error)}")
            continue
        found += arms
        missing += [f"{name}: {peer}: {file}: {reason}" for file, reason in failed.items()]
    return found, missing


def _open(
    peer: str,
    name: str,
    checkpoint: Path,
    sha256: str,
    samples: Sequence[Array],
    threads: int,
    say: Callable[[str], None],
) -> tuple[list[Arm], dict[str, str]]:
    module_name, exporter = PEERS[peer]
    module = importlib.import_module(module_name)
    versions = store.installed(module.PACKAGES)
    absent = [package for package in module.PACKAGES if package not in versions]
    if absent:
        raise ModuleNotFoundError(
            f"{', '.join(absent)} not installed: pip install 'samp-triton[peers]'"
        )
    if exporter is None:
        return list(module.arms(checkpoint, threads)), {}

    def make(folder: Path) -> None:
        say(f"{name}: the models of {peer}, once")
        _export(exporter, checkpoint, samples, folder)

    key = {
        "model": sha256,
        "samples": [row.tolist() for row in samples],
        "by": store.sha256(EXPORTER),
        "versions": {**versions, **store.installed(("torch", "transformers", "onnx"))},
    }
    folder = store.made(f"{peer}-{name}", key, make)
    failed: dict[str, str] = json.loads((folder / "failed.json").read_text(encoding="utf-8"))
    return list(module.arms(folder, threads)), failed


def _export(exporter: str, checkpoint: Path, samples: Sequence[Array], folder: Path) -> None:
    """Run export.py. Its tools report on their users unless a file in HOME says no."""
    rows = folder / "samples.npz"
    np.savez(rows, **{f"text-{index:03d}": row for index, row in enumerate(samples)})
    home = store.FOLDER / "home"
    (home / "intel").mkdir(parents=True, exist_ok=True)
    (home / "intel" / "openvino_telemetry").write_text("0")
    log = folder / "export.log"
    with log.open("wb") as stream:
        done = subprocess.run(
            [sys.executable, str(EXPORTER), exporter, str(checkpoint), str(rows), str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HOME": str(home), "NNCF_CI": "1", "HF_HUB_OFFLINE": "1"},
        )
    if done.returncode:
        last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise RuntimeError(f"export ended with {done.returncode}: {(last or [''])[-1][:200]}")


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:240]
