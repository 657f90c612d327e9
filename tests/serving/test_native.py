"""Encoders on the native CPU kernels in real Triton processes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import psutil
import pytest
from calls import classify
from samp_kernels.cpu import missing
from tiny import write_tiny

from samp_core.pipeline import load
from samp_core.server import Server

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())


def test_an_encoder_on_native_kernels_holds_no_torch(tmp_path: Path) -> None:
    """By what is mapped into the stubs; the answers are those of the reference backend."""
    out, plain = tmp_path / "cpu", tmp_path / "plain"
    write_tiny(out, backend="cpu")
    write_tiny(plain)
    texts = ["abc", "z", "hello world", "the quick brown fox"]
    mapped = {}
    with Server.start(out) as server:
        answer = classify(server.grpc, "tiny_exact", texts)
        for process in psutil.process_iter():
            stub = "stub" in " ".join(process.cmdline()[:1])
            if stub and os.getpgid(process.pid) == server.pid:
                model = Path(process.cmdline()[1]).parents[1].name
                mapped[model] = Path(f"/proc/{process.pid}/maps").read_text()
    assert sorted(mapped) == ["encoder_tiny_exact", "head_tiny", "tokenizer_tiny"]
    assert not any("libtorch" in maps for maps in mapped.values())
    native = {model for model, maps in mapped.items() if "/cpu/_native." in maps}
    assert native == {"encoder_tiny_exact"}
    wanted = load(plain, "exact").predict(texts)
    np.testing.assert_allclose(answer["SCORES"], wanted["SCORES"], atol=1e-5)
