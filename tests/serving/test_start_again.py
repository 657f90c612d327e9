"""A Triton that ends on a lost lock while it loads is started again, and not for ever."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tiny import write_tiny

from samp_core.errors import SampError
from samp_core.server import Server

LOST = "terminate called after throwing an instance of 'boost::interprocess::lock_exception'"


@pytest.mark.parametrize(("lost", "starts"), [(1, 2), (99, 3)])
def test_a_lost_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: int, starts: int
) -> None:
    """A program in Triton's place says how often it was started; only the last words count."""
    write_tiny(tmp_path / "out")
    binary, count = tmp_path / "tritonserver", tmp_path / "count"
    binary.write_text(
        f'#!/bin/sh\necho one >> {count}\nif [ "$(wc -l < {count})" -le {lost} ]; then\n'
        f'    echo "{LOST}"; exit 134\nfi\n'
        "echo 'E1122 13:11:59.1 1 main.cc:9] \"no memory left for anything\"'; exit 1\n"
    )
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(SampError) as caught:
        Server.start(tmp_path / "out", log=tmp_path / "log")
    assert caught.value.code == "triton_died"
    assert ("no memory left" in str(caught.value)) == (lost < starts)
    assert len(count.read_text().splitlines()) == starts
