"""10,000 requests, most of them wrong: each an error or a right answer, and the server goes on."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import cases
import grpc
import numpy as np
import wire
from place import Check, Serving, infer, same, sample
from tritonclient.grpc import service_pb2 as pb
from wire import Case, Row, Sizes, Tensor

# What a request may take beside the others: 3 MB of text take the tokenizer seconds.
STALL_S = 20.0
SLOW_S = 2.0
CALLERS = 6
METHOD = "/inference.GRPCInferenceService/ModelInfer"


@dataclass
class Outcome:
    """What came back: outputs by name, or an error in words. `lost`: neither."""

    outputs: dict[str, Any] | None = None
    error: str = ""
    lost: str = ""
    seconds: float = 0.0


@dataclass
class Found:
    """Counts by kind, and what went wrong, one line a case."""

    kinds: Counter[str] = field(default_factory=Counter)
    answered: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    internal: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    slow: list[str] = field(default_factory=list)


class Apart:
    """Many at a time beside each other, or one alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._beside = 0

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        with self._changed:
            self._beside += 1
        try:
            yield
        finally:
            with self._changed:
                self._beside -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._beside == 0)
            yield


class Clean:
    """What a clean call answers to one row alone; every row is asked once."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._known: dict[tuple[str, Row], dict[str, Any]] = {}

    def __call__(self, model: str, row: Row) -> dict[str, Any]:
        key = (model, row)
        if key not in self._known:
            if model.startswith("encoder_"):
                ids, types = (np.array([part], np.int32) for part in row)
                lengths = np.array([[ids.shape[1]]], np.int32)
                made = infer(self._address, model, IDS=ids, TYPES=types, LENGTHS=lengths)
            elif model.startswith("head_"):
                made = infer(self._address, model, FEATURE=np.frombuffer(row[0], np.float32)[None])
            else:
                made = infer(self._address, model, TEXT=np.array([list(row)], np.object_))
            self._known[key] = {name: array[0] for name, array in made.items()}
        return self._known[key]


class Sender:
    """One caller's connections."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._channel = grpc.insecure_channel(
            serving.grpc, options=[("grpc.max_receive_message_length", -1)]
        )
        self._call = self._channel.unary_unary(METHOD)  # bytes in, bytes out
        self._connection: http.client.HTTPConnection | None = None

    def __call__(self, case: Case) -> Outcome:
        begun = time.monotonic()
        outcome = self._grpc(case) if case.protocol == "grpc" else self._http(case)
        outcome.seconds = time.monotonic() - begun
        return outcome

    def _grpc(self, case: Case) -> Outcome:
        try:
            answer = pb.ModelInferResponse.FromString(self._call(case.body, timeout=STALL_S))
        except grpc.RpcError as error:
            words = f"{error.code().name}: {error.details()}"
            if error.code() in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE):
                return Outcome(lost=words)
            return Outcome(error=words)
        outputs = {}
        for one, raw in zip(answer.outputs, answer.raw_output_contents, strict=True):
            outputs[one.name] = _array(Tensor(one.name, one.datatype, tuple(one.shape), raw))
        return Outcome(outputs)

    def _http(self, case: Case) -> Outcome:
        for fresh in (False, True):
            if self._connection is None:
                fresh = True
                self._connection = http.client.HTTPConnection(self._serving.http, timeout=STALL_S)
            path = "/v2/models/" + case.model.replace("%", "%25") + "/infer"
            try:
                self._connection.request("POST", path, case.body, dict(case.headers))
                response = self._connection.getresponse()
                body = response.read()
                break
            except TimeoutError:
                self._connection = None
                return Outcome(lost="no answer")
            except (OSError, http.client.HTTPException) as error:
                self._connection = None
                if fresh:
                    return Outcome(lost=f"{type(error).__name__}: {error}")
        if response.status != 200:
            if response.status in (502, 503, 504):
                return Outcome(lost=f"{response.status}: {body[:200]!r}")
            return Outcome(error=f"{response.status}: {body[:400].decode('utf-8', 'replace')}")
        return Outcome(_http_outputs(body, response.getheader("Inference-Header-Content-Length")))


def _http_outputs(body: bytes, header: str | None) -> dict[str, Any]:
    size = len(body) if header is None else int(header)
    binary = body[size:]
    outputs = {}
    for one in json.loads(body[:size], strict=False)["outputs"]:
        shape = tuple(one["shape"])
        if "data" in one:
            kinds = {"BYTES": np.object_, "BOOL": np.bool_, "INT32": np.int32}
            values = np.array(one["data"], dtype=kinds.get(one["datatype"], np.float32))
            if one["datatype"] == "BYTES":
                values = np.array([value.encode() for value in one["data"]], dtype=np.object_)
            outputs[one["name"]] = values.reshape(shape)
        else:
            count = one["parameters"]["binary_data_size"]
            raw, binary = binary[:count], binary[count:]
            outputs[one["name"]] = _array(Tensor(one["name"], one["datatype"], shape, raw))
    return outputs


def _array(tensor: Tensor) -> Any:
    if tensor.dtype == "BYTES":
        values, at = [], 0
        while at < len(tensor.raw):
            (length,) = struct.unpack_from("<I", tensor.raw, at)
            values.append(tensor.raw[at + 4 : at + 4 + length])
            at += 4 + length
        return np.array(values, dtype=np.object_).reshape(tensor.shape)
    kinds = {"FP32": np.float32, "INT32": np.int32, "BOOL": np.bool_}
    return np.frombuffer(tensor.raw, kinds[tensor.dtype]).reshape(tensor.shape)


def wrong(case: Case, outcome: Outcome, clean: Clean, sizes: Sizes) -> str:
    """Why an outcome is not right; empty if it is."""
    if outcome.lost:
        return f"lost: {outcome.lost}"
    if outcome.seconds > STALL_S:
        return f"took {outcome.seconds:.1f} s"
    if outcome.outputs is None:
        refused = case.must == "answer" or (case.must == "either" and _rows(case, sizes))
        if refused and case.kind in ("good", "1 MB of text", "odd floats to the head"):
            return f"a good request failed: {outcome.error}"
        return "" if outcome.error.strip() else "an error without words"
    if case.must == "unread":
        return ""
    if case.must == "fail":
        return f"answered: {list(outcome.outputs)}"
    said = _rows(case, sizes)
    if said is None:
        return "answered what has no right answer"
    model, rows = said
    for index, row in enumerate(rows):
        expected = clean(model, row)
        for name, values in outcome.outputs.items():
            if len(rows) == 1 and values.ndim == expected[name].ndim:
                values = values[None]  # asked without a batch dimension, answered without one
            if len(values) != len(rows):
                return f"{name}: {len(values)} rows for {len(rows)}"
            if not close(name, values[index], expected):
                return f"{name} row {index}: {values[index]!r}, alone {expected[name]!r}"[:300]
    return ""


def close(name: str, got: Any, expected: Mapping[str, Any]) -> bool:
    """Whether a row of an output is what the clean call gives; ids may be padded."""
    alone = expected[name]
    if name in ("IDS", "TYPES"):
        return bool(np.array_equal(got[: len(alone)], alone) and not got[len(alone) :].any())
    if got.dtype == np.float32:
        return bool(np.allclose(got, alone, rtol=1e-4, atol=1e-3, equal_nan=True))
    if name == "LABEL" and "SCORES" in expected and np.ptp(expected["SCORES"]) < 1e-2:
        return True
    return bool(np.array_equal(got, alone))


def _rows(case: Case, sizes: Sizes) -> tuple[str, list[Row]] | None:
    """The model that is asked and its rows, as the bytes have them."""
    found = wire.read(case, sizes)
    rows = None if found is None else wire.rows_of(*found, sizes)
    return None if found is None or rows is None else (found[0], rows)


def run(serving: Serving, count: int, seed: int, sizes: Sizes, only: int | None = None) -> Found:
    """Send the cases of a seed, all or one; judge every outcome."""
    found = Found()
    clean = Clean(serving.grpc)
    lock = threading.Lock()
    apart = Apart()
    queue = iter([only] if only is not None else range(count))
    begun = time.monotonic()

    def caller() -> None:
        send = Sender(serving)
        while True:
            with lock:
                index = next(queue, None)
            if index is None:
                return
            case = cases.case(seed, index, sizes)
            with apart.alone() if wire.is_poison(case, sizes) else apart.beside():
                outcome = send(case)
            try:
                with apart.beside():
                    why = wrong(case, outcome, clean, sizes)
            except Exception as error:
                why = f"could not be judged: {type(error).__name__}: {error}"
            with lock:
                if outcome.seconds > SLOW_S:
                    found.slow.append(f"case {index} ({case.kind}): {outcome.seconds:.1f} s")
                found.kinds[case.kind] += 1
                found.answered[case.kind] += outcome.outputs is not None
                found.slowest_s = max(found.slowest_s, outcome.seconds)
                if "internal error" in outcome.error:
                    found.internal[f"{case.kind}: {outcome.error[:160]}"] += 1
                if why:
                    found.wrong.append(f"case {index} ({case.kind}, {case.protocol}): {why}")
                done = sum(found.kinds.values())
                if done % 1000 == 0:
                    print(
                        f"  fuzz: {done} of {count}, {time.monotonic() - begun:.0f} s", flush=True
                    )
            if only is not None:
                print(case.kind, case.protocol, case.model, dict(case.headers), case.must)
                print(base64.b64encode(case.body[:600]).decode(), outcome, why)

    threads = [threading.Thread(target=caller, daemon=True) for _ in range(CALLERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def campaign(serving: Serving, count: int, seed: int, only: int | None = None) -> list[Check]:
    command = f"make chaos CHAOS='--only fuzz --seed {seed}'"
    sizes = Sizes()
    before, pids = sample(serving.grpc), serving.stubs()
    rss = sum(serving.rss_mb().values())
    begun = time.monotonic()
    found = run(serving, count, seed, sizes, only)
    seconds = time.monotonic() - begun
    for line in (
        *found.slow[:10],
        *found.wrong[:20],
        *(f"{n} x {what}" for what, n in found.internal.items()),
    ):
        print(
            f"  fuzz: {line}\n        replay: make chaos CHAOS='--only fuzz --seed {seed} --case N'"
        )
    after = same(before, sample(serving.grpc))
    code, status = serving.status()
    grown = sum(serving.rss_mb().values()) - rss
    total, answers = sum(found.kinds.values()), sum(found.answered.values())
    figures = {
        "seed": seed, "seconds": round(seconds, 1), "slowest_s": round(found.slowest_s, 2),
        "answered": answers, "refused": total - answers, "rss_grown_mb": round(grown, 1),
        "kinds": {k: [n, found.answered[k]] for k, n in sorted(found.kinds.items())},
        "wrong": found.wrong, "slow": found.slow, "internal": dict(found.internal),
    }  # fmt: skip
    return [
        Check(
            "fuzz",
            f"{total:,} requests of {len(found.kinds)} kinds over gRPC and HTTP: "
            "each a right answer or an error, none lost or slow",
            f"{answers:,} right answers, {total - answers:,} errors, {len(found.wrong)} wrong; "
            f"slowest {found.slowest_s:.1f} s",
            not found.wrong and not found.internal,
            command,
            figures,
        ),
        Check(
            "fuzz",
            "the server afterwards: the same processes, the same answers bit for bit",
            f"processes {'the same' if serving.stubs() == pids else 'CHANGED'}, answers "
            f"{'the same' if after else 'CHANGED'}, samp status exit {code}, RSS +{grown:.0f} MB",
            serving.stubs() == pids and after and code == 0 and bool(status["ok"]),
            command,
        ),
    ]
