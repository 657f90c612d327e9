"""A request as bytes for the wire, and what those bytes say.

What a case's rows are is read back from the very bytes that are sent, so that one that was damaged
at random is judged by what it says, not by what was meant.
"""

from __future__ import annotations

import json
import math
import random
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2 as pb

MOST_ROWS = 64
Row = tuple[Any, ...]


@dataclass(frozen=True)
class Sizes:
    """What a case must know of the served models."""

    model: str = "film-reviews"
    tiers: tuple[str, ...] = ("exact", "fast")
    vocabulary: int = 30522
    types: int = 2
    positions: int = 512
    hidden: int = 384


@dataclass(frozen=True)
class Tensor:
    """One input as it is sent: `raw` are its bytes whatever `shape` and `dtype` say."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    raw: bytes


@dataclass(frozen=True)
class Case:
    """must: "answer", "fail", or "either" where the bytes decide (`rows_of`)."""

    kind: str
    protocol: str
    model: str
    body: bytes
    must: str
    headers: Mapping[str, str] = field(default_factory=dict)


# The rows of a request, as the models take them; None if they have to refuse it.


def text_rows(tensors: Mapping[str, Tensor], sizes: Sizes, check: bool = True) -> list[Row] | None:
    if set(tensors) != {"TEXT"}:
        return None
    text = tensors["TEXT"]
    if text.dtype != "BYTES" or len(text.shape) != 2 or text.shape[1] != 1:
        return None
    rows, at = [], 0
    while at + 4 <= len(text.raw):
        (length,) = struct.unpack_from("<I", text.raw, at)
        at += 4
        if at + length > len(text.raw):
            return None
        rows.append(text.raw[at : at + length])
        at += length
    # Triton reads 32 bits of a batch size, and 0 as one row.
    count = (text.shape[0] & 0xFFFFFFFF) or 1
    if at != len(text.raw) or len(rows) != count or not 1 <= len(rows) <= MOST_ROWS:
        return None
    try:
        for row in rows if check else ():
            row.decode("utf-8")
    except UnicodeDecodeError:
        return None
    return [(row,) for row in rows]


def token_rows(tensors: Mapping[str, Tensor], sizes: Sizes) -> list[Row] | None:
    if set(tensors) != {"IDS", "TYPES", "LENGTHS"}:
        return None
    arrays = {}
    for name, tensor in tensors.items():
        if tensor.dtype != "INT32" or len(tensor.shape) != 2 or min(tensor.shape) < 0:
            return None
        if 4 * tensor.shape[0] * tensor.shape[1] != len(tensor.raw):
            return None
        arrays[name] = np.frombuffer(tensor.raw, np.int32).reshape(tensor.shape)
    ids, types, lengths = arrays["IDS"], arrays["TYPES"], arrays["LENGTHS"]
    if ids.shape != types.shape or lengths.shape != (len(ids), 1) or not 1 <= len(ids) <= MOST_ROWS:
        return None
    rows = []
    for i, (length,) in enumerate(lengths.tolist()):
        if not 1 <= length <= min(ids.shape[1], sizes.positions):
            return None
        row, kind = ids[i, :length], types[i, :length]
        if row.min() < 0 or row.max() >= sizes.vocabulary:
            return None
        if kind.min() < 0 or kind.max() >= sizes.types:
            return None
        rows.append((tuple(row.tolist()), tuple(kind.tolist())))
    return rows


def feature_rows(tensors: Mapping[str, Tensor], sizes: Sizes) -> list[Row] | None:
    if set(tensors) != {"FEATURE"}:
        return None
    tensor = tensors["FEATURE"]
    if tensor.dtype != "FP32" or len(tensor.shape) != 2 or tensor.shape[1] != sizes.hidden:
        return None
    size = 4 * sizes.hidden
    if not 1 <= tensor.shape[0] <= MOST_ROWS or len(tensor.raw) != size * tensor.shape[0]:
        return None
    return [(tensor.raw[i : i + size],) for i in range(0, len(tensor.raw), size)]


def rows_of(model: str, tensors: Sequence[Tensor], sizes: Sizes) -> list[Row] | None:
    """The rows that a right answer answers; None where only an error is right.

    Triton reads names as C strings: what follows a NUL is not there.
    """
    named = {str(tensor.name).partition("\0")[0]: tensor for tensor in tensors}
    if len(named) != len(tensors):
        return None
    if model in (*(f"{sizes.model}_{t}" for t in sizes.tiers), f"tokenizer_{sizes.model}"):
        return text_rows(named, sizes)
    if model in [f"encoder_{sizes.model}_{t}" for t in sizes.tiers]:
        return token_rows(named, sizes)
    return feature_rows(named, sizes) if model == f"head_{sizes.model}" else None


def bytes_raw(texts: Sequence[bytes]) -> bytes:
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)


# On the wire.


def over_grpc(model: str, tensors: Sequence[Tensor], **more: Any) -> bytes:
    message = pb.ModelInferRequest(model_name=model, **more)
    for tensor in tensors:
        message.inputs.add(name=tensor.name, datatype=tensor.dtype, shape=tensor.shape)
        message.raw_input_contents.append(tensor.raw)
    return message.SerializeToString()


def over_http(
    tensors: Sequence[Tensor], *, draw: random.Random, **more: Any
) -> tuple[bytes, dict[str, str]]:
    """Body and headers: the binary extension, or JSON where the values can be written so."""
    # Triton fills memory for a JSON input's whole shape before it counts values: see known.py.
    plain = draw.random() < 0.4 and all(math.prod(t.shape) < 10**7 for t in tensors)
    inputs: list[dict[str, Any]] = []
    binary = b""
    for tensor in tensors:
        entry: dict[str, Any] = {
            "name": tensor.name, "datatype": tensor.dtype, "shape": list(tensor.shape)
        }  # fmt: skip
        values = json_values(tensor) if plain else None
        if values is None:
            entry["parameters"] = {"binary_data_size": len(tensor.raw)}
            binary += tensor.raw
        else:
            entry["data"] = values
        inputs.append(entry)
    head = json.dumps({"inputs": inputs, **more}).encode()
    headers = {"Content-Type": "application/octet-stream"}
    if binary or not plain:
        headers["Inference-Header-Content-Length"] = str(len(head))
    return head + binary, headers


def json_values(tensor: Tensor) -> list[Any] | None:
    """The values as JSON has them; None where they cannot be."""
    if tensor.dtype == "INT32" and len(tensor.raw) % 4 == 0:
        return list(np.frombuffer(tensor.raw, np.int32).tolist())
    if tensor.dtype == "FP32" and len(tensor.raw) % 4 == 0:
        return list(np.frombuffer(tensor.raw, np.float32).astype(float).tolist())
    if tensor.dtype != "BYTES":
        return None
    values, at = [], 0
    while at + 4 <= len(tensor.raw):
        (length,) = struct.unpack_from("<I", tensor.raw, at)
        part = tensor.raw[at + 4 : at + 4 + length]
        try:
            values.append(part.decode())
        except UnicodeDecodeError:
            return None
        at += 4 + length
    # JSON's way to write a NUL is cut by readers of C strings.
    return values if at == len(tensor.raw) and "\0" not in "".join(values) else None


def send_as(
    kind: str, draw: random.Random, model: str, tensors: Sequence[Tensor], must: str, **more: Any
) -> Case:
    if draw.random() < 0.5:
        return Case(kind, "grpc", model, over_grpc(model, tensors, **more), must)
    if "parameters" in more:
        more["parameters"] = {k: json_parameter(v) for k, v in more["parameters"].items()}
    if "outputs" in more:
        more["outputs"] = [{"name": output.name} for output in more["outputs"]]
    more.pop("model_version", None)
    body, headers = over_http(tensors, draw=draw, **more)
    return Case(kind, "http", model, body, must, headers)


def json_parameter(value: Any) -> Any:
    return getattr(value, value.WhichOneof("parameter_choice"))


def read_grpc(body: bytes) -> tuple[str, list[Tensor]] | None:
    """What a request says; None if it is no request, or one that Triton must refuse."""
    message = pb.ModelInferRequest()
    try:
        message.ParseFromString(body)
    except Exception:
        return None
    raws = list(message.raw_input_contents)
    tensors = []
    for index, one in enumerate(message.inputs):
        if raws:
            if one.HasField("contents") or len(raws) != len(message.inputs):
                return None
            raw = raws[index]
        else:
            contents = one.contents
            if one.datatype == "BYTES":
                raw = bytes_raw(contents.bytes_contents)
            else:
                raw = np.array(contents.int_contents, np.int32).tobytes()
        tensors.append(Tensor(one.name, one.datatype, tuple(one.shape), raw))
    return message.model_name, tensors


def read_http(
    model: str, body: bytes, headers: Mapping[str, str], sizes: Sizes
) -> list[Tensor] | None:
    """The same of a POST; lenient where JSON readers differ.

    With no JSON before the bytes, they are all of one input ("raw binary request"); that is also
    what Triton makes of a size that is no number.
    """
    head, binary = body, b""
    if "Inference-Header-Content-Length" in headers:
        digits = re.match(r"\s*([+-]?\d+)", headers["Inference-Header-Content-Length"])
        size = int(digits[1]) if digits else 0
        if not 0 <= size <= len(body):
            return None
        head, binary = body[:size], body[size:]
    if not head:
        if model == f"head_{sizes.model}":
            return [Tensor("FEATURE", "FP32", (1, sizes.hidden), binary)]
        return [Tensor("TEXT", "BYTES", (1, 1), bytes_raw([binary]))]
    try:
        found = json.loads(head, strict=False)
        tensors = []
        for one in found["inputs"]:
            shape = tuple(one["shape"])
            if "data" in one:
                values = np.ravel(np.array(one["data"], dtype=object)).tolist()
                if one["datatype"] == "BYTES":
                    raw = bytes_raw([value.encode() for value in values])
                elif one["datatype"] == "FP32":
                    raw = np.array(values, np.float32).tobytes()
                else:
                    raw = np.array(values, np.int32).tobytes()
            else:
                size = one["parameters"]["binary_data_size"]
                raw, binary = binary[:size], binary[size:]
            tensors.append(Tensor(one["name"], one["datatype"], shape, raw))
    except Exception:
        return None
    return tensors


def read(case: Case, sizes: Sizes) -> tuple[str, list[Tensor]] | None:
    """The model that a case asks and what it gives, by its bytes."""
    if case.protocol == "grpc":
        return read_grpc(case.body)
    tensors = read_http(case.model, case.body, case.headers, sizes)
    return None if tensors is None else (case.model, tensors)


def is_poison(case: Case, sizes: Sizes) -> bool:
    """Whether strings are not as long as they say: Triton's Python backend finds it when a batch is
    formed, and then refuses all of that batch (see `fuzz.poison`)."""
    found = read(case, sizes)
    for tensor in found[1] if found else ():
        if tensor.dtype == "BYTES" and len(tensor.shape) == 2 and tensor.shape[1] == 1:
            counted = replace(tensor, name="TEXT")
            if text_rows({"TEXT": counted}, sizes, check=False) is None:
                return True
    return False
