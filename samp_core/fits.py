"""Whether a build's plans fit the machine that is to serve them.

A plan of another CPU or GPU answers rightly, but which precision is fast where was measured there:
that is said, with the command that plans again. A plan for a backend or a precision that is not
here cannot run, and is refused before anything starts.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from samp_core.backends import BACKENDS
from samp_core.device import device, differences, words
from samp_core.errors import SampError
from samp_core.manifest import Manifest
from samp_core.plan import Plan

_INTEGERS = ("amx_int8", "avx512_vnni", "avx_vnni")
"""What onednn's int8 needs of a CPU: products of 8 bits that do not saturate."""


def check(
    out: Path, manifest: Manifest, tiers: Sequence[str] | None = None, threads: int | None = None
) -> list[str]:
    """What to tell whoever serves these tiers here. Raises SampError for one that cannot run.

    Imports no torch and makes no session: what only that can tell, the encoder says at its load.
    """
    cpu = device(threads or os.cpu_count() or 1)
    made: dict[tuple[str, str], list[str]] = {}
    for name in manifest.chosen(tiers):
        plan = _plan(manifest, name)
        why, mend = lacking(plan, cpu)
        if why:
            raise SampError(
                "unsupported_plan",
                f"tier {name} of {manifest.model}: {why}",
                "plans for what this machine has",
                f"plan again here: {again(out, manifest.folder)} --backend auto"
                + (f"; or: {mend}" if mend else ""),
            )
        here = {"isa": architecture()} if plan.backend == "cuda" else cpu
        if other := differences(plan.device, here):
            made.setdefault((", ".join(other), words(here)), []).append(name)
    return [
        f"{manifest.model}: the plans of {', '.join(names)} were made on {other}, and this is "
        f"{here}: they answer rightly, but what is fast here was not measured; plan again: "
        f"{again(out, manifest.folder)}"
        for (other, here), names in made.items()
    ]


def lacking(plan: Plan, here: Mapping[str, Any]) -> tuple[str, str]:
    """Why a plan cannot run on this machine, and what would mend that; "" where it can."""
    if plan.backend not in BACKENDS:
        return f"backend {plan.backend!r} is none of {', '.join(BACKENDS)}", ""
    if plan.backend == "onednn":
        if find_spec("torch") is None:
            return "backend onednn: torch is not installed", "pip install 'samp-triton[serve]'"
        quantized = bool(plan.quantized_sites())
        if quantized and here.get("isa") not in _INTEGERS:
            return f"backend onednn: int8 on {here.get('isa')}, without VNNI", ""
        return "", ""
    if plan.backend in ("cpu", "cuda"):
        found = missing(plan.backend)
        return (f"backend {plan.backend}: {found[0]}", found[1]) if found[0] else ("", "")
    return "", ""


def missing(backend: str) -> tuple[str, str]:
    """Why `cpu` or `cuda` cannot run here, and what mends it."""
    if backend == "cpu":
        from samp_kernels import cpu

        return cpu.missing(), cpu.MEND
    from samp_kernels import cuda

    return cuda.missing(), cuda.MEND


def architecture() -> str:
    """Of the GPU; only where backend cuda can run."""
    from samp_kernels import cuda

    return cuda.emulated() or cuda.architecture()


def again(out: Path, build: Path) -> str:
    """The command that makes this build's plans once more, on the machine where it runs."""
    folder, record = shlex.quote(str(out)), build / "build.json"
    if not _config(record):
        return f"samp build --model CHECKPOINT --data ROWS --out {folder}"
    here = shlex.quote(str(out / "current" / "build.json"))
    return f"samp build -c {here} --out {folder}"


def _config(record: Path) -> object:
    try:
        return json.loads(record.read_text(encoding="utf-8")).get("config")
    except (OSError, ValueError, AttributeError):
        return None


def _plan(manifest: Manifest, tier: str) -> Plan:
    file = manifest.folder / "models" / manifest.tiers[tier].encoder / "1" / "plan.json"
    return Plan.from_json(file.read_text(encoding="utf-8"), str(file))
