"""`make chaos`: every part of the campaign in turn; exit 1 if something does not hold.

make chaos                              # about 15 minutes
make chaos CHAOS=--short                # about 3, as in CI
make chaos CHAOS="--only fuzz --seed 7 --case 123"
make chaos CHAOS=--publish              # and write docs/reliability.md and benchmarks/results
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import disk
import fuzz
import kills
import known
import load
import machine
import overload
import place
from place import ROOT, WORK, Check, Serving, demo_build, serve

PARTS = ("fuzz", "limits", "kills", "disk", "overload", "soak")
ALONE = ("overload", "soak")
"""Parts that measure rates and memory: nothing else of the campaign runs beside them."""
DOC = ROOT / "docs" / "reliability.md"
BESIDE = WORK / "beside.json"
BEGIN, END = "<!-- campaign -->", "<!-- /campaign -->"


def parts(options: argparse.Namespace) -> dict[str, Callable[[Serving], list[Check]]]:
    return {
        "fuzz": lambda s: fuzz.campaign(s, options.requests, options.seed, options.case),
        "limits": known.campaign,
        "kills": kills.campaign,
        "overload": lambda s: overload.campaign(s, 8 if options.short else 16, not options.short),
        "soak": lambda s: [load.soak(s, options.soak)],
        "disk": lambda s: disk.campaign(s, options.short),
    }


def main() -> int:
    options = read()
    begun = time.monotonic()
    out = copied() if place.BESIDE in os.environ else demo_build()
    chosen = [name for name in PARTS if not options.only or name in options.only]
    checks: dict[str, list[Check]] = {}
    record: dict[str, Any] = {"seconds": 0}
    seconds: dict[str, int] = {}
    apart = "disk" in chosen and chosen[0] not in (*ALONE, "disk")
    beside = start_beside("disk") if apart else None
    # Each part has a server of its own, so that none sees what another one left.
    for name in chosen:
        print(f"---- {name}", flush=True)
        if name == "disk" and beside is not None:
            made, seconds[name] = finish_beside(beside)
        else:
            started = time.monotonic()
            with serve(out, log=f"triton-{name}.log") as serving:
                made = parts(options)[name](serving)
            seconds[name] = round(time.monotonic() - started)
        checks[name] = made
        for check in made:
            word = {True: "ok", False: "FAILED", None: "stated"}[check.ok]
            print(f"{word:7} {check.part}: {check.what}: {check.result}", flush=True)
            if check.ok is False:
                print(f"        {json.dumps(check.figures)[:3000]}", flush=True)
        record = result(checks, options, time.monotonic() - begun) | {"part_seconds": seconds}
        WORK.mkdir(parents=True, exist_ok=True)
        options.record.write_text(json.dumps(record, indent=1) + "\n")
        if options.publish:
            publish(record)
    count = sum(len(made) for made in checks.values())
    failed = [check for made in checks.values() for check in made if check.ok is False]
    each = ", ".join(f"{name} {took}" for name, took in seconds.items())
    print(f"chaos: {count} checks, {len(failed)} failed, {record['seconds']} s ({each})")
    return 1 if failed else 0


def start_beside(part: str) -> subprocess.Popen[str]:
    """One part in a process of its own, which leaves its record in BESIDE."""
    BESIDE.unlink(missing_ok=True)
    words = [word for word in sys.argv[1:] if word == "--short"]
    command = [sys.executable, __file__, "--only", part, "--record", str(BESIDE), *words]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, place.BESIDE: "1"},
    )  # fmt: skip


def copied() -> Path:
    """The build of the run that this part is beside, as a folder of its own."""
    out = WORK / "demo-beside"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(WORK / "demo", out, symlinks=True)
    return out


def finish_beside(process: subprocess.Popen[str]) -> tuple[list[Check], int]:
    """Its checks, and the seconds that it took."""
    said, _ = process.communicate()
    if not BESIDE.is_file():
        raise SystemExit(f"chaos: the part beside ended with {process.returncode}: {said[-3000:]}")
    record = json.loads(BESIDE.read_text())
    fields = [field.name for field in dataclasses.fields(Check)]
    checks = [Check(**{name: check[name] for name in fields}) for check in record["checks"]]
    (took,) = record["part_seconds"].values()
    return checks, took


def read() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make chaos")
    parser.add_argument("--short", action="store_true", help="about 3 minutes")
    parser.add_argument("--only", choices=PARTS, action="append", help="only this part; repeatable")
    parser.add_argument("--seed", type=int, default=0, help="of the fuzzed requests")
    parser.add_argument("--case", type=int, help="one fuzzed request alone, and what came of it")
    parser.add_argument("--requests", type=int, help="fuzzed requests; 10,000, short 2,000")
    parser.add_argument("--soak", type=float, help="seconds; 600, short 30")
    parser.add_argument("--record", type=Path, default=WORK / "result.json")
    parser.add_argument("--publish", action="store_true", help="write the table and the result")
    options = parser.parse_args()
    options.requests = options.requests or (2_000 if options.short else 10_000)
    options.soak = options.soak or (30.0 if options.short else 600.0)
    return options


def result(
    checks: dict[str, list[Check]], options: argparse.Namespace, seconds: float
) -> dict[str, Any]:
    words = " ".join(word for word in sys.argv[1:] if word != "--publish")
    return {
        "schema": 1,
        "suite": "chaos",
        "commit": machine.commit(),
        "command": f"make chaos CHAOS='{words}'" if words else "make chaos",
        "date": datetime.date.today().isoformat(),
        "device": machine.cpu_name(),
        "cores": os.cpu_count(),
        "seconds": round(seconds),
        "versions": machine.versions(),
        "checks": [
            {"group": group, **asdict(check)} for group, made in checks.items() for check in made
        ],
    }


def publish(record: dict[str, Any]) -> None:
    """The result file, and the table of docs/reliability.md out of it.

    Parts that were not run now are kept as the last run of that day left them.
    """
    device = str(record["device"]).lower().replace("(r)", "").split()[:2]
    path = machine.RESULTS / f"{record['date']}-chaos-{'-'.join(device)}.json"
    run = {check["group"] for check in record["checks"]}
    for check in record["checks"]:
        check |= {"commit": record["commit"], "run": record["command"]}
    if path.is_file():
        kept = [c for c in json.loads(path.read_text())["checks"] if c["group"] not in run]
        record["checks"] = sorted(
            [*kept, *record["checks"]], key=lambda check: PARTS.index(check["group"])
        )
    path.write_text(json.dumps(record, indent=1).replace(str(ROOT), ".") + "\n")
    text = DOC.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    made = table(record, f"../benchmarks/results/{path.name}")
    DOC.write_text(f"{before}{BEGIN}\n{made}\n{END}{after}")


def table(record: dict[str, Any], link: str) -> str:
    """Of docs/reliability.md. The command is what runs a check's part alone."""
    runs = dict.fromkeys(check["run"] for check in record["checks"])
    lines = [
        f"{record['date']}, {record['device']}, {record['cores']} cores, by "
        + ", ".join(f"`{one}`" for one in runs)
        + f" ([result]({link})).",
        "",
        "| part | what must hold | what happened | holds | command |",
        "|---|---|---|---|---|",
    ]
    for check in record["checks"]:
        word = {True: "yes", False: "**no**", None: "stated"}[check["ok"]]
        cells = (check["part"], check["what"], check["result"], word, f"`{check['command']}`")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
