"""`samp serve` as a process, and the commands that call what it serves."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from forked import Done, forks
from samp_kernels.cuda import missing as cuda_missing
from separable import LABELS, planted_build, small, write_rows
from tiny import write_tiny

from samp_core import pipeline
from samp_core.shm import PREFIX, SHM

SAMP = str(Path(sys.executable).with_name("samp"))
FREE = ("--http-port", "0", "--grpc-port", "0", "--metrics-port", "0")
TIERS = {"balanced": {"drop": 60}, "fast": {"latency": 50}}


@dataclass(frozen=True)
class Serving:
    """A `samp serve` that is ready: its process and its ready line."""

    process: subprocess.Popen[str]
    out: Path
    line: Mapping[str, Any]

    @property
    def grpc(self) -> str:
        return str(self.line["grpc"])

    @property
    def http(self) -> str:
        return str(self.line["http"])


def start(out: Path, *more: str) -> Serving:
    command = [SAMP, "serve", str(out), *FREE, "--json", *more]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.communicate()[1]
    return Serving(process, out, json.loads(line))


def regions(triton: psutil.Process) -> Callable[[], list[str]]:
    """Lists the shared memory of one server, also when it has ended; others' is left out."""
    (prefix,) = re.findall(r"shm-region-prefix-name=(\S+)", " ".join(triton.cmdline()))
    assert prefix.startswith(PREFIX)
    return lambda: [path.name for path in SHM.glob(f"{prefix}*")]


def with_children(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """The small checkpoint built; `fast` has every layer in int8."""
    out = tmp_path_factory.mktemp("small")
    yaml = small().yaml(out / "build.yaml", out=str(out), tiers=TIERS)
    assert planted_build(yaml, out).code == 0
    made = start(out)
    yield made
    made.process.send_signal(signal.SIGINT)
    made.process.communicate(timeout=30)


@pytest.fixture(scope="module")
def tiny_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny")
    write_tiny(out)
    return out


def one_line(done: Done, code: int = 1) -> str:
    assert done.code == code, done
    assert done.out == ""
    (line,) = done.lines
    assert line.startswith("samp: ")
    return line


# serve


def test_the_ready_line(serving: Serving) -> None:
    assert set(serving.line) == {"grpc", "http", "metrics", "pid", "models"}
    assert serving.line["models"] == [
        "tokenizer_small",
        *(f"encoder_small_{tier}" for tier in ("exact", *TIERS)),
        "head_small",
        *(f"small_{tier}" for tier in ("exact", *TIERS)),
    ]
    triton = psutil.Process(serving.line["pid"])
    assert triton.name() == "tritonserver"
    assert triton.parent() == psutil.Process(serving.process.pid)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c(number: signal.Signals, tiny_out: Path) -> None:
    """As a terminal sends it: to the process group that the shell made."""
    made = start(tiny_out)
    started = with_children(made.process.pid)
    assert len(started) >= 4  # samp, Triton, three model processes
    left = regions(psutil.Process(made.line["pid"]))
    assert left(), "no shared memory, so that its absence would show nothing"
    assert forks().samp("predict", "--url", made.grpc, "a text").code == 0
    os.killpg(made.process.pid, number)
    out, err = made.process.communicate(timeout=30)
    assert (made.process.returncode, out, err) == (0, "", "")
    assert not [p for p in started if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert left() == []
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(made.grpc.split(":")[1])), timeout=5)


def test_what_a_person_reads(tiny_out: Path) -> None:
    command = [SAMP, "serve", str(tiny_out), *FREE]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    ready, tiers = process.stdout.readline(), process.stdout.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert ready.startswith("ready: gRPC 127.0.0.1:")
    assert (tiers, out) == ("tiers: tiny_exact\n", "")
    assert err == "  starting Triton ...\nstopped\n"


def test_ctrl_c_while_it_starts(tiny_out: Path) -> None:
    command = [SAMP, "serve", str(tiny_out), *FREE, "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    samp = psutil.Process(process.pid)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        children = [p for p in samp.children() if p.name() == "tritonserver"]
        if children and regions(children[0])():
            break
        time.sleep(0.01)
    (triton,) = children
    left = regions(triton)
    children = [triton, *triton.children(recursive=True)]
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    assert err.splitlines() == ["samp: stopped"]
    assert not [p for p in children if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert left() == []


@pytest.mark.parametrize("which", ["http", "grpc", "metrics"])
def test_a_taken_port(which: str, serving: Serving, tiny_out: Path) -> None:
    port = serving.line[which].split(":")[1]
    ports = dict(zip(FREE[::2], FREE[1::2], strict=True)) | {f"--{which}-port": port}
    command = ("serve", tiny_out, *(part for pair in ports.items() for part in pair))
    line = one_line(forks().samp(*command))
    assert line.startswith(f"samp: port_taken: 127.0.0.1:{port} is in use")
    assert "0 for any" in line
    told = forks().samp(*command, "--json")
    assert (told.code, told.err) == (1, "")
    assert told.json["error"]["code"] == "port_taken"


def test_a_damaged_repository(tmp_path: Path) -> None:
    weights = write_tiny(tmp_path) / "models/encoder_tiny_exact/1/weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 4
    weights.write_bytes(content)
    line = one_line(forks().samp("serve", tmp_path, *FREE))
    assert line.startswith("samp: damaged_repository: ")
    assert "weights.safetensors" in line
    assert "samp build" in line


def test_plans_made_on_another_cpu_are_served_with_a_word(tmp_path: Path) -> None:
    write_tiny(tmp_path, device={"cpu": "Another CPU", "isa": "sse9", "threads": 1})
    command = [SAMP, "serve", str(tmp_path), *FREE, "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    grpc = json.loads(process.stdout.readline())["grpc"]
    assert forks().samp("predict", "--url", grpc, "a text").code == 0
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert err.startswith("  note: tiny: the plans of exact were made on cpu Another CPU, isa sse9")
    assert f"plan again: samp build --model CHECKPOINT --data ROWS --out {tmp_path}" in err


@pytest.mark.skipif(not cuda_missing(), reason="backend cuda can run here")
def test_a_plan_that_cannot_run_here_is_refused_before_triton_starts(tmp_path: Path) -> None:
    write_tiny(tmp_path, tiers=("exact",), backend="cuda")
    told = forks().samp("serve", tmp_path, *FREE, "--json")
    assert (told.code, told.err) == (1, "")
    error = told.json["error"]
    assert error["code"] == "unsupported_plan"
    assert error["given"].startswith("tier exact of tiny: backend cuda: ")
    assert "samp build --model CHECKPOINT --data ROWS" in error["fix"]
    assert "--backend auto" in error["fix"]


# predict


def test_predict_arguments(serving: Serving) -> None:
    texts = [row["text"] for row in small().rows[50:53]]
    done = forks().samp("predict", "--url", serving.grpc, "--tier", "exact", *texts)
    assert (done.code, done.err) == (0, "")
    exact = pipeline.load(serving.out, "exact").predict(texts)
    rows = [line.split("\t") for line in done.out.splitlines()]
    assert [row[0] for row in rows] == [label.decode() for label in exact["LABEL"][:, 0]]
    assert [row[2] for row in rows] == texts
    for row, score in zip(rows, exact["SCORE"][:, 0], strict=True):
        assert float(row[1]) == pytest.approx(score, abs=1e-3)


@pytest.mark.parametrize("tier", ["exact", "fast", None])
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_predict_a_file_in_json(tier: str | None, protocol: str, serving: Serving) -> None:
    """More rows than one request carries; `balanced` where no tier is named."""
    address = serving.http if protocol == "http" else serving.grpc
    more = (["--http"] if protocol == "http" else []) + (["--tier", tier] if tier else [])
    given = small().trained if tier is None else small().data
    done = forks().samp("predict", "--in", given, "--url", address, "--json", *more)
    assert (done.code, done.err) == (0, "")
    rows = [json.loads(line) for line in done.out.splitlines()]
    texts = [json.loads(line)["text"] for line in given.read_text().splitlines()]
    assert len(rows) == len(texts) >= 40
    assert [row["index"] for row in rows] == list(range(len(texts)))
    assert [row["text"] for row in rows] == texts
    expected = pipeline.load(serving.out, tier or "balanced").predict(texts)
    for place, row in enumerate(rows):
        assert set(row) == {"index", "text", "truncated", "label", "score", "scores", "error"}
        assert row["error"] is None
        assert row["truncated"] is False
        assert row["score"] == max(row["scores"])
        assert row["scores"] == pytest.approx(expected["SCORES"][place].tolist(), abs=0.05)
    labels = [label.decode() for label in expected["LABEL"][:, 0]]
    sure = expected["SCORE"][:, 0] > 0.55
    assert [r["label"] for r, s in zip(rows, sure, strict=True) if s] == [
        name for name, s in zip(labels, sure, strict=True) if s
    ]
    assert sure.sum() > 30
    assert set(labels) == set(LABELS)


def test_predict_standard_input(serving: Serving) -> None:
    """A line a text: empty ones too, and one that is cut says so."""
    texts = ["bal bel", "", "bal " * 100, "é日本 bol"]
    stdin = "\r\n".join(texts).encode() + b"\n"
    done = forks().samp("predict", "--url", serving.grpc, "--json", stdin=stdin)
    assert (done.code, done.err) == (0, "")
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert [row["text"] for row in rows] == texts
    assert [row["truncated"] for row in rows] == [False, False, True, False]
    assert [row["error"] for row in rows] == [None] * 4
    shown = forks().samp("predict", "--url", serving.grpc, stdin=stdin).out.splitlines()
    assert [line.endswith(" (truncated)") for line in shown] == [False, False, True, False]
    assert forks().samp("predict", "--url", serving.grpc, stdin=b"") == Done(0, "", "")


@pytest.mark.parametrize("where", ["input", "argument"])
def test_bytes_that_are_no_text(where: str, serving: Serving) -> None:
    bad = b"f\xffne"
    if where == "input":
        done = forks().samp("predict", "--url", serving.grpc, stdin=b"bal\n" + bad + b"\n")
        place = "line 2"
    else:
        done = forks().samp("predict", "--url", serving.grpc, "bal", os.fsdecode(bad))
        place = "text 2"
    assert f"{place}: byte 0xff is not UTF-8" in one_line(done, 2)
    assert forks().samp("predict", "--url", serving.grpc, "bal").code == 0


def test_an_unknown_tier(serving: Serving) -> None:
    for command in (
        ["predict", "bal", "--tier", "quick"],
        ["ab", "--candidate", "quick", "--data", small().data],
        ["loadtest", "--tier", "quick"],
    ):
        line = one_line(forks().samp(*command, "--url", serving.grpc))
        assert line.startswith("samp: unknown_tier: ")
        assert "'quick'" in line
        assert "allowed: balanced, exact, fast" in line
        told = forks().samp(*command, "--url", serving.grpc, "--json")
        assert told.json["error"]["code"] == "unknown_tier"
    line = one_line(forks().samp("predict", "bal", "--url", serving.grpc, "--name", "other"))
    assert "'other'" in line
    assert "allowed: small" in line


def test_texts_that_fail_alone_are_exit_code_1(serving: Serving) -> None:
    """The other texts are answered; the wrong protocol's port answers none."""
    done = forks().samp("predict", "--url", serving.http, "bal", "--timeout", "5")
    assert one_line(done).startswith("samp: ")


# ab


def test_ab(serving: Serving) -> None:
    rows = write_rows(serving.out / "ab.jsonl", small().rows[100:220])
    common = ("ab", "--url", serving.grpc, "--data", rows, "--seed", 3)
    done = forks().samp(*common, "--candidate", "fast", "--json")
    assert done.code == 0, done
    assert done.lines == []
    found = done.json
    assert {
        *("control", "candidate", "n", "agreement", "accuracy", "mcnemar", "difference"),
        *("latency_ms", "verdict", "differing"),
    } <= set(found)  # fmt: skip
    assert (found["control"], found["candidate"], found["n"]) == ("exact", "fast", 120)
    assert set(found["latency_ms"]) == {"exact", "fast"}
    assert set(found["latency_ms"]["fast"]) >= {"p50", "p95", "p99", "ci95"}
    m = found["mcnemar"]
    assert found["difference"]["value"] == pytest.approx((m["b"] - m["c"]) / 120)
    assert found["accuracy"]["control"] - found["accuracy"]["candidate"] == pytest.approx(
        found["difference"]["value"]
    )
    assert found["agreement"] == 1 - len(found["differing"]) / 120
    assert m["b"] > m["c"]
    # A latency tier promises no drop; 0.1 points it breaks, and the shell is told so.
    assert found["verdict"] == "undecided"
    broken = forks().samp(*common, "--candidate", "fast", "--promise", 0.1, "--json")
    assert (broken.code, broken.json["verdict"]) == (1, "broken")
    shown = forks().samp(*common, "--candidate", "balanced", "--http", "--url", serving.http)
    assert shown.code == 0
    assert "verdict: holds" in shown.out
    assert "the promise is at most 60" in " ".join(shown.out.split())


def test_ab_with_labels_that_the_model_does_not_write(serving: Serving) -> None:
    rows = [{**row, "label": "good"} if i % 2 else row for i, row in enumerate(small().rows[:60])]
    file = write_rows(serving.out / "other.jsonl", rows)
    line = one_line(forks().samp("ab", "--url", serving.grpc, "--data", file))
    assert "labels that the model cannot answer: good; allowed: dull, fine" in line


# loadtest


@pytest.mark.parametrize(("protocol", "mix"), [("grpc", "fast=3,exact=1"), ("http", "balanced")])
def test_loadtest(protocol: str, mix: str, serving: Serving) -> None:
    address = serving.http if protocol == "http" else serving.grpc
    more = ["--http"] if protocol == "http" else []
    given = ("--tier", mix, "--users", 4, "--seconds", 2, "--texts", small().data)
    done = forks().samp("loadtest", *given, "--url", address, "--json", *more)
    assert done.code == 0, done
    assert done.lines == []
    tiers = [part.partition("=")[0] for part in mix.split(",")]
    assert set(done.json) == set(tiers)
    for facts in done.json.values():
        assert {
            *("requests", "failures", "rps", "p50", "p95", "p99"),
            *("server_queue_ms", "server_compute_ms"),
        } <= set(facts)  # fmt: skip
        assert facts["failures"] == 0
        assert facts["requests"] > 0
        assert 0 < facts["p50"] <= facts["p95"] <= facts["p99"]
        assert facts["server_compute_ms"] > 0


def test_loadtest_table_and_mistakes(serving: Serving) -> None:
    common = ("loadtest", "--url", serving.grpc, "--seconds", 1)
    shown = forks().samp(*common, "--tier", "fast", "--users", 2)
    assert shown.code == 0
    assert "server compute ms" in shown.out
    assert "users is 0" in one_line(forks().samp(*common, "--users", 0))
    nowhere = serving.out / "none.jsonl"
    assert str(nowhere) in one_line(forks().samp(*common, "--texts", nowhere))
