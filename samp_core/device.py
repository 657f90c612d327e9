"""The device that plans are made, timed and run on, as their `device` says it."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NAMED = ("cpu", "isa", "gpu")
"""What tells two devices apart; threads are a setting."""


def device(threads: int) -> dict[str, Any]:
    """What latencies were measured on: the CPU's name, its best integer ISA, the threads."""
    name, isa = platform.machine(), "portable"
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        info = ""
    for line in info.splitlines():
        if line.startswith("model name"):
            name = line.split(":", 1)[1].strip()
            break
    for flag in ("amx_int8", "avx512_vnni", "avx_vnni", "avx2"):
        if flag in info:
            isa = flag
            break
    return {"cpu": name, "isa": isa, "threads": threads}


def differences(planned: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What a plan's device is other than this one, `cpu NAME` and so on; empty where it says
    nothing, and beside a GPU that is emulated, which is no device of either.
    """
    if "emulated" in (planned.get("gpu"), here.get("gpu")):
        return []
    known = [key for key in NAMED if key in planned and key in here]
    return [f"{key} {planned[key]}" for key in known if planned[key] != here[key]]


def words(device: Mapping[str, Any]) -> str:
    """A device in a line."""
    return ", ".join(f"{key} {device[key]}" for key in NAMED if key in device)
