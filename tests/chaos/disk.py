"""Full disk, power cut, read-only folder, clock set back, two builds at once, pickled code."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from place import MODEL, SAMP, WORK, Check, Serving, ask, demo_texts, samp, serve
from separable import small
from tiny import write_tiny

from samp_core import pipeline
from samp_core.control import Control
from samp_core.errors import SampError
from samp_core.manifest import read_manifest, verify

COMMAND = "make chaos CHAOS='--only disk'"
TEXTS = ("a b c d e f g", "abc", "x y z")
# Root may write anywhere; without CAP_DAC_OVERRIDE it obeys permissions as others do.
NO_OVERRIDE = """
import ctypes, os
if os.getuid() == 0:
    ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)  # PR_CAPBSET_DROP
"""


def fresh(name: str) -> Path:
    folder = WORK / "disk" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def limited(size: int) -> str:
    return f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))"


def one_line(done: Any) -> str:
    """The error of a command that failed in one clear line; empty if it did not."""
    lines = [line for line in done.stderr.splitlines() if line and not line.startswith("  ")]
    if done.returncode in (1, 2) and len(lines) == 1 and "Traceback" not in done.stderr:
        return str(lines[0])
    return ""


def full_build() -> Check:
    """A build whose files may not grow beyond a size, beside one that is whole and current."""
    folder = fresh("full")
    out = folder / "out"
    tiers = {"fast": {"latency": 1000}}
    first = small().yaml(folder / "0.yaml", out=str(out), tiers=tiers)
    assert samp("build", "-c", first).returncode == 0
    before = (out / "current").resolve()
    told, bad = [], []
    for size in (0, 100, 4_000, 30_000, 200_000):
        yaml = small().yaml(folder / "n.yaml", out=str(out), tiers=tiers, seed=size + 1)
        done = samp("build", "-c", yaml, first=limited(size))
        told.append(one_line(done))
        verify(read_manifest(out))
        if not told[-1] or (out / "current").resolve() != before:
            bad.append(f"{size}: exit {done.returncode} {done.stderr[-400:]}")
    again = samp("build", "-c", yaml)
    left = list(out.rglob("*.partial"))
    return Check(
        "full disk",
        "samp build at 5 sizes of RLIMIT_FSIZE: exit 1 and one line, the old build stays current "
        "and whole; the next build finishes and sweeps up",
        f"{5 - len(bad)} of 5 so; then exit {again.returncode}, {len(left)} leftovers",
        not bad and again.returncode == 0 and not left,
        COMMAND,
        {"told": told, "bad": bad},
    )


def full_predict(serving: Serving) -> list[Check]:
    """The same for a file of answers, and that file cut at many lengths."""
    folder = fresh("predict")
    rows = folder / "in.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in demo_texts(300)))
    command = ("predict", "--url", serving.grpc, "--tier", "fast", "--in", rows, "--out")
    whole = folder / "whole.jsonl"
    assert samp(*command, whole).returncode == 0
    expected = _answers(whole)
    out = folder / "out.jsonl"
    bad, told = [], []
    for size in (50, 3_000, 20_000):
        done = samp(*command, out, first=limited(size))
        told.append(one_line(done))
        if not told[-1] or out.exists():
            bad.append(f"{size}: exit {done.returncode} {done.stderr[-300:]}")
    done = samp(*command, out)
    right = done.returncode == 0 and _answers(out) == expected
    cut = _cut_answers(command, folder, whole.read_bytes(), expected)
    return [
        Check(
            "full disk",
            "samp predict --in --out at 3 sizes of RLIMIT_FSIZE: one line, no OUT; the same "
            "command afterwards finishes it",
            f"{3 - len(bad)} of 3 so; then {'all 300 answers right' if right else 'WRONG'}",
            not bad and right,
            COMMAND,
            {"told": told, "bad": bad, "stderr": done.stderr[-300:]},
        ),
        cut,
    ]


def _answers(path: Path) -> list[Any]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [(row["index"], row["text"], row["label"], round(row["score"], 3)) for row in rows]


def _cut_answers(command: Any, folder: Path, whole: bytes, expected: list[Any]) -> Check:
    draw, bad = random.Random(0), []
    lengths = [0, 1, len(whole) - 1, *(draw.randrange(len(whole)) for _ in range(3))]
    for number, length in enumerate(lengths):
        out = folder / f"cut{number}.jsonl"
        # What a power cut leaves: the record, and any length of the part, or junk behind it.
        record = (folder / "whole.jsonl.job").read_text().replace('"done": true', '"done": false')
        out.with_name(out.name + ".job").write_text(record)
        junk = b"\0" * 50 if number % 2 else b""
        out.with_name(out.name + ".part").write_bytes(whole[:length] + junk)
        done = samp(*command, out)
        if done.returncode or _answers(out) != expected:
            bad.append(f"{length}: exit {done.returncode} {done.stderr[-300:]}")
    return Check(
        "power cut",
        f"samp predict --out cut at {len(lengths)} lengths, zeros behind some: the same command "
        "goes on and ends with the same answers",
        f"{len(lengths) - len(bad)} of {len(lengths)}",
        not bad,
        COMMAND,
        {"bad": bad},
    )


def cut_build(most: int) -> Check:
    """Every file of a build cut at many lengths: the old answer, or one clear error."""
    out = fresh("cut") / "out"
    write_tiny(out, seed=1)
    expected = pipeline.load(out).predict(TEXTS)["SCORES"]
    build = (out / "current").resolve()
    draw, cuts, bad, same = random.Random(0), 0, [], 0
    for path in sorted(p for p in build.rglob("*") if p.is_file() and p.name != "build.json"):
        content = path.read_bytes()
        every = range(len(content))
        chosen = every if len(content) <= most else draw.sample(every, most)
        for length in chosen:
            path.write_bytes(content[:length])
            cuts += 1
            try:
                verify(read_manifest(out))
                got = pipeline.load(out).predict(TEXTS)["SCORES"]
            except SampError as error:
                if "\n" in str(error):
                    bad.append(f"{path.name} at {length}: {error}")
            except Exception as error:
                bad.append(f"{path.name} at {length}: {type(error).__name__}: {error}")
            else:
                same += 1
                if not np.array_equal(got, expected):
                    bad.append(f"{path.name} at {length}: another answer")
        path.write_bytes(content)
    return Check(
        "power cut",
        "every file of a build (manifest, plan, weights, configs, tokenizer, head) cut at "
        f"up to {most} lengths each: one clear error, or the whole old answer",
        f"{cuts:,} cuts: {cuts - same - len(bad):,} errors, {same} the old answer, {len(bad)} "
        "anything else",
        not bad,
        COMMAND,
        {"bad": bad[:20]},
    )


def cut_cache() -> Check:
    """Every entry of a build's cache cut somewhere: the next build makes it again."""
    folder = fresh("cache")
    out = folder / "out"
    yaml = small().yaml(folder / "b.yaml", out=str(out), tiers={"fast": {"latency": 1000}})
    before = samp("build", "-c", yaml, "--json")
    draw = random.Random(0)
    entries = [path for path in (out / "cache").iterdir() if path.is_file()]
    for path in entries:
        content = path.read_bytes()
        path.write_bytes(content[: draw.randrange(len(content))])
    after = samp("build", "-c", yaml, "--json")
    one, two = json.loads(before.stdout), json.loads(after.stdout)
    figures = [[(t["name"], t["value"]) for t in made["tiers"]] for made in (one, two)]
    verify(read_manifest(out))
    # A build finds again what it made itself a moment before: as often as the first one did.
    believed = two["cache"]["hits"] - one["cache"]["hits"]
    right = after.returncode == 0 and figures[0][0] == figures[1][0] and believed == 0
    return Check(
        "power cut",
        "all entries of a build's cache cut at random lengths: none is believed",
        f"{len(entries)} entries cut; the next build: exit {after.returncode}, "
        f"{believed} taken from the cut ones, float accuracy "
        f"{'the same' if figures[0][0] == figures[1][0] else 'CHANGED'}",
        right,
        COMMAND,
        {"tiers": figures},
    )


def read_only() -> Check:
    """A folder that may not be written: it is served; a build and an activation are one line."""
    folder = fresh("read-only")
    out = folder / "out"
    builds = [write_tiny(out, seed=seed) for seed in (1, 2)]
    expected = pipeline.load(out).predict(TEXTS)["SCORES"]
    for path in (out, *out.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o555 if path.is_dir() else 0o444)
    yaml = small().yaml(folder / "b.yaml", out=str(out), tiers={"fast": {"latency": 1000}})
    try:
        with serve(out) as serving:
            answer = ask(serving.grpc, "tiny_exact", TEXTS)["SCORES"]
        build = samp("build", "-c", yaml, first=NO_OVERRIDE)
        change = samp("activate", out, "--build", builds[0].name, first=NO_OVERRIDE)
    finally:
        for path in (out, *out.rglob("*")):
            if not path.is_symlink():
                path.chmod(0o755)
    told = [one_line(build), one_line(change)]
    right = np.allclose(answer, expected, atol=1e-5)
    stays = (out / "current").resolve() == builds[1]
    return Check(
        "read-only folder",
        "samp serve works on it; samp build and samp activate say so in one line",
        f"answers {'right' if right else 'WRONG'}; build exit {build.returncode}, activate exit "
        f"{change.returncode}, the current build {'stays' if stays else 'CHANGED'}",
        bool(right and all(told) and stays),
        COMMAND,
        {"told": told, "stderr": [d.stderr[-300:] for d in (build, change) if not one_line(d)]},
    )


def clock() -> Check:
    """A clock set back by a year after a load: what is activated then is loaded all the same."""
    out = fresh("clock") / "out"
    builds = [write_tiny(out, seed=seed) for seed in (1, 2)]
    future = time.time() + 365 * 86400
    with serve(out) as serving:
        words = Path(f"/proc/{serving.triton}/cmdline").read_text().split("\0")
        stage = Path(next(w for w in words if w.startswith("--model-repository=")).split("=")[1])
        before = ask(serving.grpc, "tiny_exact", TEXTS)["SCORES"]
        # As if all had been written and loaded in the future.
        for path in (*stage.rglob("*"), *out.rglob("*")):
            os.utime(path, (future, future), follow_symlinks=True)
        control = Control(serving.http)
        for name in serving.facts["models"]:
            control.load(name)
        old = serving.stubs()
        reload = samp("activate", out, "--reload")
        fresh_ = all(old[name] != pids for name, pids in serving.stubs().items())
        back = samp("activate", out, "--build", builds[0].name)
        answer = ask(serving.grpc, "tiny_exact", TEXTS)["SCORES"]
    expected = pipeline.load(out).predict(TEXTS)["SCORES"]
    right = bool(np.allclose(answer, expected, atol=1e-5) and not np.allclose(answer, before))
    return Check(
        "clock set back",
        "by a year, after a load: samp activate --reload starts new processes, and samp activate "
        "of another build serves it",
        f"reload exit {reload.returncode}, processes {'new' if fresh_ else 'THE OLD ONES'}; "
        f"activate exit {back.returncode}, answers {'of that build' if right else 'WRONG'}",
        right and fresh_,
        COMMAND,
        {"stderr": [d.stderr[-300:] for d in (reload, back) if d.returncode]},
    )


def two_builds() -> Check:
    """A second build into a folder while the first one runs."""
    folder = fresh("two")
    out = folder / "out"
    yaml = small().yaml(folder / "b.yaml", out=str(out), tiers={"fast": {"latency": 1000}})
    first = subprocess.Popen([SAMP, "build", "-c", str(yaml)], stderr=subprocess.DEVNULL)
    while not ((out / ".lock").exists() and (out / ".lock").read_text().strip()):
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)  # else a fast machine is done before the second has begun
    try:
        second = samp("build", "-c", yaml)
    finally:
        first.send_signal(signal.SIGCONT)
    code = first.wait(120)
    verify(read_manifest(out))
    named = f"pid {first.pid}" in second.stderr
    return Check(
        "two builds",
        "into one folder: the second exits 1 and names the first's pid",
        f"exits {code} and {second.returncode}; the pid {'named' if named else 'NOT NAMED'}",
        code == 0 and second.returncode == 1 and named,
        COMMAND,
    )


class _Evil:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def pickles() -> Check:
    """A checkpoint and a cache entry that hold code: neither is executed."""
    import hashlib
    import io

    folder = fresh("pickles")
    mark = folder / "executed"
    checkpoint = folder / "checkpoint"
    shutil.copytree(small().checkpoint, checkpoint)
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps({"w": _Evil(mark)}))
    out = folder / "out"
    yaml = small().yaml(
        folder / "b.yaml", out=str(out), model=str(checkpoint), tiers={"fast": {"latency": 1000}}
    )
    refused = samp("build", "-c", yaml)
    yaml = small().yaml(folder / "c.yaml", out=str(out), tiers={"fast": {"latency": 1000}})
    assert samp("build", "-c", yaml).returncode == 0
    spoiled = 0
    for path in (out / "cache").glob("*.npz"):
        with np.load(io.BytesIO(path.read_bytes()[32:])) as stored:
            names = list(stored.files)
        buffer = io.BytesIO()
        evil = np.array([_Evil(mark)], dtype=object)
        np.savez(buffer, **dict.fromkeys(names, evil))  # type: ignore[arg-type]
        content = buffer.getvalue()
        path.write_bytes(hashlib.sha256(content).digest() + content)
        spoiled += 1
    built = samp("build", "-c", yaml)
    return Check(
        "pickled code",
        "in pytorch_model.bin, and in every array entry of a build's cache (with a right digest)",
        f"{'EXECUTED' if mark.exists() else 'never executed'}; checkpoint: exit "
        f"{refused.returncode}; {spoiled} cache entries: exit {built.returncode}",
        not mark.exists() and refused.returncode == 1 and spoiled > 0,
        COMMAND,
        {"told": refused.stderr[-600:], "cache": built.stderr[-300:] if built.returncode else ""},
    )


def campaign(serving: Serving, short: bool) -> list[Check]:
    assert serving.facts["models"][0].endswith(MODEL)
    parts: list[Callable[[], Check | list[Check]]] = [
        full_build, lambda: full_predict(serving), lambda: cut_build(60 if short else 2_500),
        cut_cache, read_only, clock, two_builds, pickles,
    ]  # fmt: skip
    checks: list[Check] = []
    for part in parts:
        made = part()
        checks += made if isinstance(made, list) else [made]
    return checks
