"""`samp generate`: repositories from plan files alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forked import Done, forks
from safetensors.numpy import load_file, save_file
from separable import planted_build, small

from samp_core import pipeline
from samp_core.errors import UsageError
from samp_core.generate import read_plans
from samp_core.manifest import read_manifest, verify
from samp_core.tensors import load_tensors

Json = dict[str, Any]
TIERS = {"high": {"drop": 5}, "fast": {"latency": 50}}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build's output folder; `fast` quantizes every layer."""
    out = tmp_path_factory.mktemp("built")
    yaml = small().yaml(out / "build.yaml", out=str(out), tiers=TIERS)
    assert planted_build(yaml, out).code == 0
    assert json.loads(plan_file(out, "fast").read_text())["mode"] == "full(3)"
    return out


def plan_file(out: Path, tier: str) -> Path:
    return out / "current" / "models" / f"encoder_small_{tier}" / "1" / "plan.json"


def edited(built: Path, path: Path, change: Callable[[Json], object]) -> Path:
    """The plan of `fast` without its int8, but with its scales, and a change."""
    plan = json.loads(plan_file(built, "fast").read_text())
    plan["sites"] = json.loads(plan_file(built, "exact").read_text())["sites"]
    change(plan)
    path.write_text(json.dumps(plan))
    return path


def int8(*sites: str, **recipe: Any) -> Callable[[Json], object]:
    """Makes these sites of a plan int8, by its own scales."""

    def change(plan: Json) -> None:
        plan["mode"] = None
        for site in sites:
            plan["sites"][site] = {"precision": "int8", "recipe": recipe}

    return change


def generate(out: Path, *plans: object, more: tuple[object, ...] = ()) -> Done:
    named = [part for plan in plans for part in ("--plan", plan)]
    given = ("--model", small().checkpoint, "--name", "small", "--threads", 1, "--out", out)
    return forks().samp("generate", *named, *given, *more)


def error(done: Done, code: int = 1) -> str:
    """The one line that a failed command writes."""
    assert done.code == code, done
    assert done.out == ""
    (line,) = done.err.splitlines()
    assert line.startswith("samp: ")
    return line


def test_a_builds_plans_make_the_same_tiers_without_data(built: Path, tmp_path: Path) -> None:
    files = [plan_file(built, tier) for tier in ("exact", *TIERS)]
    done = generate(tmp_path, *files, more=("--json",))
    assert done.code == 0, done.err
    before, after = read_manifest(built), read_manifest(tmp_path)
    verify(after)
    assert after.tiers == before.tiers
    assert (after.labels, after.max_length, after.default_tier) == (
        before.labels, before.max_length, "exact",
    )  # fmt: skip
    assert done.json == {
        "repository": str(tmp_path),
        "tiers": [
            {"name": tier, "plan": json.loads(plan_file(built, tier).read_text())["mode"] + rest}
            for tier, rest in ((t, _rest(built, t)) for t in ("exact", *TIERS))
        ],
        "warnings": [],
    }
    for tier in ("exact", *TIERS):
        old, new = plan_file(built, tier), plan_file(tmp_path, tier)
        assert json.loads(new.read_text()) == json.loads(old.read_text())
        stored = load_file(new.with_name("weights.safetensors"))
        for name, tensor in load_file(old.with_name("weights.safetensors")).items():
            np.testing.assert_array_equal(stored[name], tensor)
    # The promise goes along into what clients read.
    config = tmp_path / "current/models/small_high/config.pbtxt"
    same = built / "current/models/small_high/config.pbtxt"
    assert config.read_text() == same.read_text()
    assert "promise_points" in config.read_text()


def _rest(built: Path, tier: str) -> str:
    plan = json.loads(plan_file(built, tier).read_text())
    gemms = [s for s in plan["sites"] if s.rsplit(".", 1)[1] not in ("scores", "context")]
    precisions = [plan["sites"][site]["precision"] for site in gemms]
    counts = {p: precisions.count(p) for p in dict.fromkeys(precisions)}
    ordered = sorted(sorted(counts), key=lambda p: -counts[p])
    return ": " + ", ".join(f"{counts[p]}/12 {p}" for p in ordered) + " GEMMs"


def test_a_plan_edited_by_hand(built: Path, tmp_path: Path) -> None:
    """Two int8 sites that no mode holds together: served so, answered nearly so."""
    sites = ("layer.0.qkv", "layer.2.ffn_in")
    mine = edited(built, tmp_path / "mine.json", int8(*sites))
    done = generate(tmp_path / "out", mine)
    assert done.code == 0, done.err
    assert read_manifest(tmp_path / "out").default_tier == "exact"
    assert list(read_manifest(tmp_path / "out").tiers) == ["exact", "mine"]
    stored = load_file(plan_file(tmp_path / "out", "mine").with_name("weights.safetensors"))
    assert {n for n, t in stored.items() if t.dtype == np.int8} == {f"{s}.weight" for s in sites}
    texts = [row["text"] for row in small().rows[100:200]]
    exact = pipeline.load(tmp_path / "out", "exact").logits(texts)
    answer = pipeline.load(tmp_path / "out", "mine").logits(texts)
    assert 1e-4 < np.abs(answer - exact).max() < 2.0
    assert (answer.argmax(axis=1) == exact.argmax(axis=1)).mean() > 0.9


def test_a_plan_that_no_build_measured_is_said(built: Path, tmp_path: Path) -> None:
    def change(plan: Json) -> None:
        int8("layer.0.qkv")(plan)
        plan.pop("measured")

    mine = edited(built, tmp_path / "mine.json", change)
    done = generate(tmp_path / "out", f"mine={mine}", more=("--json",))
    assert done.code == 0, done.err
    (warning,) = done.json["warnings"]
    assert warning.startswith("the plan of tier mine quantizes sites and was measured by no build")
    assert f"note: {warning}" in done.err


def test_the_plan_says_which_backend(built: Path, tmp_path: Path) -> None:
    """Each its own; an exact tier that is not given follows the first."""

    def change(plan: Json) -> None:
        plan["backend"] = "reference"
        int8("layer.0.scores", "layer.0.context", "layer.0.out")(plan)

    mine = edited(built, tmp_path / "mine.json", change)
    done = generate(tmp_path / "out", mine)
    assert done.code == 0, done.err
    plans = [json.loads(plan_file(tmp_path / "out", t).read_text()) for t in ("exact", "mine")]
    assert [plan["backend"] for plan in plans] == ["reference", "reference"]
    high = plan_file(built, "high")
    done = generate(tmp_path / "both", mine, high)
    assert done.code == 0, done.err
    plans = [
        json.loads(plan_file(tmp_path / "both", t).read_text()) for t in ("exact", "mine", "high")
    ]
    other = json.loads(high.read_text())["backend"]
    assert [plan["backend"] for plan in plans] == ["reference", "reference", other]
    assert other != "reference"
    rows = [row["text"] for row in small().rows[:8]]
    answers = [pipeline.load(tmp_path / "both", t).logits(rows) for t in ("mine", "high")]
    assert np.abs(answers[0] - answers[1]).max() < 2.0


def test_what_the_backend_lacks_is_refused(built: Path, tmp_path: Path) -> None:
    """onednn has no int8 attention."""

    def change(plan: Json) -> None:
        plan["backend"] = "onednn"
        int8("layer.1.scores")(plan)

    mine = edited(built, tmp_path / "mine.json", change)
    line = error(generate(tmp_path / "out", mine))
    assert "layer.1.scores int8" in line
    assert "allowed: fp32" in line
    assert str(mine) in line
    assert "plan again for this backend: samp build --model" in line
    assert "--backend onednn" in line
    assert not (tmp_path / "out" / "current").exists()


def test_the_plan_of_another_checkpoint(built: Path, tmp_path: Path) -> None:
    other = tmp_path / "checkpoint"
    shutil.copytree(small().checkpoint, other)
    state = load_file(other / "model.safetensors")
    state["classifier.bias"] = state["classifier.bias"] + 1
    save_file(state, other / "model.safetensors", metadata={"format": "pt"})
    file = plan_file(built, "fast")
    line = error(generate(tmp_path / "out", file, more=("--model", other)))
    sha = json.loads(file.read_text())["model_sha256"]
    assert line.startswith("samp: plan_mismatch: ")
    assert sha[:12] in line
    assert str(other) in line
    assert f"plan again: samp build --model {other} --data ROWS" in line
    assert not (tmp_path / "out" / "current").exists()


def test_an_int8_plan_edited_to_fp8(built: Path, tmp_path: Path) -> None:
    """Its int8 scales stay; those of fp8 come from data, and fp8 is what is stored and runs."""
    sites = ("layer.0.ffn_in", "layer.1.qkv")

    def change(plan: Json) -> None:
        plan["backend"], plan["mode"] = "reference", None
        for site in sites:
            plan["sites"][site] = {"precision": "fp8", "recipe": {}}
        plan["sites"]["layer.0.out"] = {"precision": "int8", "recipe": {}}

    mine = edited(built, tmp_path / "mine.json", change)
    line = error(generate(tmp_path / "out", mine))
    assert "layer.0.ffn_in.fp8_input_scale" in line
    assert "--data" in line
    done = generate(tmp_path / "out", mine, more=("--data", small().data))
    assert done.code == 0, done.err
    file = plan_file(tmp_path / "out", "mine")
    scales = json.loads(file.read_text())["scales"]
    before = json.loads(mine.read_text())["scales"]
    assert {name: scales[name] for name in before} == before
    for site in sites:  # the same data: calibrated by minmax over 448 in place of 127
        made = scales[f"{site}.fp8_input_scale"] * 448
        assert made == pytest.approx(before[f"{site}.input_scale"] * 127, rel=1e-6)
    stored = load_tensors(file.with_name("weights.safetensors"))
    assert {n for n, t in stored.items() if t.dtype == np.uint8} == {f"{s}.weight" for s in sites}
    texts = [row["text"] for row in small().rows[100:140]]
    served = pipeline.load(tmp_path / "out", "mine")
    exact = pipeline.load(tmp_path / "out", "exact").logits(texts)
    off = np.abs(served.logits(texts) - exact).max()
    assert 1e-4 < off < 2.0
    ran = served.session.executed()
    assert {ran[site] for site in sites} == {"fp8"}
    assert ran["layer.0.out"] == "int8"
    on_cpu = json.loads(mine.read_text()) | {"backend": "onednn"}
    other = tmp_path / "cpu.json"
    other.write_text(json.dumps(on_cpu))
    done = generate(tmp_path / "cpu", other, more=("--data", small().data))
    assert done.code == 1
    assert "onednn gemm: layer.0.ffn_in fp8 static; allowed: fp32" in done.err.splitlines()[-1]


def test_the_plan_of_another_device(built: Path, tmp_path: Path) -> None:
    """Its latencies are not this machine's; without a device it claims none."""
    isa = json.loads(plan_file(built, "fast").read_text())["device"]["isa"]

    def other(plan: Json) -> None:
        plan["device"]["isa"] = "sse9"

    mine = edited(built, tmp_path / "mine.json", other)
    line = error(generate(tmp_path / "out", mine))
    assert line.startswith(f"samp: plan_mismatch: {mine} was made on another device: isa sse9; ")
    assert f"isa {isa}" in line
    backend = json.loads(mine.read_text())["backend"]
    assert f"plan again: samp build --model {small().checkpoint} --data ROWS" in line
    assert f"--backend {backend}" in line
    assert not (tmp_path / "out" / "current").exists()
    bare = edited(built, tmp_path / "bare.json", lambda plan: plan.pop("device"))
    assert generate(tmp_path / "out", bare).code == 0


def test_scales_are_calibrated_from_data(built: Path, tmp_path: Path) -> None:
    """A plan without scales needs rows; from the build's own rows it gets the build's scales."""

    def change(plan: Json) -> None:
        int8("layer.0.ffn_in", "layer.2.ffn_out")(plan)
        plan["scales"] = {}

    bare = edited(built, tmp_path / "bare.json", change)
    line = error(generate(tmp_path / "out", bare), 2)
    assert str(bare) in line
    assert "--data" in line
    done = generate(tmp_path / "out", bare, more=("--data", small().data))
    assert done.code == 0, done.err
    made = json.loads(plan_file(tmp_path / "out", "bare").read_text())["scales"]
    full = json.loads(plan_file(built, "fast").read_text())["scales"]
    assert set(made) == {"layer.0.ffn_in.input_scale", "layer.2.ffn_out.input_scale"}
    for name, scale in made.items():  # Other rows of the same kind of text
        assert scale == pytest.approx(full[name], rel=0.5)


def test_a_scale_is_missing(built: Path, tmp_path: Path) -> None:
    def change(plan: Json) -> None:
        int8("layer.0.ffn_in", "layer.0.ffn_out")(plan)
        del plan["scales"]["layer.0.ffn_out.input_scale"]

    line = error(generate(tmp_path / "out", edited(built, tmp_path / "mine.json", change)))
    assert "layer.0.ffn_out.input_scale" in line


def test_exact_is_fp32(built: Path, tmp_path: Path) -> None:
    mine = edited(built, tmp_path / "mine.json", int8("layer.0.qkv"))
    line = error(generate(tmp_path / "out", f"exact={mine}"), 2)
    assert "1/12 int8" in line
    assert "fp32" in line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ["it is not JSON"]),
        ("[]", ["schema list", "allowed: schema 1"]),
        ('{"schema": 7}', ["schema 7"]),
        ('{"schema": 1}', ["no model_sha256, config, backend, sites"]),
        ("\udcff", ["is not text"]),
    ],
)
def test_a_file_that_is_no_plan(text: str, words: list[str], tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_bytes(text.encode(errors="surrogateescape"))
    done = generate(tmp_path / "out", file)
    line = error(done, done.code)
    assert done.code in (1, 2)
    assert line.startswith(f"samp: bad_plan: {file}")
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (int8("layer.9.qkv"), ["'layer.9.qkv'", "layer.<0..2>"]),
        (int8("layer.0.ffn"), ["'layer.0.ffn'"]),
        (int8("layer.0.qkv", weight="rows"), ["layer.0.qkv", "'rows'", "channel, tensor"]),
        (int8("layer.0.qkv", speed=3), ["layer.0.qkv", "speed"]),
        (lambda p: p["sites"].update({"layer.0.qkv": {"precision": "int7"}}), ["'int7'", "int8"]),
        (lambda p: p["config"].update(hidden=32), ["hidden 32", "hidden 64"]),
        (lambda p: p.update(backend="tpu"), ["'tpu'", "onednn, reference"]),
        (lambda p: p.update(model_sha256=5), ["checkpoint 5"]),
    ],
)
def test_a_plan_that_is_wrong(
    change: Callable[[Json], object], words: list[str], built: Path, tmp_path: Path
) -> None:
    line = error(generate(tmp_path / "out", edited(built, tmp_path / "mine.json", change)))
    assert all(word in line for word in words), line


@pytest.mark.parametrize("search", [None, "fast", {"wish": 3}, {"wish": {"drop": "much"}}])
def test_the_promise_is_not_taken_on_trust(search: Any, built: Path, tmp_path: Path) -> None:
    mine = edited(built, tmp_path / "mine.json", lambda plan: plan.update(search=search))
    assert generate(tmp_path / "out", mine).code == 0
    assert (
        "promise_points"
        not in (tmp_path / "out/current/models/small_mine/config.pbtxt").read_text()
    )


def test_no_such_file(tmp_path: Path) -> None:
    line = error(generate(tmp_path / "out", tmp_path / "none.json"), 2)
    assert f"{tmp_path / 'none.json'}: No such file" in line


def test_names_of_tiers() -> None:
    inside = "out/current/models/encoder_small_fast/1/plan.json"
    assert read_plans(["a=x/plan.json", "x/mine.json", inside]) == {
        "a": Path("x/plan.json"), "mine": Path("x/mine.json"), "fast": Path(inside),
    }  # fmt: skip
    with pytest.raises(UsageError, match="two plans for tier a"):
        read_plans(["a=x.json", "y/a.json"])
