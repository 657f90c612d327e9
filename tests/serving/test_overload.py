"""A full queue in a real Triton: refused before it is tokenized, counted, and no other tier's."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from calls import classify, infer
from forked import wait_for
from samp_client import Retry, connect
from tiny import write_tiny
from tritonclient.utils import InferenceServerException

from samp_core import repository
from samp_core.admission import _RATE, LEAST_REQUESTS, LEAST_ROWS, SHM, Progress
from samp_core.control import Control
from samp_core.server import Server

TEMPLATES = Path(__file__).resolve().parents[2] / "model_repository" / "templates"
TEXTS = ["a b c"] * (LEAST_ROWS // LEAST_REQUESTS)


HELD = """
        while (Path("{folder}") / self._tier).exists():
            time.sleep(0.005)
        inputs = ("""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("overload")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    """A batch takes as long as a file of its tier's name lies in `folder`."""
    templates = folder / "templates"
    shutil.copytree(TEMPLATES, templates)
    model = templates / "encoder" / "model.py"
    text = model.read_text().replace("from typing", "import time\nfrom typing", 1)
    for old, new in (
        ("\n        inputs = (", HELD.format(folder=folder)),
        ("        self._meters", '        self._tier = parameters["tier"]\n        self._meters'),
    ):
        assert old in text
        text = text.replace(old, new, 1)
    model.write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repository.resources, "files", lambda _: templates)
        write_tiny(folder / "out", seed=1, tiers=("exact", "fast"))
    with Server.start(folder / "out") as server:
        yield server


class Held:
    """The encoder of tier exact takes its time, and is as slow as the bound's least queue is long.

    Its process is not stopped: what Triton takes for dead for that reason, after a second, it
    clears away, and ends itself when it goes on.
    """

    def __init__(self, server: Server, folder: Path) -> None:
        self._file = folder / "exact"
        path = SHM / f"{server.prefix}_queue_encoder_tiny_exact"
        assert path.exists()
        self._progress = Progress(path, 5)

    def __enter__(self) -> None:
        self._file.touch()
        self._progress.begin(0)  # in the midst of a batch
        self._progress._slots[_RATE] = LEAST_ROWS

    def __exit__(self, *_: object) -> None:
        self._progress.end(0)
        self._file.unlink(missing_ok=True)


def refused(server: Server) -> dict[str, float]:
    lines = Control(server.metrics).text("/metrics").splitlines()
    found = [line for line in lines if line.startswith("samp_refused_total{")]
    return {
        ",".join(sorted(re.findall(r'\w+="[^"]*"', line))): float(line.rsplit(" ", 1)[1])
        for line in found
    }


def test_what_would_wait_too_long_is_refused_at_once(server: Server, folder: Path) -> None:
    expected = classify(server.grpc, "tiny_exact", TEXTS)["SCORES"]
    other = classify(server.grpc, "tiny_fast", TEXTS)["SCORES"]
    sent = LEAST_REQUESTS + 4
    with ThreadPoolExecutor(sent) as pool:
        with Held(server, folder):
            calls = [pool.submit(classify, server.grpc, "tiny_exact", TEXTS) for _ in range(sent)]
            assert wait_for(lambda: sum(call.done() for call in calls) >= 4, 30)
            # Another tier goes on meanwhile, and so does the tokenizer for whoever calls it.
            assert np.array_equal(classify(server.grpc, "tiny_fast", TEXTS)["SCORES"], other)
            text = np.array([[b"a b c"]], dtype=np.object_)
            assert infer(server.grpc, "tokenizer_tiny", TEXT=text)["LENGTHS"].tolist() == [[5]]
        errors: list[Any] = [call.exception() for call in calls]
    told = [str(error) for error in errors if error is not None]
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
    assert np.array_equal(classify(server.grpc, "tiny_exact", TEXTS)["SCORES"], expected)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_the_client_sends_again(
    server: Server, folder: Path, protocol: Literal["grpc", "http"]
) -> None:
    address = getattr(server, protocol)
    held = Held(server, folder)

    def go_on(before: float) -> bool:
        """When the client was refused twice."""
        try:
            return wait_for(lambda: sum(refused(server).values()) > before + 1, 30)
        finally:
            held.__exit__()

    with (
        ThreadPoolExecutor(LEAST_REQUESTS + 2) as pool,
        connect(address, protocol, retry=Retry(attempts=999, most_s=0.2)) as client,
    ):
        client.labels()
        before = sum(refused(server).values())
        held.__enter__()
        calls = [
            pool.submit(classify, server.grpc, "tiny_exact", TEXTS)
            for _ in range(LEAST_REQUESTS + 1)
        ]
        assert wait_for(lambda: any(call.done() for call in calls), 30)
        twice = pool.submit(go_on, before + 1)
        assert len(client.predict(TEXTS[:2], tier="exact")) == 2
        assert twice.result(30)


def test_the_bound_can_be_set_for_a_server_and_older_builds_lose_their_queue_policy(
    tmp_path: Path,
) -> None:
    from samp_core.activation import view
    from samp_core.manifest import read_manifest
    from samp_core.model_config import from_pbtxt
    from samp_core.stage import Layout, Stage

    write_tiny(tmp_path / "out", seed=1)
    stage = Stage(tmp_path / "stage", Layout(queue_s=0.25))
    for name, spec in view(read_manifest(tmp_path / "out")).items():
        config = spec.source / "config.pbtxt"
        older = config.read_text().replace(
            "dynamic_batching {", "dynamic_batching { default_queue_policy { max_queue_size: 1024 }"
        )
        assert spec.parts or older != config.read_text()
        config.write_text(older)
        stage.put(name, spec)
        text = (stage.folder / name / "config.pbtxt").read_text()
        assert "default_queue_policy" not in text
        if not spec.parts:
            assert from_pbtxt(text).queue_s == 0.25


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
