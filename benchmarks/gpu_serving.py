"""The serving steps of gpu_check.py: tiers of a CPU and of a GPU in one repository, behind a real
Triton over gRPC; and a search that measures with the GPU.

The checkpoint is made here from random weights. Its texts are of its own vocabulary, and their
labels are the float model's own answers, so that what a tier gets wrong is its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from gpu_report import Report

WORDS = tuple(a + b + c for a in "bdfgklm" for b in "aeiou" for c in "lnrs")
VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS)
LABELS = ("no", "yes")
MODEL = "random"
# (layers, hidden, heads, ffn): of a GPU's check, and of its rehearsal.
SIZES = {False: (4, 256, 4, 1024), True: (1, 64, 2, 128)}
# Largest difference of a tier's SCORES from the reference's under the same plan, in float64.
TOLERANCE = {"fp32": 1e-4, "fp16": 1e-2, "int8": 5e-2, "fp8": 0.1}
# What a rehearsal emulates: the oldest architecture that has every precision.
EMULATED = "sm_89"


def make_checkpoint(folder: Path, sizes: tuple[int, int, int, int], seed: int = 0) -> Path:
    """A BERT classifier as transformers writes one, with weights of a trained model's size."""
    from safetensors.numpy import save_file

    layers, hidden, heads, ffn = sizes
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    config = {
        "model_type": "bert", "architectures": ["BertForSequenceClassification"],
        "vocab_size": len(VOCABULARY), "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "intermediate_size": ffn, "hidden_act": "gelu",
        "max_position_embeddings": 64, "type_vocab_size": 2, "layer_norm_eps": 1e-12,
        "id2label": dict(enumerate(LABELS)), "pad_token_id": 0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    tensors: dict[str, Any] = {}

    def linear(name: str, rows: int, columns: int) -> None:
        tensors[f"{name}.weight"] = rng.standard_normal((rows, columns)) / np.sqrt(columns)
        tensors[f"{name}.bias"] = rng.standard_normal(rows) * 0.05

    def norm(name: str) -> None:
        tensors[f"{name}.weight"] = 1 + rng.standard_normal(hidden) * 0.05
        tensors[f"{name}.bias"] = rng.standard_normal(hidden) * 0.05

    for part, rows in (
        ("word", len(VOCABULARY)), ("position", 64), ("token_type", 2),
    ):  # fmt: skip
        name = f"bert.embeddings.{part}_embeddings.weight"
        tensors[name] = rng.standard_normal((rows, hidden)) * (1.0 if part == "word" else 0.1)
    norm("bert.embeddings.LayerNorm")
    for i in range(layers):
        layer = f"bert.encoder.layer.{i}"
        for part in ("query", "key", "value"):
            linear(f"{layer}.attention.self.{part}", hidden, hidden)
        linear(f"{layer}.attention.output.dense", hidden, hidden)
        norm(f"{layer}.attention.output.LayerNorm")
        linear(f"{layer}.intermediate.dense", ffn, hidden)
        linear(f"{layer}.output.dense", hidden, ffn)
        norm(f"{layer}.output.LayerNorm")
    linear("bert.pooler.dense", hidden, hidden)
    linear("classifier", len(LABELS), hidden)
    save_file({k: v.astype(np.float32) for k, v in tensors.items()}, folder / "model.safetensors")
    return folder


def texts_of(count: int, seed: int = 1) -> list[str]:
    """Different texts of 2 to 40 words."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(np.exp(rng.normal(2.2, 0.7, count)), 2, 40).astype(int)
    return [" ".join(rng.choice(WORDS, n)) for n in lengths]


class Model:
    """The checkpoint, texts, and float64's answers under any plan."""

    def __init__(self, work: Path, size: tuple[int, int, int, int], count: int) -> None:
        from samp_core.build import open_workbench
        from samp_core.config import BuildConfig, DataSpec
        from samp_core.workbench import silent

        self.work, self.texts = work, texts_of(count)
        self.rows = work / "rows.jsonl"
        self.config = BuildConfig(
            model=make_checkpoint(work / "checkpoint", size), name=MODEL, backend="reference",
            data=DataSpec(data=self.rows), out=work / "out", threads=os.cpu_count() or 1,
        )  # fmt: skip
        self.bench = open_workbench(self.config, silent)
        self._write([LABELS[i % 2] for i in range(count)])  # until they are known
        logits = self.logits(self.bench.base_plan())
        middle = np.median(logits[:, 1] - logits[:, 0])  # Both labels for half of the texts.
        labels = (logits[:, 1] - logits[:, 0] > middle).astype(int)
        self._write([LABELS[label] for label in labels])

    def _write(self, labels: Sequence[str]) -> None:
        rows = zip(self.texts, labels, strict=True)
        lines = (json.dumps({"text": text, "label": label}) for text, label in rows)
        self.rows.write_text("\n".join(lines) + "\n")

    def split(self) -> Any:
        from samp_core.data import read_rows

        return self.bench.split(read_rows(self.rows))

    def logits(self, plan: Any) -> Any:
        """[texts, 2] of a plan on the reference backend; its floats are float64."""
        from samp_core.plan import SitePlan

        sites = {
            name: SitePlan() if entry.precision in ("fp16", "bf16") else entry
            for name, entry in plan.sites.items()
        }
        plan = replace(plan, backend="reference", sites=sites)
        return self.bench.logits(plan, self.split(), "reference")

    def scores(self, plan: Any) -> Any:
        logits = self.logits(plan).astype(np.float64)
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)

    def plans(self, cpu: str) -> dict[str, Any]:
        """A tier of the CPU and three of the GPU: SAMP's float and full modes, FP16 and INT8; and
        where the GPU has it one of FP8 beside FP16."""
        from samp_core.calibrate import fp8_scales, scales
        from samp_core.encoder import quantizable_sites
        from samp_core.generate import on_backend
        from samp_core.plan import Recipe, SitePlan, mode_plan

        base = self.bench.base_plan()
        ranges = self.bench.ranges(self.split())
        found = {**scales(ranges, Recipe()), **fp8_scales(ranges, Recipe())}
        scaled = replace(base, scales=found)
        full = mode_plan(scaled, "full", base.layers, self.bench.quantizable(), Recipe())
        half = replace(base, sites=dict.fromkeys(base.sites, SitePlan("fp16")), mode="fp16")
        made = {"exact": base, "half": half, "fast": full}
        bench = on_backend(self.bench, "cuda")
        sites = quantizable_sites(bench.backend, "fp8")
        if sites:
            narrow = mode_plan(scaled, "full", base.layers, sites, Recipe(), "fp8")
            rest = {
                name: entry if entry.precision == "fp8" else SitePlan("fp16")
                for name, entry in narrow.sites.items()
            }
            made["narrow"] = replace(narrow, sites=rest, mode=None)
        device = bench.device()
        gpu = {name: replace(p, backend="cuda", device=device) for name, p in made.items()}
        return {"cpu": replace(base, backend=cpu), **gpu}


def cpu_backend() -> str:
    """The best that is here: native kernels, torch's, or NumPy's."""
    from samp_core.backends import cpu_backend as best

    name = best()
    if name == "onednn" and importlib.util.find_spec("torch") is None:
        return "reference"
    return name


def serve(report: Report, emulate: bool) -> None:
    """Build, start the Triton, call every tier, compare two, load each."""
    from samp_core.errors import SampError
    from samp_core.server import Server

    if emulate:
        os.environ["SAMP_CUDA"] = f"emulated:{EMULATED}"
    count = 48 if emulate else 512
    with tempfile.TemporaryDirectory(prefix="samp-gpu-") as folder:
        model = Model(Path(folder), SIZES[emulate], count)
        plans = generate(report, model)
        try:
            server = Server.start(model.config.folder, log=Path(folder, "triton.log"))
        except SampError as error:
            log = Path(folder, "triton.log")
            report.note("log", log.read_text(errors="replace")[-4000:] if log.is_file() else "")
            if error.code in ("no_triton", "no_libpython", "no_python_stub", "numpy_too_new"):
                report.skip("serving", str(error))
                return
            raise
        with server:
            report.check("serving, ready", True, ", ".join(server.models))
            call(report, server, model, plans)
            ab(report, server, model)
            load(report, server, model, tuple(plans), seconds=4.0)
            locust(report, server, model, tuple(plans))


def generate(report: Report, model: Model) -> dict[str, Any]:
    """One repository of all tiers, each on the backend that its plan names."""
    from samp_core.generate import GenerateConfig
    from samp_core.generate import generate as run
    from samp_core.manifest import read_manifest
    from samp_core.model_config import from_pbtxt
    from samp_core.plan import Plan

    files = {}
    for name, plan in model.plans(cpu_backend()).items():
        files[name] = model.work / f"{name}.json"
        files[name].write_text(plan.to_json())
    made = run(GenerateConfig(files, model.config, has_data=True))
    report.note("tiers", made["tiers"])
    manifest, plans, kinds = read_manifest(model.config.folder), {}, {}
    for name, tier in manifest.tiers.items():
        place = manifest.folder / "models" / tier.encoder
        plans[name] = Plan.from_json((place / "1" / "plan.json").read_text())
        kinds[name] = from_pbtxt((place / "config.pbtxt").read_text()).gpu
    wanted = {
        name: plan.backend == "cuda" and "SAMP_CUDA" not in os.environ
        for name, plan in plans.items()
    }
    report.check("serving, KIND_GPU where the plan says cuda", kinds == wanted, f"{kinds}")
    return plans


def call(report: Report, server: Any, model: Model, plans: dict[str, Any]) -> None:
    """Every text by every tier over gRPC, beside float64 under the same plan."""
    from samp_client import connect

    with connect(server.grpc) as client:
        for tier, plan in plans.items():
            answers = list(client.predict(model.texts, tier=tier))
            wanted = model.scores(plan)
            got = np.array([answer.scores for answer in answers])
            used = {entry.precision for entry in plan.sites.values()}
            kind = next(p for p in ("fp8", "int8", "fp16", "fp32") if p in used)
            error = float(np.abs(got - wanted).max())
            most = TOLERANCE[kind]
            name = f"serving, {tier} on {plan.backend}, SCORES of {len(answers)} texts"
            report.check(name, error <= most, f"{error:.1e} from float64, at most {most:g}")


def ab(report: Report, server: Any, model: Model) -> None:
    """`samp ab` between the CPU's tier and a GPU's, at both ends of a promise of two points; none
    where no scipy is, which says how many texts a promise would take."""
    from samp_client import connect

    from samp_core.ab import compare

    with connect(server.grpc) as client:
        promise = 2.0 if importlib.util.find_spec("scipy") else None
        found = compare(client, model.rows, "cpu", "half", promise_points=promise)
    report.note("ab", {k: found[k] for k in ("n", "agreement", "verdict", "latency_ms")})
    fine = found["n"] == len(model.texts) and found["agreement"] >= 0.95
    detail = f"{found['n']} texts, agreement {found['agreement']:.3f}, {found['verdict']}"
    report.check("serving, A/B of cpu and half", fine, detail)


def load(report: Report, server: Any, model: Model, tiers: Sequence[str], seconds: float) -> None:
    """Eight callers that wait for their answers, one tier after another."""
    import grpc
    from closed_loop import METHOD, closed_loop, requests

    found = {}
    with grpc.insecure_channel(server.grpc) as channel:
        ask = channel.unary_unary(METHOD)
        for tier in tiers:
            payloads = requests(f"{MODEL}_{tier}", model.texts, 1)
            one = closed_loop(ask, payloads, 8, seconds, 0.3)
            taken = one["latencies_ms"]
            found[tier] = {
                "rps": one["rps"],
                "p50_ms": float(np.percentile(taken, 50)) if taken else None,
                "p95_ms": float(np.percentile(taken, 95)) if taken else None,
            }
            detail = f"{len(taken)} answers from 8 callers, {len(one['failures'])} failures"
            report.check(f"serving, load on {tier}", bool(taken) and not one["failures"], detail)
    report.note("load", found)


def locust(report: Report, server: Any, model: Model, tiers: Sequence[str]) -> None:
    """`samp loadtest` over the tiers of the CPU and the GPU side by side, where locust is there."""
    for package in ("locust", "samp_loadtest"):
        if importlib.util.find_spec(package) is None:
            report.skip("locust", f"{package} is not installed")
            return
    from samp_loadtest.run import run_loadtest

    mix = dict.fromkeys(tiers, 1.0)
    found = run_loadtest(
        server.grpc, mix, users=8, seconds=5.0, texts=model.texts, model=MODEL, warm_s=1.0
    )
    report.note("locust", found)
    for tier in mix:
        one = found.get(tier, {"requests": 0, "failures": 0})
        fine = one["requests"] > 0 and not one["failures"]
        detail = f"{one['requests']} requests of 8 users, {one['failures']} failures"
        report.check(f"serving, locust on {tier}", fine, detail)


def search(report: Report, emulate: bool) -> None:
    """`samp build --backend cuda`: plans of fp16, int8 and where it is there fp8, by this GPU's own
    latencies."""
    from samp_core.build import build
    from samp_core.config import RowCounts
    from samp_core.encoder import quantizable_sites
    from samp_core.generate import on_backend

    for package in ("torch", "scipy"):
        if importlib.util.find_spec(package) is None:
            report.skip("search", f"it needs {package}, which is not installed")
            return
    if emulate:
        os.environ["SAMP_CUDA"] = f"emulated:{EMULATED}"
    with tempfile.TemporaryDirectory(prefix="samp-gpu-") as folder:
        model = Model(Path(folder), SIZES[emulate], 90 if emulate else 1600)
        fp8 = quantizable_sites(on_backend(model.bench, "cuda").backend, "fp8")
        settings = {
            "backend": "cuda", "out": Path(folder, "search"),
            "budget_s": max(5.0, min(45.0, report.left() - 25.0)),
            "precisions": ("fp16", "int8", *(("fp8",) if fp8 else ())),
        }  # fmt: skip
        if emulate:
            settings["rows"] = RowCounts(calibration=8, search=24)
        config = model.config.model_copy(update=settings)
        made = build(config).report
        report.note("search", {"tiers": made["tiers"], "warnings": made["warnings"]})
        used = ", ".join(f"{row['name']}: {row['plan']}" for row in made["tiers"])
        fine = all(min(row["latency_ms"].values()) > 0.0 for row in made["tiers"])
        report.check("search on cuda", fine and len(made["tiers"]) == 4, used)
