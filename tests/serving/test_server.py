"""Starting, stopping and killing a real Triton, and what is left behind: nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from calls import classify
from conftest import Served
from forked import wait_for
from tiny import write_tiny
from tritonclient.utils import InferenceServerException

from samp_core import control, embedded, server
from samp_core.backends import choose_backend
from samp_core.errors import SampError
from samp_core.server import Server
from samp_core.shm import SHM, sweep


@pytest.fixture(scope="module")
def tiny_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny")
    write_tiny(out)
    return out


@pytest.fixture(scope="module")
def running(tiny_out: Path) -> Iterator[Server]:
    with Server.start(tiny_out) as started:
        yield started


def _regions(prefix: str) -> list[str]:
    return [path.name for path in SHM.glob(f"{prefix}*")]


def _tritons(prefix: str) -> list[str]:
    """Without the few hundred bytes of admission.py, which the next start's sweep removes."""
    return [name for name in _regions(prefix) if "_queue_" not in name]


def _group(pid: int) -> list[int]:
    """The living processes of a process group."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == pid and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def _gone(pid: int, prefix: str, within_s: float = 10) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if not _group(pid) and not _regions(prefix):
            return True
        time.sleep(0.1)
    return False


def _beside(http: str) -> list[str]:
    """Models that an activation has loaded beside those that are served."""
    index = control.Control(http).index()
    return [n for n, e in index.items() if n.startswith("next.") and e.get("state") == "READY"]


def _prefix(started: Server) -> str:
    return started._regions.prefix


def test_ready_line(running: Server) -> None:
    line = json.loads(json.dumps(running.ready_line()))
    assert set(line) == {"grpc", "http", "metrics", "pid", "models"}
    assert line["models"] == ["tokenizer_tiny", "encoder_tiny_exact", "head_tiny", "tiny_exact"]
    assert psutil.Process(line["pid"]).name() == "tritonserver"
    for name in ("grpc", "http", "metrics"):
        host, port = line[name].split(":")
        assert host == "127.0.0.1"
        with socket.create_connection((host, int(port)), timeout=5):
            pass
    assert classify(line["grpc"], "tiny_exact", ["abc"])["SCORES"].shape == (1, 2)


def test_it_listens_on_loopback_only(running: Server) -> None:
    listening = [
        c.laddr.ip.removeprefix("::ffff:")
        for pid in _group(running.pid)
        for c in psutil.Process(pid).net_connections("inet")
        if c.status == psutil.CONN_LISTEN
    ]
    assert len(listening) >= 3
    assert set(listening) == {"127.0.0.1"}


def test_only_the_encoder_of_onednn_holds_torch(served: Served) -> None:
    """By what is mapped into the real model processes, and which of them has threads of its own."""
    with_torch, threads = {}, {}
    for pid in _group(served.server.pid):
        command = psutil.Process(pid).cmdline()
        if "stub" in command[0]:
            model = Path(command[1]).parents[1].name
            with_torch[model] = "libtorch" in Path(f"/proc/{pid}/maps").read_text()
            environment = psutil.Process(pid).environ()
            threads[model] = [environment[f"{n}_NUM_THREADS"] for n in ("OMP", "MKL", "OPENBLAS")]
            assert environment["OMP_WAIT_POLICY"] == "passive"
    encoders = {f"encoder_{served.model}_{tier}" for tier in served.tiers}
    others = {f"tokenizer_{served.model}", f"head_{served.model}"}
    assert with_torch == dict.fromkeys(encoders, True) | dict.fromkeys(others, False)
    assert all(counts == ["1", "1", "1"] for counts in threads.values())


def _thread_ticks(pid: int) -> dict[str, int]:
    """CPU time of every thread of a process, in clock ticks."""
    ticks = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        fields = (task / "stat").read_text().rpartition(")")[2].split()
        ticks[task.name] = int(fields[11]) + int(fields[12])
    return ticks


def test_the_encoder_alone_has_threads(served: Served) -> None:
    """The build says 2: two threads of the encoder work, one of the tokenizer and of the head."""
    stubs = {}
    for pid in _group(served.server.pid):
        command = psutil.Process(pid).cmdline()
        if "stub" in command[0]:
            stubs[Path(command[1]).parents[1].name.removesuffix(f"_{served.model}")] = pid
    before = {name: _thread_ticks(pid) for name, pid in stubs.items()}
    for start in range(0, 640, 64):
        classify(served.grpc, f"{served.model}_exact", served.texts[start : start + 64])
    working = {}
    for name, pid in stubs.items():
        after = _thread_ticks(pid)
        used = [ticks - before[name].get(task, 0) for task, ticks in after.items()]
        working[name] = sum(ticks >= 5 for ticks in used)
    assert working[f"encoder_{served.model}_exact"] == 2
    assert working[f"encoder_{served.model}_fast"] == 0
    assert max(working["tokenizer"], working["head"]) <= 1


def test_stop_leaves_nothing(tiny_out: Path) -> None:
    started = Server.start(tiny_out)
    assert len(_tritons(_prefix(started))) == 3
    started.stop()
    assert started.poll() == 0
    assert _gone(started.pid, _prefix(started), within_s=0.5)
    assert not started.log.exists()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(started.grpc.split(":")[1])), timeout=5)
    started.stop()  # a second one is nothing


def test_after_kill_9_of_triton_stop_cleans_up(tiny_out: Path) -> None:
    started = Server.start(tiny_out)
    os.kill(started.pid, signal.SIGKILL)
    assert started.wait(5) == -signal.SIGKILL
    assert _regions(_prefix(started)), "Triton left regions, or this test shows nothing"
    started.stop()
    assert _gone(started.pid, _prefix(started), within_s=0.5)


_SERVE = """
import json, os, sys
from pathlib import Path
# A start is no fork of this process: what has called gRPC (a client) could not be forked safely.
os.register_at_fork(after_in_child=lambda: os._exit(77))
from samp_core.serve_loop import serve_forever
from samp_core.server import Server
started = Server.start(Path(sys.argv[1]))
line = json.dumps({"prefix": started._regions.prefix, **started.ready_line()})
serve_forever(started, lambda: print(line, flush=True))
"""


Serve = Callable[[Path], tuple[subprocess.Popen[bytes], dict[str, Any]]]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts what `samp serve` runs, in a process of its own; its ready line."""
    started: list[subprocess.Popen[bytes]] = []

    def start(out: Path) -> tuple[subprocess.Popen[bytes], dict[str, Any]]:
        command = [sys.executable, "-c", _SERVE, str(out)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        started.append(process)
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate()[1].decode()
        return process, json.loads(line)

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_is_a_clean_stop(tiny_out: Path, serve: Serve, number: signal.Signals) -> None:
    process, line = serve(tiny_out)
    process.send_signal(number)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 0
    assert error == b""
    assert _gone(line["pid"], line["prefix"], within_s=0.5)


def test_kill_9_of_the_serving_process_ends_its_triton(tiny_out: Path, serve: Serve) -> None:
    process, line = serve(tiny_out)
    process.kill()
    process.communicate()
    assert wait_for(lambda: not _group(line["pid"]) and not _tritons(line["prefix"]), 20)
    sweep(embedded.cache_folder() / "run")
    assert not _regions(line["prefix"])


def test_kill_9_of_everything_is_swept_up_by_the_next_start(tiny_out: Path, serve: Serve) -> None:
    process, line = serve(tiny_out)
    os.kill(process.pid, signal.SIGSTOP)  # it cannot clean up after its Triton
    os.killpg(line["pid"], signal.SIGKILL)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 5
    while _group(line["pid"]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert _regions(line["prefix"]), "nothing was left, so that this test shows nothing"
    # A process of many threads shows as dead when its first one is, and holds the lock until the
    # last one is: a start in that moment leaves the regions to the start after it.
    swept = False
    while not swept and time.monotonic() < deadline + 5:
        sweep(embedded.cache_folder() / "run")
        swept = _gone(line["pid"], line["prefix"], within_s=0.2)
    assert swept
    left = {path.suffix for path in (embedded.cache_folder() / "run").glob(f"{line['prefix']}*")}
    assert left <= {".log"}, "its lock, its repository folder and what it said of itself are gone"


def test_shared_memory_stops_growing(tmp_path: Path) -> None:
    """It grows with the largest batch, not with their number: 64 callers of 64 texts, 4 times."""
    write_tiny(tmp_path, backend=choose_backend("auto"))

    def size(started: Server) -> int:
        return sum((SHM / name).stat().st_size for name in _tritons(_prefix(started)))

    def load(started: Server) -> None:
        texts = ["a b c d e f g h i j k l m n o p q r s t u v w x y z " * 4] * 64
        with ThreadPoolExecutor(64) as pool:
            calls = [
                pool.submit(classify, started.grpc, "tiny_exact", texts[: 1 + i % 64])
                for i in range(192)
            ]
        assert all(np.isfinite(call.result()["SCORES"]).all() for call in calls)

    with Server.start(tmp_path) as started:
        at_first = size(started)
        load(started)
        grown = size(started)
        for _ in range(3):
            load(started)
        assert size(started) <= grown + (1 << 20)
        assert at_first <= 3 * (1 << 20)
        assert grown <= 24 * (1 << 20)


def test_a_sweep_leaves_living_servers_alone(running: Server) -> None:
    before = _regions(_prefix(running))
    sweep(embedded.cache_folder() / "run")
    assert _regions(_prefix(running)) == before != []


def test_sighup_serves_the_new_build_while_clients_call(tmp_path: Path, serve: Serve) -> None:
    first = write_tiny(tmp_path, seed=1)
    process, line = serve(tmp_path)
    answers: list[Any] = []
    done = threading.Event()

    def call() -> None:
        while not done.is_set():
            answers.append(classify(line["grpc"], "tiny_exact", ["a b c"])["SCORES"][0])

    try:
        with ThreadPoolExecutor(2) as pool:
            calls = [pool.submit(call) for _ in range(2)]
            time.sleep(0.5)
            assert write_tiny(tmp_path, seed=2) != first
            process.send_signal(signal.SIGHUP)
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline and np.allclose(answers[-1], answers[0]):
                time.sleep(0.1)
            assert wait_for(lambda: not _beside(line["http"]), 60)
            time.sleep(2)  # and says so
            done.set()
            for each in calls:
                each.result()  # raises what any call raised
        assert not np.allclose(answers[-1], answers[0], atol=1e-3)
    finally:
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=30)
    assert error.decode().endswith("is served\n")
    assert process.returncode == 0


def test_reload_of_a_damaged_build_keeps_the_old_one(tmp_path: Path) -> None:
    write_tiny(tmp_path, seed=1)
    with Server.start(tmp_path) as started:
        before = classify(started.grpc, "tiny_exact", ["abc"])["SCORES"]
        folder = write_tiny(tmp_path, seed=2)
        plan = folder / "models/encoder_tiny_exact/1/plan.json"
        good = plan.read_text()
        plan.write_text(good.replace("fp32", "fp23", 1))
        with pytest.raises(SampError, match=r"encoder_tiny_exact: .*plan\.json"):
            started.reload()
        np.testing.assert_array_equal(
            classify(started.grpc, "tiny_exact", ["abc"])["SCORES"], before
        )
        plan.write_text(good)
        started.reload()
        after = classify(started.grpc, "tiny_exact", ["abc"])["SCORES"]
        assert not np.allclose(after, before)


def test_tiers_limits_what_is_loaded(tmp_path: Path) -> None:
    write_tiny(tmp_path, tiers=("exact", "fast"))
    with Server.start(tmp_path, tiers=["fast"]) as started:
        loaded = ["tokenizer_tiny", "encoder_tiny_fast", "head_tiny", "tiny_fast"]
        assert started.models == loaded
        ready = [m for m, e in started._control.index().items() if e.get("state") == "READY"]
        assert sorted(ready) == sorted(loaded)
    with pytest.raises(SampError, match=r"unknown_tier: .*'quick'.*allowed: exact, fast"):
        Server.start(tmp_path, tiers=["quick"])


_OUTSIDE = '''
"""A head that is in no package: the mean of the feature beside a count of its weights."""
import numpy as np

from samp_core.heads import Head, TensorSpec


def run(weights, feature, labels):
    return {
        "SCORE": feature.mean(axis=1, keepdims=True),
        "LABEL": np.array([[labels[0].encode()]] * len(feature), dtype=np.object_),
    }


HEAD = Head(
    name="outside-served",
    encoder_output="mean",
    outputs=(TensorSpec("SCORE", "FP32", (1,)), TensorSpec("LABEL", "BYTES", (1,))),
    export=lambda state, config: {},
    logits=lambda weights, feature: feature,
    run=run,
)
'''


def test_a_head_from_outside_the_package_is_served(tmp_path: Path) -> None:
    from samp_core import heads

    (tmp_path / "outside.py").write_text(_OUTSIDE)
    heads.register(tmp_path / "outside.py")
    write_tiny(tmp_path / "out", head="outside-served")
    (tmp_path / "outside.py").unlink()  # the build carries its own copy
    with Server.start(tmp_path / "out") as started:
        answer = classify(started.grpc, "tiny_exact", ["abc", "a longer text"])
    assert set(answer) == {"SCORE", "LABEL", "TRUNCATED"}
    assert answer["LABEL"][:, 0].tolist() == [b"no", b"no"]
    assert answer["SCORE"].shape == (2, 1)
    assert answer["SCORE"][0] != answer["SCORE"][1]


_RAISES = """
import numpy as np

from samp_core.heads import Head, TensorSpec

calls = []


def run(weights, feature, labels):
    calls.append(1)
    if len(calls) % 2:
        raise ZeroDivisionError("seven\\nlines")
    return {"SCORE": feature.mean(axis=1, keepdims=True)}


HEAD = Head(
    name="outside-raises",
    encoder_output="first",
    outputs=(TensorSpec("SCORE", "FP32", (1,)),),
    export=lambda state, config: {},
    logits=lambda weights, feature: feature,
    run=run,
)
"""


def test_what_a_run_raises_fails_its_requests_and_not_the_process(tmp_path: Path) -> None:
    from samp_core import heads

    (tmp_path / "raises.py").write_text(_RAISES)
    heads.register(tmp_path / "raises.py")
    write_tiny(tmp_path / "out", head="outside-raises")
    with Server.start(tmp_path / "out") as started:
        before = _group(started.pid)
        for _ in range(3):
            with pytest.raises(InferenceServerException, match=r"internal error: ZeroDivision"):
                classify(started.grpc, "tiny_exact", ["abc"])
            assert classify(started.grpc, "tiny_exact", ["abc"])["SCORE"].shape == (1, 1)
        assert _group(started.pid) == before


@pytest.mark.parametrize("which", ["http_port", "grpc_port", "metrics_port"])
def test_a_taken_port_is_named(running: Server, tiny_out: Path, which: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SampError) as caught:
            Server.start(tiny_out, **{which: port})  # type: ignore[arg-type]
    assert caught.value.code == "port_taken"
    assert f"127.0.0.1:{port}" in str(caught.value)
    assert classify(running.grpc, "tiny_exact", ["abc"])["SCORES"].shape == (1, 2)


def test_a_port_lost_between_choice_and_start_is_chosen_again(
    tiny_out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose = control.choose_ports
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        lost = taken.getsockname()[1]
        tries: list[list[int]] = []

        def choice(host: str, wanted: Any) -> list[int]:
            ports = choose(host, wanted)
            tries.append(ports if tries else [*ports[:2], lost])
            return tries[-1]

        monkeypatch.setattr(server, "choose_ports", choice)
        with Server.start(tiny_out) as started:
            assert len(tries) == 2
            assert started.metrics != f"127.0.0.1:{lost}"


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("models/encoder_tiny_exact/1/weights.safetensors", "byte"),
        ("models/encoder_tiny_exact/1/plan.json", "byte"),
        ("models/tokenizer_tiny/1/tokenizer.json", "missing"),
        ("models/tiny_exact/config.pbtxt", "byte"),
        ("manifest.json", "missing"),
    ],
)
def test_a_damaged_repository_is_one_line(tmp_path: Path, name: str, damage: str) -> None:
    path = write_tiny(tmp_path) / name
    if damage == "missing":
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    with pytest.raises(SampError) as caught:
        Server.start(tmp_path)
    message = str(caught.value)
    assert caught.value.code == "damaged_repository"
    assert path.name in message
    assert "samp build" in message
    assert "\n" not in message


def test_what_a_model_raises_at_load_is_one_line(tmp_path: Path) -> None:
    """A plan that asks for more than its backend has, with hashes that are right."""
    folder = write_tiny(tmp_path)
    encoder = folder / "models/encoder_tiny_exact/1"
    text = (encoder / "plan.json").read_text()
    (encoder / "plan.json").write_text(text.replace('"fp32"', '"bf16"', 1))
    _rehash(folder, encoder)
    with pytest.raises(SampError) as caught:
        Server.start(tmp_path)
    message = str(caught.value)
    assert "model encoder_tiny_exact" in message
    assert "bf16" in message
    assert "allowed" in message
    assert "\n" not in message
    assert ".py" not in message


def _rehash(build: Path, version: Path) -> None:
    from samp_core.manifest import file_sha256

    names = [path.name for path in version.iterdir() if path.name != "sha256.json"]
    sums = {name: file_sha256(version / name) for name in names}
    (version / "sha256.json").write_text(json.dumps(sums))
    manifest = json.loads((build / "manifest.json").read_text())
    for name in manifest["files"]:
        manifest["files"][name] = file_sha256(build / name)
    (build / "manifest.json").write_text(json.dumps(manifest))


def test_no_build(tmp_path: Path) -> None:
    with pytest.raises(SampError, match=r"no_build: .*samp build --out"):
        Server.start(tmp_path)


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (
            "echo 'tritonserver: error while loading shared libraries: libfoo.so.1: cannot open "
            "shared object file: No such file or directory'; exit 127",
            "libfoo.so.1: cannot open shared object file",
        ),
        (
            "echo 'E1122 13:11:58.8 1 server.cc:2] \"CudaDriverHelper has not been initialized\"'; "
            "echo 'E1122 13:11:59.1 1 main.cc:9] \"no memory left for anything\"'; exit 1",
            "no memory left for anything",
        ),
    ],
)
def test_a_triton_that_dies_at_start(
    tiny_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, expected: str
) -> None:
    binary = tmp_path / "tritonserver"
    binary.write_text(f"#!/bin/sh\n{script}\n")
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    log = tmp_path / "log"
    with pytest.raises(SampError) as caught:
        Server.start(tiny_out, log=log)
    message = str(caught.value)
    assert caught.value.code == "triton_died"
    assert expected in message
    assert "Cuda" not in message
    assert str(log) in message
    assert "\n" not in message


def test_a_log_that_cannot_be_written(tiny_out: Path, tmp_path: Path) -> None:
    with pytest.raises(SampError, match=r"no_start: .*absent/log"):
        Server.start(tiny_out, log=tmp_path / "absent" / "log")


def test_backends_are_assembled_once_by_many_at_a_time(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: embedded.find_triton(tmp_path), range(16)))
    assert len({triton.backends for triton in found}) == 1
    assert [path.name for path in tmp_path.iterdir()] == [found[0].backends.name]  # type: ignore[union-attr]
    backend = found[0].backends / "python"  # type: ignore[operator]
    assert os.access(backend / embedded.STUB, os.X_OK)


def test_without_a_shared_libpython(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """This interpreter has one, so that its absence has to be pretended."""
    monkeypatch.setattr(embedded.sysconfig, "get_config_var", lambda name: str(tmp_path))
    monkeypatch.setattr(embedded.sys, "base_prefix", str(tmp_path))
    monkeypatch.setattr(embedded.ctypes.util, "find_library", lambda name: None)
    with pytest.raises(SampError, match=r"no_libpython: libpython3\.\d+\.so\.1\.0 .*apt-get"):
        embedded.libpython_folder()


def test_with_numpy_2_beside_the_old_stub(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"numpy": "2.4.6", "nvidia-pytriton": "0.7.0"}
    monkeypatch.setattr(embedded.metadata, "version", versions.__getitem__)
    with pytest.raises(SampError, match=r"numpy_too_new: numpy 2\.4\.6"):
        embedded.check_numpy()
    versions["numpy"] = "1.26.4"
    embedded.check_numpy()


def test_without_any_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SampError, match=r"no_triton: .*pip install"):
        embedded.find_triton()
