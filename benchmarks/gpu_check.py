"""Check and time the CUDA kernels on a machine with an NVIDIA GPU: `make gpu-check`.

It needs CuPy, NumPy and the repository's files; cubins (`make kernels`) are carried along, or made
where NVRTC or nvcc is found; torch for the peers, compute-sanitizer and a Triton where they are
found (`make gpu-bundle` carries one). Weights are random. Every step is a process of its own, so
that a fault of the device ends that step alone; the result, JSON in benchmarks/results/, is
written after each of them. At most 8 minutes.

    --emulate     no GPU: the checks on small shapes through the emulator, no times (a rehearsal)
    --only STEP   this step alone; repeatable

It has never run on hardware.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gpu_import
from gpu_report import Report, failed, run, unproven, write_json

ROOT = gpu_import.ROOT
BUDGET_S = 465.0
# In this order: seconds that no earlier step may take from one, and the most that one may take.
STEPS = {
    "ops": (45.0, 80.0),
    "encoder": (50.0, 80.0),
    "sanitizer": (45.0, 100.0),
    "serving": (80.0, 120.0),
    "table": (35.0, 60.0),
    "encoder times": (80.0, 170.0),
    "large times": (40.0, 90.0),
    "product times": (30.0, 60.0),
    "search": (35.0, 90.0),
}
EMULATED = ("ops", "encoder", "serving", "table", "search")


def run_step(name: str, report: Report, emulate: bool) -> None:
    """One step, in its own process."""
    if name == "serving":
        import gpu_serving

        report.attempt(name, gpu_serving.serve, emulate)
        return
    if name == "table":
        import gpu_table

        report.attempt(name, gpu_table.table, emulate)
        return
    if name == "search":
        import gpu_serving

        report.attempt(name, gpu_serving.search, emulate)
        return
    if name == "sanitizer":
        report.attempt(name, sanitize)
        return
    import gpu_peers
    import gpu_serving
    import gpu_shapes
    from samp_kernels.cuda import checks

    from samp_core import gpu_checks

    backend = checks.poisoned(gpu_serving.EMULATED if emulate else "")
    if name == "ops":
        checks.check_ops(report, backend, emulate or "SAMP_SMALL" in os.environ)
    elif name == "encoder":
        shape = (gpu_checks.SMALL, 64) if emulate else (gpu_shapes.BASE, 1024)
        report.attempt("near the reference", gpu_checks.check_near, backend, emulate)
        report.attempt("sessions", gpu_checks.check_session, backend, *shape)
    elif name == "encoder times":
        plans, cases = gpu_shapes.base_plans(backend), gpu_shapes.base_cases()
        report.attempt(name, gpu_peers.time_encoders, backend, gpu_shapes.BASE, plans, cases)
    elif name == "large times":
        shape = (gpu_shapes.LARGE, gpu_shapes.large_plan, gpu_shapes.large_cases())
        report.attempt(name, gpu_peers.time_large, backend, *shape)
    else:
        report.attempt(name, gpu_peers.time_gemms, backend)


def sanitize(report: Report) -> None:
    """The ops of small shapes under compute-sanitizer, where it is found."""
    usual = "/usr/local/cuda/bin/compute-sanitizer"
    tool = shutil.which("compute-sanitizer") or shutil.which(usual)
    if not tool:
        report.skip("compute-sanitizer", "not found")
        return
    for kind in ("memcheck", "racecheck"):
        if report.left() < 20:
            report.skip(f"compute-sanitizer {kind}", "out of time")
            continue
        with tempfile.TemporaryDirectory() as folder:
            command = [tool, "--tool", kind, "--error-exitcode", "9", sys.executable, __file__]
            command += ["--step", "ops", "--part", str(Path(folder, "part.json"))]
            command += ["--seconds", "3600"]
            code, said = run(command, report.left() - 5, {"SAMP_SMALL": "1"})
        if code is None:
            report.skip(f"compute-sanitizer {kind}", "it did not end in time")
        else:
            last = " ".join(line for line in said.splitlines() if "=====" in line)[-300:]
            report.check(f"compute-sanitizer {kind}", code == 0, last or f"exit status {code}")


def prepare(facts: dict[str, Any], emulate: bool) -> str:
    """Unpack a bundle, and compile what no cubin was carried for; "" or what is in the way."""
    if gpu_import.BUNDLE.is_dir():
        import gpu_bundle

        os.environ["SAMP_PYTHON"] = str(gpu_bundle.unpack())
        os.environ["SAMP_CUBINS"] = str(gpu_import.BUNDLE / "unpacked" / "cubins")
    if emulate:
        facts["device"] = "none: emulated, which proves results and times nothing"
        return ""
    import gpu_peers
    from samp_kernels.cuda import build, missing

    if missing() and "no cubin" not in missing():
        return missing()
    facts |= gpu_peers.device_facts()
    if missing():
        from samp_kernels.cuda.launcher import CupyLauncher

        try:
            build.build([CupyLauncher().architecture])
        except build.KernelError as error:
            return str(error)
    missing.cache_clear()
    return missing()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--emulate", action="store_true")
    parser.add_argument("--only", action="append", choices=STEPS)
    parser.add_argument("--out", type=Path, help="the JSON; default: in benchmarks/results")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--part", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    begun = time.monotonic()
    if options.step:
        report = Report(options.part, begun + options.seconds)
        run_step(options.step, report, options.emulate)
        report.note("ended", True)
        return 1 if report.failed else 0

    facts: dict[str, Any] = {
        "schema": 1,
        "suite": "gpu-check",
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(sys.argv),
        "python": platform.python_version(),
    }
    trouble = prepare(facts, options.emulate)
    import gpu_peers

    device = "emulated" if options.emulate else gpu_peers.short_name(facts)
    path = options.out or ROOT / "benchmarks" / "results" / f"{facts['date']}-gpu-{device}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    if trouble:
        print(f"gpu-check: {trouble}", file=sys.stderr)
        return 1
    facts["steps"] = {}
    wanted = options.only or (EMULATED if options.emulate else STEPS)
    for name in wanted:
        left = BUDGET_S - (time.monotonic() - begun)
        facts["steps"][name] = one_step(name, left, options.emulate)
        facts["seconds"] = round(time.monotonic() - begun, 1)
        write_json(path, facts)
    checks = [c for step in facts["steps"].values() for c in step.get("checks", [])]
    good = sum(check["ok"] for check in checks)
    ended = all(step["ended"] for step in facts["steps"].values())
    print(f"     {path}\n{good} of {len(checks)} checks passed, {facts['seconds']} s")
    if not options.emulate:
        print(f"     {note(facts, path, good)}")
    return 0 if checks and ended and good == len(checks) else 1


def note(facts: dict[str, Any], path: Path, checks: int) -> str:
    """Record that the kernels are proven on this GPU's kind, or that they failed; in words."""
    from samp_kernels.cuda import device_key, proven

    here, why = device_key(), unproven(facts["steps"])
    kept = {key: facts.get(key) for key in ("device", "driver", "date", "commit")}
    found = {"by": proven.COMMAND, "passed": not why, "why": why, "checks": checks, **kept}
    try:
        if why and not failed(facts["steps"]):
            return f"nothing is noted of {here}: {why}"
        where = proven.record(here, {**found, "result": path.name})
    except OSError as error:
        return f"the result could not be noted in {proven.files()[-1]}: {error.strerror}"
    if why:
        return f"not proven on {here}, backend auto leaves this GPU alone: {why} ({where})"
    return f"proven on {here}: backend auto takes it from now on ({where})"


def limit_of(name: str, left: float) -> float:
    """Seconds that a step may take of what is left: what later ones need is kept for them."""
    names = list(STEPS)
    kept = sum(STEPS[later][0] for later in names[names.index(name) + 1 :])
    least, most = STEPS[name]
    return min(most, left, max(least, left - kept))


def one_step(name: str, left: float, emulate: bool) -> dict[str, Any]:
    """Run it; what it found, also when it died: `ended` says whether it came to its end."""
    begun = time.monotonic()
    seconds = STEPS[name][1] * 4 if emulate else limit_of(name, left)
    if seconds < 15:
        print(f"     {name}: left out, out of time", flush=True)
        return {"ended": True, "left_out": {name: "out of time"}}
    print(f"     {name}:", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder, "part.json")
        python = os.environ.get("SAMP_PYTHON", sys.executable)
        command = [python, __file__, "--step", name, "--part", str(part)]
        command += ["--seconds", str(seconds - 5), *(["--emulate"] if emulate else [])]
        # Builds make no check of their own here: this one is to find out.
        code, _ = run(command, seconds, {"SAMP_PROVEN": os.devnull}, show=True)
        found = json.loads(part.read_text(encoding="utf-8")) if part.is_file() else {}
    ended = found.pop("ended", False)
    if not ended:
        print(f"FAIL {name}: ended with {code if code is not None else 'the time'}", flush=True)
    spent = round(time.monotonic() - begun, 1)
    return {"ended": ended, "exit_status": code, "seconds": spent, **found}


if __name__ == "__main__":
    sys.exit(main())
