"""The build: checkpoint and labelled data in, a verified model repository out.

measure on the search split -> allocate -> verify on rows that the search never saw -> write.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from samp_kernels.cpu import state

from samp_core import cache, heads, metrics, recipes, tasks
from samp_core.allocate import Candidate
from samp_core.backends import choose_backend, doubts, unused_gpu
from samp_core.budget import Clock, forget_best
from samp_core.checkpoint import load_checkpoint
from samp_core.config import BuildConfig, TierSpec, load_config
from samp_core.costs import weigh
from samp_core.data import Splits, combine_splits, read_rows, split_rows
from samp_core.enough import shortages
from samp_core.errors import SampError, UsageError
from samp_core.found import Found
from samp_core.latency import SINGLE, foretold
from samp_core.lower_loss import loss_note, loss_report
from samp_core.memory import peak_mb
from samp_core.mix import mix_of, read_sample
from samp_core.observed import observed
from samp_core.plan import Plan, SitePlan, mode_plan
from samp_core.quantize import export_weights
from samp_core.repository import TierFiles, build_lock, check_names, write_build
from samp_core.search import Search
from samp_core.text import TextEncoder
from samp_core.tiers import FLOAT, Choice, Measured, Verifier, choose, fastest, near_ones, recheck
from samp_core.workbench import (
    Progress,
    Split,
    Workbench,
    forwards,
    silent,
    versions,
)

CALIBRATING = 0.25
"""Share of the time budget that comparing calibrators may take."""


@dataclass(frozen=True)
class BuildResult:
    """What `samp build --json` prints, and where the build is.

    plans: every plan that was looked at, by name; choices: what each tier serves, and why.
    """

    folder: Path
    report: dict[str, Any]
    plans: Mapping[str, Plan]
    choices: Mapping[str, Choice]


Config = BuildConfig | Mapping[str, Any] | Path | str
Note = Callable[[str], None]


def build(config: Config, progress: Progress = silent, note: Note = lambda _: None) -> BuildResult:
    """Run a whole build into config.folder. Raises SampError; work done so far stays cached.

    config: a BuildConfig, its fields as in build.yaml, or the path of such a file. note: told
    what a user may want to stop the build for, as soon as it is known.
    """
    if isinstance(config, (str, Path)):
        config = load_config(Path(config), {})
    elif not isinstance(config, BuildConfig):
        config = load_config(None, config)
    begin = time.perf_counter()
    before = forwards()
    check_names(config.name, ["exact", *config.tiers], config.served_by_default)
    with build_lock(config.folder):
        cache.clean(config.folder / "cache")
        bench = open_workbench(config, progress)
        bench.check_precisions()
        config = with_mix(config, bench)
        warnings: list[str] = []
        if config.backend == "auto":
            if bench.backend_name not in ("cpu", "cuda"):
                warnings.append(f"backend {bench.backend_name}: the cpu kernels are {state()}")
            why = unused_gpu(bench.checkpoint.config.head_dim)
            if why:
                warnings.append(f"backend {bench.backend_name}: the GPU is not used, {why}")
        warnings += unproven_note(config.backend, progress)
        splits = read_splits(config, warnings)
        scored = "" not in splits.verification.labels
        metric = metrics.of(bench.task, bench.checkpoint.labels, scored)
        parts = [bench.split(s) for s in (splits.calibration, splits.search, splits.verification)]
        calibration, search, verification = parts
        correct = Verifier(
            bench, {FLOAT: bench.base_plan()}, verification, config.alpha, metric
        )  # fmt: skip
        for lacking in shortages(config.tiers, correct):
            note(lacking)
            warnings.append(lacking)
        facts: dict[str, Any] = {}
        clock = Clock(begin, config.budget_s)
        modes = plan_modes(config, bench, calibration, search, facts, clock.part(CALIBRATING))
        warnings += recipes.stopped_note(facts.get("calibration", {}))
        if len(modes) == 1:
            found = Found(modes, measure_float(config, bench, modes, search, metric))
        else:
            full, come = list(modes.values())[-1], verification.rows.n
            other: dict[str, Any] = {}
            if config.strategy in ("milp", "greedy"):  # both shall read the same table of times
                compared = facts.get("calibration", {})
                other, full = recipes.variants(config, bench, calibration, full, compared)
            found = Search(config, bench, full, search, metric, come, clock, other).run()
        plans, candidates = found.plans, found.candidates
        if config.strategy == "lower-loss":
            losses = loss_report(bench, plans, {"search": search, "verification": verification})
            found.record["loss"] = losses
            warnings += loss_note(losses)
        correct.add(plans)
        choices = {
            name: choose(name, spec, candidates, correct, clock.spent_all, found.greedy)
            for name, spec in config.tiers.items()
        }
        exact = Choice("exact", TierSpec(), FLOAT, (), True)
        choices = {"exact": exact, **choices}
        near = [name for c in choices.values() for name in near_ones(c, candidates)]
        title, mix = "measure the chosen plans again", tuple(config.mix)
        anchored = {name: plans[name] for name in dict.fromkeys([*near, *found.anchors()])}
        turns = bench.latencies(anchored, search, title, mix)
        again = {name: weigh(ms, config.mix) for name, ms in turns.items()}
        paces = found.paces(turns)
        choices = {
            name: recheck(made, again[made.plan], again[FLOAT])
            for name, choice in choices.items()
            for made in [fastest(choice, again, found.greedy)]
        }
        served = {choice.plan: plans[choice.plan] for choice in choices.values()}
        others = [shape.name for shape in bench.shapes(search) if shape.name not in mix]
        rest = bench.latencies(served, search, title, others) if others else {}
        latencies = {name: {**turns[name], **rest.get(name, {})} for name in served}
        measured = {
            name: correct.measured(choice.plan, latencies[choice.plan])
            for name, choice in choices.items()
        }
        for choice in choices.values():
            warnings += choice.warnings
        warnings += correct.ranks({name: choice.plan for name, choice in choices.items()})
        tiers = {
            name: tier_files(config, bench, found, choice, measured, splits, metric, paces)
            for name, choice in choices.items()
        }
        record = {
            "config": config.model_dump(mode="json"),
            "candidates": [asdict(c) for c in candidates.values()],
            "splits": split_facts(splits),
            "warnings": warnings,
            **facts,
            "plans": {name: plans[name].summary() for name in candidates},
            "tiers": {
                name: {"plan": c.plan, "met": c.met, "ci95": list(measured[name].ci95)}
                for name, c in choices.items()
            },
            "observed": observed(bench, served, search),
            "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "peak_mb": round(peak_mb()),
            **({"search": found.record} if found.record else {}),
        }
        step = progress("write the model repository", 1)
        folder = write(config, bench, tiers, record)
        step()
        rows = [
            tier_row(config, choice, tiers[name], measured, folder, metric)
            for name, choice in choices.items()
        ]
        bench.close()
        forget_best(config.folder)
    report = {
        "repository": str(config.folder),
        "tiers": rows,
        "seconds": round(time.perf_counter() - begin, 2),
        "cache": {"hits": bench.cache.hits, "misses": bench.cache.misses},
        "forwards": forwards() - before,
        "warnings": warnings,
        "search": search_facts(found.record),
    }
    return BuildResult(folder, report, plans, choices)


def open_workbench(config: BuildConfig, progress: Progress) -> Workbench:
    """The checkpoint, its tokenizer and head, checked before anything long begins."""
    checkpoint = load_checkpoint(config.model)
    task = tasks.get(config.task)
    head = heads.register(config.head) if config.head else heads.get(task.head)
    if head.encoder_tensors is not None:
        extra = head.encoder_tensors(checkpoint.state, checkpoint.hf_config)
        checkpoint = replace(checkpoint, tensors={**checkpoint.tensors, **extra})
    text = TextEncoder.load(config.model, config.max_length)
    if task.name == "embedding":
        head = replace(head, encoder_output=pooling(config))
    if task.gold == "score":
        checkpoint = replace(checkpoint, labels=())
    if head.encoder_output == "tokens":
        text = text.with_windows(config.stride, config.windows, config.words == "spaces")
    return Workbench(
        checkpoint=checkpoint,
        text=text,
        head=head,
        head_weights=head.export(checkpoint.state, checkpoint.hf_config),
        cache=cache.Cache(config.folder / "cache"),
        code=cache.code_sha256(),
        backend_name=choose_backend(config.backend, checkpoint.config.head_dim, progress),
        precisions=config.precisions,
        threads=config.threads,
        progress=progress,
        task=task,
    )


def unproven_note(backend: str, progress: Progress) -> list[str]:
    """A warning where backend cuda is asked for by name and its check failed on this GPU."""
    why = doubts(progress) if backend == "cuda" else ""
    return [f"backend cuda: {why}; it is used because it was asked for"] if why else []


def pooling(config: BuildConfig) -> Literal["first", "mean"]:
    """How token states become an embedding: as asked, else as the checkpoint's folder says."""
    if config.pooling != "auto":
        return config.pooling
    file = config.model / "1_Pooling" / "config.json"
    if not file.is_file():
        return "mean"
    said = json.loads(file.read_text(encoding="utf-8"))
    on = [key for key, value in said.items() if key.startswith("pooling_mode_") and value is True]
    known: dict[str, Literal["first", "mean"]] = {
        "pooling_mode_cls_token": "first",
        "pooling_mode_mean_tokens": "mean",
    }
    if len(on) != 1 or on[0] not in known:
        raise SampError(
            "pooling", f"{file}: {', '.join(on) or 'none'}", ", ".join(known),
            "name one: --pooling mean or --pooling first",
        )  # fmt: skip
    return known[on[0]]


def read_splits(config: BuildConfig, warnings: list[str]) -> Splits:
    """The three splits, disjoint, without the rows that trained the checkpoint."""
    spec, task = config.data, tasks.get(config.task)
    exclude = read_rows(spec.exclude, labelled=False, task=task) if spec.exclude else None
    sizes = config.rows
    if spec.data is not None:
        rows = read_rows(spec.data, task=task)
        splits = split_rows(
            rows, sizes.calibration, sizes.search, seed=config.seed, exclude=exclude
        )
    else:
        assert spec.search is not None
        assert spec.verification is not None
        first = read_rows(spec.calibration or spec.search, task=task)
        splits = combine_splits(
            first,
            read_rows(spec.search, task=task) if spec.calibration else None,
            read_rows(spec.verification, task=task),
            exclude,
            calibration_size=sizes.calibration,
            search_size=sizes.search,
            seed=config.seed,
        )
    if exclude is None:
        warnings.append(
            "no `exclude` file: make sure that none of these rows trained the checkpoint"
        )
    if splits.in_training:
        warnings.append(f"{splits.in_training} rows left out: their texts trained the checkpoint")
    return splits


def split_facts(splits: Splits) -> dict[str, dict[str, Any]]:
    """Size and hash of each split, as plan.json and build.json hold them."""
    named = {
        "calibration": splits.calibration,
        "search": splits.search,
        "verification": splits.verification,
    }
    return {name: {"n": rows.n, "sha256": rows.sha256} for name, rows in named.items()}


def plan_modes(
    config: BuildConfig,
    bench: Workbench,
    calibration: Split,
    search: Split,
    record: dict[str, Any] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Plan]:
    """`float`, ffn_only(k) and full(k) for k = 1 .. L, under the recipes that lose least, in int8
    where plans may choose it, else in fp8; without both `float` and the other floats.

    How those were found goes into `record`; after `stop` no more are compared.
    """
    base = bench.base_plan()
    plans = {FLOAT: replace(base, versions=versions())}
    if not bench.narrow():
        for half in bench.halves():
            each = dict.fromkeys(base.sites, SitePlan(half))
            plans[half] = replace(base, versions=versions(), sites=each, mode=half)
        return plans
    chosen = recipes.choose(config, bench, calibration, search, stop)
    if record is not None:
        record["calibration"] = chosen.record
    main = bench.narrow()[0]
    sites = bench.quantizable(main)
    for kind in ("ffn_only", "full"):
        for k in range(1, base.layers + 1):
            plan = mode_plan(chosen.scaled, kind, k, sites, chosen.recipes, main)  # type: ignore[arg-type]
            plans[str(plan.mode)] = plan
    return plans


def measure_float(
    config: BuildConfig,
    bench: Workbench,
    plans: Mapping[str, Plan],
    search: Split,
    metric: metrics.Metric,
) -> dict[str, Candidate]:
    """Float's metric and latency, on a backend that can quantize nothing."""
    logits = bench.logits(plans[FLOAT], search, "search: float")
    metric.check(logits, search)
    latencies = bench.latencies(plans, search, "measure latencies", tuple(config.mix))
    ms = weigh(latencies[FLOAT], config.mix)
    return {FLOAT: metric.candidate(FLOAT, ms, logits, logits, search)}


def with_mix(config: BuildConfig, bench: Workbench) -> BuildConfig:
    """The configuration with the mix of its sample of texts, whose shapes the bench then times."""
    if config.mix_texts is None:
        return config
    texts, batches = zip(*read_sample(config.mix_texts), strict=True)
    if any(isinstance(text, tuple) != bench.task.pair for text in texts):
        raise UsageError(
            "bad_mix", f"{config.mix_texts}: rows of {'one text' if bench.task.pair else 'pairs'}",
            f"what the task {bench.task.name} asks about", "correct the file",
        )  # fmt: skip
    mix = mix_of(bench.text.encode(list(texts)), batches, bench.checkpoint.config.position_offset)
    bench.sample = mix.buckets
    return config.model_copy(update={"mix": dict(mix.shares)})


def tier_files(
    config: BuildConfig,
    bench: Workbench,
    found: Found,
    choice: Choice,
    measured: Mapping[str, Measured],
    splits: Splits,
    metric: metrics.Metric,
    paces: Mapping[str, Mapping[str, float]],
) -> TierFiles:
    """The plan with its provenance, and the portable weights under it.

    `modelled` is what the search foretold and the pace of the machine since (costs.foretold), or
    for SAMP's modes the latency that the choice was made with; `measured` is the one after it.
    """
    facts = measured[choice.tier]
    tests = [
        {"plan": name, **asdict(test), "passed": bool(test.passed)} for name, test in choice.tests
    ]
    candidate = found.candidates[choice.plan]
    modelled: dict[str, Any] = {"latency_ms": {SINGLE: candidate.latency_ms}}
    if choice.plan in found.modelled:
        modelled = {**found.modelled[choice.plan], "pace": paces.get(choice.plan, {})}
    plan = found.plans[choice.plan].with_provenance(
        search={
            "strategy": config.strategy,
            "seed": config.seed,
            "budget_s": None if config.strategy == "samp" else config.budget_s,
            "wish": choice.spec.model_dump(),
            "splits": split_facts(splits),
        },
        measured={
            "latency_ms": dict(facts.latency_ms),
            "metric": metric.name,
            "value": facts.accuracy,
            "float_value": measured["exact"].accuracy,
            "changed": [facts.counts.b, facts.counts.c],
            "drop_bound": facts.drop_bound,
            "alpha": config.alpha,
            "tests": tests,
        },
        modelled=modelled,
    )
    weights = export_weights(bench.checkpoint.tensors, plan, bench.quantized)
    return TierFiles(plan, weights, choice.spec.drop)


def write(
    config: BuildConfig,
    bench: Workbench,
    tiers: Mapping[str, TierFiles],
    record: Mapping[str, Any],
) -> Path:
    """Hand everything to the repository writer; the swap is its last step."""
    return write_build(
        config.folder,
        model=config.name,
        task=config.task,
        head=bench.head.name,
        labels=bench.checkpoint.labels,
        max_length=bench.text.max_length,
        text=bench.text,
        head_weights=bench.head_weights,
        encoder_config=bench.checkpoint.config,
        tiers=tiers,
        default_tier=config.served_by_default,
        build=record,
        threads=config.threads,
        pair=bench.task.pair,
        output=bench.head.encoder_output,
        queue_s=config.queue_s,
    )


def tier_row(
    config: BuildConfig,
    choice: Choice,
    files: TierFiles,
    measured: Mapping[str, Measured],
    folder: Path,
    metric: metrics.Metric,
) -> dict[str, Any]:
    """One tier as `samp build --json` prints it; values and drops in points of the metric."""
    facts = measured[choice.tier]
    weights = (
        folder / "models" / f"encoder_{config.name}_{choice.tier}" / "1" / "weights.safetensors"
    )
    return {
        "name": choice.tier,
        "plan": files.plan.summary(),
        "metric": metric.name,
        "value": round(facts.accuracy * 100, 3),
        "ci95": [round(end * 100, 3) for end in facts.ci95],
        "drop_bound": 0.0 if choice.tier == "exact" else round(facts.drop_bound * 100, 3),
        "promise": choice.spec.model_dump(exclude_none=True),
        "met": choice.met,
        "latency_ms": {bucket: round(ms, 3) for bucket, ms in facts.latency_ms.items()},
        "foretold_ms": {b: round(ms, 3) for b, ms in foretold(files.plan.modelled).items()},
        "size_mb": round(weights.stat().st_size / 1e6, 1),
    }


def search_facts(record: Mapping[str, Any]) -> dict[str, Any]:
    """How much of the search was measured, and how well the cheap scores ranked it."""
    names = ("strategy", "measured", "nodes", "spent_s", "rank_correlation")
    return {name: record[name] for name in names if name in record}


class _Callable(ModuleType):
    """`samp_core.build(config)` runs a build: the function and its module share that name."""

    def __call__(
        self, config: Config, progress: Progress = silent, note: Note = lambda _: None
    ) -> BuildResult:
        return build(config, progress, note)


sys.modules[__name__].__class__ = _Callable
