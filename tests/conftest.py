"""Helpers of several test folders lie beside this file: pytest puts its folder on the path."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

# A shell starts what it runs in the background with SIGINT ignored, and processes inherit that:
# tests that interrupt one would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# `auto` is the CPU's backend in tests, also where a GPU is; but for test_cuda_auto.py and
# test_cuda_proof.py.
os.environ["SAMP_PROVEN"] = os.devnull


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Several workers: a file's tests stay together, and all of serving, which load the machine and
    wait for it, come one after the other."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            return "serving" if path.startswith("tests/serving/") else path

    return ByFile(config, log)
