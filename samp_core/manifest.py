"""What a build holds, read and checked: manifest.json, and the hashes of every served file."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from samp_core.errors import SampError

SCHEMA = 1
HASHES = "sha256.json"
MEND = "run the same samp build again; it writes what is missing and leaves the rest"


@dataclass(frozen=True)
class Tier:
    """Where one tier is served. `plan_sha256` is Plan.key()."""

    ensemble: str
    encoder: str
    plan_sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a build holds. `files` is path inside the build -> SHA-256; `folder` is not stored."""

    model: str
    task: str
    labels: tuple[str, ...]
    max_length: int
    default_tier: str
    tiers: Mapping[str, Tier]
    files: Mapping[str, str]
    folder: Path = field(default=Path(), compare=False)

    def chosen(self, tiers: Sequence[str] | None = None) -> list[str]:
        """The tiers asked for in the manifest's order; all of them by default."""
        unknown = [name for name in tiers or () if name not in self.tiers]
        if unknown:
            raise SampError(
                "unknown_tier",
                f"tier {', '.join(map(repr, unknown))} of model {self.model}",
                ", ".join(self.tiers),
                "name one of these, or build it",
            )
        return [name for name in self.tiers if not tiers or name in tiers]

    def models(self, tiers: Sequence[str] | None = None) -> list[str]:
        """The models to load, in this order: tokenizer, encoders, head, ensembles."""
        chosen = [self.tiers[name] for name in self.chosen(tiers)]
        encoders = [tier.encoder for tier in chosen]
        ensembles = [tier.ensemble for tier in chosen]
        return [f"tokenizer_{self.model}", *encoders, f"head_{self.model}", *ensembles]

    def to_json(self) -> str:
        body = asdict(self)
        del body["folder"]
        return json.dumps({"schema": SCHEMA, **body}, indent=1, ensure_ascii=False) + "\n"


def models_folder(out: Path) -> Path:
    """The only folder that Triton is ever pointed at."""
    return out / "current" / "models"


def read_manifest(out: Path, build: str | None = None) -> Manifest:
    """The manifest of the current build, or of the one named (builds/<build>).

    Raises SampError: no build, none of that name, damaged, another schema.
    """
    current = out / "current" if build is None else out / "builds" / build
    if build is not None and not (current / "manifest.json").is_file():
        there = [path.parent.name for path in sorted(out.glob("builds/*/manifest.json"))]
        raise SampError(
            "unknown_build",
            f"{out} holds no build {build!r}",
            ", ".join(there) or "none is there",
            "name one of these; samp status shows them",
        )
    if build is None and not current.is_symlink():
        raise SampError(
            "no_build",
            f"{out} holds no build",
            "the folder that samp build --out wrote",
            f"samp build --out {out}",
        )
    path = current / "manifest.json"
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        if body["schema"] != SCHEMA:
            raise SampError(
                "wrong_schema",
                f"{path}: schema {body['schema']}",
                f"schema {SCHEMA}",
                "build with this version of samp, or serve with the one that built it",
            )
        return Manifest(
            model=body["model"],
            task=body["task"],
            labels=tuple(body["labels"]),
            max_length=body["max_length"],
            default_tier=body["default_tier"],
            tiers={name: Tier(**entry) for name, entry in body["tiers"].items()},
            files=body["files"],
            folder=current.resolve(),
        )
    except OSError as error:
        raise _damaged(str(path), error.strerror or str(error)) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(str(path), f"it is not a manifest ({error})") from None


def verify(
    manifest: Manifest, *, models: Sequence[str] | None = None, largest: int | None = None
) -> None:
    """Check the build's files against the manifest. Raises SampError naming model and file.

    Only those of `models` when given. Files above `largest` bytes are only looked for: the model
    that owns one checks its hash when it loads.
    """
    for name, expected in manifest.files.items():
        model = name.split("/")[1]
        if models is not None and model not in models:
            continue
        path = manifest.folder / name
        where = f"model {model}: {path}"
        if not path.is_file():
            raise _damaged(where, "the file is missing")
        if largest is not None and path.stat().st_size > largest:
            continue
        if file_sha256(path) != expected:
            raise _damaged(where, "its SHA-256 is not the one in manifest.json")


def check_folder(folder: Path) -> None:
    """Check a served version folder against its sha256.json, as a model does before it loads."""
    listing = folder / HASHES
    try:
        expected = json.loads(listing.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(str(listing), f"it cannot be read ({error})") from None
    for name, sha256 in expected.items():
        path = folder / name
        if not path.is_file():
            raise _damaged(str(path), "the file is missing")
        if file_sha256(path) != sha256:
            raise _damaged(str(path), f"its SHA-256 is not the one in {HASHES}")


def hold(build: Path) -> int:
    """Keep a build from being deleted as too old: a descriptor that is held open meanwhile."""
    descriptor = os.open(build / "manifest.json", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    return descriptor


def held(build: Path) -> bool:
    """Whether some process holds the build."""
    with contextlib.suppress(OSError), (build / "manifest.json").open("rb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _damaged(where: str, why: str) -> SampError:
    return SampError(
        "damaged_repository", f"{where}: {why}", "the files that samp build wrote", MEND
    )
