"""Requests for a served model, most of them wrong, each made from (seed, index) alone."""

from __future__ import annotations

import gzip
import json
import random
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2 as pb
from wire import Case, Sizes, Tensor, bytes_raw, over_grpc, over_http, send_as

DTYPES = ("BOOL", "UINT8", "INT8", "INT32", "INT64", "FP16", "FP32", "FP64", "BYTES", "BF16", "X")

# Good requests, which the kinds below spoil.


def some_text(draw: random.Random) -> bytes:
    """Anything that is UTF-8."""
    kind = draw.randrange(8)
    if kind == 0:
        return b""
    if kind == 1:
        return ("".join(chr(draw.randrange(1, 0xD800)) for _ in range(draw.randrange(40)))).encode()
    if kind == 2:
        return "".join(
            draw.choices("😀👨\u200d👩\u0301\u202e\u0000\ufeff\u2028 \t\né电", k=12)
        ).encode()
    if kind == 3:
        return draw.choice(
            [b"[CLS] [SEP] [MASK]", b"\0", b"a" * draw.randrange(1, 3000), b" " * 99]
        )
    words = ("a", "film", "of", "rare", "wit", "dull", "and", "long", "not", "good", "plot", "!")
    return " ".join(draw.choices(words, k=draw.randrange(1, 60))).encode()


def texts(draw: random.Random, rows: int | None = None) -> Tensor:
    rows = rows or draw.choice((1, 1, 1, 2, 5, 8))
    return Tensor("TEXT", "BYTES", (rows, 1), bytes_raw([some_text(draw) for _ in range(rows)]))


def tokens(draw: random.Random, sizes: Sizes, rows: int | None = None) -> list[Tensor]:
    """IDS, TYPES, LENGTHS; what lies behind a row's length is anything."""
    rows = rows or draw.choice((1, 1, 2, 4))
    width = draw.choice((1, 3, 17, 40, draw.randrange(1, sizes.positions + 80)))
    noise = np.random.default_rng(draw.randrange(2**32))
    lengths = noise.integers(1, min(width, sizes.positions) + 1, (rows, 1))
    ids = noise.integers(0, sizes.vocabulary, (rows, width))
    kinds = noise.integers(0, sizes.types, (rows, width))
    behind = np.arange(width) >= lengths
    ids[behind] = noise.integers(-(2**31), 2**31, int(behind.sum()))
    kinds[behind] = noise.integers(-(2**31), 2**31, int(behind.sum()))
    named = (("IDS", ids), ("TYPES", kinds), ("LENGTHS", lengths))
    return [Tensor(n, "INT32", a.shape, a.astype(np.int32).tobytes()) for n, a in named]


def features(draw: random.Random, sizes: Sizes) -> Tensor:
    rows = draw.choice((1, 2, 7))
    noise = np.random.default_rng(draw.randrange(2**32))
    array = noise.normal(0, 10 ** draw.uniform(-3, 6), (rows, sizes.hidden)).astype(np.float32)
    return Tensor("FEATURE", "FP32", array.shape, array.tobytes())


def good(draw: random.Random, sizes: Sizes) -> tuple[str, list[Tensor]]:
    """A model and inputs that it must answer."""
    tier = draw.choice(sizes.tiers)
    kind = draw.randrange(10)
    if kind < 5:
        return f"{sizes.model}_{tier}", [texts(draw)]
    if kind < 6:
        return f"tokenizer_{sizes.model}", [texts(draw)]
    if kind < 9:
        return f"encoder_{sizes.model}_{tier}", tokens(draw, sizes)
    return f"head_{sizes.model}", [features(draw, sizes)]


# The kinds. Each takes a good request and says what must come of it.


def _good(draw: random.Random, sizes: Sizes) -> Case:
    model, tensors = good(draw, sizes)
    return send_as("good", draw, model, tensors, "answer")


def _name(draw: random.Random, sizes: Sizes) -> Case:
    model, tensors = good(draw, sizes)
    names = ("", "text", "TEXT\0", "X" * 5000, "IDS", "\U0001f600", "TEXT_PAIR", "../TEXT")
    spoiled = draw.randrange(len(tensors))
    name = draw.choice([n for n in names if n != tensors[spoiled].name])
    tensors[spoiled] = replace(tensors[spoiled], name=name)
    return send_as("wrong name", draw, model, tensors, "either")


def _count(draw: random.Random, sizes: Sizes) -> Case:
    model, tensors = good(draw, sizes)
    how = draw.randrange(3)
    if how == 0:
        tensors = [*tensors, draw.choice(tensors)]
    elif how == 1:
        tensors = tensors[1:]
    else:
        tensors = [*tensors, replace(tensors[0], name=f"MORE{draw.randrange(9)}")] * draw.choice(
            (1, 40)
        )
    return send_as("missing, twice or too many", draw, model, tensors, "fail")


def _dtype(draw: random.Random, sizes: Sizes) -> Case:
    model, tensors = good(draw, sizes)
    i = draw.randrange(len(tensors))
    other = draw.choice([d for d in (*DTYPES, "", "bytes", "int32") if d != tensors[i].dtype])
    tensors[i] = replace(tensors[i], dtype=other)
    return send_as("wrong dtype", draw, model, tensors, "fail")


def _shape(draw: random.Random, sizes: Sizes) -> Case:
    model, tensors = good(draw, sizes)
    i = draw.randrange(len(tensors))
    shape = list(tensors[i].shape)
    values = (0, -1, -2, 2, 3, 65, 2**31 - 1, 2**31, 2**32 + 1, 2**62, 2**63 - 1, -(2**63))
    how = draw.randrange(4)
    if how == 0:
        shape[draw.randrange(len(shape))] = draw.choice(values)
    elif how == 1:
        shape = [draw.choice(values) for _ in range(draw.choice((0, 1, 2, 3, 8, 100)))]
    elif how == 2:
        shape = [*shape, 1]
    else:
        shape = shape[::-1]
    tensors[i] = replace(tensors[i], shape=tuple(shape))
    return send_as("wrong shape", draw, model, tensors, "either")


def _length(draw: random.Random, sizes: Sizes) -> Case:
    """Bytes that are more or fewer than the shape says, or whose own lengths lie."""
    model, tensors = good(draw, sizes)
    i = draw.randrange(len(tensors))
    raw = tensors[i].raw
    how = draw.randrange(4)
    if how == 0:
        raw = raw[: draw.randrange(len(raw))]
    elif how == 1:
        raw += draw.randbytes(draw.choice((1, 3, 4, 4096)))
    elif how == 2:
        lie = draw.choice((0, 1, 2**31, 2**32 - 1, 2**32 - 4, len(raw), len(raw) + 1, 10**6))
        raw = struct.pack("<I", lie) + raw[4:]
    else:
        raw = b""
    tensors[i] = replace(tensors[i], raw=raw)
    return send_as("length lies", draw, model, tensors, "either")


def _encoder(draw: random.Random, sizes: Sizes) -> Case:
    tensors = tokens(draw, sizes)
    i = draw.choice((0, 0, 1, 2, 2))
    array = np.frombuffer(tensors[i].raw, np.int32).reshape(tensors[i].shape).copy()
    place = (draw.randrange(array.shape[0]), draw.randrange(array.shape[1]))
    edges = (-1, 0, 1, 2, sizes.types, sizes.positions, sizes.positions + 1, sizes.vocabulary)
    array[place] = draw.choice((*edges, sizes.vocabulary - 1, 2**31 - 1, -(2**31), 10**6))
    tensors[i] = replace(tensors[i], raw=array.tobytes())
    if draw.random() < 0.2:
        other = tokens(draw, sizes)
        tensors[draw.randrange(3)] = other[draw.randrange(3)]
    model = f"encoder_{sizes.model}_{draw.choice(sizes.tiers)}"
    return send_as("lies to the encoder", draw, model, tensors, "either")


def _batch(draw: random.Random, sizes: Sizes) -> Case:
    rows = draw.choice((64, 65, 66, 128, 1000, 5000))
    short = Tensor("TEXT", "BYTES", (rows, 1), bytes_raw([b"a film"] * rows))
    if draw.random() < 0.7:
        return send_as("batch over 64", draw, f"{sizes.model}_fast", [short], "either")
    many = [
        Tensor(name, "INT32", (rows, width), np.full((rows, width), 2, np.int32).tobytes())
        for name, width in (("IDS", 8), ("TYPES", 8), ("LENGTHS", 1))
    ]
    many[1] = replace(many[1], raw=b"\0" * len(many[1].raw))
    return send_as("batch over 64", draw, f"encoder_{sizes.model}_fast", many, "either")


def _utf8(draw: random.Random, sizes: Sizes) -> Case:
    rows = [some_text(draw) for _ in range(draw.choice((1, 2, 6)))]
    bad = draw.choice((b"\xff", b"caf\xe9", b"\xed\xa0\x80", b"\xc0\x80", b"\xf5\x80\x80\x80"))
    rows[draw.randrange(len(rows))] += bad
    if draw.random() < 0.3:
        rows[0] = draw.randbytes(draw.randrange(1, 500))
    model = draw.choice((f"{sizes.model}_exact", f"{sizes.model}_fast", f"tokenizer_{sizes.model}"))
    tensor = Tensor("TEXT", "BYTES", (len(rows), 1), bytes_raw(rows))
    return send_as("not UTF-8", draw, model, [tensor], "either")


def _head(draw: random.Random, sizes: Sizes) -> Case:
    tensor = features(draw, sizes)
    array = np.frombuffer(tensor.raw, np.float32).reshape(tensor.shape).copy()
    for _ in range(draw.choice((1, 1, 20))):
        place = (draw.randrange(array.shape[0]), draw.randrange(array.shape[1]))
        array[place] = draw.choice((np.nan, np.inf, -np.inf, 3.4e38, 1e-45))
    tensor = replace(tensor, raw=array.tobytes())
    body = over_grpc(f"head_{sizes.model}", [tensor])
    return Case("odd floats to the head", "grpc", f"head_{sizes.model}", body, "answer")


def _asked(draw: random.Random, sizes: Sizes) -> Case:
    """Outputs, models, versions that are not there; parameters of the wrong kind."""
    model, tensors = good(draw, sizes)
    how = draw.randrange(4)
    if how == 0:
        outputs = [pb.ModelInferRequest.InferRequestedOutputTensor(name=n) for n in ("", "NOPE")]
        asked = outputs[draw.randrange(2) :]
        return send_as("unknown output", draw, model, tensors, "fail", outputs=asked)
    if how == 1:
        model = draw.choice(("nope", "film-reviews", model + "x", "a" * 3000, "tokenizer_", "%00"))
        return send_as("unknown model", draw, model, tensors, "fail")
    if how == 2:
        body = over_grpc(model, tensors, model_version=draw.choice(("2", "-1", "x", "9" * 40)))
        return Case("unknown version", "grpc", model, body, "fail")
    value = draw.choice(
        (
            pb.InferParameter(int64_param=draw.choice((-1, 0, 2**62, -(2**63)))),
            pb.InferParameter(string_param="x" * draw.choice((0, 7, 9000))),
            pb.InferParameter(bool_param=True),
        )
    )
    names = ("timeout", "priority", "sequence_id", "sequence_start", "zzz", "binary_data_output")
    name = draw.choice(names)
    return send_as("odd parameters", draw, model, tensors, "unread", parameters={name: value})


def _shared_memory(draw: random.Random, sizes: Sizes) -> Case:
    message = pb.ModelInferRequest(model_name=f"{sizes.model}_fast")
    one = message.inputs.add(name="TEXT", datatype="BYTES", shape=(1, 1))
    one.parameters["shared_memory_region"].string_param = draw.choice(("", "x", "/samp-", "../x"))
    one.parameters["shared_memory_byte_size"].int64_param = draw.choice((0, 8, -1, 2**62))
    one.parameters["shared_memory_offset"].int64_param = draw.choice((0, -1, 2**63 - 1))
    body = message.SerializeToString()
    return Case("shared memory that is not there", "grpc", f"{sizes.model}_fast", body, "fail")


def damaged(draw: random.Random, body: bytes) -> bytes:
    """A few bytes changed, cut out, put in, doubled."""
    content = bytearray(body[:20000])
    for _ in range(draw.choice((1, 1, 2, 5, 30))):
        at = draw.randrange(len(content) or 1)
        how = draw.randrange(5)
        if how == 0 and content:
            content[at] ^= 1 << draw.randrange(8)
        elif how == 1:
            del content[at : at + draw.choice((1, 2, 50))]
        elif how == 2:
            content[at:at] = draw.randbytes(draw.choice((1, 4, 60)))
        elif how == 3:
            content[at:at] = content[at : at + 40]
        elif content:
            content[at] = draw.choice((0, 0xFF, 0x7F, 0x80))
    return bytes(content)


def _damaged_protobuf(draw: random.Random, sizes: Sizes) -> Case:
    model, tensors = good(draw, sizes)
    body = damaged(draw, over_grpc(model, tensors))
    return Case("damaged protobuf", "grpc", model, body, "either")


def _random_protobuf(draw: random.Random, sizes: Sizes) -> Case:
    body = draw.randbytes(draw.choice((0, 1, 10, 100, 5000)))
    return Case("random bytes as protobuf", "grpc", "", body, "either")


def _damaged_json(draw: random.Random, sizes: Sizes) -> Case:
    model, tensors = good(draw, sizes)
    body, headers = over_http(tensors, draw=draw)
    body = damaged(draw, body)
    return Case("damaged JSON", "http", model, body, "either", headers)


def _random_json(draw: random.Random, sizes: Sizes) -> Case:
    model, _ = good(draw, sizes)
    how = draw.randrange(4)
    if how == 0:
        body = draw.randbytes(draw.choice((0, 1, 10, 1000)))
    elif how == 1:
        body = b"[" * draw.choice((10, 100, 500)) + b"]" * draw.choice((0, 10, 500))
    elif how == 2:
        values: tuple[Any, ...] = (None, True, -1, 1e999, "", [], {}, "TEXT", [[]], {"a": 1})
        entry = {
            k: draw.choice(values) for k in ("name", "datatype", "shape", "data", "parameters")
        }
        entry = {k: v for k, v in entry.items() if draw.random() < 0.8}
        body = json.dumps({"inputs": draw.choice(([entry], entry, [], [entry] * 50))}).encode()
    else:
        body = draw.choice((b"", b"{}", b"null", b'{"inputs":', b'{"inputs":[{}]}', b"\0" * 50))
    return Case("random bytes as JSON", "http", model, body, "either")


def _binary(draw: random.Random, sizes: Sizes) -> Case:
    """The binary extension's two sizes: of the JSON before the bytes, and of the bytes."""
    model, tensors = good(draw, sizes)
    inputs = [
        {"name": t.name, "datatype": t.dtype, "shape": list(t.shape),
         "parameters": {"binary_data_size": len(t.raw)}}
        for t in tensors
    ]  # fmt: skip
    raw = b"".join(t.raw for t in tensors)
    header: str | None = None
    how = draw.randrange(4)
    if how == 0:
        lie = draw.choice((-1, 0, 1, 2**31, 2**62, -(2**63), len(raw) + 1, "8", None, 1.5))
        inputs[draw.randrange(len(inputs))]["parameters"] = {"binary_data_size": lie}
    elif how == 1:
        raw = raw[: draw.randrange(len(raw) or 1)]
    elif how == 2:
        header = draw.choice(("-1", "0", "1", "99999999", str(2**63), "x", "", "1e3", " 7"))
    else:
        raw += draw.randbytes(draw.choice((1, 64)))
    head = json.dumps({"inputs": inputs}).encode()
    headers = {"Inference-Header-Content-Length": header or str(len(head))}
    if header == "":
        headers["Inference-Header-Content-Length"] = ""
    return Case("binary sizes lie", "http", model, head + raw, "either", headers)


def _gzip(draw: random.Random, sizes: Sizes) -> Case:
    model, tensors = good(draw, sizes)
    body, headers = over_http(tensors, draw=draw)
    packed = damaged(draw, gzip.compress(body)) if draw.random() < 0.8 else body
    headers["Content-Encoding"] = draw.choice(("gzip", "deflate"))
    return Case("damaged compression", "http", model, packed, "unread", headers)


def _long(draw: random.Random, sizes: Sizes) -> Case:
    """About a megabyte of text."""
    unit = draw.choice((b"a film of rare wit ", b"x", "电影".encode(), b" ", "e\u0301".encode()))
    texts_ = [unit * (1_000_000 // len(unit))] * draw.choice((1, 1, 3))
    tensor = Tensor("TEXT", "BYTES", (len(texts_), 1), bytes_raw(texts_))
    return send_as("1 MB of text", draw, f"{sizes.model}_fast", [tensor], "answer")


KINDS: tuple[tuple[int, Callable[[random.Random, Sizes], Case]], ...] = (
    (200, _good), (60, _name), (60, _count), (60, _dtype), (90, _shape), (90, _length),
    (110, _encoder), (15, _batch), (60, _utf8), (30, _head), (70, _asked), (15, _shared_memory),
    (80, _damaged_protobuf), (40, _random_protobuf), (80, _damaged_json), (40, _random_json),
    (60, _binary), (25, _gzip), (2, _long),
)  # fmt: skip


def case(seed: int, index: int, sizes: Sizes) -> Case:
    draw = random.Random(f"{seed}/{index}")
    (make,) = draw.choices([kind for _, kind in KINDS], [weight for weight, _ in KINDS])
    return make(draw, sizes)
