"""A search on the CUDA backend: fp16 and int8 by its own latencies, here emulated and planted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import samp_kernels.cuda
from emulated import needs_compiler
from safetensors import safe_open
from samp_kernels.interface import GEMM_SITES, SITES, pack_batch
from separable import make_small

from samp_core import costs
from samp_core.build import build
from samp_core.chain import Node, chain, choice_of
from samp_core.config import load_config
from samp_core.costs import CostTable
from samp_core.encoder_files import load_session
from samp_core.errors import SampError, UsageError
from samp_core.explain import explain
from samp_core.generate import GenerateConfig, generate
from samp_core.manifest import read_manifest
from samp_core.plan import Plan, Recipe, SitePlan
from samp_core.report import render
from samp_core.report_facts import read_facts
from samp_core.report_figure import PRECISION_COLOURS
from samp_core.workbench import Workbench

pytestmark = needs_compiler
MS = {"fp32": 1.0, "fp16": 0.4, "bf16": 0.4, "int8": 0.3, "fp8": 0.2}
ROWS = {"calibration": 8, "search": 24}


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Backend cuda without a GPU."""
    monkeypatch.setenv("SAMP_CUDA", "emulated")
    samp_kernels.cuda.missing.cache_clear()
    yield
    samp_kernels.cuda.missing.cache_clear()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device on which a node takes what its precision takes, and a pass what its nodes take."""

    def measured(bench: Any, base: Any, nodes: tuple[Node, ...], *rest: Any) -> CostTable:
        asked.append(nodes)
        counts = [(), *(node.precisions for node in nodes), ("",)]
        edges = [
            tuple(tuple(MS.get(p, 0.0) for _ in after) for p in before or ("",))
            for before, after in pairwise(counts)
        ]
        return CostTable({"1": tuple(edges)}, {"1": 0.1})

    def latencies(bench: Any, plans: Any, split: Any, *_: Any) -> Any:
        nodes = asked[-1]
        return {
            name: {
                "1": 0.1
                + sum(
                    MS[n.precisions[i]] for n, i in zip(nodes, choice_of(plan, nodes), strict=True)
                )
            }
            for name, plan in plans.items()
        }

    asked: list[tuple[Node, ...]] = []
    monkeypatch.setattr(costs, "measured", measured)
    monkeypatch.setattr(Workbench, "latencies", latencies)


def settings(folder: Path, **fields: Any) -> Any:
    made = make_small(folder / "model", layers=1, rows=90)
    tiers = {"high": {"drop": 40.0}, "fast": {"drop": 60.0}}
    given: dict[str, Any] = {
        "backend": "cuda", "strategy": "milp", "tiers": tiers, "rows": ROWS, "threads": 1,
        "out": str(folder / "out"), "data": {"data": str(made.data)}, **fields,
    }  # fmt: skip
    return load_config(made.yaml(folder / "build.yaml", **given), {})


def plan_of(out: Path, tier: str) -> Plan:
    place = read_manifest(out)
    text = (place.folder / "models" / place.tiers[tier].encoder / "1" / "plan.json").read_text()
    return Plan.from_json(text)


@pytest.mark.usefixtures("device")
def test_fp16_is_the_baseline_beside_int8(tmp_path: Path) -> None:
    config = settings(tmp_path)
    report = build(config).report
    record = json.loads((read_manifest(config.folder).folder / "build.json").read_text())
    assert record["search"]["halves"] == ["fp16"]
    timed = {c["name"]: c["latency_ms"] for c in record["candidates"]}
    # SAMP's table: the float model in fp16, FFN alone in int8 with the rest in fp16, all in int8.
    assert timed["float"] == pytest.approx(0.1 + 5 * MS["fp32"])
    assert timed["fp16"] == pytest.approx(0.1 + 5 * MS["fp16"])
    assert timed["ffn_only(1)"] == pytest.approx(0.1 + 3 * MS["fp16"] + 2 * MS["int8"])
    assert timed["full(1)"] == pytest.approx(0.1 + 5 * MS["int8"])
    exact = plan_of(config.folder, "exact")
    assert {entry.precision for entry in exact.sites.values()} == {"fp32"}
    assert exact.device["gpu"] == "emulated"
    fast = plan_of(config.folder, "fast")
    assert {entry.precision for entry in fast.sites.values()} <= {"fp16", "int8"}
    assert [row["name"] for row in report["tiers"]] == ["exact", "high", "fast"]
    lines = [site["why"] for site in explain(config.folder, "fast")["sites"]]
    assert all(line.startswith(("int8: saves", "fp16: int8 would save")) for line in lines)


@pytest.mark.usefixtures("device")
def test_precisions_restrict_the_search(tmp_path: Path) -> None:
    config = settings(tmp_path, precisions="fp16")
    build(config)
    record = json.loads((read_manifest(config.folder).folder / "build.json").read_text())
    assert {c["name"] for c in record["candidates"]} >= {"float", "fp16"}
    fast = plan_of(config.folder, "fast")
    assert {entry.precision for entry in fast.sites.values()} == {"fp16"}
    with pytest.raises(UsageError, match=r"fp16 on backend reference.*fp32, int8"):
        build(config.model_copy(update={"backend": "reference"}))


@pytest.mark.usefixtures("device")
def test_fp8_is_a_precision_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where GEMMs take least time in fp8 the fastest plan has them, beside int8 attention."""
    monkeypatch.setenv("SAMP_CUDA", "emulated:sm_89")
    samp_kernels.cuda.missing.cache_clear()
    config = settings(tmp_path, precisions="fp32,int8,fp16,fp8")
    build(config)
    folder = read_manifest(config.folder).folder
    record = json.loads((folder / "build.json").read_text())
    timed = {c["name"]: c["latency_ms"] for c in record["candidates"]}
    # int8 is what the modes are of; every GEMM in fp8 stands beside them, attention in fp16.
    assert timed["full(1)"] == pytest.approx(0.1 + 5 * MS["int8"])
    assert timed["fp8"] == pytest.approx(0.1 + 4 * MS["fp8"] + MS["fp16"])
    assert record["calibration"]["fp8"] == "minmax"
    search = record["search"]
    assert search["fp8"] == ["qkv", "out", "ffn_in", "ffn_out"]
    gemms = [f"layer.0.{site}" for site in search["fp8"]]
    assert [site["node"] for site in search["more"]["fp8"]] == gemms
    for site in search["more"]["fp8"]:
        assert site["precision"] == "fp8"
        assert site["kl"] >= 0.0
        assert site["fisher"] > 0.0
    fast = plan_of(config.folder, "fast")
    assert fast.device == {"gpu": "emulated", "isa": "sm_89", "threads": 1}
    used = {site: fast.precision(site) for site in fast.sites}
    assert {used[site] for site in gemms} == {"fp8"}
    assert {used["layer.0.scores"], used["layer.0.context"]} <= {"int8", "fp16"}
    assert "fp8" in fast.summary()
    # What is served: codes of e4m3 in a file that says so, and the kernels' own word for it.
    place = folder / "models" / "encoder_small_fast" / "1"
    with safe_open(place / "weights.safetensors", "np") as file:
        assert {file.get_slice(f"{site}.weight").get_dtype() for site in gemms} == {"F8_E4M3"}
    ran = record["observed"][record["tiers"]["fast"]["plan"]]["executed"]
    assert {ran[site] for site in gemms} == {"fp8"}
    session = load_session(place)
    batch = pack_batch([np.arange(5, dtype=np.int32)], [np.zeros(5, np.int32)])
    assert np.isfinite(session.run(batch)).all()
    assert session.executed() == used
    why = {site["site"]: site["why"] for site in explain(config.folder, "fast")["sites"]}
    assert all(why[site].startswith("fp8: saves 0.200 ms") for site in gemms)
    page = render(read_facts(config.folder))
    assert PRECISION_COLOURS["fp8"] in page
    assert "fp8: saves 0.200 ms" in page
    # The same repository on a GPU without fp8: an error at load that says what there is.
    monkeypatch.setenv("SAMP_CUDA", "emulated:sm_86")
    samp_kernels.cuda.missing.cache_clear()
    lacks = r"unsupported_plan.*layer.0.qkv fp8 static; .*int8.*samp build"
    with pytest.raises(SampError, match=lacks):
        load_session(place)
    with pytest.raises(UsageError, match=r"fp8 on backend cuda.*fp32, fp16, bf16, int8"):
        build(config)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("strategy", ["samp", "greedy", "lower-loss"])
def test_every_strategy_knows_fp8(
    strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAMP_CUDA", "emulated:sm_89")
    samp_kernels.cuda.missing.cache_clear()
    nodes = chain(1, SITES, Recipe(), ("fp16",), GEMM_SITES)
    costs.measured(None, None, nodes)  # type: ignore[arg-type]  # samp asks for none
    config = settings(tmp_path, strategy=strategy, precisions="fp16,int8,fp8")
    build(config)
    record = json.loads((read_manifest(config.folder).folder / "build.json").read_text())
    timed = {c["name"]: c["latency_ms"] for c in record["candidates"]}
    assert timed["fp8"] == pytest.approx(0.1 + 4 * MS["fp8"] + MS["fp16"])
    assert timed["fp16"] == pytest.approx(0.1 + 5 * MS["fp16"])


@pytest.mark.usefixtures("device")
def test_without_int8_the_modes_are_of_fp8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMP_CUDA", "emulated:sm_89")
    samp_kernels.cuda.missing.cache_clear()
    config = settings(tmp_path, precisions="fp16,fp8", activation="token")
    build(config)
    record = json.loads((read_manifest(config.folder).folder / "build.json").read_text())
    timed = {c["name"]: c["latency_ms"] for c in record["candidates"]}
    assert timed["ffn_only(1)"] == pytest.approx(0.1 + 2 * MS["fp8"] + 3 * MS["fp16"])
    assert timed["full(1)"] == pytest.approx(0.1 + 4 * MS["fp8"] + MS["fp16"])
    assert record["search"]["quantizable"] == []
    assert {site["precision"] for site in record["search"]["sites"]} == {"fp8"}
    fast = plan_of(config.folder, "fast")
    entry = fast.sites["layer.0.ffn_in"]
    assert entry.precision == "fp8"
    assert entry.recipe is not None
    assert entry.recipe.activation == "token"
    lines = [site["why"] for site in explain(config.folder, "fast")["sites"]]
    assert all(line.startswith("fp8: saves") for line in lines)


@pytest.mark.usefixtures("device")
def test_a_model_that_overflows_fp16_is_searched_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = Workbench.logits

    def overflowing(self: Workbench, plan: Plan, split: Any, title: str) -> Any:
        if any(entry.precision == "fp16" for entry in plan.sites.values()):
            raise SampError("not_finite", title, "finite logits", "check the checkpoint")
        return logits(self, plan, split, title)

    monkeypatch.setattr(Workbench, "logits", overflowing)
    config = settings(tmp_path)
    build(config)
    record = json.loads((read_manifest(config.folder).folder / "build.json").read_text())
    assert record["search"]["halves"] == []
    assert "fp16" not in {c["name"] for c in record["candidates"]}


def test_tiers_of_a_cpu_and_of_a_gpu_stand_in_one_repository(tmp_path: Path) -> None:
    config = settings(tmp_path)
    from samp_core.build import open_workbench
    from samp_core.workbench import silent

    base = open_workbench(config, silent).base_plan()
    half = replace(base, sites=dict.fromkeys(base.sites, SitePlan("fp16")))
    plans = {
        "exact": replace(base, backend="reference"),
        "half": half,
        "gpu": replace(half, device={"gpu": "NVIDIA L4", "isa": "sm_89"}),
    }
    files = {name: tmp_path / f"{name}.json" for name in plans}
    for name, plan in plans.items():
        files[name].write_text(plan.to_json())
    made = generate(GenerateConfig(files, config, has_data=False))
    assert [tier["name"] for tier in made["tiers"]] == ["exact", "half", "gpu"]
    models = read_manifest(config.folder).folder / "models"
    kinds = {
        name: "KIND_GPU" in (models / f"encoder_small_{name}" / "config.pbtxt").read_text()
        for name in plans
    }
    assert kinds == {"exact": False, "half": False, "gpu": True}  # emulated kernels need none
    for role in ("tokenizer", "head"):
        assert "KIND_CPU" in (models / f"{role}_small" / "config.pbtxt").read_text()
    cpu = replace(half, backend="reference")
    files["half"].write_text(cpu.to_json())
    with pytest.raises(SampError, match=r"layer\.0\.qkv fp16") as refused:
        generate(GenerateConfig(files, config, has_data=False))
    assert "fp32" in refused.value.allowed
    assert np.isin(["fp32", "int8 static"], refused.value.allowed.split(", ")).all()
