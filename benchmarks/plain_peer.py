"""A second Triton with the plain transformers model, once per number of threads."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from samp_core.control import choose_ports
from samp_core.embedded import cache_folder, find_triton
from samp_core.model_config import TEXT, ModelConfig, TensorConfig
from samp_core.shm import Regions

SOURCE = Path(__file__).resolve().parent / "peers" / "plain_triton" / "model.py"
HOST = "127.0.0.1"
START_S = 180.0


def name(threads: int) -> str:
    """The model that runs with this number of threads."""
    return f"plain-{threads}"


def write_repository(
    folder: Path, checkpoint: Path, labels: int, max_length: int, threads: Sequence[int]
) -> None:
    """One model folder per number of threads, batched and queued as our own models are."""
    for count in threads:
        config = ModelConfig(
            name=name(count),
            inputs=(TEXT,),
            outputs=(
                TensorConfig("LABEL", "STRING", (1,)),
                TensorConfig("SCORE", "FP32", (1,)),
                TensorConfig("SCORES", "FP32", (labels,)),
            ),
            parameters={
                "checkpoint": str(checkpoint.resolve()),
                "threads": str(count),
                "max_length": str(max_length),
            },
        )
        version = folder / config.name / "1"
        version.mkdir(parents=True)
        shutil.copyfile(SOURCE, version / "model.py")
        (folder / config.name / "config.pbtxt").write_text(config.to_pbtxt(), encoding="utf-8")


@contextlib.contextmanager
def serve(folder: Path, log: Path) -> Iterator[tuple[str, int]]:
    """gRPC address and pid of a Triton on `folder`, with the surroundings that ours gets."""
    triton = find_triton()
    regions = Regions.claim(cache_folder() / "run")
    http, grpc, metrics = choose_ports(HOST, (0, 0, 0))
    command = [
        *triton.command(),
        f"--id={regions.prefix}",
        f"--model-repository={folder}",
        "--disable-auto-complete-config",
        "--exit-timeout-secs=5",
        *(f"--{kind}-address={HOST}" for kind in ("http", "grpc", "metrics")),
        f"--http-port={http}",
        f"--grpc-port={grpc}",
        f"--metrics-port={metrics}",
        f"--backend-config=python,shm-region-prefix-name={regions.prefix}",
        "--backend-config=python,stub-timeout-seconds=120",
    ]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**triton.environment(os.environ), "HF_HUB_OFFLINE": "1"},
            start_new_session=True,
            pass_fds=(regions.descriptor,),
        )
    try:
        wait_ready(process, f"{HOST}:{http}", log)
        yield f"{HOST}:{grpc}", process.pid
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(15)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        regions.release()


def wait_ready(process: subprocess.Popen[bytes], http: str, log: Path) -> None:
    """Return when every model is loaded; else end with the last lines of the log."""
    deadline = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://{http}/v2/health/ready", timeout=2).close()
            return
        time.sleep(0.1)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    raise SystemExit(f"bench: the plain Triton model did not start:\n{tail}")
