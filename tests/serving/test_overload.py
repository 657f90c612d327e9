"""A full queue in a real Triton: refused before it is tokenized, counted, and no other tier's."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from calls import classify, infer
from forked import wait_for
from samp_client import Retry, connect
from samp_client.errors import ServerFault
from tiny import write_tiny
from tritonclient.utils import InferenceServerException

from samp_core.admission import _RATE, LEAST_REQUESTS, LEAST_ROWS, SHM, Progress
from samp_core.control import Control, stubs
from samp_core.server import Server

TEXTS = ["a b c"] * (LEAST_ROWS // LEAST_REQUESTS)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    out = tmp_path_factory.mktemp("overload")
    write_tiny(out, seed=1, tiers=("exact", "fast"))
    with Server.start(out) as server:
        yield server


class Stopped:
    """The encoder of tier exact does nothing, and is as slow as the bound's least queue is long."""

    def __init__(self, server: Server) -> None:
        (self._pid,) = stubs(server.pid)["encoder_tiny_exact"]
        path = SHM / f"{server.prefix}_queue_encoder_tiny_exact"
        assert path.exists()
        self._progress = Progress(path, 5)

    def __enter__(self) -> None:
        os.kill(self._pid, signal.SIGSTOP)
        self._progress.begin(0)  # in the midst of a batch
        self._progress._slots[_RATE] = LEAST_ROWS

    def __exit__(self, *_: object) -> None:
        self._progress.end(0)
        os.kill(self._pid, signal.SIGCONT)


def refused(server: Server) -> dict[str, float]:
    lines = Control(server.metrics).text("/metrics").splitlines()
    found = [line for line in lines if line.startswith("samp_refused_total{")]
    return {
        ",".join(sorted(re.findall(r'\w+="[^"]*"', line))): float(line.rsplit(" ", 1)[1])
        for line in found
    }


def test_what_would_wait_too_long_is_refused_at_once(server: Server) -> None:
    expected = classify(server.grpc, "tiny_exact", TEXTS)["SCORES"]
    other = classify(server.grpc, "tiny_fast", TEXTS)["SCORES"]
    sent = LEAST_REQUESTS + 4
    with ThreadPoolExecutor(sent) as pool:
        with Stopped(server):
            calls = [pool.submit(classify, server.grpc, "tiny_exact", TEXTS) for _ in range(sent)]
            assert wait_for(lambda: sum(call.done() for call in calls) >= 4, 30)
            # Another tier goes on meanwhile, and so does the tokenizer for whoever calls it.
            assert np.array_equal(classify(server.grpc, "tiny_fast", TEXTS)["SCORES"], other)
            text = np.array([[b"a b c"]], dtype=np.object_)
            assert infer(server.grpc, "tokenizer_tiny", TEXT=text)["LENGTHS"].tolist() == [[5]]
        errors: list[Any] = [call.exception() for call in calls]
    # Triton takes a process that does nothing for about a second for dead: on a busy machine the
    # sixteen that wait may be told so.
    told = [str(e) for e in errors if e is not None and "not healthy" not in str(e)]
    assert len(told) == 4
    for words in told:
        assert re.search(
            r"UNAVAILABLE.*overloaded: 1 s of work .* tier exact; allowed: 1 s;", words
        )
    for call in calls:
        if call.exception() is None:
            assert np.array_equal(call.result()["SCORES"], expected)
    count = {'model="tiny",reason="overloaded",tier="exact"': 4.0}
    assert wait_for(lambda: refused(server) == count, 10), refused(server)
    assert wait_for(lambda: alive(server), 10)
    assert np.array_equal(classify(server.grpc, "tiny_exact", TEXTS)["SCORES"], expected)


def alive(server: Server) -> bool:
    """Whether the encoder that was stopped is taken for living again."""
    try:
        classify(server.grpc, "tiny_exact", ["a"])
    except InferenceServerException as error:
        if "not healthy" not in str(error):
            raise
        return False
    return True


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_the_client_sends_again(server: Server, protocol: Literal["grpc", "http"]) -> None:
    address = getattr(server, protocol)
    assert wait_for(lambda: alive(server), 10)
    stopped = Stopped(server)

    def go_on(before: float) -> bool:
        """When the client was refused twice."""
        try:
            return wait_for(lambda: sum(refused(server).values()) > before + 1, 30)
        finally:
            stopped.__exit__()

    with (
        ThreadPoolExecutor(LEAST_REQUESTS + 2) as pool,
        connect(address, protocol, retry=Retry(attempts=999, most_s=0.2)) as client,
    ):
        client.labels()
        before = sum(refused(server).values())
        stopped.__enter__()
        calls = [
            pool.submit(classify, server.grpc, "tiny_exact", TEXTS)
            for _ in range(LEAST_REQUESTS + 1)
        ]
        assert wait_for(lambda: any(call.done() for call in calls), 30)
        twice = pool.submit(go_on, before + 1)
        with contextlib.suppress(ServerFault):  # "not healthy", as above
            assert len(client.predict(TEXTS[:2], tier="exact")) == 2
        assert twice.result(30)
    assert wait_for(lambda: alive(server), 10)


def test_the_bound_can_be_set_for_a_server(tmp_path: Path) -> None:
    from samp_core.activation import view
    from samp_core.manifest import read_manifest
    from samp_core.model_config import HARD_LIMIT, from_pbtxt
    from samp_core.stage import Layout, Stage

    write_tiny(tmp_path / "out", seed=1)
    stage = Stage(tmp_path / "stage", Layout(queue_s=0.25))
    for name, spec in view(read_manifest(tmp_path / "out")).items():
        stage.put(name, spec)
        text = (stage.folder / name / "config.pbtxt").read_text()
        if not spec.parts:
            assert from_pbtxt(text).queue_s == 0.25
            assert f"default_timeout_microseconds: {round(HARD_LIMIT * 250_000)}" in text


def test_a_bound_that_is_none(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from samp_core.cli import app

    done = CliRunner().invoke(app, ["serve", str(tmp_path), "--queue-s", "0"])
    assert done.exit_code != 0


def test_direct_calls_of_a_tier_that_is_asked_for_by_name(server: Server) -> None:
    """What Triton answers if all outputs are asked for: LENGTHS under its own name."""
    text = np.array([[b"a"], [b"a b"]], dtype=np.object_)
    answer = infer(server.grpc, "tokenizer_tiny", TEXT=text)
    assert set(answer) == {"IDS", "TYPES", "LENGTHS", "TRUNCATED"}


def test_wrong_requests_stay_wrong(server: Server) -> None:
    with pytest.raises(InferenceServerException, match="UTF-8"):
        classify(server.grpc, "tiny_exact", [b"\xff"])
