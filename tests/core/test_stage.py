"""A server's own repository folder: each write is newer than what Triton has loaded."""

from __future__ import annotations

import os
import time
from pathlib import Path

from tiny import write_tiny

from samp_core import activation
from samp_core.manifest import read_manifest
from samp_core.stage import CONFIG, Stage


def test_newer_also_after_the_clock_was_set_back(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_tiny(out)
    stage = Stage(tmp_path / "stage")
    future = time.time() + 365 * 86400
    for name, spec in activation.view(read_manifest(out)).items():
        stage.put(name, spec)
        model = stage.folder / name
        for path in (model, *model.rglob("*")):
            os.utime(path, (future, future))
        stage.put(name, spec)
        assert (model / CONFIG).stat().st_mtime > future
        assert (model / "1").stat().st_mtime > future
