"""The load of the serving benchmarks, in a process of its own: N callers that wait for answers.

    python benchmarks/closed_loop.py TEXTS.jsonl

Reads one job a line on standard input and writes one result a line; `rows` is texts a request, 1 if
not given. Requests are serialized before the clock starts and answers are not parsed while it runs,
so that little of the machine goes to the client; both sides of a comparison are called by the same
code.
"""

from __future__ import annotations

import itertools
import json
import struct
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
from tritonclient.grpc import service_pb2

METHOD = "/inference.GRPCInferenceService/ModelInfer"
TIMEOUT_S = 60.0


def request(model: str, texts: Sequence[str]) -> bytes:
    """A serialized ModelInferRequest for these texts."""
    raw = b"".join(struct.pack("<I", len(text.encode())) + text.encode() for text in texts)
    message = service_pb2.ModelInferRequest(model_name=model)
    message.inputs.add(name="TEXT", datatype="BYTES", shape=[len(texts), 1])
    message.raw_input_contents.append(raw)
    return bytes(message.SerializeToString())


def requests(model: str, texts: Sequence[str], rows: int) -> list[bytes]:
    """The texts in their order, `rows` a request; what is left over is not sent."""
    starts = range(0, len(texts) - rows + 1, rows)
    return [request(model, texts[start : start + rows]) for start in starts]


def label(answer: bytes) -> str:
    """LABEL of a serialized ModelInferResponse."""
    message = service_pb2.ModelInferResponse.FromString(answer)
    names = [output.name for output in message.outputs]
    return str(message.raw_output_contents[names.index("LABEL")][4:].decode())


def one_by_one(call: Callable[..., bytes], payloads: Sequence[bytes]) -> dict[str, Any]:
    """Every payload once, one after another; `labels` in order."""
    latencies: list[float] = []
    answers: list[bytes] = []
    for payload in payloads:
        begun = time.perf_counter()
        answers.append(call(payload, timeout=TIMEOUT_S))
        latencies.append(time.perf_counter() - begun)
    return {"latencies_ms": milliseconds(latencies), "labels": [label(a) for a in answers]}


def closed_loop(
    call: Callable[..., bytes],
    payloads: Sequence[bytes],
    concurrency: int,
    seconds: float,
    warm_s: float,
) -> dict[str, Any]:
    """`concurrency` callers for `seconds` after `warm_s`; counts what ended within that window."""
    turn = itertools.cycle(payloads)
    begin = time.perf_counter() + warm_s
    end = begin + seconds
    done: list[list[float]] = [[] for _ in range(concurrency)]
    failures: list[str] = []

    def caller(mine: list[float]) -> None:
        started = time.perf_counter()
        while started < end:
            try:
                call(next(turn), timeout=TIMEOUT_S)
            except grpc.RpcError as error:
                failures.append(str(error))
                return
            ended = time.perf_counter()
            if begin <= ended < end:
                mine.append(ended - started)
            started = ended

    cpu = time.process_time()
    threads = [threading.Thread(target=caller, args=(mine,)) for mine in done]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    latencies = list(itertools.chain.from_iterable(done))
    return {
        "rps": len(latencies) / seconds,
        "latencies_ms": milliseconds(latencies),
        "failures": failures[:3],
        "client_cores": (time.process_time() - cpu) / (seconds + warm_s),
    }


def milliseconds(seconds: Sequence[float]) -> list[float]:
    return [round(1000 * value, 3) for value in seconds]


def main() -> None:
    lines = Path(sys.argv[1]).read_text(encoding="utf-8").split("\n")
    texts = [json.loads(line)["text"] for line in lines if line]
    calls: dict[str, Callable[..., bytes]] = {}
    for line in sys.stdin:
        job = json.loads(line)
        if job["url"] not in calls:
            calls[job["url"]] = grpc.insecure_channel(job["url"]).unary_unary(METHOD)
        call = calls[job["url"]]
        payloads = requests(job["model"], texts[: job.get("texts")], job.get("rows", 1))
        if "concurrency" in job:
            result = closed_loop(call, payloads, job["concurrency"], job["seconds"], job["warm_s"])
        else:
            result = one_by_one(call, payloads)
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
