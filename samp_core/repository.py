"""A finished build on disk: written beside the old one, swapped in by one rename.

<out>/current -> builds/<id>      what is served; swapped by rename
<out>/builds/<id>/                manifest.json, build.json, models/
<out>/cache/  <out>/.lock         shared by builds; held by the running one
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samp_kernels.interface import Array, EncoderConfig, OutputKind

from samp_core import heads, model_config
from samp_core.encoder_files import save_encoder
from samp_core.errors import SampError, UsageError
from samp_core.manifest import HASHES, Manifest, Tier, file_sha256, held, read_manifest, verify
from samp_core.plan import Plan
from samp_core.tensors import save_tensors

if TYPE_CHECKING:
    from samp_core.text import TextEncoder

__all__ = ["TierFiles", "activate", "build_lock", "read_manifest", "verify", "write_build"]

PARTIAL = ".partial"
KEPT = 3  # the current build and two to go back to
_DTYPES = {"BYTES": "STRING", "FP32": "FP32", "INT32": "INT32", "BOOL": "BOOL"}
NAME = re.compile(r"[a-z0-9-]+")


@dataclass(frozen=True)
class TierFiles:
    """What one tier serves: its plan, and the encoder's weights under that plan.

    promise: the tier's largest drop in points, which clients read from the ensemble's config.
    """

    plan: Plan
    weights: Mapping[str, Array]
    promise: float | None = None


@contextlib.contextmanager
def build_lock(out: Path) -> Iterator[None]:
    """Hold `<out>/.lock` while building, and sweep away what a killed build left.

    Raises SampError with the other build's pid when one is running.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        stream = (out / ".lock").open("a+")
    except OSError as error:
        raise UsageError(
            "bad_out", f"{out}: {error.strerror}", "a folder that can be written", "another --out"
        ) from None
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            pid = stream.read().strip() or "unknown"
            raise SampError(
                "busy",
                f"another samp build is writing to {out} (pid {pid})",
                "one build at a time for each --out",
                "wait for it, or stop it",
            ) from None
        stream.truncate(0)
        stream.write(f"{os.getpid()}\n")
        stream.flush()
        remove_leftovers(out)
        yield  # the lock goes with the file; the file stays, or two builds could lock two files


def remove_leftovers(out: Path) -> None:
    """Delete half-written builds and half-swapped links of builds that were killed."""
    for path in (out / "builds").glob(f"*{PARTIAL}"):
        shutil.rmtree(path)
    for path in (*out.glob(f"current.*{PARTIAL}"), *out.glob(f"builds/*/build.json{PARTIAL}")):
        path.unlink()


def write_build(
    out: Path,
    *,
    model: str,
    task: str,
    head: str,
    labels: Sequence[str],
    max_length: int,
    text: TextEncoder,
    head_weights: Mapping[str, Array],
    encoder_config: EncoderConfig,
    tiers: Mapping[str, TierFiles],
    default_tier: str,
    build: Mapping[str, Any],
    threads: int,
    pair: bool = False,
    output: OutputKind | None = None,
    queue_s: float = model_config.QUEUE_S,
) -> Path:
    """Write a whole build, make it the current one, and return its folder.

    output: the encoder's, where the head leaves a choice. queue_s: the most seconds of work that
    may wait for a tier. The caller holds `build_lock`. The name
    is a hash of what is served: the same content written again is the same build, and only
    `current` and build.json change. Raises UsageError on names.
    """
    check_names(model, tiers, default_tier)
    builds = out / "builds"
    builds.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix="new-", suffix=PARTIAL, dir=builds))
    partial.chmod(0o755)
    models = partial / "models"
    models.mkdir()

    spec = heads.get(head)
    if output is not None:
        spec = dataclasses.replace(spec, encoder_output=output)
    tokenizer = model_config.tokenizer_config(
        model, max_length=max_length, pair=pair, places=spec.rows is not None,
        tiers=list(tiers), queue_s=queue_s,
    )  # fmt: skip
    with _version_folder(models, tokenizer, "tokenizer") as folder:
        text.save(folder)
    feature = _feature(spec, encoder_config, len(labels))
    sizes = (len(labels), encoder_config.hidden)
    outputs = [
        model_config.TensorConfig(t.name, _DTYPES[t.datatype], t.shape(*sizes))
        for t in spec.outputs
    ]
    served_head = model_config.head_config(
        model, head=head, feature=feature, outputs=outputs, labels=labels, queue_s=queue_s
    )
    with _version_folder(models, served_head, "head") as folder:
        shutil.copyfile(heads.source_file(head), folder / "head.py")
        save_tensors(folder / "weights.safetensors", head_weights)
    for name, tier in tiers.items():
        encoder = model_config.encoder_config(
            model,
            name,
            feature=feature,
            output=spec.encoder_output,
            plan_sha256=tier.plan.key(),
            threads=threads,
            plan=tier.plan.summary(),
            gpu=tier.plan.backend == "cuda" and tier.plan.device.get("gpu") != "emulated",
            queue_s=queue_s,
            windows="" if text.windows is None else json.dumps(dataclasses.asdict(text.windows)),
        )
        with _version_folder(models, encoder, "encoder") as folder:
            save_encoder(folder, encoder_config, tier.plan)
            save_tensors(folder / "weights.safetensors", tier.weights)
        ensemble = model_config.ensemble_config(
            tokenizer,
            encoder,
            served_head,
            model=model,
            tier=name,
            promise=tier.promise,
        )
        (models / ensemble.name / "1").mkdir(parents=True)
        (models / ensemble.name / "config.pbtxt").write_text(ensemble.to_pbtxt(), encoding="utf-8")

    files = {
        str(path.relative_to(partial)): file_sha256(path)
        for path in sorted(models.rglob("*"))
        if path.is_file()
    }
    manifest = Manifest(
        model=model,
        task=task,
        labels=tuple(labels),
        max_length=max_length,
        default_tier=default_tier,
        tiers={
            name: Tier(f"{model}_{name}", f"encoder_{model}_{name}", tier.plan.key())
            for name, tier in tiers.items()
        },
        files=files,
    )
    (partial / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")
    folder = _place(partial, manifest, json.dumps(dict(build), indent=1, ensure_ascii=False) + "\n")
    activate(out, folder)
    prune(out)
    return folder


def activate(out: Path, build: Path) -> None:
    """Make `build` the current one: touch what Triton looks at, swap one symlink by rename.

    A Triton that is pointed at `current` reloads a model only when a file of its version became
    newer, also on the way back to an older build. `builds_by_age` reads config.pbtxt's time.
    """
    before = (path.stat().st_mtime_ns for path in (out / "current" / "models").rglob("*"))
    newer = max(time.time_ns(), 1 + max(before, default=0))
    for name in ("models/*/config.pbtxt", "models/*/1/model.py"):
        for path in build.glob(name):
            os.utime(path, ns=(newer, newer))
    link = out / f"current.{os.getpid()}{PARTIAL}"
    link.unlink(missing_ok=True)
    link.symlink_to(build.relative_to(out), target_is_directory=True)
    link.replace(out / "current")
    _fsync(out)


def builds_by_age(out: Path) -> list[Path]:
    """The builds of a folder: the current one, then those that were current last."""

    def activated(build: Path) -> int:
        times = (p.stat().st_mtime_ns for p in build.glob("models/*/config.pbtxt"))
        return max(times, default=0)

    current = (out / "current").resolve()
    found = [p.resolve() for p in (out / "builds").glob("*") if p.is_dir() and p.suffix != PARTIAL]
    return sorted(found, key=lambda p: (p == current, activated(p)), reverse=True)


def prune(out: Path, keep: int = KEPT) -> None:
    """Delete all but the `keep` builds that were made current last; a killed one is swept later.

    One that a server still serves stays (manifest.hold).
    """
    for build in builds_by_age(out)[keep:]:
        if held(build):
            continue
        doomed = build.with_name(f"old-{build.name}{PARTIAL}")
        build.rename(doomed)
        shutil.rmtree(doomed)


def check_names(model: str, tiers: Mapping[str, Any] | Sequence[str], default_tier: str) -> None:
    """Names become folders and parts of model names: `[a-z0-9-]+`."""
    for kind, name in (("model", model), *(("tier", tier) for tier in tiers)):
        if not NAME.fullmatch(name):
            raise UsageError(
                "bad_name",
                f"{kind} name {name!r}",
                "small letters, digits and hyphens",
                "choose another name",
            )
    if default_tier not in tiers:
        raise UsageError(
            "unknown_tier", f"default tier {default_tier!r}", ", ".join(tiers), "name one of these"
        )


def _feature(head: heads.Head, encoder: EncoderConfig, labels: int) -> model_config.TensorConfig:
    """What crosses from the encoder to the head."""
    if head.encoder_output == "tokens":
        return model_config.TensorConfig("TOKEN_LOGITS", "FP32", (-1, labels))
    return model_config.TensorConfig("FEATURE", "FP32", (encoder.hidden,))


@contextlib.contextmanager
def _version_folder(models: Path, config: model_config.ModelConfig, role: str) -> Iterator[Path]:
    """`<models>/<name>/1` with the role's model.py; its sha256.json is written at the end."""
    folder = models / config.name / "1"
    folder.mkdir(parents=True)
    template = resources.files("samp_templates").joinpath(role, "model.py")
    (folder / "model.py").write_bytes(template.read_bytes())
    yield folder
    sums = {path.name: file_sha256(path) for path in sorted(folder.iterdir())}
    (folder / HASHES).write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")
    (folder.parent / "config.pbtxt").write_text(config.to_pbtxt(), encoding="utf-8")


def _place(partial: Path, manifest: Manifest, build_json: str) -> Path:
    """Rename a finished partial build to the hash of its content; reuse an intact one of it."""
    builds = partial.parent
    identity = hashlib.sha256(manifest.to_json().encode()).hexdigest()[:16]
    for copy in itertools.count(1):
        target = builds / (identity if copy == 1 else f"{identity}-{copy}")
        if not target.exists():
            (partial / "build.json").write_text(build_json, encoding="utf-8")
            for path in partial.rglob("*"):
                _fsync(path)
            _fsync(partial)
            partial.rename(target)
            _fsync(builds)
            return target
        try:
            verify(dataclasses.replace(manifest, folder=target))
        except SampError:
            continue  # a damaged copy may be in use: it stays, and this build gets another name
        written = target / f"build.json{PARTIAL}"
        written.write_text(build_json, encoding="utf-8")
        _fsync(written)
        written.replace(target / "build.json")
        shutil.rmtree(partial)
        return target
    raise AssertionError


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
