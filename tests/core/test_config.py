"""What the user asks for: one YAML and flag surface, and every mistake as one clear error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from samp_core.config import BuildConfig, DataSpec, TierSpec, load_config, parse_tier
from samp_core.errors import UsageError

GOOD: dict[str, Any] = {"model": "models/My_Model.v2", "data": "rows.jsonl"}


def config(**changes: Any) -> BuildConfig:
    return load_config(None, {**GOOD, **changes})


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "build.yaml"
    file.write_text(text)
    return file


def refuse(code: str, *words: str, file: Path | None = None, **flags: Any) -> UsageError:
    with pytest.raises(UsageError) as caught:
        load_config(file, flags)
    error = caught.value
    assert error.code == code
    assert error.exit_code == 2
    assert "\n" not in str(error)
    for word in words:
        assert word in str(error)
    assert error.allowed
    return error


def test_two_flags_are_enough() -> None:
    build = config()
    assert build.name == "my-model-v2"
    assert build.folder == Path("model_repository/my-model-v2")
    assert build.data == DataSpec(data=Path("rows.jsonl"))
    assert {name: tier.drop for name, tier in build.tiers.items()} == {
        "high": 0.5, "balanced": 1.0, "fast": 2.0,
    }  # fmt: skip
    assert (build.task, build.backend, build.calibrator) == ("classification", "auto", "auto")
    assert (build.rows.calibration, build.rows.search) == (256, 1024)
    assert (build.alpha, build.seed, build.percentile) == (0.05, 0, 99.99)
    assert build.threads >= 1
    assert build.served_by_default == "balanced"


YAML = """
model: models/minilm
name: reviews
out: somewhere
backend: reference
threads: 3
calibrator: percentile
percentile: 99.9
max_length: 128
rows: {calibration: 64, search: 500}
default_tier: quick
data: {calibration: c.csv, search: s.csv, verification: v.csv, exclude: train.csv}
tiers:
  quick: {latency: 4.5}
  sure: {drop: 0.25, latency: 9}
  free: {}
"""


def test_a_yaml_file(tmp_path: Path) -> None:
    build = load_config(write(tmp_path, YAML), {})
    assert build.model == Path("models/minilm")
    assert (build.name, build.folder, build.backend) == ("reviews", Path("somewhere"), "reference")
    assert build.tiers == {
        "quick": TierSpec(latency=4.5),
        "sure": TierSpec(drop=0.25, latency=9),
        "free": TierSpec(),
    }
    assert build.data.verification == Path("v.csv")
    assert build.rows.search == 500
    assert build.served_by_default == "quick"


def test_flags_lie_over_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, YAML)
    build = load_config(
        file, {"threads": 1, "name": None, "tiers": {"only": {"drop": 3}}, "default_tier": ""}
    )
    assert (build.threads, build.name) == (1, "reviews")
    assert list(build.tiers) == ["only"]
    assert build.served_by_default == "only"


def test_it_is_written_and_read_back() -> None:
    """The build's record holds the config as JSON."""
    build = config(tiers={"a": {"drop": 1.5}}, max_length=64)
    assert BuildConfig.model_validate(build.model_dump(mode="json")) == build


@pytest.mark.parametrize(
    ("model", "name"),
    [("a/MiniLM-L6", "minilm-l6"), ("a/b_c.d", "b-c-d"), ("a/--x--", "x"), ("a/模型", "model")],
)
def test_the_name_comes_from_the_folder(model: str, name: str) -> None:
    assert config(model=model).name == name


@pytest.mark.parametrize(
    ("tiers", "default"), [({}, "exact"), ({"a": {}}, "a"), ({"a": {}, "balanced": {}}, "balanced")]
)
def test_the_default_tier(tiers: dict[str, Any], default: str) -> None:
    assert config(tiers=tiers).served_by_default == default
    assert config(tiers=tiers, default_tier="exact").served_by_default == "exact"


def test_a_config_is_frozen() -> None:
    with pytest.raises(ValidationError):
        config().threads = 4  # type: ignore[misc]


def test_a_mix_may_be_a_file_of_texts() -> None:
    build = config(mix="texts.jsonl")
    assert (build.mix_texts, build.mix) == (Path("texts.jsonl"), {"1": 1.0})
    assert BuildConfig.model_validate(build.model_dump(mode="json")) == build
    resolved = build.model_copy(update={"mix": {"1x12": 0.5, "8x90": 0.5}})
    assert BuildConfig.model_validate(resolved.model_dump(mode="json")) == resolved


# mistakes


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tiers:\n  a: {drop: 1}\n  a: {drop: 2}\n", ["build.yaml:3: 'a' stands there twice"]),
        ("name: x\nname: y\n", ["build.yaml:2: 'name' stands there twice"]),
        ("tiers: {a: {drop: 1, drop: 2}}\n", ["'drop' stands there twice"]),
    ],
)
def test_a_name_that_stands_twice(text: str, words: list[str], tmp_path: Path) -> None:
    refuse("bad_config", *words, file=write(tmp_path, text), model="m", data="d")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": None}, ["no model", "--model"]),
        ({"data": None}, ["no data", "--data"]),
        ({"model": 5}, ["model", "5"]),
        ({"modle": "x"}, ["modle", "allowed: fields model, data"]),
        ({"threads": 0}, ["threads", "greater than or equal to 1", "0"]),
        ({"threads": "two"}, ["threads", "'two'"]),
        ({"backend": "tpu"}, ["backend", "'reference'", "'tpu'"]),
        ({"task": "translation"}, ["task", "'classification'", "'translation'"]),
        ({"calibrator": "max"}, ["calibrator", "'minmax'", "'entropy'"]),
        ({"percentile": 50}, ["percentile", "greater than 50"]),
        ({"percentile": 100.5}, ["percentile", "less than or equal to 100"]),
        ({"max_length": 3}, ["max_length", "4"]),
        ({"alpha": 0.5}, ["alpha", "less than 0.5"]),
        ({"rows": {"calibration": 7}}, ["rows.calibration", "8"]),
        ({"rows": {"verification": 7}}, ["rows.verification"]),
        ({"name": "My Model"}, ["name 'My Model'", "a-z, 0-9 and -"]),
        ({"name": ""}, ["name ''"]),
        ({"tiers": {"Fast!": {}}}, ["name 'Fast!'"]),
        ({"tiers": {"exact": {}}}, ["'exact' is always made"]),
        ({"tiers": {"a": {"drop": 0}}}, ["tiers.a.drop", "greater than 0"]),
        ({"tiers": {"a": {"drop": 101}}}, ["tiers.a.drop", "100"]),
        ({"tiers": {"a": {"latency": -1}}}, ["tiers.a.latency", "greater than 0"]),
        ({"tiers": {"a": {"latency": float("inf")}}}, ["tiers.a.latency", "finite"]),
        ({"tiers": {"a": {"latency": float("nan")}}}, ["tiers.a.latency", "got nan"]),
        ({"tiers": {"a": {"drop": float("nan")}}}, ["tiers.a.drop", "got nan"]),
        ({"tiers": {"a": {"drop": -0.5}}}, ["tiers.a.drop", "greater than 0"]),
        ({"tiers": {"a": {"speed": 1}}}, ["tiers.a.speed"]),
        ({"strategy": "best"}, ["strategy", "'milp', 'samp', 'greedy' or 'lower-loss'", "'best'"]),
        ({"order": "middle"}, ["order", "'first', 'last' or 'sensitivity'", "'middle'"]),
        ({"budget_s": float("inf")}, ["budget_s", "finite"]),
        ({"budget_s": -1}, ["budget_s", "greater than 0"]),
        ({"mix": {}}, ["mix {}", "1, 8, 32, or a file"]),
        ({"mix": {"4": 1}}, ["1, 8, 32, or a file"]),
        ({"mix": {"1": -1}}, ["mix.1", "greater than 0"]),
        ({"mix": 5}, ["mix", "5"]),
        ({"tiers": "fast"}, ["tiers", "'fast'"]),
        ({"default_tier": "turbo"}, ["'turbo' is none of exact, high, balanced, fast"]),
        ({"data": {}}, ["data", "one file `data`, or `search` and `verification`"]),
        ({"data": {"data": "a", "verification": "b"}}, ["data", "one file `data`"]),
        ({"data": {"verification": "b"}}, ["data", "needs `search`"]),
        ({"data": {"training": "b"}}, ["data.training"]),
    ],
    ids=str,
)
def test_a_mistake_names_its_field(changes: dict[str, Any], words: list[str]) -> None:
    refuse("bad_config", *words, **{**GOOD, **changes})


@pytest.mark.parametrize(
    ("text", "word"),
    [("model: [", "flow"), ("- model", "holds a list"), ("", "holds a NoneType"), ("x", "a str")],
)
def test_a_broken_file(text: str, word: str, tmp_path: Path) -> None:
    file = write(tmp_path, text)
    refuse("bad_config", str(file), word, file=file, **GOOD)


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    file = tmp_path / "build.yaml"
    file.write_bytes(b"\xff\xfe\x00")
    refuse("bad_config", str(file), file=file)


def test_no_file(tmp_path: Path) -> None:
    refuse("no_config", "nowhere.yaml: No such file", file=tmp_path / "nowhere.yaml")
    refuse("no_config", "Is a directory", file=tmp_path)


# --tier


@pytest.mark.parametrize(
    ("text", "tier"),
    [
        ("fast", ("fast", TierSpec())),
        ("fast:", ("fast", TierSpec())),
        ("fast:drop=0.5pt", ("fast", TierSpec(drop=0.5))),
        ("fast:drop=0.5", ("fast", TierSpec(drop=0.5))),
        ("fast:latency=8ms", ("fast", TierSpec(latency=8))),
        ("fast:drop=0.5pt,latency=8ms", ("fast", TierSpec(drop=0.5, latency=8))),
        ("fast:latency=8,drop=1", ("fast", TierSpec(drop=1, latency=8))),
    ],
)
def test_parse_tier(text: str, tier: tuple[str, TierSpec]) -> None:
    assert parse_tier(text) == tier


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("fast:0.5", "NAME:drop=0.5pt"),
        ("fast:drop", "NAME:drop=0.5pt"),
        ("fast:drop=", "NAME:drop=0.5pt"),
        ("fast:drop=half", "NAME:drop=0.5pt"),
        ("fast:drop=5ms", "NAME:drop=0.5pt"),
        ("fast:latency=5pt", "NAME:drop=0.5pt"),
        ("fast:speed=5", "NAME:drop=0.5pt"),
        ("fast:drop=1,drop=2", "NAME:drop=0.5pt"),
        ("fast:drop=0", "greater than 0"),
        ("fast:drop=-1pt", "greater than 0"),
        ("fast:drop=101", "100"),
        ("fast:drop=nan", "drop in (0, 100] pt"),
        ("fast:latency=0ms", "greater than 0"),
        ("fast:latency=inf", "finite"),
    ],
)
def test_a_bad_tier(text: str, word: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_tier(text)
    assert caught.value.code == "bad_tier"
    assert f"--tier {text}" in caught.value.given
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)
