"""ONNX Runtime on the CPU: fp32 and int8 (dynamic, static), plain and through its fusing tool."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peers.export import ONNX_FILES
from peers.padded import Arm, Call
from samp_kernels.interface import Array

PACKAGES = ("onnxruntime", "onnx")


def arms(folder: Path, threads: int) -> Iterator[Arm]:
    """Arms over the models that peers/export.py wrote; waiting threads spin, as they do unasked."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    for column, file, name in ONNX_FILES:
        path = folder / file
        if path.is_file():
            session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
            yield Arm(column, name, _binder(session))


def _binder(session: Any) -> Any:
    def bind(ids: Array, mask: Array, types: Array) -> Call:
        inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}

        def call() -> Array:
            states: Array = session.run(None, inputs)[0]
            return states

        return call

    return bind
