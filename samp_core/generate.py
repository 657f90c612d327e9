"""`samp generate`: a repository from plans that exist, without a search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from samp_kernels.interface import KernelError

from samp_core import cache, calibrate
from samp_core.build import open_workbench, read_splits, unproven_note, write
from samp_core.config import BuildConfig
from samp_core.device import differences, words
from samp_core.encoder import check_plan
from samp_core.errors import SampError, UsageError
from samp_core.plan import UNMEASURED, Plan, Recipe, unmeasured
from samp_core.quantize import export_weights, needed_scales
from samp_core.repository import TierFiles, build_lock, check_names
from samp_core.workbench import Progress, Workbench, silent


@dataclass(frozen=True)
class GenerateConfig:
    """What `samp generate` needs: plans by tier, and the checkpoint that they were made for."""

    plans: Mapping[str, Path]
    build: BuildConfig
    has_data: bool


def read_plans(values: list[str]) -> dict[str, Path]:
    """`TIER=FILE`, or FILE: its tier is then the encoder folder's, else the file's own name."""
    plans: dict[str, Path] = {}
    for value in values:
        name, equals, path = value.partition("=")
        file = Path(path) if equals else Path(value)
        if not equals:
            folder = file.resolve().parent.parent.name
            in_build = folder.startswith("encoder_") and file.name == "plan.json"
            name = folder.rsplit("_", 1)[1] if in_build else file.stem
        if name in plans:
            raise UsageError(
                "bad_plan", f"two plans for tier {name}", "one plan a tier", "write TIER=FILE"
            )
        plans[name] = file
    return plans


def generate(config: GenerateConfig, progress: Progress = silent) -> dict[str, Any]:
    """Write the repository of these plans; `exact` is added if no plan has that name.

    Each is tried on the backend that it names: tiers of a CPU and of a GPU stand side by side.
    """
    plans = {name: _read(path) for name, path in config.plans.items()}
    _check_exact(config, plans)
    named = [str(plan.backend) for plan in plans.values()]
    build = config.build.model_copy(update={"backend": named[0] if named else config.build.backend})
    check_names(build.name, [*plans, *({"exact"} - set(plans))], build.default_tier or "exact")
    with build_lock(build.folder):
        cache.clean(build.folder / "cache")
        bench = open_workbench(build, progress)
        benches = {bench.backend_name: bench}
        tiers: dict[str, TierFiles] = {}
        warnings = unproven_note("cuda" if "cuda" in named else "", progress)
        for name, plan in {"exact": bench.base_plan(), **plans}.items():
            if plan.model_sha256 != bench.checkpoint.sha256:
                raise SampError(
                    "plan_mismatch",
                    f"{config.plans[name]} was made for checkpoint {str(plan.model_sha256)[:12]}",
                    f"plans for {build.model}, {bench.checkpoint.sha256[:12]}",
                    f"give that checkpoint as --model, or plan again: {_again(config)}",
                )
            own = benches.setdefault(plan.backend, on_backend(bench, plan.backend))
            if name in plans:
                _check_device(config, own, name, plan)
            lacks = any(scale not in plan.scales for scale in needed_scales(plan))
            if lacks and (config.has_data or not plan.scales):
                plan = _with_scales(config, own, name, plan)
            try:
                check_plan(own.backend, own.checkpoint.config, plan)
                own.session(plan)  # refuses now what a server would refuse at load
            except KernelError as error:
                raise SampError(
                    "unsupported_plan",
                    f"{config.plans[name]}: {error.op}: {error.got}",
                    error.allowed,
                    "edit the plan, or plan again for this backend: "
                    f"{_again(config, plan.backend)}",
                ) from None
            weights = export_weights(bench.checkpoint.tensors, plan, bench.quantized)
            tiers[name] = TierFiles(plan, weights, _promise(plan))
        record = {"generated_from": {name: str(path) for name, path in config.plans.items()}}
        step = progress("write the model repository", 1)
        default = build.default_tier or ("balanced" if "balanced" in tiers else "exact")
        write(build.model_copy(update={"default_tier": default}), bench, tiers, record)
        step()
    return {
        "repository": str(build.folder),
        "tiers": [{"name": name, "plan": files.plan.summary()} for name, files in tiers.items()],
        "warnings": warnings
        + [
            f"the plan of tier {name} {UNMEASURED}"
            for name, files in tiers.items()
            if unmeasured(files.plan)
        ],
    }


def _check_device(config: GenerateConfig, bench: Workbench, name: str, plan: Plan) -> None:
    """Raises SampError for a plan that was made, and timed, on another device.

    A plan without a device was timed on none, and neither it nor this machine is one where the GPU
    is emulated: the repository may be meant for a machine that has it.
    """
    here = bench.device()
    other = differences(plan.device, here)
    if other:
        raise SampError(
            "plan_mismatch",
            f"{config.plans[name]} was made on another device: {', '.join(other)}",
            words(here),
            f"plan again: {_again(config, plan.backend)}; or, if its latencies do not "
            "matter, take `device` out of the plan",
        )


def _again(config: GenerateConfig, backend: str | None = None) -> str:
    """The command that makes a plan for this model, backend and device."""
    data = config.build.data.data if config.has_data else None
    named = f" --backend {backend}" if backend else ""
    return f"samp build --model {config.build.model} --data {data or 'ROWS'}{named}"


def on_backend(bench: Workbench, backend: str) -> Workbench:
    """The same checkpoint on another backend."""
    return replace(bench, backend_name=backend, _backend=None, _sessions={}, _packs={})


def _check_exact(config: GenerateConfig, plans: Mapping[str, Plan]) -> None:
    """Raises UsageError for a plan named exact that is not fp32."""
    exact = plans.get("exact")
    if exact is not None and any(entry.precision != "fp32" for entry in exact.sites.values()):
        raise UsageError(
            "bad_plan",
            f"{config.plans['exact']}: {exact.summary()}",
            "fp32 everywhere in a tier named exact",
            "give the tier another name: --plan NAME=FILE",
        )


def _promise(plan: Plan) -> float | None:
    """The largest drop in points that the plan was built for, where it says so."""
    wish = plan.search.get("wish") if isinstance(plan.search, dict) else None
    drop = wish.get("drop") if isinstance(wish, dict) else None
    return float(drop) if isinstance(drop, (int, float)) else None


def _read(path: Path) -> Plan:
    try:
        return Plan.from_json(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise UsageError(
            "no_plan", f"{path}: {error.strerror}", "a plan.json", "check the path"
        ) from None
    except UnicodeDecodeError:
        raise UsageError("bad_plan", f"{path} is not text", "a plan.json", "check it") from None


def _with_scales(config: GenerateConfig, bench: Workbench, name: str, plan: Plan) -> Plan:
    if not config.has_data:
        raise UsageError(
            "no_scale",
            f"{config.plans[name]} quantizes sites and carries no scales",
            "plans with scales, as samp build writes them",
            "give --data, so that the scales are calibrated",
        )
    ranges = bench.ranges(bench.split(read_splits(config.build, []).calibration))

    def recipes(precision: str) -> dict[str, Recipe]:
        return {
            site: entry.recipe
            for site, entry in plan.sites.items()
            if entry.precision == precision and entry.recipe is not None
        }

    whole, narrow = recipes("int8"), recipes("fp8")
    scales = {**calibrate.scales(ranges, whole), **calibrate.fp8_scales(ranges, narrow)}
    apart: dict[str, Sequence[int]] = {**calibrate.outliers(ranges, whole)}
    if plan.scales:  # one was edited from another precision: what it has stays
        apart = {**apart, **plan.outliers}
    return replace(plan, scales={**scales, **plan.scales}, outliers=apart)
