"""BuildConfig and TierSpec: what the user asks for, checked. One YAML and flag surface."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from samp_core.errors import UsageError
from samp_core.model_config import QUEUE_S
from samp_core.tasks import TaskName

NAME = re.compile(r"[a-z0-9-]+")
BUCKETS = ("1", "8", "32")
"""Texts in a batch for which latencies are measured; `mix` weighs them."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TierSpec(_Strict):
    """A promise: the largest drop in points, a latency ceiling in ms, both, or neither.

    drop -> the fastest plan that holds it; latency -> the most accurate plan under it; both -> the
    fastest that holds both; neither -> the decay-aware recommendation.
    """

    drop: Annotated[float, Field(gt=0, le=100)] | None = None
    latency: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    @property
    def free(self) -> bool:
        """Neither a drop nor a ceiling: the recommendation along SAMP's modes."""
        return self.drop is None and self.latency is None


class DataSpec(_Strict):
    """Labelled files. `data` alone is split in three; `exclude` are rows that trained the model."""

    data: Path | None = None
    calibration: Path | None = None
    search: Path | None = None
    verification: Path | None = None
    exclude: Path | None = None

    @model_validator(mode="after")
    def _one_way(self) -> DataSpec:
        if (self.data is None) == (self.verification is None):
            raise ValueError("give one file `data`, or `search` and `verification`")
        if self.verification is not None and self.search is None:
            raise ValueError("`verification` needs `search` beside it")
        return self


class RowCounts(_Strict):
    """How many rows calibrate and how many choose; every other row verifies."""

    calibration: Annotated[int, Field(ge=8)] = 256
    search: Annotated[int, Field(ge=16)] = 1024


DEFAULT_TIERS = {
    "high": TierSpec(drop=0.5),
    "balanced": TierSpec(drop=1.0),
    "fast": TierSpec(drop=2.0),
}


class BuildConfig(_Strict):
    """One build. `exact` (fp32) is always made; `tiers` are the promises beside it."""

    model: Path
    data: DataSpec
    name: str
    task: TaskName = "classification"
    head: Path | None = None
    out: Path | None = None
    tiers: Mapping[str, TierSpec] = Field(default_factory=lambda: dict(DEFAULT_TIERS))
    default_tier: str = ""
    backend: Literal["auto", "cpu", "cuda", "onednn", "reference"] = "auto"
    precisions: tuple[Literal["fp32", "fp16", "bf16", "int8", "fp8"], ...] = ()
    """What plans may choose; fp32 is always there. Empty: fp16 and int8 as the backend has them."""
    threads: Annotated[int, Field(ge=1)] = Field(default_factory=lambda: os.cpu_count() or 1)
    calibrator: Literal["auto", "minmax", "percentile", "mse", "entropy"] = "auto"
    activation: Literal["auto", "static", "token"] = "auto"
    percentile: Annotated[float, Field(gt=50, le=100)] = 99.99
    max_length: Annotated[int, Field(ge=4)] | None = None
    stride: Annotated[int, Field(ge=0)] | None = None
    windows: Annotated[int, Field(ge=1, le=256)] = 16
    words: Literal["tokenizer", "spaces"] = "tokenizer"
    pooling: Literal["auto", "mean", "first"] = "auto"
    rows: RowCounts = RowCounts()
    strategy: Literal["milp", "samp", "greedy", "lower-loss"] = "milp"
    order: Literal["first", "last", "sensitivity"] = "first"
    budget_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 600.0
    mix: Mapping[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(
        default_factory=lambda: {"1": 1.0}
    )
    mix_texts: Path | None = None
    """`mix: FILE` in the YAML: the mix is read from a sample of texts, see mix.py."""
    queue_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = QUEUE_S
    """The most seconds of work that may wait for a tier of the server."""
    seed: int = 0
    alpha: Annotated[float, Field(gt=0, lt=0.5)] = 0.05

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        value = dict(value)
        if isinstance(value.get("data"), (str, Path)):
            value["data"] = {"data": value["data"]}
        if isinstance(value.get("precisions"), str):
            value["precisions"] = [p.strip() for p in value["precisions"].split(",")]
        if isinstance(value.get("mix"), (str, Path)):
            value["mix_texts"] = value.pop("mix")
        if "name" not in value and isinstance(value.get("model"), (str, Path)):
            raw = Path(value["model"]).resolve().name.lower()
            value["name"] = re.sub(r"[^a-z0-9]+", "-", raw).strip("-") or "model"
        return value

    @model_validator(mode="after")
    def _names(self) -> BuildConfig:
        for name in (self.name, *self.tiers):
            if not NAME.fullmatch(name):
                raise ValueError(f"name {name!r}: only a-z, 0-9 and - are allowed")
        if "exact" in self.tiers:
            raise ValueError("tier 'exact' is always made; leave it out of tiers")
        if not self.mix_texts and (not self.mix or not set(self.mix) <= set(BUCKETS)):
            raise ValueError(
                f"mix {dict(self.mix)}: weights of one or more of {', '.join(BUCKETS)}, or a file"
            )
        if self.default_tier and self.default_tier not in ("exact", *self.tiers):
            known = ", ".join(("exact", *self.tiers))
            raise ValueError(f"default_tier {self.default_tier!r} is none of {known}")
        return self

    @property
    def folder(self) -> Path:
        """The output folder: `out`, else model_repository/<name>."""
        return self.out or Path("model_repository") / self.name

    @property
    def served_by_default(self) -> str:
        if self.default_tier:
            return self.default_tier
        return "balanced" if "balanced" in self.tiers else next(iter(self.tiers), "exact")


def load_config(path: Path | None, overrides: Mapping[str, Any]) -> BuildConfig:
    """A YAML file with flags laid over it, or the build.json of a build, which is made again with
    what it was asked for and this machine's threads. Raises UsageError naming the field.
    """
    raw = {} if path is None else _read(path)
    raw.update({key: value for key, value in overrides.items() if value is not None})
    for needed, flag in (("model", "--model"), ("data", "--data")):
        if needed not in raw:
            raise UsageError("bad_config", f"no {needed}", f"{needed} or {flag}", "say which")
    try:
        return BuildConfig.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "build"
        given = f"{place}: {first['msg'].removeprefix('Value error, ')}"
        if first["type"] != "value_error" and not isinstance(first["input"], dict):
            given += f" (got {first['input']!r})"
        allowed = ", ".join(_part(first["loc"]).model_fields)
        raise UsageError("bad_config", given, f"fields {allowed}", "correct the field") from None


def _read(path: Path) -> dict[str, Any]:
    """The fields of a YAML file or of a build.json."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        if path.name == "build.json":
            return _asked(json.loads(text), path)
        _check_keys(yaml.compose(text, Loader=yaml.SafeLoader), path)
        loaded = yaml.safe_load(text)
    except OSError as error:
        raise UsageError(
            "no_config", f"{path}: {error.strerror}", "a readable YAML file", "check the path"
        ) from None
    except (yaml.YAMLError, ValueError) as error:  # bytes that are no text are a ValueError
        reason = " ".join(str(error).split())
        raise UsageError("bad_config", f"{path}: {reason}", "YAML", "mend it") from None
    if not isinstance(loaded, dict):
        got = type(loaded).__name__
        raise UsageError("bad_config", f"{path} holds a {got}", "a mapping", "see samp build -h")
    return loaded


def _asked(record: Any, path: Path) -> dict[str, Any]:
    """What a finished build was asked for."""
    given = record.get("config") if isinstance(record, dict) else None
    if not isinstance(given, dict):
        raise UsageError(
            "bad_config", f"{path} holds no configuration", "one that samp build wrote",
            "say it by flags: --model, --data",
        )  # fmt: skip
    return {name: value for name, value in given.items() if value is not None and name != "threads"}


def _check_keys(node: Any, path: Path) -> None:
    """Every key of a YAML mapping once: a second tier of one name would silently win."""
    value: Any = getattr(node, "value", None)
    if not isinstance(value, list):  # a scalar, or an empty file
        return
    pairs = [pair for pair in value if isinstance(pair, tuple)]
    names = [key.value for key, _ in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        line = next(key.start_mark.line for key, _ in pairs[::-1] if key.value == twice) + 1
        raise UsageError(
            "bad_config", f"{path}:{line}: {twice!r} stands there twice", "each name once",
            "rename or remove one",
        )  # fmt: skip
    for child in [value for _, value in pairs] or value:
        _check_keys(child, path)


def _part(place: tuple[int | str, ...]) -> type[_Strict]:
    """The part of the configuration that holds the field at this place."""
    parts: dict[int | str, type[_Strict]] = {"data": DataSpec, "rows": RowCounts}
    if len(place) > 2 and place[0] == "tiers":
        return TierSpec
    return parts.get(place[0], BuildConfig) if len(place) > 1 else BuildConfig


def parse_budget(text: str) -> float:
    """Seconds of `90s`, `10m`, `1.5h` or a plain number of seconds."""
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    number, unit = (text[:-1], units[text[-1]]) if text[-1:] in units else (text, 1.0)
    try:
        seconds = float(number) * unit
    except ValueError:
        seconds = 0.0
    if not 0.0 < seconds < float("inf"):
        raise UsageError("bad_budget", f"--budget {text}", "90s, 10m or 1h", "write it like this")
    return seconds


def parse_tier(text: str) -> tuple[str, TierSpec]:
    """`NAME`, `NAME:drop=0.5pt`, `NAME:latency=8ms` or `NAME:drop=0.5pt,latency=8ms`."""
    name, _, body = text.partition(":")
    fields: dict[str, float] = {}
    for part in filter(None, body.split(",")):
        key, _, value = part.partition("=")
        unit = {"drop": "pt", "latency": "ms"}.get(key)
        try:
            if unit is None or key in fields:
                raise ValueError
            fields[key] = float(value.removesuffix(unit))
        except ValueError:
            raise UsageError(
                "bad_tier", f"--tier {text}", "NAME:drop=0.5pt,latency=8ms", "write it like this"
            ) from None
    try:
        return name, TierSpec.model_validate(fields)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise UsageError(
            "bad_tier", f"--tier {text}: {reason}", "drop in (0, 100] pt, latency > 0 ms", "mend it"
        ) from None
