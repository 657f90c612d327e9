"""A served build in one process, without Triton: what serving is measured against.

    python benchmarks/served_inside.py OUT TIER THREADS TEXTS.jsonl

Reads one job a line on standard input and writes one result a line. `{"batch", "seconds",
"warm_s"}`: texts a second through tokenizer, encoder and head, in batches of that size, in the
order of the file. `{"requests", "rows", "seconds"}`: milliseconds a text of each model's own Python
code, as Triton's Python backend calls it, for that many requests at once.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import statistics
import sys
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import json_format, text_format
from samp_kernels.interface import Array, pack_batch
from tritonclient.grpc import model_config_pb2

from samp_core import admission
from samp_core.manifest import Manifest, read_manifest
from samp_core.pipeline import Pipeline, load


class Tensor:
    """Stands for Triton's: a name and an array."""

    def __init__(self, name: str, array: Array) -> None:
        self._name = name
        self._array = array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> Array:
        return self._array


class Request(dict[str, Array]):
    """Stands for Triton's: the inputs of one request, which no tier's ensemble sent."""

    def requested_output_names(self) -> tuple[str, ...]:
        return ("LENGTHS",)


class Response:
    """Stands for Triton's: the outputs of one request."""

    def __init__(self, output_tensors: Sequence[Tensor] = (), error: Any = None) -> None:
        if error is not None:
            raise SystemExit(f"bench: a model refused its request: {error}")
        self.outputs = {tensor.name(): tensor.as_numpy() for tensor in output_tensors}


def stand_in() -> types.ModuleType:
    """triton_python_backend_utils as far as our models use it; a request is a dict of arrays."""
    module = types.ModuleType("triton_python_backend_utils")

    def log(message: str) -> None:
        print(message, file=sys.stderr)

    class TritonError(Exception):
        INVALID_ARG = 0

    class MetricFamily:
        """Stands for Triton's; what it is told is dropped, as another process would take it."""

        COUNTER, GAUGE = 0, 1

        def __init__(self, **_: Any) -> None: ...

        def Metric(self, **_: Any) -> MetricFamily:
            return self

        def increment(self, value: float) -> None: ...

        set = increment

    module.MetricFamily = MetricFamily  # type: ignore[attr-defined]
    module.Tensor = Tensor  # type: ignore[attr-defined]
    module.InferenceResponse = Response  # type: ignore[attr-defined]
    module.TritonError = TritonError  # type: ignore[attr-defined]
    module.Logger = types.SimpleNamespace(  # type: ignore[attr-defined]
        log_info=log, log_error=log, log_warn=log
    )
    module.get_input_tensor_by_name = (  # type: ignore[attr-defined]
        lambda request, name: Tensor(name, request[name]) if name in request else None
    )
    return module


def open_model(folder: Path, threads: int) -> Any:
    """A served model's own TritonPythonModel, initialized as Triton would."""
    text = (folder / "config.pbtxt").read_text(encoding="utf-8")
    message = text_format.Parse(text, model_config_pb2.ModelConfig())
    if "threads" in message.parameters:
        message.parameters["threads"].string_value = str(threads)
    config = json_format.MessageToDict(message, preserving_proto_field_name=True)
    spec = importlib.util.spec_from_file_location(folder.name, folder / "1" / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    names = {"model_name": folder.name, "model_instance_name": f"{folder.name}_0_0"}
    model.initialize({"model_config": json.dumps(config), **names})
    return model


def throughput(
    pipeline: Pipeline, texts: Sequence[str], batch: int, seconds: float, warm_s: float
) -> dict[str, Any]:
    """Texts a second over whole batches."""
    turn = itertools.cycle(texts)

    def run() -> None:
        pipeline.predict(list(itertools.islice(turn, batch)))

    warm_until = time.perf_counter() + warm_s
    run()
    while time.perf_counter() < warm_until:
        run()
    begun, count = time.perf_counter(), 0
    while time.perf_counter() < begun + seconds:
        run()
        count += batch
    return {"texts_per_s": count / (time.perf_counter() - begun)}


def parts(
    models: Sequence[Any],
    pipeline: Pipeline,
    texts: Sequence[str],
    requests: int,
    rows: int,
    seconds: float,
) -> dict[str, Any]:
    """Milliseconds a text in execute() of tokenizer, encoder and head, and in the session alone."""
    made: dict[str, list[float]] = {"tokenizer": [], "encoder": [], "head": [], "session": []}
    turn = itertools.cycle(texts)
    count = requests * rows
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(made["head"]) < 3:
        chosen = list(itertools.islice(turn, count))
        batch = [
            Request(TEXT=np.array([[t.encode()] for t in chosen[i : i + rows]], dtype=np.object_))
            for i in range(0, count, rows)
        ]
        for role, model in zip(made, models, strict=False):
            begun = time.perf_counter()
            responses = model.execute(batch)
            made[role].append(1000 * (time.perf_counter() - begun) / count)
            batch = [
                Request({**before, **response.outputs})
                for before, response in zip(batch, responses, strict=True)
            ]
        made["session"].append(_session_ms(pipeline, chosen) / count)
    return {role: round(statistics.median(times), 4) for role, times in made.items()}


def _session_ms(pipeline: Pipeline, texts: Sequence[str]) -> float:
    encodings = pipeline.text.encode(texts, offsets=False)
    batch = pack_batch([e.ids for e in encodings], [e.types for e in encodings])
    begun = time.perf_counter()
    pipeline.session.run(batch, output=pipeline.head.encoder_output)
    return 1000 * (time.perf_counter() - begun)


def answer(
    job: dict[str, Any], pipeline: Pipeline, models: Sequence[Any], texts: Sequence[str]
) -> dict[str, Any]:
    if "batch" in job:
        return throughput(pipeline, texts, job["batch"], job["seconds"], job["warm_s"])
    return parts(models, pipeline, texts, job["requests"], job["rows"], job["seconds"])


def main() -> None:
    out, tier, threads = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    lines = Path(sys.argv[4]).read_text(encoding="utf-8").split("\n")
    texts = [json.loads(line)["text"] for line in lines if line]
    sys.modules["triton_python_backend_utils"] = stand_in()
    manifest: Manifest = read_manifest(out)
    folder = manifest.folder / "models"
    names = (f"tokenizer_{manifest.model}", manifest.tiers[tier].encoder, f"head_{manifest.model}")
    models = [open_model(folder / name, threads) for name in names]
    pipeline = load(out, tier, threads)
    pipeline.predict(texts[:1])
    print(json.dumps({"models": names}), flush=True)
    try:
        for line in sys.stdin:
            print(json.dumps(answer(json.loads(line), pipeline, models, texts)), flush=True)
    finally:  # No Triton removes what the encoder has written for its tokenizer.
        admission.remove(names[1])


if __name__ == "__main__":
    main()
