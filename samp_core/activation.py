"""From one set of builds to another inside a running Triton, with no request between the two.

A request of an ensemble takes hold of its three models when it begins, so that what is under way
ends as it began. What a new request meets is decided by the order of the loads: an ensemble whose
parts change together is first moved to copies of the new ones under other names (`next.<model>`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from samp_core.errors import SampError, UsageError
from samp_core.manifest import Manifest

NEXT = "next."


@dataclass(frozen=True)
class Spec:
    """One model as it is to be loaded.

    content: a hash of its files; source: its folder in the build; parts: an ensemble's models in
    their order, empty for a Python model; aliases: which of them are called by another name.
    """

    content: str
    source: Path
    build: str
    parts: tuple[str, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()


View = Mapping[str, Spec]
"""Model name -> what is loaded under it, in load order."""


@dataclass(frozen=True)
class Step:
    """`name` goes from `before` to `after`; None where it is not loaded. settle: wait first."""

    name: str
    before: Spec | None
    after: Spec | None
    settle: bool = False

    def reversed(self) -> Step:
        return Step(self.name, self.after, self.before, self.settle)

    def __str__(self) -> str:
        if self.after is None:
            return f"unload {self.name}"
        return f"load {self.name} of build {self.after.build}"


def view(manifest: Manifest, tiers: Sequence[str] | None = None) -> dict[str, Spec]:
    """What a server of this build's `tiers` (all by default) has loaded."""
    ensembles = {
        tier.ensemble: (f"tokenizer_{manifest.model}", tier.encoder, f"head_{manifest.model}")
        for tier in manifest.tiers.values()
    }
    found = {}
    for name in manifest.models(tiers):
        digest = hashlib.sha256()
        for path, sha256 in sorted(manifest.files.items()):
            if path.split("/")[1] == name:
                digest.update(f"{path} {sha256}\n".encode())
        source = manifest.folder / "models" / name
        parts = ensembles.get(name, ())
        found[name] = Spec(digest.hexdigest(), source, manifest.folder.name, parts)
    return found


def check_names(builds: Mapping[Path, Manifest]) -> None:
    """Refuse two folders of one model: their models would have the same names."""
    models = [manifest.model for manifest in builds.values()]
    for model in models:
        if models.count(model) > 1:
            where = [str(out) for out, manifest in builds.items() if manifest.model == model]
            raise UsageError(
                "same_model",
                f"model {model} in {' and '.join(where)}",
                "each model once",
                "build one of them with another --name, or serve them apart",
            )


def check_meaning(old: Manifest, new: Manifest) -> None:
    """Refuse a build that running clients would misread."""
    for what in ("model", "task", "labels"):
        before, after = getattr(old, what), getattr(new, what)
        if before != after:
            raise SampError(
                "other_meaning",
                f"build {new.folder.name}: {what} {_listed(after)}",
                f"{_listed(before)}, which clients of the running server rely on",
                "serve it beside this one; or --force, and connect clients again",
            )


def _listed(value: Any) -> str:
    return str(value) if isinstance(value, str) else "[" + ", ".join(map(str, value)) + "]"


def plan(before: View, after: View, *, again: Sequence[str] = ()) -> list[Step]:
    """The loads and unloads that lead from one view to the other, whole at every step.

    At each moment the models behind an ensemble are all of `before` or all of `after`; a model
    whose content is the same counts for both, and is left alone unless named in `again`.
    """
    parts = [name for name, spec in after.items() if not spec.parts]
    changed = [n for n in parts if n in before and before[n].content != after[n].content]
    steps = [Step(n, None, after[n]) for n in parts if n not in before]
    repeated = [n for n in again if n in after and n in before and n not in changed]
    steps += [Step(n, before[n], after[n]) for n in repeated if not after[n].parts]
    moved: list[Step] = []
    copies: list[Step] = []
    if _together(before, after, changed):
        copies = [Step(NEXT + n, None, after[n]) for n in changed]
        steps += copies
        for name, spec in after.items():
            touched = [part for part in spec.parts if part in changed]
            if name in before and spec.parts and (touched or _differs(before[name], spec)):
                aliases = tuple((part, NEXT + part) for part in touched)
                moved.append(Step(name, before[name], replace(spec, aliases=aliases)))
        steps += moved
    gone = [n for n, spec in before.items() if n not in after and spec.parts]
    steps += [Step(n, before[n], None) for n in gone]
    settle = bool(moved or gone)
    for name in changed:
        steps.append(Step(name, before[name], after[name], settle))
        settle = False
    now = {**before, **{step.name: step.after for step in moved}}
    for name, spec in after.items():
        if spec.parts and (name not in before or now[name] != spec or name in again):
            steps.append(Step(name, None if name not in before else now[name], spec))
    settle = bool(steps)
    for step in (*copies, *(Step(n, before[n], None) for n in before if n not in after)):
        if step.name not in gone:
            last = step.reversed() if step.before is None else step
            steps.append(replace(last, settle=settle))
            settle = False
    return steps


def _together(before: View, after: View, changed: Sequence[str]) -> bool:
    """Whether some ensemble would meet a mixture if its changed models were loaded one by one."""
    for name, spec in before.items():
        count = len(set(spec.parts) & set(changed))
        if count and (name not in after or count > 1 or _differs(spec, after[name])):
            return True
    return False


def _differs(before: Spec, after: Spec) -> bool:
    return before.content != after.content or before.parts != after.parts


class WayBackFailed(Exception):
    """A step failed, and so did the way back: what is loaded is a mixture. The cause is chained."""


def run(steps: Sequence[Step], do: Callable[[Step], None]) -> None:
    """Do the steps in order. When one raises, those before it are undone in reverse, and it is
    raised again: the way back passes the same whole states as the way there.
    """
    done: list[Step] = []
    try:
        for step in steps:
            do(step)
            done.append(step)
    except Exception as error:
        for step in reversed(done):
            try:
                do(step.reversed())
            except Exception as second:
                raise WayBackFailed(f"{step.reversed()}: {second}") from error
        raise
