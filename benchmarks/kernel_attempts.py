"""What was tried against the CPU kernels' times, beside the kernels as they are: in turns.

    python benchmarks/kernel_attempts.py [--attempts NAME ...] [--rows 1x128 8x128 gemm8 ...]

An attempt is the folder of kernels with some lines changed, compiled as one more dispatch level of
an extension of its own (build/bench/attempts). Every attempt's hidden states equal those of the
kernels as they are, bit for bit, or the run ends. AVX-512 VNNI only.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import machine
import numpy as np
import store
from interleave import Contender, Pace, measure

SOURCES = machine.ROOT / "kernels" / "cpu" / "src"
PATCHES = Path(__file__).parent / "attempts"
FOLDER = store.FOLDER / "attempts"
THREADS = len(os.sched_getaffinity(0))
AS_IS = "avx512_vnni"
# The GEMMs before each line of the next panel was fetched once, and the lines of a tile's end.
BEFORE = "7655f54"
FEW = 8

Change = tuple[str, str, str]  # file, old text, new text
ATTEMPTS: Mapping[str, str | Sequence[Change]] = {
    "before": f"git {BEFORE}",
    "end_not_fetched": [("gemm.h", "      fetch_end(g.ep, row, height, p * PANEL);\n", "")],
    "next_weight_not_fetched": [("gemm.h", ": (const char*)g.next;", ": nullptr;")],
    "into_l1": [("gemm.h", "__builtin_prefetch(at, 0, 2)", "__builtin_prefetch(at, 0, 3)")],
    "tiles_of_14_rows": [
        ("gemm.h", "constexpr int ROWS = 12;", "constexpr int ROWS = 14;"),
        ("gemm.h", "f<11>, f<12>}", "f<11>, f<12>, f<13>, f<14>}"),
        ("gemm.h", "#pragma GCC unroll 4\n    for (int g", "#pragma GCC unroll 5\n    for (int g"),
    ],
    "columns_by_thread": [("level.cc", "SAMP_LEVEL >= 4 ? 96 : 24", "96")],
    "blocks_of_144_rows": [("level.cc", "SAMP_LEVEL >= 4 ? 256 : 96", "144")],
    "pipelined_end": "patch pipelined_end.patch",
}


def source_of(attempt: str) -> Path:
    """The kernels with that attempt's lines changed."""
    folder = FOLDER / attempt
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(SOURCES, folder)
    how = ATTEMPTS[attempt]
    if isinstance(how, str):
        kind, _, what = how.partition(" ")
        if kind == "patch":
            command = ["patch", "--silent", "-p1", "-i", str(PATCHES / what)]
            subprocess.run(command, cwd=folder, check=True)
            return folder
        for name in ("gemm.h", "gemm_int8.h"):
            command = ["git", "show", f"{what}:kernels/cpu/src/{name}"]
            text = subprocess.run(command, cwd=machine.ROOT, check=True, capture_output=True)
            (folder / name).write_bytes(text.stdout)
        return folder
    for name, old, new in how:
        text = (folder / name).read_text()
        if old not in text:
            raise SystemExit(f"bench: {attempt}: {name} has no {old!r} any more")
        (folder / name).write_text(text.replace(old, new))
    return folder


def compiled(attempts: Sequence[str]) -> Path:
    """The extension with one more level for each attempt."""
    setup = loaded("samp_setup", machine.ROOT / "setup.py")
    native = setup.Native(FOLDER / "objects")
    native.folder.mkdir(parents=True, exist_ok=True)
    whole = FOLDER / "whole"
    shutil.rmtree(whole, ignore_errors=True)
    shutil.copytree(SOURCES, whole)
    dispatch = (whole / "dispatch.cc").read_text()
    names = "".join(f', "{name}"' for name in attempts)
    cases = "".join(f"case {5 + i}: return level_{name}();" for i, name in enumerate(attempts))
    declared = "".join(f"const Level* level_{name}();" for name in attempts)
    dispatch = dispatch.replace('"portable"};', f'"portable"{names}}};')
    runs = "if (index > 4) return cpu_runs(1); return index == 4;"
    dispatch = dispatch.replace("return index == kLevels - 1;", runs)
    dispatch = dispatch.replace("default: return nullptr;", f"{cases} default: return nullptr;")
    dispatch = dispatch.replace("namespace samp {", f"namespace samp {{ {declared}", 1)
    (whole / "dispatch.cc").write_text(dispatch)
    header = (whole / "dispatch.h").read_text()
    count = f"kLevels = {5 + len(attempts)};"
    (whole / "dispatch.h").write_text(re.sub(r"kLevels = \d+;", count, header))

    vnni = [*setup.QUIET.split(), *setup.LEVELS[3].split(), "-DSAMP_LEVEL=3"]
    jobs = [
        (setup_file, setup_file.stem, ["-DSAMP_HAVE_LEVEL_3"])
        for setup_file in sorted(whole.glob("*.cc"))
        if setup_file.name != "level.cc"
    ]
    jobs += [
        (whole / "level.cc", "level3", vnni),
        (whole / "level.cc", "level0", ["-DSAMP_LEVEL=0"]),
    ]
    jobs += [(native.nanobind / "nb_combined.cpp", "nanobind", ["-fno-strict-aliasing", "-w"])]
    for name in attempts:
        level = source_of(name) / "level.cc"
        level.write_text(level.read_text().replace(f"SAMP_NAME {AS_IS}", f"SAMP_NAME {name}"))
        jobs.append((level, f"level-{name}", vnni))
    with ThreadPoolExecutor(THREADS) as pool:
        objects = [str(path) for path, _ in pool.map(lambda job: native.compile(*job), jobs)]
    target = FOLDER / "_native.so"
    setup.run([*native.link, *objects, "-o", str(target)])
    return target


def loaded(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def passes(
    model: Any, row: str, precision: str, levels: Sequence[str]
) -> dict[str, Callable[[], Any]]:
    """level -> one pass over the row's texts."""
    import encoder_models
    from samp_kernels.cpu.backend import CpuBackend

    from samp_core.quantize import export_weights

    plan = encoder_models.plan(model, precision, "cpu", THREADS)
    tensors = export_weights(model.checkpoint.tensors, plan, model.quantized)
    batch = encoder_models.inputs(row).batch()
    made: dict[str, Callable[[], Any]] = {}
    for level in levels:
        backend = CpuBackend(THREADS, level)
        session = backend.prepare(model.checkpoint.config, tensors, plan, threads=THREADS)
        made[level] = lambda session=session: session.run(batch, output="tokens")
    return made


def few_tokens(model: Any, levels: Sequence[str]) -> tuple[dict[str, Callable[[], Any]], float]:
    """level -> the four products of a layer at FEW tokens on one thread, over weights that exceed
    the last cache; and the bytes that a call reads."""
    import gemm_alone
    import limits
    from samp_kernels.cpu.backend import CpuBackend
    from samp_kernels.interface import Out, Weight

    rng = np.random.default_rng(0)
    shapes = list(gemm_alone.shapes(model.checkpoint.config).values())
    one = sum(n * k for n, k in shapes)
    copies = 2 * limits.last_level_cache() // one + 1
    made: dict[str, Callable[[], Any]] = {}
    for level in levels:
        backend = CpuBackend(1, level)
        work = []
        for n, k in shapes:
            integers = rng.integers(-127, 128, (n, k)).astype(np.int8)
            weight = Weight(integers, np.full(n, 0.001, np.float32))
            x = backend.array(np.ones((FEW, k), np.float32))
            quantized = backend.quantize(x, Out("int8", 0.03))
            packed = [backend.pack(weight, "int8") for _ in range(copies)]
            work.append((quantized, packed, backend.array(np.zeros(n, np.float32))))

        def run(backend: Any = backend, work: Any = work) -> None:
            for copy in range(copies):
                for x, packed, bias in work:
                    backend.gemm(x, packed[copy], bias, out=Out())

        made[level] = run
    return made, float(one * copies)


def main() -> None:
    options = parse()
    machine.require_quiet(options.force)
    loaded("samp_kernels.cpu._native", compiled(options.attempts))
    import encoder_models
    import limits

    model = encoder_models.load("bert-base")
    levels = [AS_IS, *options.attempts]
    bystanders = machine.Bystanders(())
    rows = []
    for row in options.rows:
        read = 0.0
        if row == "gemm8":
            runs, read = few_tokens(model, levels)
        else:
            runs = passes(model, row, options.precision, levels)
            states = {level: run() for level, run in runs.items()}
            for level in levels:
                if not np.array_equal(states[level], states[AS_IS]):
                    raise SystemExit(f"bench: {level}: other hidden states than {AS_IS}")
        arms = [Contender(level, "", run, lambda: np.zeros((1, 1), np.float32))
                for level, run in runs.items()]  # fmt: skip
        measure(arms, Pace(rounds=options.rounds, turn_s=options.seconds, warm_s=0.03), 0)
        base = statistics.median(arms[0].times_ms)
        for arm in arms:
            found = machine.quantiles(arm.times_ms)
            ratio = base / found["median"]
            gbps = read / 1e6 / found["median"]
            rows.append({"row": row, "attempt": arm.column, "ours_ms": found,
                         "ratio_as_is": round(ratio, 4), "gbps": round(gbps, 1)})  # fmt: skip
            more = f", {gbps:.1f} GB/s" if read else ""
            print(f"{row:8} {arm.column:24} {found['median']:8.3f} ms (p10 {found['p10']:.3f}), "
                  f"{ratio:.3f}x{more}", flush=True)  # fmt: skip
    others = bystanders.share()
    path = machine.write_result(
        "kernel-attempts", threads=THREADS, rows=rows, not_run=[],
        found_limits=limits.limits(THREADS),
        found_versions=store.installed(("numpy",)), folder=options.results,
        limits_one_thread=limits.limits(1), precision=options.precision,
        others_share=round(others, 3),
    )  # fmt: skip
    machine.report(path, others)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--attempts", nargs="+", default=list(ATTEMPTS), choices=list(ATTEMPTS))
    parser.add_argument("--rows", nargs="+", default=["1x16", "1x128", "8x128", "gemm8"])
    parser.add_argument("--precision", choices=["int8", "int8+attention"], default="int8+attention")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.12, help="timed in a turn")
    parser.add_argument("--results", type=Path, default=store.FOLDER / "results")
    parser.add_argument("--force", action="store_true", help="measure on a busy machine too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
