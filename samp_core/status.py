"""What a server does now: its tiers, their plans, and where requests spend their time.

Triton itself goes on calling a model ready whose process has died. So each tier is asked one short
text, and where the server runs on this machine its model processes are counted.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from samp_core import live
from samp_core.control import Control, ControlError, stubs
from samp_core.errors import SampError
from samp_core.plan import Plan
from samp_core.repository import builds_by_age

DEFAULT = "127.0.0.1:8000"
PROBE_S = 5.0
_SITES = re.compile(r"samp_sites\{(.*)\} (\S+)$")
_LABEL = re.compile(r'(\w+)="([^"]*)"')
_COMPUTE = ("compute_input", "compute_infer", "compute_output")


def status(
    target: str | None = None, *, probe: bool = True, headers: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """One object for each server: those of a folder, the one at an address (HTTP or gRPC), or all
    of this user; where none is known, Triton's usual port is asked.

    headers: sent with every call, beside those that a server of this user is known to want. Raises
    SampError: nothing serves the folder, nothing answers at the address.
    """
    known = live.servers(Path(target)) if target and Path(target).is_dir() else live.servers()
    if target and Path(target).is_dir() and not known:
        raise SampError(
            "not_served",
            f"no server of this user serves {target}",
            "a folder that is served, or an address",
            f"samp serve {target}",
        )
    if target and not Path(target).is_dir():
        known = [s for s in known if target in (s["http"], s["grpc"])] or [{"http": target}]
    found = []
    for server in known or [{"http": DEFAULT}]:
        both = {**(headers or {}), **server.get("headers", {})}
        found.append(server_status({**server, "headers": both}, probe))
    return found


def server_status(facts: Mapping[str, Any], probe: bool) -> dict[str, Any]:
    """`facts` as Server.describe wrote them, or the address of HTTP alone."""
    control = Control(facts["http"], timeout_s=10.0, headers=facts.get("headers", {}))
    try:
        index = control.index()
        version = control.get("/v2")["version"]
        counted = {one["name"]: one for one in control.get("/v2/models/stats")["model_stats"]}
    except (OSError, http.client.HTTPException, ValueError, ControlError) as error:
        if wanted := re.search(r"restricted, expecting header '([^']+)'", str(error)):
            raise SampError(
                "restricted",
                f"{facts['http']} wants a header ({error})",
                "the key of its `samp serve --key-file`",
                f"--header {wanted[1]}=...",
            ) from None
        raise SampError(
            "unreachable",
            f"no Triton answers at {facts['http']} ({error})",
            "the address of a server's HTTP, or a folder that is served here",
            "samp serve prints it",
        ) from None
    triton = facts.get("triton")
    alive = None if triton is None else stubs(triton)
    configs: dict[str, dict[str, Any]] = {}
    for name, entry in index.items():
        if entry.get("state") == "READY":
            with contextlib.suppress(ControlError, OSError):
                configs[name] = control.get(f"/v2/models/{name}/config")
    models = [
        _model(name, entry, configs.get(name, {}), counted.get(name, {}), alive)
        for name, entry in index.items()
        if "state" in entry
    ]
    plans = _plans(facts.get("builds", {}))
    for name, config in configs.items():
        if name in plans and "plan" not in _parameters(config):
            config["parameters"]["plan"] = {"string_value": plans[name]}
    ran = _executed(facts.get("metrics"))
    tiers = [
        _tier(control, config, configs, ran, probe, {one["name"]: one for one in models})
        for config in configs.values()
        if "ensemble_scheduling" in config and "tier" in _parameters(config)
    ]
    started = facts.get("started")
    return {
        "http": facts["http"],
        "grpc": facts.get("grpc"),
        "metrics": facts.get("metrics"),
        "pid": facts.get("pid"),
        "triton": version,
        "age_s": None if started is None else round(time.time() - started, 1),
        "ok": all(m["ok"] for m in models) and all(t["answers"] is not False for t in tiers),
        "builds": [_builds(Path(out), served) for out, served in facts.get("builds", {}).items()],
        "tiers": tiers,
        "models": sorted(models, key=lambda m: _place(m["name"])),
    }


def _model(
    name: str,
    entry: Mapping[str, Any],
    config: Mapping[str, Any],
    counted: Mapping[str, Any],
    alive: Mapping[str, Sequence[int]] | None,
) -> dict[str, Any]:
    """One loaded model. queue_ms, compute_ms: means of a request since it was loaded."""
    python = config.get("backend") == "python"
    instances = sum(group.get("count", 1) for group in config.get("instance_group", ()))
    processes = None if alive is None or not python else list(alive.get(name, ()))
    state = entry["state"]
    if processes is not None and state == "READY" and len(processes) < instances:
        state = "DEAD" if not processes else "PART DEAD"
    stats = counted.get("inference_stats", {})
    answered = _count(stats, "success")
    executions = counted.get("execution_count", 0)
    last = counted.get("last_inference", 0)
    return {
        "name": name,
        "state": state,
        "ok": state == "READY",
        "reason": entry.get("reason", ""),
        "build": _parameters(config).get("build"),
        "instances": instances if python else None,
        "processes": processes,
        "requests": answered,
        "failures": _count(stats, "fail"),
        "texts": counted.get("inference_count", 0),
        "texts_a_batch": round(counted["inference_count"] / executions, 2) if executions else None,
        "queue_ms": _mean(stats, ("queue",), answered),
        "compute_ms": _mean(stats, _COMPUTE, answered),
        "age_s": _age(processes[0]) if processes else None,
        "last_request_s": round(time.time() - last / 1000, 1) if last else None,
    }


def _tier(
    control: Control,
    config: Mapping[str, Any],
    configs: Mapping[str, Mapping[str, Any]],
    ran: Mapping[tuple[str, str], Mapping[str, int]],
    probe: bool,
    models: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """One ensemble. executed: sites by the precision of the kernel that ran; None if unknown.

    tokenizer_share: of the compute time of its steps; None until all of them have answered.
    """
    tier = _parameters(config)["tier"]
    steps = [step["model_name"] for step in config["ensemble_scheduling"]["step"]]
    encoder = _parameters(configs.get(steps[1], {})) if len(steps) > 1 else {}
    times = [models[step]["compute_ms"] for step in steps if step in models]
    error = _probe(control, config) if probe else None
    model = config["name"].removesuffix(f"_{tier}")
    return {
        "tier": tier,
        "model": model,
        "ensemble": config["name"],
        "build": _parameters(config).get("build"),
        "steps": steps,
        "plan": encoder.get("plan"),
        "threads": int(encoder["threads"]) if "threads" in encoder else None,
        "executed": ran.get((config["name"], encoder.get("build", ""))),
        "tokenizer_share": round(times[0] / sum(times), 3) if times and all(times) else None,
        "answers": error is None if probe else None,
        "error": error,
    }


def _probe(control: Control, config: Mapping[str, Any]) -> str | None:
    """Ask one short text; what went wrong, None if nothing did."""
    tensors = [
        {"name": one["name"], "shape": [1, 1], "datatype": "BYTES", "data": ["samp status"]}
        for one in config["input"]
    ]
    asked = replace(control, timeout_s=PROBE_S)
    try:
        asked.post(f"/v2/models/{config['name']}/infer", {"inputs": tensors})
    except (ControlError, OSError, http.client.HTTPException, ValueError) as error:
        return " ".join(str(error).split()) or type(error).__name__
    return None


def _executed(metrics: str | None) -> dict[tuple[str, str], dict[str, int]]:
    """(ensemble, build) -> sites by precision, as the encoders say in /metrics."""
    found: dict[tuple[str, str], dict[str, int]] = {}
    if metrics is None:
        return found
    with contextlib.suppress(OSError, http.client.HTTPException, ControlError):
        for line in Control(metrics, timeout_s=5.0).text("/metrics").splitlines():
            if match := _SITES.match(line):
                labels = dict(_LABEL.findall(match[1]))
                key = (f"{labels['model']}_{labels['tier']}", labels["build"])
                found.setdefault(key, {})[labels["precision"]] = int(float(match[2]))
    return found


def _plans(builds: Mapping[str, str]) -> dict[str, str]:
    """Encoder -> its plan in a line, from its file: builds of before wrote none to the config."""
    found = {}
    for out, build in builds.items():
        for path in Path(out, "builds", build, "models").glob("encoder_*/1/plan.json"):
            with contextlib.suppress(OSError, SampError):
                plan = Plan.from_json(path.read_text(encoding="utf-8"), str(path))
                found[path.parents[1].name] = plan.summary()
    return found


def _builds(out: Path, served: str) -> dict[str, Any]:
    """The builds of a folder, the current one first."""
    there = [path.name for path in builds_by_age(out)] if out.is_dir() else []
    return {"repository": str(out), "served": served, "current": there[:1], "older": there[1:]}


def _parameters(config: Mapping[str, Any]) -> dict[str, str]:
    found = config.get("parameters", {})
    return {key: entry["string_value"] for key, entry in found.items()}


def _count(stats: Mapping[str, Any], part: str) -> int:
    return int(stats.get(part, {}).get("count", 0))


def _mean(stats: Mapping[str, Any], parts: Sequence[str], count: int) -> float | None:
    total = sum(int(stats.get(part, {}).get("ns", 0)) for part in parts)
    return round(total / count / 1e6, 3) if count else None


def _age(pid: int) -> float | None:
    """Seconds since a process began."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        begun = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return round(uptime - begun / os.sysconf("SC_CLK_TCK"), 1)
    return None


def _place(name: str) -> tuple[int, str]:
    """Load order: tokenizer, encoders, head, ensembles."""
    parts = ("tokenizer_", "encoder_", "head_")
    return next((i for i, part in enumerate(parts) if name.startswith(part)), len(parts)), name
