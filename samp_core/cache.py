"""What took time, kept by content: a key is a JSON object, a value is arrays or a JSON object.

Files are written beside their place and renamed, and read back through a digest, so a killed
build or a damaged disk costs one entry, never a wrong result.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from samp_kernels.interface import Array


@dataclass
class Cache:
    """A folder of entries, with counts of what was found and what had to be made."""

    folder: Path
    hits: int = 0
    misses: int = 0

    def arrays(
        self, kind: str, key: Mapping[str, Any], make: Callable[[], Mapping[str, Array]]
    ) -> dict[str, Array]:
        """The arrays under this key, made and kept if they are not there."""
        path = self._path(kind, key, "npz")
        body = self._read(path)
        if body is not None:
            with np.load(io.BytesIO(body), allow_pickle=False) as stored:
                return {name: stored[name] for name in stored.files}
        made = dict(make())
        buffer = io.BytesIO()
        np.savez(buffer, **made)  # type: ignore[arg-type]
        self._write(path, buffer.getvalue())
        return made

    def json(self, kind: str, key: Mapping[str, Any], make: Callable[[], Any]) -> Any:
        """The JSON value under this key, made and kept if it is not there."""
        path = self._path(kind, key, "json")
        body = self._read(path)
        if body is not None:
            return json.loads(body)
        body = json.dumps(make()).encode()
        self._write(path, body)
        return json.loads(body)

    def has(self, kind: str, key: Mapping[str, Any]) -> bool:
        """Whether a JSON value lies under this key."""
        return self._path(kind, key, "json").is_file()

    def _path(self, kind: str, key: Mapping[str, Any], suffix: str) -> Path:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self.folder / f"{kind}-{digest[:32]}.{suffix}"

    def _read(self, path: Path) -> bytes | None:
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            self.misses += 1
            return None
        digest, body = content[:32], content[32:]
        if hashlib.sha256(body).digest() != digest:
            self.misses += 1
            return None
        self.hits += 1
        return body

    def _write(self, path: Path, body: bytes) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        try:
            with partial.open("wb") as stream:
                stream.write(hashlib.sha256(body).digest() + body)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def clean(folder: Path) -> None:
    """Remove what killed builds left half-written. Call it with the build lock held."""
    for partial in folder.glob("*.partial"):
        partial.unlink(missing_ok=True)


def code_sha256() -> str:
    """SHA-256 of everything that decides what a pass computes: kernels, encoder, quantization."""
    import samp_kernels

    import samp_core

    digest = hashlib.sha256()
    kernels = Path(str(samp_kernels.__file__)).parent
    core = Path(str(samp_core.__file__)).parent
    files = sorted(
        path for kind in ("*.py", "*.cc", "*.h", "*.cu", "*.cuh") for path in kernels.rglob(kind)
    )
    names = (
        "bio",
        "calibrate",
        "chain",
        "costs",
        "checkpoint",
        "encoder",
        "latency",
        "losses",
        "observed",
        "order",
        "pipeline",
        "plan",
        "pooled",
        "quantize",
        "reach",
        "recipes",
        "sensitivity",
        "site_errors",
        "text",
        "windows",
        "torch_encoder",
    )
    files += [core / f"{name}.py" for name in names]
    files += sorted((core / "heads").glob("*.py"))
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
