"""What is compiled: each unit is one source with its defines, for one architecture one cubin."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from samp_kernels.cuda.formats import KINDS, has
from samp_kernels.cuda.tiles import ALL_TILES, GROUP_TILES, TILES, stages
from samp_kernels.interface import UnsupportedPrecision

SOURCES = Path(__file__).parent / "src"
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90a")
HEAD_DIMS = (32, 64)
WGMMA = ("int8", "fp16", "bf16", "fp8")
"""Precisions that have tiles of wgmma, on sm_90a."""
ATTENTIONS = (
    ("int8", "int8"),
    *((f, c) for f in ("fp16", "bf16") for c in (f, "int8")),
    *(("int8", f) for f in ("fp16", "bf16")),
)
"""Scores and context that the tensor cores multiply."""


@dataclass(frozen=True)
class Unit:
    """One compilation. `kernels`: the entry points that it holds; `tile`: of a GEMM;
    `precisions`: what an architecture must multiply to have it; `only`: the one that has it."""

    name: str
    source: str
    kernels: tuple[str, ...]
    defines: tuple[tuple[str, int], ...] = ()
    tile: str = ""
    precisions: tuple[str, ...] = ()
    only: str = ""

    def runs_on(self, architecture: str) -> bool:
        if self.only not in ("", architecture):
            return False
        return all(has(precision, number(architecture)) for precision in self.precisions)


def all_units() -> tuple[Unit, ...]:
    units = [
        Unit("rows", "rows.cu", ("layernorm", "embed", "convert", "pool")),
        Unit("gemm_fp32", "gemm_f32.cu", ("gemm_f32",)),
    ]
    for precision in ("int8", "fp16", "bf16", "fp8"):
        for name, tile in TILES.items():
            defines = (
                ("ELEMENT", KINDS[precision]),
                ("TILE_M", tile.m),
                ("TILE_N", tile.n),
                ("WARPS_M", tile.warps_m),
                ("WARPS_N", tile.warps_n),
            )
            unit = gemm_unit(precision, name)
            units.append(Unit(unit, "gemm.cu", ("gemm",), defines, name, (precision,)))
    for precision in WGMMA:
        for name, group in GROUP_TILES.items():
            sizes = (("ELEMENT", KINDS[precision]), ("TILE_M", group.m), ("TILE_N", group.n))
            unit = gemm_unit(precision, name)
            kernels, fitting = ("gemm_wgmma",), (precision,)
            units.append(Unit(unit, "gemm_wgmma.cu", kernels, sizes, name, fitting, "sm_90a"))
    for dim in HEAD_DIMS:
        own: tuple[tuple[str, int], ...] = (("DIM", dim),)
        name = attention_unit(("fp32", "fp32"), dim)
        units.append(Unit(name, "attention_f32.cu", ("attention_f32",), own))
        for both in ATTENTIONS:
            halves = "bf16" if "bf16" in both else "fp16"
            forms = (
                *own,
                ("SCORES_INT8", int(both[0] == "int8")),
                ("CONTEXT_INT8", int(both[1] == "int8")),
                ("FLOATS", KINDS[halves]),
            )
            name = attention_unit(both, dim)
            units.append(Unit(name, "attention.cu", ("attention",), forms, "", both))
    return tuple(units)


def units_of(architecture: str) -> tuple[Unit, ...]:
    """Those that this architecture has."""
    return tuple(unit for unit in all_units() if unit.runs_on(architecture))


def check_unit(unit: Unit, architecture: str) -> None:
    if not unit.runs_on(architecture):
        raise UnsupportedPrecision("cuda", f"{unit.name} on {architecture}", "a newer GPU")


def gemm_unit(precision: str, tile: str) -> str:
    return f"gemm_{precision}_{tile}"


def attention_unit(precisions: tuple[str, str], dim: int) -> str:
    return f"attention_{precisions[0]}_{precisions[1]}_{dim}"


@cache
def units_by_name() -> dict[str, Unit]:
    return {unit.name: unit for unit in all_units()}


def number(architecture: str) -> int:
    """sm_90a -> 90."""
    return int(architecture.removeprefix("sm_").rstrip("a"))


def for_device(capability: int) -> str:
    """The architecture whose cubins a device of compute capability 10 x major + minor runs.

    A cubin runs within its major version, from its minor version on; `a` on its own chip only.
    """
    if capability == 90:
        return "sm_90a"
    fitting = [a for a in ARCHITECTURES if number(a) <= capability and not a.endswith("a")]
    same = [a for a in fitting if number(a) // 10 == capability // 10]
    return same[-1] if same else ""


def defines_of(unit: Unit, architecture: str) -> dict[str, int]:
    """The unit's defines with those that depend on the architecture."""
    found = dict(unit.defines)
    found["SAMP_SM"] = number(architecture)
    if unit.tile:
        found["STAGES"] = stages(ALL_TILES[unit.tile], number(architecture))
    return found


@cache
def source_text(name: str) -> str:
    return (SOURCES / name).read_text(encoding="utf-8")


def headers() -> list[str]:
    """The headers that a GPU's compiler may read; cuda_on_cpu.h is not one of them."""
    return sorted(path.name for path in SOURCES.glob("*.cuh"))


def content_key(unit: Unit, architecture: str) -> str:
    """Of everything that decides what is compiled, but for the compiler: build.py notes that one,
    since a machine that serves has none."""
    parts = [
        unit.source,
        source_text(unit.source),
        repr(sorted(defines_of(unit, architecture).items())),
    ]
    for name in headers():
        parts += [name, source_text(name)]
    return hashlib.sha256("\0".join([architecture, *parts]).encode()).hexdigest()[:16]


def cubin_name(unit: Unit, architecture: str) -> str:
    return f"{unit.name}-{architecture}-{content_key(unit, architecture)}.cubin"
