"""`samp build` from a checkpoint to a repository, in processes of its own.

Latencies decide which plans are served, and no test may depend on a clock: where a choice is
tested, the measured latencies in the build's cache are overwritten first, and it builds again.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forked import Done, forks, wait_for
from safetensors import safe_open
from separable import LABELS, MS, Small, planted_build, set_latencies, small, write_rows

from samp_core import allocate, evaluate, pipeline
from samp_core.allocate import Candidate
from samp_core.backends import choose_backend
from samp_core.build import read_splits
from samp_core.checkpoint import load_checkpoint
from samp_core.config import BuildConfig, load_config
from samp_core.data import Splits, label_ids
from samp_core.manifest import read_manifest, verify
from samp_core.plan import Plan

GEMMS = ("qkv", "out", "ffn_in", "ffn_out")
TIER_KEYS = {
    *("name", "plan", "metric", "value", "ci95", "drop_bound"),
    *("promise", "met", "latency_ms", "size_mb", "foretold_ms"),
}  # fmt: skip


@dataclass(frozen=True)
class Built:
    """A finished `samp build`: its folder, and how the command ended."""

    out: Path
    done: Done
    config: BuildConfig

    @property
    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = self.done.json
        return report

    @property
    def folder(self) -> Path:
        return (self.out / "current").resolve()

    @property
    def record(self) -> dict[str, Any]:
        record: dict[str, Any] = json.loads((self.folder / "build.json").read_text())
        return record

    def tier(self, name: str) -> dict[str, Any]:
        return next(row for row in self.report["tiers"] if row["name"] == name)

    def encoder(self, tier: str) -> Path:
        return self.folder / "models" / f"encoder_small_{tier}" / "1"

    def plan(self, tier: str) -> dict[str, Any]:
        plan: dict[str, Any] = json.loads((self.encoder(tier) / "plan.json").read_text())
        return plan

    def splits(self) -> Splits:
        return read_splits(self.config, [])


def flags(made: Small, out: Path, *more: object) -> list[object]:
    return [
        "build", "--model", made.checkpoint, "--data", made.data, "--exclude", made.trained,
        "--name", "small", "--threads", 1, "--calibrator", "minmax", "--out", out, "--json", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Nothing but flags, in a process started by the shell's own `samp`."""
    out = tmp_path_factory.mktemp("first")
    made = small()
    samp = Path(sys.executable).with_name("samp")
    command = [str(part) for part in (samp, *flags(made, out))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    raw = {
        "model": made.checkpoint,
        "data": {"data": made.data, "exclude": made.trained},
        "name": "small",
    }
    ended = Done(done.returncode, done.stdout, done.stderr)
    return Built(out, ended, BuildConfig.model_validate(raw))


WISHES: dict[str, Any] = {
    **{f"d{i}": {"drop": d} for i, d in enumerate((0.2, 0.5, 1, 1.5, 2, 3, 5, 10, 30))},
    "under": {"latency": 50},
    "both": {"drop": 40, "latency": 65},
    "neither": {},
    "never": {"latency": 10},
}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Every kind of wish at once, decided by the latencies of MS."""
    folder = tmp_path_factory.mktemp("planted")
    out = folder / "out"
    yaml = small().yaml(folder / "build.yaml", out=str(out), tiers=WISHES)
    return Built(out, planted_build(yaml, out, "--json"), load_config(yaml, {}))


# what comes out


def test_the_report(first: Built) -> None:
    assert first.done.code == 0, first.done.err
    report = first.report
    keys = {"repository", "tiers", "seconds", "cache", "forwards", "warnings", "search"}
    assert set(report) == keys
    assert report["repository"] == str(first.out)
    assert [row["name"] for row in report["tiers"]] == ["exact", "high", "balanced", "fast"]
    assert [row["promise"] for row in report["tiers"]] == [
        {}, {"drop": 0.5}, {"drop": 1.0}, {"drop": 2.0},
    ]  # fmt: skip
    assert report["cache"]["misses"] > 5
    assert report["forwards"] > 100
    assert "40 rows left out: their texts trained the checkpoint" in report["warnings"]
    for row in report["tiers"]:
        assert set(row) == TIER_KEYS
        assert row["met"] is True
        assert set(row["latency_ms"]) == {"1", "8", "32"}
        assert row["ci95"][0] < row["value"] < row["ci95"][1]
        weights = first.encoder(row["name"]) / "weights.safetensors"
        assert row["size_mb"] == round(weights.stat().st_size / 1e6, 1)
    # Progress went to stderr, a line a stage, and nothing else did.
    assert first.done.lines == []
    assert "  measure latencies" in first.done.err


def test_the_splits_share_nothing_and_none_of_it_was_trained_on(first: Built) -> None:
    splits = first.splits()
    parts = {
        "calibration": splits.calibration,
        "search": splits.search,
        "verification": splits.verification,
    }
    for tier in ("exact", "fast"):
        assert first.plan(tier)["search"]["splits"] == {
            name: {"n": part.n, "sha256": part.sha256} for name, part in parts.items()
        }
    texts = [text.lower() for part in parts.values() for text in part.texts]
    assert len(set(texts)) == len(texts) == 1260
    assert not set(texts) & {row["text"] for row in small().trained_rows}


def test_accuracies_are_those_of_the_served_files(planted: Built) -> None:
    """Counted again with what was written, on rows that are read again."""
    rows = planted.splits().verification
    gold = label_ids(rows, LABELS)
    tiers = ("exact", "d4", "d8", "under")
    right = {
        tier: pipeline.load(planted.out, tier).logits(rows.texts).argmax(axis=1) == gold
        for tier in tiers
    }
    for tier in tiers:
        counts = evaluate.paired_counts(right["exact"], right[tier])
        row, plan = planted.tier(tier), planted.plan(tier)
        assert row["value"] == round(100 * right[tier].mean(), 3)
        assert row["ci95"] == [
            round(100 * end, 3) for end in evaluate.wilson_interval(right[tier].sum(), rows.n)
        ]
        assert plan["measured"]["changed"] == [counts.b, counts.c]
        assert plan["measured"]["drop_bound"] == evaluate.drop_upper_bound(*counts, 0.05)
        if tier != "exact":
            assert row["drop_bound"] == round(100 * plan["measured"]["drop_bound"], 3)
    assert right["under"].sum() < right["exact"].sum()


def test_exact_is_transformers_own_answer(first: Built) -> None:
    import torch
    import transformers

    made = small()
    model = transformers.BertForSequenceClassification.from_pretrained(made.checkpoint).eval()
    served = pipeline.load(first.out, "exact")
    texts = first.splits().verification.texts[:40]
    with torch.no_grad():
        expected = [
            model(torch.tensor([e.ids.tolist()])).logits[0].numpy()
            for e in served.text.encode(texts)
        ]
    np.testing.assert_allclose(served.logits(texts), np.stack(expected), rtol=0, atol=1e-4)


def test_scales_come_from_the_calibration_rows(planted: Built) -> None:
    """The first site's input is the embeddings' output; minmax takes its largest magnitude."""
    import torch
    import transformers

    model = transformers.BertModel.from_pretrained(small().checkpoint).eval()
    served = pipeline.load(planted.out, "exact")
    largest = {}
    for name, rows in vars(planted.splits()).items():
        if name in ("calibration", "search"):
            with torch.no_grad():
                largest[name] = max(
                    float(model.embeddings(torch.tensor([e.ids.tolist()])).abs().max())
                    for e in served.text.encode(rows.texts)
                )
    scale = planted.plan("under")["scales"]["layer.0.qkv.input_scale"]
    assert scale == pytest.approx(largest["calibration"] / 127, rel=1e-4)
    assert scale != pytest.approx(largest["search"] / 127, rel=1e-4)


def test_provenance(planted: Built) -> None:
    checkpoint = load_checkpoint(small().checkpoint)
    for name in planted.config.tiers:
        plan = planted.plan(name)
        assert set(plan) == {
            *("schema", "model_sha256", "config", "backend", "device", "mode", "sites"),
            *("search", "measured", "modelled", "versions", "scales"),
        }  # fmt: skip
        assert plan["schema"] == 1
        assert plan["model_sha256"] == checkpoint.sha256
        assert plan["config"] == {
            "family": "bert", "layers": 3, "hidden": 64, "heads": 2, "ffn": 128,
        }  # fmt: skip
        assert plan["backend"] == choose_backend("auto")
        assert set(plan["device"]) == {"cpu", "isa", "threads"}
        assert plan["device"]["threads"] == 1
        assert {site.rsplit(".", 1)[1] for site in plan["sites"]} == {*GEMMS, "scores", "context"}
        assert len(plan["sites"]) == 18
        search = plan["search"]
        assert set(search) == {"strategy", "seed", "budget_s", "splits", "wish"}
        assert (search["strategy"], search["seed"], search["budget_s"]) == ("samp", 0, None)
        measured = plan["measured"]
        assert set(measured) == {
            *("latency_ms", "metric", "value", "float_value", "changed"),
            *("drop_bound", "alpha", "tests"),
        }  # fmt: skip
        assert (measured["metric"], measured["alpha"]) == ("accuracy", 0.05)
        assert measured["float_value"] == planted.plan("exact")["measured"]["value"]
        assert round(100 * measured["value"], 3) == planted.tier(name)["value"]
        assert plan["modelled"] == {"latency_ms": {"1": MS[plan["mode"]]}}
        assert measured["latency_ms"] == {b: MS[plan["mode"]] * int(b) for b in ("1", "8", "32")}
        kernels = "cpu kernels"
        assert set(plan["versions"]) == {"samp-triton", "torch", "numpy", "tokenizers", kernels}
        assert Plan.from_json(json.dumps(plan)).key() == (
            read_manifest(planted.out).tiers[name].plan_sha256
        )


def test_the_written_build_is_whole(planted: Built) -> None:
    manifest = read_manifest(planted.out)
    verify(manifest)
    assert manifest.labels == LABELS
    assert set(manifest.tiers) == {"exact", *planted.config.tiers}
    assert (planted.out / "current").readlink() == Path("builds", planted.folder.name)
    assert list(planted.out.rglob("*.partial")) == []
    record = planted.record
    assert set(record) == {
        *("config", "candidates", "splits", "warnings"),
        *("plans", "tiers", "observed", "made", "peak_mb", "calibration", "search"),
    }  # fmt: skip
    assert BuildConfig.model_validate(record["config"]) == planted.config
    assert [c["name"] for c in record["candidates"]] == list(MS)


def test_weights_are_int8_where_the_plan_says_so(planted: Built) -> None:
    tensors = load_checkpoint(small().checkpoint).tensors
    seen = set()
    for tier in planted.config.tiers:
        plan = planted.plan(tier)
        with safe_open(planted.encoder(tier) / "weights.safetensors", "numpy") as stored:
            for layer in range(3):
                for site in GEMMS:
                    name = f"layer.{layer}.{site}"
                    weight = stored.get_tensor(f"{name}.weight")
                    extra = {f"{name}.weight_scale", f"{name}.input_scale"}
                    if plan["sites"][name]["precision"] == "fp32":
                        assert weight.dtype == np.float32
                        assert not extra & set(stored.keys())
                        continue
                    seen.add(name)
                    assert weight.dtype == np.int8
                    scale = stored.get_tensor(f"{name}.weight_scale")[:, None]
                    error = np.abs(scale * weight - tensors[f"{name}.weight"])
                    assert (error <= 0.5001 * scale).all()
                    found = stored.get_tensor(f"{name}.input_scale")
                    assert found == np.float32(plan["scales"][f"{name}.input_scale"])
    assert len(seen) == 12, "some site was never quantized, so that this test shows too little"
    assert planted.tier("under")["size_mb"] < 0.7 * planted.tier("exact")["size_mb"]


# which plan a tier gets


def test_drop_tiers_walk_the_sequence_that_the_search_fixed(planted: Built) -> None:
    found = [Candidate(**c) for c in planted.record["candidates"]]
    assert {c.name: c.latency_ms for c in found} == MS
    n = planted.splits().verification.n
    ends = set()
    for name, spec in planted.config.tiers.items():
        if spec.drop is None or spec.latency is not None:
            continue
        plan = planted.plan(name)
        tests = plan["measured"]["tests"]
        promise = spec.drop / 100
        order = [c.name for c in allocate.drop_sequence(found, found[0], promise, n)]
        assert [t["plan"] for t in tests] == order[: len(tests)]
        times = [MS[t["plan"]] for t in tests]
        assert times == sorted(times, reverse=True)
        passed = [t["passed"] for t in tests]
        assert passed == [t["bound"] <= promise for t in tests]
        assert all(passed[:-1])
        assert passed[-1:] == [True] or len(tests) < len(order) or not passed[-1]
        assert (len(tests) == len(order)) or not passed[-1]
        served = [t["plan"] for t in tests if t["passed"]]
        assert plan["mode"] == (served[-1] if served else "float")
        ends.add((bool(served), bool(passed) and not passed[-1]))
    # Some tier took the whole way, and some was stopped after a plan that passed.
    assert {(True, False), (True, True)} <= ends


def test_a_promise_beyond_the_rows(planted: Built) -> None:
    """0.2 points need 1,351 rows even where nothing changes; that is said before all else."""
    row = planted.tier("d0")
    assert row["met"] is False
    assert row["plan"].startswith("float")
    assert planted.tier("d1")["met"] is True
    note = next(w for w in planted.report["warnings"] if w.startswith("tier d0:"))
    assert "needs at least 1,351 verification rows" in note
    assert f"there are {planted.splits().verification.n}" in note
    assert planted.report["warnings"].count(note) == 1
    stage = re.search(r"\(\d+ steps\)", planted.done.err)
    assert stage is not None
    assert planted.done.err.index(f"note: {note}") < stage.start()


def test_ceilings(planted: Built) -> None:
    assert planted.plan("under")["mode"] == "full(3)"
    assert planted.tier("under")["met"] is True
    assert planted.tier("under")["promise"] == {"latency": 50}
    both = planted.plan("both")
    assert {MS[t["plan"]] for t in both["measured"]["tests"]} <= {60.0, 40.0}
    assert both["mode"] in ("full(2)", "full(3)")
    assert planted.tier("both")["met"] is True


def test_a_ceiling_that_nothing_meets(planted: Built) -> None:
    assert planted.done.code == 1
    row = planted.tier("never")
    assert (row["met"], planted.plan("never")["mode"]) == (False, "full(3)")
    note = next(w for w in planted.report["warnings"] if w.startswith("tier never:"))
    assert "no plan is under 10 ms; the nearest, full(3), takes 40.00 ms" in note


def test_a_plan_that_is_slower_when_measured_again(planted: Built, tmp_path: Path) -> None:
    """The search's latencies stay; those at the end are made to say otherwise."""
    out = tmp_path / "out"
    shutil.copytree(planted.out, out, symlinks=True)
    kept = {path: path.read_bytes() for path in (out / "cache").glob("latency-*")}
    (search,) = (path for path, body in kept.items() if len(json.loads(body[32:])) == len(MS))
    set_latencies(out, {name: ms + 15 for name, ms in MS.items()})
    search.write_bytes(kept[search])
    yaml = small().yaml(tmp_path / "b.yaml", out=str(out), tiers=WISHES)
    done = forks().samp("build", "-c", yaml, "--json")
    assert done.code == 1
    assert done.json["forwards"] == 0
    again = Built(out, done, planted.config)
    assert again.tier("under")["latency_ms"]["1"] == 55
    assert again.tier("under")["met"] is False
    note = "tier under: full(3) was under 50 ms in the search and takes 55.00 ms"
    assert any(w.startswith(note) for w in done.json["warnings"])
    plan = again.plan("under")
    assert plan["modelled"]["latency_ms"] == {"1": 40}
    assert plan["measured"]["latency_ms"]["1"] == 55


def test_without_a_wish_the_decay_decides(planted: Built) -> None:
    """Worked out here again from the accuracies: the farthest above the chord, or no loss."""
    found = {c["name"]: c for c in planted.record["candidates"]}
    recommended = []
    for kind in ("ffn_only", "full"):
        line = [found["float"], *(found[f"{kind}({k})"] for k in (1, 2, 3))]
        gained = np.array([100.0 - c["latency_ms"] for c in line])
        smooth = np.minimum.accumulate([c["accuracy"] for c in line])
        slope = (smooth[-1] - smooth[0]) / gained[-1]
        above = smooth - (smooth[0] + slope * gained)
        # The accuracies fall as they are, so that smoothing changes nothing.
        assert [c["accuracy"] for c in line] == sorted((c["accuracy"] for c in line), reverse=True)
        recommended.append(line[int(np.argmax(above))])
    best = min(recommended, key=lambda c: float(c["latency_ms"]))
    assert planted.plan("neither")["mode"] == best["name"]
    assert planted.plan("neither")["measured"]["tests"] == []
    assert best["name"] not in ("float", "full(3)"), "the data show no decay to be aware of"


def test_the_table_says_what_is_not_met(planted: Built) -> None:
    yaml = planted.out.parent / "build.yaml"
    done = forks().samp("build", "-c", yaml)
    assert done.code == 1
    assert done.lines == []
    rows = [line for line in done.out.splitlines() if "NOT MET" in line]
    assert [re.findall(r"[a-z0-9]+", row)[0] for row in rows] == ["d0", "never"]
    assert "note: tier never: no plan is under 10 ms" in done.out


# a second run


def entries(out: Path) -> set[str]:
    return {path.name for path in (out / "cache").iterdir()}


def kinds(names: set[str]) -> dict[str, int]:
    found = [name.partition("-")[0] for name in names]
    return {kind: found.count(kind) for kind in set(found)}


def test_nothing_changed(first: Built) -> None:
    before, folder = entries(first.out), first.folder
    stat = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    done = forks().samp(*flags(small(), first.out))
    assert done.code == 0
    report = done.json
    assert report["forwards"] == 0
    assert report["cache"] == {"hits": sum(first.report["cache"].values()), "misses": 0}
    assert report["tiers"] == first.report["tiers"]
    assert report["warnings"] == first.report["warnings"]
    assert first.folder == folder
    assert entries(first.out) == before
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")} == stat
    assert [path.name for path in (first.out / "builds").iterdir()] == [folder.name]
    assert "search:" not in done.err


def test_a_changed_promise_measures_only_what_is_new(planted: Built, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(planted.out, out, symlinks=True)
    before = entries(out)
    tested = {t["plan"] for n in planted.config.tiers for t in planted.plan(n)["measured"]["tests"]}
    yaml = small().yaml(tmp_path / "b.yaml", out=str(out), tiers={"x": {"drop": 45}, "y": {}})
    done = forks().samp("build", "-c", yaml, "--json")
    assert done.code == 0, done.err
    new = entries(out) - before
    made = Built(out, done, planted.config)
    untested = {t["plan"] for t in made.plan("x")["measured"]["tests"]} - tested
    # The calibration and everything about the search are found; the served plans are timed again,
    # in the mix's bucket with those that passed, in the others by themselves.
    assert kinds(new).get("latency", 0) == 2
    assert set(kinds(new)) <= {"latency", "logits"}
    assert kinds(new).get("logits", 0) <= len(untested) + 1
    assert done.json["cache"]["misses"] == len(new)
    assert made.folder.name != planted.folder.name
    assert (out / "builds" / planted.folder.name).is_dir()


def _another_weight(made: Small, folder: Path) -> dict[str, Any]:
    import torch
    from safetensors.torch import load_file, save_file

    checkpoint = folder / "checkpoint"
    shutil.copytree(made.checkpoint, checkpoint)
    state = load_file(checkpoint / "model.safetensors")
    state["bert.encoder.layer.0.output.dense.weight"] *= torch.tensor(1.01)
    save_file(state, checkpoint / "model.safetensors", metadata={"format": "pt"})
    return {"model": str(checkpoint)}


def _fewer_rows(made: Small, folder: Path) -> dict[str, Any]:
    """Without one row of every split."""
    config = load_config(made.yaml(folder / "old.yaml"), {})
    splits = read_splits(config, [])
    parts = (splits.calibration, splits.search, splits.verification)
    gone = {part.texts[0] for part in parts}
    rows = [row for row in made.rows if row["text"] not in gone]
    return {"data": {"data": str(write_rows(folder / "rows.jsonl", rows))}}


def _shorter(made: Small, folder: Path) -> dict[str, Any]:
    return {"max_length": 20}


@pytest.mark.parametrize("change", [_another_weight, _fewer_rows, _shorter])
def test_a_changed_input_measures_everything_again(
    planted: Built, tmp_path: Path, change: Callable[[Small, Path], Mapping[str, Any]]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    shutil.copytree(planted.out / "cache", out / "cache")
    before = entries(out)
    tiers = {"fast": {"latency": 1000}}
    yaml = small().yaml(tmp_path / "b.yaml", out=str(out), tiers=tiers, **change(small(), tmp_path))
    done = forks().samp("build", "-c", yaml, "--json")
    assert done.code == 0, done.err
    new = kinds(entries(out) - before)
    # Ranges, 7 plans on the search rows and at least float on the others; latencies in the search,
    # of what may be served, and of what is in the other buckets.
    assert new["ranges"] == 1
    assert new["latency"] == 3
    assert new["logits"] >= 8
    assert done.json["cache"]["misses"] == sum(new.values())


# two at once, and stopped


def test_one_build_at_a_time(tmp_path: Path) -> None:
    running = forks().start(*flags(small(), tmp_path))
    assert wait_for(lambda: any((tmp_path / "cache").glob("ranges-*")), 60)
    running.kill(signal.SIGSTOP)
    try:
        second = forks().samp(*flags(small(), tmp_path)[:-1])
    finally:
        running.kill(signal.SIGCONT)
    assert second.code == 1
    assert second.out == ""
    (line,) = second.lines
    assert re.match(rf"samp: busy: .*{re.escape(str(tmp_path))} \(pid {running.pid}\)", line)
    assert running.wait().code == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_build_keeps_what_it_measured(number: int, tmp_path: Path) -> None:
    running = forks().start(*flags(small(), tmp_path))
    assert wait_for(lambda: any((tmp_path / "cache").glob("logits-*")), 60)
    running.kill(number)
    stopped = running.wait()
    assert stopped.code == 130
    assert stopped.out == ""
    assert stopped.lines == ["samp: stopped; what was measured is kept"]
    assert not (tmp_path / "current").exists()
    kept = entries(tmp_path)
    assert not [name for name in kept if name.endswith(".partial")]
    done = forks().samp(*flags(small(), tmp_path))
    assert done.code == 0
    assert done.json["cache"]["misses"] == len(entries(tmp_path) - kept)
    assert "calibrate" not in done.err
