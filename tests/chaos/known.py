"""What the embedded Triton does that no model of ours can prevent: measured and stated."""

from __future__ import annotations

import http.client
import json
import struct
import threading
import time
from pathlib import Path

import grpc
import wire
from place import MODEL, WORK, Check, Load, Serving, demo_texts, serve

ELEMENTS = 1 << 28


def poison(serving: Serving, seconds: float = 4.0) -> Check:
    """Strings that are shorter than they say, beside good requests: what the neighbours get."""
    ensemble = f"{MODEL}_fast"
    body = wire.over_grpc(
        ensemble, [wire.Tensor("TEXT", "BYTES", (1, 1), struct.pack("<I", 99) + b"x" * 91)]
    )
    load = Load(serving.grpc, ensemble, 6, demo_texts(8))
    call = grpc.insecure_channel(serving.grpc).unary_unary(
        "/inference.GRPCInferenceService/ModelInfer"
    )
    sent = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            call(body, timeout=10)
        except grpc.RpcError:
            sent += 1
        time.sleep(0.01)
    load.stop()
    words = {text for *_, text in load.errors}
    share = len(load.errors) / max(1, len(load.errors) + len(load.answers))
    return Check(
        "known limits",
        "strings that are shorter than they say, sent beside good requests over 6 connections",
        f"{sent} such requests: {share:.1%} of the good ones failed with the same words "
        "(Triton's Python backend refuses the whole batch), none was answered wrong",
        None if load.wrong == 0 and all("incomplete string" in word for word in words) else False,
        "make chaos CHAOS='--only limits'",
        {"bad": sent, "neighbours_failed": len(load.errors), "neighbours": len(load.answers)},
    )


def memory(serving: Serving, guarded: bool = False) -> Check:
    """A JSON input whose shape is large and whose data is one number; with and without a key."""
    status = Path(f"/proc/{serving.triton}/status")

    def peak_mb() -> float:
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmRSS"))
        return int(line.split()[1]) / 1e3

    before = peak = peak_mb()
    tensor = {"name": "FEATURE", "datatype": "FP32", "shape": [ELEMENTS], "data": [1.0]}
    body = json.dumps({"inputs": [tensor]})
    answers: list[int] = []

    def send() -> None:
        connection = http.client.HTTPConnection(serving.http, timeout=60)
        connection.request("POST", f"/v2/models/head_{MODEL}/infer", body)
        answers.append(connection.getresponse().status)

    begun = time.monotonic()
    thread = threading.Thread(target=send)
    thread.start()
    while thread.is_alive():
        peak = max(peak, peak_mb())
        time.sleep(0.01)
    seconds = time.monotonic() - begun
    if guarded:
        return Check(
            "known limits",
            "the same to a server with --key-file, without the key: refused before it is read",
            f"refused ({answers}) after {seconds:.1f} s, {peak - before:,.0f} MB",
            answers == [403] and peak - before < ELEMENTS * 4 / 1e7,
            "make chaos CHAOS='--only limits'",
            {"seconds": round(seconds, 2), "mb": round(peak - before)},
        )
    return Check(
        "known limits",
        f"HTTP and JSON: {len(body)} bytes that say shape [2^28] and give one number",
        f"refused ({answers}) after {seconds:.1f} s, in which Triton filled "
        f"{peak - before:,.0f} MB: four bytes an element, before it counts the values",
        None if answers and answers[0] >= 400 else False,
        "make chaos CHAOS='--only limits'",
        {"seconds": round(seconds, 2), "mb": round(peak - before)},
    )


def campaign(serving: Serving) -> list[Check]:
    key = WORK / "key"
    key.write_text("only-for-this-campaign\n")
    made = [poison(serving), memory(serving)]
    with serve(serving.out, "--key-file", key) as guarded:
        return [*made, memory(guarded, guarded=True)]
